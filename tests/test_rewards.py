"""pytest tests/test_rewards.py: the formulas of the paper by hand, and group advantages.  CPU, 2 s."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rewards
from lib.dialogue import Trajectory

OPTIONS = ["A. blue ball", "B. red box", "C. a"]


@pytest.mark.parametrize(
    "answer, gold, match",
    [
        ("B", "B", 1),
        (" b ", "B", 1),
        ("B. red box", "B", 1),
        ("B) red box", "B", 1),
        ("Red box", "B", 1),
        ("a", "C", 1),
        ("(B)", "B", 1),
        ("(b) red box", "B", 1),
        ("B: red box", "B", 1),
        ("**B**", "B", 1),
        ("**B.** red box", "B", 1),
        ("B* red box", "B", 0),
        ("A", "B", 0),
        (None, "B", 0),
        ("", "B", 0),
        ("blue ball", "B", 0),
        ("box", "B", 0),
        ("A or B", "B", 0),
    ],
)
def test_exact_match_of_options(answer, gold, match):
    assert rewards.exact_match(answer, {"answer": gold, "options": OPTIONS}) == match


@pytest.mark.parametrize(
    "answer, gold, match", [("3", "3", 1), ("30", "3", 0), (" Left", "left", 1), (None, "3", 0)]
)
def test_exact_match_of_free_answers(answer, gold, match):
    assert rewards.exact_match(answer, {"answer": gold}) == match


@pytest.mark.parametrize(
    "answer, gold, match",
    [("3.0", "3", 1), ("3", "3.0", 1), ("3.01", "3", 0), ("three", "3", 0), ("three", "Three", 1)],
)
def test_exact_match_of_numbers(answer, gold, match):
    assert rewards.exact_match(answer, {"answer": gold, "kind": "na"}) == match


def test_format_needs_well_formed_turns_and_an_answer():
    class Held(SimpleNamespace):
        """A dialogue that says of itself what a Trajectory does."""

        well_formed = Trajectory.well_formed

    for invalid, answer, want in ((0, "B", 1), (1, "B", 0), (0, None, 0)):
        assert (
            rewards.format_reward(Held(invalid_calls=invalid, unreadable=0, answer=answer)) == want
        )


@pytest.mark.parametrize(
    "match, well_formed, n_tool, want",
    [
        (1, 1, 0, 1.50),
        (1, 1, 1, 1.52),
        (1, 1, 3, 1.52),
        (0, 1, 2, 0.52),
        (0, 0, 0, 0.0),
        (0, 0, 1, 0.02),
    ],
)
def test_phase1_reward(match, well_formed, n_tool, want):
    """r = e + 0.5 f + 0.02 min(n, 1)"""
    assert rewards.phase1_reward(match, well_formed, n_tool) == pytest.approx(want)


@pytest.mark.parametrize(
    "match, well_formed, n_tool, direct, want",
    [
        (1, 1, 1, 0.25, 1.52 + 0.1 * 0.75),  # imagining helped
        (0, 1, 1, 0.75, 0.52 - 0.03 * 0.75),  # answering directly was right more often
        (1, 1, 1, 1.00, 1.52),  # nothing to gain
        (1, 1, 0, 0.00, 1.50),
        (0, 1, 0, 1.00, 0.50),
    ],
)  # no call: no gain and no price
def test_phase2_reward(match, well_formed, n_tool, direct, want):
    assert rewards.phase2_reward(match, well_formed, n_tool, direct) == pytest.approx(want)


def test_advantages_against_numpy():
    rows = np.array([[1.52, 1.5, 0.5, 0.52], [0.02, 0.0, 0.0, 0.0], [1.5, 1.5, 1.5, 1.5]])
    centred = rows - rows.mean(1, keepdims=True)
    want = np.concatenate(
        [centred[:2] / (rows[:2].std(1, ddof=1, keepdims=True) + 1e-6), np.zeros((1, 4))]
    )
    np.testing.assert_allclose(
        rewards.group_advantages(rows.flatten(), 4), want.flatten(), rtol=1e-6
    )
    np.testing.assert_allclose(
        rewards.group_advantages(rows.flatten(), 4, divide_by_std=False),
        centred.flatten(),
        rtol=1e-6,
        atol=1e-8,
    )


def test_dividing_by_the_deviation_makes_a_small_bonus_loud():
    """All answers agree, half of them called: 0.02 alone decides, at full strength or at a hundredth."""
    group = [1.52] * 4 + [1.50] * 4
    assert rewards.group_advantages(group, 8)[0].item() == pytest.approx(0.935, abs=1e-3)
    assert rewards.group_advantages(group, 8, divide_by_std=False)[0].item() == pytest.approx(0.01)


def test_equal_rewards_give_exactly_zero_despite_rounding():
    """0.1 + 0.2 is not 0.3: a deviation of 1e-17 divided by 1e-6 must not become a gradient."""
    group = [0.1 + 0.2, 0.3, 0.3, 0.3]
    assert torch.equal(rewards.group_advantages(group, 4), torch.zeros(4))


def test_a_small_difference_of_rewards_is_a_signal():
    """A bonus of one's own may be far below the paper's 0.02."""
    want = torch.tensor([0.5**0.5, -(0.5**0.5)])
    torch.testing.assert_close(rewards.group_advantages([1.0005, 1.0], 2), want, atol=2e-3, rtol=0)


def test_incomplete_groups_are_refused():
    with pytest.raises(ValueError, match="do not fill groups of 4"):
        rewards.group_advantages([1.0] * 6, 4)


def test_a_question_without_a_gold_answer_is_never_right():
    for options in ([], ["A. red", "B. blue"]):
        assert rewards.exact_match("A", {"options": options, "answer": None}) == 0
