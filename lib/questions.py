"""
Questions about rooms with exact answers, in families (`category`).

A room is seen from a ring of four views. Some questions need a view that is not among them (`needs_view`):

  commanded  "Start from Image-2 and turn 45 degrees to the left. Then which object looks largest?" The words name the
             view: a lesson in obedience. Half of them are answered by a given view
  turning    "Turn until the red object is behind you. Then which object is furthest to the left?" Which image shows red,
             and how far from its middle, must be seen; where it is in the middle, a given view answers
  walking    "... and move 1 meters to the left. Then ...": the second call starts from the view of the first

What a view shows is counted on its instance map (`facts`), and a question is asked only where the answer is clear. After
a turn, a multiple of 15 degrees, the answer must be the same 7.5 degrees to either side, and what is seen with one call
less must say otherwise. The named object is never an option.
"""

from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np

from lib.geometry import Array, Motion, angles_of, compose, move_camera
from lib.protocol import call_of
from lib.rooms import SIZE, Room, render
from lib.simulators import phrase

REGIONS = ("left", "centre", "right")
ASKS = {
    "largest": "which object looks largest?",
    "leftmost": "which object is furthest to the left?",
    "rightmost": "which object is furthest to the right?",
    **{region: f"which object fills most of the {region} third?" for region in REGIONS},
}
VISIBLE = 16  # pixels of 1,024: an object that counts as seen
STEP = 15  # degrees between the angles of objects


# ---- what a view shows -----------------------------------------------------------------------------------------------


def facts(ids: Array, things: int) -> dict:
    """What an instance map (H, W) shows, exactly: {ask: index of the object, None if ambiguous, -1 if there is none;
    "angle": {index of each object that is visible at all: degrees to the right of the middle, a multiple of STEP}}.

    largest: at least 1.3 times the pixels of the next.  leftmost, rightmost: centroids at least 3 of 32 columns
    apart.  left, centre, right: most pixels of that third, at least 2 % of the view and 1.5 times the next.
    """
    width = ids.shape[1]
    scale = width**2 / 1024
    per_column = np.stack([(ids == i + 1).sum(0) for i in range(things)])  # (things, W)
    pixels = per_column.sum(1)
    visible = np.flatnonzero(pixels >= VISIBLE * scale)
    if len(visible) == 0:
        return {ask: -1 for ask in ASKS} | {"angle": {}}

    def winner(scores, ratio=1.0, gap=0):
        """The visible object with the highest score; None if the next one's is nearer than that."""
        order = visible[np.argsort(-scores[visible], kind="stable")]
        first, *others = scores[order]
        if others and (first < ratio * others[0] or first - others[0] < gap):
            return None
        return int(order[0])

    places = (np.arange(width) + 0.5) * 32 / width
    centroid = (per_column * places).sum(1) / np.maximum(pixels, 1)  # (things,) of 32 columns
    answers = {
        "largest": winner(pixels, ratio=1.3),
        "leftmost": winner(-centroid, gap=3),
        "rightmost": winner(centroid, gap=3),
    }
    third = width // 3
    cuts = (0, third, width - third, width)
    for ask, low, high in zip(REGIONS, cuts[:-1], cuts[1:], strict=True):
        inside = per_column[:, low:high].sum(1)
        answers[ask] = winner(inside, ratio=1.5)
        if inside.max() < 6 * scale:
            answers[ask] = -1
        elif answers[ask] is not None and inside[answers[ask]] < 20 * scale:
            answers[ask] = None
    steps = np.round(np.degrees(np.arctan(centroid / 16 - 1)) / STEP).astype(int)
    return answers | {"angle": {int(i): int(steps[i]) * STEP for i in visible}}


def _usable(view_facts, ask):
    """A question is asked where its answer is clear, and a comparison only where there is something to compare."""
    enough = ask in REGIONS or len(view_facts["angle"]) >= 2
    return enough and view_facts[ask] not in (None, -1)


# ---- drafts: questions without pictures ------------------------------------------------------------------------------


class Visit(NamedTuple):
    """A room and its ring of views."""

    room: Room
    poses: list[Array]  # c2w (4, 4) of each
    facts: list[dict]  # of each


def _distractors(rng, room, view_facts, ask, named=None):
    """Three other objects, not the one that the words name: up to two that the asked view shows as well, then others.
    Called by their colour alone: the kind tells the size (a cabinet is more often the largest than a ball)."""
    others = rng.permutation(len(room.things)).tolist()
    others = [i for i in others if i not in (view_facts[ask], named)]
    first = [i for i in others if i in view_facts["angle"]][:2]
    rest = [i for i in others if i not in first]
    return [room.things[i].colour for i in (first + rest)[:3]]


# ---- commanded: the words name the view ------------------------------------------------------------------------------

UNSEEN = [Motion("dangle", amount) for amount in (-45.0, -135.0, 45.0, 135.0)]
UNSEEN += [Motion("dx", -1.0), Motion("dx", 1.0), Motion("dy", 1.0)]
RING_TURNS = {  # and how many views further in the ring each leads
    Motion("dangle", -90.0): 1,
    Motion("dangle", 90.0): 3,
    Motion("dangle", -180.0): 2,
}


def commanded(rng: np.random.Generator, visit: Visit) -> list[dict]:
    """One question: in half of the rooms it needs an unseen view; the given views answer the others, after a turn that
    ends at one of them (one in five) or as they stand."""
    form = "unseen" if rng.random() < 0.5 else str(rng.choice(["image", "rotation"], p=[0.8, 0.2]))
    draft = _object_question(rng, visit, form)
    return [draft] if draft else []  # a bare room has nothing clear to ask


def _object_question(rng, visit, form):
    """A question about objects: "unseen" (after a motion that leads to a view not given), "rotation" or "image"."""
    motions = {"unseen": UNSEEN, "rotation": list(RING_TURNS), "image": [None]}[form]
    room = visit.room
    for _ in range(40):
        k = int(rng.integers(4))
        ask = str(rng.choice(list(ASKS), p=[1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]))
        motion = motions[rng.integers(len(motions))]
        shown_by = None
        if form == "unseen":
            target = move_camera(visit.poses[k], motion)
            there = facts(render(room, target, SIZE, supersample=1)["ids"][0], len(room.things))
            if visit.facts[k][ask] in (None, there[ask]):
                continue  # the image itself says nothing, or the same
        else:
            shown_by = 1 + (k + RING_TURNS.get(motion, 0)) % 4
            there = visit.facts[shown_by - 1]
        if not _usable(there, ask):
            continue
        start = f"In Image-{k + 1},"
        if motion:
            start = f"Start from Image-{k + 1} and {phrase(motion)}. Then"
        return {
            "question": f"{start} {ASKS[ask]}",
            "needs_view": form == "unseen",
            "ask": ask,
            "shown_by": shown_by,
            "ideal": [call_of(k + 1, motion)] if motion else [],
            "answer": room.things[there[ask]].colour,
            "others": _distractors(rng, room, there, ask),
        }
    return None


# ---- turning and walking: the view must be found ---------------------------------------------------------------------

# Where the named object is to be: how many views further the turn starts, and what is asked then. With the object on
# the left nobody asks who is furthest left: only a turn further to the left would change that. On the right likewise.
RELATIONS = {
    "straight ahead": (0, ("largest",)),
    "behind you": (2, ("largest", "leftmost", "rightmost")),
    "on your left": (3, ("largest", "rightmost")),
    "on your right": (1, ("largest", "leftmost")),
}
STEPS = (Motion("dx", -1.0), Motion("dx", 1.0))
TURN_SLACK = 7.5  # degrees to either side that may change nothing
FURTHEST = 30  # degrees: an object at 45 stands between two images


class Place(NamedTuple):
    """Where an object is seen."""

    named: int  # its index
    k: int  # index of the one view that shows it
    angle: int  # degrees to the right of its middle, a multiple of STEP
    exact: float  # the same, not rounded


def _places(visit):
    """The objects that one view alone shows, near a multiple of STEP."""
    eye = visit.poses[0][:3, 3]
    places = []
    for i, thing in enumerate(visit.room.things):
        bearing = np.degrees(np.arctan2(thing.x - eye[0], thing.z - eye[2]))
        views = [k for k, view in enumerate(visit.facts) if i in view["angle"]]
        for k in views if len(views) == 1 else []:
            exact = (bearing - angles_of(visit.poses[k])[0] + 180) % 360 - 180
            angle = visit.facts[k]["angle"][i]
            if abs(exact - angle) <= 5 and abs(angle) <= FURTHEST:
                places.append(Place(i, k, angle, exact))
    return places


def turning(
    rng: np.random.Generator, visit: Visit, steps: tuple = (None,), most: int = 2
) -> list[dict]:
    """Up to `most` questions with a turn to be found, and as many where the named object is where it should be already.

    steps   moves, one of which follows the turn
    """
    variants = list(product(_places(visit), RELATIONS, steps))
    drafts = {True: [], False: []}
    for i in rng.permutation(len(variants)):
        group = drafts[variants[i][0].angle != 0]
        draft = _turned_question(rng, visit, *variants[i]) if len(group) < most else None
        if draft:
            group.append(draft)
    return drafts[True] + drafts[False]


def _turned_question(rng, visit, place, relation, step):
    """A question that turns until an object is somewhere, then takes a step, if any; None if no answer is clear."""
    further, asks = RELATIONS[relation]
    k = (place.k + further) % 4
    angle = place.angle
    one_less = [(0, step)] if angle else []  # what is seen with one call less must say otherwise
    if step:
        one_less.append((angle, None))
    there, *one_less = _look(visit, k, [(angle, step), *one_less])
    clear = []
    for ask in ASKS if step else asks:
        otherwise = all(view[ask] not in (None, there[ask]) for view in one_less)
        if _usable(there, ask) and there[ask] != place.named and otherwise:
            clear.append(ask)
    around = [(turn, step) for turn in (angle - TURN_SLACK, angle + TURN_SLACK, place.exact)]
    around = _look(visit, k, around) if clear else []
    clear = [ask for ask in clear if all(view[ask] == there[ask] for view in around)]
    if not clear:
        return None
    ask = str(rng.choice(clear))
    ideal = [call_of(k + 1, Motion("dangle", float(angle)))] if angle else []
    words = f"Turn until the {visit.room.things[place.named].colour} object is {relation}"
    if step:
        ideal.append(call_of(len(visit.poses) + 1 if ideal else k + 1, step))
        words += f" and {phrase(step)}"
    return {
        "question": f"{words}. Then {ASKS[ask]}",
        "needs_view": bool(ideal),
        "ask": ask,
        "named": visit.room.things[place.named].colour,
        "relation": relation,
        "shown_by": None if ideal else k + 1,
        "ideal": ideal,
        "answer": visit.room.things[there[ask]].colour,
        "others": _distractors(rng, visit.room, there, ask, place.named),
    }


def _look(visit, k, turns_and_steps):
    """The facts of what is seen from view k after each of several turns (degrees) with a step, if any."""
    cameras = []
    for turn, step in turns_and_steps:
        camera = compose(visit.poses[k], (0, 0, 0, turn, 0))
        cameras.append(move_camera(camera, step) if step else camera)
    ids = render(visit.room, np.stack(cameras), SIZE, supersample=1)["ids"]
    return [facts(view, len(visit.room.things)) for view in ids]


# walking always needs a view: with half as many questions of it, some four in ten of all need none
FAMILIES = {
    "commanded": commanded,
    "turning": turning,
    "walking": partial(turning, steps=STEPS, most=1),
}
