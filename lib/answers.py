"""
The answers of an evaluation on disk: a policy's in predictions.jsonl, a simulator's as views of triples.

Every answer of a policy is a line, written batch by batch, so that a killed run loses one batch and goes on, with however
many processes (torchrun): all of them add to the one file. A line says which policy, settings and simulator it is of
(`evaluate.Condition`): those of others stay and are not counted. A question that could not be asked, or not with all its
images, has a line too and counts; the next run asks it again (`failure`). Imagined views are files in views/, named
after what they show, and a line names its own.
"""

import functools
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib.distributed import fail, is_main
from lib.geometry import (
    DEGREES_PER_METER,
    Array,
    Motion,
    Query,
    decompose,
    move_camera,
)
from lib.images import PictureError, read, read_warp, save_image
from lib.records import TRIPLE_KEYS, Triple, check_triple, disk, load_jsonl, read_log
from lib.rooms import random_room, render
from lib.simulators import SimulatorError, instruction
from lib.streams import stable_hash, stream_seed

VERSION = 6  # of what a line holds; lines of another one stay as well
LARGE = 128  # pixels: from here on a view is a JPEG


class Prediction(TypedDict):
    """One line of predictions.jsonl: a question, what the policy did about it, and the verdict."""

    key: str  # of `with_keys`
    digest: int  # of `digest`
    bench: str
    kind: str  # "mca" multiple choice, "na" numeric
    category: str
    groups: list[str]  # of the bench's tables
    needs_view: bool | None
    scene: str | int  # room, video or question: what an interval draws as a whole
    gold: str | None
    # the dialogue
    mode: str
    simulator: str
    said: str | None  # between <answer> and </answer>
    turns: list[str]  # of the policy
    replies: list  # of the protocol: (text, number of the image shown or None)
    calls: list[dict]
    views: list[str]  # file of every imagined view
    valid_calls: int
    invalid_calls: int
    unreadable: int  # turns that were neither a call nor an answer
    truncated: bool
    well_formed: bool
    seconds: float  # of its batch, shared equally
    cost: dict  # of scores.cost_of
    # the verdict
    answer: str | float | None  # what the bench's rule reads
    correct: float
    lenient: float  # by a forgiving rule
    error: str | None  # why it could not be asked
    missing_images: int
    diagnosis: dict | None  # of extras/report/diagnosis.py
    # the settings of its `evaluate.Condition`
    version: int
    policy: str
    seed: int
    max_new_tokens: int
    frames: int | None
    weights: str  # of the simulator


def with_keys(questions: list[dict]) -> list[tuple[str, dict]]:
    """[(key, question)]: the key is the id, and "id#2" for the second question that carries it."""
    count = Counter()
    pairs = []
    for question in questions:
        name = question["id"]
        count[name] += 1
        key = name if count[name] == 1 else f"{name}#{count[name]}"
        pairs.append((key, question))
    return pairs


def digest(question: dict) -> int:
    """A number that changes with the words of a question: an old answer to other words is no answer."""
    return stable_hash(question["question"], question.get("options"), question["answer"])


def failure(row: dict) -> float:
    """0 of an answer for good, else how bad: the number of images that were missing, infinite if it was not asked."""
    return math.inf if row.get("error") else row.get("missing_images") or 0


# ---- predictions.jsonl ----------------------------------------------------------------------------------------------


def append_predictions(out: Path, rows: list[Prediction]) -> None:
    """Add lines, behind an empty one: a kill may have cut off the last."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n" + "".join(json.dumps(row) + "\n" for row in rows)
    file = out / "predictions.jsonl"
    with disk(file), open(file, "ab") as lines:  # in one piece, whatever other processes add
        lines.write(text.encode())


def load_predictions(out: Path, settings: dict, questions: list[dict]) -> dict[str, Prediction]:
    """{key: prediction} of the questions that were asked with these settings, failures among them.

    The first answer to a question counts. A failure gives way to an answer, and to a later failure that is no worse.
    """
    digests = {key: digest(question) for key, question in with_keys(questions)}
    predictions = {}
    for row in read_log(out / "predictions.jsonl"):
        if settings.items() <= row.items() and digests.get(row.get("key")) == row.get("digest"):
            before = failure(predictions.setdefault(row["key"], row))
            if before and failure(row) <= before:
                predictions[row["key"]] = row
    return predictions


def save_views(out: Path, views: list[np.ndarray]) -> list[str]:
    """Arrays (H, W, 3) uint8 -> their files below `out`, as text; a view that is there is not written again."""
    files = []
    for view in views:
        content = np.ascontiguousarray(view).tobytes() + str(view.shape).encode()
        name = hashlib.sha256(content).hexdigest()[:16]
        files.append(f"views/{name}.{'jpg' if max(view.shape) >= LARGE else 'png'}")
        if not (out / files[-1]).exists():
            save_image(out / files[-1], view)
    return files


# ---- views of triples -----------------------------------------------------------------------------------------------


def load_triples(path: str | Path, limit: int | None = None) -> list[dict]:
    """Rows of triples_*.jsonl with context, target and warp as arrays; files are read once.

    The depth of the context, which rows of scans have, stays in its files.
    """
    rows = load_jsonl(path, Triple, check_triple, TRIPLE_KEYS)[:limit]
    read_once = functools.cache(read)
    try:
        for row in rows:
            row["context"] = [read_once(file) for file in row["context"]]
            row["target"] = read_once(row["target"])
            row["warp"] = read_warp(row["warp"])
    except PictureError as error:
        fail(
            f"A picture of {path} cannot be read ({error}). Remove {path} and make it again: "
            f"`python data.py triples`, of scans with --dataset NAME --root DIR."
        )
    return rows


def view_file(folder: Path, row: dict) -> Path:
    """Where the view for a triple is kept: a name that changes with what a simulator is shown and told of it."""
    pictures = [hashlib.sha256(image.tobytes()).hexdigest() for image in row["context"]]
    shown_hash = stable_hash(pictures, row["provenance"])
    return folder / f"{row['id'].replace('/', '_')}_{shown_hash:016x}.png"


def query_of(row: dict) -> Query:
    """What a simulator is asked for a triple."""
    sentence = instruction(Motion(**row["motion"]))
    scene = None
    if "room" in row:
        scene = {"room": row["room"], "poses": row["context_c2w"]}
    noise = stream_seed("imagine", row["id"])
    return Query(row["context"], row["reference"], sentence, noise, scene, row["provenance"])


def imagine_targets(
    simulator, rows: list[dict], folder: str | Path, batch: int = 64, title: str = "imagine"
) -> list[Array]:
    """The view that the simulator gives for every triple; kept in `folder` so that a killed run continues.

    simulator   None, if all views lie there
    Raises SimulatorError if a server fails, once the views that it gave are kept.
    """
    views = []
    for start in tqdm(range(0, len(rows), batch), desc=title, unit="batch", disable=not is_main()):
        views += imagine_batch(simulator, rows[start : start + batch], Path(folder))
    return views


def imagine_batch(simulator, rows: list[dict], folder: Path) -> list[Array]:
    """`imagine_targets` of rows that are imagined together, but for those whose views lie in the folder."""
    files = [view_file(folder, row) for row in rows]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    failure = None
    try:
        fresh = simulator.imagine([query_of(rows[i]) for i in missing]) if missing else []
    except SimulatorError as error:
        failure = error
        fresh = error.results
    for i, view in zip(missing, fresh, strict=failure is None):  # an error may bring no results
        if not isinstance(view, SimulatorError):
            save_image(files[i], view)
    if failure:
        raise failure
    views = []
    for row, file in zip(rows, files, strict=True):
        view = read(file)
        shape = row["context"][row["reference"] - 1].shape  # the target's shape as well
        if view.shape != shape:
            view = np.asarray(Image.fromarray(view).resize(shape[1::-1], Image.BICUBIC))
        views.append(view)
    return views


def trivial_views(rows: list[dict]) -> dict[str, list[Array]]:
    """What needs no model, {name: views}: copy of the reference, mean of the context, nearest context view by pose."""
    copies, means, nearest = [], [], []
    for row in rows:
        poses = np.array(row["context_c2w"])
        target = move_camera(poses[row["reference"] - 1], Motion(**row["motion"]))
        gaps = np.abs(decompose(poses, target)[:, :5])  # (views, 5)
        gaps[:, 3:] /= DEGREES_PER_METER
        copies.append(row["context"][row["reference"] - 1])
        means.append(np.mean(row["context"], 0).astype(np.uint8))
        nearest.append(row["context"][int(gaps.sum(1).argmin())])
    return {"copy of the reference": copies, "mean image": means, "nearest context view": nearest}


def true_renders(rows: list[dict]) -> list[Array]:
    """What only the room itself can give: its picture from the target's camera."""
    views = []
    for row in rows:
        room = random_room(row["room"])
        views.append(render(room, row["target_c2w"], len(row["target"]))["rgb"][0])
    return views
