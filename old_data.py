"""
Scenes into data: triples that train the world simulator, questions that train and test the policy.

  python data.py triples      out/data/triples_{train,val,test}.jsonl      (context views, motion in words, target view)
  python data.py questions    out/data/questions_{train,val,test}.jsonl    multiple choice over several views
  python data.py mindcube     out/data/mindcube/                           test questions in MindCube's published layout
  python data.py              what is missing of the first three: rooms, the embedded world of lib/rooms.py
  python data.py world2vlm    out/world2vlm/questions_{train,val,test}.jsonl   what a camera motion shows, as questions
  python data.py world2vlm --anchors DIR --teacher out/wm-astra       out/taught/: of what a world model shows of scans
  python data.py world2vlm --rendered DIR     out/rendered/: of frames rendered elsewhere (extras/world2vlm/frames.py)

  python data.py triples --layout apart --size 64               rooms: other context cameras, larger pictures
  python data.py triples --dataset scannet --root DIR           scans: ScanNet, ScanNet++, Matterport3D, ARKitScenes,
                                                                DL3DV or your own folder (extras/scans/scene.py)
  python data.py depth --root DIR                               DL3DV alone: depth and a scale, which it does not have
  python data.py quality                                        what the verification of triples catches and loses
  python data.py heldout                                        200 triples of test scans of each dataset
  python data.py corpus --corpus sensenova --root DIR           questions of a published corpus (extras/scans/corpora.py)
  python data.py mine --questions FILE --policy FOLDER          those that a policy hardly ever answers right

A row points at its pictures by paths relative to its JSONL file; files appear whole or not at all; the same seed gives
the same files, whatever the number of processes; an interrupted run over scans goes on where it was.

Triples (the samples of the paper's view consistency tuning): a target view is kept if the context covers at least 85 %
of it and one motion tells how the camera got there from a context view, its reference. In scans extras/scans/triples.py looks
for them and verifies each. In rooms the context cameras stand in one of these layouts:
  ring       four views at one spot, each one left turn of 90 degrees further: what a small simulator learns in minutes
  shuffled   the ring in random order: which view is next to which, only the pictures tell
  six        six views at one spot, each one left turn of 60 degrees further
  fine       the ring, with motions of every 15 degrees and 0.1 m instead of 13 motions in all
  apart      the paper's rule: four cameras at least 1 m and 30 degrees apart; they look across the room, in no order

Questions about rooms (lib/questions.py) have exact answers. Seeds of the rooms make four disjoint sets: the simulator's
training, the policy's training (a policy must not learn to trust memorised imaginations), validation and test. Scans
are split by place.
"""

import argparse
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extras.report import real_views
from extras.scans.corpora import make_corpus
from extras.scans.depth import DEPTH_MODEL, make_depth
from extras.scans.heldout import make_heldout
from extras.scans.make import make_scans
from extras.scans.mining import mine
from extras.scans.scene import READERS
from extras.scans.triples import Rules
from extras.world2vlm.frames import make_rendered
from extras.world2vlm.questions import room_detections, with_pictures, write_motion_questions
from extras.world2vlm.taught import make_taught
from extras.world2vlm.transitions import ROOMS, SEEN, room_anchor, transitions
from lib import simulators
from lib.common import (
    at_least,
    fail,
    need,
    run,
    say,
)
from lib.geometry import (
    Motion,
    as_lists,
    camera_pose,
    coverage,
    dominant_motion,
    instruction,
    move_camera,
    pinhole,
    warp,
)
from lib.images import load_image, save_image
from lib.questions import room_questions
from lib.records import SPLITS, build, load_jsonl, save_jsonl
from lib.rooms import EYE, SIZE, TrueRenderer, random_room, render, ring
from lib.simulators import SimulatorError
from lib.streams import numpy_stream

FIRST_ROOM = {"triples_train": 0, "questions_train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
MOTIONS = (
    [Motion(f"turn {side}", amount) for side in ("left", "right") for amount in (45.0, 90.0, 135.0)]
    + [Motion("turn left", 180.0)]
    + [
        Motion(f"move {way}", amount)
        for way in ("left", "right", "forward")
        for amount in (0.5, 1.0)
    ]
)
FINE = [Motion(f"turn {side}", 15.0 * i) for side in ("left", "right") for i in range(1, 12)] + [
    Motion(f"move {way}", round(0.1 * i, 1))
    for way in ("left", "right", "forward")
    for i in range(1, 13)
]
# No step back: it shows what no view of the ring saw, and coverage refuses every one.
TARGETS_PER_ROOM = 8
MIN_COVERAGE, MIN_METERS, MIN_DEGREES = Rules()[
    :3
]  # paper: of a target; between context cameras (layout apart)
ASKED_AT_ONCE = 16  # dialogues: of an 8B policy at most 13 GB of keys and values
FREE = 1.3  # metres around the middle of a room where no furniture stands


# ---- triples --------------------------------------------------------------------------------------------------


def shuffled(rng):
    """The ring in random order."""
    poses = ring(rng)
    return [poses[i] for i in rng.permutation(4)]


def apart(rng):
    """Four poses by the paper's rule, MIN_METERS apart on the floor and MIN_DEGREES in yaw; drawn until it holds.

    Each looks across the room, up to 25 degrees beside its middle: looking outwards they would hardly see a target.
    """
    one, other = np.triu_indices(4, 1)  # the six pairs
    while True:
        x, z = rng.uniform(-1.2, 1.2, (2, 4))
        yaw = np.degrees(np.arctan2(-x, -z)) + rng.uniform(-25, 25, 4)
        meters = np.hypot(x[one] - x[other], z[one] - z[other])
        turns = np.abs((yaw[one] - yaw[other] + 180) % 360 - 180)
        if (
            np.hypot(x, z).max() <= 1.2
            and meters.min() >= MIN_METERS
            and turns.min() >= MIN_DEGREES
        ):
            return [camera_pose(x[k], -EYE, z[k], yaw[k]) for k in range(4)]


LAYOUTS = {
    "ring": ring,
    "fine": ring,
    "shuffled": shuffled,
    "six": partial(ring, views=6),
    "apart": apart,
}


def room_triples(seed, out, layout="ring", size=SIZE):
    """All accepted triples of one room; they share one context and one reference, so training encodes it once.

    layout   of LAYOUTS: where the context cameras stand;  size: of the pictures, in pixels
    A target is refused where no camera can stand, where the context covers too little of it, and where the words would
    not be true.
    """
    rng = numpy_stream("triples of a room", seed)
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
        save_image(
            out / f"{name}_warp.png",
            np.concatenate([warped, 255 * seen[..., None].astype(np.uint8)], -1),
        )
        rows.append(
            {
                "id": name.removeprefix("triples/"),
                "scene": f"room_{seed}",
                "context": paths,
                "reference": reference + 1,
                "motion": {"kind": motion.kind, "amount": motion.amount},
                "instruction": instruction(motion, reference + 1),
                "target": f"{name}.png",
                "warp": f"{name}_warp.png",
                "coverage": round(covered, 4),
                "room": seed,
                "context_c2w": [as_lists(p) for p in poses],
                "target_c2w": as_lists(target),
            }
        )
    return rows


def stands_free(c2w):
    """Whether a camera is in the middle of the room, where no furniture stands. From a ring every motion ends there."""
    return np.hypot(*c2w[[0, 2], 3]) <= FREE


# ---- building -------------------------------------------------------------------------------------------------


def folder_of(layout="ring", size=SIZE):
    """Where triples of a layout and size are kept: out/data, out/data-apart, out/data-64, out/data-apart-64."""
    return (
        "out/data"
        + (f"-{layout}" if layout != "ring" else "")
        + (f"-{size}" if size != SIZE else "")
    )


def layout_of(folder):
    """The (layout, size) of a folder named by `folder_of`; ("ring", SIZE) for any other name."""
    named = re.fullmatch(rf"data(?:-({'|'.join(LAYOUTS)}))?(?:-(\d+))?", Path(folder).name)
    layout, size = named.groups() if named else (None, None)
    return layout or "ring", int(size or SIZE)


def make_triples(out, rooms=2000, held_out=96, threads=2, layout="ring", size=SIZE):
    """out/triples_{train,val,test}.jsonl, and a line that says how many targets the rule of the paper let through."""
    out, make = Path(out), partial(room_triples, layout=layout, size=size)
    for split, count, first in (
        ("train", rooms, FIRST_ROOM["triples_train"]),
        ("val", held_out, FIRST_ROOM["val"]),
        ("test", held_out, FIRST_ROOM["test"]),
    ):
        rows = build(f"triples, {split}", make, range(first, first + count), out, threads)
        save_jsonl(out / f"triples_{split}.jsonl", rows)
        say(
            f"triples_{split}.jsonl ({layout}, {size} px): {len(rows)} of {count * TARGETS_PER_ROOM} targets accepted, "
            f"{len(rows) / count:.1f} per room (the paper keeps 48 per scene)"
        )


def make_questions(out, rooms=1500, held_out=(100, 320), threads=2):
    """out/questions_{train,val,test}.jsonl; four questions per room, half of them in need of an unseen view."""
    out = Path(out)
    for split, count, first in (
        ("train", rooms, FIRST_ROOM["questions_train"]),
        ("val", held_out[0], FIRST_ROOM["val"]),
        ("test", held_out[1], FIRST_ROOM["test"]),
    ):
        rows = build(
            f"questions, {split}", room_questions, range(first, first + count), out, threads
        )
        save_jsonl(out / f"questions_{split}.jsonl", rows)
        unseen = sum(row["needs_view"] for row in rows)
        say(f"questions_{split}.jsonl: {len(rows)} questions, {unseen} need an unseen view")


# ---- World2VLM ------------------------------------------------------------------------------------------------------


def motion_questions(seeds, out, teacher, space=ROOMS, tries=1):
    """All records (extras/world2vlm/questions.py) of some rooms, which share their calls of the teacher; their pictures are saved.

    space, tries   as in `transitions`; boxes are those of the room, also where the teacher drew something else
    returns        [(records with paths for pictures and a "scene", Counter of the programs that were dropped)]
    """
    rng, rows = numpy_stream("motion questions", seeds[0]), []
    found, dropped = transitions(
        [room_anchor(seed) for seed in seeds], teacher, rng, space, tries=tries
    )
    for transition in found:
        for record in with_pictures(
            transition, out, f"{transition.room:07d}", rng, space, room_detections
        ):
            poses = transition.poses[: len(record["images"])]
            rows.append(
                record
                | {"scene": {"room": transition.room, "poses": [as_lists(c2w) for c2w in poses]}}
            )
    return [(rows, dropped)]


def make_world2vlm(out, teacher="truth", rooms=1000, held_out=(60, 240), threads=2):
    """out/questions_{train,val,test}.jsonl: World2VLM's eight tasks about rooms, validated and balanced in each split.

    teacher   truth: the true renderer; or a world model (lib/simulators.py), which is told only motions that small ones
              have seen. Validation and test are of the true renderer whoever teaches, and the same for all teachers
    """
    out = Path(out)
    if teacher != "truth":
        simulator = simulators.load_simulator(
            teacher, "cuda" if torch.cuda.is_available() else "cpu"
        )
    for split, count, first in (
        ("train", rooms, FIRST_ROOM["questions_train"]),
        ("val", held_out[0], FIRST_ROOM["val"]),
        ("test", held_out[1], FIRST_ROOM["test"]),
    ):
        seeds, title = range(first, first + count), f"world2vlm, {split}"
        if (
            split == "train" and teacher != "truth"
        ):  # a network stays in this process, eight rooms at a time
            parts = [
                part
                for start in tqdm(range(0, count, 8), desc=title)
                for part in motion_questions(
                    seeds[start : start + 8], out, simulator, SEEN, tries=2
                )
            ]
        else:
            make = partial(motion_questions, teacher=TrueRenderer())
            parts = build(title, make, [[seed] for seed in seeds], out, threads)
        faults = write_motion_questions(
            out, split, [row for part, _ in parts for row in part], f"{count} rooms", first
        )
        for left_out in (sum((dropped for _, dropped in parts), Counter()), faults):
            for reason, number in left_out.most_common():
                say(f"  {number:6}  left out: {reason}")


# ---- rooms in the files of published benchmarks ---------------------------------------------------------------


def make_mindcube(out, source):
    """Test questions in the files that MindCube publishes: raw/MindCube_tinybench.jsonl and other_all_image/.

    The setting is part of the id (MindCube's own rule): one spot is `rotation`, two places are `around`.
    """
    out, rows = Path(out), []
    for row in load_jsonl(source):
        setting = "around" if row["category"] == "camera-camera" else "rotation"
        images = [
            f"other_all_image/{setting}/{row['id']}/{k}.png"
            for k in range(1, len(row["images"]) + 1)
        ]
        for image, path in zip(images, row["images"]):
            save_image(out / image, load_image(path))
        rows.append(
            {
                "id": f"{setting}_{row['id']}",
                "category": [row["category"]],
                "type": setting,
                "meta_info": [],
                "question": " ".join([row["question"], *row["options"]]),
                "images": images,
                "gt_answer": row["answer"],
            }
        )
    save_jsonl(out / "raw" / "MindCube_tinybench.jsonl", rows)
    say(f"{out}/raw/MindCube_tinybench.jsonl: {len(rows)} questions in MindCube's layout")


# ---- command line ---------------------------------------------------------------------------------------------


def ensure(folder, what=("triples", "questions", "mindcube"), threads=2, **rooms):
    """Make what is missing of `what` in `folder`, and return the folder as a Path. **rooms may be rooms=how many."""
    folder, (layout, size) = Path(folder), layout_of(folder)
    if "triples" in what and not (folder / "triples_test.jsonl").exists():
        make_triples(folder, threads=threads, layout=layout, size=size, **rooms)
    if "questions" in what and not (folder / "questions_test.jsonl").exists():
        make_questions(folder, threads=threads, **rooms)
    if (
        "mindcube" in what
        and not (folder / "mindcube" / "raw" / "MindCube_tinybench.jsonl").exists()
    ):
        make_mindcube(folder / "mindcube", folder / "questions_test.jsonl")
    return folder


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "what",
        nargs="?",
        choices=[
            "triples",
            "questions",
            "mindcube",
            "world2vlm",
            "depth",
            "heldout",
            "corpus",
            "mine",
        ],
        help="what to make (default: what is missing of triples, questions and mindcube)",
    )
    p.add_argument(
        "--out",
        help="folder of the files (default: out/data, out/data-<layout>-<size> for other triples, "
        "out/world2vlm, out/<dataset>, out/heldout)",
    )
    p.add_argument(
        "--threads", type=int, help="processes (default: 2 for rooms, all cores for scans)"
    )
    p.add_argument(
        "--size",
        type=int,
        help=f"of the pictures, in pixels (default: rooms {SIZE}; scans {Rules().size}, "
        f"the shorter side)",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the draws among a scan's triples, of heldout and of mine",
    )
    rooms = p.add_argument_group("rooms")
    rooms.add_argument(
        "--layout", choices=list(LAYOUTS), default="ring", help="where the context cameras stand"
    )
    rooms.add_argument(
        "--rooms",
        type=int,
        help="rooms to train on (default 2000 for triples, 1500 for questions, 1000 for world2vlm)",
    )
    rooms.add_argument(
        "--teacher",
        default="truth",
        help="world2vlm: truth, the true renderer; tuned, untuned, or a "
        "world model's folder or URL (lib/simulators.py). A trained one should come from `data.py "
        "triples --layout fine`: it is asked for turns by 30 degrees, and never to step backward",
    )
    rendered = p.add_argument_group(
        "world2vlm of frames rendered elsewhere, as by SVC or HY-WorldPlay"
    )
    rendered.add_argument(
        "--rendered",
        metavar="DIR",
        help="folders of frames with their actions; extras/world2vlm/frames.py tells the layout",
    )
    rendered.add_argument(
        "--anchors",
        metavar="DIR",
        help="instead: triples of scans, from whose contexts --teacher "
        "moves over the paper's ranges",
    )
    rendered.add_argument(
        "--detector",
        help="folder or hub id of a GroundingDINO, such as "
        f"{real_views.DETECTOR}, that finds the boxes of D1 to D4 (default: only folders that bring "
        "boxes are asked about objects, and no scans)",
    )
    scans = p.add_argument_group("scans: python data.py triples --dataset scannet --root DIR")
    scans.add_argument(
        "--dataset",
        choices=list(READERS),
        help="extras/scans/scene.py tells the layout that each has on disk",
    )
    scans.add_argument("--root", help="folder of the dataset")
    scans.add_argument(
        "--val", help="file with the ids of scans for validation, instead of 2 %% of places"
    )
    scans.add_argument(
        "--test",
        help="file with the ids of test scans, one per line, or an official CSV of them, "
        "instead of 5 %% of places. All scans of a listed place go with it",
    )
    scans.add_argument(
        "--limit",
        type=int,
        help="scans at most, evenly spread over the dataset; --anchors: "
        "contexts of a split at most",
    )
    scans.add_argument(
        "--frames", type=int, default=Rules().frames, help="frames looked at per scan"
    )
    scans.add_argument("--contexts", type=int, default=Rules().contexts, help="contexts per scan")
    scans.add_argument(
        "--targets",
        type=int,
        default=Rules().targets,
        help="triples per context; the paper keeps 48 triples per scan",
    )
    scans.add_argument(
        "--coverage", type=float, default=MIN_COVERAGE, help="of a target, at least (paper: 0.85)"
    )
    scans.add_argument(
        "--apart",
        type=float,
        nargs=2,
        default=(MIN_METERS, MIN_DEGREES),
        metavar=("M", "DEG"),
        help="between the cameras of a context, at least (paper: 1 m and 30 degrees)",
    )
    depth = p.add_argument_group("depth, for DL3DV: python data.py depth --root DIR")
    depth.add_argument(
        "--model",
        default=DEPTH_MODEL,
        help="transformers checkpoint that estimates depth in metres",
    )
    rl = p.add_argument_group("corpus and mine: questions for RL")
    rl.add_argument(
        "--corpus", choices=("sensenova", "vst"), help="corpus: which; --root is its folder"
    )
    rl.add_argument("--questions", help="mine: a questions_train.jsonl")
    rl.add_argument(
        "--policy",
        help="mine: folder or hub id of the base policy (paper: Qwen/Qwen3-VL-8B-Instruct)",
    )
    rl.add_argument(
        "--samples",
        type=int,
        default=5,
        help="mine: answers per question (of the paper, readers say: 5)",
    )
    rl.add_argument(
        "--at-most",
        type=int,
        default=1,
        help="mine: right answers of a question to keep (likewise: 1)",
    )
    held = p.add_argument_group("heldout")
    held.add_argument(
        "--sources", nargs="+", help="folders of scans' triples (default: every out/<dataset>)"
    )
    held.add_argument(
        "--per-dataset", type=int, default=200, help="triples of each (paper: 200 of five datasets)"
    )
    args = at_least(
        p,
        p.parse_args(argv),
        [
            (key, 1)
            for key in (
                "threads",
                "size",
                "rooms",
                "limit",
                "frames",
                "contexts",
                "targets",
                "samples",
                "per_dataset",
            )
        ],
    )
    of_scans = [
        key
        for key in ("val", "test", "limit", "frames", "contexts", "targets", "coverage", "apart")
        if getattr(args, key) != p.get_default(key) and not (key == "limit" and args.anchors)
    ]
    if of_scans and not args.dataset:
        p.error(f"--{of_scans[0]} is of scans: python data.py triples --dataset NAME --root DIR")
    if args.seed and not (args.dataset or args.what in ("heldout", "mine")):
        p.error("--seed is of scans, heldout and mine; rooms have seeds of their own")
    if args.teacher in ("none", "reprojection"):
        p.error(f"--teacher {args.teacher} imagines nothing that could be taught")
    if args.what != "triples" and (args.layout != "ring" or args.size or args.dataset):
        p.error(
            "--layout, --size and --dataset are of triples: python data.py triples --layout apart"
        )
    if args.what != "world2vlm" and args.teacher != "truth":
        p.error("--teacher is of world2vlm: python data.py world2vlm --teacher tuned")
    if args.rendered and (
        args.what != "world2vlm" or args.teacher != "truth" or args.rooms or args.anchors
    ):
        p.error("--rendered DIR is of world2vlm, without --teacher, --rooms and --anchors")
    if args.anchors and (args.what != "world2vlm" or args.teacher == "truth" or args.rooms):
        p.error(
            "--anchors DIR is of world2vlm, with --teacher and without --rooms: nobody can render scans truly"
        )
    if args.detector and not (args.rendered or args.anchors):
        p.error(
            "--detector goes with world2vlm --rendered DIR or --anchors DIR: boxes of rooms are known"
        )
    if bool(args.dataset or args.what in ("depth", "corpus")) != bool(args.root):
        p.error(
            "--root DIR goes with triples --dataset NAME, with depth and with corpus --corpus NAME"
        )
    if (
        args.what == "corpus"
        and not args.corpus
        or args.what == "mine"
        and not (args.questions and args.policy)
    ):
        p.error(
            "corpus needs --corpus NAME --root DIR; mine needs --questions FILE --policy FOLDER"
        )
    if not 0 <= args.at_most < args.samples:
        p.error(
            f"--at-most {args.at_most} of --samples {args.samples}: must be 0 or more and less than the samples; "
            f"else none or all questions are kept"
        )
    rooms = folder_of(args.layout, args.size or SIZE)
    default = {
        "heldout": "out/heldout",
        "corpus": f"out/{args.corpus}",
        "mine": "out/mined",
        "world2vlm": "out/world2vlm",
    }.get(args.what, rooms)
    default = f"out/{args.dataset}" if args.dataset else default
    args.out = args.out or (
        "out/rendered" if args.rendered else "out/taught" if args.anchors else default
    )
    return args


def main(argv=None):
    """Make one kind of data, or whatever is missing."""
    args = parse_args(argv)
    if args.root and not Path(args.root).is_dir():
        fail(f"--root {args.root} is no folder: give the one that holds the dataset.")
    if file := next(
        (path for path in (Path(args.out), *Path(args.out).parents) if path.is_file()), None
    ):
        fail(f"--out {args.out} cannot be a folder: {file} is a file.")
    rooms = {"rooms": args.rooms} if args.rooms else {}
    if args.what is None:
        ensure(args.out, threads=args.threads or 2, **rooms)
    elif args.what == "mindcube":
        make_mindcube(Path(args.out) / "mindcube", Path(args.out) / "questions_test.jsonl")
    elif args.what == "questions":
        make_questions(args.out, threads=args.threads or 2, **rooms)
    elif args.rendered:
        make_rendered(args.out, args.rendered, args.detector, threads=args.threads or 2)
    elif args.what == "world2vlm":
        if args.teacher != "truth" and "://" not in args.teacher:
            size = " --preset astra" if args.teacher.endswith("-astra") else ""
            need(simulators.find_weights(args.teacher), f"python train_wm.py{size}")
        try:
            if args.anchors:
                make_taught(args.out, args.anchors, args.teacher, args.detector, args.limit)
                if not any(
                    (Path(args.out) / f"questions_{split}.jsonl").stat().st_size for split in SPLITS
                ):
                    fail(
                        f"No question was made: --anchors {args.anchors} must hold triples of scans with a metric "
                        f"scale, as of data.py triples --dataset NAME, from which the teacher shows usable views."
                    )
            else:
                make_world2vlm(args.out, args.teacher, threads=args.threads or 2, **rooms)
        except SimulatorError as error:
            fail(f"--teacher {args.teacher}: {error}")
    elif args.what == "heldout":
        make_heldout(
            args.sources
            or [f"out/{name}" for name in READERS if Path(f"out/{name}/summary.json").exists()],
            args.out,
            args.per_dataset,
            args.seed,
        )
    elif args.what == "depth":
        make_depth(args.root, args.model)
    elif args.what == "corpus":
        make_corpus(args.corpus, args.root, args.out)
    elif args.what == "mine":
        mine(args.questions, args.out, args.policy, args.samples, args.at_most, args.seed)
    elif args.dataset:
        rules = Rules(
            args.coverage,
            *args.apart,
            frames=args.frames,
            contexts=args.contexts,
            targets=args.targets,
            size=args.size or Rules().size,
        )
        lists = {split: getattr(args, split) for split in ("val", "test") if getattr(args, split)}
        make_scans(
            args.dataset, args.root, args.out, args.threads, args.seed, rules, lists, args.limit
        )
    else:
        make_triples(
            args.out, threads=args.threads or 2, layout=args.layout, size=args.size or SIZE, **rooms
        )


if __name__ == "__main__":
    run(main)
