"""
Why an answer is right or wrong, after the failure modes that the paper names, where a room gives the truth.

`reads` takes from a picture, by its colours, what the question asks for: on 98 % of true views it is the right answer.
Of a call it is asked, in this order:
  useful   its motion, carried out exactly, leads where the question asks (to within 0.25 m and 10 degrees), or to
           another view that shows the right answer
  shows    it is useful, and the imagined view reads like the right answer, or (where the question asks) as the true
           view does

The case of a dialogue is the first that holds.
  right answers
    resolved     an unseen view was needed, and a call has shown the answer
    guessed      an unseen view was needed, and no view has shown the answer
    unaided      the given images answer the question
  wrong answers
    no_answer    the dialogue ended without the name of an option
    under_use    an unseen view was needed, and nothing was imagined
    ignored      an unseen view was needed, a call has shown the answer, and another was given
    trusted      a useful call was made, its view is wrong, and the answer is what the wrong view shows; or the given
                 images answer the question, and the answer is what an imagined view shows instead
    deviates     a useful call was made, its view is wrong, and the answer is yet another
    confused     no call was useful, and one makes a motion of the ideal calls, from another image; or the given
                 images answer the question, and the answer is what another one of them shows. (One of three other
                 images may show it by chance: an upper bound)
    off_target   calls were made, and none was useful: the target is not in the view
    misread      the given images answer the question, and none of the above

Beside the case: `use`, whether a view was needed and whether one was imagined; and of useful calls that did not show
the answer `deviation`: "pose" if the last such view was taken from somewhere else than commanded, else "content".
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.consistency import MOVE_BARS, STRONG, TURN_BARS, delta_of, describe, pose_error, recover
from lib.dialogue import Trajectory
from lib.geometry import Motion, Query, decompose
from lib.protocol import call_poses, motion_in
from lib.records import Question
from lib.rooms import COLOURS, SIZE, Room, TrueRenderer, random_room
from lib.simulators import instruction
from rewards import option_letter

CASES = {
    "resolved": "right: a view was needed, and a call showed the answer",
    "guessed": "right: a view was needed, and none showed the answer",
    "unaided": "right: the given images answer the question",
    "no_answer": "wrong: no option was named",
    "under_use": "wrong: a view was needed, and nothing was imagined",
    "ignored": "wrong: a call showed the answer",
    "trusted": "wrong: the answer is what a wrong view shows",
    "deviates": "wrong: the view is wrong, and the answer another",
    "confused": "wrong: the right motion from another image, or what another image shows",
    "off_target": "wrong: no call led to a view that shows the answer",
    "misread": "wrong: the given images answer the question",
}
USES = {
    (True, True): "needed, called",
    (True, False): "under-use: needed, not called",
    (False, True): "over-use: not needed, called",
    (False, False): "not needed, not called",
}


class UsefulCall(NamedTuple):
    """A call that leads to a view with the answer, what its imagined view reads like, and whether that is right."""

    call: dict
    view: np.ndarray
    reading: str
    shows: bool


def true_views(question: Question, calls: list[dict]) -> list[np.ndarray]:
    """What the true renderer would have shown after every call -> [(SIZE, SIZE, 3)]; [] if no room is known."""
    scene = question.get("scene")
    if not scene or not calls:
        return []
    room = {"room": scene["room"], "poses": call_poses(scene, calls).tolist()}
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    queries = []
    for call in calls:
        sentence = instruction(motion_in(call))
        queries.append(Query([blank], call["reference_image"], sentence, 0, room))
    return TrueRenderer().imagine(queries)


def reads(view: np.ndarray, ask: str) -> str:
    """What a view (H, W, 3) shows of an `ask` of lib/questions.py: a colour of COLOURS, or "none"."""
    count, middle, dominant = (values[0] for values in describe(view[None]))
    if ask in ("left", "centre", "right"):
        colour = dominant[("left", "centre", "right").index(ask)]
    elif count.max() < STRONG:
        colour = -1
    else:
        score = {"largest": count, "leftmost": -middle, "rightmost": middle}[ask]
        colour = np.where(count >= STRONG, score, -np.inf).argmax()
    return "none" if colour < 0 else list(COLOURS)[colour]


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two cameras stand within the thresholds of lib/consistency.py: 0.25 m and 10 degrees."""
    delta = decompose(a, b)
    meters, _ = MOVE_BARS["within"]
    degrees, _ = TURN_BARS["within"]
    return bool(np.linalg.norm(delta[:3]) <= meters and np.abs(delta[3:]).max() <= degrees)


def error_of_view(room: Room, start: np.ndarray, motion: Motion, view: np.ndarray) -> dict:
    """`consistency.pose_error` of a view (H, H, 3) of a room after a motion of the camera from `start`."""
    small = np.asarray(Image.fromarray(view).resize((SIZE, SIZE), Image.BOX))
    motions = recover(room, start, small[None])
    return pose_error(delta_of(motion), motions[0])


def diagnose(question: Question, trajectory: Trajectory) -> dict | None:
    """Why a dialogue of any mode with a tool is right or wrong -> {"case": of CASES, "use": of USES, "deviation"}.

    None for direct mode and for questions that do not tell what their views show.
    """
    if trajectory.mode == "direct" or "shows" not in question:
        return None
    scene = question["scene"]
    calls = [call for call in trajectory.provenance if call]
    views = trajectory.images[len(trajectory.images) - len(calls) :]
    letter = option_letter(trajectory.answer or "", question["options"])
    words = {option[0]: option[3:] for option in question["options"]}.get(letter)
    right = letter == question["answer"]
    needed = bool(question["needs_view"])
    result = {"case": None, "use": USES[needed, bool(calls)], "deviation": None}
    if not needed:
        return result | {"case": case_of_answerable(question, views, words, right)}
    useful = useful_calls(question, calls, views)
    answer_was_shown = any(one.shows for one in useful)
    if useful and not answer_was_shown:
        last = useful[-1]
        start = call_poses(scene, calls)[last.call["reference_image"] - 1]
        error = error_of_view(random_room(scene["room"]), start, motion_in(last.call), last.view)
        result["deviation"] = "content" if error["within"] else "pose"
    return result | {"case": case_of_unseen(question, calls, useful, words, right)}


def case_of_answerable(question: Question, views: list, words: str | None, right: bool) -> str:
    """The case where the given images answer the question; `words` of the option that was named, if any."""
    if right:
        return "unaided"
    if words is None:
        return "no_answer"
    ask = question["ask"]
    if words in [reads(view, ask) for view in views]:
        return "trusted"
    others = [facts[ask] for facts in question["shows"][: len(question["scene"]["poses"])]]
    if question["shown_by"] is not None:
        others.pop(question["shown_by"] - 1)
    return "confused" if words in others else "misread"


def useful_calls(question: Question, calls: list[dict], views: list) -> list[UsefulCall]:
    """The calls that lead where the question asks, or to another view that shows the right answer."""
    ask = question["ask"]
    gold = question["options"]["ABCD".index(question["answer"])][3:]
    goal = call_poses(question["scene"], question["ideal"])[-1]
    poses = call_poses(question["scene"], calls)
    ends = poses[len(poses) - len(calls) :]
    useful = []
    for c2w, call, view, true in zip(ends, calls, views, true_views(question, calls), strict=True):
        answers = {gold}
        if near(goal, c2w):
            answers.add(reads(true, ask))
        if reads(true, ask) in answers:
            reading = reads(view, ask)
            useful.append(UsefulCall(call, view, reading, reading in answers))
    return useful


def case_of_unseen(
    question: Question, calls: list, useful: list[UsefulCall], words: str | None, right: bool
) -> str:
    """The case where a view is needed that is not given."""
    answer_was_shown = any(one.shows for one in useful)
    if right:
        return "resolved" if answer_was_shown else "guessed"
    if words is None:
        return "no_answer"
    if not calls:
        return "under_use"
    if answer_was_shown:
        return "ignored"
    if useful:
        return "trusted" if words in [one.reading for one in useful] else "deviates"
    motions = set(map(motion_in, question["ideal"]))
    return "off_target" if motions.isdisjoint(map(motion_in, calls)) else "confused"


def tally(records: list[dict]) -> dict | None:
    """Counts of cases, uses and deviations over records with a "diagnosis", or None if none has one."""
    diagnoses = [record["diagnosis"] for record in records if record.get("diagnosis")]
    if not diagnoses:
        return None
    cases = Counter(one["case"] for one in diagnoses)
    deviations = Counter(one["deviation"] for one in diagnoses if one["deviation"])
    return {
        "n": len(diagnoses),
        "cases": {case: cases[case] for case in CASES},
        "uses": dict(Counter(one["use"] for one in diagnoses)),
        "deviations": dict(deviations),
    }
