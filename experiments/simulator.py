"""
What the simulator's evidence rests on: a list of runs, and the table of what came out (`make evidence`).

  python -m experiments simulator --list                          every row, its CPU-minutes, whether it is finished
  python -m experiments simulator                                 run what is missing, one after the other; stopped, it goes on
  python -m experiments simulator --only "ring-*" --seeds 0 1 2   some rows, three seeds of the training each

A row trains the tiny simulator (train_wm.py, with flags of its own, as many steps as every other row) and imagines all
test triples of its data: rooms that nothing was trained on. Rows of the same data answer the same queries with the same
noise, so that their difference is paired. Beside them stand two rows that train nothing, a baseline and an oracle.

Out, in out/evidence/: data/<data>/, <row>-s<seed>/{the model, views.npz (scores of every view), result.json}, table.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import common, consistency
from lib.simulators import imagine_targets, load_triples
from lib.streams import numpy_stream
from world_model import WorldModel


class Data(NamedTuple):
    """A set of triples: flags of `data.py triples` and of train_wm.py, CPU-minutes of 1,000 steps and of a look."""

    make: str
    train: str
    minutes: float
    look: float  # imagining and scoring all test views


class Run(NamedTuple):
    """A row: its data, and what its views come from: a simulator trained with these flags, or views that need none."""

    name: str
    data: str
    flags: str = ""
    views: str = ""


DATA = {  # each takes about 2 CPU-minutes to make, that of 64px 8
    "ring": Data("--layout ring", "", 3.7, 0.5),
    "fine": Data("--layout fine", "", 3.7, 0.5),
    "shuffled": Data("--layout shuffled", "", 3.7, 0.5),
    "six": Data("--layout six", "", 4.6, 0.5),
    "apart": Data("--layout apart", "", 3.2, 0.4),
    "64px": Data("--size 64", "--size 64", 15.7, 2.0),
    "rooms250": Data("--rooms 250", "", 3.7, 0.5),
    "rooms1000": Data("--rooms 1000", "", 3.7, 0.5),
}
HARD = ("fine", "shuffled", "apart", "six", "64px")
PLAIN, CONTENT = "--warp-weight 0", "--warp-weight 0.5"
RUNS = [
    Run("ring-plain", "ring", PLAIN),
    Run("ring-content", "ring", CONTENT),  # agreement with the warped context
    Run(
        "ring-untuned", "ring", f"{PLAIN} --shuffle-instructions"
    ),  # the twin that learned no motion
    Run("rooms250-plain", "rooms250", PLAIN),
    Run("rooms1000-plain", "rooms1000", PLAIN),
    Run("fine-untuned", "fine", f"{PLAIN} --shuffle-instructions"),
    *(
        Run(f"{data}-{term}", data, flags)
        for data in HARD
        for term, flags in (("plain", PLAIN), ("content", CONTENT))
    ),
    *(
        Run(f"{data}-{views.split()[0]}", data, views=views)
        for data in ("ring", *HARD)
        for views in ("nearest context view", "warp with true depth and pose")
    ),  # a baseline, an oracle
]


# ---- running --------------------------------------------------------------------------------------------------------


def minutes(run, steps):
    """CPU-minutes that a row is expected to take, its data not counted."""
    data = DATA[run.data]
    return data.look + (0 if run.views else data.minutes * steps / 1000)


def call(*command):
    """Run a stage on one CPU thread and wait for it. Ctrl-C reaches it through us, and it saves before it leaves."""
    child = subprocess.Popen(
        [sys.executable, *command],
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if code:
        common.fail(
            f"`python {' '.join(command)}` ended with code {code}; what it said stands above."
        )


def chosen(runs, patterns, script):
    """The rows whose names match one of the patterns, in the order of the list; a sentence if none does."""
    named = [run for run in runs if any(fnmatch(run.name, pattern) for pattern in patterns)]
    return named or common.fail(
        f"No row is called {' or '.join(patterns)}. `python {script} --list` names them all."
    )


def list_parser(doc, example, out, where=""):
    """The parser of a list of rows: which rows, which seeds, where, or only the list."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--only", nargs="+", default=["*"], help=f"names of rows, or patterns such as '{example}'"
    )
    p.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="of training; what trains nothing is of seed 0",
    )
    p.add_argument("--out", default=out, help=f"folder of the rows{where}")
    p.add_argument(
        "--list", action="store_true", help="print the rows and what they need, and run nothing"
    )
    return p


def show_jobs(jobs, commands, out):
    """Print --list: every (row, seed), whether it is finished, and its commands."""
    for run, seed in jobs:
        place = out / f"{run.name}-s{seed}"
        print(
            place.name.ljust(32)
            + ("done  " if (place / "result.json").exists() else "      ")
            + "; ".join(" ".join([script, *flags]) for script, flags in commands(run, seed, out))
        )


def markdown(head, rows):
    """The lines of a table; cells are texts."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def gap(gain):
    """What `lib.scores.gain_over` found, as a cell; empty if there is nothing to compare with."""
    return "{:+.3f} [{:+.3f} {:+.3f}]".format(gain["difference"], *gain["ci95"]) if gain else ""


def publish(lines, out, legend):
    """Write the lines of table.md, and print them with what they mean."""
    text = "\n".join(lines) + "\n"
    common.write_text(out / "table.md", text)
    print(f"{text}\n{legend} {out}/table.md")


def is_made(place, setting):
    """Whether the row in `place` is finished; a sentence if by another setting: {key: what result.json has to say}."""
    if not (place / "result.json").exists():
        return False
    before = json.loads((place / "result.json").read_text())
    return setting.items() <= before.items() or common.fail(
        f"{place} was made with { ({key: before.get(key) for key in setting}) }, not with {setting}. Remove it, or give "
        f"another --out."
    )


def finish(run, seed, steps, out):
    """Do what is missing of one row, result.json last; a finished row is left as it is."""
    folder, data = out / f"{run.name}-s{seed}", out / "data" / run.data
    trains = not run.views
    setting = {"data": DATA[run.data].make, "flags": run.flags, "steps": steps if trains else 0}
    if is_made(folder, setting):
        return
    common.say(f"{folder.name}: about {minutes(run, steps):.1f} CPU-minutes")
    if not (data / "triples_test.jsonl").exists():
        call(
            "data.py", "triples", "--out", str(data), "--threads", "1", *DATA[run.data].make.split()
        )
    if trains:
        call(
            "train_wm.py",
            "--data",
            str(data),
            "--out",
            str(folder),
            "--steps",
            str(steps),
            "--seed",
            str(seed),
            "--threads",
            "1",
            *DATA[run.data].train.split(),
            *run.flags.split(),
        )
    start = time.process_time()
    values = look(run, folder, data)
    spent = (
        json.loads((folder / "done.json").read_text())["cpu_seconds"]
        if trains
        else time.process_time() - start
    )
    scores = common.readable(
        {key: float(value) for key, value in consistency.scores_of(values.sum(0)).items()}
    )
    common.write_json(
        folder / "result.json", {**setting, **scores, "views": len(values), "cpu_seconds": spent}
    )


def look(run, folder, data):
    """Score every test view of the simulator in `folder` -> `consistency.per_view` (n, 11).

    It stays in folder/views.npz, with ids and rooms.
    """
    rows = load_triples(data / "triples_test.jsonl")
    if run.views:
        views = (consistency.trivial_views(rows) | consistency.oracle_views(rows))[run.views]
    else:
        views = imagine_targets(WorldModel.load(folder), rows, title=run.name)
    values = consistency.per_view(rows, views, consistency.recover_all(rows, views)[0])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "views.npz",
        id=[row["id"] for row in rows],
        room=[row["room"] for row in rows],
        values=values,
    )
    return values


# ---- the table ------------------------------------------------------------------------------------------------------


def finished(name, out):
    """The finished seeds of a row -> ({seed: result}, views.npz with the mean of their values), or ({}, None)."""
    files = sorted(out.glob(f"{name}-s*/result.json"))
    results = {
        int(file.parent.name.rsplit("-s", 1)[1]): json.loads(file.read_text()) for file in files
    }
    views = [dict(np.load(file.parent / "views.npz")) for file in files]
    return results, views[0] | {
        "values": np.mean([part["values"] for part in views], 0)
    } if views else None


def difference(values, others, rooms, resamples=2000):
    """Pose, content and mse of one list of views minus those of another -> {key: (difference, low, high)}.

    values, others   (n, 11) of `consistency.per_view`, over the same rows;  rooms: (n,), the room of each row
    The 95 % interval draws whole rooms with replacement: views of one room are not independent.
    """
    _, member = np.unique(rooms, return_inverse=True)
    count = member.max() + 1
    even = np.full(count, 1 / count)
    draws = numpy_stream("bootstrap", 0).multinomial(count, even, resamples)
    draws = np.vstack([np.ones((1, count)), draws])  # how often each room; first: each once
    scores = []
    for views in (values, others):
        sums = np.stack([np.bincount(member, column, count) for column in views.T], 1)
        scores.append(consistency.scores_of(draws @ sums))
    gaps = {}
    for key in ("pose", "content", "mse"):
        gap = scores[0][key] - scores[1][key]
        gaps[key] = (float(gap[0]), *np.nanquantile(gap[1:], [0.025, 0.975]).tolist())
    return gaps


def table(out):
    """The lines of table.md: every finished row, and its difference from the plain row on the same test views."""
    digits = {"steps": 0, "pose": 3, "content": 3, "mse": 4, "cpu_seconds": 0}
    head = ["row", "seeds", *digits, "pose over plain", "content over plain", "mse over plain"]
    lines = []
    for run in RUNS:
        results, views = finished(run.name, out)
        if not results:
            continue
        means = {key: np.mean([result[key] for result in results.values()]) for key in digits}
        line = [
            run.name,
            " ".join(map(str, sorted(results))),
            *(f"{means[key]:.{digits[key]}f}" for key in digits),
        ]
        name = "ring-plain" if run.data.startswith("rooms") else f"{run.data}-plain"
        plain = finished(name, out)[1] if run.name != name else None
        if plain and not np.array_equal(views["id"], plain["id"]):
            common.fail(
                f"{run.name} and {name} in {out} saw different test views. Remove the older and run it again."
            )
        gaps = difference(views["values"], plain["values"], views["room"]) if plain else {}
        line += [
            "{:+.{d}f} [{:+.{d}f} {:+.{d}f}]".format(*gap, d=digits[key])
            for key, gap in gaps.items()
        ]
        lines.append(line + [""] * (len(head) - len(line)))
    return markdown(head, lines)


def parse_args(argv=None):
    """The command line's flags."""
    p = list_parser(__doc__, "apart-*", "out/evidence")
    p.add_argument("--steps", type=int, default=600, help="updates of every row that trains")
    return p.parse_args(argv)


def main(argv=None):
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    out, named = Path(args.out), chosen(RUNS, args.only, "-m experiments simulator")
    jobs = [(run, seed) for seed in args.seeds for run in named if not run.views or seed == 0]
    if args.list:
        left = [job for job in jobs if job[1] not in finished(job[0].name, out)[0]]
        for run, seed in jobs:
            print(
                f"{run.name}-s{seed}".ljust(26) + f"{minutes(run, args.steps):5.1f} CPU-min  "
                f"{'    ' if (run, seed) in left else 'done'}  "
                f"{run.flags or run.views}"
            )
        return print(
            f"{sum(minutes(run, args.steps) for run, _ in left):.0f} CPU-minutes to go, the data not counted"
        )
    common.setup(1)
    for run, seed in jobs:
        finish(run, seed, args.steps, out)
    publish(
        table(out),
        out,
        "Means over seeds; over plain: on the same views, [95 % interval over rooms].",
    )


if __name__ == "__main__":
    common.run(main)
