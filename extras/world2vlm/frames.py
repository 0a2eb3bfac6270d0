"""
Transitions from frames that another program rendered (SVC, HY-WorldPlay, any simulator): a folder for each program.

  <root>/…/<name>/actions.json     {"program": [{"kind": "move forward", "amount": 1.5}, …],
                                    "frames": ["0.png", …, "15.png"],
                                    "place": "scene0000_00",
                                    "detections": {"0.png": [{"label": "chair", "box": [120, 80, 300, 260],
                                                              "confidence": 0.8, "track": 1}, …], "15.png": […]}}

  program      one to three actions of the six kinds, metres and degrees, on the grid of 0.1 m and 10 degrees. Moves in
               a row end at one place in any order, and so do turns: they are read as their sum, sideways first
  frames       pictures below the folder, in order: the source is the first, the target the last; default: those in the
               folder, by name, shorter names first, so that 10.png comes after 9.png
  place        what no two splits may share, such as a scan's name; default: the first picture itself, since the
               programs of an anchor begin with the same one
  detections   of the first and the last frame: box is left, top, right, bottom in pixels; confidence is 1 if it is not
               given. Boxes of one track show one object; without any, labels that occur once are tracked

All but "program" may be missing. Without detections a detector finds the boxes, or there are none, and only A1 to A4
are asked.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import build
from extras.scans.make import split_of
from extras.world2vlm.objects import TrackedBox, tracked_by_label
from extras.world2vlm.questions import differ, records, write_motion_questions
from extras.world2vlm.transitions import Transition, is_view, summed
from extras.world2vlm.words import ACTIONS, action_of, is_on_grid, motion_of
from lib import images
from lib.distributed import fail, say
from lib.geometry import Motion, move_camera, project, unproject
from lib.records import SPLITS
from lib.simulators import phrase
from lib.streams import numpy_stream

MARGIN = {"meters": 0.5, "degrees": 20}  # between the amounts of a program and of a false claim
THE_OTHER_WAY = "turns the other way"
MIRRORED = 0.1  # the mirrored turn fits better by this much correlation; of 720 true turns in rooms none does
WIDEST = 60  # degrees: frames further apart share too little to compare


# ---- one folder -----------------------------------------------------------------------------------------------------


def read_program(info: dict) -> list[Motion]:
    """The program of actions.json, `summed`. Raises ValueError, a sentence: an action that is not one of the six or off
    the grid, none, or too many."""
    program = [read_action(action) for action in info["program"]]
    if not 1 <= len(program) <= 3:
        raise ValueError(
            f"its program has {len(program)} actions; the questions are about one to three."
        )
    program = summed(program)
    if not program:
        raise ValueError("its actions undo each other.")
    for motion in program:
        if not is_on_grid(action_of(motion), abs(motion.amount)):
            raise ValueError(f"'{phrase(motion)}' is off the grid of 0.1 m and 10 degrees.")
    return program


def read_actions_file(folder: Path) -> dict:
    """actions.json as a dict. Raises ValueError."""
    try:
        info = json.loads((folder / "actions.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"actions.json cannot be read ({error}).") from None
    if not isinstance(info, dict) or not isinstance(info.get("program"), list):
        raise ValueError('actions.json has no "program", a list of actions.')
    names = info.get("frames") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('"frames" should be a list of file names.')
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"its frame {name} is not below the folder.")
    return info


def read_action(action) -> Motion:
    """{"kind", "amount"} -> Motion. Raises ValueError."""
    action = action if isinstance(action, dict) else {}
    kind, amount = action.get("kind"), action.get("amount")
    if kind not in ACTIONS:
        raise ValueError(f"there is no action {kind!r}; the six are: {', '.join(ACTIONS)}.")
    if not isinstance(amount, (int, float)) or not 0 < amount < 1e6:
        raise ValueError(
            f"the amount of '{kind}' is {amount!r:.40} and should be a number above 0, below a million."
        )
    return motion_of(kind, round(float(amount), 6))


def names_of_pictures(folder: Path) -> list[str]:
    """Names of a folder's pictures in their order; 10.png comes after 9.png."""
    suffixes = (".png", ".jpg", ".jpeg")
    names = [path.name for path in folder.iterdir() if path.suffix.lower() in suffixes]
    return sorted(names, key=lambda name: (len(name), name))


def read_rendered(folder: Path) -> Transition:
    """One folder -> Transition, with its "files", "place" and, if given, detections.

    Raises ValueError, a sentence, where it cannot be used: what `read_program` says, a frame that is missing, truncated
    or of another size, a turn that shows the other way.
    """
    info = read_actions_file(folder)
    program = read_program(info)
    names = info.get("frames") or names_of_pictures(folder)
    if len(names) < 2:
        raise ValueError("no frame after the first exists.")
    first, last = folder / names[0], folder / names[-1]
    source = images.read(first)
    target = images.read(last)
    if target.shape != source.shape:
        (height, width), (last_height, last_width) = source.shape[:2], target.shape[:2]
        raise ValueError(
            f"{last.name} has {last_width} x {last_height} pixels and the first frame {width} x {height}."
        )
    if not is_view(target, source):
        raise ValueError(f"{last.name} shows one flat colour.")
    if looks_mirrored(source, target, program):
        raise ValueError(
            f"the picture {THE_OTHER_WAY} than '{phrase(program[0])}' says, as if left were right."
        )
    detections = info.get("detections") or None
    return Transition(
        folder.name,
        source,
        target,
        program,
        files=(first, last),
        place=str(info.get("place") or sha256(first.read_bytes()).hexdigest()[:16]),
        detections=detections and read_detections(detections, first.name, last.name),
    )


def read_detections(by_frame: dict, first: str, last: str) -> tuple[list, list]:
    """{frame: rows} -> (TrackedBoxes of the first frame, of the last). Raises ValueError."""
    if not isinstance(by_frame, dict) or not {first, last} <= by_frame.keys():
        raise ValueError(f'"detections" should have those of {first} and of {last}, be they none.')
    pair = ([], [])
    try:
        for detections, name in zip(pair, (first, last), strict=True):
            for row in by_frame[name]:
                box = tuple(map(float, row["box"]))
                score = float(row.get("confidence", 1))
                detections.append(TrackedBox(str(row["label"]), box, score, row.get("track")))
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"a detection has no label and no box of four numbers ({error})."
        ) from None
    both = [*pair[0], *pair[1]]
    if any(len(detection.box) != 4 for detection in both):
        raise ValueError("the box of a detection should be four numbers: left, top, right, bottom.")
    is_tracked = any(detection.track is not None for detection in both)
    return pair if is_tracked else tracked_by_label(pair)


# ---- mirrored turns -------------------------------------------------------------------------------------------------


def turn_fit(source: np.ndarray, target: np.ndarray, turn: Motion) -> float:
    """Correlation of a picture with what a turn of the camera makes of another, where both see the same.

    A mere turn moves every pixel alike, whatever its depth. nan if they share less than a tenth of the picture. They
    are taken to be 90 degrees wide, as SVC renders, and level, as World2VLM has its cameras; others lie further off,
    on the same side.
    """
    height, width = target.shape[:2]
    K = np.array([[width / 2, 0, width / 2], [0, width / 2, height / 2], [0, 0, 1]])
    points = unproject(np.ones((height, width)), K, move_camera(np.eye(4), turn))  # any depth
    pixels, z = project(points, K, np.eye(4))
    column, row = np.moveaxis(np.floor(pixels).astype(int), -1, 0)
    inside = (z > 1e-6) & (column >= 0) & (row >= 0) & (column < width) & (row < height)
    if inside.mean() < 0.1:
        return np.nan
    before, after = source[row[inside], column[inside]].ravel(), target[inside].ravel()
    if min(before.std(), after.std()) < 1e-3:
        return np.nan
    return float(np.corrcoef(before, after)[0, 1])


def looks_mirrored(source, target, program) -> bool:
    """Whether a mere turn shows the other way than it is told: turning left moves the scene to the right."""
    turn = program[0]
    if len(program) > 1 or turn.kind != "dangle" or abs(turn.amount) > WIDEST:
        return False
    mirrored = Motion("dangle", -turn.amount)
    fit, mirrored_fit = (turn_fit(source, target, motion) for motion in (turn, mirrored))
    return mirrored_fit - fit > MIRRORED  # never where one is nan


# ---- all of them ----------------------------------------------------------------------------------------------------


def rendered_folders(root: Path) -> list[Path]:
    """Sorted folders below `root` that hold an actions.json. Ends the program with a sentence if there is none."""
    folders = sorted(path.parent for path in Path(root).rglob("actions.json"))
    if not folders:
        fail(
            f"{root} holds no folder with an actions.json; extras/world2vlm/frames.py tells the layout."
        )
    return folders


def claims_of(folders: list[Path]) -> dict:
    """{folder: (another folder's program, "other")}: the false claims that A4 may make.

    The programs of as many actions change their places, so false claims say each thing as often as true ones. A claim
    that a picture hardly tells from the program is left out. So are broken folders: `read_rendered` names them.
    """
    by_length, claims = {2: {}, 3: {}}, {}
    for folder in folders:
        try:
            program = read_program(read_actions_file(folder))
        except ValueError:
            continue
        if len(program) > 1:
            by_length[len(program)][folder] = program
    for length, programs in by_length.items():
        others = list(programs.values())
        order = numpy_stream("motion questions", "claims", length).permutation(len(others))
        for (folder, program), index in zip(programs.items(), order, strict=True):
            if differ(program, others[index], MARGIN):
                claims[folder] = (others[index], "other")
    return claims


def rendered_records(
    folder: Path, out: Path, root: Path, claims: dict, detect: Callable | None
) -> list[tuple[list[dict], str | None]]:
    """All questions about one folder -> [(records, what is wrong with it or None)].

    detect    transition -> TrackedBoxes, for folders without their own; None: these get A1 to A4 alone
    Pictures stay where they are: "images" are their ways from `out`. "cluster" is the place.
    """
    name = folder.relative_to(root).as_posix()
    try:
        transition = read_rendered(folder)._replace(name=name)
    except ValueError as error:
        return [([], f"{folder}: {error}")]
    paths = [os.path.relpath(path, out) for path in transition.files]
    if transition.detections:
        detect = Transition.detections.__get__
    rows = records(transition, numpy_stream("motion questions", name), claims.get(folder), detect)
    for row in rows:
        row |= {"images": paths[: len(row["images"])], "cluster": transition.place}
    return [(rows, None)]


def make_rendered(out, root, detect: Callable | None = None, threads=2) -> None:
    """World2VLM's questions about frames that another program rendered, split by place.

    detect   finds the boxes of folders without their own (objects.load_detector); None: those get A1 to A4 alone
    A folder that cannot be used is named; the rest goes on. Pictures stay where they are.
    """
    out, root = Path(out), Path(root)
    folders, title = rendered_folders(root), "world2vlm, rendered"
    make = partial(rendered_records, root=root, claims=claims_of(folders), detect=detect)
    if detect:  # a network stays in this process
        reports = [make(folder, out)[0] for folder in tqdm(folders, desc=title)]
    else:
        reports = build(title, make, folders, out, threads)
        say(
            "Without --detector only folders with boxes of their own are asked about objects (D1 to D4)."
        )
    rows = [row for rows, _ in reports for row in rows]
    faults = [fault for _, fault in reports if fault]
    for split in SPLITS:
        own = [row for row in rows if split_of("rendered", row["cluster"], {}) == split]
        places = {row["cluster"] for row in own}
        write_motion_questions(out, split, own, f"{len(places)} places", split)
        if not own:
            say(
                f"  no place fell to {split}: few in a hundred do. Training and evaluation miss it: render more."
            )
    say(f"{len(faults)} of {len(folders)} folders cannot be used{':' if faults else '.'}", *faults)
    mirrored = sum(THE_OTHER_WAY in fault for fault in faults)
    if mirrored:
        say(
            f"{mirrored} folders turn the other way than they say. Turns within longer programs and turns of more than "
            f"{WIDEST} degrees are not seen: mend the sign where the frames were rendered."
        )
