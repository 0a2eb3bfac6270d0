"""
Why an answer is right or wrong, after the failure modes that the paper names, where a room gives the truth.

`reads` takes from a picture, by its colours, what the question asks for: on 98 % of true views it is the right answer.
Of a call it is asked, in this order:
  useful   its motion, carried out exactly, leads where the question asks (to within 0.25 m and 10 degrees), or to
           another view that shows the right answer
  shown    it is useful, and the imagined view reads like the right answer, or (where the question asks) as the true
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
    confused     no call was useful, and one makes the motion that the question names, from another image; or the given
                 images answer the question, and the answer is what another one of them shows. (One of three other
                 images may show it by chance: an upper bound)
    off_target   calls were made, and none was useful: the target is not in the view
    misread      the given images answer the question, and none of the above

Beside the case: `use`, whether a view was needed and whether one was imagined; and of useful calls that did not show
the answer `deviation`: "pose" if the last such view was taken from somewhere else than commanded, else "content".
"""

from collections import Counter

import numpy as np
from PIL import Image

from lib.answers import option_letter
from lib.consistency import LENGTH, ROTATION, STRONG, delta_of, describe, pose_error, recover
from lib.dialogue import call_poses
from lib.geometry import Motion, Query, decompose, instruction, move_camera
from lib.rooms import COLOURS, SIZE, TrueRenderer, random_room

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


def true_views(question, calls):
    """What the true renderer would have shown after every call -> [(SIZE, SIZE, 3)]; [] if no room is known."""
    scene = question.get("scene")
    if not scene or not calls:
        return []
    poses, blank = call_poses(scene, calls).tolist(), np.zeros((SIZE, SIZE, 3), np.uint8)
    return TrueRenderer().imagine(
        [
            Query(
                [blank],
                call["image"],
                instruction(Motion(call["motion"], call["amount"]), call["image"]),
                0,
                {"room": scene["room"], "poses": poses},
            )
            for call in calls
        ]
    )


def reads(view, ask):
    """What a view (H, W, 3) shows of an `ask` of lib/questions.py: a colour of COLOURS, or "none"."""
    count, middle, dominant = (part[0] for part in describe(view[None]))
    if ask in ("left", "centre", "right"):
        best = dominant[("left", "centre", "right").index(ask)]
    else:
        score = {"largest": count, "leftmost": -middle, "rightmost": middle}[ask]
        best = np.where(count >= STRONG, score, -np.inf).argmax() if count.max() >= STRONG else -1
    return "none" if best < 0 else list(COLOURS)[best]


def near(a, b):
    """Whether two cameras stand within the thresholds of lib/consistency.py: 0.25 m and 10 degrees."""
    delta = decompose(a, b)
    return bool(np.linalg.norm(delta[:3]) <= LENGTH and np.abs(delta[3:]).max() <= ROTATION)


def deviation(question, poses, call, view):
    """Why a view is wrong: "pose" or "content". poses: `call_poses`."""
    motion = Motion(call["motion"], call["amount"])
    small = np.asarray(Image.fromarray(view).resize((SIZE, SIZE), Image.BOX))
    found, _ = recover(
        random_room(question["scene"]["room"]), poses[call["image"] - 1], small[None]
    )
    return "content" if pose_error(delta_of(motion), found[0])["within"] else "pose"


def diagnose(question, trajectory):
    """-> {"case": of CASES, "use": of USES, "deviation": "pose", "content" or None}, see above.

    question   a row of lib/questions.py;  trajectory: of any mode with a tool
    returns    None for direct mode and for questions that do not tell what their views show
    """
    if trajectory.mode == "direct" or "shows" not in question:
        return None
    calls = [call for call in trajectory.provenance if call]
    views = trajectory.images[len(trajectory.images) - len(calls) :]
    options, ask, needed = question["options"], question["ask"], bool(question["needs_view"])
    said, gold = option_letter(trajectory.answer or "", options), question["answer"]
    words = {option[0]: option[3:] for option in options}
    found = {"case": None, "use": USES[needed, bool(calls)], "deviation": None}
    imagined = [reads(view, ask) for view in views] if ask else []
    if not needed:
        others = [
            told[ask]
            for k, told in enumerate(question["shows"][:-1], 1)
            if ask and k != question["shown_by"]
        ]
        return found | {
            "case": "unaided"
            if said == gold
            else "no_answer"
            if said not in words
            else "trusted"
            if words[said] in imagined
            else "confused"
            if words[said] in others
            else "misread"
        }

    poses, asked = call_poses(question["scene"], calls), question["command"]
    goal, useful, wrong = (
        move_camera(poses[asked["image"] - 1], Motion(asked["kind"], asked["amount"])),
        0,
        [],
    )
    for pose, call, view, told, true in zip(
        poses[len(poses) - len(calls) :], calls, views, imagined, true_views(question, calls)
    ):
        answers = {words[gold], *([reads(true, ask)] if near(goal, pose) else [])}
        if reads(true, ask) in answers:
            useful += 1
            wrong += [(call, view, told)] if told not in answers else []
    shown = useful > len(wrong)
    if wrong and not shown:
        call, view, _ = wrong[-1]
        found["deviation"] = deviation(question, poses, call, view)
    if said == gold:
        return found | {"case": "resolved" if shown else "guessed"}
    if said not in words:
        return found | {"case": "no_answer"}
    if not calls:
        return found | {"case": "under_use"}
    if useful:
        followed = words[said] in [told for _, _, told in wrong]
        return found | {"case": "ignored" if shown else "trusted" if followed else "deviates"}
    elsewhere = any(
        (call["motion"], call["amount"]) == (asked["kind"], asked["amount"]) for call in calls
    )
    return found | {"case": "confused" if elsewhere else "off_target"}


def tally(records):
    """Counts of cases, uses and deviations over records with a "diagnosis" -> {"n", "cases", …}, None if none has."""
    found = [record["diagnosis"] for record in records if record.get("diagnosis")]
    if not found:
        return None
    cases = Counter(one["case"] for one in found)
    return {
        "n": len(found),
        "cases": {case: cases[case] for case in CASES},
        "uses": dict(Counter(one["use"] for one in found)),
        "deviations": dict(Counter(one["deviation"] for one in found if one["deviation"])),
    }
