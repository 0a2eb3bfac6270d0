"""
Transitions from frames that another program rendered (SVC, HY-WorldPlay, any simulator): a folder for each program.

  <root>/…/<name>/actions.json     {"program": [{"kind": "move forward", "amount": 1.5}, …],
                                    "frames": ["0.png", …, "15.png"],
                                    "steps": [{"kind": "move forward", "amount": 0.1875}, …],
                                    "intrinsics": [3 rows of 3],
                                    "place": "scene0000_00",
                                    "detections": {"0.png": [{"label": "chair", "box": [120, 80, 300, 260],
                                                              "confidence": 0.8, "track": 1}, …], "15.png": […]}}

  program      one to three actions of the six kinds, metres and degrees, on the grid of 0.1 m and 10 degrees. Moves in
               a row end at one place in any order, and so do turns: they are read as their sum, sideways first
  frames       pictures below the folder, in order; default: those in the folder, by name, numbers by their value
  steps        the motion before each frame but the first: they add up to the program. Without them the last frame is
               taken to be the program's end, with them frames may be missing at the end: less was done then
  intrinsics   of the pictures, in pixels, as in lib/geometry.py; default: 90 degrees wide, as SVC renders
  place        what no two splits may share, such as a scan's name; default: the first picture itself, since the
               programs of an anchor begin with the same one
  detections   of the first and the last frame: box is left, top, right, bottom in pixels; confidence is 1 if it is not
               given. Boxes of one track show one object; without any, labels that occur once are tracked

All but "program" may be missing. The source is the first frame and the target the last one that exists. Without
detections a detector finds the boxes, or there are none, and only A1 to A4 are asked.
"""

import json
import os
import re
from collections import Counter
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from extras.report import real_views
from extras.scans.make import split_of
from extras.world2vlm.questions import (
    Detection,
    by_label,
    image_detections,
    records,
    write_motion_questions,
)
from extras.world2vlm.transitions import MOVES, TURNS, Space, Transition, is_view, kinds_of
from extras.world2vlm.words import GRID, on_grid
from lib.common import fail, say
from lib.geometry import TABLE, Motion, move_camera, phrase
from lib.records import SPLITS, build
from lib.streams import numpy_stream

NEAR = 0.02  # of the grid's step, that is 2 mm and 0.2 degrees: sums of rounded steps are so near
KIND = {(axis, sign): kind for kind, (_, _, axis, sign) in TABLE.items()}
MARGIN = {"meters": 0.5, "degrees": 20}  # of a false claim's amount, at least
THE_OTHER_WAY = "turns the other way"
MIRRORED = 0.1  # the mirrored turn fits better by this much correlation; of 720 true turns in rooms none does
WIDEST = 60  # degrees: frames further apart share too little to compare


# ---- one folder -----------------------------------------------------------------------------------------------------


def read_rendered(folder):
    """One folder -> Transition, with its "files", "place" and, if given, detections and intrinsics.

    Raises ValueError, a sentence, where it cannot be used: what `walked` says, a picture that is truncated or of
    another size, a turn that shows the other way.
    """
    folder = Path(folder)
    info = read_actions_file(folder)
    program, steps, names, there = walked(folder, info)
    last = there[-1]
    source = read_picture(folder / names[0])
    target = read_picture(folder / names[last], source.shape)
    if not is_view(target, source):
        raise ValueError(f"{names[last]} shows one flat colour.")
    K = intrinsics_of(info, source)
    for i, j, turn in turns_of(program, steps, there):
        if looks_mirrored(
            *(read_picture(folder / names[k], source.shape) for k in (i, j)), turn, K
        ):
            raise ValueError(
                f"from {names[i]} to {names[j]} the picture {THE_OTHER_WAY} than '{phrase(turn)}' says, "
                f"as if left were right."
            )
    found = (
        detections_of(info["detections"], names[0], names[last]) if info.get("detections") else None
    )
    place = info.get("place") or sha256((folder / names[0]).read_bytes()).hexdigest()[:16]
    return Transition(
        folder.name,
        source,
        target,
        program,
        detections=found,
        focal=K[0, 0] / source.shape[1],
        files=(folder / names[0], folder / names[last]),
        place=str(place),
    )


def walked(folder, info):
    """What a folder shows, by its names alone -> (program, steps, names of its frames, numbers of those that exist).

    The program is what was done by the last frame that exists, `merged`. Raises ValueError, a sentence: an action that
    is not one of the six or off the grid, steps that are not the program, no first or no other frame.
    """
    program, steps = (
        read_program(info),
        info.get("steps") and [motion_of(step) for step in info["steps"]],
    )
    names = info.get("frames") or pictures_of(folder)
    if steps and len(steps) != len(names) - 1:
        raise ValueError(
            f"it has {len(names)} frames and {len(steps)} steps; there is one step before each frame but "
            f'the first. If frames are missing, list them all as "frames".'
        )
    if steps and all(map(on_grid, program)) and done_by(program, steps) != program:
        raise ValueError("its steps end before its program does.")
    there = [k for k, name in enumerate(names) if (folder / name).exists()]
    if not there or there[0] != 0:
        raise ValueError(f"its first frame{f', {names[0]},' if names else ''} is missing.")
    last = there[-1]
    if last == 0:
        raise ValueError("no frame after the first exists.")
    if last < len(names) - 1 and not steps:
        raise ValueError(
            f'{names[last + 1]} and what follows is missing, and without "steps" nobody knows how far '
            f"the camera got."
        )
    program = merged(done_by(program, steps[:last]) if steps else program)
    if not program:
        raise ValueError("its actions undo each other.")
    if off := [motion for motion in program if not on_grid(motion)]:
        raise ValueError(
            f"'{phrase(off[0])}' is off the grid of 0.1 m and 10 degrees"
            f"{f'; that far it got by {names[last]}, the last frame' if last < len(names) - 1 else ''}."
        )
    return program, steps, names, there


def read_actions_file(folder):
    """actions.json as a dict. Raises ValueError."""
    try:
        info = json.loads((folder / "actions.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"actions.json cannot be read ({error}).") from None
    if not isinstance(info, dict) or not isinstance(info.get("program"), list):
        raise ValueError('actions.json has no "program", a list of actions.')
    names, steps = info.get("frames") or [], info.get("steps") or []
    if not (
        isinstance(steps, list)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
    ):
        raise ValueError('"frames" should be a list of file names and "steps" a list of actions.')
    if outside := [
        name for name in names if not (folder / name).resolve().is_relative_to(folder.resolve())
    ]:
        raise ValueError(f"its frame {outside[0]} is not below the folder.")
    return info


def read_program(info):
    """Its program: one to three Motions of the six kinds. Raises ValueError."""
    program = [motion_of(action) for action in info["program"]]
    if not 1 <= len(program) <= 3:
        raise ValueError(
            f"its program has {len(program)} actions; the questions are about one to three."
        )
    return program


def motion_of(action):
    """{"kind", "amount"} -> Motion. Raises ValueError."""
    kind, amount = (
        action.get(key) if isinstance(action, dict) else None for key in ("kind", "amount")
    )
    if kind not in MOVES + TURNS:
        raise ValueError(f"there is no action {kind!r}; the six are: {', '.join(MOVES + TURNS)}.")
    if not (isinstance(amount, (int, float)) and 0 < amount < 1e6):
        raise ValueError(
            f"the amount of '{kind}' is {amount!r:.40} and should be a number above 0, below a million."
        )
    return Motion(kind, round(float(amount), 6))


def merged(program):
    """A program with the same end: moves in a row are summed along each axis, sideways first (as in the paper's third
    preset), and turns in a row; opposites cancel. No order is left that a picture cannot show."""
    found = []
    for _, run in groupby(program, key=lambda motion: motion.unit):
        sums = Counter()
        for motion in run:
            _, _, axis, sign = TABLE[motion.kind]
            sums[axis] += sign * motion.amount
        found += [
            Motion(KIND[axis, np.sign(total)], round(abs(total), 6))
            for axis, total in sorted(sums.items())
            if abs(total) > 1e-6
        ]
    return found


def pictures_of(folder):
    """Names of a folder's pictures in the order of their names; 10.png comes after 9.png."""
    names = [
        path.name for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")
    ]
    return sorted(
        names,
        key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
        ],
    )


def done_by(program, steps):
    """What some steps do of a program, as a program. Raises ValueError if they are not how it begins.

    An amount is told on the grid where the sum of the rounded steps is near.
    """
    number, amount, slack = 0, 0.0, NEAR * GRID[program[0].unit]
    for step in steps:
        if amount > program[number].amount - slack and number < len(program) - 1:
            number, amount, slack = number + 1, 0.0, NEAR * GRID[program[number + 1].unit]
        amount += step.amount
        if step.kind != program[number].kind or amount > program[number].amount + slack:
            raise ValueError(
                f"its steps do not add up to its program: '{phrase(step)}' does not belong to "
                f"'{phrase(program[number])}', or goes beyond it."
            )
    unit = GRID[program[number].unit]
    near = round(amount / unit) * unit  # the program's own, if it was done in full
    return program[:number] + [
        Motion(step.kind, round(near if abs(amount - near) <= slack else amount, 4))
    ]


def read_picture(path, shape=None):
    """(H, W, 3) uint8. Raises ValueError if it is truncated, no picture, or not of the `shape` of the first frame."""
    try:
        image = np.array(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path.name} cannot be read ({error}); it may be truncated: render or copy it again."
        ) from None
    if shape not in (None, image.shape):
        raise ValueError(
            f"{path.name} has {image.shape[1]} x {image.shape[0]} pixels and the first frame "
            f"{shape[1]} x {shape[0]}."
        )
    return image


def intrinsics_of(info, image):
    """(3, 3) of an image: as given, else 90 degrees wide. Raises ValueError."""
    (height, width), given = image.shape[:2], info.get("intrinsics")
    if given is None:
        return np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1]])
    try:
        K = np.array(given, float)
    except (TypeError, ValueError, OverflowError):
        K = np.zeros(0)
    if K.shape != (3, 3) or not min(K[0, 0], K[1, 1]) > 0 or K[2].tolist() != [0, 0, 1]:
        raise ValueError(
            '"intrinsics" should be 3 rows of 3 numbers: focal lengths above 0, the last row 0, 0, 1.'
        )
    return K


def detections_of(given, first, last):
    """{frame: rows} -> (Detections of the first frame, of the last). Raises ValueError."""
    if not (isinstance(given, dict) and first in given and last in given):
        raise ValueError(f'"detections" should have those of {first} and of {last}, be they none.')
    try:
        pair = tuple(
            [
                Detection(
                    str(row["label"]),
                    tuple(map(float, row["box"])),
                    float(row.get("confidence", 1)),
                    row.get("track"),
                )
                for row in given[name]
            ]
            for name in (first, last)
        )
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"a detection has no label and no box of four numbers ({error})."
        ) from None
    if any(len(found.box) != 4 for part in pair for found in part):
        raise ValueError("the box of a detection should be four numbers: left, top, right, bottom.")
    known = any(found.track is not None for part in pair for found in part)
    return pair if known else by_label(pair)


# ---- mirrored turns -------------------------------------------------------------------------------------------------


def turns_of(program, steps, there):
    """Pairs of frames between which the camera only turned: [(frame, later frame, Motion)], at most WIDEST degrees.

    there   numbers of the frames that exist
    """
    if not steps:
        alone = len(program) == 1 and program[0].kind in TURNS and program[0].amount <= WIDEST
        return [(there[0], there[-1], program[0])] if alone else []
    found, start = [], 0
    for kind, run in groupby(steps, key=lambda step: step.kind):
        ends = np.cumsum([step.amount for step in run])
        frames = [k for k, end in enumerate(ends) if end < WIDEST + 1 and start + k + 1 in there]
        if kind in TURNS and frames and start in there:
            found.append((start, start + frames[-1] + 1, Motion(kind, float(ends[frames[-1]]))))
        start += len(ends)
    return found


def turn_fit(source, target, turn, K):
    """Correlation of a picture with what a turn of the camera makes of another, where both see the same.

    A mere turn moves every pixel alike, whatever its depth. None if they share less than a tenth of the picture.
    """
    (height, width), motion = target.shape[:2], move_camera(np.eye(4), turn)[:3, :3]
    rows, columns = np.mgrid[:height, :width] + 0.5
    rays = np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(K).T
    x, y, z = np.moveaxis(rays @ motion.T @ K.T, -1, 0)
    ahead = np.where(z > 1e-6, z, 1)
    column, row = np.floor(x / ahead).astype(int), np.floor(y / ahead).astype(int)
    seen = (z > 1e-6) & (column >= 0) & (row >= 0) & (column < width) & (row < height)
    if seen.mean() < 0.1:
        return None
    before, after = (
        source[row[seen], column[seen]].astype(float).ravel(),
        target[seen].astype(float).ravel(),
    )
    spread = before.std() * after.std()
    return (
        float(np.mean((before - before.mean()) * (after - after.mean())) / spread)
        if spread > 1e-6
        else None
    )


def looks_mirrored(source, target, turn, K):
    """Whether a turn shows the other way than it is told: turning left moves the scene to the right."""
    other = Motion({"turn left": "turn right", "turn right": "turn left"}[turn.kind], turn.amount)
    told, mirrored = turn_fit(source, target, turn, K), turn_fit(source, target, other, K)
    return told is not None and mirrored is not None and mirrored - told > MIRRORED


# ---- all of them ----------------------------------------------------------------------------------------------------


def rendered_folders(root):
    """Sorted folders below `root` that hold an actions.json. Raises ValueError if there is none."""
    folders = sorted(path.parent for path in Path(root).rglob("actions.json"))
    if not folders:
        raise ValueError(
            f"{root} holds no folder with an actions.json; extras/world2vlm/frames.py tells the layout."
        )
    return folders


def space_of(folders):
    """The Space (extras/world2vlm/transitions.py) that false claims are drawn from: the patterns of the folders' own programs, with
    the amounts that occur in them and how often. Broken folders are skipped: `read_rendered` names them."""
    often = {}
    for folder in folders:
        try:
            program, *_ = walked(folder, read_actions_file(folder))
        except ValueError:
            continue
        for amounts, motion in zip(
            often.setdefault(kinds_of(program), [Counter() for _ in program]), program
        ):
            amounts[motion.amount] += 1
    told = {
        kinds: tuple(zip(kinds, map(sorted, places))) for kinds, places in sorted(often.items())
    }
    return Space(
        {kinds[0]: sequence[0][1] for kinds, sequence in told.items() if len(kinds) == 1},
        tuple(sequence for kinds, sequence in told.items() if len(kinds) > 1),
        MARGIN,
        often,
    )


def in_pixels(detect):
    """lib/real_views.detector, which tells boxes in shares of the picture, as `image_detections` wants it."""

    def find(image):
        height, width = image.shape[:2]
        return [
            (label, tuple(np.asarray(box) * (width, height, width, height)), score)
            for label, box, score in detect(image, real_views.INDOOR)
        ]

    return find


def rendered_questions(folder, root, space, rng, detect=None):
    """All questions about one folder (lib/world2vlm.records) -> (records, what is wrong with it or None).

    detect    transition -> Detections, for folders without their own; None: these get A1 to A4 alone
    returns   records whose "images" are paths; "cluster" is the place, and an id begins with the way from `root`
    """
    try:
        transition = read_rendered(folder)._replace(name=Path(folder).relative_to(root).as_posix())
    except ValueError as error:
        return [], str(error)
    given = transition.detections
    rows = records(transition, rng, space, (lambda _: given) if given is not None else detect)
    return [
        row | {"images": list(transition.files[: len(row["images"])]), "cluster": transition.place}
        for row in rows
    ], None


def rendered_part(folder, out, root, space, detect=None):
    """`rendered_questions` of one folder, pictures by their way from `out` -> [(records, what is wrong or None)]."""
    rng = numpy_stream("motion questions", folder.relative_to(root).as_posix())
    rows, fault = rendered_questions(folder, root, space, rng, detect)
    return [
        (
            [
                row | {"images": [os.path.relpath(path, out) for path in row["images"]]}
                for row in rows
            ],
            fault and f"{folder}: {fault}",
        )
    ]


def make_rendered(out, root, detector=None, threads=2):
    """World2VLM's questions about frames that another program rendered (extras/world2vlm/frames.py), split by place.

    detector   folder or hub id of a GroundingDINO, for folders without boxes; None: those get A1 to A4 alone
    A folder that cannot be used is named; the rest goes on. Pictures stay where they are.
    """
    out, root = Path(out), Path(root)
    try:
        folders = rendered_folders(root)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        detect = detector and image_detections(in_pixels(real_views.detector(detector, device)))
    except ValueError as error:
        fail(error)
    part = partial(rendered_part, root=root, space=space_of(folders), detect=detect)
    if detector:  # a network stays in this process
        parts = [
            found
            for folder in tqdm(folders, desc="world2vlm, rendered")
            for found in part(folder, out)
        ]
    else:
        parts = build("world2vlm, rendered", part, folders, out, threads)
        say(
            "Without --detector only folders with boxes of their own are asked about objects (D1 to D4)."
        )
    rows, faults = (
        [row for part, _ in parts for row in part],
        [fault for _, fault in parts if fault],
    )
    for split in SPLITS:
        own = [row for row in rows if split_of("rendered", row["cluster"], {}) == split]
        wrong = write_motion_questions(
            out, split, own, f"{len({row['cluster'] for row in own})} places", split
        )
        if not own:
            say(
                f"  no place fell to {split}: few in a hundred do. Training and evaluation miss it: render more."
            )
        for reason, number in wrong.most_common():
            say(f"  {number:6}  left out: {reason}")
    say(
        "\n".join(
            [
                f"{len(faults)} of {len(folders)} folders cannot be used{':' if faults else '.'}",
                *faults,
            ]
        )
    )
    if mirrored := sum(THE_OTHER_WAY in fault for fault in faults):
        say(
            f"{mirrored} folders turn the other way than they say. Turns within longer programs and turns of more than "
            f"{WIDEST} degrees are not seen without steps: mend the sign where the frames were rendered."
        )
