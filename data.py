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
from lib.geometry import Motion, coverage, dominant_motion, instruction, move_camera, phrase, pinhole, pose, warp
from lib.pictures import load_image, save_image
from lib.rooms import EYE, random_room, render

SIZE = 32                                             # pixels; the field of view is 90 degrees, so a ring of four tiles
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


def matrix(c2w):
    """A pose as nested lists, for JSON."""
    return np.round(c2w, 6).tolist()


# ---- triples --------------------------------------------------------------------------------------------------

def ring(rng, views=4):
    """Poses at one spot near the middle of the room, each one left turn of 360 / views degrees further."""
    x, z, phase = *rng.uniform(-0.2, 0.2, 2), rng.uniform(0, 360)
    return [pose(x, -EYE, z, phase - 360 / views * k) for k in range(views)]


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


# ---- questions ------------------------------------------------------------------------------------------------

ASKS = {"largest": "which object looks largest?", "leftmost": "which object is furthest to the left?",
        "rightmost": "which object is furthest to the right?", "left": "which object fills most of the left third?",
        "centre": "which object fills most of the centre third?",
        "right": "which object fills most of the right third?"}
CATEGORY = {"largest": "camera-object", "leftmost": "object-object", "rightmost": "object-object",
            "left": "region", "centre": "region", "right": "region"}
UNSEEN = [Motion(f"turn {side}", amount) for side in ("left", "right") for amount in (45.0, 135.0)] \
    + [Motion(f"move {way}", 1.0) for way in ("left", "right", "forward")]
RING_TURNS = [Motion("turn left", 90.0), Motion("turn right", 90.0), Motion("turn left", 180.0)]
WALKS = ("left", "right", "forward", "backward")
VISIBLE = 16                                          # pixels of 1,024: an object that counts as seen


def facts(ids, things):
    """What an instance map (H, W) shows, exactly: {ask: index of the object, None if ambiguous, -1 if there is none}.

    largest: at least 1.3 times the pixels of the next.  leftmost, rightmost: centroids at least 3 of 32 columns
    apart.  left, centre, right: most pixels of that third, at least 2 % of the view and 1.5 times the next.
    """
    width = ids.shape[1]
    per_column = np.stack([(ids == i + 1).sum(0) for i in range(things)])               # (things, W)
    scale = width**2 / 1024
    pixels = per_column.sum(1)
    seen = np.flatnonzero(pixels >= VISIBLE * scale)
    if len(seen) == 0:
        return {ask: -1 for ask in ASKS} | {"seen": []}

    def winner(scores, margin):
        order = seen[np.argsort(-scores[seen], kind="stable")]
        return int(order[0]) if len(order) == 1 or margin(scores[order[0]], scores[order[1]]) else None

    column = (per_column * np.arange(width)).sum(1) / np.maximum(pixels, 1) * 32 / width
    found = {"largest": winner(pixels, lambda a, b: a >= 1.3 * b),
             "leftmost": winner(-column, lambda a, b: a - b >= 3), "rightmost": winner(column, lambda a, b: a - b >= 3)}
    cuts = [0, width // 3, width - width // 3, width]
    for k, third in enumerate(("left", "centre", "right")):
        inside = per_column[:, cuts[k]:cuts[k + 1]].sum(1)
        best = winner(inside, lambda a, b: a >= 1.5 * b)
        found[third] = -1 if inside.max() < 6 * scale else best if best is None or inside[best] >= 20 * scale else None
    return found | {"seen": seen.tolist()}


def choose(rng, letter, answer, others):
    """Four lettered options, the answer at `letter` (0 to 3), the others in random order."""
    options = [others[i] for i in rng.permutation(3)]
    options.insert(letter, answer)
    return [f"{name}. {option}" for name, option in zip("ABCD", options)]


def distractors(rng, room, found, ask):
    """Three other objects of the room: up to two that the asked view shows as well, then others.

    Objects are called by their colour alone: the kind tells the size (a cabinet is more often the largest than a
    ball), and the question would be half answered by its text.
    """
    others = [i for i in rng.permutation(len(room.things)).tolist() if i != found[ask]]
    visible = [i for i in others if i in found["seen"]][:2]
    return [room.things[i].colour for i in (visible + [i for i in others if i not in visible])[:3]]


def room_questions(seed, out, per_kind=2):
    """Questions about one room: `per_kind` that need an unseen view, and as many that the given views answer.

    Of the latter, one in six asks for the camera's way between two views at different places (camera-camera), one
    in six for a turn that ends at a given view (rotation), the others about one image. Beside the published fields a
    row holds what only a room can know, for the cold start and for diagnosis, never shown to a policy in a question:
    `view`, the true view that `command` leads to, and `shows`, the facts of every image and last of that view.
    """
    rng = np.random.default_rng([13, seed])
    room, poses = random_room(seed), ring(rng)
    views = render(room, np.stack(poses), SIZE)
    given = [facts(ids, len(room.things)) for ids in views["ids"]]
    rows, letters = [], rng.permutation(2 * per_kind) % 4            # each letter as often as any other, in every room
    for i in range(2 * per_kind):
        form = "unseen" if i < per_kind else rng.choice(["image", "rotation", "camera"], p=[4 / 6, 1 / 6, 1 / 6])
        draft = camera_question(rng, poses) if form == "camera" else object_question(rng, room, poses, given, form)
        if draft is None:                             # a bare room: nothing clear to ask
            continue
        motion, cameras = draft["motion"], draft.pop("cameras", poses)
        command = motion or {"image": draft["shown_by"] or 1, "kind": "turn left", "amount": 45.0}
        target = move_camera(cameras[command["image"] - 1], Motion(command["kind"], command["amount"]))
        truth = render(room, np.stack([*cameras, target]), SIZE)
        own = f"q{i}_" if form == "camera" else ""        # the four views of the ring are shared by its questions
        images = [f"questions/{seed:07d}/{own}{k + 1}.png" for k in range(len(cameras))]
        view = f"questions/{seed:07d}/q{i}_view.png"
        for path, rgb in zip([*images, view], truth["rgb"]):
            save_image(out / path, rgb)
        answer, others = draft.pop("answer"), draft.pop("others")
        rows.append({"id": f"room_{seed}_{i}", "bench": "rooms", "images": images, **draft, "kind": "mca",
                     "options": choose(rng, letters[i], answer, others), "answer": "ABCD"[letters[i]],
                     "scene": {"room": seed, "poses": [matrix(camera) for camera in cameras]}, "command": command,
                     "view": view, "shows": [named(facts(ids, len(room.things)), room) for ids in truth["ids"]]})
    return rows


def object_question(rng, room, poses, given, form):
    """A question about objects: "unseen" (after a motion that leads to a view not given), "rotation" or "image"."""
    for _ in range(40):
        k, ask = int(rng.integers(4)), draw_ask(rng)
        motion = {"unseen": UNSEEN, "rotation": RING_TURNS, "image": [None]}[form]
        motion, shown = motion[rng.integers(len(motion))], None
        if form == "unseen":                          # clear, and other than the reference image itself would say
            there = facts(render(room, move_camera(poses[k], motion), SIZE, supersample=1)["ids"][0], len(room.things))
            if given[k][ask] is None or there[ask] == given[k][ask]:
                continue
        else:
            turns = 0 if form == "image" else int(motion.amount) // 90 * (1 if motion.kind == "turn left" else -1)
            shown = (k + turns) % 4
            there = given[shown]
        if usable(there, ask):
            start = f"Start from Image-{k + 1} and {phrase(motion)}. Then" if motion else f"In Image-{k + 1},"
            return {"question": f"{start} {ASKS[ask]}", "category": "rotation" if form == "rotation" else CATEGORY[ask],
                    "needs_view": form == "unseen", "ask": ask, "shown_by": None if shown is None else shown + 1,
                    "motion": motion and {"image": k + 1, "kind": motion.kind, "amount": motion.amount},
                    "answer": room.things[there[ask]].colour, "others": distractors(rng, room, there, ask)}


def camera_question(rng, poses):
    """Two views that look the same way from places 1 m apart: which way did the camera go?"""
    way, k = WALKS[rng.integers(4)], int(rng.integers(4))
    say = {w: f"it moved {'to the ' if w in ('left', 'right') else ''}{w}" for w in WALKS}
    return {"question": "How did the camera get from Image-1 to Image-2?", "category": "camera-camera",
            "needs_view": False, "ask": None, "shown_by": None, "motion": None,
            "answer": say[way], "others": [say[w] for w in WALKS if w != way],
            "cameras": [poses[k], move_camera(poses[k], Motion(f"move {way}", 1.0))]}


def named(found, room):
    """Facts with objects called by their colour: {ask: "red", "none", or None where it is unclear}."""
    colours = {i: thing.colour for i, thing in enumerate(room.things)} | {-1: "none", None: None}
    return {ask: colours[found[ask]] for ask in ASKS}


def draw_ask(rng):
    """A third each for camera-object, object-object and region."""
    return str(rng.choice(list(ASKS), p=[1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]))


def usable(found, ask):
    """A question is asked where its answer is clear, and a comparison only where there is something to compare."""
    return found[ask] is not None and found[ask] >= 0 and (CATEGORY[ask] == "region" or len(found["seen"]) >= 2)


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
