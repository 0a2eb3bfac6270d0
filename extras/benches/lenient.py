"""
The lenient reading of a reply: the rule of EASI and VLMEvalKit, to stand beside a bench's official one, never for it.
"""

import re

from extras.benches.vsi import finite
from rewards import option_letter

NUMERAL = r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?"
LETTER = r"[(\[{]?\s*([A-F])\s*[)\]}]?"  # maybe in brackets
ANSWER_BLOCK = re.compile(r"<\s*answer\b[^>]*>\s*([A-J]).*?<\s*/\s*answer\s*>", re.I | re.S)
BEFORE_ANSWER = re.compile(rf"(?<![A-Za-z]){LETTER}\s*</\s*answer\s*>", re.I)
BEFORE_THINK = re.compile(rf"(?<![A-Za-z]){LETTER}\s*</\s*think\s*>", re.I)
CUE = re.compile(
    r"(?:final\s*answer|the\s*answer\s*is|answer(?:\s*is)?|correct\s*answer)"
    rf"\s*[:>=]?\s*{LETTER}(?:\b|[.)])",
    re.I,
)
LISTED = re.compile(r"[*_>\-\s]*option\s+[A-J]\s*:", re.I)  # a line that repeats an option
TAIL = 800  # letters at the end of a reply that are looked at once more


def lenient_reading(text: str, question: dict) -> str | float | None:
    """What a turn says, by a forgiving rule: a letter, or a number where one is asked for; None if nothing is read.

    Numbers: EASI's, one that begins an <answer>, else the last one after the thoughts. SAT: an answer's letter or
    words, else the only option whose words it holds.
    """
    if question["kind"] == "na":
        return easi_number(text)
    if question["bench"] != "sat":
        return easi_letter(text)
    text = re.sub(r"</?answer>", "", after_thoughts(text)).strip()
    if letter := option_letter(text, question["options"]):
        return letter
    inside = [option[0] for option in question["options"] if option[3:].lower() in text.lower()]
    return inside[0] if len(inside) == 1 else None


def easi_number(text: str) -> float | None:
    """EASI's number: one that begins an <answer>, else the last one after the thoughts."""
    tagged = re.search(rf"<answer>\s*({NUMERAL})(?:[^\d<][^<]*)?</answer>", text, re.IGNORECASE)
    if tagged:
        return finite(tagged[1])
    numbers = re.findall(NUMERAL, after_thoughts(text))
    return finite(numbers[-1]) if numbers else None


def after_thoughts(text: str) -> str:
    """What follows the last </think>, else the last <think>, else everything."""
    for tag in (r"</\s*think\s*>", r"<\s*think\s*>"):
        *before, last = re.split(tag, text, flags=re.IGNORECASE)
        if before:
            return last.strip()
    return text


def easi_letter(text: str) -> str | None:
    """EASI's extraction of A to F: the first rule that finds a letter decides; None if none does.

    Its Chinese cue words and brackets are left out.
    """
    text = re.sub("[\u200b-\u200d\ufeff]", "", text.strip())  # 1
    tail = text[-TAIL:]
    tagged = ANSWER_BLOCK.search(text)  # 2
    tagged = tagged or BEFORE_ANSWER.search(tail) or BEFORE_THINK.search(tail)  # 3
    if tagged:
        return tagged[1].upper()
    letter = letter_of_last_lines(after_thoughts(text)) or letter_of_last_lines(tail)  # 4, 5
    if letter:
        return letter
    if cued := CUE.search(text):  # 6
        return cued[1].upper()
    lines = [line for line in text.splitlines() if not LISTED.match(line)]  # 7
    return the_only(re.findall(r"(?<![A-Za-z])([A-F])(?![A-Za-z])", "\n".join(lines)))


def letter_of_last_lines(text: str) -> str | None:
    """Of the last six lines, from below, the first that is or begins with a letter, or holds one that stands alone."""
    for line in reversed(text.splitlines()[-6:]):
        line = line.strip()
        if LISTED.match(line):
            continue
        bare = re.fullmatch(r"[*_`>()\[\]]*\s*([A-Fa-f])\s*[*_`()\[\]]*", line)
        first = bare or re.match(r"([A-Fa-f])\s*[.:)\]-]\s+", line)
        if first:
            return first[1].upper()
        alone = re.findall(r"(?<![A-Za-z])([A-F])\s*[*_`)\]}]*(?=$|[\s.,:;!?)\]])", line)
        if letter := the_only(alone):
            return letter
    return None


def the_only(letters: list[str]) -> str | None:
    """The letter of a list that holds no other."""
    return letters[0] if len(set(letters)) == 1 else None
