"""
Published corpora of spatial questions as our question rows, to train a policy with.

  sensenova   sensenova/SenseNova-SI-800K on the hub: SenseNova-SI-800K.jsonl beside its image folders; a record is
              {"id", "image": [paths], "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}
  vst         rayruiyang/VST-500K: <task>/*.parquet (pyarrow), "images": [{"bytes"}] and the same conversations

As readers report, the paper drew about 6,000 questions from these two and from a hard split that is not public, keeping
those that its base policy answers at most once in five samples (`python data.py mine`). Only what can be verified is
converted: one question with lettered options and a letter for an answer, or with an answer of at most three words.
"""

import json
import re
from collections import Counter
from pathlib import Path

from extras.benches.files import parquet_rows, save_pictures, split_options
from lib.common import fail

LETTER = re.compile(r"\s*\(?([A-E])(?:[).:]\s*.*)?\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def read_question(conversations):
    """One exchange -> ({"question", "options", "answer", "kind"}, None), or (None, why it cannot be verified)."""
    said = [turn.get("value", "") for turn in conversations if isinstance(turn, dict)]
    if len(said) != 2:
        return None, "not one question with one answer"
    whole = re.sub(
        r"<image>|<\|image_pad\|>|^\s*Image-?\d+:\s*", "", said[0], flags=re.MULTILINE
    ).strip()
    text, rest = options_last(whole)
    answer = (ANSWER.findall(said[1]) or [said[1]])[-1].strip()
    # "(A) left" and "A: left" become "A. left", each on a line of its own
    lettered = re.sub(r"(?:(?<=\s)|^)\(?([A-E])[).:]\s+", r"\n\1. ", text)
    question, options = split_options(" ".join(lettered.split()))
    if options:
        found = LETTER.fullmatch(answer)
        words = answer.lower().rstrip(".")
        letter = (
            found[1]
            if found
            else next((option[0] for option in options if option[3:].lower() == words), None)
        )
        if letter not in {option[0] for option in options}:
            return None, "the answer is none of the options"
        return {
            "question": f"{question} {rest}".strip(),
            "options": options,
            "answer": letter,
            "kind": "mca",
        }, None
    if not answer or len(answer.split()) > 3:
        return None, "an answer that cannot be verified"
    return {"question": whole, "options": [], "answer": answer.rstrip("."), "kind": "na"}, None


def options_last(text):
    """Where options have lines of their own -> (text up to the last one, what follows); elsewhere (text, "").

    What follows, such as a word on how to answer, is no part of the last option.
    """
    own = list(re.finditer(r"^[ \t]*\(?([A-E])[).:][ \t]+\S.*$", text, re.MULTILINE))
    if len(own) < 2 or "".join(line[1] for line in own) != "ABCDE"[: len(own)]:
        return text, ""
    return text[: own[-1].end()], " ".join(text[own[-1].end() :].split())


def records(corpus, root, out):
    """Raw records of a corpus, one by one: (id, category, image paths, conversations); images are relative to `out`.

    Pictures inside parquet files are written to out/images/. Stops with a sentence if files are missing or cut off.
    """
    root, out = Path(root), Path(out)
    if corpus == "sensenova":
        file = root / "SenseNova-SI-800K.jsonl"
        if not file.exists():
            fail(
                f"{file} does not exist. Fetch sensenova/SenseNova-SI-800K from the Hugging Face hub, unpack its "
                f"images beside it, and give --root <its folder>."
            )
        with file.open() as lines:
            for number, line in enumerate(lines):
                try:
                    record = json.loads(line)
                    images = (
                        record["image"] if isinstance(record["image"], list) else [record["image"]]
                    )
                    yield (
                        str(record.get("id", number)),
                        "",
                        [str(root / path) for path in images],
                        record["conversations"],
                    )
                except (ValueError, KeyError, TypeError):
                    yield str(number), "", [], []
        return
    files = sorted(root.glob("*/*.parquet"))
    if not files:
        fail(
            f"There is no <task>/*.parquet in {root}. Fetch rayruiyang/VST-500K from the Hugging Face hub and give "
            f"--root <its folder>."
        )
    for file in files:
        for record in parquet_rows(file):
            yield (
                f"{file.parent.name}/{record.get('id', file.stem)}",
                file.parent.name,
                save_pictures(record["images"], out / "images"),
                record["conversations"],
            )


def convert(corpus, root, out):
    """All questions of a corpus that can be verified -> (rows, Counter of what was left out and why).

    An id that comes again, or none, gets a number: "#2", "#3", ...
    """
    rows, counts, named = [], Counter(), Counter()
    for id, category, images, conversations in records(corpus, root, out):
        row, reason = read_question(conversations)
        if row and not images:
            reason = "no image"
        elif row and any(not Path(path).is_file() for path in images):
            reason = "an image is missing"
        if reason:
            counts[reason] += 1
            continue
        named[id] += 1
        id = f"{corpus}/{id}" + (f"#{named[id]}" if named[id] > 1 else "")
        rows.append(
            {
                "id": id,
                "bench": corpus,
                "images": images,
                **row,
                "category": category,
                "needs_view": None,
            }
        )
    return rows, counts
