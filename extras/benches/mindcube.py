"""
MindCube (arXiv 2506.21458): a letter of two to four options; accuracy over all questions, and per setting.

  evaluate   python evaluate.py --bench mindcube --data data/mindcube
  offline    python -m extras.benches.mindcube --out out/data/mindcube --questions out/data/questions_test.jsonl
             writes the questions of rooms in these files, so that the same code runs without a network

Files: MLL-Lab/MindCube on the hub, unzipped: raw/MindCube_tinybench.jsonl (1,050; read by default) or
raw/MindCube.jsonl (21,154), and images below other_all_image/.
"""

import argparse
import re
from pathlib import Path

from extras.benches.files import Bench, Source, after_images, split_options
from lib.distributed import say
from lib.images import load_image, save_image
from lib.records import Question, load_jsonl, save_jsonl
from lib.stage import lock_folder, run_stage

SETTINGS = ("around", "rotation", "translation", "among")  # looked for in the id in this order
LISTED_ONLY = ("translation",)  # not in the official overall
REQUEST = (
    "Look at the images and answer the question about the space that they show. Reply only with "
    "<answer>X. words of the option</answer>."
)


# ---- questions ------------------------------------------------------------------------------------------------------


def mindcube_questions(record: dict, source: Source) -> list[dict]:
    """The question of a record; "category" is the setting.

    As in the official code an image that is missing is left out and the question still asked (`missing_images` counts
    them); "answer" is None where the record has no gt_answer: it leaves every total.
    """
    images = [mindcube_image(path, source.file.parent.parent) for path in record["images"]]
    present = [path for path in images if Path(path).exists()]
    stem, options = split_options(record["question"])
    name = record.get("id", "")
    return [
        {
            "id": name,
            "images": present,
            "question": stem,
            "options": options,
            "answer": record.get("gt_answer"),
            "category": mindcube_setting(name),
            "official": after_images(present, f"{REQUEST}\n[Question]\n{record['question']}"),
            "cluster": re.split("_q|_gen", name)[0],
            "missing_images": len(images) - len(present),
        }
    ]


def mindcube_setting(identity: str) -> str:
    """The setting of a record, told by its id: the first of SETTINGS that occurs anywhere in it, else "other"."""
    return next((setting for setting in SETTINGS if setting in identity.lower()), "other")


def mindcube_image(path: str, root: str | Path) -> str:
    """Where an image of a record lies, by the official rule; `root` is the folder that holds other_all_image/."""
    root = str(root)
    if path.startswith(root):
        return path
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        path = path.replace("\\", "/")
        if "MindCube_image/" in path:
            path = path.split("MindCube_image/", 1)[1]
        elif "other_all_image/" in path:
            path = path[path.index("other_all_image/") :]
        else:
            path = path.rsplit("/", 1)[-1]
    return str(Path(root) / path)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def mindcube_letter(text: str, question: dict) -> str | None:
    """The official extraction of A to E, upper case: the first rule that finds anything decides; None if none does.

    It takes any "A." anywhere, thoughts too, before it looks for an answer; the words "The answer is Dark" read D.
    The official code stores a reply as one line before it reads it: what its 3a and 4 do with lines is left out.
    """
    text = " ".join(text.split())
    letters = re.findall(r"([A-E])\.", text)  # 1
    if "<Answer>" in text and not letters:  # 2
        inside = text.split("<Answer>", 1)[1].split("<", 1)[0]
        letters = letters_of_first_hit(
            inside, r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"
        )
    if not letters:
        letters = letters_of_first_hit(
            text,
            r"^(?:Answer: )?([A-E])(?:\.|\s|$)",  # 3a
            r"[*\"]([A-E])[*\"]",  # 3b
            r"\bAnswer:?\s*([A-E])\b",  # 3c
            r"[Mm]y answer is ([A-E])",  # 3d
            r"answer is ([A-E])",  # 3e
        )
    if letters:
        return letters[-1]
    alone = re.search(r"\b([A-E])\b", text)  # 4
    return alone[1] if alone else None


def letters_of_first_hit(text: str, *patterns: str) -> list[str]:
    """All letters that the first pattern finds which finds any."""
    for pattern in patterns:
        if letters := re.findall(pattern, text):
            return letters
    return []


MINDCUBE = Bench(
    name="mindcube",
    title="MindCube",
    repo="MLL-Lab/MindCube",
    downloads=("data.zip",),
    files=("raw/MindCube_tinybench.jsonl",),
    questions=mindcube_questions,
    read=mindcube_letter,
    max_pixels=480 * 480,
)


# ---- rooms in MindCube's files --------------------------------------------------------------------------------------


def make_mindcube(out: str | Path, source: str | Path) -> None:
    """Questions of rooms in the files that MindCube publishes: raw/MindCube_tinybench.jsonl and other_all_image/.

    The setting is part of the id (MindCube's own rule): views of one spot are `rotation`.
    """
    out, records = Path(out), []
    for question in load_jsonl(source, Question):
        images = []
        for number, image in enumerate(question["images"], 1):
            path = f"other_all_image/rotation/{question['id']}/{number}.png"
            save_image(out / path, load_image(image))
            images.append(path)
        records.append(
            {
                "id": f"rotation_{question['id']}",
                "category": [question["category"]],
                "type": "rotation",
                "meta_info": [],
                "question": " ".join([question["question"], *question["options"]]),
                "images": images,
                "gt_answer": question["answer"],
            }
        )
    save_jsonl(out / "raw" / "MindCube_tinybench.jsonl", records)
    say(f"{out}/raw/MindCube_tinybench.jsonl: {len(records)} questions in MindCube's layout")


def main(argv: list[str] | None = None) -> None:
    """Write questions of rooms in MindCube's layout."""
    parser = argparse.ArgumentParser(description="Questions of rooms in MindCube's files.")
    parser.add_argument("--out", default="out/data/mindcube", help="folder to write")
    parser.add_argument(
        "--questions", default="out/data/questions_test.jsonl", help="the rooms questions to read"
    )
    args = parser.parse_args(argv)
    lock_folder(args.out)
    make_mindcube(args.out, args.questions)


if __name__ == "__main__":
    run_stage(main)
