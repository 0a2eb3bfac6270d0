"""
Scenes into data: triples that train the world simulator, questions that train and test the policy.

  python data.py triples      out/data/triples_{train,val,test}.jsonl      (context views, motion in words, target view)
  python data.py questions    out/data/questions_{train,val,test}.jsonl    multiple choice over several views
  python data.py mindcube     out/data/mindcube/                           test questions in MindCube's published layout
  python data.py              whatever of the three is missing
  python data.py triples --layout apart --size 64      out/data-apart-64/: other context cameras, larger pictures

Every stage that misses its data makes it (`ensure`). The scenes are the embedded rooms of lib/rooms.py. A row points
at PNG files by paths relative to its JSONL file; files appear whole or not at all; the same seed gives the same files.

Triples (paper §3.2, "spatially grounded training data"): a target view is kept if the context covers at least 85 %
of it and one motion tells how the camera got there from a context view, its reference. Where the context cameras stand:
  ring       four views at one spot, each one left turn of 90 degrees further: what a small simulator learns in minutes
  shuffled   the ring in random order: which view is next to which, only the pictures tell
  six        six views at one spot, each one left turn of 60 degrees further
  fine       the ring, with motions of every 15 degrees and 0.1 m instead of 13 motions in all
  apart      the paper's rule: four cameras at least 1 m and 30 degrees apart; they look across the room, in no order

Questions have exact answers, in the categories of the benchmarks. Half of them need a view that was not given
(`needs_view`); the given views answer the others. Seeds of the rooms make four disjoint sets: the simulator's
training, the policy's training (a policy must not learn to trust memorised imaginations), validation and test.
"""

import argparse
import json
import re
import signal
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.common import disk, fail, run, say, write_text
from lib.geometry import Motion, coverage, dominant_motion, instruction, matrix, move_camera, pinhole, pose, warp
from lib.pictures import load_image, save_image
from lib.questions import room_questions
from lib.rooms import EYE, SIZE, random_room, render, ring

FIRST_ROOM = {"triples_train": 0, "questions_train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
MOTIONS = [Motion(f"turn {side}", amount) for side in ("left", "right") for amount in (45.0, 90.0, 135.0)] \
    + [Motion("turn left", 180.0)] \
    + [Motion(f"move {way}", amount) for way in ("left", "right", "forward") for amount in (0.5, 1.0)]
FINE = [Motion(f"turn {side}", 15.0 * i) for side in ("left", "right") for i in range(1, 12)] \
    + [Motion(f"move {way}", round(0.1 * i, 1)) for way in ("left", "right", "forward") for i in range(1, 13)]
# No step back: it shows what no view of the ring saw, and coverage refuses every one.
TARGETS_PER_ROOM = 8
MIN_COVERAGE, MIN_METERS, MIN_DEGREES = 0.85, 1.0, 30.0     # paper: of a target; between context cameras (layout apart)
FREE = 1.3                                            # metres around the middle of a room where no furniture stands


# ---- files ----------------------------------------------------------------------------------------------------

def load_jsonl(path):
    """Rows of a JSONL file as dicts, image paths made absolute. Stops with a sentence on a missing file or bad line."""
    path, rows = Path(path), []
    if not path.exists():
        fail(f"{path} does not exist; `python data.py {path.name.split('_')[0]} --out {path.parent}` makes it")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            fail(f"{path}, line {number} is not JSON; delete the file and make it again")
        for key in ("context", "images", "target", "warp", "view"):
            if key in row:
                paths = row[key] if isinstance(row[key], list) else [row[key]]
                paths = [str(path.parent / p) for p in paths]
                row[key] = paths if isinstance(row[key], list) else paths[0]
        rows.append(row)
    return rows


def save_jsonl(path, rows):
    """Write all rows, or nothing."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- triples --------------------------------------------------------------------------------------------------

def shuffled(rng):
    """The ring in random order."""
    poses = ring(rng)
    return [poses[i] for i in rng.permutation(4)]


def apart(rng):
    """Four poses by the paper's rule, MIN_METERS apart on the floor and MIN_DEGREES in yaw; drawn until it holds.

    Each looks across the room, up to 25 degrees beside its middle: looking outwards they would hardly see a target.
    """
    one, other = np.triu_indices(4, 1)                # the six pairs
    while True:
        x, z = rng.uniform(-1.2, 1.2, (2, 4))
        yaw = np.degrees(np.arctan2(-x, -z)) + rng.uniform(-25, 25, 4)
        meters = np.hypot(x[one] - x[other], z[one] - z[other])
        turns = np.abs((yaw[one] - yaw[other] + 180) % 360 - 180)
        if np.hypot(x, z).max() <= 1.2 and meters.min() >= MIN_METERS and turns.min() >= MIN_DEGREES:
            return [pose(x[k], -EYE, z[k], yaw[k]) for k in range(4)]


LAYOUTS = {"ring": ring, "fine": ring, "shuffled": shuffled, "six": partial(ring, views=6), "apart": apart}


def room_triples(seed, out, layout="ring", size=SIZE):
    """All accepted triples of one room; they share one context and one reference, so training encodes it once.

    layout   of LAYOUTS: where the context cameras stand;  size: of the pictures, in pixels
    A target is refused where no camera can stand, where the context covers too little of it, and where the words would
    not be true.
    """
    rng = np.random.default_rng([11, seed])
    room, poses = random_room(seed), LAYOUTS[layout](rng)
    reference, given = int(rng.integers(len(poses))), len(poses)
    motions = FINE if layout == "fine" else MOTIONS
    motions = [motions[i] for i in rng.permutation(len(motions))[:TARGETS_PER_ROOM]]
    ways = [(motion, move_camera(poses[reference], motion)) for motion in motions]
    ways = [(motion, target) for motion, target in ways if stands_free(target)]
    views = render(room, np.stack(poses + [target for _, target in ways]), size)
    context = [(views["rgb"][k], views["depth"][k], poses[k]) for k in range(given)]
    folder, rows = Path("triples") / f"{seed:07d}", []
    paths = [f"{folder}/{k + 1}.png" for k in range(given)]
    for k, path in enumerate(paths):
        save_image(out / path, views["rgb"][k])
    for k, (motion, target) in enumerate(ways, given):
        warped, seen = warp(views["depth"][k], target, context, pinhole(size))
        covered = coverage(views["depth"][k], seen)
        if covered < MIN_COVERAGE or dominant_motion(poses[reference], target) != motion:
            continue
        name = f"{folder}/{reference + 1}_{motion.kind.replace(' ', '_')}_{motion.amount:g}"
        save_image(out / f"{name}.png", views["rgb"][k])
        save_image(out / f"{name}_warp.png", np.concatenate([warped, 255 * seen[..., None].astype(np.uint8)], -1))
        rows.append({"id": name.removeprefix("triples/"), "scene": f"room_{seed}", "context": paths,
                     "reference": reference + 1, "motion": {"kind": motion.kind, "amount": motion.amount},
                     "instruction": instruction(motion, reference + 1), "target": f"{name}.png",
                     "warp": f"{name}_warp.png", "coverage": round(covered, 4), "room": seed,
                     "context_c2w": [matrix(p) for p in poses], "target_c2w": matrix(target)})
    return rows


def stands_free(c2w):
    """Whether a camera is in the middle of the room, where no furniture stands. From a ring every motion ends there."""
    return np.hypot(*c2w[[0, 2], 3]) <= FREE


# ---- building -------------------------------------------------------------------------------------------------

def build(title, make, seeds, out, threads):
    """Run `make(seed, out)` for every room on `threads` processes, in order -> all rows."""
    with disk(out), Pool(threads, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        per_room = list(tqdm(pool.imap(partial(make, out=out), seeds, chunksize=8), total=len(seeds), desc=title))
    return [row for rows in per_room for row in rows]


def folder_of(layout="ring", size=SIZE):
    """Where triples of a layout and size are kept: out/data, out/data-apart, out/data-64, out/data-apart-64."""
    return "out/data" + (f"-{layout}" if layout != "ring" else "") + (f"-{size}" if size != SIZE else "")


def layout_of(folder):
    """The (layout, size) of a folder named by `folder_of`; ("ring", SIZE) for any other name."""
    named = re.fullmatch(rf"data(?:-({'|'.join(LAYOUTS)}))?(?:-(\d+))?", Path(folder).name)
    layout, size = named.groups() if named else (None, None)
    return layout or "ring", int(size or SIZE)


def make_triples(out, rooms=2000, held_out=96, threads=2, layout="ring", size=SIZE):
    """out/triples_{train,val,test}.jsonl, and a line that says how many targets the rule of the paper let through."""
    out, make = Path(out), partial(room_triples, layout=layout, size=size)
    for split, count, first in (("train", rooms, FIRST_ROOM["triples_train"]), ("val", held_out, FIRST_ROOM["val"]),
                                ("test", held_out, FIRST_ROOM["test"])):
        rows = build(f"triples, {split}", make, range(first, first + count), out, threads)
        save_jsonl(out / f"triples_{split}.jsonl", rows)
        say(f"triples_{split}.jsonl ({layout}, {size} px): {len(rows)} of {count * TARGETS_PER_ROOM} targets accepted, "
            f"{len(rows) / count:.1f} per room (the paper keeps 48 per scene)")


def make_questions(out, rooms=1500, held_out=(100, 320), threads=2):
    """out/questions_{train,val,test}.jsonl; four questions per room, half of them in need of an unseen view."""
    out = Path(out)
    for split, count, first in (("train", rooms, FIRST_ROOM["questions_train"]),
                                ("val", held_out[0], FIRST_ROOM["val"]), ("test", held_out[1], FIRST_ROOM["test"])):
        rows = build(f"questions, {split}", room_questions, range(first, first + count), out, threads)
        save_jsonl(out / f"questions_{split}.jsonl", rows)
        unseen = sum(row["needs_view"] for row in rows)
        say(f"questions_{split}.jsonl: {len(rows)} questions, {unseen} need an unseen view")


def make_mindcube(out, source):
    """Test questions in the files that MindCube publishes: raw/MindCube_tinybench.jsonl and other_all_image/.

    The setting is part of the id (MindCube's own rule): one spot is `rotation`, two places are `around`.
    """
    out, rows = Path(out), []
    for row in load_jsonl(source):
        setting = "around" if row["category"] == "camera-camera" else "rotation"
        images = [f"other_all_image/{setting}/{row['id']}/{k}.png" for k in range(1, len(row["images"]) + 1)]
        for image, path in zip(images, row["images"]):
            save_image(out / image, load_image(path))
        rows.append({"id": f"{setting}_{row['id']}", "category": [row["category"]], "type": setting, "meta_info": [],
                     "question": " ".join([row["question"], *row["options"]]), "images": images,
                     "gt_answer": row["answer"]})
    save_jsonl(out / "raw" / "MindCube_tinybench.jsonl", rows)
    say(f"{out}/raw/MindCube_tinybench.jsonl: {len(rows)} questions in MindCube's layout")


def ensure(folder, what=("triples", "questions", "mindcube"), threads=2):
    """Make what is missing of `what` in `folder`, and return the folder as a Path."""
    folder, (layout, size) = Path(folder), layout_of(folder)
    if "triples" in what and not (folder / "triples_test.jsonl").exists():
        make_triples(folder, threads=threads, layout=layout, size=size)
    if "questions" in what and not (folder / "questions_test.jsonl").exists():
        make_questions(folder, threads=threads)
    if "mindcube" in what and not (folder / "mindcube" / "raw" / "MindCube_tinybench.jsonl").exists():
        make_mindcube(folder / "mindcube", folder / "questions_test.jsonl")
    return folder


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=["triples", "questions", "mindcube"],
                   help="what to make (default: whatever of the three is missing)")
    p.add_argument("--layout", choices=list(LAYOUTS), default="ring", help="triples: where the context cameras stand")
    p.add_argument("--size", type=int, default=SIZE, help="triples: of the pictures, in pixels")
    p.add_argument("--out", help="folder of the files (default: out/data, out/data-<layout>-<size> for other triples)")
    p.add_argument("--rooms", type=int, help="rooms to train on (default 2000 for triples, 1500 for questions)")
    p.add_argument("--threads", type=int, default=2, help="processes")
    args = p.parse_args(argv)
    if args.what != "triples" and (args.layout, args.size) != ("ring", SIZE):
        p.error("--layout and --size are of triples: python data.py triples --layout apart")
    args.out = args.out or folder_of(args.layout, args.size)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.what is None:
        return ensure(args.out, threads=args.threads)
    if args.what == "mindcube":
        return make_mindcube(Path(args.out) / "mindcube", Path(args.out) / "questions_test.jsonl")
    rooms = {"rooms": args.rooms} if args.rooms else {}
    if args.what == "triples":
        return make_triples(args.out, threads=args.threads, layout=args.layout, size=args.size, **rooms)
    make_questions(args.out, threads=args.threads, **rooms)


if __name__ == "__main__":
    run(main)
