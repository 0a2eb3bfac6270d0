"""
May these questions teach looking? The gate that a family passes before any training on it (docs/questions.md).

  python -m experiments questions                                   all families, test rooms: out/questions-gate/table.md
  python -m experiments questions --split val --families walking    while rules are made: validation rooms
  python -m experiments questions --simulator out/wm                with views of a simulator, read exactly

A question is worth a look if its words tell nothing, if no view that is cheaper to come by shows the answer, and if the
view that it is about does. Columns, of questions of rooms that nothing was fitted on:

  need        share that needs a view which is not given
  text        accuracy of the best guess from the words, chance is .25
  AUC calls   how well words tell whether it takes one call more or not, .5 is not at all;  AUC way: to which side
              the turn goes;
  R2 amount   share of the variance of the turn's degrees that words explain
  captions    a network that learns from perfect captions of the given views, left to right;  columns: from where
              every colour stands and how large it is. What they reach the given views *hold*: to imagine makes it
              readable, it is not logically necessary
  reference   the view that the turn starts from, unturned, read exactly;  constant: after the one motion that is best
              of all for the family;  true: the view asked about;  imagined: the simulator's
Two numbers: all questions / those that need a view. A family passes if true views beat the reference view and the constant
motion by 20 points. The third bar, "direct", a policy of the tiny size that only answers, is measured with the policy.
"""

import argparse
from pathlib import Path

import numpy as np

import data
from experiments.runner import markdown
from experiments.solvers import (
    area_under_curve,
    captions,
    colours_of,
    columns,
    explained,
    given_views,
    gold_of,
    learned_solver,
    start_of,
    told_by_words,
)
from experiments.text_guess import text_only_chance
from lib.consistency import STRONG, WEAK, describe
from lib.distributed import say, setup
from lib.geometry import Array, Motion, Query, move_camera
from lib.images import load_image
from lib.protocol import call_poses, motion_in
from lib.questions import REGIONS
from lib.records import load_jsonl, write_json, write_text
from lib.rooms import random_room, render
from lib.simulators import instruction, load_simulator
from lib.stage import bounded, lock_folder, run_stage
from lib.streams import stream_seed

ROOMS = {  # to fit on, and to ask: 5,000 and 4,000 questions at least
    "commanded": (5200, 4200),
    "turning": (2900, 2400),
    "walking": (8800, 6700),
}
CONSTANT = [
    Motion("dangle", sign * angle) for sign in (-1, 1) for angle in (15.0, 30.0, 45.0, 135.0)
]
CONSTANT += [Motion("dx", -1.0), Motion("dx", 1.0), Motion("dy", 1.0)]
BAR = 0.20  # that true views must be better by


# ---- views, read exactly ---------------------------------------------------------------------------------------------


def read_right(rows: list[dict], views: list[Array]) -> Array:
    """Whether each view (H, W, 3), read by its colours, gives the right option -> (n,) bool."""
    content = describe(np.stack(views))
    guesses = []
    for row, count, middle, dominant in zip(rows, *content, strict=True):
        colours = colours_of(row)
        if row["ask"] in REGIONS:
            colour = dominant[REGIONS.index(row["ask"])]
            guesses.append(colours.index(colour) if colour in colours else 0)
            continue
        own = count[colours]
        seen = own > 0
        for enough in (STRONG, WEAK):
            if (own >= enough).any():
                seen = own >= enough
                break
        side = middle[colours]
        score = {"largest": own, "leftmost": -side, "rightmost": side}[row["ask"]]
        guesses.append(int(np.where(seen, score, -np.inf).argmax()))
    return np.array(guesses) == gold_of(rows)


def moved_views(rows: list[dict], motion: Motion) -> list[Array]:
    """What is seen after a motion from the view that each question's turn starts from."""
    views = []
    for row in rows:
        camera = move_camera(np.array(row["scene"]["poses"][start_of(row)]), motion)
        views.append(render(random_room(row["scene"]["room"]), camera)["rgb"][0])
    return views


def imagined_views(rows: list[dict], images: Array, simulator, seed: int = 0) -> list[Array]:
    """What a simulator shows after the ideal calls, each from the given views (n, 4, H, W, 3) and its own before it."""
    seen = [list(views) for views in images]
    for step in range(max(len(row["ideal"]) for row in rows)):
        waiting = [i for i, row in enumerate(rows) if len(row["ideal"]) > step]
        queries = []
        for i in waiting:
            row = rows[i]
            call = row["ideal"][step]
            sentence = instruction(motion_in(call))
            noise = stream_seed("imagine", seed, row["id"], step)
            poses = call_poses(row["scene"], row["ideal"][:step]).tolist()
            scene = row["scene"] | {"poses": poses}
            provenance = [None] * images.shape[1] + row["ideal"][:step]
            query = Query(
                list(seen[i]), call["reference_image"], sentence, noise, scene, provenance
            )
            queries.append(query)
        for i, view in zip(waiting, simulator.imagine(queries), strict=True):
            seen[i].append(view)
    ends = zip(rows, seen, strict=True)
    return [views[-1] if row["ideal"] else views[start_of(row)] for row, views in ends]


# ---- the gate --------------------------------------------------------------------------------------------------------


def turn_of(row: dict) -> float | None:
    """Degrees of the turn, None where there is none."""
    turns = [call["value"] for call in row["ideal"] if call["motion_type"] == "dangle"]
    return turns[0] if turns else None


def way_of(row: dict) -> bool | None:
    """Whether the turn goes right, None where there is none."""
    turn = turn_of(row)
    return None if turn is None else turn > 0


def amount_of(row: dict) -> float | None:
    """Degrees of the turn, whatever its side."""
    turn = turn_of(row)
    return None if turn is None else abs(turn)


def loaded(path: Path) -> tuple[list[dict], Array]:
    """The questions of a file, and their pictures (n, 4, H, W, 3)."""
    rows = load_jsonl(path)
    return rows, np.stack([[load_image(image) for image in row["images"]] for row in rows])


def measure_family(folder: Path, split: str, simulator, imagine: int) -> dict:
    """Every column of one family; pairs are (all, those that need a view)."""
    fit, fit_images = loaded(folder / "questions_train.jsonl")
    rows, images = loaded(folder / f"questions_{split}.jsonl")
    needs = np.array([row["needs_view"] for row in rows])

    def pair(right, of=needs):
        return [float(np.mean(right)), float(np.mean(right[of]))]

    starts = [views[start_of(row)] for row, views in zip(rows, images, strict=True)]
    asked = []
    for row, view in zip(rows, starts, strict=True):
        asked.append(load_image(row["views"][-1]) if row["ideal"] else view)
    some = fit[:300]
    motion = max(CONSTANT, key=lambda one: read_right(some, moved_views(some, one)).mean())
    most = max(len(row["ideal"]) for row in rows)

    def calls_most(row):
        return len(row["ideal"]) == most

    result = {
        "n": len(rows),
        "fitted": len(fit),
        "need": float(needs.mean()),
        "text": text_only_chance(fit, rows),
        "AUC calls": told_by_words(fit, rows, calls_most, area_under_curve),
        "AUC way": told_by_words(fit, rows, way_of, area_under_curve),
        "R2 amount": max(
            told_by_words(fit, rows, value, explained) for value in (turn_of, amount_of)
        ),
        "reference": pair(read_right(rows, starts)),
        "constant": pair(read_right(rows, moved_views(rows, motion))),
        "motion": f"{motion.kind} {motion.amount:g}",
        "true": pair(read_right(rows, asked)),
    }
    seen = given_views(fit_images), given_views(images)
    for name, make in (("captions", captions), ("columns", columns)):
        result[name] = pair(learned_solver(make, (fit, seen[0]), (rows, seen[1])))
    if simulator:
        first = rows[:imagine]
        views = imagined_views(first, images[:imagine], simulator)
        result["imagined"] = pair(read_right(first, views), needs[:imagine])
    best = max(result["reference"][0], result["constant"][0])
    result["passes"] = result["true"][0] >= best + BAR
    return result


NUMBERS = ("need", "text", "AUC calls", "AUC way", "R2 amount")
PAIRS = ("captions", "columns", "reference", "constant", "true", "imagined", "direct")


def table(results: dict[str, dict]) -> list[str]:
    """The lines of table.md."""
    lines = []
    for family, result in results.items():
        cells = [family, f"{result['n']:,}"]
        cells += [f"{result[key]:.3f}".replace("nan", "") for key in NUMBERS]
        for key in PAIRS:
            cells.append(" / ".join(f"{x:.3f}" for x in result[key]) if key in result else "")
        lines.append([*cells, "yes" if result["passes"] else "no"])
    return markdown(["family", "n", *NUMBERS, *PAIRS, "passes"], lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    count = bounded(int, 1)
    add("--families", nargs="+", choices=tuple(ROOMS), default=list(ROOMS), help="of questions")
    add("--split", choices=("val", "test"), default="test", help="rooms that are asked about")
    add(
        "--rooms",
        type=count,
        nargs=2,
        help="to fit on and to ask about (default: as many as it takes)",
    )
    add("--simulator", help="folder of a world model, or a name of lib/simulators.py")
    add("--imagine", type=count, default=600, help="questions that the simulator imagines for")
    add("--threads", type=count, default=2, help="processes that make the questions")
    add("--out", type=Path, default=Path("out/questions-gate"), help="folder of the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the questions that are missing, measure every family, write table.md and results.json."""
    args = parse_args(argv)
    setup(1)
    lock_folder(args.out)
    simulator = load_simulator(args.simulator) if args.simulator else None
    results = {}
    for family in args.families:
        folder = args.out / family
        if not (folder / f"questions_{args.split}.jsonl").exists():
            fit, asked = args.rooms or ROOMS[family]
            held_out = (asked, 1) if args.split == "val" else (1, asked)
            data.make_questions(folder, fit, held_out, args.threads, families=[family])
        results[family] = measure_family(folder, args.split, simulator, args.imagine)
        say(f"{family}: measured")
        write_json(args.out / "results.json", results)
    text = "\n".join(table(results)) + "\n"
    write_text(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    run_stage(main)
