"""
World2VLM's reward (arXiv 2604.26934, Stage II): what an answer about a camera motion is worth.

  A1, A2       0.10 format + 0.35 action + 0.55 numeric
  A3, D3       max(0, 0.10 format + 0.25 action + 0.35 order + 0.30 numeric - 0.03 max(0, n - m))
  A4, D2, D4   0.20 format + 0.80 accuracy
  D1           0.20 format + 0.15 validity + 0.65 geometry

    world2vlm("A1", "move forward 4.3 meters", "move forward 2 meters")    # {"total": 0.75, "format": 1.0, ...}

Where the released code differs from the paper we follow the paper:
  length        of the response as it comes; released: without outer white space (which our dialogues cut off, too)
  box corners   put in order and into the picture first, then judged; released: the corners as written, so that an
                exact box with swapped corners earns 0.58 instead of 1
  exact box     "[a, b, c, d]" alone; released: also with the word bbox before it
  size, centre  as defined; released: sides count as at least 1, so that a box without width has a size
  yes or no     format looks at the response alone; released: a reference that is neither earns 0 for everything
As in the released code: minus signs, decimals in boxes and "meter" are read, the first box counts, and an action counts
wherever it stands ("remove forward 2 meters").
"""

from collections import Counter

import numpy as np

from extras.world2vlm.words import read_actions, read_box, read_truth

MAX_LENGTH = 200  # characters of a response
TOO_LONG = -1.0  # its total beyond that: of the released code; the paper says "the minimum"
# |v - v*| in metres or degrees: full marks up to the first, none from the second on
TOLERANCE = {"move": (0.5, 5.0), "turn": (5.0, 90.0)}
EXTRA_ACTION = 0.03  # the fee per action too many
BOX_PARTS = ("total", "format", "validity", "geometry", "iou", "center", "size", "l1")
FULL = 1 - 1e-6  # a total above it is 1 up to rounding


def world2vlm(task: str, answer: str, response: str | None) -> dict[str, float]:
    """Score a response to one of the tasks A1-A4, D1-D4 by the paper's equations.

    answer     the reference, as extras/world2vlm/words.py writes it: "move left 0.5 meters; turn left 20 degrees",
               "true", "[48, 558, 226, 681]"
    response   what stands between <answer> and </answer>, thoughts are free (ours); None for nothing. Whatever
               it is, it raises nothing
    returns    {"total", "format", and
                 A1, A2: "action", "numeric";  A3, D3: "action", "order", "numeric";  A4, D2, D4: "accuracy";
                 D1: "validity", "geometry", "iou", "center", "size", "l1"}
               all in [0, 1], but total is -1 (and the parts 0) where the response is longer than 200 characters
    raises     ValueError for an unknown task, or a reference without action or box
    """
    if task not in SCORES:
        raise ValueError(f"there is no task {task!r}; the tasks are: {', '.join(SCORES)}")
    response = response or ""
    if len(response) > MAX_LENGTH:
        return dict.fromkeys(SCORES[task](answer, ""), 0.0) | {"total": TOO_LONG}
    return SCORES[task](answer, response)


def numeric(kind, value, true_value):
    """s(v, v*): 1 within the first tolerance, 0 beyond the second, a straight line between. Angles do not wrap."""
    low, high = TOLERANCE[kind.split()[0]]
    return min(1.0, max(0.0, (high - abs(value - true_value)) / (high - low)))


def score_action(answer, response):
    """A1, A2: each term is the best of all actions that the response names (a weakness of the paper's)."""
    true_kind, true_value = true_actions(answer)[0]
    actions = read_actions(response)
    values = [value for kind, value in actions if kind == true_kind]
    form = float(bool(actions))
    action = float(bool(values))
    number = max((numeric(true_kind, value, true_value) for value in values), default=0.0)
    total = 0.10 * form + 0.35 * action + 0.55 * number
    return {"total": total, "format": form, "action": action, "numeric": number}


def score_sequence(answer, response):
    """A3, D3: m true actions and n in the response.

    action           kinds in common, order aside, over max(n, m)
    order, numeric   right kinds, and right amounts of these, at their places, over m
    """
    true, actions = true_actions(answer), read_actions(response)
    n, m = len(actions), len(true)
    common = Counter(kind for kind, _ in actions) & Counter(kind for kind, _ in true)
    right, close = 0, 0.0
    for (kind, value), (true_kind, true_value) in zip(actions, true, strict=False):
        if kind == true_kind:
            right += 1
            close += numeric(kind, value, true_value)
    form = float(n > 0)
    action = common.total() / max(n, m)
    order, number = right / m, close / m
    total = 0.10 * form + 0.25 * action + 0.35 * order + 0.30 * number
    total = max(0.0, total - EXTRA_ACTION * max(0, n - m))
    return {"total": total, "format": form, "action": action, "order": order, "numeric": number}


def true_actions(answer):
    """The actions of a reference; ValueError if there is none."""
    actions = read_actions(answer)
    if not actions:
        raise ValueError(f"the reference {answer!r} names no action such as 'turn left 20 degrees'")
    return actions


def score_truth(answer, response):
    """A4, D2, D4: the response must be yes, true, no or false and nothing else."""
    truth = read_truth(response)
    form = float(truth is not None)
    right = form * (truth == read_truth(answer))
    return {"total": 0.20 * form + 0.80 * right, "format": form, "accuracy": right}


def score_box(answer, response):
    """D1: format is 1 for a box alone, 0.4 for one within other words. Without a box everything is 0.

    validity = 0.7 [x1 < x2 and y1 < y2] + 0.3 max(0, 1 - overflow / 200)
    geometry = (0.45 IoU + 0.20 center + 0.20 L1 + 0.15 size) (0.3 + 0.7 validity)
    center   = max(0, 1 - distance of the centres / max(80, 0.6 diagonal of the true box))
    """
    true, _ = read_box(answer)
    if true is None:
        raise ValueError(f"the reference {answer!r} is not a box such as '[48, 558, 226, 681]'")
    box, alone = read_box(response)
    if box is None:
        return dict.fromkeys(BOX_PARTS, 0.0)
    form = 1.0 if alone else 0.4
    box, true = np.array(box), corners(true)
    overflow = np.abs(box - box.clip(0, 1000)).mean()
    box = corners(box)
    sides, true_sides = box[1] - box[0], true[1] - true[0]  # (width, height)
    valid = 0.7 * (sides.min() > 0) + 0.3 * max(0, 1 - overflow / 200)

    shared = (np.minimum(box[1], true[1]) - np.maximum(box[0], true[0])).clip(0).prod()
    union = sides.prod() + true_sides.prod() - shared
    iou = shared / union if union > 0 else 0.0
    apart = np.linalg.norm(box.mean(0) - true.mean(0))
    center = max(0, 1 - apart / max(80, 0.6 * np.linalg.norm(true_sides)))
    l1 = max(0, 1 - np.abs(box - true).mean() / 180)
    size = 0.0
    if min(sides.min(), true_sides.min()) > 0:
        size = max(0, 1 - np.abs(np.log(sides / true_sides)).sum() / 1.6)
    geometry = (0.45 * iou + 0.20 * center + 0.20 * l1 + 0.15 * size) * (0.3 + 0.7 * valid)
    total = 0.20 * form + 0.15 * valid + 0.65 * geometry
    values = (total, form, valid, geometry, iou, center, size, l1)
    return dict(zip(BOX_PARTS, map(float, values), strict=True))


def corners(box) -> np.ndarray:
    """x1, y1, x2, y2 -> [[left, top], [right, bottom]], in order and within 0..1000."""
    return np.sort(np.reshape(box, (2, 2)).clip(0, 1000), axis=0)


SCORES = {
    "A1": score_action,
    "A2": score_action,
    "A3": score_sequence,
    "A4": score_truth,
    "D1": score_box,
    "D2": score_truth,
    "D3": score_sequence,
    "D4": score_truth,
}
