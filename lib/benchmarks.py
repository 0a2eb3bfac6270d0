"""
Published benchmarks: their records as our questions, and their official verdicts.

  rooms      our own: the letter between <answer> and </answer>, exactly
  mindcube   MindCube (arXiv 2506.21458), `MLL-Lab/MindCube` on the hub, data.zip: raw/MindCube_tinybench.jsonl (1,050
             questions), raw/MindCube.jsonl (21,154), images below other_all_image/

`score(bench, question, text)` gives the verdict of the bench's official code, traps included: on the same text the
benches disagree, and a number may stand beside a published one only if it was read the same way. MindCube's code takes
any "A." anywhere in the text, thoughts too, before it looks for an answer; the words "The answer is Dark" read D.
"""

import json
import re
from pathlib import Path

from PIL import Image

from lib.common import fail

SETTINGS = ("around", "rotation", "translation", "among")   # looked for in the id in this order
LISTED_ONLY = ("translation",)                              # not in the official overall
MAX_PIXELS = {"mindcube": 480 * 480}                        # an image's area in the official prompt
NO_RESPONSE = "No response generated"


# ---- verdicts -------------------------------------------------------------------------------------------------------

def score(bench, question, text):
    """The official verdict on a reply.

    question   a question row; its "answer" is the gold letter
    text       rooms: the answer; mindcube: all the policy wrote in its last turn
    returns    (what was read or None, 1.0 if right else 0.0). Raises ValueError for an unknown bench.
    """
    if bench not in READERS:
        raise ValueError(f"there is no bench called {bench!r}; there are: {', '.join(READERS)}")
    letter = READERS[bench](text or "", question)
    return letter, float(letter is not None and letter == question["answer"])


def option_letter(text, options):
    """The letter of the option that an answer names, or None: "B", "b", "B.", "B. red box" or its words, "red box"."""
    for option in options:
        letter, words = option.split(". ", 1)
        if text.strip().lower() == words.lower():
            return letter
    found = re.fullmatch(r"\s*([A-Za-z])(?:[.)].*)?\s*", text, re.DOTALL)
    return found[1].upper() if found else None


def mindcube_letter(text, question=None):
    """MindCube's extraction of A to E, upper case: the first rule that finds anything decides; None if none does."""
    text = " ".join(text.split()) or NO_RESPONSE        # blanks rule: what is on disk has no line breaks
    return mindcube_extract(text)


def mindcube_extract(text):
    """The same on text as it stands, line breaks included."""
    if found := re.findall(r"([A-E])\.", text):                                                # 1
        return found[-1]
    if "<Answer>" in text:                                                                     # 2
        inside = text.split("<Answer>", 1)[1].split("<", 1)[0]
        for pattern in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"):
            if found := re.findall(pattern, inside):
                return found[-1]
    for pattern in (r"(?:^|\n)(?:Answer: )?([A-E])(?:\.|\s|$)",                                # 3a
                    r"[*\"]([A-E])[*\"]",                                                      # 3b
                    r"\bAnswer:?\s*([A-E])\b",                                                 # 3c
                    r"[Mm]y answer is ([A-E])",                                                # 3d
                    r"answer is ([A-E])"):                                                     # 3e
        if found := re.findall(pattern, text):
            return found[-1]
    for line in reversed(text.split("\n")):                                                    # 4
        if found := re.search(r"\b([A-E])\b", line):
            return found[1]
    return None


READERS = {"rooms": lambda text, question: option_letter(text, question.get("options", ())),
           "mindcube": mindcube_letter}


# ---- MindCube's files -----------------------------------------------------------------------------------------------

def mindcube_setting(identity):
    """The setting of a record, told by its id: the first of SETTINGS that occurs anywhere in it, else "other"."""
    return next((setting for setting in SETTINGS if setting in identity.lower()), "other")


def mindcube_image(path, root):
    """Where an image of a record lies, by the official rule; `root` is the folder that holds other_all_image/."""
    root = str(root)
    if path.startswith(root):
        return path
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        path = path.replace("\\", "/")
        if "MindCube_image/" in path:
            path = path.split("MindCube_image/", 1)[1]
        elif "other_all_image/" in path:
            path = path[path.index("other_all_image/"):]
        else:
            path = path.rsplit("/", 1)[-1]
    return str(Path(root) / path)


def split_options(question):
    """ "Which one? A. Crate B. Stool" -> ("Which one?", ["A. Crate", "B. Stool"]); the words stay as they are.

    The letters must follow one another up to the end; the last such list counts. No list: (question, []).
    """
    marks = [(match.start(), match[1]) for match in re.finditer(r"(?:(?<=\s)|^)([A-E])\. ", question)]
    starts = [i for i, (_, letter) in enumerate(marks) if letter == "A"]
    if not starts:
        return question, []
    run = marks[starts[-1]:]
    if len(run) < 2 or "".join(letter for _, letter in run) != "ABCDE"[:len(run)]:
        return question, []
    ends = [start for start, _ in run[1:]] + [len(question)]
    return question[:run[0][0]].rstrip(), [question[start:end].strip() for (start, _), end in zip(run, ends)]


def load_mindcube(place):
    """MindCube's questions as ours: {"id", "bench", "images", "question", "options", "answer", "category", …}.

    place   the unzipped `data` folder (its tinybench is read), or one of the JSONL files below its raw/
    "category" is the setting. As in the official code an image that is missing is left out and the question still asked
    (`missing_images` counts them); "answer" is None where the record has no gt_answer: it leaves every total.
    """
    place = Path(place)
    file = place if place.suffix == ".jsonl" else place / "raw" / "MindCube_tinybench.jsonl"
    if not file.exists():
        fail(f"{file} does not exist. Fetch data.zip of MLL-Lab/MindCube from the Hugging Face hub and unzip it, then "
             f"give --data <its data folder>. Offline, `python data.py mindcube` writes rooms questions that way.")
    root, questions = file.parent.parent, []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            images = [mindcube_image(path, root) for path in record["images"]]
            stem, options = split_options(record["question"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            fail(f"{file}, line {number} is not a MindCube record ({type(error).__name__}: {error}).")
        present = [path for path in images if Path(path).exists()]
        name = record.get("id", "")
        questions.append({"id": name, "bench": "mindcube", "images": present, "question": stem, "options": options,
                          "answer": record.get("gt_answer"), "category": mindcube_setting(name), "kind": "mca",
                          "needs_view": None, "missing_images": len(images) - len(present)})
    return questions


def open_image(path, bench):
    """An image as (H, W, 3) RGB, shrunk to the area that the bench's official prompt allows. Raises OSError."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    limit = MAX_PIXELS.get(bench, float("inf"))
    if image.width * image.height > limit:
        shrink = (limit / (image.width * image.height)) ** 0.5
        image = image.resize((int(image.width * shrink), int(image.height * shrink)), Image.BICUBIC)
    return image
