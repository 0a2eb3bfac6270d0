"""
VSI-Bench (arXiv 2412.14171): a letter or a number; the mean of 8 tasks, not of questions.

Files: nyu-visionx/VSI-Bench on the hub: test-00000-of-00001.parquet or test.jsonl (5,130); <dataset>/<scene>.mp4, or a
folder <dataset>/<scene>/ with frames of it as pictures.
"""

import importlib.util
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from extras.benches.files import Bench, Source, after_images, require, sample_frames
from lib.distributed import fail

VSI_LETTER = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
VSI_NUMBER = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)
REQUEST = {
    "mca": "Answer directly with the letter of the right option.",
    "na": "Answer with a single word or phrase.",
}


# ---- questions ------------------------------------------------------------------------------------------------------


def vsi_questions(record: dict, source: Source) -> list[dict]:
    """The question of a record; "category" is the type, "kind" is "na" where the answer is a number (as text)."""
    category, options, gold = record["question_type"], record["options"], record["ground_truth"]
    kind = "na" if options is None else "mca"
    if options is None:
        require(category in VSI_NUMBER, f"there is no type {category!r} without options")
        require(float(gold) > 0, f"ground_truth is {gold!r}")
    else:
        require(category in VSI_LETTER, f"there is no type {category!r} with options")
    scene = source.file.parent / record["dataset"] / record["scene_name"]
    images = vsi_frames(scene, source.frames)
    choice = ["Options:", *options] if options else []
    lines = ["These are frames of a video.", record["question"], *choice, REQUEST[kind]]
    return [
        {
            "id": str(record["id"]),
            "images": images,
            "question": record["question"],
            "options": options or [],
            "answer": gold,
            "category": category,
            "kind": kind,
            "official": after_images(images, "\n".join(lines)),
            "cluster": f"{record['dataset']}/{record['scene_name']}",
        }
    ]


def vsi_frames(scene: Path, count: int) -> list[str]:
    """Frames of a scene, evenly: pictures of its folder if there is one, else of its mp4, which takes PyAV.

    The folder saves decoding the whole video for each question.
    """
    pictures = sorted(path for path in scene.glob("*") if path.suffix in (".jpg", ".png"))
    if pictures:
        return [str(pictures[i]) for i in sample_frames([len(pictures)], count)[0]]
    video = scene.with_name(scene.name + ".mp4")
    if video.exists() and importlib.util.find_spec("av") is None:
        fail(
            f"{video} is a video, which takes PyAV to read. Type: pip install av    Or put frames of it, as pictures "
            f"whose names sort in time, into {scene}/."
        )
    return [f"{video}#{i + 1}/{count}" for i in range(count)]


# ---- the verdict ----------------------------------------------------------------------------------------------------


def vsi_read(text: str, question: dict) -> str | float | None:
    """The official extraction: the text before the first blank, as a letter or, for a number, as a float."""
    text = text.split(" ")[0].rstrip(".").strip()
    if question["kind"] == "na":
        return finite(text)
    return text.upper() if re.fullmatch("[A-Za-z]", text) else None


def finite(text: str) -> float | None:
    """A finite float, or None."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def relative_accuracy(number: float | None, gold: float) -> float:
    """MRA: the share of ten demands, from 50 % to 95 % right, that a number meets; 0 for None."""
    if number is None:
        return 0.0
    return float(np.mean(abs(number - gold) / gold <= 1 - np.linspace(0.5, 0.95, 10)))


# ---- groups and their mean ------------------------------------------------------------------------------------------


def task(category: str) -> str:
    """The task of a type: three types are one task."""
    return "object_rel_direction" if category.startswith("object_rel_direction_") else category


def vsi_groups(question: dict) -> list[str]:
    """Task and type."""
    return [task(question["category"]), question["category"]]


def group_weights(categories: list[str]) -> np.ndarray:
    """The weights of a mean over groups: every task the same, in it every type, in it every question.

    VSI-Bench's official overall. For SAT some tables print it beside the official one: "give both".
    """
    questions = Counter(categories)  # of each type
    types = Counter(map(task, questions))  # of each task
    return np.array([1 / (len(types) * types[task(c)] * questions[c]) for c in categories])


VSI = Bench(
    name="vsi",
    title="VSI-Bench",
    repo="nyu-visionx/VSI-Bench",
    downloads=("test-00000-of-00001.parquet", "arkitscenes.zip", "scannet.zip", "scannetpp.zip"),
    files=("test-00000-of-00001.parquet", "test.jsonl"),
    questions=vsi_questions,
    read=vsi_read,
    groups=vsi_groups,
    frames=32,  # as in most published numbers
)
