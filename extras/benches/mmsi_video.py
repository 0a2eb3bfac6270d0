"""
MMSI-Video-Bench (arXiv 2512.10863): a letter; accuracy over all questions, 13 types in 4 levels, and 4 sub-benches.

Files: rbler/MMSI-Video-Bench on the hub: mmsivideo.json (1,106), frames/, ref_images/; meta_data/ of the official code
repository beside it names the sub-benches.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

from extras.benches.files import Bench, Source, require, sample_frames, split_options

RELATIONS = (
    "Instance-Instance",
    "Instance-Scene",
    "Scene-Scene",
    "Camera-Instance",
    "Camera-Scene",
)
VIDEO_TYPES = (
    *(f"(Spatial Construction) {pair} Spatial Relationship" for pair in RELATIONS),
    "(Spatial Construction) Instance/Scene Attribute",
    "(Motion Understanding) Camera Motion",
    "(Motion Understanding) Instance Motion",
    "(Motion Understanding) Interactive Motion",
    "Planning",
    "Prediction",
    "(Cross-Video) Memoery Update",  # their spelling
    "(Cross-Video) Multi-View Integration",
)


# ---- questions ------------------------------------------------------------------------------------------------------


def mmsi_video_questions(record: dict, source: Source) -> list[dict]:
    """The question of a record; "category" is the type, one of VIDEO_TYPES.

    Beside the usual: "clips" (frames shown of each), "domains" ({sub-bench: sub-type}, from meta_data/ if it is there).
    "official" is the record word for word, <video> replaced by the frames of its clip and <image> by its image; options
    are read from it where they can be.
    """
    check_video_record(record)
    root = source.file.parent
    chosen = sample_frames([len(clip) for clip in record["frames_list"]], source.frames)
    clips = []
    for clip, indices in zip(record["frames_list"], chosen, strict=True):
        clips.append([str(root / "frames" / clip[i]) for i in indices])
    references = [[str(root / "ref_images" / path)] for path in record["ref_images"]]
    images, texts = interleave(record["user_prompt"], clips, references)
    texts[0] = f"{record['system_prompt']}\n{record['task_prompt']}{texts[0]}"
    texts[-1] += record["format_prompt"]
    options = split_options(record["user_prompt"], r"[.:)]\s*")[1]
    if record["ground_truth"] not in [option[0] for option in options]:
        options = []
    return [
        {
            "id": record["id"],
            "images": images,
            "question": record["ori_question"],
            "options": options,
            "answer": record["ground_truth"],
            "category": record["type"],
            "cluster": record["video_list"][0]["path"],
            "official": texts,
            "clips": [len(clip) for clip in clips],
            "domains": sub_benches(root).get(record["id"], {}),
        }
    ]


def check_video_record(record: dict) -> None:
    """Raise ValueError where marks and pictures differ in number, or type or answer is none."""
    for mark, key in (("<video>", "frames_list"), ("<image>", "ref_images")):
        marks, pictures = record["user_prompt"].count(mark), len(record[key])
        require(marks == pictures, f"user_prompt has {marks} {mark} for {pictures}")
    require(all(record["frames_list"]), "a clip has no frames")
    require(record["type"] in VIDEO_TYPES, f"there is no type {record['type']!r}")
    gold = record["ground_truth"]
    require(gold in tuple("ABCDEF"), f"ground_truth is {gold!r}")


def interleave(
    prompt: str, clips: list[list[str]], references: list[list[str]]
) -> tuple[list[str], list[str]]:
    """The pictures that <video> and <image> of a prompt stand for, and the texts before each and after the last."""
    marks = {"<video>": iter(clips), "<image>": iter(references)}
    images, texts = [], [""]
    for piece in re.split("(<video>|<image>)", prompt):
        if piece in marks:
            pictures = next(marks[piece])
            images += pictures
            texts += [""] * len(pictures)
        else:
            texts[-1] += piece
    return images, texts


@lru_cache(maxsize=1)  # every record asks for it
def sub_benches(root: Path) -> dict[str, dict[str, str]]:
    """{id of a question: {sub-bench: sub-type}}, from meta_data/<sub-bench>_bench.json."""
    domains = {}
    for file in sorted((root / "meta_data").glob("*_bench.json")):
        for kind, names in json.loads(file.read_text()).items():
            for name in names:
                domains.setdefault(name, {})[file.stem.removesuffix("_bench")] = kind
    return domains


# ---- the verdict ----------------------------------------------------------------------------------------------------


def mmsi_video_letter(text: str, question: dict) -> str | None:
    """The official extraction of A to F, upper case: the first rule that applies decides, even if it reads nothing.

    Cues are tried in this order, wherever they stand: "The answer is B. Answer: C." reads B.
    """
    text = text.replace("<answer>", "").replace("</answer>", "")
    cues = ('"answer":', "answer is", "answer:", '"Answer":', "Answer is", "Answer:")
    cue = next((cue for cue in cues if cue in text), None)
    if "no answer" in text:  # 1
        return None
    if "boxed{" in text:  # 2
        text = text.split("boxed{")[1].split("}")[0]
    elif cue:  # 3
        text = text.split(cue)[-1].split(",")[0].split(".")[0]
    else:  # 4
        text = text.split(".")[0]
    text = re.sub("[ \"'\n:]", "", text)
    return text if text in tuple("ABCDEF") else None


# ---- groups ---------------------------------------------------------------------------------------------------------


def mmsi_video_groups(question: dict) -> list[str]:
    """Level and type, then every sub-bench and its sub-type; "easy2hard" is no bench but three of them."""
    groups = [level(question["category"]), question["category"]]
    for sub_bench, kind in question["domains"].items():
        if sub_bench != "easy2hard":
            groups.append(sub_bench)
        groups.append(f"{sub_bench}: {kind}")
    return groups


def level(category: str) -> str:
    """The level of a type: Perception, Planning, Prediction or Cross-Video."""
    head = category.removeprefix("(").split(")")[0]
    return "Perception" if head in ("Spatial Construction", "Motion Understanding") else head


MMSI_VIDEO = Bench(
    name="mmsi_video",
    title="MMSI-Video-Bench",
    repo="rbler/MMSI-Video-Bench",
    downloads=("mmsivideo.json", "frames.zip", "ref_images.zip"),
    files=("mmsivideo.json",),
    questions=mmsi_video_questions,
    read=mmsi_video_letter,
    groups=mmsi_video_groups,
    frames=50,  # Uniform-50; 300 is Sufficient-Coverage
    max_pixels=360 * 420,
)
