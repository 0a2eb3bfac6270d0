"""Evaluation where it needs extras/: published benches, servers, scans, doses, pages."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_evaluate import arguments, ask_into, condition, question, scripted
from test_real_views import Matcher, detect, triples

import data
import evaluate
from evaluate import ask_batch, conditions_of, main, open_bench, parse_args
from extras.benches import common
from extras.benches.mindcube import make_mindcube
from extras.remote import client
from extras.remote.endpoint import raise_if_down
from extras.report import pages, real_views, scan_views, search
from extras.report.doses import DOSES, dose_rows
from lib.answers import load_triples, with_keys
from lib.dialogue import Trajectory
from lib.geometry import Motion, camera_pose
from lib.images import save_image
from lib.records import save_jsonl
from lib.scores import summarise
from lib.simulators import SimulatorError
from policy import Policy


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data of a few rooms, in MindCube's layout too, and an untrained policy."""
    root = tmp_path_factory.mktemp("evaluate")
    rows = data.room_questions(5_000_000, root / "data")
    save_jsonl(root / "data" / "questions_test.jsonl", rows)
    save_jsonl(root / "data" / "triples_test.jsonl", data.room_triples(5_000_003, root / "data"))
    make_mindcube(root / "data" / "mindcube", root / "data" / "questions_test.jsonl")
    Policy.tiny().save(root / "policy")
    return root


def test_what_is_scored_of_a_published_bench_is_the_whole_turn():
    row = question(0, bench="mindcube")
    turn = "<think>not A. at all</think><answer>B</answer>"
    dialogue = Trajectory(row, "direct", answer="B", turns=[turn])
    assert open_bench("mindcube").judge(row, dialogue, "direct")["correct"] == 0
    assert common.official_score("mindcube", row, "<answer>B</answer>") == ("B", 1.0)


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
            verdict = open_bench(name).judge(row, dialogue, "forced")
            assert verdict["correct"] == verdict["lenient"] == float(answer == "B"), name
    cut = Trajectory(question(0, bench="mmsi"), "direct", truncated=True, turns=["``B`` since"])
    mmsi = open_bench("mmsi")
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
    judge = open_bench("sat").judge
    for mode in ("direct", "forced", "agentic", "search"):
        assert judge(sat(0), dialogue, mode)["correct"] == ours
    assert judge(sat(0), dialogue, "official")["correct"] == official


def test_mindcube_is_asked_in_its_published_words_in_mode_official():
    row = question(0, bench="mindcube", category="among", official=["", "", "Which?"])
    mindcube = open_bench("mindcube")
    assert mindcube.prompt(row, "official") == row["official"]
    assert mindcube.prompt(row, "direct") is None and evaluate.Rooms().prompt(row, "direct") is None
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
    monkeypatch.setattr(search, "converse", refuse)
    with pytest.raises(SimulatorError, match="no tools"):
        ask_into(tmp_path / "new", questions, "forced", policy)
    row = ask_into(tmp_path, questions, "forced", policy)["q1"]
    assert row["error"] == "400: no tools" and row["correct"] == 0


@pytest.mark.slow
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
    for more in (local, [*local, "--batch", "3"], remote, [*remote, "--batch", "5"]):
        main([*own, *more])
    monkeypatch.setattr(Policy, "is_tiny", False)
    main([*own, *local])
    assert batches == [64, 3, 8, 5, 8]


def test_the_default_of_frames_is_its_number(monkeypatch):
    monkeypatch.setattr(common, "load", lambda *_: [])
    frames = []
    for bench, *flags in (["vsi"], ["vsi", "--frames", "3"], ["mindcube", "--frames", "3"]):
        args = parse_args(["--bench", bench, "--data", "here", "--simulator", "none", *flags])
        open_bench(bench).load(args)
        frames.append(conditions_of(args, "policy")[0].settings["frames"])
    assert frames == [32, 3, None]


def test_old_answers_of_a_url_are_told(place, tmp_path, monkeypatch, capsys):
    def served(policy, questions, simulator, mode, seed):
        return [Trajectory(q, mode, answer="B", turns=["<answer>B</answer>"]) for q in questions]

    monkeypatch.setattr(search, "converse", served)
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


@pytest.mark.slow
def test_mindcube_layout_from_end_to_end(place):
    flags = ["--data", str(place / "data" / "mindcube"), "--simulator", "none"]
    out = place / "eval" / "mindcube"
    main(arguments(place, "mindcube", *flags, "--mode", "direct"))
    results = json.loads((out / "results.json").read_text())
    groups = set(results["modes"]["direct"]["by_category"])
    assert groups <= {"rotation", "around"} and results["chance"] == 0.25
    main(arguments(place, "mindcube", *flags, "--mode", "official", "--limit", "2"))
    assert list(json.loads((out / "results.json").read_text())["modes"]) == ["official"]
    with pytest.raises(SystemExit, match="works in rooms only"):
        main([*arguments(place, "mindcube", *flags), "--simulator", "truth"])


def test_a_missing_bench_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="MLL-Lab/MindCube"):
        main(["--bench", "mindcube"])


@pytest.mark.slow
def test_the_report_of_rooms_shows_every_dialogue_and_diagnoses_those_with_a_tool(place):
    main(arguments(place, "rooms"))
    out = place / "eval" / "rooms"
    results = json.loads((out / "results.json").read_text())
    n = results["n"]
    html = (out / "report.html").read_text()
    assert "data:image/png;base64," in html and "http" not in html and "Image-4" in html
    assert (out / "workflow.png").exists()
    assert results["diagnosis"]["agentic"]["truth"]["n"] == n
    assert list(results["diagnosis"]) == ["forced", "agentic"]
    (out / "report.html").unlink()
    main(arguments(place, "rooms", "--no-report"))
    assert not (out / "report.html").exists()


@pytest.mark.slow
def test_the_report_of_wm_shows_doses(place, capsys):
    main(arguments(place, "wm"))
    out = place / "eval" / "wm"
    results = json.loads((out / "results.json").read_text())
    assert "data:image/png;base64," in (out / "report.html").read_text()
    assert re.search(r"-dangle +(0\.99\d|1\.00\d)", capsys.readouterr().out)
    dose = results["dose"]["truth"]
    assert set(dose) == {"-dangle", "+dangle", "-dx", "+dx", "+dy"}
    assert all(one["slope"] == pytest.approx(1, abs=0.05) for one in dose.values())
    assert {p["amount"] for p in dose["+dangle"]["points"] if p["trained"]} == {
        5,
        10,
        30,
        45,
        90,
        135,
    }
    with Image.open(out / "dose.png") as picture:
        assert picture.width > 5 * 150


class Copier:
    """A simulator of scans that never moves; it is shown no room."""

    def imagine(self, queries):
        assert all(query.scene is None for query in queries)
        return [query.images[query.reference - 1] for query in queries]


def scans(folder, match):
    """Triples without a room, as data.py writes those of scans."""
    rows = triples(match, folder / "depth", [Motion("dangle", -45.0), Motion("dx", 0.5)])
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
            context_depth=[str(Path(file).relative_to(folder)) for file in row["context_depth"]],
        )
    save_jsonl(folder / "triples_test.jsonl", rows)


@pytest.mark.slow
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
    assert results["turns"]["median_degrees"] == pytest.approx(45, abs=0.3)
    assert "within 0.25 m or 30% and 20° of direction (moves)" in table
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
    middle = {**rows[0], "provenance": [None], "reference": 1, "context_c2w": [np.eye(4).tolist()]}
    corner = {**middle, "context_c2w": [camera_pose(0, -1.3, 1.25).tolist()]}
    assert len(dose_rows([middle], 1)) == len(DOSES)
    kinds = [row["motion"]["kind"] for row in dose_rows([corner], 1)]
    assert "dangle" in kinds and "dy" not in kinds and dose_rows(rows, 0) == []


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
    bench, prompts = open_bench("vsi"), []

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
        args = SimpleNamespace(out="nowhere", batch=64)
        rows, _ = ask_batch(None, bench, with_keys(questions), column, None, args)
        assert [row["correct"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert prompts[:4] == [None] * 4 and "How many?" in prompts[4][-1]
    summary = summarise(rows)
    assert summary["accuracy"] == pytest.approx((1 + 1 / 3) / 2)  # of questions it would be 1 / 2
    assert summary["by_category"]["route_planning"]["n"] == 3 and summary["letters"] == {"A": 3}
