"""
What World2VLM (arXiv 2604.26934) asks and answers, word by word: prompts, actions, claims and boxes as text, and back.

  inverse   two pictures -> actions           A1 how far it moved   A2 how far it turned   A3 all   D3 from a box pair
  forward   a picture, actions -> the other   A4 is this claim true   D1 the new box   D2 is it gone   D4 is it the same
"""

import re

TASKS = ("A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4")
INVERSE = ("A1", "A2", "A3", "D3")  # the others are forward
GRID = {"meters": 0.1, "degrees": 10}  # of every amount


# ---- actions and boxes -----------------------------------------------------------------------------------------------


def action_text(motion):
    """ "move forward 4.3 meters", "turn left 100 degrees": at most three decimals, no trailing zeros."""
    return f"{motion.kind} {f'{motion.amount:.3f}'.rstrip('0').rstrip('.')} {motion.unit}"


def program_text(program):
    return "; ".join(map(action_text, program))


def claim_text(program):
    """One action "a", two "a and b", three "a, b and c"."""
    *before, last = map(action_text, program)
    return f"{', '.join(before)} and {last}" if before else last


def tidy(text):
    """Lower case, one space for each run of white space, and none of it, nor . , ; : ! ? " at the end."""
    return " ".join(text.lower().split()).rstrip('.,;:!?" ')


def on_grid(motion):
    """Whether its amount is a multiple of 0.1 m or 10 degrees."""
    steps = motion.amount / GRID[motion.unit]
    return abs(steps - round(steps)) < 1e-6


NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
ACTION = re.compile(
    rf"move (forward|backward|left|right) {NUMBER} meters?|turn (left|right) {NUMBER} degrees?"
)
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([NUMBER] * 4) + r"\s*\]")


def read_actions(text):
    """All actions that occur in a text, in order: [(kind, amount)]. Amounts may be anything, even negative."""
    return [
        (f"move {way}", float(meters)) if way else (f"turn {side}", float(degrees))
        for way, meters, side, degrees in ACTION.findall(tidy(text))
    ]


def read_truth(text):
    """yes, true -> True; no, false -> False; any other text -> None."""
    return {"yes": True, "true": True, "no": False, "false": False}.get(tidy(text))


def box_text(box, width, height):
    """Pixels (x1, y1, x2, y2) -> "[48, 558, 226, 681]", thousandths of the picture's sides."""
    whole = (round(1000 * v / side) for v, side in zip(box, (width, height, width, height)))
    return f"[{', '.join(str(min(max(v, 0), 1000)) for v in whole)}]"


def read_box(text):
    """The first [a, b, c, d] of a text -> (four floats, whether it is the whole text); (None, False) without one."""
    match = BOX.search(text)
    return (
        ([float(v) for v in match.groups()], match[0] == text.strip()) if match else (None, False)
    )


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
# What prompts and answers say beside objects, boxes and actions, for the tiny tokenizer: a prompt takes 64 to 276 in
# letters and 1 to 47 in these pieces.
PIECES = (
    *dict.fromkeys(
        piece
        for prompt in PROMPTS.values()
        for piece in re.split(r" ?{object}|{\w+}", prompt)
        if piece
    ),
    "; ",
    "yes",
    "no",
    "true",
    "false",
)
COUNTS = {"A1": (1,), "A2": (1,), "A3": (2, 3), "D3": (1, 2)}  # actions of an answer
