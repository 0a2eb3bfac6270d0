"""
Published corpora of spatial questions as our question rows, to train a policy with.

  python -m extras.scans.corpora --corpus sensenova --root DIR      out/sensenova/questions_train.jsonl
  python -m extras.scans.corpora --corpus vst --root DIR            out/vst/questions_train.jsonl, images/

  sensenova   sensenova/SenseNova-SI-800K on the hub: SenseNova-SI-800K.jsonl beside its image folders; a record is
              {"id", "image": [paths], "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}
  vst         rayruiyang/vst_500k: <task>/*.parquet (pyarrow), "images": [{"bytes"}] and the same conversations

As readers report, the paper drew about 6,000 questions from these two and from a hard split that is not public, keeping
those that its base policy answers at most once in five samples (extras/scans/mining.py). Only what can be verified is
converted: one question with lettered options and a letter for an answer, or with an answer of at most three words.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from extras.benches.files import parquet_rows, save_pictures, split_options
from extras.scans.make import with_relative_paths
from lib.distributed import fail, say
from lib.protocol import between, fits
from lib.records import save_jsonl
from lib.stage import lock_folder, run_stage

LETTER = re.compile(r"\s*\(?([A-E])(?:[).:]\s*.*)?\s*", re.DOTALL)
IMAGE_MARK = re.compile(r"<image>|<\|image_pad\|>|^[ \t]*Image-?\d+:\s*", re.MULTILINE)


class Record(NamedTuple):
    """One raw record of a corpus."""

    id: str
    category: str
    images: list[str]  # paths
    conversations: list[dict]  # {"from", "value"} of each turn


def make_corpus(corpus: str, root: str | Path, out: str | Path) -> None:
    """out/questions_train.jsonl: the questions of a corpus that can be verified; the rest is counted by reason.

    An id that comes again, or none, gets a number: "#2", "#3", ...
    """
    out, rows = Path(out), []
    reasons, times = Counter(), Counter()
    for record in RECORDS[corpus](Path(root), out / "images"):
        question, reason = read_question(record.conversations)
        if question and not record.images:
            reason = "no image"
        elif question and not all(Path(path).is_file() for path in record.images):
            reason = "an image is missing"
        if reason:
            reasons[reason] += 1
            continue
        times[record.id] += 1
        number = f"#{times[record.id]}" if times[record.id] > 1 else ""
        row = {"id": f"{corpus}/{record.id}{number}", "bench": corpus, "images": record.images}
        row |= question | {"category": record.category, "needs_view": None}
        rows.append(with_relative_paths(row, out))
    save_jsonl(out / "questions_train.jsonl", rows)
    say(f"{out}/questions_train.jsonl: {len(rows)} questions")
    for reason, count in reasons.most_common():
        say(f"  {count:8}  left out: {reason}")


# ---- files: (folder of the corpus, folder for pictures that lie inside its files) -> records, one by one ----------------


def sensenova_records(root: Path, folder: Path) -> Iterator[Record]:
    """The lines of SenseNova-SI-800K.jsonl; one that is no record comes without images and conversations."""
    file = root / "SenseNova-SI-800K.jsonl"
    if not file.exists():
        fail(
            f"{file} does not exist. Fetch sensenova/SenseNova-SI-800K from the Hugging Face hub, unpack its "
            f"images beside it, and give --root <its folder>."
        )
    with file.open() as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                names = row["image"] if isinstance(row["image"], list) else [row["image"]]
                images = [str(root / name) for name in names]
                yield Record(str(row.get("id", number)), "", images, row["conversations"])
            except (ValueError, KeyError, TypeError):
                yield Record(str(number), "", [], [])


def vst_records(root: Path, folder: Path) -> Iterator[Record]:
    """The rows of VST-500K's parquet files; the name of a task is the category."""
    files = sorted(root.glob("*/*.parquet"))
    if not files:
        fail(
            f"There is no <task>/*.parquet in {root}. Fetch rayruiyang/vst_500k from the Hugging Face hub and give "
            f"--root <its folder>."
        )
    for file in files:
        task = file.parent.name
        for row in parquet_rows(file):
            id = f"{task}/{row.get('id', file.stem)}"
            yield Record(id, task, save_pictures(row["images"], folder), row["conversations"])


RECORDS = {"sensenova": sensenova_records, "vst": vst_records}


# ---- words ---------------------------------------------------------------------------------------------------------------


def read_question(conversations: list[dict]) -> tuple[dict | None, str | None]:
    """One exchange -> ({"question", "options", "answer", "kind"}, None), or (None, why it cannot be verified)."""
    turns = []
    if fits(conversations, list[dict]):
        turns = [turn.get("value") for turn in conversations]
    if len(turns) != 2 or not fits(turns, list[str]):
        return None, "not one question with one answer"
    text = IMAGE_MARK.sub("", turns[0]).strip()
    answer = (between("answer", turns[1]) or [turns[1]])[-1].strip()
    before, after = split_after_options(text)
    # "(A) left" and "A: left" become "A. left", each on a line of its own
    lettered = re.sub(r"(?:(?<=\s)|^)\(?([A-E])[).:]\s+", r"\n\1. ", before)
    question, options = split_options(" ".join(lettered.split()))
    if options:
        letter = letter_of(answer, options)
        if letter is None:
            return None, "the answer is none of the options"
        question = f"{question} {after}".strip()
        return {"question": question, "options": options, "answer": letter, "kind": "mca"}, None
    if not answer or len(answer.split()) > 3:
        return None, "an answer that cannot be verified"
    return {"question": text, "options": [], "answer": answer.rstrip("."), "kind": "na"}, None


def letter_of(answer, options):
    """The option that an answer names, by its letter ("(B) blue") or by its words ("Blue."); None if it is none."""
    match = LETTER.fullmatch(answer)
    words = answer.lower().rstrip(".")
    for option in options:
        if option[0] == match[1] if match else option[3:].lower() == words:
            return option[0]
    return None


def split_after_options(text):
    """Where options have lines of their own -> (text up to the last one, what follows); elsewhere (text, "").

    What follows, such as a word on how to answer, is no part of the last option.
    """
    lines = list(re.finditer(r"^[ \t]*\(?([A-E])[).:][ \t]+\S.*$", text, re.MULTILINE))
    letters = "".join(line[1] for line in lines)
    if len(lines) < 2 or letters != "ABCDE"[: len(lines)]:
        return text, ""
    end = lines[-1].end()
    return text[:end], " ".join(text[end:].split())


def main(argv: list[str] | None = None) -> None:
    """Convert one corpus."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, choices=list(RECORDS))
    parser.add_argument("--root", required=True, help="folder of the corpus")
    parser.add_argument("--out", help="folder of the files (default: out/<corpus>)")
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.corpus}"
    lock_folder(args.out)
    make_corpus(args.corpus, args.root, args.out)


if __name__ == "__main__":
    run_stage(main)
