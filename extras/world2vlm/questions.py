"""
World2VLM (arXiv 2604.26934): what an imagined camera motion teaches a policy, as questions in plain text.

Every transition (extras/world2vlm/transitions.py: picture s, actions a, the teacher's picture s') becomes questions in both
directions. The teacher is used for nothing else, and at test time not at all.

  inverse   s, s' -> a       A1 how far it moved   A2 how far it turned   A3 all actions   D3 actions from a box pair
  forward   s, a  -> s'      A4 is this claim true   D1 the object's new box   D2 is it gone   D4 is it the same object
The words of both are in extras/world2vlm/words.py.

    rows = [row for transition in found for row in records(transition, rng, detect=room_detections)]
    rows, faults = validated(rows)
    rows = balanced(rows, rng)

Boxes stand in the text as integers 0..1000 and are never drawn on a picture.

Departures. The released templates give the direction away in A1 and A2; the paper says that it is to be found, and so
it is here. Released claims of A4 can be told from their words alone: see `false_claim`. D1 to D4 say boxes and actions
in numbers, and who reckons with them needs the picture little: see `balanced`. The reworded answers of D2, D3 and D4
are left out: the paper's own reward cannot read them.
"""

import re
from collections import Counter, defaultdict
from math import prod
from typing import NamedTuple

import numpy as np

from extras.world2vlm.transitions import ROOMS, draw, end_pose, kinds_of
from extras.world2vlm.words import (
    BOX,
    COUNTS,
    PROMPTS,
    TASKS,
    box_text,
    claim_text,
    on_grid,
    program_text,
    read_actions,
    read_box,
    read_truth,
)
from lib.common import say
from lib.geometry import Motion
from lib.images import save_image
from lib.records import save_jsonl
from lib.rooms import random_room, render
from lib.streams import numpy_stream

SURE = 0.3  # confidence of a detection that is believed
TURNED = {"left": "right", "right": "left", "forward": "backward", "backward": "forward"}
VERBS = {"A1": "move", "A2": "turn"}


# ---- objects --------------------------------------------------------------------------------------------------------


class Detection(NamedTuple):
    """An object in a picture. Two detections of one `track` are one object; None: nobody knows which one it is."""

    label: str
    box: tuple  # x1, y1, x2, y2 in pixels
    confidence: float
    track: int | str | None


def room_detections(transition):
    """(objects of the source, of the target), exactly. The label is the kind of furniture: a colour would name one."""
    room, size = random_room(transition.room), len(transition.source)
    found = ([], [])
    for out, ids in zip(
        found, render(room, np.stack(transition.poses), size, supersample=1)["ids"]
    ):
        for i, thing in enumerate(room.things):
            rows, columns = np.nonzero(ids == i + 1)
            if len(rows):
                box = tuple(
                    int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                )
                out.append(Detection(thing.kind, box, 1.0, i))
    return found


def image_detections(detector):
    """The same for any pictures, by a callable image -> [(label, box, confidence)], such as GroundingDINO.

    Who is who cannot be told by overlapping boxes when the camera goes far, so only a label that occurs once in the
    source and at most once in the target is tracked. D4 needs two of a label: for it, give tracks of your own.
    """

    def detect(transition):
        return by_label(
            [
                [Detection(*found, None) for found in detector(image)]
                for image in (transition.source, transition.target)
            ]
        )

    return detect


def by_label(pair):
    """(objects of the source, of the target), tracked where the label occurs once in the first and at most once in the
    second; any tracks that they had are dropped."""
    first, last = (Counter(detection.label for detection in found) for found in pair)
    return tuple(
        [
            detection._replace(
                track=detection.label
                if first[detection.label] == 1 >= last[detection.label]
                else None
            )
            for detection in found
        ]
        for found in pair
    )


def share(detection, image):
    """The share of the picture that a box fills."""
    (height, width), (x1, y1, x2, y2) = image.shape[:2], detection.box
    return max(x2 - x1, 0) * max(y2 - y1, 0) / (width * height)


def clear(detection, image):
    """The paper's filter: confidence 0.3, 1 % to 60 % of the picture, all sides at least 1 % away from its edges."""
    (height, width), (x1, y1, x2, y2) = image.shape[:2], detection.box
    return (
        detection.confidence >= SURE
        and 0.01 <= share(detection, image) <= 0.6
        and min(x1 / width, y1 / height) >= 0.01
        and max(x2 / width, y2 / height) <= 0.99
    )


def best(candidates, rng):
    """The tuple of Detections with the largest sum of confidences; drawn among equals."""
    sums = [sum(detection.confidence for detection in each) for each in candidates]
    equal = [each for each, total in zip(candidates, sums) if total == max(sums)]
    return equal[rng.integers(len(equal))]


# ---- the eight tasks ------------------------------------------------------------------------------------------------


def opposite(motion):
    verb, way = motion.kind.split()
    return Motion(f"{verb} {TURNED[way]}", motion.amount)


def false_claim(program, rng, space):
    """A program that was not the one, and how it differs: (program, "amount" | "order" | "direction" | "other").

    amount      hard: one amount lies space.margin away or more (released: one step of 0.1 m or 5 degrees, unseeable)
    order       hard: the two actions in the other order
    direction   easy: one action goes the opposite way
    other       easy: another sequence of as many actions, with amounts of its own
    returns     None if the program is not one of space.sequences, if there is no other, or if the one that was drawn
                ends at the same pose and so is true
    Drawn evenly from whichever of the four stay within the space. Each maps the space evenly onto itself, so that where
    programs fill it evenly the words of false claims are distributed exactly like those of true ones: amounts move in
    a circle, by as many places as takes each of them far enough. Where they do not (space.often), a claim whose amounts
    are rarer than the program's passes as much more rarely; patterns are left to `balanced`. The released claims go
    backward or to the right only where they are false.
    """
    patterns = {tuple(kind for kind, _ in sequence): sequence for sequence in space.sequences}

    def within(claim):
        pattern = patterns.get(kinds_of(claim), ())
        return pattern and all(
            motion.amount in amounts for motion, (_, amounts) in zip(claim, pattern)
        )

    if not within(program):
        return None
    sequence, found = patterns[kinds_of(program)], defaultdict(list)
    for i, (motion, (_, amounts)) in enumerate(zip(program, sequence)):
        for shift in range(1, len(amounts)):
            shifted = amounts[shift:] + amounts[:shift]
            if all(
                abs(a - b) >= space.margin[motion.unit] - 1e-9 for a, b in zip(amounts, shifted)
            ):
                amount = float(shifted[amounts.index(motion.amount)])
                found["amount"].append(
                    program[:i] + [Motion(motion.kind, amount)] + program[i + 1 :]
                )
        found["direction"].append(program[:i] + [opposite(motion)] + program[i + 1 :])
    if len(program) == 2:
        found["order"].append(program[::-1])
    found["other"] = [
        draw(other, rng)
        for kinds, other in patterns.items()
        if len(kinds) == len(program) and kinds != kinds_of(program)
    ]
    found = {
        how: kept
        for how, claims in found.items()
        if (kept := [claim for claim in claims if within(claim)])
    }
    if not found:
        return None
    how = list(found)[rng.integers(len(found))]
    claim = found[how][rng.integers(len(found[how]))]
    if np.allclose(end_pose(np.eye(4), claim), end_pose(np.eye(4), program)):
        return None
    if space.often and rng.random() * usual(program, space) > usual(claim, space):
        return None
    return claim, how


def usual(program, space):
    """How often the amounts of a program come (space.often), as a multiple of what they would if all came alike."""
    return prod(
        amounts[motion.amount] * len(amounts) / amounts.total()
        for motion, amounts in zip(program, space.often[kinds_of(program)])
    )


def blind_column(box, width, program, focal=0.5):
    """Where the words alone put a box after a program: the column of its middle, in picture widths from the centre.

    It is taken to belong to something 0.8 m large, which gives its distance. inf: behind the camera. A box may be in
    any unit, `width` in the same one; `focal` is in picture widths. Where this is right no picture is needed, so
    `balanced` asks as often where not.
    """
    focal = focal * width
    depth = 0.8 * focal / max(box[2] - box[0], box[3] - box[1], 1)
    point = np.array([((box[0] + box[2]) / 2 - width / 2) / focal * depth, 0, depth, 1])
    x, _, z, _ = np.linalg.inv(end_pose(np.eye(4), program)) @ point
    return x / z * focal / width if z > 0.05 else np.inf


def records(transition, rng, space=ROOMS, detect=None):
    """All questions about one transition.

    detect    transition -> (Detections of the source, of the target); None: motion alone, A1 to A4
    returns   [{"id", "task", "images": one or two arrays, "prompt", "answer", "weight", "program", "label", "cell",
                "negative"}]
              "weight" is the teacher's reliability: agreement of its views times confidence of the detections used;
              "program" the true actions as text; "label" and "cell" are for `balanced`; "negative" how a false one was
              made, else None. All but the images is JSON
    A4   true or false by the toss of a coin: see `false_claim`
    D1   only after programs with a move: how a mere turn shifts a box can be reckoned without any picture
    D2   yes: nothing of it is left. no: it still fills 1 % of the picture, be it cut by the edge. What shows less, or
         less surely, is not asked about
    D4   no: another object of the same label. Easy as drawn; hard as `balanced` leaves them, as far from the blind
         guess as the true ones
    """
    source, target, program = transition.source, transition.target, transition.program
    text, (height, width), rows = program_text(program), source.shape[:2], []

    def add(task, answer, label, cell=(), confidence=1.0, negative=None, **words):
        images = [source] if task == "D2" else [source, target]
        rows.append(
            {
                "id": f"{transition.name}_{len(rows)}_{task}",
                "task": task,
                "images": images,
                "prompt": PROMPTS[task].format(sequence=text, **words),
                "answer": answer,
                "weight": transition.agreement * confidence,
                "program": text,
                "label": label,
                "cell": list(cell),
                "negative": negative,
            }
        )

    if len(program) == 1:
        add("A1" if program[0].unit == "meters" else "A2", text, program[0].kind)
    else:
        add("A3", text, program[0].kind)
        if claim := false_claim(program, rng, space):
            said, how = (program, None) if rng.random() < 0.5 else claim
            answer = "true" if how is None else "false"
            add(
                "A4",
                answer,
                answer,
                kinds_of(said) if space.often else (),
                negative=how,
                claim=claim_text(said),
            )
    if detect is None:
        return rows

    first, last = detect(transition)
    starts = [a for a in first if clear(a, source) and a.track is not None]
    pairs = [(a, b) for a in starts for b in last if b.track == a.track and clear(b, target)]
    moved = any(motion.unit == "meters" for motion in program)
    if pairs:
        a, b = best(pairs, rng)
        boxes = {
            "object": a.label,
            "box1": box_text(a.box, width, height),
            "box2": box_text(b.box, width, height),
        }
        sure = a.confidence * b.confidence
        if moved:
            add("D1", boxes["box2"], "", confidence=sure, **boxes)
        if len(program) in COUNTS["D3"]:
            add("D3", text, program[0].kind, confidence=sure, **boxes)
    gone = [(a,) for a in starts if all(b.track != a.track for b in last)]
    stay = [
        (a, b)
        for a in starts
        for b in last
        if b.track == a.track and b.confidence >= SURE and share(b, target) >= 0.01
    ]
    if gone or stay:
        answer = (
            ("yes" if rng.random() < 0.5 else "no") if gone and stay else "yes" if gone else "no"
        )
        a, *seen = best(gone if answer == "yes" else stay, rng)
        add(
            "D2",
            answer,
            answer,
            tenths(blind_column(a.box, width, program, transition.focal)),
            prod(detection.confidence for detection in (a, *seen)),
            object=a.label,
            box1=box_text(a.box, width, height),
        )
    others = [
        (a, b)
        for a in starts
        for b in last
        if b.label == a.label and b.track not in (a.track, None) and clear(b, target)
    ]
    for answer, candidates in (("yes", pairs), ("no", others)):
        if candidates:
            a, b = best(candidates, rng)
            off = (
                (b.box[0] + b.box[2]) / 2 / width
                - 0.5
                - blind_column(a.box, width, program, transition.focal)
            )
            add(
                "D4",
                answer,
                answer,
                tenths(abs(off)),
                a.confidence * b.confidence,
                "label" if answer == "no" else None,
                object=a.label,
                box1=box_text(a.box, width, height),
                box2=box_text(b.box, width, height),
            )
    return rows


def tenths(value):
    """Tenths of a picture, at most 1 to either side."""
    return (int(np.floor(10 * np.clip(value, -1, 1))),)


def with_pictures(transition, out, folder, rng, space, detect):
    """The `records` of a transition, their pictures saved in out/pictures/<folder>."""
    paths = [
        f"pictures/{folder}/{name}.png" for name in ("source", transition.name.rsplit("_", 1)[1])
    ]
    for path, image in zip(paths, (transition.source, transition.target)):
        save_image(out / path, image)
    return [
        record | {"images": paths[: len(record["images"])]}  # the first, or both
        for record in records(transition, rng, space, detect)
    ]


# ---- validation and balance -----------------------------------------------------------------------------------------


def validate(record):
    """What is wrong with a record, in words; None if nothing is."""
    task, answer, program = record["task"], record["answer"], read_actions(record["program"])
    if task not in TASKS:
        return "no such task"
    if len(record["images"]) != (1 if task == "D2" else 2):
        return "wrong number of images"
    if re.search("[{}]", record["prompt"]):
        return "a placeholder is left in the prompt"
    if not 0 < record["weight"] <= 1:
        return "the weight is not in (0, 1]"
    if not program or any(
        value <= 0 or not on_grid(Motion(kind, value)) for kind, value in program
    ):
        return "an amount is not on the grid"
    for box in BOX.findall(record["prompt"]) + (BOX.findall(answer) if task == "D1" else []):
        x1, y1, x2, y2 = map(float, box)
        if not (
            0 <= x1 < x2 <= 1000
            and 0 <= y1 < y2 <= 1000
            and all(float(v).is_integer() for v in box)
        ):
            return "a box is not four integers in order in 0..1000"
    if len(BOX.findall(record["prompt"])) != {"D1": 1, "D2": 1, "D3": 2, "D4": 2}.get(task, 0):
        return "a box is missing in the prompt"
    if task in ("D1", "D2", "D4") and read_actions(record["prompt"]) != program:
        return "the actions in the prompt are not what the camera did"
    if task == "D1":
        return None if read_box(answer)[1] else "the answer is not a box"
    if task in COUNTS:
        if len(read_actions(answer)) not in COUNTS[task]:
            return "the answer has too few or too many actions"
        if task in VERBS and not answer.startswith(VERBS[task]):
            return "the answer moves where it should turn, or turns where it should move"
        return None if answer == record["program"] else "the answer is not what the camera did"
    if read_truth(answer) is None:
        return "the answer is neither yes nor no"
    if task == "A4" and (read_actions(record["prompt"]) == program) != read_truth(answer):
        return "the claim contradicts the answer"
    return None


def validated(rows):
    """(records that pass, Counter of the reasons why others did not)."""
    faults = [validate(row) for row in rows]
    return [row for row, fault in zip(rows, faults) if fault is None], Counter(filter(None, faults))


def balanced(rows, rng):
    """As many records of every label, within each cell of each task; in random order.

    Labels are the first action's kind (A1, A2, A3, D3) or the two truths (A4, D2, D4: a cell with one of them alone is
    dropped); D1 has none. A cell of A4 holds claims of one pattern, if the patterns are not alike often (space.often).
    One of D2 and D4 holds what `blind_column` guesses alike, so that a rule of thumb about boxes does not tell the
    answer; one D2 in 13 and one D4 in 25 stay.
    What text alone gives: no more than chance in A1 to A4. D1 to D4 say boxes and actions in numbers, as in the paper,
    and arithmetic answers most of them: in rooms the nearest neighbours by all numbers of a prompt earn about .7 of the
    reward of D1, .9 of D2, .7 of D3 and .95 of D4, where the best constant answers earn .58, .66, .27 and .69. A box, a
    motion in metres and a thing that stands still leave little to see.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for i in rng.permutation(len(rows)):
        row = rows[i]
        groups[row["task"], tuple(row["cell"])][row["label"]].append(row)
    kept = []
    for (task, _), labels in groups.items():
        if task in ("A4", "D2", "D4") and len(labels) < 2:
            continue
        level = min(map(len, labels.values()))
        kept += [row for same in labels.values() for row in same[:level]]
    return [kept[i] for i in rng.permutation(len(kept))]


# ---- files ----------------------------------------------------------------------------------------------------------


def write_motion_questions(out, split, rows, about, seed):
    """out/questions_<split>.jsonl: what is valid of World2VLM's records, balanced -> Counter of the faults of others.

    rows    of `records`, with paths below `out` for pictures, and "scene" or "cluster": what they are about
    about   in words, for the line that says how many there are
    Says so of each task of which less than a tenth stays.
    """
    rows, faults = validated(rows)
    kept = balanced(rows, numpy_stream("balance", seed))
    save_jsonl(
        out / f"questions_{split}.jsonl",
        [
            {
                "id": row["id"],
                "bench": "world2vlm",
                "images": row["images"],
                "question": row["prompt"],
                "options": [],
                "answer": row["answer"],
                "category": row["task"],
                "kind": "na",
                "needs_view": None,
                "weight": row["weight"],
                "negative": row["negative"],
                **{key: row[key] for key in ("scene", "cluster") if key in row},
            }
            for row in kept
        ],
    )
    tasks, made = (Counter(row["task"] for row in part) for part in (kept, rows))
    say(
        f"questions_{split}.jsonl: {len(kept)} questions about {about}, balanced: "
        + ", ".join(f"{task} {tasks[task]} of {made[task]}" for task in sorted(made))
    )
    for task in sorted(task for task in made if tasks[task] < made[task] / 10):
        labels = Counter(row["label"] for row in rows if row["task"] == task)
        say(
            f"  {task}: less than a tenth stays, since every label is cut to the rarest of its cell. There were "
            f"{', '.join(f'{n} {label}' for label, n in labels.most_common())}."
        )
    return faults
