"""The gate of the questions: its guessers find what leaks, its reader reads. CPU, 5 s."""

import json

import numpy as np
import pytest

from experiments import questions, solvers
from lib.consistency import describe
from lib.rooms import COLOURS


def row(words, answer="A", needs=False, ask="leftmost", ideal=(), shown_by=1, named=None):
    return {
        "named": named,
        "question": words,
        "options": ["A. red", "B. blue", "C. green", "D. pink"],
        "answer": answer,
        "needs_view": needs,
        "ask": ask,
        "ideal": list(ideal),
        "shown_by": shown_by,
    }


def painted(*stripes):
    """A grey view with stripes: (colour, first column, last column)."""
    view = np.full((32, 32, 3), 128, np.uint8)
    for colour, first, last in stripes:
        view[10:20, first:last] = COLOURS[colour]
    return view


def test_auc_and_r2_by_hand():
    positive = np.array([False, True, False, True])
    assert solvers.area_under_curve(np.array([1.0, 2.0, 3.0, 4.0]), positive) == 0.75
    assert solvers.area_under_curve(np.ones(4), positive) == 0.5
    assert solvers.explained(np.array([1.0, 3.0]), np.array([1.0, 3.0])) == 1
    assert solvers.explained(np.array([2.0, 2.0]), np.array([1.0, 3.0])) == 0


def test_words_that_tell_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    leaking, blind = [], []
    for needs in rng.random(400) < 0.5:
        word = "behind" if needs else "ahead"
        leaking.append(row(f"Turn until the red object is {word}.", needs=bool(needs)))
        word = "behind" if rng.random() < 0.5 else "ahead"
        blind.append(row(f"Turn until the red object is {word}.", needs=bool(needs)))

    def found(rows):
        need = solvers.told_by_words
        return need(rows[:200], rows[200:], lambda one: one["needs_view"], solvers.area_under_curve)

    assert found(leaking) == 1 and 0.4 < found(blind) < 0.6


def test_the_reader_reads_views_painted_by_hand():
    view = painted(("blue", 2, 6), ("red", 12, 28), ("green", 29, 30))
    for ask, answer in (("leftmost", "B"), ("rightmost", "A"), ("largest", "A"), ("right", "A")):
        assert questions.read_right([row("", answer, ask=ask)], [view]).all(), ask
    assert not questions.read_right([row("", "C", ask="rightmost")], [view])[0]  # too few pixels


def test_columns_tell_angles_around_the_viewer_from_where_the_asked_view_looks():
    """Red stands in the middle of Image-3, blue in that of Image-2, 90 degrees to its right. The turn starts at Image-3."""
    blank = painted()
    images = np.stack([blank, painted(("blue", 14, 18)), painted(("red", 14, 18)), blank])[None]
    given = solvers.given_views(images)[0]
    red, blue, green, _ = solvers.columns(
        row("Turn until the red object is ahead", shown_by=3, named="red"), given
    )
    assert red[0] == pytest.approx(0, abs=0.01) and blue[0] == pytest.approx(2) and green[0] == 4
    places = solvers.caption(row("", shown_by=3), given, list(COLOURS).index("blue"))
    assert np.flatnonzero(places).tolist() == [
        0,
        9 + 1,
        9 + 5,
        18,
        27,
    ]  # absent, the only one, absent, absent
    assert describe(images[0]).count.max() == 40


@pytest.mark.slow
def test_a_gate_on_a_few_rooms_writes_its_table(tmp_path):
    command = ["--rooms", "30", "30", "--simulator", "truth", "--imagine", "20", "--threads", "1"]
    questions.main([*command, "--families", "commanded", "turning", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    for family in ("commanded", "turning"):
        assert results[family]["true"][0] > 0.9 < results[family]["imagined"][0]
        assert 0.4 < results[family]["need"] < 0.65
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4
