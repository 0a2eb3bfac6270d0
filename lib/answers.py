"""
Answers: which option one names, and predictions.jsonl, which keeps all of them.

Every answer is a line, written batch by batch, so that a killed run loses one batch and goes on. Alone, a process
writes the file itself; of several (torchrun), each writes predictions_rank<k>.jsonl beside it, and
`gather_predictions` brings them together, at the end and at the beginning of the next run, with however many processes.
A line says which policy, settings and simulator it is of (SETTINGS): those of others stay and are not counted. A
question that could not be asked, or not with all its images, has a line too and counts; the next run asks it again
(`failure`). Imagined views are files in views/, named after what they show, and a line names its own.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import TypedDict

import numpy as np

from lib.distributed import World
from lib.images import save_image
from lib.records import disk, read_log, write_text
from lib.streams import stable_hash

VERSION = 4  # of what a line holds; lines of another one stay as well
SETTINGS = ("version", "policy", "seed", "max_new_tokens", "frames", "mode", "weights")
NO_FAILURE = (False, 0)  # the `failure` of an answer for good
LARGE = 128  # pixels: from here on a view is a JPEG


def option_letter(text: str, options: list[str]) -> str | None:
    """The letter of the option that an answer names, or None: "B", "b", "B.", "B. red box" or its words, "red box".

    options   each "B. red box"; one without ". " has no letter: it is named by all its text, which is what comes back
    """
    for option in options:
        letter, _, words = option.partition(". ")
        if text.strip().lower() == (words or option).lower():
            return letter
    match = re.fullmatch(r"\s*([A-Za-z])(?:[.)].*)?\s*", text, re.DOTALL)
    return match[1].upper() if match else None


class Prediction(TypedDict):
    """One line of predictions.jsonl: a question, what the policy did about it, and the verdict."""

    key: str  # of `with_keys`
    digest: int  # of `digest`
    bench: str
    kind: str  # "mca" multiple choice, "na" numeric
    category: str
    groups: list[str]  # of the bench's tables
    error_group: str | None  # MMSI-Video: which kind of failure a wrong answer is
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
    # the run (SETTINGS)
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


def failure(row: dict) -> tuple[bool, int]:
    """(could it not be asked?, how many images were missing); above NO_FAILURE it is not an answer for good."""
    return bool(row.get("error")), row.get("missing_images") or 0


# ---- predictions.jsonl ----------------------------------------------------------------------------------------------


def rows_of_file(file: Path) -> list[dict]:
    """The rows of a file; a line that was cut off by a kill, or is no object, is left out."""
    return [row for row in read_log(file) if isinstance(row, dict)]


def append_predictions(out: Path, world: World, rows: list[Prediction]) -> None:
    """Add lines to this process's file."""
    name = "predictions.jsonl" if world.size == 1 else f"predictions_rank{world.rank}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    with disk(out / name), open(out / name, "a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def gather_predictions(out: Path) -> None:
    """Bring all lines into predictions.jsonl, on one rank while no other writes: the first answer to a question counts.

    A failure gives way to an answer, and to a later failure that is no worse.
    """
    files_of_ranks = sorted(out.glob("predictions_rank*.jsonl"))
    lines = {}
    for file in [out / "predictions.jsonl", *files_of_ranks]:
        for row in rows_of_file(file):
            identity = tuple(row.get(key) for key in (*SETTINGS, "key", "digest"))
            before = failure(lines.setdefault(identity, row))
            if before > NO_FAILURE and failure(row) <= before:
                lines[identity] = row
    text = "".join(json.dumps(row) + "\n" for row in lines.values())
    write_text(out / "predictions.jsonl", text)
    for file in files_of_ranks:
        file.unlink()


def load_predictions(out: Path, settings: dict, questions: list[dict]) -> dict[str, Prediction]:
    """{key: prediction} of the questions that were asked with these SETTINGS, failures among them."""
    digests = {key: digest(question) for key, question in with_keys(questions)}
    predictions = {}
    for row in rows_of_file(out / "predictions.jsonl"):
        if settings.items() <= row.items() and digests.get(row["key"]) == row["digest"]:
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
