"""Motions in words: what the paper prints, what people type. pytest tests/test_words.py"""

import numpy as np
import pytest

from lib.geometry import UNITS, Motion
from lib.simulators import (
    SENTENCES,
    WORDINGS,
    instruction,
    phrase,
    random_instruction,
    read_instruction,
    read_phrase,
    renumbered,
)

AMOUNTS = {"meters": [0.1 * k for k in range(1, 101)], "degrees": [5.0 * k for k in range(1, 73)]}
# every sentence that the paper prints -> the number of its reference, None for the last image, and its motion
PRINTED = {
    "Base on the viewpoint of Image-2, move 1.5 meters to the left.": (2, Motion("dx", -1.5)),
    "Base on the viewpoint of Image-1, turn 44 degrees to the left.": (1, Motion("dangle", -44.0)),
    "Based on the viewpoint of the image 1, Move forward by 1.5 meters parallel to the ground.": (
        1,
        Motion("dy", 1.5),
    ),
    "Based on Image 1, Rotate 90 degrees left to the ground.": (1, Motion("dangle", -90.0)),
    "Based on Image 3, Rotate 90 degrees left to the ground.": (3, Motion("dangle", -90.0)),
    "Based on the last image, pitch up by 40 degrees.": (None, Motion("dphi", 40.0)),
    "Based on the last image, rotate 60 degrees to the right.": (None, Motion("dangle", 60.0)),
    "Based on the last image, turn 60 degrees to the left.": (None, Motion("dangle", -60.0)),
    "Based on the last image, turn 36 degrees to the right.": (None, Motion("dangle", 36.0)),
    "Based on the last image, rotate to the right by 30 degrees.": (None, Motion("dangle", 30.0)),
}


def all_sentences(motion: Motion, number: int) -> set[str]:
    """Everything that one motion can be told as."""
    wordings = range(len(WORDINGS[motion.kind][2]))
    return {instruction(motion, number, name, k) for name in SENTENCES for k in wordings}


@pytest.mark.parametrize("sentence", PRINTED)
def test_a_printed_sentence_is_read_and_written(sentence):
    number, motion = PRINTED[sentence]
    assert read_instruction(sentence) == (number, motion)
    assert sentence in all_sentences(motion, number or 1)


def test_our_sentence_is_the_one_of_the_papers_examples():
    assert instruction(Motion("dphi", 40.0)) == "Based on the last image, pitch up by 40 degrees."
    named = "Base on the viewpoint of Image-2, move 1.5 meters to the left."
    assert instruction(Motion("dx", -1.5), 2) == named


def test_words_and_motions_round_trip_over_the_whole_grid():
    for kind, unit in UNITS.items():
        for amount in [*AMOUNTS[unit], 1 / 3, 1e-7, 123456.789]:
            for sign in (1, -1):
                motion = Motion(kind, sign * amount)
                assert read_phrase(phrase(motion)) == motion
                assert read_instruction(instruction(motion)) == (None, motion)
                for sentence in all_sentences(motion, 12):
                    number, same = read_instruction(sentence)
                    assert same == motion
                    assert number == (None if "last image" in sentence else 12)


@pytest.mark.parametrize(
    "text, kind, amount",
    [
        ("turn left 30", "dangle", -30),
        ("turn 30 degrees to the left", "dangle", -30),
        ("Rotate to the right by 30°.", "dangle", 30),
        ("turn right 1 degree", "dangle", 1),
        ("move forward 1 meter", "dy", 1),
        ("Move Backward 0.5m", "dy", -0.5),
        ("move 2 metres up", "dz", 2),
        ("move down by 1", "dz", -1),
        ("move left 1.5 meters", "dx", -1.5),
        ("pitch up by 10 degrees", "dphi", 10),
        (" look down 20 deg ", "dphi", -20),
    ],
)
def test_what_people_type_is_read(text, kind, amount):
    assert read_phrase(text) == Motion(kind, amount)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "30",
        "left 30",
        "turn left",
        "turn left some degrees",
        "turn left right 30",
        "turn left 30 40",
        "turn up 30",
        "look left 30",
        "turn left 30 meters",
        "move left 30 degrees",
        "turn 30 deg degrees left",
        "move 1 meters to the moon",
        "turn left -5 degrees",
        "turn left 0",
        "turn left 1e999",
        "turn left ²",
    ],
)
def test_what_is_no_motion_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="write one of: .*turn <number> degrees|not zero"):
        read_phrase(text)


def test_a_sentence_of_another_form_is_refused_with_the_forms():
    for text in ("turn left 30", "Based on Image 0x1, turn left 30", "Based on, turn left 30"):
        with pytest.raises(ValueError, match="Base on the viewpoint of Image-2, …"):
            read_instruction(text)


def test_the_number_is_that_of_the_order_shown():
    for sentence, (number, motion) in PRINTED.items():
        assert read_instruction(renumbered(sentence, 4)) == (number and 4, motion)


def test_training_draws_every_sentence_and_no_other():
    rng = np.random.default_rng(0)
    motion = Motion("dangle", -45.0)
    assert {random_instruction(motion, 4, rng) for _ in range(400)} == all_sentences(motion, 4)
