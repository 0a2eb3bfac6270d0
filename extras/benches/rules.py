"""Names of before, with rooms among the benches, until evaluate.py and lib/scores.py ask extras/benches/common.py."""

from extras.benches import common
from extras.benches.common import BENCHES as PUBLISHED
from extras.benches.common import LISTED_ONLY, load, open_image, reply, weights  # noqa: F401
from extras.benches.mmsi_video import error_group, level  # noqa: F401
from extras.benches.vsi import group_weights  # noqa: F401
from lib.answers import option_letter

BENCHES = ("rooms", *PUBLISHED)
FRAMES = {bench.name: bench.frames for bench in PUBLISHED.values() if bench.frames}


def score(bench, question, text):
    if bench != "rooms":
        return common.score(bench, question, text)
    read = option_letter(text or "", question.get("options", ()))
    return read, float(read is not None and read == question["answer"])


def lenient(question, text):
    if question["bench"] == "rooms":
        return score("rooms", question, text)
    return common.lenient(question, text)


def prompt(question):
    return None if question["bench"] == "rooms" else common.prompt(question)


def groups(question):
    return common.groups(question) if question["bench"] in PUBLISHED else [question["category"]]


def chance(question):
    return 1 / len(question["options"]) if question.get("options") else None
