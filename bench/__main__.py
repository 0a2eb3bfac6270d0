"""
Speed of the fast paths, as ratios to the straightforward way (bench/naive.py) in the same run.

  python -m bench wm                   the world model on two CPU cores: 10 minutes, with nothing else on the machine
  python -m bench wm --quick           the same at toy size, in seconds: shows that it runs, measures nothing
  python -m bench rollout              dialogues of the policy, two calls each, against `generate` every turn: a minute
  python -m bench grpo --against trl   a GRPO step against TRL's, where TRL is installed: 3 minutes
  python -m bench memory --preset astra               what each of 8, 16, 64 GPUs holds, counted: seconds, no GPU
  python -m bench data                 triples of a scan: seconds per scan, and how they grow with its frames: 3 minutes

One GPU, the published shapes, no files needed (tests/gpu_speed.py):
  python -m bench wm --preset astra --random-init          seconds per view and MFU: 5 minutes
  python -m bench rollout --preset astra --random-init     prefill and decoding against the memory's bound: 5 minutes
  python -m bench train_wm --preset astra                  an update of the simulator, with as many layers as fit
  python -m bench train_rl --preset astra                  an update of the policy by GRPO, the same

Prints tables for a reader; the last line is one JSON object for a program. How each is measured stands in
tests/wm_speed.py, policy_speed.py and gpu_speed.py.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

import train_rl
import train_wm
from bench import gpu as gpu_speed
from bench import policy as policy_speed
from bench import wm as wm_speed
from bench.room_scan import room_scene, write_scan_folder
from extras.scans.scene import read_scene
from extras.scans.triples import Rules, find_triples, write_triples
from lib import budget
from lib.bagel_files import resized
from lib.common import run
from policy import HEAD_TOKENS, Policy
from world_model import MAX_TOKENS, WorldModel

# ---------------------------------------------------------------- bench.py memory

PICTURE, SENTENCE, GIVEN = (
    512,
    20,
    4,
)  # of the astra budget: pixels a side, tokens of an instruction, views


def memory(args):
    """What each GPU holds while train_rl.py and train_wm.py run, in GB by part: tables, then the JSON line."""
    tiny = args.preset == "tiny"
    rl = vars(train_rl.parse_args(["--preset", args.preset]))
    wm_flags = vars(train_wm.parse_args(["--preset", args.preset]))
    model, network = (
        (Policy.tiny().model, WorldModel.tiny().network)
        if tiny
        else (budget.qwen3_vl_8b(), budget.bagel_7b())
    )
    policy, simulator = budget.policy_shapes(model), budget.bagel_shapes(network)
    side = 32 if tiny else PICTURE
    limits = network.config.settings.vae_limits, network.config.settings.vit_limits
    latent, vit = (
        math.prod(resized(side, side, limit)) // cell**2 + 2
        for limit, cell in zip(limits, (16, network.config.vit_patch))
    )
    vision = model.config.vision_config
    unit, levels = (
        vision.patch_size * vision.spatial_merge_size,
        1 + len(vision.deepstack_visual_indexes),
    )
    context = GIVEN * (latent + vit) + wm_flags["targets"] * (latent + SENTENCE)
    results = {
        "bench": "memory",
        "preset": args.preset,
        "policy_parameters": policy.learned + policy.frozen,
        "simulator_parameters": simulator.learned,
        "length": args.length,
    }
    print(
        f"policy {results['policy_parameters'] / 1e6:,.1f} M parameters, simulator {simulator.learned / 1e6:,.1f} M; "
        f"dialogues of {args.length:,} tokens, {rl['micro_batch_tokens']:,} tokens a pass; simulator updates of "
        f"{context:,} tokens a pass. GB per GPU:"
    )
    for gpus in args.gpus:
        dialogues = -(-rl["questions"] * rl["group"] // gpus)
        rows = min(rl["rows"], dialogues)
        images = (GIVEN / rl["group"] + 3) * dialogues  # of a step; 3: as many as may be imagined
        features = budget.BF16 * images * (side // unit) ** 2 * levels * policy.width
        tables = {
            f"train_rl {phase}": parts
            for phase, parts in budget.rl_budget(
                policy,
                simulator,
                gpus,
                rows,
                args.length,
                features,
                MAX_TOKENS,
                rl["micro_batch_tokens"],
                HEAD_TOKENS,
                rl.get("gradient_checkpointing", False),
            ).items()
        }
        tables |= {
            f"train_wm {phase}": parts
            for phase, parts in budget.wm_budget(
                simulator,
                gpus,
                wm_flags["micro_contexts"] * context,
                MAX_TOKENS,
                wm_flags["gradient_checkpointing"],
            ).items()
        }
        parts = list(tables["train_wm update"])
        print(
            f"\n{f'{gpus} GPUs':18}"
            + "".join(f"{part:>12}" for part in parts)
            + f"{'total':>10}{'of 80 GB':>10}"
        )
        for title, table in tables.items():
            total = sum(table.values())
            print(
                f"{title:18}"
                + "".join(f"{table[part] / 1e9:12.2f}" for part in parts)
                + f"{total / 1e9:10.2f}{total / 80e9:10.0%}"
            )
            results[f"{title.replace(' ', '_')}_gb_{gpus}"] = round(total / 1e9, 3)
        each = budget.cache(policy, args.length)
        room = (
            72e9 - sum(tables["train_rl rollout"].values()) + rows * each
        )  # of 80 GB, 8 left free
        served = (
            room + tables["train_rl rollout"]["simulator"] + budget.cache(simulator, MAX_TOKENS)
        )
        fits, fits_served = max(0, int(room // each)), max(0, int(served // each))
        print(
            f"{rows} dialogues are written together; {fits} fit beside the simulator, {fits_served} if it is a URL"
        )
        results |= {
            f"rollout_rows_{gpus}": rows,
            f"rollout_rows_that_fit_{gpus}": fits,
            f"rollout_rows_that_fit_with_served_simulator_{gpus}": fits_served,
        }
    print(json.dumps(results))


# ---------------------------------------------------------------- bench.py data


def data(args):
    """Triples of one scan on one core: CPU-seconds by the number of frames that are looked at."""
    size, counts = (64, (20, 40)) if args.quick else (512, (60, 120, 240))
    scans, cores, rows = 11_292, 16, {}  # the paper's; cores of a workstation
    with tempfile.TemporaryDirectory() as folder:
        room = room_scene(0, counts[-1], size)
        write_scan_folder(Path(folder) / "scans" / "room", room.frames, room.up)
        print(
            f"one room as a scan: {counts[-1]} frames of {size} x {size}, JPEG and 16-bit PNG; one core\n"
            f"{'frames':>8}{'CPU s':>8}{'to find':>9}{'triples':>9}{'per s':>8}",
            flush=True,
        )
        for count in counts:
            scene, rules = (
                read_scene("folder", Path(folder) / "scans", "room"),
                Rules(frames=count, size=size),
            )
            start = time.process_time()
            find_triples(scene, np.random.default_rng(0), rules)
            found = time.process_time()
            triples = len(
                write_triples(scene, Path(folder) / f"out{count}", 0, rules)[0]
            )  # finds them once more
            spent = time.process_time() - found
            rows[count] = spent, triples
            print(
                f"{count:8}{spent:8.1f}{found - start:9.1f}{triples:9}{triples / spent:8.2f}",
                flush=True,
            )
    seconds, triples = rows[counts[-1]]
    hours = scans * seconds / cores / 3600
    print(
        f"{scans:,} scans, the paper's, on {cores} cores: {hours:.1f} hours, {scans * triples:,} triples (paper: "
        f"544,197)"
    )
    print(
        json.dumps(
            {
                "bench": "data",
                "quick": args.quick,
                "triples_per_second_per_core": round(triples / seconds, 3),
                "cpu_seconds_per_scan": {count: round(row[0], 2) for count, row in rows.items()},
                "hours_for_the_papers_scans": round(hours, 2),
            }
        )
    )


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = p.add_subparsers(dest="what", required=True)
    w = what.add_parser(
        "wm", help="the world model's sampler", description="The world model's sampler."
    )
    w.set_defaults(bench={"tiny": wm_speed.wm, "astra": gpu_speed.wm})
    w.add_argument(
        "--steps",
        type=int,
        help="Euler steps (default: 25 at the middle size, 49 at the true size)",
    )
    w.add_argument("--threads", type=int, default=2, help="CPU threads")
    w.add_argument(
        "--quick", action="store_true", help="tiny: 2 steps, one pair, 2 layers, 64 x 64 pictures"
    )
    r = what.add_parser(
        "rollout", help="the policy's rollouts", description="The policy's rollouts."
    )
    r.set_defaults(bench={"tiny": policy_speed.rollout, "astra": gpu_speed.rollout})
    r.add_argument("--threads", type=int, default=1, help="CPU threads")
    r.add_argument(
        "--quick",
        action="store_true",
        help="tiny: two questions x two rollouts, one run of each kind",
    )
    for sampler in (w, r):
        sampler.add_argument(
            "--preset",
            choices=("tiny", "astra"),
            default="tiny",
            help="tiny: against bench/naive.py on the CPU; astra: the published size on one GPU",
        )
        sampler.add_argument(
            "--model", help="folder of a checkpoint (default of tiny: random weights)"
        )
        sampler.add_argument(
            "--random-init", action="store_true", help="astra: build the shapes without any file"
        )
        sampler.add_argument(
            "--repeats",
            type=int,
            default=3,
            help="runs of each kind (half as many of the world model's batch 8); medians count",
        )
    for name, bench in (("train_wm", gpu_speed.train_wm), ("train_rl", gpu_speed.train_rl_step)):
        t = what.add_parser(
            name, help=f"one update of {name}.py", description=f"One update of {name}.py."
        )
        t.set_defaults(bench={"tiny": bench, "astra": bench})
        t.add_argument(
            "--preset",
            choices=("tiny", "astra"),
            default="tiny",
            help="astra: one GPU, random weights",
        )
        t.add_argument(
            "--layers", type=int, help="astra: of the language model (default: as many as fit)"
        )
        t.add_argument("--repeats", type=int, default=3, help="updates of each kind; medians count")
        t.add_argument("--threads", type=int, default=1, help="CPU threads")
    g = what.add_parser("grpo", help="one GRPO step", description="One GRPO step.")
    g.set_defaults(bench={"tiny": policy_speed.grpo}, preset="tiny")
    g.add_argument(
        "--against", choices=("trl",), default="trl", help="whose step stands beside ours"
    )
    g.add_argument("--repeats", type=int, default=3, help="steps of each; medians count")
    g.add_argument(
        "--quick", action="store_true", help="two questions x two rollouts, one step of each"
    )
    m = what.add_parser("memory", help="what each GPU holds", description="What each GPU holds.")
    m.set_defaults(bench={"tiny": memory, "astra": memory})
    m.add_argument("--preset", choices=("tiny", "astra"), default="astra")
    m.add_argument("--gpus", type=int, nargs="+", help="default: 8 16 64; tiny: 1")
    m.add_argument(
        "--length", type=int, help="tokens of the longest dialogue (default: 4096; tiny: 160)"
    )
    d = what.add_parser("data", help="triples of scans", description="Triples of scans.")
    d.set_defaults(bench={"tiny": data}, preset="tiny")
    d.add_argument("--quick", action="store_true", help="40 frames of 64 x 64 pixels")
    args = p.parse_args(argv)
    if args.what == "memory":
        args.gpus, args.length = (
            args.gpus or ([1] if args.preset == "tiny" else [8, 16, 64]),
            args.length or (160 if args.preset == "tiny" else 4096),
        )
    if args.what == "wm":
        args.steps = args.steps or (2 if args.quick else 49 if args.preset == "astra" else 25)
    return args


def main(argv=None):
    """Run one benchmark."""
    args = parse_args(argv)
    args.bench[args.preset](args)


if __name__ == "__main__":
    run(main)
