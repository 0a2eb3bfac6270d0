"""
MMSI-Bench (arXiv 2505.23764): a letter of four options; accuracy over all questions, 11 types in 4 groups.

File: RunsenXu/MMSI-Bench on the hub: MMSI_Bench.parquet (1,000), images inside.
"""

import re

from extras.benches.files import (
    Bench,
    Source,
    after_images,
    require,
    save_pictures,
    split_options,
)

PAIRS = ("Cam.–Cam.", "Obj.–Obj.", "Reg.–Reg.", "Cam.–Obj.", "Obj.–Reg.", "Cam.–Reg.")
MMSI_TYPES = (
    *(f"Positional Relationship ({pair})" for pair in PAIRS),
    "Attribute (Meas.)",
    "Attribute (Appr.)",
    "Motion (Cam.)",
    "Motion (Obj.)",
    "MSR",
)
REQUEST = "Answer directly with the letter of the right option, and put it between double backticks: ``letter``."


def mmsi_questions(record: dict, source: Source) -> list[dict]:
    """The question of a record; "category" is the type, and the annotator's `thought` is never read.

    Options stand in the question, as "Options: A: …, B: …".
    """
    name = str(record["id"])
    category = record["question_type"].replace("-", "–")  # some copies have a hyphen for the dash
    require(category in MMSI_TYPES, f"there is no type {category!r}")
    require(record["answer"] in tuple("ABCD"), f"the answer is {record['answer']!r}")
    images = save_pictures(record["images"], source.file.parent / "images")
    stem, options = split_options(record["question"], ": ")
    return [
        {
            "id": name,
            "images": images,
            "question": stem.removesuffix("Options:").rstrip(),
            "options": [option.rstrip(", ") for option in options],
            "answer": record["answer"],
            "category": category,
            "official": after_images(images, f"{record['question']}\n{REQUEST}"),
            "cluster": name,
        }
    ]


def mmsi_letter(text: str, question: dict) -> str | None:
    """The official extraction of A to D, upper case: the first one that stands alone and before no word, inside the
    first ``…``, in it the first `…`, in it the first {…}; a span without a letter hides the text around it."""
    for pattern in (r"``([^`]*)``", r"`([^`]*)`", r"\A[^{]*\{([^}]*)\}"):
        if span := re.search(pattern, text):
            text = span[1]
    letter = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return letter[0] if letter else None


def mmsi_groups(question: dict) -> list[str]:
    """["Motion", "Motion (Cam.)"], or ["MSR"]."""
    return [question["category"].split(" (")[0], question["category"]]


MMSI = Bench(
    name="mmsi",
    title="MMSI-Bench",
    repo="RunsenXu/MMSI-Bench",
    downloads=("MMSI_Bench.parquet",),
    files=("MMSI_Bench.parquet",),
    questions=mmsi_questions,
    read=mmsi_letter,
    groups=mmsi_groups,
)
