"""
SAT (arXiv 2412.07755): the words of an option; accuracy over both orders of the options of every row.

Files: array/SAT on the hub: SAT_test.parquet (150 photographs), or SAT_val.parquet (4,001); images inside.

Asked in our words, which show letters, it is read by `lenient`: the letter, else the only option whose words are there.
"""

import re

from extras.benches.files import Bench, Source, after_images, require, save_pictures

EGO_MOVEMENT = "Image 1 is the start and image 2 the end of a video. "  # begins those questions
REQUEST = "Answer with a single word or phrase."
SAT_GROUPS = {
    "ego_movement": "EgoM",
    "action_sequence": "EgoM",
    "obj_movement": "ObjM",
    "action_conseq": "EgoAct",
    "action_consequence": "EgoAct",
    "goal_aim": "GoalAim",
    "perspective": "Pers",
}


def sat_questions(record: dict, source: Source) -> list[dict]:
    """Two questions of a record, "…/kept" and "…/reversed": the right text comes first in all published rows.

    "category" is the group; without EGO_MOVEMENT such a question cannot be answered.
    "in the first frame" leaves options and answer alike: the official loader forgets the answer, which then cannot be
    reached.
    """
    words = [text.replace("in the first frame", "").strip() for text in record["answers"]]
    gold = record["correct_answer"].replace("in the first frame", "").strip()
    kind = record["question_type"]
    require(gold in words, f"the answer {gold!r} is not among the options {words}")
    require(kind in SAT_GROUPS, f"there is no type {kind!r}")
    images = save_pictures(record["image_bytes"], source.file.parent / "images")
    question = record["question"]
    if kind == "ego_movement":
        question = EGO_MOVEMENT + question
    common = {
        "images": images,
        "question": question,
        "category": SAT_GROUPS[kind],
        "cluster": str(source.number),
    }
    questions = []
    for order, texts in (("kept", words), ("reversed", words[::-1])):
        choice = " or ".join(f'"{text}"' for text in texts)
        own = {
            "id": f"{source.file.stem}_{source.number:05}/{order}",
            "options": [f"{'ABCDEF'[i]}. {text}" for i, text in enumerate(texts)],
            "answer": "ABCDEF"[texts.index(gold)],
            "official": after_images(images, f"{question} Choose {choice}. {REQUEST}"),
        }
        questions.append(own | common)
    return questions


def sat_letter(text: str, question: dict) -> str | None:
    """The letter of the option whose words the reply is, exactly, or None. A letter names no option.

    The official code mends two slips of an old model and breaks "night stand" by it; it takes the brackets off the
    options, not off the reply.
    """
    text = text.split("###")[0].strip().lower()
    text = "right" if text == "ight" else text.replace("ight stand", "night stand")
    text = text.split("(highlighted by")[0].strip()
    if "1." in text:
        text = text.split("1.")[1].strip()
    for cue in ("is located ", "answer: "):
        if cue in text:
            text = text.split(cue)[1].split(" ")[0].strip()
    for option in question["options"]:
        if text == re.sub("[()]", "", option[3:].lower().strip()):
            return option[0]
    return None


SAT = Bench(
    name="sat",
    title="SAT",
    repo="array/SAT",
    downloads=("SAT_test.parquet",),
    files=("SAT_test.parquet",),
    questions=sat_questions,
    read=sat_letter,
)
