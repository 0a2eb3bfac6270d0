"""The loop over questions, its denominators, its intervals, and what it leaves on disk. No trained model is needed."""

import json
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from ranks import on_ranks
from test_real_views import Matcher, detect, triples

import data
import evaluate
from evaluate import (
    Condition,
    Rooms,
    ask_missing,
    bench_called,
    conditions_of,
    evaluate_policy,
    main,
    parse_args,
    score,
)
from extras.benches import common
from extras.benches.mindcube import make_mindcube
from extras.remote import client
from extras.remote.endpoint import raise_if_down
from extras.report import calibration, pages, real_views, scan_views
from extras.report.calibration import DOSES, dose_rows
from lib import answers
from lib.answers import load_predictions, with_keys
from lib.dialogue import Trajectory
from lib.distributed import World
from lib.geometry import Motion, camera_pose
from lib.images import save_image
from lib.protocol import NOTE, TOOLS, prompt_text
from lib.questions import text_only_chance
from lib.records import load_jsonl, read_log, save_jsonl
from lib.rooms import TrueRenderer
from lib.scores import brief, chance, interval, paired_bootstrap, summarise
from lib.simulators import SimulatorError, load_triples
from policy import Policy

ALONE = World(0, 1, 0, None)
SETTINGS = {"version": 0, "policy": "p", "seed": 0, "max_new_tokens": 3, "frames": None}


def question(number, answer="B", need=True, **more):
    return {
        "id": f"q{number}",
        "bench": "rooms",
        "images": [np.zeros((32, 32, 3), np.uint8)],
        "question": "Which object?",
        "options": ["A. red box", "B. blue ball", "C. pink table", "D. cyan box"],
        "answer": answer,
        "kind": "mca",
        "category": "region" if number % 2 else "camera-object",
        "needs_view": need,
        "scene": None,
        **more,
    }


def scripted(monkeypatch, says, asked=None):
    """Let `evaluate` meet a policy that gives answer says(question, mode) after a call per needs_view question."""

    def rollout(policy, questions, simulator, mode, **flags):
        if asked is not None:
            asked.append([q["id"] for q in questions])
        return [
            Trajectory(
                q,
                mode,
                answer=says(q, mode),
                turns=[f"<think></think><answer>{says(q, mode)}</answer>"],
                valid_calls=int(mode != "direct" and bool(q["needs_view"])),
            )
            for q in questions
        ]

    monkeypatch.setattr(evaluate, "rollout", rollout)


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


# ---- asking ---------------------------------------------------------------------------------------------------------


def condition(mode="direct", simulator="none"):
    return Condition(mode, simulator, {**SETTINGS, "mode": mode, "weights": simulator})


def ask(questions, mode="direct", policy=None, batch=64):
    """The predictions of all questions, which no trained policy answers."""
    rows = []
    pairs = with_keys(questions)
    for batch_rows, _ in evaluate_policy(policy, Rooms(), pairs, condition(mode), None, batch):
        rows += batch_rows
    return rows


def ask_into(out, questions, mode="direct", policy=None, world=ALONE, batch=64):
    """The predictions that `out` holds after `ask_missing`."""
    args = SimpleNamespace(out=str(out), batch=batch)
    ask_missing(policy, Rooms(), questions, condition(mode), None, args, world)
    answers.gather_predictions(out)
    return load_predictions(out, condition(mode).settings, questions)


def test_every_question_counts_even_broken_and_duplicate_ones(monkeypatch, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    questions = [
        question(0),
        question(1),
        question(1),
        question(2, images=[str(tmp_path / "missing.png")]),
        question(3, images=[str(broken)]),
        question(4, answer=None),
    ]
    scripted(monkeypatch, lambda q, mode: "B")
    records = ask(questions, "agentic", batch=4)
    summary = summarise(records)
    assert summarise([record("a", 1), record("b", 0, turns=[" "])])["counts"]["empty reply"] == 1
    assert [r["key"] for r in records] == ["q0", "q1", "q1#2", "q2", "q3", "q4"]
    assert summary["n"] == 5 and summary["accuracy"] == pytest.approx(3 / 5)
    assert summary["counts"] == {
        "no answer read": 2,
        "empty reply": 0,
        "image unreadable (counted as wrong)": 2,
        "refused by the endpoint (counted as wrong)": 0,
        "duplicate id": 1,
        "asked without a missing image": 0,
        "no gold answer (left out)": 1,
    }


def test_what_is_scored_is_the_answer_in_rooms_and_the_whole_turn_elsewhere():
    rooms, mindcube = question(0), question(0, bench="mindcube")
    turn = "<think>not A. at all</think><answer>B</answer>"
    dialogue = Trajectory(rooms, "direct", answer="B", turns=[turn])
    assert Rooms().judge(rooms, dialogue, "direct")["correct"] == 1
    assert bench_called("mindcube").judge(mindcube, dialogue, "direct")["correct"] == 0
    cut = Trajectory(rooms, "direct", truncated=True, turns=["<answer>B</answer> and on"])
    assert Rooms().judge(rooms, cut, "direct")["correct"] == 0
    assert score("mindcube", rooms, "<answer>B</answer>") == ("B", 1.0)
    assert score("rooms", rooms, "blue ball") == ("B", 1.0)
    assert score("rooms", rooms, None) == (None, 0.0)


def sat(number, **more):
    options = ["A. rotated left", "B. night stand"]
    more |= {"bench": "sat", "cluster": str(number)}
    return question(number, options=options, **more)


def test_an_answer_that_was_never_accepted_is_wrong_but_in_mode_official():
    """Forced without a call, or cut off in its thoughts: what was said last counts for nothing."""
    turns = {
        "mindcube": "<think>so</think><answer>B. ball</answer>",
        "mmsi": "B",
        "mmsi_video": "B",
        "vsi": "B",
        "sat": "night stand",
        "rooms": "B",
    }
    for name, turn in turns.items():
        row = sat(0) if name == "sat" else question(0, bench=name)
        for answer in (None, "B"):
            dialogue = Trajectory(row, "forced", answer=answer, turns=[turn] * 10)
            verdict = bench_called(name).judge(row, dialogue, "forced")
            assert verdict["correct"] == verdict["lenient"] == float(answer == "B"), name
    cut = Trajectory(question(0, bench="mmsi"), "direct", truncated=True, turns=["``B`` since"])
    mmsi = bench_called("mmsi")
    assert (
        mmsi.judge(cut.question, cut, "official")["correct"] == 1
    )  # the bench's own code reads it
    assert mmsi.judge(cut.question, cut, "direct")["correct"] == 0


@pytest.mark.parametrize(
    "answer, ours, official",
    [
        ("B", 1, 0),
        ("B. night stand", 1, 0),
        ("night stand", 1, 0),
        ("A. rotated left", 0, 0),
        ("C", 0, 0),
        ("a chair", 0, 0),
        ("It is the night stand.", 1, 0),
        ("ight stand", 0, 1),
    ],
)
def test_sat_is_scored_by_letter_or_words_where_our_words_show_letters(answer, ours, official):
    turn = f"<think>left?</think>\n<answer>{answer}</answer>"
    dialogue = Trajectory(sat(0), "direct", answer=answer, turns=[turn])
    judge = bench_called("sat").judge
    for mode in ("direct", "forced", "agentic", "search"):
        assert judge(sat(0), dialogue, mode)["correct"] == ours
    assert judge(sat(0), dialogue, "official")["correct"] == official


def test_mindcube_is_asked_in_its_published_words_in_mode_official():
    row = question(0, bench="mindcube", category="among", official=["", "", "Which?"])
    mindcube = bench_called("mindcube")
    assert mindcube.prompt(row, "official") == row["official"]
    assert mindcube.prompt(row, "direct") is None and Rooms().prompt(row, "direct") is None
    assert parse_args(["--bench", "mindcube", "--mode", "official"]).mode == "official"


def test_a_server_that_refuses_one_mode_stops_there_and_a_refused_rest_does_not(
    monkeypatch, tmp_path
):
    """Direct answers came; a refusal of all calls is a server without tools. But single questions may be too long."""

    def refuse(policy, questions, *_):
        results = [SimulatorError("400: no tools") for _ in questions]
        raise_if_down(policy.endpoint, results)
        return results

    questions = [question(0), question(1)]
    policy = client.RemotePolicy("http://127.0.0.1:9/v1", "vlm")
    scripted(monkeypatch, lambda q, mode: "B")
    ask_into(tmp_path, questions[:1], "forced")
    policy.endpoint.served = True
    monkeypatch.setattr(client, "converse", refuse)
    with pytest.raises(SystemExit, match="no tools The answers so far are in"):
        ask_into(tmp_path / "new", questions, "forced", policy)
    row = ask_into(tmp_path, questions, "forced", policy)["q1"]
    assert row["error"] == "400: no tools" and row["correct"] == 0


def test_every_batch_is_on_disk_before_the_next_is_asked_and_answers_are_not_asked_again(
    monkeypatch, tmp_path
):
    asked, on_disk = [], []
    questions = [question(i) for i in range(5)]

    def answer(q, mode):
        on_disk.append(len(read_log(tmp_path / "predictions.jsonl")))
        return "B"

    scripted(monkeypatch, lambda q, mode: "B")
    ask_into(tmp_path, questions[1:2])
    scripted(monkeypatch, answer, asked)
    assert len(ask_into(tmp_path, questions, batch=2)) == 5
    assert asked == [["q0", "q2"], ["q3", "q4"]] and set(on_disk[:4]) == {1} < set(on_disk) == {
        1,
        3,
    }


def test_several_processes_ask_every_question_once_between_them(monkeypatch, tmp_path):
    asked, questions = [], [question(i) for i in range(7)]
    scripted(monkeypatch, lambda q, mode: "B")
    ask_into(tmp_path, questions[1:2])
    scripted(monkeypatch, lambda q, mode: "B", asked)
    args = SimpleNamespace(out=str(tmp_path), batch=64)
    for rank in range(3):
        world = World(rank, 3, rank, None)
        ask_missing(None, Rooms(), questions, condition(), None, args, world)
    assert asked == [["q0", "q4"], ["q2", "q5"], ["q3", "q6"]]


def test_direct_mode_gets_no_simulator():
    args = parse_args(["--simulator", "truth", "reprojection"])
    columns = [(one.mode, one.simulator) for one in conditions_of(args, "policy")]
    tools = [(mode, name) for mode in ("forced", "agentic") for name in args.simulator]
    assert columns == [("direct", "none"), *tools]


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.4 <= high
        for low, high in (interval(rng.random(200) < 0.4, seed=i) for i in range(200))
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
        record("c", 1, False, need=False),
        record("d", 1, False, need=None, category="translation"),
    ]
    for row in records:
        row["bench"] = "mindcube"  # where translation is listed, not counted
    summary = summarise(records)
    assert (summary["n"], summary["accuracy"], summary["call_rate"]) == (
        3,
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )
    strata = {title: (part["n"], part["accuracy"]) for title, part in summary["by_need"].items()}
    assert strata == {"needs_view": (2, 0.5), "answerable": (1, 1.0)}
    assert list(summary["by_category"]) == [
        "region",
        "rotation",
        "translation",
    ]  # listed, not counted
    assert summary["letters"] == {"B": 3}
    with pytest.raises(ValueError, match="nothing to summarise"):
        summarise([])


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


def test_paired_bootstrap_is_sharper_than_two_intervals_and_refuses_other_questions():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a, b = ([record(str(i), h < bar) for i, h in enumerate(hard)] for bar in (0.6, 0.5))
    result = paired_bootstrap(a, list(reversed(b)))
    assert (
        result["difference"] == pytest.approx(brief(a)["accuracy"] - brief(b)["accuracy"])
        and result["ci95"][0] > 0
    )
    assert np.diff(result["ci95"])[0] < 0.7 * np.diff(brief(a)["ci95"])[0]
    assert paired_bootstrap(a, a)["ci95"] == [0, 0]
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap(a, b[1:])


def blind_questions(count, seed, leak=None):
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        names = [
            f"{c} {k}"
            for c, k in zip(
                rng.permutation(["red", "blue", "pink", "cyan", "green"])[:4],
                rng.choice(["box", "ball", "table"], 4),
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
                options=[f"{letter}. {name}" for letter, name in zip("ABCD", names)],
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


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data of a few rooms and an untrained policy."""
    root = tmp_path_factory.mktemp("evaluate")
    rows = [
        row for seed in (5_000_000, 5_000_001) for row in data.room_questions(seed, root / "data")
    ]
    save_jsonl(root / "data" / "questions_test.jsonl", rows)
    save_jsonl(root / "data" / "triples_test.jsonl", data.room_triples(5_000_000, root / "data"))
    make_mindcube(root / "data" / "mindcube", root / "data" / "questions_test.jsonl")
    Policy.tiny().save(root / "policy")
    Policy.tiny(seed=1).save(root / "other")
    return root


def arguments(root, bench, *more):
    folder = "data/mindcube" if bench == "mindcube" else "data"
    return [
        "--bench",
        bench,
        "--policy",
        str(root / "policy"),
        "--data",
        str(root / folder),
        "--max-new-tokens",
        "3",
        "--simulator",
        "truth" if bench != "mindcube" else "none",
        "--out",
        str(root / "eval" / bench),
        *more,
    ]


def test_rooms_from_end_to_end_and_a_killed_run_continues(place, monkeypatch, capsys):
    main(arguments(place, "rooms"))
    out = place / "eval" / "rooms"
    results = json.loads((out / "results.json").read_text())
    lines = (out / "predictions.jsonl").read_text().splitlines()
    n = len(load_jsonl(place / "data" / "questions_test.jsonl"))
    assert list(results["modes"]) == ["direct", "forced", "agentic"] and len(lines) == 3 * n
    for summary in results["modes"].values():
        assert {"accuracy", "ci95", "call_rate", "n", "by_need", "by_category"} <= set(
            summary
        ) and summary["n"] == n
    assert "needs_view" in capsys.readouterr().out
    html = (out / "report.html").read_text()
    assert "data:image/png;base64," in html and "http" not in html and "Image-4" in html
    assert html.count("<details") == 3 * n and (out / "workflow.png").exists()
    assert results["diagnosis"]["agentic"]["truth"]["n"] == n and list(results["diagnosis"]) == [
        "forced",
        "agentic",
    ]

    torn = lines[: n + 2] + [lines[n + 2][:20]]  # killed while writing a line
    (out / "predictions.jsonl").write_text("\n".join(torn))
    asked, real = [], evaluate.rollout
    monkeypatch.setattr(
        evaluate,
        "rollout",
        lambda policy, questions, *a, **k: (
            asked.extend(questions) or real(policy, questions, *a, **k)
        ),
    )
    main(arguments(place, "rooms"))
    assert len(asked) == 2 * n - 2
    again = json.loads((out / "results.json").read_text())
    for mode in again["modes"]:
        assert again["modes"][mode]["accuracy"] == results["modes"][mode]["accuracy"]
    (out / "report.html").unlink()
    main([*arguments(place, "rooms"), "--no-report"])
    assert len(asked) == 2 * n - 2 and not (out / "report.html").exists()


def test_a_question_whose_image_was_missing_is_asked_again_and_takes_the_place_of_its_failure(
    place, tmp_path
):
    rows = load_jsonl(place / "data" / "questions_test.jsonl")[:3]
    away, there = tmp_path / "away.png", Path(rows[1]["images"][0])
    rows[1]["images"] = [str(away), *rows[1]["images"][1:]]
    save_jsonl(tmp_path / "questions_test.jsonl", rows)
    own = [
        *arguments(place, "rooms", "--mode", "direct", "--no-report"),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]

    def counts():
        main(own)
        direct = json.loads((tmp_path / "out" / "results.json").read_text())["modes"]["direct"]
        return direct["n"], direct["counts"]["image unreadable (counted as wrong)"]

    assert counts() == counts() == (3, 1)
    away.write_bytes(there.read_bytes())
    assert counts() == (3, 0) and len(read_log(tmp_path / "out" / "predictions.jsonl")) == 3
    for row in rows:
        row["images"] = [str(tmp_path / "nowhere.png")]
    save_jsonl(tmp_path / "questions_test.jsonl", rows)
    with pytest.raises(SystemExit, match="Not one image of the 3 questions .*nowhere.png"):
        main(own)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "None of the 0 questions"),
        (b"\xff{}\n", "is not UTF-8"),
        ("\n[1, 2]\n", "line 2 is not a JSON object"),
        ('{"id": "q"}\n', "question 1 has no bench and no images"),
        ("{", "line 1 is not JSON"),
    ],
)
def test_a_file_of_questions_that_is_none_ends_in_a_sentence(place, tmp_path, text, sentence):
    (tmp_path / "questions_test.jsonl").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    with pytest.raises(SystemExit, match=sentence):
        main([*arguments(place, "rooms"), "--data", str(tmp_path)])


def test_questions_without_any_gold_answer_are_not_asked(place, tmp_path):
    rows = load_jsonl(place / "data" / "questions_test.jsonl")[:2]
    (tmp_path / "questions_test.jsonl").write_text(
        "\n".join(
            json.dumps({**row, "answer": None, "question": "a\u2028b"}, ensure_ascii=False) + "\n"
            for row in rows
        )
    )
    with pytest.raises(
        SystemExit, match="None of the 2 questions of --bench rooms has a gold answer"
    ):
        main(
            [*arguments(place, "rooms"), "--data", str(tmp_path)]
        )  # a separator in a string ends no line


def test_one_simulator_at_a_time_is_in_memory_and_none_is_loaded_twice(
    place, tmp_path, monkeypatch
):
    alive, loaded = [], []

    class Cyclic(TrueRenderer):  # as a WorldModel is
        def __init__(self):
            self.own = self

    def load(name, *_):
        if name == "none":
            return None
        assert not [one for one in alive if one() is not None]
        loaded.append(name)
        one = Cyclic()
        alive.append(weakref.ref(one))
        return one

    monkeypatch.setattr(evaluate, "load_simulator", load)
    scripted(monkeypatch, lambda q, mode: "B")
    own = [*arguments(place, "rooms", "--limit", "2", "--no-report"), "--out", str(tmp_path)]
    main([*own, "--simulator", "truth"])
    assert loaded == ["truth"]
    main([*own, "--simulator", "truth", "reprojection"])
    assert loaded[1:] == ["truth", "reprojection"]


def test_batches_are_small_for_a_published_policy_and_of_the_width_of_a_server(
    place, tmp_path, monkeypatch
):
    batches = []
    monkeypatch.setattr(evaluate, "ask_missing", lambda *flags: batches.append(flags[5].batch))
    monkeypatch.setattr(evaluate, "conclude", lambda *_: {})
    own = ["--data", str(place / "data"), "--mode", "direct", "--out", str(tmp_path), "--no-report"]
    local = ["--policy", str(place / "policy")]
    remote = ["--policy-url", "http://127.0.0.1:9/v1", "--model", "m"]
    monkeypatch.setattr(pages, "write_answers", lambda *_: [])
    for more in (local, [*local, "--batch", "3"], remote, [*remote, "--concurrency", "5"]):
        main([*own, *more])
    monkeypatch.setattr(Policy, "turn_limit", 4096)
    main([*own, *local])
    assert batches == [64, 3, 8, 5, 8]


def test_a_policy_configured_anew_is_another_one(tmp_path):
    Policy.tiny().save(tmp_path / "policy")
    before = evaluate.fingerprint(str(tmp_path / "policy"))
    config = tmp_path / "policy" / "generation_config.json"
    config.write_text("{}")
    os.utime(config, (2e9, 2e9))
    assert evaluate.fingerprint(str(tmp_path / "policy")) != before


def test_the_default_of_frames_is_its_number(monkeypatch):
    monkeypatch.setattr(common, "load", lambda *_: [])
    frames = []
    for bench, *flags in (["vsi"], ["vsi", "--frames", "3"], ["mindcube", "--frames", "3"]):
        args = parse_args(["--bench", bench, "--data", "here", "--simulator", "none", *flags])
        bench_called(bench).load(args)
        frames.append(conditions_of(args, "policy")[0].settings["frames"])
    assert frames == [32, 3, None]


def test_old_answers_of_a_url_are_told(place, tmp_path, monkeypatch, capsys):
    def served(policy, questions, simulator, mode, seed):
        return [Trajectory(q, mode, answer="B", turns=["<answer>B</answer>"]) for q in questions]

    monkeypatch.setattr(client, "converse", served)
    own = [
        "--data",
        str(place / "data"),
        "--mode",
        "direct",
        "--out",
        str(tmp_path),
        "--limit",
        "2",
        "--no-report",
        "--policy-url",
        "http://127.0.0.1:9/v1",
        "--model",
        "m",
    ]
    main(own)
    assert "Old answers" not in capsys.readouterr().out
    main(own)
    assert "Old answers of m at http://127.0.0.1:9/v1" in capsys.readouterr().out


def test_answers_of_another_policy_stay_and_are_not_counted(place):
    own = [
        *arguments(place, "mindcube", "--mode", "direct", "--no-report"),
        "--out",
        str(place / "two"),
    ]
    main(own)
    before = (place / "two" / "predictions.jsonl").read_text()
    main([*own, "--policy", str(place / "other")])
    lines = (place / "two" / "predictions.jsonl").read_text().splitlines()
    n = len(before.splitlines())
    assert "\n".join(lines[:n]) + "\n" == before and len(lines) == 2 * n
    assert json.loads((place / "two" / "results.json").read_text())["modes"]["direct"]["n"] <= n
    main(own)
    assert len((place / "two" / "predictions.jsonl").read_text().splitlines()) == 2 * n


# ---- several processes ----------------------------------------------------------------------------------------------


def ask_and_measure(root, out):
    """What every rank does: ask questions and imagine views, in batches of two."""
    for bench, limit in (("rooms", "8"), ("wm", "3")):
        main(
            [
                *arguments(
                    Path(root),
                    bench,
                    "--batch",
                    "2",
                    "--limit",
                    limit,
                    "--dose-rooms",
                    "1",
                    "--no-report",
                ),
                "--out",
                f"{out}/{bench}",
            ]
        )


def test_two_ranks_give_the_results_of_one_process_even_where_three_were_killed(place):
    one, two = place / "one", place / "two_ranks"
    ask_and_measure(place, one)
    lines = (one / "rooms" / "predictions.jsonl").read_text().splitlines()
    (two / "rooms").mkdir(parents=True)
    (two / "rooms" / "predictions.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (two / "rooms" / "predictions_rank0.jsonl").write_text(
        "\n".join(lines[1:4]) + "\n"
    )  # one answer twice
    (two / "rooms" / "predictions_rank2.jsonl").write_text(
        lines[6] + "\n" + lines[7][:30]
    )  # killed while writing
    on_ranks(2, ask_and_measure, place, two)
    for bench in ("rooms", "wm"):
        clockless = [
            re.sub('"seconds": [0-9.]+', "", (out / bench / "results.json").read_text())
            for out in (one, two)
        ]
        assert clockless[0] == clockless[1]
    told = [
        sorted(
            (row["mode"], row["key"], row["turns"], row["views"])
            for row in read_log(out / "rooms" / "predictions.jsonl")
        )
        for out in (one, two)
    ]
    assert (
        told[0] == told[1]
        and len(told[0]) == len(lines)
        and not list((two / "rooms").glob("predictions_rank*"))
    )


def test_the_first_answer_to_a_question_counts(tmp_path):
    first, second = World(0, 2, 0, None), World(1, 2, 1, None)
    row = {"key": "a", "digest": 1, "mode": "direct", "weights": "none", "policy": "p"}
    answers.append_predictions(
        tmp_path, first, [{**row, "said": "A"}, {**row, "said": "B", "policy": "q"}]
    )
    answers.append_predictions(
        tmp_path, second, [{**row, "said": "C"}, {**row, "said": "D", "mode": "forced"}]
    )
    answers.gather_predictions(tmp_path)
    assert [line["said"] for line in read_log(tmp_path / "predictions.jsonl")] == ["A", "B", "D"]
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_failure_gives_way_to_an_answer_and_to_a_failure_that_is_no_worse(tmp_path):
    asked = [question(number) for number in range(4)]
    settings = condition().settings

    def row(number, said, error=None, missing=0):
        digest = answers.digest(asked[number])
        failed = {"error": error, "missing_images": missing}
        return {**settings, "key": f"q{number}", "digest": digest, "said": said, **failed}

    def said():
        rows = load_predictions(tmp_path, settings, asked)
        return {key: line["said"] for key, line in rows.items()}

    before = [row(0, "A"), row(1, None, "image: gone"), row(2, "A", missing=2)]
    answers.append_predictions(tmp_path, ALONE, before)
    with open(tmp_path / "predictions.jsonl", "a") as lines:
        lines.write("[1]\n3\n")  # no objects
    assert said() == {"q0": "A", "q1": None, "q2": "A"}
    answered = [row(0, "B"), row(1, "B"), row(2, "B", missing=1), row(3, "A")]
    worse = [row(2, None, "image: gone"), row(3, None, "refused"), row(1, "C")]
    answers.append_predictions(tmp_path, ALONE, answered + worse)
    answers.gather_predictions(tmp_path)
    assert said() == {"q0": "A", "q1": "B", "q2": "B", "q3": "A"}
    assert all(isinstance(line, dict) for line in read_log(tmp_path / "predictions.jsonl"))


def test_views_are_kept_once(tmp_path):
    small, large = np.zeros((32, 32, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)
    names = answers.save_views(tmp_path, [small, large, small])
    assert names[0] == names[2] and len(list((tmp_path / "views").iterdir())) == 2
    assert names[0].endswith(".png") and names[1].endswith(".jpg")


def test_mindcube_layout_from_end_to_end(place):
    main(arguments(place, "mindcube", "--mode", "direct"))
    results = json.loads((place / "eval" / "mindcube" / "results.json").read_text())
    assert (
        set(results["modes"]["direct"]["by_category"]) <= {"rotation", "around"}
        and results["chance"] == 0.25
    )
    main(
        [
            *arguments(place, "mindcube", "--mode", "official", "--limit", "2"),
            "--out",
            str(place / "official"),
        ]
    )
    assert list(json.loads((place / "official" / "results.json").read_text())["modes"]) == [
        "official"
    ]
    with pytest.raises(SystemExit, match="works in rooms only"):
        main([*arguments(place, "mindcube"), "--simulator", "truth"])


def test_wm_from_end_to_end(place, capsys):
    main(arguments(place, "wm"))
    results = json.loads((place / "eval" / "wm" / "results.json").read_text())
    assert (
        results["pose"] == 1
        and results["content"] == 1
        and set(results["baselines"]) >= {"mean image"}
    )
    assert results["mse"] == 0 < results["baselines"]["nearest context view"]["mse"]
    assert results["calibration"]["none"]["pose"] == 1 and set(results["calibration"]) == set(
        calibration.ERRORS
    )
    assert "data:image/png;base64," in (place / "eval" / "wm" / "report.html").read_text()
    assert re.search(r"turn left +1\.0\d\d", capsys.readouterr().out)
    dose = results["dose"]["truth"]
    assert set(dose) == {"turn left", "turn right", "move left", "move right", "move forward"}
    assert all(told["slope"] == pytest.approx(1, abs=0.05) for told in dose.values())
    assert {p["amount"] for p in dose["turn right"]["points"] if p["trained"]} == {45, 90, 135}
    with Image.open(place / "eval" / "wm" / "dose.png") as picture:
        assert picture.width > 5 * 150


def test_one_triple_gives_results_that_are_json_and_none_gives_a_sentence(place, tmp_path):
    def nothing(name):
        raise AssertionError(f"{name} is no JSON")

    main(
        [
            *arguments(place, "wm", "--limit", "1", "--dose-rooms", "0"),
            "--out",
            str(tmp_path / "one"),
        ]
    )
    assert (
        json.loads((tmp_path / "one" / "results.json").read_text(), parse_constant=nothing)["n"]
        == 1
    )
    (tmp_path / "triples_test.jsonl").touch()
    with pytest.raises(SystemExit, match="holds no triples"):
        main([*arguments(place, "wm"), "--data", str(tmp_path)])


def test_a_simulator_behind_a_url_that_falls_silent_costs_no_view_that_it_gave(
    place, tmp_path, monkeypatch
):
    class Falling(TrueRenderer):
        def imagine(self, queries):
            raise SimulatorError(
                "The server is down.",
                True,
                [
                    *super().imagine(queries[:2]),
                    *(SimulatorError("gone", True) for _ in queries[2:]),
                ],
            )

    monkeypatch.setattr(evaluate, "load_simulator", lambda *_: Falling())
    own = [
        *arguments(place, "wm", "--dose-rooms", "0", "--limit", "4"),
        "--out",
        str(tmp_path),
        "--simulator",
        "http://127.0.0.1:9",
    ]
    with pytest.raises(SystemExit, match="The server is down. The views so far are in"):
        main(own)
    assert len(list(tmp_path.glob("views/*/*.png"))) == 2
    monkeypatch.setattr(evaluate, "load_simulator", lambda *_: TrueRenderer())
    main(own)
    assert json.loads((tmp_path / "results.json").read_text())["mse"] == 0


class Copier:
    """A simulator of scans that never moves; it is shown no room."""

    def imagine(self, queries):
        assert all(query.scene is None for query in queries)
        return [query.images[query.reference - 1] for query in queries]


def scans(folder, match):
    """Triples without a room, as data.py writes those of scans."""
    rows = triples(match, folder / "depth", [Motion("turn left", 45.0), Motion("move right", 0.5)])
    for row in rows:
        pictures = {f"{row['id']}_{k}.png": image for k, image in enumerate(row["context"])} | {
            f"{row['id']}_{name}.png": row[name] for name in ("target", "warp")
        }
        for name, pixels in pictures.items():
            save_image(folder / name, pixels)
        *context, target, warp = pictures
        row.update(
            context=context,
            target=target,
            warp=warp,
            context_depth=[str(place.relative_to(folder)) for place in row["context_depth"]],
        )
    save_jsonl(folder / "triples_test.jsonl", rows)


def test_wm_in_scans_from_end_to_end(tmp_path, monkeypatch, capsys):
    match, asked = Matcher(), []
    scans(tmp_path, match)
    own = [
        "--bench",
        "wm",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--simulator",
        "still",
    ]
    monkeypatch.setattr(evaluate, "load_simulator", lambda *_: Copier())
    monkeypatch.setattr(real_views, "matcher", lambda *flags: asked.append(flags) or match)
    monkeypatch.setattr(real_views, "detector", lambda model, device: detect)
    main([*own, "--matcher", "mine"])
    text = (tmp_path / "out" / "results.json").read_text()
    results, table = json.loads(text), capsys.readouterr().out
    assert (
        asked[0][0] == "mine" and results["matcher"] == "mine" and results["categories"] == "indoor"
    )
    assert (
        "NaN" not in text and "these are looked for: bed, chair" in table and "true view" in table
    )
    assert (
        results["oracles"]["true view"]["pose"] == results["oracles"]["true view"]["content"] == 1
    )
    assert (
        results["pose"] == 0 == results["baselines"]["copy of the reference"]["pose"]
        and results["found"] == 1
    )
    assert (
        results["turns"]["median_degrees"] == pytest.approx(45, abs=0.3)
        and results["thirds"] is None
    )
    assert "copy of the reference" in (tmp_path / "out" / "report.html").read_text()

    def missing(model, device):
        raise ValueError(f"{model} cannot be fetched.")

    monkeypatch.setattr(real_views, "detector", missing)
    main([*own, "--detector", "far/away"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Content is left out. far/away" in capsys.readouterr().out
    assert results["found"] == 1 and results["content"] is None and results["detector"] is None
    monkeypatch.setattr(real_views, "matcher", missing)
    with pytest.raises(SystemExit, match="found by a matcher. far/off cannot be fetched"):
        main([*own, "--matcher", "far/off"])
    with pytest.raises(SystemExit, match="works in rooms only"):
        main([*own[:-1], "truth"])
    rows = [json.loads(line) for line in (tmp_path / "triples_test.jsonl").read_text().splitlines()]
    save_jsonl(
        tmp_path / "triples_test.jsonl",
        [{k: v for k, v in row.items() if k != "context_depth"} for row in rows],
    )
    with pytest.raises(SystemExit, match="no depth of their context"):
        main(own)


def test_a_vlm_behind_a_url_lists_the_categories_of_scans(monkeypatch):
    sent = []

    def ask(policy, messages):
        sent.append(messages)
        return {"content": "Chair, lamp"}, False

    monkeypatch.setattr(client.RemotePolicy, "ask", ask)
    policy = client.RemotePolicy("http://127.0.0.1:9/v1", "vlm")
    image = np.zeros((8, 8, 3), np.uint8)
    assert real_views.categories([image, image], scan_views.asker(policy)) == ("chair", "lamp")
    assert [part["type"] for part in sent[0][0]["content"]] == ["image_url", "image_url", "text"]


def test_doses_leave_out_what_ends_in_the_furniture(place):
    rows = load_triples(place / "data" / "triples_test.jsonl")
    doses = dose_rows(rows, 24)
    assert len({row["id"] for row in doses}) == len(doses) <= len(DOSES)
    middle = {**rows[0], "reference": 1, "context_c2w": [np.eye(4).tolist()]}
    corner = {**middle, "context_c2w": [camera_pose(0, -1.3, 1.2).tolist()]}
    assert len(dose_rows([middle], 1)) == len(DOSES)
    ways = [row["motion"]["kind"] for row in dose_rows([corner], 1)]
    assert "turn left" in ways and "move forward" not in ways and dose_rows(rows, 0) == []


def test_the_untuned_twin_stands_beside_the_tuned_one_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_args(["--bench", "wm"]).simulator == ["tuned"]
    (tmp_path / "out/wm-untuned").mkdir(parents=True)
    (tmp_path / "out/wm-untuned/config.json").write_text("{}")
    assert parse_args(["--bench", "wm"]).simulator == ["tuned", "untuned"] and parse_args(
        []
    ).simulator == ["tuned"]
    assert parse_args(["--bench", "wm", "--simulator", "truth"]).simulator == ["truth"]


def test_missing_stages_are_told_in_a_sentence(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="train_sft.py"):
        main(["--data", str(place / "data")])
    with pytest.raises(SystemExit, match="train_wm.py"):
        main(["--data", str(place / "data"), "--policy", str(place / "policy"), "--mode", "forced"])
    with pytest.raises(SystemExit, match="MLL-Lab/MindCube"):
        main(["--bench", "mindcube"])


def test_helpers_of_the_command_line():
    for flags in (
        ["--concurrency", "0"],
        ["--dose-rooms", "-1"],
        ["--threads", "-1"],
        ["--batch", "0"],
    ):
        with pytest.raises(SystemExit):
            parse_args(flags)
    assert parse_args([]).out == "out/eval/rooms" and parse_args(["--bench", "wm"]).mode == "all"
    keys = [key for key, _ in with_keys([question(0)] * 3)]
    assert keys == ["q0", "q0#2", "q0#3"]


# ---- published benches ----------------------------------------------------------------------------------------------


def test_a_bench_asked_in_its_own_words_takes_any_reply_and_still_knows_the_tool():
    policy, clip = Policy.tiny(), [np.zeros((32, 32, 3), np.uint8)] * 2
    asked = {
        **question(0),
        "bench": "mmsi_video",
        "prompt": ["Watch. ", " then ", " Which? Reply with a letter."],
    }
    text = prompt_text(asked, "agentic", 2)
    assert "Watch. Image-1: " in text and NOTE["agentic"] not in text and TOOLS in text
    assert text.endswith(" Which? Reply with a letter.<|im_end|>\n<|im_start|>assistant\n")
    assert TOOLS not in prompt_text(asked, "direct", 2)
    told = Trajectory.start(policy, asked, clip, "agentic")
    told.say(
        policy,
        '<tool_call>{"name": "imagine", "arguments": {"image": 3, "motion": "turn left", "amount": 45}}'
        "</tool_call>",
    )
    assert told.invalid_calls == 1 and "no such image" in told.reply
    told.observe(policy)
    told.say(policy, "B")
    assert told.done and told.answer == "B"
    with pytest.raises(ValueError):
        prompt_text(asked, "agentic", 3)


def test_published_records_are_scored_grouped_and_weighted_by_their_own_rules(monkeypatch):
    """VSI-Bench: a number scores by relative accuracy, and the overall is the mean of tasks, not of questions."""

    def vsi(number, category, answer, options=()):
        return question(
            number,
            bench="vsi",
            category=category,
            answer=answer,
            options=list(options),
            official=["", "", "How many?"],
            cluster=f"scene{number % 2}",
            kind="mca" if options else "na",
            needs_view=None,
        )

    letters = ["A. left", "B. right"]
    questions = [
        vsi(0, "object_counting", "4"),
        vsi(1, "route_planning", "A", letters),
        vsi(2, "route_planning", "B", letters),
        vsi(3, "route_planning", "B", letters),
    ]
    bench, prompts = bench_called("vsi"), []

    def rollout(policy, questions, simulator, mode, **flags):
        assert mode == "direct"
        prompts.extend(q["prompt"] for q in questions)
        said = ("4", "A", "A", "A")
        return [
            Trajectory(q, mode, answer=answer, turns=[answer])
            for q, answer in zip(questions, said, strict=True)
        ]

    monkeypatch.setattr(evaluate, "rollout", rollout)
    monkeypatch.setattr(bench, "images", lambda question: question["images"])
    for mode in ("direct", "official"):
        column = condition(mode)
        (rows, _), *_ = evaluate_policy(None, bench, with_keys(questions), column)
        assert [row["correct"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert prompts[:4] == [None] * 4 and "How many?" in prompts[4][-1]
    summary = summarise(rows)
    assert summary["accuracy"] == pytest.approx((1 + 1 / 3) / 2)  # of questions it would be 1 / 2
    assert summary["by_category"]["route_planning"]["n"] == 3 and summary["letters"] == {"A": 3}
