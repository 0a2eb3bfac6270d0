"""Every case of the diagnosis, by a scripted dialogue about a room whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from data import room_questions
from extras.report.diagnosis import CASES, diagnose, reads, tally, true_views
from lib.dialogue import Trajectory
from lib.geometry import Motion, move_camera
from lib.images import load_image
from lib.protocol import call_of, call_text, motion_in
from lib.rooms import COLOURS, TrueRenderer, random_room, render
from policy import Policy

POLICY = Policy.tiny()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions of a few rooms, their pictures as arrays."""
    root = tmp_path_factory.mktemp("questions")
    rows = [row for seed in range(5_000_012, 5_000_024) for row in room_questions(seed, root)]
    return [
        {
            **row,
            "images": [load_image(root / path) for path in row["images"]],
            "views": [load_image(root / path) for path in row["views"]],
        }
        for row in rows
    ]


def words(question, letter=None):
    return question["options"]["ABCD".index(letter or question["answer"])][3:]


def wrong(question, avoid=()):
    """The letter of a wrong option whose words are not in `avoid`."""
    return next(
        letter
        for letter in "ABCD"
        if letter != question["answer"] and words(question, letter) not in avoid
    )


def held(question, answer, *calls, views=None, mode="agentic"):
    """A dialogue that makes these calls, is shown the true views or `views`, and answers."""
    t = Trajectory.start(POLICY, question, question["images"], mode)
    for k, call in enumerate(calls):
        t.add_turn(POLICY, f"<think></think>{call_text(call)}")
        t.observe(POLICY, image=views[k] if views else TrueRenderer().imagine([t.query(0)])[0])
    t.add_turn(POLICY, f"<think></think><answer>{answer}</answer>")
    return t


def unseen(questions, test=lambda question: True):
    """A question that one call answers, with an ask that every reader of colours agrees on."""
    return next(q for q in questions if len(q["ideal"]) == 1 and q["ask"] == "largest" and test(q))


def false_view(question, colour):
    """The true view with its largest thing painted in another colour."""
    room = random_room(question["scene"]["room"])
    target = move_camera(
        np.array(question["scene"]["poses"][question["ideal"][0]["reference_image"] - 1]),
        motion_in(question["ideal"][0]),
    )
    things = tuple(
        replace(t, colour=colour)
        if t.colour == words(question)
        else replace(t, colour=words(question))
        if t.colour == colour
        else t
        for t in room.things
    )
    return render(replace(room, things=things), target)["rgb"][0]


def test_a_true_view_reads_like_the_answer(questions):
    told = [
        reads(q["views"][-1] if q["needs_view"] else q["images"][q["shown_by"] - 1], q["ask"])
        == words(q)
        for q in questions
    ]
    assert np.mean(told) > 0.95 and reads(np.full((32, 32, 3), 90, np.uint8), "leftmost") == "none"
    assert set(map(str, COLOURS)) >= {words(q) for q in questions}


def test_the_call_resolved_it_or_its_view_was_ignored(questions):
    q = unseen(questions)
    assert diagnose(q, held(q, q["answer"], q["ideal"][0])) == {
        "case": "resolved",
        "use": "needed, called",
        "deviation": None,
    }
    assert diagnose(q, held(q, wrong(q), q["ideal"][0]))["case"] == "ignored"
    assert (
        diagnose(q, held(q, words(q), q["ideal"][0]))["case"] == "resolved"
    )  # the option's words will do


def test_with_the_true_renderer_the_asked_call_is_never_blamed(questions):
    """Where the colours misread a true view (1 in 50), the imagined one is read no better: no view deviates."""
    for q in (q for q in questions if q["needs_view"]):
        assert diagnose(q, held(q, q["answer"], *q["ideal"]))["case"] == "resolved", q["id"]
        assert diagnose(q, held(q, wrong(q), *q["ideal"]))["case"] == "ignored", q["id"]


def test_a_valid_call_that_leaves_the_target_out_of_view(questions):
    away = call_of(1, Motion("dangle", -5.0))
    q = unseen(
        questions,
        lambda q: reads(true_views(q, [away])[0], q["ask"]) != words(q),
    )
    assert diagnose(q, held(q, wrong(q), away)) == {
        "case": "off_target",
        "use": "needed, called",
        "deviation": None,
    }
    assert diagnose(q, held(q, q["answer"], away))["case"] == "guessed"
    assert (
        diagnose(q, held(q, q["answer"], away, q["ideal"][0]))["case"] == "resolved"
    )  # a second call may repair it


def test_a_view_of_wrong_content_is_trusted_or_not(questions):
    q = unseen(questions)
    letter = wrong(q)
    false = false_view(q, words(q, letter))
    assert reads(false, q["ask"]) == words(q, letter)
    assert diagnose(q, held(q, letter, q["ideal"][0], views=[false])) == {
        "case": "trusted",
        "use": "needed, called",
        "deviation": "content",
    }
    other = wrong(q, avoid=[words(q, letter)])
    assert diagnose(q, held(q, other, q["ideal"][0], views=[false]))["case"] == "deviates"
    assert diagnose(q, held(q, q["answer"], q["ideal"][0], views=[false]))["case"] == "guessed"


def test_a_view_from_the_wrong_pose(questions):
    """The simulator goes nowhere: it shows the reference image again, where the answer is another by construction."""
    q = unseen(
        questions,
        lambda q: (
            q["ideal"][0]["motion_type"] == "dangle"
            and reads(q["images"][q["ideal"][0]["reference_image"] - 1], q["ask"])
            in (words(q, letter) for letter in "ABCD")
        ),
    )
    still = q["images"][q["ideal"][0]["reference_image"] - 1]
    letter = next(letter for letter in "ABCD" if words(q, letter) == reads(still, q["ask"]))
    assert diagnose(q, held(q, letter, q["ideal"][0], views=[still])) == {
        "case": "trusted",
        "use": "needed, called",
        "deviation": "pose",
    }


def test_the_motion_of_the_question_from_another_image(questions):
    def elsewhere(q):
        return q["ideal"][0] | {"reference_image": q["ideal"][0]["reference_image"] % 4 + 1}

    def told(q):
        return reads(true_views(q, [elsewhere(q)])[0], q["ask"])

    q = unseen(questions, lambda q: told(q) != words(q))
    assert diagnose(q, held(q, wrong(q), elsewhere(q)))["case"] == "confused"


def test_over_use_and_under_use(questions):
    q = unseen(questions)
    assert diagnose(q, held(q, wrong(q))) == {
        "case": "under_use",
        "use": "under-use: needed, not called",
        "deviation": None,
    }
    assert diagnose(q, held(q, q["answer"]))["case"] == "guessed"
    given = next(q for q in questions if q["shown_by"])
    assert diagnose(given, held(given, given["answer"]))["use"] == "not needed, not called"
    assert diagnose(given, held(given, given["answer"], call_of(1, Motion("dangle", -45.0)))) == {
        "case": "unaided",
        "use": "over-use: not needed, called",
        "deviation": None,
    }


def test_questions_that_the_given_images_answer(questions):
    def others(q):
        return [
            told[q["ask"]]
            for k, told in enumerate(q["shows"][: len(q["images"])], 1)
            if k != q["shown_by"]
        ]

    q, letter = next(
        (q, x)
        for q in questions
        if q["shown_by"]
        for x in "ABCD"
        if x != q["answer"] and words(q, x) in others(q)
    )
    assert diagnose(q, held(q, letter))["case"] == "confused"
    q = next(
        q
        for q in questions
        if q["shown_by"] and any(words(q, x) not in others(q) + [words(q)] for x in "ABCD")
    )
    letter = wrong(q, avoid=others(q))
    assert diagnose(q, held(q, letter))["case"] == "misread"
    paint = np.full((32, 32, 3), COLOURS[words(q, letter)], np.uint8)  # an invented view
    assert (
        diagnose(q, held(q, letter, call_of(1, Motion("dangle", -45.0)), views=[paint]))["case"]
        == "trusted"
    )


def test_no_answer_and_no_diagnosis(questions):
    q = unseen(questions)
    assert diagnose(q, held(q, "something else"))["case"] == "no_answer"
    t = Trajectory.start(POLICY, q, q["images"], "agentic")
    assert diagnose(q, t)["case"] == "no_answer"
    assert diagnose(q, held(q, q["answer"], mode="direct")) is None
    assert diagnose({key: value for key, value in q.items() if key != "shows"}, t) is None


def test_the_tally_counts_every_dialogue_once(questions):
    q = unseen(questions)
    records = [
        {"diagnosis": diagnose(q, t)}
        for t in (held(q, q["answer"], q["ideal"][0]), held(q, wrong(q)))
    ]
    counts = tally([*records, {"diagnosis": None}])
    assert counts["n"] == 2 == sum(counts["cases"].values()) and set(counts["cases"]) == set(CASES)
    assert (
        counts["uses"] == {"needed, called": 1, "under-use: needed, not called": 1}
        and not counts["deviations"]
    )
    assert tally([{"diagnosis": None}]) is None
