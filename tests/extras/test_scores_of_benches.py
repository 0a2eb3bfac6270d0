"""Gain over direct answers, per level and type (the other numbers: tests/test_evaluate.py)."""

import re

import numpy as np
import pytest

from extras.benches.common import Published
from extras.benches.mmsi_video import VIDEO_TYPES
from lib.scores import gain_over, interval, print_answers, summarise


def record(
    number, correct, called=False, category=VIDEO_TYPES[0], bench="mmsi_video", gold="B", room=None
):
    question = {"bench": bench, "category": category, "domains": {}}
    return {
        "key": str(number),
        "bench": bench,
        "kind": "mca",
        "category": category,
        "groups": Published(bench).groups(question),
        "needs_view": None,
        "scene": number // 4 if room is None else room,
        "answer": "B",
        "gold": gold,
        "correct": float(correct),
        "lenient": float(correct),
        "valid_calls": int(called),
        "invalid_calls": 0,
        "unreadable": 0,
        "turns": ["B"],
        "truncated": False,
        "seconds": 0.1,
        "error": None,
        "missing_images": 0,
        "mode": "agentic",
    }


@pytest.fixture(scope="module")
def modes():
    """(direct, agentic): 13 types of 40 questions. Calls help Prediction, harm Planning, and never happen elsewhere."""
    rng, direct, agentic = np.random.default_rng(0), [], []
    for number in range(520):
        kind = VIDEO_TYPES[number % 13]
        alone = rng.random() < 0.5
        moved = {
            "Prediction": alone or rng.random() < 0.8,
            "Planning": alone and rng.random() < 0.5,
        }.get(kind, alone)
        direct.append(record(number, alone, category=kind))
        agentic.append(record(number, moved, kind in ("Prediction", "Planning"), kind))
    return direct, agentic


def test_every_level_and_type_has_its_call_rate_and_its_paired_gain(modes):
    direct, agentic = modes
    summary = summarise(list(reversed(agentic)), direct)
    parts = summary["by_category"]
    assert set(parts) == {"Perception", "Planning", "Prediction", "Cross-Video"} | set(VIDEO_TYPES)
    for name, part in parts.items():
        before, after = ([r for r in told if name in r["groups"]] for told in (direct, agentic))
        assert part["gain"]["difference"] == pytest.approx(
            np.mean([r["correct"] for r in after]) - np.mean([r["correct"] for r in before])
        )
        low, high = part["gain"]["ci95"]
        assert (low > 0) == (name == "Prediction") and (high < 0) == (name == "Planning")
        assert part["call_rate"] == (name in ("Prediction", "Planning"))
        alone = gain_over({r["key"]: r["correct"] for r in before}, after)
        assert part["gain"] == {
            "difference": pytest.approx(alone["difference"]),
            "ci95": alone["ci95"],
        }
    assert (
        parts["Perception"]["gain"] == {"difference": 0, "ci95": [0, 0]}
        and parts["Perception"]["n"] == 9 * 40
    )
    assert (
        "gain" not in summarise(agentic)
        and "gain" not in summarise(agentic)["by_category"]["Planning"]
    )


def test_a_gain_is_paired_and_counts_as_the_accuracy_does():
    """VSI-Bench: the overall is the mean of tasks. Paired, the same gain everywhere has an interval of one point."""

    def vsi(right):
        return [
            record(
                i,
                right(i),
                category="route_planning" if i < 10 else "object_counting",
                bench="vsi",
                room=i,
            )
            for i in range(100)
        ]

    direct, agentic = vsi(lambda i: 0), vsi(lambda i: i < 10)
    summary = summarise(agentic, direct)
    assert summary["accuracy"] == pytest.approx(0.5) and summary["gain"][
        "difference"
    ] == pytest.approx(0.5)
    assert summary["by_category"]["route_planning"]["gain"] == {"difference": 1, "ci95": [1, 1]}
    hard = np.random.default_rng(0).random(400)
    a, b = ([record(i, h < bar, room=i) for i, h in enumerate(hard)] for bar in (0.6, 0.5))
    paired = gain_over({r["key"]: r["correct"] for r in b}, a)["ci95"]
    assert (
        np.diff(paired)[0]
        < 0.7 * np.diff(interval([r["correct"] for r in a], [r["scene"] for r in a]))[0]
    )


def test_the_parts_of_vsi_count_as_its_overall_does():
    """Three types of directions are one task, whatever the number of their questions; lenient counts alike."""
    kinds = (
        ["object_rel_direction_easy"] * 6
        + ["object_rel_direction_medium"] * 3
        + ["object_rel_direction_hard"]
    )
    direct = [record(i, 0, category=kind, bench="vsi", room=i) for i, kind in enumerate(kinds)]
    agentic = [record(i, i < 6, category=kind, bench="vsi", room=i) for i, kind in enumerate(kinds)]
    agentic = [
        row | {"groups": ["object_rel_direction", row["category"]], "lenient": 1 - row["correct"]}
        for row in agentic
    ]
    summary = summarise(agentic, direct)
    part = summary["by_category"]["object_rel_direction"]
    assert (
        summary["accuracy"]
        == pytest.approx(1 / 3)
        == part["accuracy"]
        == part["gain"]["difference"]
    )
    assert (
        summary["lenient"] == pytest.approx(2 / 3)
        and summary["by_category"][kinds[0]]["accuracy"] == 1
    )


def test_what_has_no_gold_answer_has_no_gain(modes):
    direct, agentic = modes
    more = [record(999, right, True, "Prediction", gold=None) for right in (0, 1)]
    gains = [
        summarise([*agentic, *own[1]], [*direct, *own[0]])["by_category"]["Prediction"]["gain"]
        for own in (([], []), ([more[0]], [more[1]]))
    ]
    assert gains[0] == gains[1]


def test_the_table_prints_a_line_of_gains_per_level_and_type_with_its_whole_name(modes, capsys):
    direct, agentic = modes
    runs = {("direct", "none"): summarise(direct), ("agentic", "tuned"): summarise(agentic, direct)}
    print_answers(runs, 0.25)
    before, after = capsys.readouterr().out.split("accuracy beyond direct on the same questions")
    gain = runs["agentic", "tuned"]["by_category"]["Prediction"]["gain"]
    cell = "{:+.3f} [{:+.2f} {:+.2f}]".format(gain["difference"], *gain["ci95"])
    for name in ("Perception", "Planning", "Prediction", "Cross-Video", *VIDEO_TYPES):
        row = re.compile(re.escape(name) + r" +\d+ ")
        (line,) = [line for line in after.splitlines() if row.match(line)]
        assert re.search(r" - +[+-]\d\.\d{3} \[[+-]\d\.\d\d [+-]\d\.\d\d\]$", line)
        assert (cell in line) == (name == "Prediction")
        (line,) = [line for line in before.splitlines() if row.match(line)]
        assert ("100%" in line) == (name in ("Planning", "Prediction"))
    assert "agentic, tuned" in after.splitlines()[1]
    print_answers({("direct", "none"): summarise(direct)}, 0.25)
    assert "beyond direct" not in capsys.readouterr().out


def test_translation_is_listed_in_mindcube_and_not_counted():
    rows = [
        record(0, 1, category="rotation", bench="mindcube"),
        record(1, 0, category="translation", bench="mindcube"),
    ]
    summary = summarise(rows)
    assert summary["n"] == summary["accuracy"] == 1
    assert list(summary["by_category"]) == ["rotation", "translation"]
