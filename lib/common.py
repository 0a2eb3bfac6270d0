"""On its way out: old names of lib/stage.py and lib/distributed.py, until every file says the new ones."""

import argparse
import math
from types import SimpleNamespace

from lib import stage
from lib.records import *  # noqa: F403
from lib.records import np, os, shutil, signal, torch, whole_folder  # noqa: F401
from lib.distributed import *  # noqa: F403
from lib.distributed import PATIENCE, dist, fully_shard, global_sum, keep_freed_memory, unsharded  # noqa: F401
from lib.stage import *  # noqa: F403
from lib.stage import Flag, run_stage  # noqa: F401  # noqa: F401

gathered = unsharded
written_whole = whole_folder
run = run_stage


def total(values):
    return float(sum(values)), len(values)


def global_means(totals):
    sums = torch.tensor(list(totals.values()), dtype=torch.float64)
    sums = global_sum(sums.cuda() if torch.cuda.is_available() else sums).tolist()
    return {key: number / count for key, (number, count) in zip(totals, sums) if count}


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def parse_with_preset(parser, presets, argv=None, least=()):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for p in (first, parser):
        p.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    parser.allow_abbrev = False
    preset = presets[first.parse_known_args(argv)[0].preset]
    unknown = set(preset) - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"the preset names flags that do not exist: {sorted(unknown)}")
    parser.set_defaults(**preset)
    return at_least(parser, parser.parse_args(argv), least)


def at_least(parser, args, least):
    for key, low, *high in least:
        value = getattr(args, key)
        if value is not None and not (low <= value <= (high[0] if high else math.inf)):
            parser.error(
                f"--{key.replace('_', '-')} {value}: must be {low} or more"
                + (f", and {high[0]} at most" if high else "")
            )
    return args


def begin(title, args, neutral=(), needs=()):
    stage.begin(
        title,
        args,
        [SimpleNamespace(name="--" + key.replace("_", "-"), neutral=True) for key in neutral],
        needs,
    )
