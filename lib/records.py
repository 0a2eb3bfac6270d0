"""Rows of data on disk, one JSON object a line: what a `Triple` and a `Question` hold, and the processes that make them."""

import json
import signal
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import NotRequired, TypedDict

from tqdm import tqdm

from lib.stage import disk, fail, write_text

SPLITS = ("train", "val", "test")
PICTURES = ("context", "context_depth", "images", "target", "warp", "view")  # keys that hold paths


class Triple(TypedDict):
    """Context views, a motion in words, and the view from there. Pictures are paths relative to the row's file."""

    id: str
    scene: str  # "room_17", or "<dataset>/<scan>"
    context: list[str]
    reference: int  # 1-based number of the context view that the motion starts from
    motion: dict  # {"kind", "amount"} of geometry.Motion
    instruction: str  # the sentence that conditions the simulator
    target: str
    warp: str  # RGBA: the context warped into the target view, alpha 255 where some context view sees it
    coverage: float  # share of the target that the context sees
    context_c2w: list  # a 4 x 4 list per view
    target_c2w: list
    room: NotRequired[int]  # seed of the room
    metric: NotRequired[bool]  # scans: lengths are metres
    context_depth: NotRequired[list[str]]  # scans: 16-bit PNG, thousandths of the unit of the poses
    context_intrinsics: NotRequired[list]  # scans: a 3 x 3 list per view


class Question(TypedDict):
    """A question over several views. Only `images`, `question` and `options` are ever shown to a policy."""

    id: str
    bench: str  # "rooms", "mindcube", ...: whose rules judge the answer
    images: list[str]
    question: str
    options: list[str]  # ["A. red", ...]; empty where the answer is free
    answer: str  # gold: a letter, or the free answer
    category: str
    kind: str  # "mca" multiple choice, "na" numeric
    needs_view: bool | None  # does the answer need a view that is not given? None: nobody knows
    scene: NotRequired[dict]  # rooms: {"room": seed, "poses": a 4 x 4 list per image}
    # what only a room can know: for the cold start and for diagnosis
    ask: NotRequired[str | None]  # which fact is asked for, a key of questions.ASKS
    shown_by: NotRequired[int | None]  # number of the given view that answers
    motion: NotRequired[
        dict | None
    ]  # the command in the question's words: {"image", "kind", "amount"}
    command: NotRequired[dict]  # the call that shows what is asked
    view: NotRequired[str]  # the true view it leads to
    shows: NotRequired[list[dict]]  # the facts of every image, and last of that view


def load_jsonl(path: str | Path) -> list[dict]:
    """Rows of a JSONL file, paths of pictures made absolute; blank lines are skipped.

    Stops with a sentence on a missing file or bad line.
    """
    path = Path(path)
    if not path.exists():
        fail(
            f"{path} does not exist; `python data.py {path.name.split('_')[0]} --out {path.parent}` makes it"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 ({error}); delete the file and make it again")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            fail(f"{path}, line {number} is not JSON; delete the file and make it again")
        if not isinstance(row, dict):
            fail(f"{path}, line {number} is not a JSON object; delete the file and make it again")
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


def worker() -> None:
    """How a process of a pool begins: Ctrl-C is its parent's to see, and SIGTERM ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build(title: str, make: Callable, seeds: Iterable, out: Path, threads: int) -> list:
    """Run `make(seed, out)` for every room (or group of rooms) on `threads` processes, in order -> all rows."""
    seeds, rows = list(seeds), []
    with disk(out), Pool(threads, worker) as pool:
        made = pool.imap(partial(make, out=out), seeds, chunksize=8)
        for part in tqdm(made, total=len(seeds), desc=title):
            rows += part
    return rows
