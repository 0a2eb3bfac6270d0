"""
World2VLM (arXiv 2604.26934): what an imagined camera motion teaches a policy, as questions in plain text.

Every transition (transitions.py: picture s, actions a, the teacher's picture s') becomes questions in both directions.
The teacher is used for nothing else, and at test time not at all.

  inverse   s, s' -> a       A1 how far it moved   A2 how far it turned   A3 all actions   D3 actions from a box pair
  forward   s, a  -> s'      A4 is this claim true   D1 the object's new box   D2 is it gone   D4 is it the same object
The words of both are in words.py. Boxes stand in the text as integers 0..1000 and are never drawn on a picture.

  rooms      python -m extras.world2vlm.questions                          # the true renderer -> out/world2vlm
             python -m extras.world2vlm.questions --teacher out/wm         # a world model shows what is trained on
  scans      python -m extras.world2vlm.questions --anchors DIR --teacher out/wm-astra       # scans.py -> out/taught

Out: questions_{train,val,test}.jsonl, rows as lib.records.Question with "weight", the confidence of detections, and
"scene" (rooms) or "cluster": what it is about. The same again for the same rooms.

Departures. The released templates give the direction away in A1 and A2; the paper says that it is to be found, and so
it is here. Released claims of A4 can be told from their words alone: see `false_claim`. D1 to D4 say boxes and actions
in numbers, and who reckons with them needs the picture little: see `balanced`. The reworded answers of D2, D3 and D4
are left out: the paper's own reward cannot read them.
"""

import argparse
import math
from collections import Counter, defaultdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import FIRST_ROOM, build
from extras.world2vlm.objects import (
    MIN_AREA,
    MIN_CONFIDENCE,
    area,
    is_clear,
    load_detector,
    most_confident,
    room_detections,
)
from extras.world2vlm.transitions import (
    ROOMS,
    SEEN,
    actions_of,
    end_pose,
    random_program,
    room_anchor,
    transitions,
)
from extras.world2vlm.words import (
    COUNTS,
    PROMPTS,
    action_of,
    box_text,
    claim_text,
    program_text,
)
from lib.distributed import default_device, fail, say
from lib.geometry import Motion, as_lists
from lib.images import save_image
from lib.records import SPLITS, save_jsonl
from lib.rooms import TrueRenderer
from lib.simulators import URLS, SimulatorError, find_weights, load_simulator
from lib.stage import bounded, lock_folder, need, run_stage
from lib.streams import numpy_stream

# ---- false claims ---------------------------------------------------------------------------------------------------


def false_claim(program, rng, space):
    """A program that was not the one; how it differs:

    amount      hard: the same actions with other amounts (released: one step of 0.1 m or 5 degrees off, unseeable)
    order       hard: the two actions in the other order
    direction   easy: one action goes the opposite way
    other       easy: another sequence of as many actions, with amounts of its own
    returns     None if the program is not one of space.sequences, or a picture would not tell the claim from it
    Drawn evenly from whichever of the four stay within the space. Each maps the space evenly onto itself, so that the
    words of false claims are distributed exactly like those of true ones. The released claims go backward or to the
    right only where they are false.
    """
    patterns = {tuple(action for action, _ in pattern): pattern for pattern in space.sequences}
    actions = actions_of(program)
    if actions not in patterns:
        return None
    other_amounts = [random_program(patterns[actions], rng)]
    directions, others = [], []
    for i, motion in enumerate(program):
        opposite = Motion(motion.kind, -motion.amount)
        directions.append([*program[:i], opposite, *program[i + 1 :]])
    for other, pattern in patterns.items():
        if len(other) == len(actions) and other != actions:
            others.append(random_program(pattern, rng))
    orders = [program[::-1]] if len(program) == 2 else []
    possible = []
    for claims in (other_amounts, directions, others, orders):
        claims = [claim for claim in claims if actions_of(claim) in patterns]
        if claims:
            possible.append(claims)
    claims = possible[rng.integers(len(possible))]
    claim = claims[rng.integers(len(claims))]
    return claim if differ(program, claim, space.margin) else None


def differ(one, other, margin) -> bool:
    """Whether a picture tells two programs apart: they differ in an amount by `margin`, or in actions and in their end."""
    if actions_of(one) != actions_of(other):
        return not np.allclose(end_pose(np.eye(4), one), end_pose(np.eye(4), other))
    pairs = zip(one, other, strict=True)
    return any(abs(a.amount - b.amount) >= margin[a.unit] - 1e-9 for a, b in pairs)


# ---- the eight tasks ------------------------------------------------------------------------------------------------


def records(transition, rng, claim=None, detect=None) -> list[dict]:
    """All questions about one transition, each a dict as of `record`.

    claim     of `false_claim`; None: A4 is not asked
    detect    transition -> (Detections of the source, of the target); None: motion alone, A1 to A4
    """
    rows = motion_records(transition, rng, claim)
    if detect is not None:
        rows += object_records(transition, rng, *detect(transition))
    for number, row in enumerate(rows):
        rows[number] = {"id": f"{transition.name}_{number}_{row['category']}", **row}
    return rows


def record(transition, task, answer, label="", detections=(), claim=()) -> dict:
    """One question.

    label         for `balanced`
    detections    those that the question is about, and whose confidence counts
    returns       a lib.records.Question with one or two arrays as images, and "weight": confidence of the detections;
                  and "label", which is not written
    """
    images = [transition.source, transition.target]
    words = {"sequence": program_text(transition.program), "claim": claim and claim_text(claim)}
    if detections:
        words["object"] = detections[0].label
        words["box1"] = box_text(detections[0].box)
        words["box2"] = box_text(detections[-1].box)
    return {
        "bench": "world2vlm",
        "images": images[:1] if task == "D2" else images,
        "question": PROMPTS[task].format(**words),
        "options": [],
        "answer": answer,
        "category": task,
        "kind": "na",
        "needs_view": None,
        "weight": math.prod(d.score for d in detections),
        "label": label,
    }


def motion_records(transition, rng, claim) -> list[dict]:
    """A1 or A2 about a single action; A3 and A4 about several, A4 true or false by the toss of a coin."""
    program = transition.program
    text, label = program_text(program), action_of(program[0])
    if len(program) == 1:
        return [record(transition, "A1" if program[0].unit == "meters" else "A2", text, label)]
    rows = [record(transition, "A3", text, label)]
    if claim:
        answer = "true" if rng.random() < 0.5 else "false"
        said = program if answer == "true" else claim
        rows.append(record(transition, "A4", answer, answer, claim=said))
    return rows


def object_records(transition, rng, first, last) -> list[dict]:
    """D1 to D4, as far as the objects of the source and of the target allow.

    D1   only after programs with a move: how a mere turn shifts a box can be reckoned without any picture
    D2   yes: nothing of it is left. no: it still fills 1 % of the picture, be it cut by the edge. What shows less, or
         less surely, is not asked about
    D4   no: another object of the same label
    """
    program, rows = transition.program, []
    starts = [a for a in first if a.track is not None and is_clear(a)]
    tracks = {b.track for b in last}
    gone = [(a,) for a in starts if a.track not in tracks]
    both = list(product(starts, last))
    same = [(a, b) for a, b in both if a.track == b.track]
    stay = [(a, b) for a, b in same if b.score >= MIN_CONFIDENCE and area(b) >= MIN_AREA]
    pairs = [(a, b) for a, b in same if is_clear(b)]
    others = [(a, b) for a, b in both if a.label == b.label and b.track not in (a.track, None)]
    others = [(a, b) for a, b in others if is_clear(b)]
    if pairs:
        pair = most_confident(pairs, rng)
        if any(motion.unit == "meters" for motion in program):
            rows.append(record(transition, "D1", box_text(pair[1].box), detections=pair))
        if len(program) in COUNTS["D3"]:
            text, label = program_text(program), action_of(program[0])
            rows.append(record(transition, "D3", text, label, detections=pair))
    if gone or stay:
        answer = "yes" if gone else "no"
        if gone and stay:
            answer = "yes" if rng.random() < 0.5 else "no"
        detections = most_confident(gone if answer == "yes" else stay, rng)
        rows.append(record(transition, "D2", answer, answer, detections))
    for answer, candidates in (("yes", pairs), ("no", others)):
        if candidates:
            pair = most_confident(candidates, rng)
            rows.append(record(transition, "D4", answer, answer, pair))
    return rows


def records_with_pictures(transition, out, folder, rng, space, detect) -> list[dict]:
    """The `records` of a transition, their pictures saved in out/pictures/<folder>."""
    names = ("source", transition.name.rsplit("_", 1)[1])
    paths = [f"pictures/{folder}/{name}.png" for name in names]
    for path, image in zip(paths, (transition.source, transition.target), strict=True):
        save_image(out / path, image)
    rows = records(transition, rng, false_claim(transition.program, rng, space), detect)
    for row in rows:
        row["images"] = paths[: len(row["images"])]  # the first, or both
    return rows


# ---- balance ---------------------------------------------------------------------------------------------------------


def balanced(rows: list[dict], rng) -> list[dict]:
    """As many records of every label of each task; in random order.

    Labels are the first action's kind (A1, A2, A3, D3) or the two truths (A4, D2, D4: one of them alone is dropped); D1
    has none.
    What text alone gives: no more than chance in A1 to A4. D1 to D4 say boxes and actions in numbers, as in the paper,
    and arithmetic answers most of them: in rooms the nearest neighbours by all numbers of a prompt earn about .7 of the
    reward of D1, .9 of D2, .7 of D3 and .95 of D4, where the best constant answers earn .58, .66, .27 and .69. A box, a
    motion in metres and a thing that stands still leave little to see.
    """
    tasks = defaultdict(lambda: defaultdict(list))
    for i in rng.permutation(len(rows)):
        tasks[rows[i]["category"]][rows[i]["label"]].append(rows[i])
    chosen = []
    for task, labels in tasks.items():
        if task in ("A4", "D2", "D4") and len(labels) < 2:
            continue
        count = min(map(len, labels.values()))
        for same in labels.values():
            chosen += same[:count]
    return [chosen[i] for i in rng.permutation(len(chosen))]


# ---- files ----------------------------------------------------------------------------------------------------------


def write_motion_questions(out, split, rows, about, seed, failures=0) -> None:
    """out/questions_<split>.jsonl: World2VLM's records, balanced.

    rows    of `records`, with paths below `out` for pictures, and "scene" or "cluster": what they are about
    about   in words, for the line that says how many there are
    failures    programs of which the teacher gave no usable view
    Says how many of each task stay where every label is cut to the rarest.
    """
    chosen = balanced(rows, numpy_stream("balance", seed))
    public = [{key: row[key] for key in row if key != "label"} for row in chosen]
    save_jsonl(Path(out) / f"questions_{split}.jsonl", public)
    counts, all_counts = (Counter(row["category"] for row in each) for each in (chosen, rows))
    tasks = [f"{task} {counts[task]} of {count}" for task, count in sorted(all_counts.items())]
    say(
        f"questions_{split}.jsonl: {len(chosen)} questions about {about}, balanced: {', '.join(tasks)}"
    )
    if failures:
        say(f"  left out: {failures} programs of which the teacher gave no usable view")


def motion_questions(seeds, out, teacher, space=ROOMS) -> list[tuple[list[dict], int]]:
    """All records of some rooms, which share their calls of the teacher; their pictures are saved.

    space     as in `transitions`; boxes are those of the room, also where the teacher drew something else
    returns   [(records with paths for pictures and a "scene", how many programs had no usable view)]
    """
    rng, rows = numpy_stream("motion questions", seeds[0]), []
    anchors = [room_anchor(seed) for seed in seeds]
    results, failures = transitions(anchors, teacher, rng, space)
    for transition in results:
        room, poses = transition.room, [as_lists(c2w) for c2w in transition.poses]
        for row in records_with_pictures(
            transition, out, f"{room:07d}", rng, space, room_detections
        ):
            scene = {"room": room, "poses": poses[: len(row["images"])]}
            rows.append(row | {"scene": scene})
    return [(rows, failures)]


def make_room_questions(out, simulator=None, rooms=1000, held_out=(60, 240), threads=2) -> None:
    """out/questions_{train,val,test}.jsonl: the eight tasks about rooms, balanced in each split.

    simulator   the teacher, which is told only motions that small world models have seen; None: the true renderer.
                Validation and test are of the true renderer whoever teaches, and the same for all teachers
    """
    out = Path(out)
    counts = dict(zip(SPLITS, (rooms, *held_out), strict=True))
    firsts = (FIRST_ROOM["questions_train"], FIRST_ROOM["val"], FIRST_ROOM["test"])
    for (split, count), first in zip(counts.items(), firsts, strict=True):
        seeds, title, parts = range(first, first + count), f"world2vlm, {split}", []
        if simulator and split == "train":  # a network stays in this process, eight rooms at a time
            for start in tqdm(range(0, count, 8), desc=title):
                parts += motion_questions(seeds[start : start + 8], out, simulator, SEEN)
        else:
            make = partial(motion_questions, teacher=TrueRenderer())
            parts = build(title, make, [[seed] for seed in seeds], out, threads)
        rows = [row for rows, _ in parts for row in rows]
        failures = sum(count for _, count in parts)
        write_motion_questions(out, split, rows, f"{count} rooms", first, failures)


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = bounded(int, 1)
    p.add_argument("--out", help="default: out/world2vlm, of scans out/taught")
    p.add_argument(
        "--teacher",
        default="truth",
        help="truth, the true renderer; tuned, untuned, or a world model's folder or URL (lib/simulators.py). A trained "
        "one is never asked to step backward",
    )
    p.add_argument("--rooms", type=number, default=1000, help="to train on")
    p.add_argument(
        "--anchors",
        metavar="DIR",
        help="triples of scans, from whose contexts --teacher moves over the paper's ranges",
    )
    p.add_argument("--limit", type=number, help="--anchors: contexts of a split at most")
    p.add_argument(
        "--detector",
        help="folder or hub id of a GroundingDINO, such as IDEA-Research/grounding-dino-tiny, that finds the boxes of "
        "D1 to D4 in scans (default: these are not asked)",
    )
    p.add_argument("--threads", type=number, default=2, help="processes")
    args = p.parse_args(argv)
    if args.teacher in ("none", "reprojection"):
        p.error(f"--teacher {args.teacher} imagines nothing that could be taught")
    if args.anchors and args.teacher == "truth":
        p.error("--anchors DIR goes with --teacher: nobody can render scans truly")
    if args.detector and not args.anchors:
        p.error("--detector goes with --anchors DIR: boxes of rooms are known")
    args.out = args.out or ("out/taught" if args.anchors else "out/world2vlm")
    return args


def main(argv=None):
    """Make questions of rooms or of scans."""
    # here, since it imports this file
    from extras.world2vlm.scans import make_scan_questions

    args = parse_args(argv)
    lock_folder(args.out)
    simulator = None
    if args.teacher != "truth":
        if not args.teacher.startswith(URLS):
            need(find_weights(args.teacher), "python train_wm.py")
        simulator = load_simulator(args.teacher, default_device())
    try:
        detect = args.detector and load_detector(args.detector, default_device())
    except ValueError as error:
        fail(f"{error}")
    try:
        if args.anchors:
            names = (args.teacher, args.detector)
            make_scan_questions(args.out, args.anchors, names, simulator, detect, args.limit)
        else:
            make_room_questions(args.out, simulator, args.rooms, threads=args.threads)
    except SimulatorError as error:
        fail(f"--teacher {args.teacher}: {error}")


if __name__ == "__main__":
    run_stage(main)
