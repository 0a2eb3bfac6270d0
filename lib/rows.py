"""Rows of data on disk, one JSON object a line, and the processes that make them."""

import json
import signal
from functools import partial
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from lib.common import disk, fail, write_text

SPLITS = ("train", "val", "test")


def load_jsonl(path):
    """Rows of a JSONL file as dicts, image paths made absolute; blank lines are skipped.

    Stops with a sentence on a missing file or bad line.
    """
    path, rows = Path(path), []
    if not path.exists():
        fail(
            f"{path} does not exist; `python data.py {path.name.split('_')[0]} --out {path.parent}` makes it"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 ({error}); delete the file and make it again")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            fail(f"{path}, line {number} is not JSON; delete the file and make it again")
        if not isinstance(row, dict):
            fail(f"{path}, line {number} is not a JSON object; delete the file and make it again")
        for key in ("context", "context_depth", "images", "target", "warp", "view"):
            if key in row:
                paths = row[key] if isinstance(row[key], list) else [row[key]]
                paths = [str(path.parent / p) for p in paths]
                row[key] = paths if isinstance(row[key], list) else paths[0]
        rows.append(row)
    return rows


def save_jsonl(path, rows):
    """Write all rows, or nothing."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def worker():
    """How a process of a pool begins: Ctrl-C is its parent's to see, and SIGTERM ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def build(title, make, seeds, out, threads):
    """Run `make(seed, out)` for every room (or group of rooms) on `threads` processes, in order -> all rows."""
    with disk(out), Pool(threads, worker) as pool:
        per_room = list(
            tqdm(
                pool.imap(partial(make, out=out), seeds, chunksize=8), total=len(seeds), desc=title
            )
        )
    return [row for rows in per_room for row in rows]
