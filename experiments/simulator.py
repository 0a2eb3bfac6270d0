"""
What the simulator's evidence rests on: a list of runs, and the table of what came out (`make evidence`).

  python -m experiments simulator --list                          every row, its commands, whether it is finished
  python -m experiments simulator                                 run what is missing, one after the other; stopped, it goes on
  python -m experiments simulator --only "ring-*" --seeds 0 1 2   some rows, three seeds of the training each

A row trains the tiny simulator (train_wm.py, with flags of its own, as many steps as every other row) and imagines all
test triples of its data: rooms that nothing was trained on. Rows of the same data answer the same queries with the same
noise, so that their difference is paired. A thousand steps take 2 CPU-minutes, 8 with pictures of 64 pixels. Baselines,
oracles, and dose and response are of `evaluate.py --bench wm`, which takes the folder of a row as --simulator.

Out, in out/evidence/: data/<data>/, <row>-s<seed>/{the model, views.npz (scores of every view), result.json}, table.md.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.runner import (
    Job,
    call,
    finished_seeds,
    gap_text,
    markdown,
    mean_of,
    rows_parser,
    run_rows,
    words,
)
from lib import consistency
from lib.answers import imagine_targets, load_triples
from lib.distributed import fail
from lib.records import readable, whole_file
from lib.scores import COLUMNS, consistency_row
from lib.stage import run_stage
from lib.streams import numpy_stream
from world_model import WorldModel

DATA = {  # flags of `data.py triples`
    "ring": "--layout ring",
    "64px": "--size 64",
    "rooms250": "--rooms 250",
    "rooms1000": "--rooms 1000",
}
PLAIN = "--warp-weight 0"
CONTENT = "--warp-weight 0.5"  # agreement with the warped context
UNTUNED = f"{PLAIN} --shuffle-instructions"  # the twin that learned no motion


class SimulatorRow(NamedTuple):
    """Which views a simulator learns from, and the flags of train_wm.py."""

    name: str
    data: str  # of DATA
    flags: str
    trains = True


ROWS = [
    SimulatorRow("ring-plain", "ring", PLAIN),  # this and its twin also teach World2VLM
    SimulatorRow("ring-content", "ring", CONTENT),
    SimulatorRow("ring-untuned", "ring", UNTUNED),
    SimulatorRow("rooms250-plain", "rooms250", PLAIN),
    SimulatorRow("rooms1000-plain", "rooms1000", PLAIN),
    SimulatorRow("64px-plain", "64px", PLAIN + " --size 64"),
    SimulatorRow("64px-content", "64px", CONTENT + " --size 64"),
]


def job_of(row: SimulatorRow, seed: int, out: Path, steps: int) -> Job:
    """What makes a row: its data, the training, the scores of every test view."""
    folder = out / f"{row.name}-s{seed}"
    data = out / "data" / row.data
    make = words(f"data.py triples {DATA[row.data]}", out=data, threads=1)
    where = dict(data=data, out=folder, steps=steps, seed=seed, threads=1)
    return Job(
        folder.name,
        [words(f"train_wm.py {row.flags}", **where)],
        inputs={data / "triples_test.jsonl": partial(call, make)},
        setting={"data": DATA[row.data], "steps": steps},
        measure=partial(score_row, row, folder, data),
    )


def score_row(row: SimulatorRow, folder: Path, data: Path) -> dict:
    """Score every test view of the simulator in `folder` -> the mean scores.

    `consistency.per_view` (n, 10) of all stays in folder/views.npz, with ids and rooms.
    """
    triples = load_triples(data / "triples_test.jsonl")
    views = imagine_targets(WorldModel.load(folder), triples, folder / "views", title=row.name)
    recovered = consistency.recover_all(triples, views)[0]
    errors = consistency.pose_errors(triples, recovered)
    values = consistency.per_view(triples, views, errors)
    ids = [triple["id"] for triple in triples]
    rooms = [triple["room"] for triple in triples]
    with whole_file(folder / "views.npz") as beside, open(beside, "wb") as file:
        np.savez(file, id=ids, room=rooms, values=values)
    return readable(consistency.summary_of(errors, values))


# ---- the table -------------------------------------------------------------------------------------------------------


def difference(values, others, rooms, resamples: int = 2000) -> dict[str, tuple]:
    """Tight pose, content and mse of one list of views minus those of another -> {key: (difference, low, high)}.

    values, others   (n, 10) of `consistency.per_view`, over the same rows;  rooms: (n,), the room of each row
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
    for key in ("tight", "content", "mse"):
        gap = scores[0][key] - scores[1][key]
        gaps[key] = (float(gap[0]), *np.nanquantile(gap[1:], [0.025, 0.975]).tolist())
    return gaps


def mean_views(name: str, out: Path) -> dict | None:
    """views.npz of a row, its values the mean over the finished seeds; None if there is none."""
    files = [folder / "views.npz" for _, folder in finished_seeds(name, out).values()]
    if not files:
        return None
    seeds = [dict(np.load(file)) for file in files]
    return seeds[0] | {"values": np.mean([seed["values"] for seed in seeds], 0)}


def table(out: Path) -> list[str]:
    """The lines of table.md: every finished row, and its difference from the plain row on the same test views."""
    digits = {"tight": 3, "content": 3, "mse": 4}
    head = ["row", "seeds", "steps", "CPU-s", *COLUMNS, *(f"{key} over plain" for key in digits)]
    lines = []
    for row in ROWS:
        seeds = finished_seeds(row.name, out)
        if not seeds:
            continue
        line = [row.name, " ".join(seeds)]
        results = [result for result, _ in seeds.values()]
        line += [f"{mean_of(results, key):.0f}" for key in ("steps", "cpu_seconds")]
        numbers = np.array([consistency_row(result) for result in results], float)  # None: nan
        *shares, mse = numbers.mean(0)
        line += [*(f"{share:.3f}" for share in shares), f"{mse:.4f}"]
        plain_name = "ring-plain" if row.data.startswith("rooms") else f"{row.data}-plain"
        views = mean_views(row.name, out)
        plain = mean_views(plain_name, out) if row.name != plain_name else None
        if plain and not np.array_equal(views["id"], plain["id"]):
            fail(
                f"{row.name} and {plain_name} in {out} saw different test views. Remove the older and run it again."
            )
        gaps = difference(views["values"], plain["values"], views["room"]) if plain else {}
        line += [gap_text(*gap, digits[key]) for key, gap in gaps.items()]
        lines.append(line + [""] * (len(head) - len(line)))
    return markdown(head, lines)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    parser = rows_parser(__doc__, "64px-*", "out/evidence")
    parser.add_argument("--steps", type=int, default=2000, help="updates of every row that trains")
    return parser.parse_args(argv)


LEGEND = (
    f"Means over seeds. Pose: share of views {consistency.POSE_THRESHOLDS}, content: the mean of precision, recall and "
    f"topology. Over plain: on the same views, [95 % interval over rooms]."
)


def main(argv: list[str] | None = None) -> None:
    """Finish the rows one by one, then print the table of all that are finished."""
    args = parse_args(argv)
    run_rows(args, "experiments simulator", ROWS, partial(job_of, steps=args.steps), table, LEGEND)


if __name__ == "__main__":
    run_stage(main)
