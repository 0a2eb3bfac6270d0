"""How turns are read, and the rules of a dialogue at their edges; tests/test_policy.py has the rest."""

import json

import numpy as np
import pytest

from lib.dialogue import Trajectory
from lib.geometry import UNITS, Motion, move_camera
from lib.protocol import (
    AMOUNT,
    ARGUMENTS,
    CALL_FIRST,
    ENOUGH,
    IMAGE_NUMBER,
    INDICES,
    LIMITS,
    NO_SUCH_INDEX,
    NO_SUCH_MOTION,
    NO_SUCH_TOOL,
    NOT_JSON,
    SEED,
    UNREADABLE,
    Turn,
    call_of,
    call_poses,
    call_text,
    motion_in,
    parse_reply,
    parse_turn,
    read_call,
)
from policy import Policy

CALL = '<think>look</think><tool_call>{"name": "world_simulator_tool", "arguments": %s}</tool_call>'
LOOK = CALL % '{"reference_image": 2, "motion_type": "dangle", "value": -45}'
ANSWER = "<think>red</think><answer> A </answer>"


def call(image=1, kind="dangle", amount=-45):
    return json.dumps(
        {
            "name": "world_simulator_tool",
            "arguments": {"reference_image": image, "motion_type": kind, "value": amount},
        }
    )


def turn(**of_call):
    return f"<think>look</think><tool_call>{call(**of_call)}</tool_call>"


@pytest.fixture(scope="module")
def policy():
    return Policy.tiny(seed=0)


def play(policy, mode, *turns):
    """A dialogue about one picture; every valid call is shown the same view -> what was replied, the Trajectory."""
    view = np.full((32, 32, 3), 100, np.uint8)
    question = {"question": "Which?", "options": ["A. red", "B. blue"]}
    trajectory = Trajectory.start(policy, question, [view], mode)
    for text in turns:
        trajectory.add_turn(policy, text)
        if not trajectory.done:
            trajectory.observe(policy, image=view if trajectory.call else None)
    return [reply for reply, _ in trajectory.replies], trajectory


# ---- a turn is read ---------------------------------------------------------------------------------------------------------


def test_good_turns():
    assert parse_turn(LOOK).call == {"reference_image": 2, "motion_type": "dangle", "value": -45.0}
    assert parse_turn(ANSWER) == Turn(answer="A")
    spread = (
        '<think>\na\n</think>\n\n<tool_call>\n{"name": "world_simulator_tool", '
        '"arguments": {"reference_image": 1, "motion_type": "dz", "value": 1e-1}}\n</tool_call>\n'
    )
    assert parse_turn(spread).call == {"reference_image": 1, "motion_type": "dz", "value": 0.1}


def test_the_papers_call_and_answer():
    printed = (
        '<tool_call>{"name": "world_simulator_tool", "arguments": {"reference_image": 1, "motion_type": "dy", '
        '"value": 1.0}}</tool_call>'
    )
    forward = {"reference_image": 1, "motion_type": "dy", "value": 1.0}
    assert parse_turn(f"<thinking>unseen</thinking>{printed}").call == forward
    assert parse_turn(f"<think>unseen</think>\n{printed}").call == forward
    assert motion_in(forward) == Motion("dy", 1.0)
    answer = "<thinking>It is there.</thinking>\n<answer>A. front</answer>"
    assert parse_turn(answer) == Turn(answer="A. front")
    assert parse_turn(answer.replace("</thinking>", "</think>")).error == UNREADABLE
    assert parse_turn(call_text(call_of(3, Motion("dx", -1.5))).join(["<think></think>", ""])) == (
        Turn(call={"reference_image": 3, "motion_type": "dx", "value": -1.5})
    )


def test_a_call_may_choose_images_and_a_seed():
    more = (
        '{"reference_image": 2.0, "motion_type": "dx", "value": 1, "img_indices": %s, "seed": %s}'
    )
    read = parse_turn(CALL % more % ("[0, 2.0]", 7)).call
    assert read == {
        "reference_image": 2,
        "motion_type": "dx",
        "value": 1.0,
        "img_indices": [0, 2],
        "seed": 7,
    }
    assert all(type(value) is int for value in (read["reference_image"], *read["img_indices"]))
    for indices in ("[]", "1", "null", '["0"]', "[0.5]", "[true]", "{}"):
        assert parse_turn(CALL % more % (indices, 7)).error == INDICES, indices
    for seed in ("-1", "1.5", "null", '"3"', "9223372036854775808", "NaN"):
        assert parse_turn(CALL % more % ("[0]", seed)).error == SEED, seed


@pytest.mark.parametrize(
    "text, error",
    [
        ("", UNREADABLE),
        ("B", UNREADABLE),
        ("<answer>B</answer>", UNREADABLE),
        ("<think>x</think>B", UNREADABLE),
        ("<think>x</think><answer></answer>", UNREADABLE),
        (ANSWER + ANSWER, UNREADABLE),
        (LOOK + ANSWER, UNREADABLE),
        ("<think>a<think>b</think><answer>B</answer>", UNREADABLE),
        (ANSWER + " I am sure.", UNREADABLE),
        ("<think>x</think><answer>A</answer><answer>B</answer>", UNREADABLE),
        ("<think>x</think><tool_call>imagine(2)</tool_call>", NOT_JSON),
        (CALL % "[1, 2]", NOT_JSON),
        (CALL % "{", NOT_JSON),
        ("<think>x</think><tool_call>[]</tool_call>", NOT_JSON),
        ("<think>x</think><tool_call>{}</tool_call>", NOT_JSON),
        ("<think>x</think><tool_call>" + "[" * 100_000 + "</tool_call>", NOT_JSON),
        ("</think><think><answer>B</answer>", UNREADABLE),
        ("<think>x</think>so<answer>B</answer>", UNREADABLE),
        ("<thinking>x</thinking><answer>B</tool_call>", UNREADABLE),
        (CALL % f'{{"reference_image": 2, "motion_type": "dx", "value": {"1" * 5000}}}', NOT_JSON),
        (LOOK.replace("world_simulator_tool", "zoom"), NO_SUCH_TOOL),
        (CALL % '{"reference_image": 2, "motion_type": "dangle"}', ARGUMENTS),
        (
            CALL % '{"reference_image": 2, "motion_type": "dangle", "value": -45, "speed": 1}',
            ARGUMENTS,
        ),
        (CALL % '{"reference_image": "2", "motion_type": "dangle", "value": -45}', IMAGE_NUMBER),
        (CALL % '{"reference_image": true, "motion_type": "dangle", "value": -45}', IMAGE_NUMBER),
        (CALL % '{"reference_image": 2.5, "motion_type": "dangle", "value": -45}', IMAGE_NUMBER),
        (CALL % '{"reference_image": 2, "motion_type": "turn left", "value": 45}', NO_SUCH_MOTION),
        (CALL % '{"reference_image": 2, "motion_type": ["dx"], "value": 45}', NO_SUCH_MOTION),
        *[
            (CALL % f'{{"reference_image": 2, "motion_type": "dx", "value": {bad}}}', AMOUNT)
            for bad in (
                "null",
                '"1.5"',
                "NaN",
                "Infinity",
                "0",
                "-0.0",
                "10000",
                "-10000",
                "1e999",
                "1" + "0" * 400,
                "true",
                "[1]",
            )
        ],
    ],
)
def test_bad_turns_get_a_sentence(text, error):
    turn = parse_turn(text)
    assert turn.error == error and turn.call is None and turn.answer is None


# ---- the rules at their edges -----------------------------------------------------------------------------------------


def test_amounts_just_inside_and_just_outside():
    assert LIMITS == {"meters": 10, "degrees": 360}
    assert "from -10 to 10 (meters)" in AMOUNT and "-360 to 360 (degrees)" in AMOUNT
    for kind, unit in UNITS.items():
        most, more = (10, 10.1) if unit == "meters" else (360, 361)
        for sign in (1, -1):
            want = {"reference_image": 1, "motion_type": kind, "value": float(sign * most)}
            assert read_call(call(kind=kind, amount=sign * most)) == Turn(call=want)
            assert read_call(call(kind=kind, amount=sign * more)) == Turn(error=AMOUNT)


def test_only_a_valid_call_lets_forced_answer(policy):
    replies, trajectory = play(
        policy, "forced", turn(image=7), ANSWER, turn(amount=400), ANSWER, turn(), ANSWER
    )
    assert replies[1] == replies[3] == CALL_FIRST.strip()
    assert replies[4].startswith("Imagined from Image-1, turn 45 degrees to the left")
    assert trajectory.answer == "A" and (trajectory.valid_calls, trajectory.invalid_calls) == (1, 2)


def test_an_invalid_call_costs_no_view(policy):
    turns = turn(image=7), turn(), turn(amount=0), turn(), turn(), turn(), ANSWER
    replies, trajectory = play(policy, "agentic", *turns)
    assert (trajectory.valid_calls, trajectory.invalid_calls, len(trajectory.images)) == (3, 3, 4)
    assert replies[5] == ENOUGH and sum(reply.startswith("Imagined") for reply in replies) == 3


def test_the_simulator_is_shown_the_images_that_a_call_chooses_and_the_reference(policy):
    images = [np.full((32, 32, 3), 50 * k, np.uint8) for k in range(4)]
    poses = [np.eye(4) * k for k in range(4)]
    room = {"room": 0, "poses": [pose.tolist() for pose in poses]}
    question = {"question": "Which?", "options": ["A. red"], "scene": room}
    trajectory = Trajectory.start(policy, question, images, "agentic")
    for indices, shown, reference in (
        ([3, 0, 3], [3, 0, 1], 3),
        ([1], [1], 1),
        (None, [0, 1, 2, 3], 2),
    ):
        trajectory.call = call_of(2, Motion("dangle", -45.0)) | {"seed": 5}
        if indices:
            trajectory.call["img_indices"] = indices
        query = trajectory.query(seed=9)
        assert [image[0, 0, 0] // 50 for image in query.images] == shown
        assert np.array_equal(query.scene["poses"], [poses[k] for k in shown])
        assert query.reference == reference and query.seed == 5
        assert query.instruction == "Based on the last image, turn 45 degrees to the left."
    assert trajectory.query(seed=9, obey_seed=False).seed == 9  # in training the streams rule


def test_images_that_do_not_exist_cannot_be_chosen(policy):
    for indices in ([1], [-1], [0, 9]):
        arguments = {"reference_image": 1, "motion_type": "dx", "value": 1, "img_indices": indices}
        replies, trajectory = play(policy, "agentic", CALL % json.dumps(arguments), ANSWER)
        assert replies == [f"{NO_SUCH_INDEX} 0."] and trajectory.invalid_calls == 1


def test_a_reply_in_a_benchs_own_words_may_call_once():
    one = f"Let me look. <tool_call>{call()}</tool_call>"
    two = f"{one} and <tool_call>{call(image=2)}</tool_call>"
    assert parse_reply(one).call == {"reference_image": 1, "motion_type": "dangle", "value": -45.0}
    assert parse_reply(two) == parse_reply(" ") == Turn(error=UNREADABLE)
    assert parse_reply(" B. \n") == Turn(answer="B.")
    assert parse_reply(f"</tool_call>{one}").call == parse_reply(f"{one}</tool_call>").call
    assert parse_reply(f"{one}</tool_call>").call == parse_reply(one).call
    assert parse_reply(f"<tool_call>{one}") == Turn(
        error=NOT_JSON
    )  # all between the first and the last
    assert parse_reply("<tool_call>B") == Turn(answer="<tool_call>B")


@pytest.mark.parametrize(
    "piece",
    ["</think><answer>", "<tool_call>", "<answer>", "<tool_call>a</tool_call>", " ", '{"a":', "<"],
)
def test_a_turn_of_a_megabyte_is_read(piece):
    """Lazy patterns would look from every tag to the end: hours."""
    long = piece * (1_000_000 // len(piece))
    assert parse_turn(f"<think>{long}").error == UNREADABLE
    assert parse_turn(f"<think></think>{long}x<answer>B</answer>").error == UNREADABLE
    reply = parse_reply(f"B{long}")
    assert reply.error == UNREADABLE if "/tool" in piece else reply.answer == f"B{long}".strip()


def test_calls_lead_where_they_say():
    start = move_camera(np.eye(4), Motion("dangle", 30.0))
    calls = [
        {"reference_image": 1, "motion_type": "dx", "value": -1.5},
        {"reference_image": 2, "motion_type": "dphi", "value": 10.0},
    ]
    poses = call_poses({"room": 0, "poses": [start.tolist()]}, calls)
    aside = move_camera(start, Motion("dx", -1.5))
    np.testing.assert_allclose(poses, [start, aside, move_camera(aside, Motion("dphi", 10.0))])
