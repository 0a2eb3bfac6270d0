"""
predictions.jsonl: every answer is a line, written batch by batch, so that a killed run loses one batch and goes on.

Alone, a process writes the file itself; of several (torchrun), each writes predictions_rank<k>.jsonl beside it, and
`gather` brings them together, at the end and at the beginning of the next run, with however many processes. A line
tells which policy, settings and simulator it is of (RUN): those of others stay and are not counted. A question that
could not be asked, or not with all its images, has a line too and counts; the next run asks it again (`failure`).
Imagined views are files in views/, named after what they show, and a line names its own.
"""

import hashlib
import json
from collections import Counter

import numpy as np

from lib import common
from lib.images import save_image
from lib.streams import stable_hash

VERSION = 4  # of what a line holds; lines of another one stay as well
RUN = ("version", "policy", "seed", "max_new_tokens", "frames")
WHOLE = (False, 0)  # the `failure` of an answer
LARGE = 128  # pixels: from here on a view is a JPEG


def keyed(questions):
    """[(key, question)]: the key is the id, and "id#2" for the second question that carries it."""
    seen, pairs = Counter(), []
    for question in questions:
        seen[question["id"]] += 1
        number = seen[question["id"]]
        pairs.append((question["id"] if number == 1 else f"{question['id']}#{number}", question))
    return pairs


def digest(question):
    """A number that changes with the words of a question: an old answer to other words is no answer."""
    return stable_hash(question["question"], question.get("options"), question["answer"])


def failure(row):
    """(could it not be asked?, how many images were missing) of a line; above WHOLE it is not an answer for good."""
    return bool(row.get("error")), row.get("missing_images") or 0


def lines_of(file):
    """The rows of a file; a line that was cut off by a kill, or is no object, is left out."""
    return [row for row in common.read_log(file) if isinstance(row, dict)]


def append(out, world, rows):
    """Add lines to this process's file."""
    file = out / ("predictions.jsonl" if world.size == 1 else f"predictions_rank{world.rank}.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    with common.disk(file), open(file, "a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def gather(out):
    """Bring all lines into predictions.jsonl, on one rank while no other writes: the first answer to a question counts.

    A failure gives way to an answer, and to a later failure that is no worse.
    """
    parts, lines = sorted(out.glob("predictions_rank*.jsonl")), {}
    for row in (row for file in [out / "predictions.jsonl", *parts] for row in lines_of(file)):
        place = tuple(row.get(key) for key in (*RUN, "mode", "weights", "key", "digest"))
        before = failure(lines.setdefault(place, row))
        if before > WHOLE and failure(row) <= before:
            lines[place] = row
    common.write_text(
        out / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in lines.values())
    )
    for file in parts:
        file.unlink()


def told(out, run, mode, weights, questions):
    """{key: record} of the questions that this run has asked in this mode, with the simulator of these `weights`."""
    wanted = {key: digest(question) for key, question in keyed(questions)}
    own = {**run, "mode": mode, "weights": weights}
    return {
        row["key"]: row
        for row in lines_of(out / "predictions.jsonl")
        if own.items() <= row.items() and wanted.get(row["key"]) == row["digest"]
    }


def answered(*run):
    """What `told` gives, without the failures: these need not be asked again."""
    return {key: row for key, row in told(*run).items() if failure(row) == WHOLE}


def save_views(out, views):
    """Arrays (H, W, 3) uint8 -> their files below `out`, as text; a view that is there is not written again."""
    places = []
    for view in views:
        name = hashlib.sha256(
            np.ascontiguousarray(view).tobytes() + str(view.shape).encode()
        ).hexdigest()[:16]
        places.append(f"views/{name}.{'jpg' if max(view.shape) >= LARGE else 'png'}")
        if not (out / places[-1]).exists():
            save_image(out / places[-1], view)
    return places
