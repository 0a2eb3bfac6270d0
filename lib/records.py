"""
Files: whole or not there, the metric log, and rows of data, one JSON object a line (`Triple`, `Question`).

A file is written beside its place and renamed when complete, so a killed run never leaves half of one there.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError

from lib.distributed import fail, is_main, without_keys
from lib.geometry import Motion
from lib.protocol import TOOL_NAME, parse_object, read_call

SPLITS = ("train", "val", "test")
PICTURES = ("context", "context_depth", "images", "target", "warp", "views")  # keys that hold paths


# ---- whole files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """`with whole_file(path) as beside:` write `beside`, and it is renamed to `path`; of a failure nothing is left.

    Folders above it are made.
    """
    path = Path(path)
    beside = path.with_name(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def sync(path: str | Path) -> None:
    """Bring a file, or the names in a folder, onto the disk: of a rename alone a power loss may leave an empty file."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot do it for folders
            raise
    os.close(number)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, without the keys of servers."""
    with whole_file(path) as beside:
        beside.write_text(without_keys(text), encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def disk(path: str | Path) -> Iterator[None]:
    """Turn a full disk, and every other error of the system that names a file, into a sentence.

    safetensors reports a full disk as its own error, so there the text counts, not the number.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            fail(
                f"The disk is full: {path} could not be written. What was saved before is untouched; free some space "
                f"and run the same command again, it continues."
            )
        names = (getattr(error, "filename2", None), getattr(error, "filename", None))
        if any(names) or number in (errno.EIO, errno.EFBIG):
            fail(f"{names[0] or names[1] or path}: {error.strerror}. Name another file or folder.")
        raise


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """`with whole_folder(out) as part: model.save(part)`: the files appear in `folder` when all are complete.

    On rank 0, which writes; the others only learn the name, so that a save may gather tensors from them.
    """
    folder = Path(folder)
    part = folder / ".partial"
    if not is_main():
        yield part
        return
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk(folder):
            part.mkdir(parents=True)
            yield part
            for file in sorted(part.iterdir()):
                sync(file)
                os.replace(file, folder / file.name)
            sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- the metric log --------------------------------------------------------------------------------------------------------


class MetricLog:
    """`log.jsonl`: one JSON line per step, {"step": 12, "reward": 0.8, ...}. A resumed run writes its steps anew.

    path   the file; lines of `resume_step` and later, and a line cut off by a kill, are dropped when it is opened
    """

    def __init__(self, path: str | Path, resume_step: int = 0):
        self.path = Path(path)
        if is_main():
            rows = [row for row in read_log(self.path) if row["step"] < resume_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, step: int, **metrics) -> None:
        """Append one line; numbers keep six digits, and what is not a finite number becomes null."""
        if not is_main():
            return
        row = {"step": step, **readable(metrics)}
        with disk(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: str | Path) -> list[dict]:
    """The rows of a `log.jsonl`, oldest first; a last line cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_text(errors="replace").split("\n") if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(parse_object(line))
    return rows


def readable(value):
    """A number as a log shows it: six digits, None for nan and infinity; dicts part by part, anything else as it is."""
    if isinstance(value, dict):
        return {key: readable(part) for key, part in value.items()}
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


# ---- what a row holds ------------------------------------------------------------------------------------------------------


class Triple(TypedDict):
    """Context views, a motion in words, and the view from there. Pictures are paths relative to the row's file."""

    id: str
    scene: str  # "room_17", or "<dataset>/<scan>"
    context: list[str]
    reference: int  # 1-based number of the context view that the motion starts from
    motion: dict  # {"kind", "amount"} of geometry.Motion
    instruction: str  # the motion in words, for people: a simulator is told `motion`, worded anew
    target: str
    warp: str  # RGBA: the context warped into the target view, alpha 255 where some context view sees it
    coverage: float  # share of the target that the context sees
    context_c2w: list[list[list[float]]]  # a 4 x 4 list per view
    target_c2w: list[list[float]]
    room: NotRequired[int]  # seed of the room
    provenance: NotRequired[list]  # of `Query`: the calls that led to imagined context views
    metric: NotRequired[bool]  # scans: lengths are metres
    context_depth: NotRequired[list[str]]  # scans: 16-bit PNG, thousandths of the unit of the poses
    context_intrinsics: NotRequired[list[list[list[float]]]]  # scans: a 3 x 3 list per view


class Question(TypedDict):
    """A question over several views. A policy sees `images`, `question` and `options`; from `ask` on only rooms know."""

    id: str
    bench: str  # "rooms", "mindcube", ...: whose rules judge the answer
    images: list[str]
    question: str
    options: list[str]  # ["A. red", ...]; empty where the answer is free
    answer: str | int | float | None  # gold: a letter, or the free answer; None: nobody knows
    category: str
    kind: str  # "mca" multiple choice, "na" numeric
    needs_view: bool | None  # does the answer need a view that is not given? None: nobody knows
    scene: NotRequired[dict]  # rooms: {"room": seed, "poses": a 4 x 4 list per image}
    ask: NotRequired[str]  # which fact is asked for, a key of questions.ASKS
    named: NotRequired[str | None]  # colour of the object that one turns by,
    relation: NotRequired[str | None]  # and where it is to be then, a key of questions.RELATIONS
    shown_by: NotRequired[int | None]  # number of the given view that answers
    ideal: NotRequired[list[dict]]  # the calls that lead there, the second one from Image-5
    views: NotRequired[list[str]]  # the true view of each ideal call
    shows: NotRequired[list[dict]]  # facts (lib/questions) of every image, then of these views


TRIPLE_KEYS = ("id", "context", "reference", "motion", "target", "warp")  # whatever it is for

# ---- rows -----------------------------------------------------------------------------------------------------------------

OF_OTHERS = {  # {how a file's name begins: what makes it of others' data}
    "triples": ", `python data.py triples --dataset NAME --root DIR` of scans",
    "questions": ", `python -m extras.scans.corpora` and extras.scans.mining of a corpus",
}


def check_triple(row: dict) -> None:
    """Raises ValueError, the rest of a sentence, where the parts of a `Triple` do not go together."""
    context, reference = row["context"], row["reference"]
    if not 1 <= reference <= len(context):
        raise ValueError(f"has the reference {reference} of {len(context)} context views")
    for key, shape in (("context_c2w", (len(context), 4, 4)), ("target_c2w", (4, 4))):
        if key in row and np.shape(row[key]) != shape:
            raise ValueError(f"has {key} of another shape than {shape}")
    try:
        Motion(**row["motion"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"has the motion {row['motion']} ({error})") from None
    provenance = row.setdefault("provenance", [None] * len(context))
    if len(provenance) != len(context):
        raise ValueError(f"has {len(provenance)} calls for {len(context)} context views")
    for k, call in enumerate(provenance):
        if call is None and any(provenance[:k]):
            raise ValueError("has a given context view after an imagined one")
        if call is None:
            continue
        turn = read_call(json.dumps({"name": TOOL_NAME, "arguments": call}))
        if turn.error or not 1 <= turn.call["reference_image"] <= k:  # of an image before it
            raise ValueError(f"has the call {call} ({turn.error or 'of no earlier image'})")
        provenance[k] = turn.call


def load_jsonl(
    path: str | Path,
    kind: type | None = None,
    check: Callable | None = None,
    needed: Iterable[str] = (),
) -> list:
    """Rows of a JSONL file, paths of pictures seen from here; blank lines are skipped. Exits on a missing file or bad line.

    kind    `Triple` or `Question`: values must be of its kinds
    check   may mend a row; raises ValueError for what else is wrong
    needed  keys that every row must have
    """
    path = Path(path)
    if not path.exists():
        name = path.name.split("_")[0]
        fail(
            f"{path} does not exist; `python data.py {name} --out {path.parent}` makes it of rooms{OF_OTHERS.get(name, '')}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 ({error}); delete the file and make it again")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_object(line, kind)
            lacking = [key for key in needed if key not in row]
            if lacking:
                raise ValueError(f"has no {' and no '.join(lacking)}")
            if check:
                check(row)
        except (ValueError, TypeError) as error:
            fail(f"{path}, line {number} {error}; mend it, or delete the file and make it again")
        for key in PICTURES:
            if isinstance(row.get(key), list):
                row[key] = [str(path.parent / part) for part in row[key]]
            elif key in row:
                row[key] = str(path.parent / row[key])
        rows.append(row)
    return rows


def save_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write all rows, or nothing."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
