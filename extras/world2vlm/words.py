"""
What World2VLM (arXiv 2604.26934) asks and answers, word by word: prompts, actions, claims and boxes as text, and back.

  inverse   two pictures -> actions           A1 how far it moved   A2 how far it turned   A3 all   D3 from a box pair
  forward   a picture, actions -> the other   A4 is this claim true   D1 the new box   D2 is it gone   D4 is it the same
"""

import re

from lib.geometry import Motion

TASKS = ("A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4")
INVERSE = ("A1", "A2", "A3", "D3")  # the others are forward


# ---- actions and boxes -----------------------------------------------------------------------------------------------


ACTIONS = {  # the paper's words -> kind of motion and sign
    "move forward": ("dy", 1),
    "move backward": ("dy", -1),
    "move left": ("dx", -1),
    "move right": ("dx", 1),
    "turn left": ("dangle", -1),
    "turn right": ("dangle", 1),
}
ACTION_OF_WAY = {way: action for action, way in ACTIONS.items()}


def motion_of(action: str, amount: float) -> Motion:
    """The Motion of an action with an amount above zero."""
    kind, sign = ACTIONS[action]
    return Motion(kind, sign * float(amount))


def action_of(motion: Motion) -> str:
    """What the paper calls a motion: "move left"."""
    return ACTION_OF_WAY[motion.kind, 1 if motion.amount > 0 else -1]


def action_text(motion: Motion) -> str:
    """ "move forward 4.3 meters", "turn left 100 degrees": at most three decimals, no trailing zeros."""
    amount = f"{abs(motion.amount):.3f}".rstrip("0").rstrip(".")
    return f"{action_of(motion)} {amount} {motion.unit}"


def program_text(program: list[Motion]) -> str:
    return "; ".join(map(action_text, program))


def claim_text(program: list[Motion]) -> str:
    """One action "a", two "a and b", three "a, b and c"."""
    *before, last = map(action_text, program)
    return f"{', '.join(before)} and {last}" if before else last


def tidy(text: str) -> str:
    """Lower case, one space for each run of white space, and none of it, nor . , ; : ! ? " at the end."""
    return " ".join(text.lower().split()).rstrip('.,;:!?" ')


NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
ACTION = re.compile(
    rf"move (forward|backward|left|right) {NUMBER} meters?|turn (left|right) {NUMBER} degrees?"
)
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([NUMBER] * 4) + r"\s*\]")


def read_actions(text: str) -> list[tuple[str, float]]:
    """All actions that occur in a text, in order: [(action, amount)]. Amounts may be anything, even negative."""
    actions = []
    for way, meters, side, degrees in ACTION.findall(tidy(text)):
        actions.append((f"move {way}", float(meters)) if way else (f"turn {side}", float(degrees)))
    return actions


def read_truth(text: str) -> bool | None:
    """yes, true -> True; no, false -> False; any other text -> None."""
    return {"yes": True, "true": True, "no": False, "false": False}.get(tidy(text))


def box_text(box) -> str:
    """A box in shares of the picture (x1, y1, x2, y2) -> "[48, 558, 226, 681]", thousandths of its sides."""
    whole = [min(max(round(1000 * share), 0), 1000) for share in box]
    return f"[{', '.join(map(str, whole))}]"


def read_box(text: str) -> tuple[list[float] | None, bool]:
    """The first [a, b, c, d] of a text -> (four floats, whether it is the whole text); (None, False) without one."""
    match = BOX.search(text)
    if match is None:
        return None, False
    return [float(v) for v in match.groups()], match[0] == text.strip()


# ---- prompts --------------------------------------------------------------------------------------------------------

ALLOWED = "\n- move forward/backward/left/right X meters\n- turn left/right X degrees"
PROMPTS = {  # released: A1 and A2 say the true direction in place of the alternatives
    "A1": "How many meters did the camera move to get the second image? "
    "Answer as: move forward/backward/left/right X meters.",
    "A2": "How many degrees did the camera turn to get the second image? Answer as: turn left/right X degrees.",
    "A3": "To move from the first image to the second image, the camera used 2 or 3 actions in order. Write the full "
    "action sequence using ';' as a separator. Allowed actions:" + ALLOWED,
    "A4": 'True or false: the camera did "{claim}" to get the second image.',
    "D1": "In the first image, the {object} is at bbox {box1}. Bboxes use normalized integer coordinates in [0,1000]. "
    'After the camera does "{sequence}", give the bbox of the same {object} in the second image. Answer with '
    "bbox [x1, y1, x2, y2] only.",
    "D2": 'In the image, the {object} is at bbox {box1}. After the camera does "{sequence}", does this {object} '
    "disappear from view? Answer: yes or no.",
    "D3": "The {object} in the first image (bbox {box1}) and the {object} in the second image (bbox {box2}) are the "
    "same physical object. The camera used 1 or 2 actions in order. Write the full action sequence using ';' as "
    "a separator. Allowed actions:" + ALLOWED,
    "D4": 'In the first image, the {object} is at bbox {box1}. After the camera does "{sequence}", the second image '
    "shows a {object} at bbox {box2}. Are these the same physical object instance? Answer: yes or no.",
}
COUNTS = {"A1": (1,), "A2": (1,), "A3": (2, 3), "D3": (1, 2)}  # actions of an answer
