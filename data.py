"""
Rooms into data: triples that train the world simulator, questions that train and test the policy.

  python data.py                                  what is missing of both, in out/data
  python data.py triples                          out/data/triples_{train,val,test}.jsonl    (context views, motion in words, target view)
  python data.py triples --layout apart --size 64     out/data-apart-64: other context cameras, larger pictures
  python data.py questions                        out/data/questions_{train,val,test}.jsonl  multiple choice over several views
  python data.py questions --families turning     of one family (lib/questions.py): the words do not name the view
  python data.py questions --layout pitched       out/data-pitched: cameras that look up or down
  python data.py triples --dataset scannet --root DIR     triples of scans (extras/scans): ScanNet, ScanNet++, Matterport3D,
                                                          ARKitScenes, DL3DV or your own folder

A row (lib/records.py documents its fields) points at its pictures by paths relative to its JSONL file; files appear whole
or not at all; the same seed gives the same files, whatever the number of processes.

Triples are the samples of the paper's view consistency tuning: a target view is kept if the context covers at least 85 %
of it and one motion says how the camera got there from a context view, its reference. The context cameras of a room
stand in one of these layouts:
  ring       four views at one spot, each one left turn of 90 degrees further: what a small simulator learns in minutes.
             In some rooms all four look up or down, by 10 to 25 degrees; in some there is a fifth view, where a first
             motion has led, softened as if it were imagined, and the targets start from there: the second step of a chain
  apart      four cameras at least 1 m and 30 degrees apart; they look across the room, in no order. (What the tiny
             simulator is told of the context, simulators.image_poses, holds of rings alone.)

Motions are turns of every 5 degrees, moves of every 0.1 m up to 1.2 m to the left, right and forward (back or up, no view
of a ring saw what would be seen), and pitch up to 30 degrees. Some amounts, those of
NEVER_TRAINED, are in val and test alone.

Questions (lib/questions.py) have exact answers. Seeds of the rooms make four disjoint sets: the simulator's training, the
policy's training (a policy must not learn to trust memorised imaginations), validation and test. Scans are split by place.
"""

import argparse
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from lib.distributed import die_with_parent, fail, say
from lib.geometry import (
    Array,
    Motion,
    as_lists,
    camera_pose,
    coverage,
    dominant_motion,
    move_camera,
    pinhole,
    warp,
)
from lib.images import save_image, soften
from lib.protocol import call_of, call_poses
from lib.questions import ASKS, FAMILIES, Visit, facts
from lib.records import disk, load_jsonl, save_jsonl
from lib.rooms import COLOURS, EYE, SIZE, Room, pitched, random_room, render, ring
from lib.simulators import instruction
from lib.stage import bounded, lock_folder, run_stage
from lib.streams import numpy_stream

FIRST_ROOM = {"triples_train": 0, "questions_train": 1_000_000, "val": 2_000_000, "test": 3_000_000}

# Of the paper: the share of a target that its context covers, and how far apart the cameras of a context stand.
MIN_COVERAGE = 0.85
MIN_METERS = 1.0
MIN_DEGREES = 30.0

TARGETS_PER_ROOM = 16
FREE = 1.3  # metres around the middle of a room where no furniture stands

SIGNS = (-1, 1)


def ring_motions() -> list[Motion]:
    """Every motion that a simulator of rooms is taught, or asked in val and test.

    No step back: it shows what no view of the ring saw, and coverage refuses every one.
    """
    motions = [Motion("dangle", -180.0)]
    for i in range(1, 36):
        motions += [Motion("dangle", sign * 5.0 * i) for sign in SIGNS]
    for i in range(1, 13):
        motions += [Motion("dx", sign * round(0.1 * i, 1)) for sign in SIGNS]
        motions.append(Motion("dy", round(0.1 * i, 1)))
    for i in range(1, 7):
        motions += [Motion("dphi", sign * 5.0 * i) for sign in SIGNS]
    return motions


MOTIONS = ring_motions()
NEVER_TRAINED = {"dangle": (20.0, 65.0, 110.0, 155.0), "dx": (0.4, 0.9), "dy": (0.4, 0.9)}
TRAINED = [m for m in MOTIONS if abs(m.amount) not in NEVER_TRAINED.get(m.kind, ())]
# of the targets that are drawn; most that look up or down are refused
KIND_SHARES = {"dangle": 0.4, "dx": 0.25, "dy": 0.15, "dphi": 0.2}
PITCHED_SHARE = 0.25  # of the rooms of a ring: its cameras look up or down
CHAINED_SHARE = 0.4  # of the rooms of a ring: the targets start from a fifth view


# ---- layouts: where the context cameras stand ------------------------------------------------------------------------


def across(rng: Generator) -> list[Array]:
    """Four poses by the paper's rule, MIN_METERS apart on the floor and MIN_DEGREES in yaw; drawn until it holds.

    Each looks across the room, up to 25 degrees beside its middle: looking outwards they would hardly see a target.
    """
    one, other = np.triu_indices(4, 1)  # the six pairs
    while True:
        x, z = rng.uniform(-1.2, 1.2, (2, 4))
        yaw = np.degrees(np.arctan2(-x, -z)) + rng.uniform(-25, 25, 4)
        meters = np.hypot(x[one] - x[other], z[one] - z[other])
        degrees = np.abs((yaw[one] - yaw[other] + 180) % 360 - 180)
        inside = np.hypot(x, z).max() <= 1.2
        if inside and meters.min() >= MIN_METERS and degrees.min() >= MIN_DEGREES:
            return [camera_pose(x[k], -EYE, z[k], yaw[k]) for k in range(4)]


def any_ring(rng: Generator) -> list[Array]:
    """A ring for triples: level, or in some rooms pitched."""
    return pitched(rng) if rng.random() < PITCHED_SHARE else ring(rng)


LAYOUTS = {"ring": any_ring, "apart": across}  # of triples
# of questions: a turn of 90 degrees leads to the next view
RINGS = {"level": ring, "pitched": pitched}
USUAL = ("ring", "level")  # what the demo is made of


def folder_of(layout: str = "ring", size: int = SIZE) -> str:
    """Where rows of a layout and size are kept: out/data, out/data-apart, out/data-64, out/data-apart-64."""
    folder = "out/data"
    if layout not in USUAL:
        folder += f"-{layout}"
    if size != SIZE:
        folder += f"-{size}"
    return folder


def stands_free(c2w: Array) -> bool:
    """Whether a camera is in the middle of the room, where no furniture stands."""
    return np.hypot(*c2w[[0, 2], 3]) <= FREE


# ---- triples ---------------------------------------------------------------------------------------------------------


def room_triples(
    seed: int,
    out: Path,
    layout: str = "ring",
    size: int = SIZE,
    motions: Sequence[Motion] = TRAINED,
) -> list[dict]:
    """All accepted triples (lib/records.Triple) of one room; they share one context and one reference, so training
    encodes it once. Pictures go to `out`/triples.

    layout   of LAYOUTS: where the context cameras stand;  size: of the pictures, in pixels
    A target is refused where no camera can stand, and by the paper's two rules: where the context covers too little of
    it, and where no single motion leads there (of a room's exact motions, never).
    """
    rng = numpy_stream("triples of a room", seed)
    poses = LAYOUTS[layout](rng)
    reference = int(rng.integers(len(poses)))
    provenance = [None] * len(poses)
    if layout == "ring" and rng.random() < CHAINED_SHARE:
        steps = [motion for motion in motions if motion.kind != "dphi"]
        first, pose = next(iter(draw_targets(rng, poses[reference], steps).items()))
        provenance.append(call_of(reference + 1, first))
        poses.append(pose)
        reference = len(poses) - 1
    targets = draw_targets(rng, poses[reference], motions)
    views = render(random_room(seed), np.stack([*poses, *targets.values()]), size)
    n = len(poses)
    context = list(zip(views["rgb"][:n], views["depth"][:n], poses, strict=True))

    folder = Path("triples") / f"{seed:07d}"
    paths = [f"{folder}/{k}.png" for k in range(1, n + 1)]
    for k, path in enumerate(paths):
        rgb = views["rgb"][k]
        if provenance[k]:
            rgb = soften(rgb, rng)  # the warp is of the sharp one
        save_image(out / path, rgb)
    rows = []
    for k, (motion, c2w) in enumerate(targets.items(), n):
        depth = views["depth"][k]
        warped, mask = warp(depth, c2w, context, pinhole(size))
        share = coverage(depth, mask)
        if share < MIN_COVERAGE or dominant_motion(poses[reference], c2w) != motion:
            continue
        name = f"{folder}/{reference + 1}_{motion.kind}_{motion.amount:g}"
        alpha = 255 * mask[..., None].astype(np.uint8)
        save_image(out / f"{name}.png", views["rgb"][k])
        save_image(out / f"{name}_warp.png", np.concatenate([warped, alpha], -1))
        rows.append(
            {
                "id": name.removeprefix("triples/"),
                "scene": f"room_{seed}",
                "context": paths,
                "reference": reference + 1,
                "motion": asdict(motion),
                "instruction": instruction(motion, reference + 1),
                "target": f"{name}.png",
                "warp": f"{name}_warp.png",
                "coverage": round(share, 4),
                "room": seed,
                "context_c2w": [as_lists(pose) for pose in poses],
                "target_c2w": as_lists(c2w),
                "provenance": provenance,
            }
        )
    return rows


def draw_targets(rng: Generator, start: Array, motions: Sequence[Motion]) -> dict[Motion, Array]:
    """Some `motions` at random, and where they lead from `start`: {motion: c2w}, as far as one can stand there."""
    count = Counter(motion.kind for motion in motions)
    weights = np.array([KIND_SHARES[motion.kind] / count[motion.kind] for motion in motions])
    draw = rng.choice(len(motions), TARGETS_PER_ROOM, replace=False, p=weights / weights.sum())
    targets = {}
    for i in draw:
        c2w = move_camera(start, motions[i])
        if stands_free(c2w):
            targets[motions[i]] = c2w
    return targets


# ---- questions -------------------------------------------------------------------------------------------------------


def room_questions(
    seed: int, out: Path, families: Iterable[str] = tuple(FAMILIES), rig: Callable = ring
) -> list[dict]:
    """Questions (lib/records.Question) about one room, at most four of each of `families`. Pictures go to
    `out`/questions.

    families   of lib/questions.FAMILIES: the rows of one do not depend on the others;  rig   a ring of lib/rooms
    """
    rng = numpy_stream("questions of a room", seed)
    room = random_room(seed)
    poses = rig(rng)
    folder = f"questions/{seed:07d}"
    images = [f"{folder}/{k}.png" for k in range(1, 5)]  # shared by the questions of a room
    ids = render(room, np.stack(poses), SIZE, supersample=1)["ids"]
    visit = Visit(room, poses, [facts(view, len(room.things)) for view in ids])
    rows = []
    for family in families:
        rng = numpy_stream("questions of a room", seed, family)
        drafts = FAMILIES[family](rng, visit)
        letters = rng.permutation(4)  # of four questions each is the answer once
        for number, (letter, draft) in enumerate(zip(letters, drafts, strict=False)):
            name = f"{folder}/{family}_{number}"
            scene = {"room": seed, "poses": [as_lists(pose) for pose in poses]}
            ends = call_poses(scene, draft["ideal"])[len(poses) :]
            views = [f"{name}_view{k}.png" for k in range(1, len(ends) + 1)]
            shows = visit.facts + draw(room, ends, views, out)
            options = choose(rng, letter, draft["answer"], draft.pop("others"))
            rows.append(
                {
                    "id": f"room_{seed}_{family}_{number}",
                    "bench": "rooms",
                    "category": family,
                    "images": images,
                    "options": options,
                    "named": None,
                    "relation": None,
                    **draft,
                    "answer": "ABCD"[letter],  # in place of the draft's colour
                    "kind": "mca",
                    "scene": scene,
                    "views": views,
                    "shows": [in_colours(view_facts, room) for view_facts in shows],
                }
            )
    if rows:
        draw(room, poses, images, out)
    return rows


def choose(rng: np.random.Generator, letter: int, answer: str, others: list[str]) -> list[str]:
    """Four lettered options, the answer at `letter` (0 to 3), the others in random order."""
    options = [others[i] for i in rng.permutation(3)]
    options.insert(letter, answer)
    return [f"{name}. {option}" for name, option in zip("ABCD", options, strict=True)]


def draw(room: Room, cameras: list[Array], paths: list[str], out: Path) -> list[dict]:
    """Save what every camera sees below `out`, and return the facts of each view (lib/questions)."""
    if not paths:
        return []
    views = render(room, np.stack(cameras), SIZE)
    for path, rgb in zip(paths, views["rgb"], strict=True):
        save_image(out / path, rgb)
    return [facts(ids, len(room.things)) for ids in views["ids"]]


def in_colours(view_facts: dict, room: Room) -> dict:
    """Facts with objects called by their colour: {ask: "red", "none", or None where it is unclear; "angle"}."""
    colours = {i: thing.colour for i, thing in enumerate(room.things)} | {-1: "none", None: None}
    named = {ask: colours[view_facts[ask]] for ask in ASKS}
    return named | {"angle": {colours[i]: angle for i, angle in view_facts["angle"].items()}}


def balance_wordings(rows: list[dict]) -> list[dict]:
    """Drop questions that turn until their words tell neither whether nor which way: of each wording (colours aside) as
    many turn left as right, and as many turn as do not, since the named object stands there already."""
    groups = defaultdict(lambda: {-1: [], 0: [], 1: []})  # {wording: {sign of the turn: rows}}
    kept = set()
    for row in rows:
        if not row["question"].startswith("Turn until"):
            kept.add(row["id"])
            continue
        wording = " ".join(word for word in row["question"].split() if word not in COLOURS)
        turns = [call["value"] for call in row["ideal"] if call["motion_type"] == "dangle"]
        groups[wording][np.sign(sum(turns))].append(row["id"])
    for wording, ids in groups.items():
        each = min(len(ids[-1]), len(ids[1]), len(ids[0]) // 2)
        rng = numpy_stream("balance", wording)
        for sign, count in ((-1, each), (0, 2 * each), (1, each)):
            kept.update(rng.permutation(ids[sign])[:count].tolist())
    return [row for row in rows if row["id"] in kept]


# ---- files -----------------------------------------------------------------------------------------------------------


def worker() -> None:
    """How a process of a pool begins: Ctrl-C is its parent's to see, SIGTERM ends it without a word, as its parent's end."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build(title: str, make: Callable, seeds: Iterable, out: Path, threads: int) -> list:
    """Run `make(seed, out)` for every room (or group of rooms) on `threads` processes, in order -> all rows."""
    seeds, rows = list(seeds), []
    with disk(out), Pool(threads, worker) as pool:
        made = pool.imap(partial(make, out=out), seeds, chunksize=8)
        for part in tqdm(made, total=len(seeds), desc=title):
            rows += part
        # they end by themselves: a signal that meets a worker before `worker` has run is lost, and it stays for ever
        pool.close()
        pool.join()
    return rows


def make_triples(
    out: str | Path,
    rooms: int = 2000,
    held_out: int = 96,
    threads: int = 2,
    layout: str = "ring",
    size: int = SIZE,
) -> None:
    """out/triples_{train,val,test}.jsonl, and a line that says how many of the drawn targets were kept.

    rooms, held_out   how many rooms to train on, and for validation and test each;  threads   processes
    """
    out = Path(out)
    for split, count, first, motions in (
        ("train", rooms, FIRST_ROOM["triples_train"], TRAINED),
        ("val", held_out, FIRST_ROOM["val"], MOTIONS),
        ("test", held_out, FIRST_ROOM["test"], MOTIONS),
    ):
        make = partial(room_triples, layout=layout, size=size, motions=motions)
        rows = build(f"triples, {split}", make, range(first, first + count), out, threads)
        save_jsonl(out / f"triples_{split}.jsonl", rows)
        say(
            f"triples_{split}.jsonl ({layout}, {size} px): {len(rows)} of {count * TARGETS_PER_ROOM} targets kept, "
            f"{len(rows) / count:.1f} per room (the paper: 48 per scene)"
        )


def make_questions(
    out: str | Path,
    rooms: int = 1500,
    held_out: tuple[int, int] = (100, 400),
    threads: int = 2,
    layout: str = "level",
    families: Iterable[str] = tuple(FAMILIES),
) -> None:
    """out/questions_{train,val,test}.jsonl; half of the questions need an unseen view, but of `walking` all."""
    out = Path(out)
    make = partial(room_questions, families=families, rig=RINGS[layout])
    for split, count, first in (
        ("train", rooms, FIRST_ROOM["questions_train"]),
        ("val", held_out[0], FIRST_ROOM["val"]),
        ("test", held_out[1], FIRST_ROOM["test"]),
    ):
        seeds = range(first, first + count)
        rows = balance_wordings(build(f"questions, {split}", make, seeds, out, threads))
        save_jsonl(out / f"questions_{split}.jsonl", rows)
        unseen = sum(row["needs_view"] for row in rows)
        say(f"questions_{split}.jsonl: {len(rows)} questions, {unseen} need an unseen view")


def make_missing(out: str | Path, **options) -> None:
    """Triples and questions, where `out` has none; of as many rooms, where it has some.   options   rooms and threads"""
    for kind, make in (("triples", make_triples), ("questions", make_questions)):
        if not (Path(out) / f"{kind}_test.jsonl").exists():
            make(out, **options)
        elif "rooms" in options:
            check_rooms(Path(out) / f"{kind}_train.jsonl", options["rooms"])


def check_rooms(file: Path, rooms: int) -> None:
    """Stop with a sentence where a file to train on is of another number of rooms; some have nothing clear to ask."""
    there = len({str(row["scene"]) for row in load_jsonl(file)})
    if not 0.75 * rooms <= there <= rooms:
        fail(
            f"{file} is of {there} rooms, not of --rooms {rooms}. Remove it and the files beside it, or give another "
            f"--out."
        )


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `command` is "triples", "triples of scans", "questions", or None for what is missing."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["triples"] and any(word.startswith("--dataset") for word in argv):
        from extras.scans import dataset

        return dataset.parse_args(argv[1:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command")
    triples = commands.add_parser(
        "triples",
        help="context views, a motion in words, the view from there",
        epilog="Of scans: triples --dataset NAME --root DIR; triples --dataset scannet --help has their flags.",
    )
    questions = commands.add_parser("questions", help="multiple choice over several views")
    count = bounded(int, 1)
    for command in (parser, triples, questions):
        # SUPPRESS: what stands in front of the command is not overwritten by the command's own default
        add = partial(
            command.add_argument, default=None if command is parser else argparse.SUPPRESS
        )
        add("--out", help="folder of the files (default: out/data, out/data-<layout>-<size>)")
        add(
            "--rooms",
            type=count,
            help="to train on (default: 2000 for triples, 1500 for questions)",
        )
        add("--threads", type=count, help="processes (default: 2)")
    for command, layouts in ((triples, tuple(LAYOUTS)), (questions, tuple(RINGS))):
        command.add_argument("--layout", choices=layouts, default=layouts[0], help="of the cameras")
    questions.add_argument(
        "--families",
        nargs="+",
        choices=tuple(FAMILIES),
        default=list(FAMILIES),
        help="of questions (lib/questions.py); default: all",
    )
    triples.add_argument("--size", type=count, default=SIZE, help="of the pictures, in pixels")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = folder_of(getattr(args, "layout", "ring"), getattr(args, "size", SIZE))
    return args


def main(argv: list[str] | None = None) -> None:
    """Make one kind of data, or whatever is missing."""
    args = parse_args(argv)
    for path in (Path(args.out), *Path(args.out).parents):
        if path.is_file():
            fail(f"--out {args.out} cannot be a folder: {path} is a file.")
    if args.command == "triples of scans":
        from extras.scans.dataset import make_triples_of_scans

        return make_triples_of_scans(args)
    lock_folder(args.out)
    options = {"threads": args.threads or 2}
    if args.rooms:
        options["rooms"] = args.rooms
    if args.command == "triples":
        make_triples(args.out, layout=args.layout, size=args.size, **options)
    elif args.command == "questions":
        make_questions(args.out, layout=args.layout, families=args.families, **options)
    else:
        make_missing(args.out, **options)


if __name__ == "__main__":
    run_stage(main)
