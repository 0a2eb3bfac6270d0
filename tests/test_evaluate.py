"""The loop over questions, its denominators, its intervals, and what it leaves on disk. No trained model is needed."""

import json
import os
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import on_ranks

import data
import evaluate
from evaluate import (
    Condition,
    Rooms,
    ask_batch,
    ask_missing,
    conditions_of,
    main,
    parse_args,
)
from lib import answers
from lib.answers import load_predictions, load_triples, with_keys
from lib.dialogue import Trajectory
from lib.distributed import World
from lib.protocol import NOTE, TOOLS, prompt_text
from lib.records import load_jsonl, read_log, save_jsonl
from lib.rooms import TrueRenderer
from lib.scores import summarise
from lib.simulators import SimulatorError, load_simulator
from policy import Policy
from world_model import WorldModel

ALONE = World(0, 1, None)
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


# ---- asking ---------------------------------------------------------------------------------------------------------


def condition(mode="direct", simulator="none"):
    return Condition(mode, simulator, {**SETTINGS, "mode": mode, "weights": simulator})


def ask(questions, mode="direct", policy=None, batch=64):
    """The predictions of all questions, which no trained policy answers."""
    rows = []
    pairs = with_keys(questions)
    args = SimpleNamespace(out="nowhere", batch=batch)  # these dialogues have no views to save
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        rows += ask_batch(policy, Rooms(), some, condition(mode), None, args)[0]
    return rows


def lines_of(out):
    """Of predictions.jsonl, without the empty ones."""
    return [line for line in (out / "predictions.jsonl").read_text().splitlines() if line]


def ask_into(out, questions, mode="direct", policy=None, world=ALONE, batch=64):
    """The predictions that `out` holds after `ask_missing`."""
    args = SimpleNamespace(out=str(out), batch=batch)
    ask_missing(policy, Rooms(), questions, condition(mode), None, args, world)
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
        question(5, images=[np.zeros((2, 450, 3), np.uint8)]),  # a strip that Qwen refuses
    ]
    scripted(monkeypatch, lambda q, mode: "B")
    records = ask(questions, "agentic", batch=4)
    summary = summarise(records)
    assert [r["key"] for r in records] == ["q0", "q1", "q1#2", "q2", "q3", "q4", "q5"]
    assert "Image-1 of 450 x 2 pixels is too narrow" in records[-1]["error"]
    assert summary["n"] == 6 and summary["accuracy"] == pytest.approx(3 / 6)
    assert summary["counts"] == {
        "no answer read": 3,
        "empty reply": 0,
        "image unreadable (counted as wrong)": 3,
        "refused by the endpoint (counted as wrong)": 0,
        "duplicate id": 1,
        "asked without a missing image": 0,
        "no gold answer (left out)": 1,
    }


def test_what_is_scored_in_rooms_is_an_accepted_answer():
    row = question(0)
    dialogue = Trajectory(row, "direct", answer="B", turns=["<answer>B</answer>"])
    assert Rooms().judge(row, dialogue, "direct")["correct"] == 1
    cut = Trajectory(row, "direct", truncated=True, turns=["<answer>B</answer> and on"])
    assert Rooms().judge(row, cut, "direct")["correct"] == 0
    for text, answer in (("blue ball", "B"), (None, None), ("C", "C")):
        verdict = Rooms().judge(row, Trajectory(row, "direct", answer=text), "direct")
        assert verdict["answer"] == answer and verdict["correct"] == (answer == "B")


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
        world = World(rank, 3, None)
        ask_missing(None, Rooms(), questions, condition(), None, args, world)
    assert asked == [["q0", "q3", "q6"], ["q4"], ["q2", "q5"]]


def test_direct_mode_gets_no_simulator():
    args = parse_args(["--simulator", "truth", "reprojection"])
    columns = [(one.mode, one.simulator_name) for one in conditions_of(args, "policy")]
    tools = [(mode, name) for mode in ("forced", "agentic") for name in args.simulator]
    assert columns == [("direct", "none"), *tools]


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
    Policy.tiny().save(root / "policy")
    Policy.tiny(seed=1).save(root / "other")
    return root


def arguments(root, bench, *more):
    """The command of a bench with the untrained policy and true views; what comes last counts."""
    flags = f"--bench {bench} --policy {root}/policy --data {root}/data --out {root}/eval/{bench}"
    return [*flags.split(), "--max-new-tokens", "3", "--simulator", "truth", *more]


@pytest.mark.slow
def test_rooms_from_end_to_end_and_a_killed_run_continues(place, monkeypatch, capsys):
    main(arguments(place, "rooms", "--no-report"))
    out = place / "eval" / "rooms"
    results = json.loads((out / "results.json").read_text())
    lines = lines_of(out)
    n = len(load_jsonl(place / "data" / "questions_test.jsonl"))
    assert list(results["modes"]) == ["direct", "forced", "agentic"] and len(lines) == 3 * n
    for summary in results["modes"].values():
        assert {"accuracy", "ci95", "call_rate", "n", "by_need", "by_category"} <= set(
            summary
        ) and summary["n"] == n
    assert "needs_view" in capsys.readouterr().out
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
    main(arguments(place, "rooms", "--no-report"))
    assert len(asked) == 2 * n - 2
    again = json.loads((out / "results.json").read_text())
    for mode in again["modes"]:
        assert again["modes"][mode]["accuracy"] == results["modes"][mode]["accuracy"]


@pytest.mark.slow
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
    assert counts() == (3, 0)
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
        ('{"id": "q"}\n', "line 1 has no bench and no images"),
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


@pytest.mark.slow
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


def test_a_policy_configured_anew_is_another_one(tmp_path):
    Policy.tiny().save(tmp_path / "policy")
    before = evaluate.fingerprint(str(tmp_path / "policy"))
    config = tmp_path / "policy" / "generation_config.json"
    config.write_text("{}")
    os.utime(config, (2e9, 2e9))
    assert evaluate.fingerprint(str(tmp_path / "policy")) != before


def test_a_simulator_with_other_knobs_is_another_one_and_answers_say_which(tmp_path, capsys):
    WorldModel.tiny().save(tmp_path)
    plain = evaluate.parse_args(["--wm", str(tmp_path)])
    turned = evaluate.parse_args(
        ["--wm", str(tmp_path), "--simulator", "tuned", "truth", "--steps", "2"]
    )
    plain.max_new_tokens = turned.max_new_tokens = 9
    weights = []
    for args in (plain, turned):
        found = {}
        for condition in evaluate.conditions_of(args, "policy"):
            found[condition.mode, condition.simulator_name] = condition.settings["weights"]
        weights.append(found)
    before, after = weights
    assert after["agentic", "tuned"] == before["agentic", "tuned"] + " {'steps': 2}"
    assert after["direct", "none"] == "none" and after["agentic", "truth"] == "truth@0"
    load_simulator("truth", **turned.sampler)
    assert "truth is no world model of ours: steps change nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_answers_of_another_policy_stay_and_are_not_counted(place):
    own = [
        *arguments(place, "rooms", "--mode", "direct", "--limit", "5", "--no-report"),
        "--out",
        str(place / "two"),
    ]
    main(own)
    before = lines_of(place / "two")
    main([*own, "--policy", str(place / "other")])
    lines = lines_of(place / "two")
    n = len(before)
    assert lines[:n] == before and len(lines) == 2 * n
    assert json.loads((place / "two" / "results.json").read_text())["modes"]["direct"]["n"] <= n
    main(own)
    assert len(lines_of(place / "two")) == 2 * n


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


@pytest.mark.slow
def test_two_ranks_give_the_results_of_one_process_even_where_three_were_killed(place):
    one, two = place / "one", place / "two_ranks"
    ask_and_measure(place, one)
    lines = lines_of(one / "rooms")
    (two / "rooms").mkdir(parents=True)
    before = [*lines[:4], lines[1], lines[6], lines[7][:30]]  # one answer twice, one cut off
    (two / "rooms" / "predictions.jsonl").write_text("\n".join(before))
    on_ranks(2, ask_and_measure, place, two)
    for bench in ("rooms", "wm"):
        clockless = [
            re.sub('"seconds": [0-9.]+', "", (out / bench / "results.json").read_text())
            for out in (one, two)
        ]
        assert clockless[0] == clockless[1]
    told = []
    for out in (one, two):
        rows = read_log(out / "rooms" / "predictions.jsonl")
        told.append({(row["mode"], row["key"], *row["turns"], *row["views"]) for row in rows})
    assert told[0] == told[1] and len(told[0]) == len(lines)


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
    answers.append_predictions(tmp_path, before)
    with open(tmp_path / "predictions.jsonl", "a") as lines:
        lines.write('[1]\n3\n{"key": "q3", "sa')  # no objects, and a line that a kill cut off
    assert said() == {"q0": "A", "q1": None, "q2": "A"}
    answered = [row(0, "B"), row(1, "B"), row(2, "B", missing=1), row(3, "A")]
    worse = [row(2, None, "image: gone"), row(3, None, "refused"), row(1, "C")]
    answers.append_predictions(tmp_path, answered + worse)
    assert said() == {"q0": "A", "q1": "B", "q2": "B", "q3": "A"}
    assert all(isinstance(line, dict) for line in read_log(tmp_path / "predictions.jsonl"))


def test_views_are_kept_once(tmp_path):
    small, large = np.zeros((32, 32, 3), np.uint8), np.zeros((200, 100, 3), np.uint8)
    names = answers.save_views(tmp_path, [small, large, small])
    assert names[0] == names[2] and len(list((tmp_path / "views").iterdir())) == 2
    assert names[0].endswith(".png") and names[1].endswith(".jpg")


@pytest.mark.slow
def test_wm_from_end_to_end(place, capsys):
    main(arguments(place, "wm", "--dose-rooms", "0"))
    results = json.loads((place / "eval" / "wm" / "results.json").read_text())
    assert results["pose"] == results["content"] == 1
    assert set(results["oracles"]) == {"warp with true depth and pose", "true render"}
    assert results["mse"] == 0 < results["baselines"]["nearest context view"]["mse"]
    assert "mean image" in capsys.readouterr().out


def test_without_extras_there_is_a_table_and_a_sentence_but_no_report(place, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "has_extras", lambda: False)
    for bench in ("rooms", "wm"):
        out = place / "alone" / bench
        main([*arguments(place, bench, "--limit", "2"), "--out", str(out)])
        assert (out / "results.json").exists() and not (out / "report.html").exists()
        assert evaluate.NO_REPORT in capsys.readouterr().out


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


@pytest.mark.slow
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
    with pytest.raises(SimulatorError, match="The server is down."):
        main(own)
    assert len(list(tmp_path.glob("views/*/*.png"))) == 2
    monkeypatch.setattr(evaluate, "load_simulator", lambda *_: TrueRenderer())
    main(own)
    assert json.loads((tmp_path / "results.json").read_text())["mse"] == 0


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


def test_helpers_of_the_command_line():
    for flags in (
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
    told.add_turn(
        policy,
        '<tool_call>{"name": "world_simulator_tool", "arguments": {"reference_image": 3, "motion_type": "dangle", "value": -45}}'
        "</tool_call>",
    )
    assert told.invalid_calls == 1 and "no such image" in told.reply
    told.observe(policy)
    told.add_turn(policy, "B")
    assert told.done and told.answer == "B"
    with pytest.raises(ValueError):
        prompt_text(asked, "agentic", 3)


def test_rows_that_lack_what_is_asked_of_them_are_sentences(tmp_path):
    """A triple without its context, a question that does not say what it needs; a simulator by half a name."""
    save_jsonl(tmp_path / "triples_test.jsonl", [{"id": "1"}])
    with pytest.raises(SystemExit, match="line 1 has no context and no reference"):
        load_triples(tmp_path / "triples_test.jsonl")
    row = {"id": "1", "bench": "rooms", "images": [], "question": "?", "answer": "A"}
    row |= {"options": ["A. red"], "category": "turning", "kind": "mca"}
    save_jsonl(tmp_path / "questions_test.jsonl", [row])
    with pytest.raises(SystemExit, match="line 1 has no needs_view"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "eval")])
    with pytest.raises(SystemExit, match="reprojection:5"):
        load_simulator("reprojection:5")
