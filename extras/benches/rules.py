"""
Published benchmarks: their official verdicts, prompts, groups and averages. Their files: extras/benches/files.py.

  rooms        our own: the letter between <answer> and </answer>, exactly
  mindcube     MindCube (arXiv 2506.21458): letter; accuracy per setting
  mmsi         MMSI-Bench (2505.23764): letter; accuracy over 11 types in 4 groups
  mmsi_video   MMSI-Video-Bench (2512.10863): letter; accuracy over 13 types, 4 levels, 4 sub-benches
  sat          SAT (2412.07755): the words of an option; accuracy over both orders of the options. Asked in our words,
               which show letters, by `lenient`: the letter, else the only option whose words stand there
  vsi          VSI-Bench (2412.14171): letter or number; the mean of 8 tasks, not of questions

`score(bench, question, text)` gives the verdict of the bench's official code, traps included: on the same text the
benches disagree, and a number may stand beside a published one only if it was read the same way. MindCube's code takes
any "A." anywhere in the text, thoughts too, before it looks for an answer; the words "The answer is Dark" read D.
`lenient` is a second verdict, of another published rule, to stand beside the official one and never for it.
"""

import math
import re
from collections import Counter

import numpy as np

from extras.benches.files import SAT_ORDER, load, load_mindcube, open_image
from lib.answers import option_letter

BENCHES = ("rooms", "mindcube", "mmsi", "mmsi_video", "sat", "vsi")
LISTED_ONLY = ("translation",)  # not in the official overall


# ---- verdicts -------------------------------------------------------------------------------------------------------


def score(bench, question, text):
    """The official verdict on a reply.

    question   a question row; its "answer" is the gold letter, or the gold number as text where "kind" is "na"
    text       what `reply` takes from the policy's last turn; rooms: the answer
    returns    (what was read or None, 1.0 if right else 0.0; a number gets its `relative_accuracy`)
    raises     ValueError for an unknown bench
    """
    if bench not in READERS:
        raise ValueError(f"there is no bench called {bench!r}; there are: {', '.join(READERS)}")
    read = READERS[bench](text or "", question)
    if question.get("kind") == "na":
        return read, relative_accuracy(read, float(question["answer"]))
    return read, float(read is not None and read == question["answer"])


def reply(bench, turn):
    """The part of a turn that the official rule is applied to. What is cut off is our protocol, not the bench's.

    MindCube judges all that was written, and its own prompts ask for <think> and <answer>. The others expect a model
    whose thoughts are not in its reply; SAT and VSI-Bench moreover a bare answer, without tags.
    """
    if bench == "mindcube":
        return turn
    turn = turn.rsplit("</think>", 1)[-1].strip()
    return re.sub(r"</?answer>", "", turn).strip() if bench in ("sat", "vsi") else turn


def mindcube_letter(text, question=None):
    """MindCube's extraction of A to E, upper case: the first rule that finds anything decides; None if none does.

    The official code stores a reply as one line before it reads it: what its 3a and 4 do with lines is left out.
    """
    text = " ".join(text.split())
    if found := re.findall(r"([A-E])\.", text):  # 1
        return found[-1]
    if "<Answer>" in text:  # 2
        inside = text.split("<Answer>", 1)[1].split("<", 1)[0]
        for pattern in (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b"):
            if found := re.findall(pattern, inside):
                return found[-1]
    for pattern in (
        r"^(?:Answer: )?([A-E])(?:\.|\s|$)",  # 3a
        r"[*\"]([A-E])[*\"]",  # 3b
        r"\bAnswer:?\s*([A-E])\b",  # 3c
        r"[Mm]y answer is ([A-E])",  # 3d
        r"answer is ([A-E])",
    ):  # 3e
        if found := re.findall(pattern, text):
            return found[-1]
    found = re.search(r"\b([A-E])\b", text)  # 4
    return found[1] if found else None


def mmsi_letter(text, question=None):
    """MMSI-Bench's extraction of A to D, upper case: the first one that stands alone and before no word, inside the
    first ``…``, in it the first `…`, in it the first {…}; a span without a letter hides the text around it."""
    for span in (r"``([^`]*)``", r"`([^`]*)`", r"\{([^}]*)\}"):
        if found := re.search(span, text):
            text = found[1]
    found = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return found[0] if found else None


def mmsi_video_letter(text, question=None):
    """MMSI-Video-Bench's extraction of A to F, upper case: the first rule that applies decides, even if it reads
    nothing. Cues are tried in this order, wherever they stand: "The answer is B. Answer: C." reads B."""
    text = text.replace("<answer>", "").replace("</answer>", "")
    cues = [
        cue
        for cue in ('"answer":', "answer is", "answer:", '"Answer":', "Answer is", "Answer:")
        if cue in text
    ]
    if "no answer" in text:  # 1
        return None
    if "boxed{" in text:  # 2
        text = text.split("boxed{")[1].split("}")[0]
    elif cues:  # 3
        text = text.split(cues[0])[-1].split(",")[0].split(".")[0]
    else:  # 4
        text = text.split(".")[0]
    text = re.sub("[ \"'\n:]", "", text)
    return text if text in tuple("ABCDEF") else None


def sat_letter(text, question):
    """SAT's extraction: the letter of the option whose words the reply is, exactly, or None. A letter names no option.

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
    return next(
        (
            option[0]
            for option in question["options"]
            if text == re.sub("[()]", "", option[3:].lower().strip())
        ),
        None,
    )


def vsi_read(text, question):
    """VSI-Bench's extraction: the text before the first blank, as a letter or, where a number is asked for, a float."""
    text = text.split(" ")[0].rstrip(".").strip()
    if question["kind"] == "na":
        return number(text)
    return text.upper() if re.fullmatch("[A-Za-z]", text) else None


def number(text):
    """A finite float, or None."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except ValueError:
        return None


def relative_accuracy(read, gold):
    """VSI-Bench's MRA: the share of ten demands, from 50 % to 95 % right, that a number meets; 0 for None."""
    if read is None:
        return 0.0
    return float(np.mean(abs(read - gold) / gold <= 1 - np.linspace(0.5, 0.95, 10)))


READERS = {
    "rooms": lambda text, question: option_letter(text, question.get("options", ())),
    "mindcube": mindcube_letter,
    "mmsi": mmsi_letter,
    "mmsi_video": mmsi_video_letter,
    "sat": sat_letter,
    "vsi": vsi_read,
}


# ---- the lenient verdict --------------------------------------------------------------------------------------------


def lenient(question, text):
    """A forgiving verdict on all that a turn says (rooms: on the answer) -> (what was read or None, correct).

    Letters: the rule of EASI and VLMEvalKit. Numbers: EASI's, one that begins an <answer>, else the last one after the
    thoughts. SAT: an answer's letter or words, else the only option whose words it holds. Rooms: the official one.
    """
    text = text or ""
    if question["bench"] == "rooms":
        return score("rooms", question, text)
    if question["kind"] == "na":
        numeral = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"
        tagged = re.search(rf"<answer>\s*({numeral})(?:[^\d<][^<]*)?</answer>", text, re.IGNORECASE)
        numbers = [tagged[1]] if tagged else re.findall(numeral, after_thoughts(text))
        read = number(numbers[-1]) if numbers else None
        return read, relative_accuracy(read, float(question["answer"]))
    if question["bench"] == "sat":
        text = re.sub(r"</?answer>", "", after_thoughts(text)).strip()
        held = [option[0] for option in question["options"] if option[3:].lower() in text.lower()]
        read = option_letter(text, question["options"]) or (held[0] if len(held) == 1 else None)
    else:
        read = easi_letter(text)
    return read, float(read is not None and read == question["answer"])


def after_thoughts(text):
    """What follows the last </think>, else the last <think>, else everything."""
    for tag in (r"</\s*think\s*>", r"<\s*think\s*>"):
        if len(parts := re.split(tag, text, flags=re.IGNORECASE)) > 1:
            return parts[-1].strip()
    return text


def easi_letter(text):
    """EASI's extraction of A to F: the first rule that finds a letter decides; None if none does.

    Its Chinese cue words and brackets are left out.
    """
    text = re.sub("[\u200b-\u200d\ufeff]", "", text.strip())  # 1
    if found := re.search(
        r"<\s*answer\b[^>]*>\s*([A-J]).*?<\s*/\s*answer\s*>", text, re.I | re.S
    ):  # 2
        return found[1].upper()
    for tag in ("answer", "think"):  # 3
        before = rf"(?<![A-Za-z])[(\[{{]?\s*([A-F])\s*[)\]}}]?\s*</\s*{tag}\s*>"
        if found := re.search(before, text[-800:], re.I):
            return found[1].upper()
    listed = re.compile(r"[*_>\-\s]*option\s+[A-J]\s*:", re.I)
    for part in (after_thoughts(text), text[-800:]):  # 4, 5
        for line in reversed([line.strip() for line in part.splitlines()[-6:] if line.strip()]):
            if listed.match(line):
                continue
            if found := (
                re.fullmatch(r"[*_`>()\[\]]*\s*([A-Fa-f])\s*[*_`()\[\]]*", line)
                or re.match(r"([A-Fa-f])\s*[.:)\]-]\s+", line)
            ):
                return found[1].upper()
            alone = set(re.findall(r"(?<![A-Za-z])([A-F])\s*[*_`)\]}]*(?=$|[\s.,:;!?)\]])", line))
            if len(alone) == 1:
                return alone.pop()
    cue = r"(?:final\s*answer|the\s*answer\s*is|answer(?:\s*is)?|correct\s*answer)"  # 6
    if found := re.search(cue + r"\s*[:>=]?\s*[(\[{]?\s*([A-F])\s*[)\]}]?(?:\b|[.)])", text, re.I):
        return found[1].upper()
    lines = [line for line in text.splitlines() if not listed.match(line)]  # 7
    alone = set(re.findall(r"(?<![A-Za-z])([A-F])(?![A-Za-z])", "\n".join(lines)))
    return alone.pop() if len(alone) == 1 else None


# ---- prompts --------------------------------------------------------------------------------------------------------

ASK = {
    "mindcube": "Look at the images and answer the question about the space that they show. Reply only with "
    "<answer>X. words of the option</answer>.",
    "mmsi": "Answer directly with the letter of the right option, and put it between double backticks: ``letter``.",
    "vsi mca": "Answer directly with the letter of the right option.",
    "vsi na": "Answer with a single word or phrase.",
    "sat": "Answer with a single word or phrase.",
}


def prompt(question):
    """What the official code asks, as the text before each image and after the last one: (images + 1) strings.

    MMSI-Video-Bench: the record's own words. The others put their images first; the request is ours in words, theirs
    in meaning. None for rooms, which have no prompt but the policy's.
    """
    bench, before = question["bench"], [""] * len(question["images"])
    if bench == "rooms":
        return None
    if bench == "mmsi_video":
        return video_prompt(question)
    if bench == "mindcube":
        return [*before, f"{ASK['mindcube']}\n[Question]\n{question['text']}"]
    if bench == "mmsi":
        return [*before, f"{question['text']}\n{ASK['mmsi']}"]
    if bench == "sat":
        order = SAT_ORDER * (question["type"] == "ego_movement")
        options = " or ".join(f'"{option[3:]}"' for option in question["options"])
        return [*before, f"{order}{question['text']} Choose {options}. {ASK['sat']}"]
    options = ["Options:", *question["options"]] if question["options"] else []
    lines = [
        "These are frames of a video.",
        question["text"],
        *options,
        ASK[f"vsi {question['kind']}"],
    ]
    return [*before, "\n".join(lines)]


def video_prompt(question):
    """MMSI-Video's parts word for word, <video> replaced by the frames of its clip and <image> by its image."""
    parts, clips, pieces = question["parts"], iter(question["clips"]), [""]
    for part in re.split("(<video>|<image>)", parts["user_prompt"]):
        if part in ("<video>", "<image>"):
            pieces += [""] * (next(clips) if part == "<video>" else 1)
        else:
            pieces[-1] += part
    pieces[0] = f"{parts['system_prompt']}\n{parts['task_prompt']}{pieces[0]}"
    pieces[-1] += parts["format_prompt"]
    return pieces


# ---- groups and averages --------------------------------------------------------------------------------------------


def groups(question):
    """The official groups that a question belongs to, from the widest to its category, then sub-benches."""
    category, bench = question["category"], question["bench"]
    if bench == "mmsi":
        return list(dict.fromkeys([category.split(" (")[0], category]))
    if bench == "vsi":
        return list(dict.fromkeys([task(category), category]))
    if bench == "mmsi_video":
        inside = [
            name
            for sub, kind in question["domains"].items()
            for name in ([f"{sub}: {kind}"] if sub == "easy2hard" else [sub, f"{sub}: {kind}"])
        ]
        return list(dict.fromkeys([level(category), category, *inside]))
    return [category]


def level(category):
    """The level of an MMSI-Video type: Perception, Planning, Prediction or Cross-Video."""
    kind = category[1:].split(")")[0] if category.startswith("(") else category
    return "Perception" if kind in ("Spatial Construction", "Motion Understanding") else kind


def error_group(question):
    """Which of the four failures that MMSI-Video's abstract names a wrong answer counts to, or None.

    Told by the type of the question alone, since why an answer is wrong cannot be read off a letter; planning is none
    of the four.
    """
    if question["bench"] != "mmsi_video":
        return None
    return {
        "(Spatial Construction)": "geometric reasoning",
        "(Motion Understanding)": "motion grounding",
        "Prediction": "long-horizon prediction",
        "(Cross-Video)": "cross-video correspondence",
    }.get(re.match(r"\([^)]*\)|.*", question["category"])[0])


def task(category):
    """The task of a VSI-Bench type: three types are one task."""
    return "object_rel_direction" if category.startswith("object_rel_direction_") else category


def weights(bench, categories):
    """What each record's score counts in the official overall; the weights sum to 1.

    Every question the same (MindCube: those of LISTED_ONLY nothing beside others); VSI-Bench: `group_weights`.
    """
    if bench == "vsi":
        return group_weights(categories)
    counted = np.array([category not in LISTED_ONLY for category in categories], float)
    counted = counted if counted.any() else counted + 1
    return counted / counted.sum()


def group_weights(categories):
    """The weights of a mean over groups: every task the same, in it every type, in it every question.

    VSI-Bench's official overall. For SAT some tables print it beside the official one: "give both".
    """
    counts = Counter(categories)  # questions of each type
    types = Counter(map(task, counts))  # types of each task
    return np.array([1 / (len(types) * types[task(c)] * counts[c]) for c in categories])


def chance(question):
    """What a blind guess expects: 1 / number of options; None for a number or where no options could be read."""
    return 1 / len(question["options"]) if question.get("options") else None
