"""Numbers of predictions: intervals, summaries, gains, and the table."""

import numpy as np
import pytest
from test_evaluate import question

from experiments.text_guess import text_only_chance
from lib.scores import (
    accuracy_text,
    chance,
    interval,
    summarise,
    text_table,
)


def record(key, correct, called=False, need=True, scene=None, **more):
    return {
        "key": key,
        "bench": "rooms",
        "kind": "mca",
        "category": "region",
        "groups": [more.get("category", "region")],
        "needs_view": need,
        "scene": scene or key,
        "answer": "B",
        "gold": "B",
        "correct": float(correct),
        "lenient": float(correct),
        "valid_calls": int(called),
        "invalid_calls": 0,
        "unreadable": 0,
        "turns": ["<think></think><answer>B</answer>"],
        "truncated": False,
        "seconds": 0.5,
        "error": None,
        "missing_images": 0,
        "mode": "agentic",
        **more,
    }


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.4 <= high for low, high in (interval(rng.random(200) < 0.4) for _ in range(200))
    ]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_interval_knows_that_questions_about_one_room_are_not_independent():
    values = np.repeat(np.random.default_rng(0).random(100) < 0.5, 4)
    alone, rooms = interval(values), interval(values, np.repeat(np.arange(100), 4))
    assert np.diff(rooms)[0] == pytest.approx(2 * np.diff(alone)[0], rel=0.15)  # sqrt(4)
    assert interval([1, 1, 1]) == [1, 1]


def test_summary_by_need_and_category():
    records = [
        record("a", 1, True),
        record("b", 0, True, category="rotation"),
        record("c", 1, False, need=False, turns=[" "]),
        record("d", 0, True, gold=None),
    ]
    summary = summarise(records)
    assert summary["n"] == 3 and summary["accuracy"] == summary["call_rate"] == pytest.approx(2 / 3)
    three_calls = summarise([record("a", 1, valid_calls=3), record("b", 0)])
    assert (three_calls["call_rate"], three_calls["valid_calls"]) == (0.5, 1.5)
    assert accuracy_text(three_calls) == "0.500 [0.00 1.00]  50% 1.50"
    strata = {title: (part["n"], part["accuracy"]) for title, part in summary["by_need"].items()}
    assert strata == {"needs_view": (2, 0.5), "answerable": (1, 1.0)}
    assert list(summary["by_category"]) == ["region", "rotation"]
    assert summary["letters"] == {"B": 3} and summary["counts"]["empty reply"] == 1


def test_over_use_and_under_use():
    agentic = [
        record("a", 1, True),
        record("b", 1, True),
        record("c", 0, False),
        record("d", 0, False),
    ]
    direct = [record("a", 1), record("b", 0), record("c", 0), record("d", 0)]
    truth = [record("a", 1, True), record("b", 1, True), record("c", 1, True), record("d", 0, True)]
    summary = summarise(agentic, direct, truth)
    assert summary["over_use"] == 0.25  # a: it is right without a view
    assert summary["under_use"] == 0.25  # c: the view would have helped
    assert "over_use" not in summarise(agentic) and "under_use" not in summarise(agentic, direct)


def blind_questions(count, seed, leak=None):
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        names = [
            f"{c} {k}"
            for c, k in zip(
                rng.permutation(["red", "blue", "pink", "cyan", "green"])[:4],
                rng.choice(["box", "ball", "table"], 4),
                strict=True,
            )
        ]
        place = int(rng.integers(4))
        if leak == "letter":
            place = int(rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]))
        if leak == "kind":
            place = next((k for k, name in enumerate(names) if "box" in name), place)
        if leak == "alone":  # three options of one kind, and the answer is of another
            names = [
                f"{name.split()[0]} {'ball' if k == place else 'box'}"
                for k, name in enumerate(names)
            ]
        rows.append(
            question(
                i,
                "ABCD"[place],
                options=[f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=True)],
                question=f"Turn left {rng.integers(9)} degrees. Which object?",
            )
        )
    return rows


@pytest.mark.parametrize(
    "leak, low, high",
    [(None, 0.18, 0.32), ("letter", 0.48, 0.65), ("kind", 0.7, 1), ("alone", 0.9, 1)],
)
def test_text_only_chance_is_at_chance_unless_the_text_gives_the_answer_away(leak, low, high):
    assert (
        low
        <= text_only_chance(blind_questions(500, 0, leak), blind_questions(400, 1, leak))
        <= high
    )


def test_chance_is_the_mean_over_option_counts():
    assert (
        chance(
            [question(0), {**question(1), "options": ["A. x", "B. y"]}, question(2, answer=None)]
        )
        == 0.375
    )
    assert chance([{**question(0), "options": []}]) is None


def test_a_table_has_three_digits_and_a_dash_for_what_is_unknown():
    text = text_table(["", "n", "share"], [["all", 12, 0.5], ["none", 3, None]])
    assert text.splitlines() == ["       n  share", "all   12  0.500", "none   3      -"]
