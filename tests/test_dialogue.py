"""The protocol of a dialogue at its edges (tests/test_policy.py has the rest): pytest tests/test_dialogue.py"""

import json

import numpy as np
import pytest

from lib.dialogue import Trajectory, call_poses
from lib.geometry import KINDS, Motion, move_camera
from lib.protocol import (
    AMOUNT,
    CALL_FIRST,
    ENOUGH,
    LIMITS,
    UNREADABLE,
    Turn,
    parse_reply,
    read_call,
)
from policy import Policy

ANSWER = "<think>red</think><answer>A</answer>"


def call(image=1, motion="turn left", amount=45):
    return json.dumps(
        {"name": "imagine", "arguments": {"image": image, "motion": motion, "amount": amount}}
    )


def turn(**of_call):
    return f"<think>look</think><tool_call>{call(**of_call)}</tool_call>"


@pytest.fixture(scope="module")
def policy():
    return Policy.tiny(seed=0)


def play(policy, mode, *turns):
    """A dialogue about one picture; every valid call is shown the same view -> what was replied, the Trajectory."""
    view, question = (
        np.full((32, 32, 3), 100, np.uint8),
        {"question": "Which?", "options": ["A. red", "B. blue"]},
    )
    trajectory = Trajectory.start(policy, question, [view], mode)
    for said in turns:
        trajectory.say(policy, said)
        if not trajectory.done:
            trajectory.observe(policy, image=view if trajectory.call else None)
    return [reply for reply, _ in trajectory.replies], trajectory


def test_amounts_just_inside_and_just_outside():
    assert (
        LIMITS == {"meters": 10, "degrees": 360}
        and "at most 10 (meters)" in AMOUNT
        and "360 (degrees)" in AMOUNT
    )
    for motion in KINDS:
        most, more = (10, 10.1) if motion.startswith("move") else (360, 361)
        want = {"image": 1, "motion": motion, "amount": float(most)}
        assert read_call(call(motion=motion, amount=most)) == Turn(call=want)
        assert read_call(call(motion=motion, amount=more)) == Turn(error=AMOUNT)


def test_only_a_valid_call_lets_forced_answer(policy):
    replies, trajectory = play(
        policy, "forced", turn(image=7), ANSWER, turn(amount=400), ANSWER, turn(), ANSWER
    )
    assert replies[1] == replies[3] == CALL_FIRST.strip() and replies[4].startswith(
        "Imagined from Image-1, turn left"
    )
    assert trajectory.answer == "A" and (trajectory.valid_calls, trajectory.invalid_calls) == (1, 2)


def test_an_invalid_call_costs_no_view(policy):
    turns = turn(image=7), turn(), turn(amount=-1), turn(), turn(), turn(), ANSWER
    replies, trajectory = play(policy, "agentic", *turns)
    assert (trajectory.valid_calls, trajectory.invalid_calls, len(trajectory.images)) == (3, 3, 4)
    assert replies[5] == ENOUGH and sum(reply.startswith("Imagined") for reply in replies) == 3


def test_a_reply_in_a_benchs_own_words_may_call_once():
    one = f"Let me look. <tool_call>{call()}</tool_call>"
    two = f"{one} and <tool_call>{call(image=2)}</tool_call>"
    assert parse_reply(one).call == {"image": 1, "motion": "turn left", "amount": 45.0}
    assert parse_reply(two) == parse_reply(" ") == Turn(error=UNREADABLE)
    assert parse_reply(" B. \n") == Turn(answer="B.")


def test_calls_lead_where_they_say():
    start = move_camera(np.eye(4), Motion("turn right", 30.0))
    calls = [
        {"image": 1, "motion": "move left", "amount": 1.5},
        {"image": 2, "motion": "look up", "amount": 10.0},
    ]
    poses = call_poses({"room": 0, "poses": [start.tolist()]}, calls)
    aside = move_camera(start, Motion("move left", 1.5))
    np.testing.assert_allclose(poses, [start, aside, move_camera(aside, Motion("look up", 10.0))])
