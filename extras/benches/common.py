"""
The published benchmarks by name: questions, official verdicts, prompts, groups and averages.

  mindcube     a letter; accuracy per setting                       extras/benches/mindcube.py
  mmsi         a letter; accuracy over 11 types in 4 groups         extras/benches/mmsi.py
  mmsi_video   a letter; 13 types, 4 levels, 4 sub-benches          extras/benches/mmsi_video.py
  sat          the words of an option; both orders of the options   extras/benches/sat.py
  vsi          a letter or a number; the mean of 8 tasks            extras/benches/vsi.py

`official_score` gives the verdict of the bench's official code, traps included: on the same text the benches disagree, and a
number may stand beside a published one only if it was read the same way. `lenient` is a second verdict, by a forgiving
rule of our own, to stand beside the official one and never for it.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image

from extras.benches.files import fetch, find_file, open_picture, read_questions
from extras.benches.mindcube import LISTED_ONLY, MINDCUBE
from extras.benches.mmsi import MMSI
from extras.benches.mmsi_video import MMSI_VIDEO
from extras.benches.sat import SAT
from extras.benches.vsi import VSI, finite, group_weights, relative_accuracy
from lib.dialogue import Trajectory
from lib.distributed import is_main, say, wait_for_all
from lib.protocol import between
from rewards import option_letter

BENCHES = {bench.name: bench for bench in (MINDCUBE, MMSI, MMSI_VIDEO, SAT, VSI)}
BARE = ("sat", "vsi")  # read a reply without tags
NUMERAL = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"


def load(bench: str, folder: str | Path | None = None, frames: int | None = None) -> list[dict]:
    """The questions of a published bench, in the order of its file.

    folder   its folder, or the file itself; None: data/<bench>, fetched from the hub if it is not there
    frames   the most frames a question shows, all its clips together (default the bench's; video benches only)
    Stops with a sentence where nothing can be read.
    """
    source = BENCHES[bench]
    place = fetch(source) if folder is None else Path(folder)
    return read_questions(source, find_file(source, place), frames or source.frames)


def open_image(path: str, bench: str) -> Image.Image:
    """An image in RGB, shrunk to the area that the bench's official prompt allows. Raises PictureError."""
    if bench in BENCHES:
        return open_picture(str(path), BENCHES[bench].max_pixels)
    return open_picture(str(path))


# ---- verdicts -------------------------------------------------------------------------------------------------------


def official_score(bench: str, record: dict, text: str | None) -> tuple[str | float | None, float]:
    """The official verdict on a reply.

    record    a question; its "answer" is the gold letter, or the gold number as text where "kind" is "na"
    text      what `reply` takes from the policy's last turn
    returns   (what was read or None, 1.0 if right else 0.0; a number gets its `relative_accuracy`)
    """
    read = BENCHES[bench].read(text or "", record)
    return read, credit(read, record)


def lenient(record: dict, text: str | None) -> tuple[str | float | None, float]:
    """A forgiving verdict on all that a turn says -> (what was read or None, correct)."""
    read = lenient_reading(text or "", record)
    return read, credit(read, record)


def lenient_reading(text: str, question: dict) -> str | float | None:
    """What a turn says, by a forgiving rule: a letter, or a number where one is asked for; None if nothing is read.

    Looked at are the last <answer>, else what follows the thoughts. An option counts by its letter or by its words,
    then by its words among others if it is the only one, then by the only letter that stands alone.
    """
    answers = between("answer", text, re.IGNORECASE)
    text = answers[-1] if answers else text.rsplit("</think>", 1)[-1]
    if question["kind"] == "na":
        numbers = re.findall(NUMERAL, text)
        return finite(numbers[0 if answers else -1]) if numbers else None
    options = question["options"]
    if letter := option_letter(text, options):
        return letter
    by_words = {option[0] for option in options if option[3:].lower() in text.lower()}
    for letters in (by_words, set(re.findall(r"\b[A-F]\b", text))):
        if len(letters) == 1:
            return letters.pop()
    return None


def credit(read: str | float | None, record: dict) -> float:
    """What was read against the gold answer: right or wrong, or the relative accuracy of a number."""
    if record.get("kind") == "na":
        return relative_accuracy(read, float(record["answer"]))
    return float(read is not None and read == record["answer"])


def reply(bench: str, turn: str) -> str:
    """The part of a turn that the official rule is applied to. What is cut off is our protocol, not the bench's.

    MindCube judges all that was written, and its own prompts ask for <think> and <answer>. The others expect a model
    whose thoughts are not in its reply; SAT and VSI-Bench moreover a bare answer, without tags.
    """
    if bench == "mindcube":
        return turn
    turn = turn.rsplit("</think>", 1)[-1].strip()
    return re.sub(r"</?answer>", "", turn).strip() if bench in BARE else turn


# ---- averages -------------------------------------------------------------------------------------------------------


def weights(bench: str, categories: list[str]) -> np.ndarray:
    """What each record's score counts in the official overall; the weights sum to 1.

    Every question the same (MindCube: those of LISTED_ONLY nothing beside others); VSI-Bench: `group_weights`.
    """
    if bench == "vsi":
        return group_weights(categories)
    counted = np.array([category not in LISTED_ONLY for category in categories], float)
    if not counted.any():
        counted += 1
    return counted / counted.sum()


def more_numbers(predictions: list[dict]) -> dict:
    """What a bench's own tables show besides, of the lines of predictions.jsonl."""
    if predictions[0]["bench"] != "sat":
        return {}
    # some tables print this one beside the official one
    shares = group_weights([row["category"] for row in predictions])
    return {"mean_of_groups": float(shares @ [row["correct"] for row in predictions])}


# ---- what evaluate.py asks ------------------------------------------------------------------------------------------


class Published:
    """One of BENCHES, by its name: what evaluate.py asks of a bench (`evaluate.Rooms` has the same methods)."""

    def __init__(self, name: str):
        self.bench = BENCHES[name]

    def load(self, args: argparse.Namespace) -> list[dict]:
        """The questions of --data, of data/<bench>, or of rooms in its layout; sets args.data and args.frames."""
        name = self.bench.name
        args.frames = (args.frames or self.bench.frames) if self.bench.frames else None
        folder = args.data
        for root in ("data", "out/data", "out/demo/data"):
            if folder is None and Path(root, name).exists():
                folder = f"{root}/{name}"
        if not is_main():
            wait_for_all()  # the first process fetches what is missing
        questions = load(name, folder, args.frames)
        args.data = folder or f"data/{name}"
        if is_main():
            wait_for_all()
        say(f"{name}: {len(questions)} questions of {args.data}")
        return questions

    def images(self, question: dict) -> list[np.ndarray]:
        """Its images, (H, W, 3) uint8 each. Raises PictureError if one is missing or broken."""
        name = self.bench.name
        return [np.asarray(open_image(image, name)) for image in question["images"]]

    def prompt(self, question: dict, mode: str) -> list[str] | None:
        """What the bench's own code asks, or None where the policy is asked in its own words (lib/dialogue.py).

        MMSI-Video-Bench is always asked word for word, and a mode with a tool adds the tool's schema alone. The others
        are asked so in mode official: "reply with the answer only" goes together neither with a call nor with thoughts.
        """
        if mode == "official" or self.bench.name == "mmsi_video":
            return question["official"]
        return None

    def groups(self, question: dict) -> list[str]:
        """The official groups of a question, from the widest to its category, then sub-benches: rows of the table."""
        return list(dict.fromkeys(self.bench.groups(question)))  # a task of one type has its name

    def judge(self, question: dict, dialogue: Trajectory, mode: str) -> dict:
        """-> {"answer": what was read, "correct", "lenient"} by the bench's rules.

        Except in mode official, a dialogue without an accepted answer (no call in mode forced, cut off in its thoughts)
        has said nothing, and SAT, whose own rule knows no letters, is read leniently, since our words show them.
        """
        name = self.bench.name
        accepted = mode == "official" or dialogue.answer is not None
        text = dialogue.turns[-1] if accepted and dialogue.turns else ""
        answer, forgiving = lenient(question, text)
        correct = forgiving
        if name != "sat" or mode == "official":
            answer, correct = official_score(name, question, reply(name, text))
        return {"answer": answer, "correct": correct, "lenient": forgiving}

    def diagnose(self, question: dict, dialogue: Trajectory) -> None:
        """Only in rooms it is known what every view shows."""
