"""The lists of rows: every command is one that its stage understands, what is finished stays, the tables add up."""

import json
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
import train_rl
import train_sft
import train_wm
from experiments import demo, policy, runner, simulator
from experiments.policy import PolicyRow
from experiments.runner import Job, call, finish_job, run_jobs, words
from experiments.simulator import SimulatorRow
from lib.records import save_jsonl
from lib.scores import interval
from world_model import WorldModel

PARSERS = {
    "data.py": data.parse_args,
    "train_wm.py": train_wm.parse_args,
    "train_rl.py": train_rl.parse_args,
    "train_sft.py": train_sft.parse_args,
    "evaluate.py": evaluate.parse_args,
}


def parsed(command):
    """A command's flags, as its stage reads them."""
    return PARSERS[command[0]](command[1:])


def cells(lines):
    """{row: its cells} of table.md."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: rest for name, *rest in split}


# ---- the runner ------------------------------------------------------------------------------------------------------


def test_a_command_is_a_list_of_words_and_paths_may_hold_spaces():
    assert words("x.py --a 1", eval_every=0, out=Path("a b")) == (
        ["x.py", "--a", "1", "--eval-every", "0", "--out", "a b"]
    )


def test_a_command_that_fails_stops_the_list():
    with pytest.raises(SystemExit, match="raise SystemExit.2.` ended with code 2"):
        call(["-c", "raise SystemExit(2)"])
    call(["-c", "raise SystemExit(0)"])


def test_a_finished_row_stays_and_one_of_another_setting_is_refused(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(runner, "call", commands.append)
    job = Job("row-s0", [["x.py"]], measure=lambda: {"score": 1})
    finish_job(job, tmp_path)
    finish_job(job, tmp_path)
    assert commands == [["x.py"]]
    result = json.loads((tmp_path / "row-s0/result.json").read_text())
    assert result == {"commands": ["x.py"], "cpu_seconds": 0, "score": 1}
    for other in (job._replace(commands=[["x.py", "--y"]]), job._replace(setting={"steps": 4})):
        with pytest.raises(SystemExit, match="was made with"):
            finish_job(other, tmp_path)


def test_inputs_are_made_where_they_are_missing_and_needs_are_named_before_anything_runs(
    tmp_path, monkeypatch
):
    commands = []
    monkeypatch.setattr(runner, "call", commands.append)
    file = tmp_path / "input"
    one = Job("one-s0", [["one"]], inputs={file: lambda: file.write_text("")})
    two = Job("two-s0", [["two"]], needs={tmp_path / "one-s0/1": "make one"})
    with pytest.raises(SystemExit, match="`make one` makes it"):
        run_jobs([two], tmp_path)
    assert commands == [] and not file.exists()
    run_jobs([one, two], tmp_path)
    assert commands == [["one"], ["two"]] and file.exists()


@pytest.mark.parametrize("module", [simulator, policy])
def test_an_unknown_row_is_refused(module, tmp_path):
    with pytest.raises(SystemExit, match="--list"):
        module.main(["--out", str(tmp_path), "--only", "nothing"])


# ---- the demo --------------------------------------------------------------------------------------------------------


def test_every_stage_of_the_demo_is_one_that_parses():
    names = [stage.name for stage in demo.STAGES]
    for stage in demo.STAGES:
        assert set(stage.needs) <= set(names[: names.index(stage.name)])
        for more in ("", stage.quick):
            args = parsed(f"{stage.command} {more} --out x/{stage.folder}".format(out="x").split())
            assert args.out == f"x/{stage.folder}"


def test_a_stage_that_fails_ends_the_demo_with_the_end_of_its_log(tmp_path, monkeypatch):
    broken = demo.Stage("data", (), "data", "-c raise(SystemExit('no.disk'))", "")
    monkeypatch.setattr(demo, "STAGES", (broken,))
    with pytest.raises(SystemExit, match="The stage data stopped(.|\n)*no.disk"):
        demo.run_stages(tmp_path, quick=False)


# ---- the simulator ---------------------------------------------------------------------------------------------------

ROOMS = np.repeat(np.arange(20), 5)


def scored(out, name, right, seed=0):
    """A finished row on disk: the first `right` of the five views of every room have the right pose."""
    folder = out / f"{name}-s{seed}"
    folder.mkdir(parents=True)
    count = len(ROOMS)
    mse = 0.1 / (1 + right)
    pose = np.arange(count) % 5 < right
    counts = np.ones((count, 6))
    values = np.column_stack([np.ones(count), pose, pose, np.full(count, mse), counts])
    np.savez(folder / "views.npz", id=[str(i) for i in range(count)], room=ROOMS, values=values)
    moves = {"pose": pose.mean(), "tight": pose.mean()}
    result = {"moves": moves, "turns": {"pose": 1.0, "tight": 0.75}, "mse": mse}
    result |= {"precision": 1.0, "recall": 0.5, "topology": 0.25, "cpu_seconds": 100 + seed}
    (folder / "result.json").write_text(json.dumps({**result, "steps": 9}))


def test_every_simulator_row_is_one_the_stages_understand(tmp_path):
    assert len({row.name for row in simulator.ROWS}) == len(simulator.ROWS)
    for row in simulator.ROWS:
        for command in simulator.job_of(row, 0, tmp_path, steps=9).commands:
            assert parsed(command).steps == 9
    for flags in simulator.DATA.values():
        parsed(words(f"data.py triples {flags}"))
    plain = {f"{name}-plain" for name in simulator.DATA}  # what each is compared with
    assert plain <= {row.name for row in simulator.ROWS}


def test_the_simulators_table_says_what_the_files_say(tmp_path):
    scored(tmp_path, "ring-plain", 2)
    scored(tmp_path, "ring-content", 3)
    scored(tmp_path, "ring-untuned", 0)
    scored(tmp_path, "rooms250-plain", 1)
    scored(tmp_path, "64px-content", 4)
    rows = cells(simulator.table(tmp_path))
    names = ["ring-plain", "ring-content", "ring-untuned", "rooms250-plain", "64px-content"]
    assert list(rows) == names
    shares = ["0.400", "1.000", "0.400", "0.750", "1.000", "0.500", "0.250"]
    assert rows["ring-plain"] == ["0", "9", "100", *shares, "0.0333", "", "", ""]
    assert rows["ring-content"][11:] == [
        "+0.200 [+0.200 +0.200]",
        "+0.000 [+0.000 +0.000]",
        "-0.0083 [-0.0083 -0.0083]",
    ]
    assert rows["ring-untuned"][11].startswith("-0.400")
    assert rows["rooms250-plain"][11].startswith("-0.200")
    assert rows["64px-content"][11:] == ["", "", ""]  # its plain row is not there yet


def test_seeds_are_averaged(tmp_path):
    scored(tmp_path, "ring-plain", 2)
    scored(tmp_path, "ring-content", 2)
    scored(tmp_path, "ring-content", 4, seed=1)
    row = cells(simulator.table(tmp_path))["ring-content"]
    assert row[:4] == ["0 1", "9", "100", "0.600"] and row[11] == "+0.200 [+0.200 +0.200]"


def test_rows_of_other_views_are_not_compared(tmp_path):
    scored(tmp_path, "ring-plain", 2)
    scored(tmp_path, "ring-content", 3)
    file = tmp_path / "ring-plain-s0" / "views.npz"
    views = dict(np.load(file))
    np.savez(file, **{**views, "id": views["id"][::-1]})
    with pytest.raises(SystemExit, match="different test views"):
        simulator.table(tmp_path)


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Two rooms of data, two rows, and a train_wm.py that leaves an untrained model -> (folder, the commands run)."""
    commands = []

    def fake_call(command):
        args = parsed(command)
        commands.append(args)
        if command[0] == "data.py":
            rooms = (5_000_000, 5_000_001)
            rows = [
                row for room in rooms for row in data.room_triples(room, tmp_path / "data/ring")
            ]
            save_jsonl(tmp_path / "data/ring/triples_test.jsonl", rows)
            return
        WorldModel.tiny().save(Path(args.out))
        (Path(args.out) / "done.json").write_text('{"cpu_seconds": 7}')

    monkeypatch.setattr(runner, "call", fake_call)
    monkeypatch.setattr(simulator, "call", fake_call)
    rows = [SimulatorRow("ring-plain", "ring", simulator.PLAIN)]
    rows.append(SimulatorRow("ring-content", "ring", simulator.CONTENT))
    monkeypatch.setattr(simulator, "ROWS", rows)
    return tmp_path, commands


@pytest.mark.slow
def test_simulators_are_trained_and_scored_once(untrained, capsys):
    out, commands = untrained
    call_list = ["--out", str(out), "--steps", "3"]
    simulator.main(call_list)
    made, plain, content = commands
    assert (plain.steps, plain.seed, plain.warp_weight) == (3, 0, 0)
    assert content.warp_weight > 0 and made.layout == "ring"
    rows = cells((out / "table.md").read_text().splitlines())
    assert rows["ring-plain"][2] == "7"
    assert rows["ring-content"][11] == "+0.000 [+0.000 +0.000]"  # the same untrained model
    file = out / "ring-plain-s0/result.json"
    result = file.read_text()
    assert json.loads(result)["n"] == 20  # the triples of two rooms

    simulator.main(call_list)
    assert len(commands) == 3 and file.read_text() == result
    file.unlink()  # killed between training and scoring
    simulator.main([*call_list, "--only", "ring-p*"])
    assert len(commands) == 4 and file.read_text() == result
    simulator.main([*call_list, "--seeds", "0", "1", "--only", "ring-plain"])
    assert [args.seed for args in commands[4:]] == [1]
    capsys.readouterr()
    simulator.main(["--out", str(out), "--seeds", "0", "2", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [" done " in line for line in lines] == [True, True, False, False]
    with pytest.raises(SystemExit, match="not with .*'steps': 4"):
        simulator.main(["--out", str(out), "--steps", "4"])


# ---- the policy ------------------------------------------------------------------------------------------------------


SCENE = {"room": 1, "poses": [np.eye(4).tolist()] * 4}
TURN = {"reference_image": 2, "motion_type": "dangle", "value": 30}
STEP = {"reference_image": 5, "motion_type": "dx", "value": 1.0}


def answered(out, name, right, calls=(), seed=0):
    """A finished row on disk: 20 rooms of two questions, the first in need of a view; `right` of 20 rooms are right."""
    folder = out / f"{name}-s{seed}"
    records = []
    for room in range(20):
        for need in (True, False):
            record = {"key": f"{room}/{need}", "scene": room, "needs_view": need}
            record |= {"correct": float(room < right), "calls": list(calls) if need else []}
            record |= {"valid_calls": len(record["calls"]), "groups": [f"walking, {need}"]}
            records.append(record)
    save_jsonl(folder / "asked/predictions.jsonl", records)
    (folder / "result.json").write_text(json.dumps({"cpu_seconds": 100 + seed}))


@pytest.fixture
def questions(monkeypatch):
    """The held-out questions of `answered`: those that need a view take a turn and a step."""
    known = {}
    for room in range(20):
        known[f"{room}/True"] = {"scene": SCENE, "ideal": [TURN, STEP]}
        known[f"{room}/False"] = {"scene": SCENE, "ideal": []}
    monkeypatch.setattr(policy, "test_questions", lambda: known)


def test_every_policy_row_is_one_the_stages_understand(tmp_path):
    assert len({row.name for row in policy.ROWS}) == len(policy.ROWS)
    for row in policy.ROWS:
        *training, _ = [parsed(command) for command in policy.job_of(row, 3, tmp_path).commands]
        assert {args.seed for args in training} <= {3}
        if any("train_rl" in stage for stage in row.stages):
            # equal total steps, but for the checkpoint between the phases
            assert sum(args.steps for args in training) == (6 if "phase1" in row.name else 106)
    assert policy.PAPER.keys() <= {row.name for row in policy.ROWS}


def test_stages_start_where_the_one_before_ended(tmp_path):
    rows = {row.name: row for row in policy.ROWS}
    first, second, asked = map(parsed, policy.job_of(rows["two-phase"], 1, tmp_path).commands)
    assert first.policy == str(tmp_path / "start-s1/1")
    assert second.policy == first.out == str(tmp_path / "two-phase-s1/1")
    assert asked.policy == second.out == str(tmp_path / "two-phase-s1/2")
    training, asked = map(parsed, policy.job_of(rows["direct-only"], 1, tmp_path).commands)
    assert training.start == str(tmp_path / "start-s1/1")
    row = PolicyRow("x", mode="forced", simulator="untuned", start="two-phase")
    job = policy.job_of(row, 1, tmp_path / "policy")
    (asked,) = map(parsed, job.commands)
    assert asked.policy == str(tmp_path / "policy/two-phase-s1/2")
    assert asked.simulator == [str(tmp_path / "ring-untuned-s0")]
    assert {Path(asked.policy), Path(asked.simulator[0])} <= job.needs.keys()


def test_the_cold_start_of_seed_0_is_the_demos(tmp_path):
    start = policy.ROWS[0]
    (asked,) = map(parsed, policy.job_of(start, 0, tmp_path).commands)
    assert asked.policy == "out/demo/sft"
    training, asked = map(parsed, policy.job_of(start, 1, tmp_path).commands)
    assert training.seed == 1 and asked.policy == training.out == str(tmp_path / "start-s1/1")


def test_swapped_pictures_are_of_another_question_of_the_family(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "TEST", tmp_path / "data/questions_test.jsonl")
    rows = []
    for number in range(6):
        family = "turning" if number % 2 else "walking"
        rows.append({"id": number, "category": family, "images": [f"{number}.png"]})
    save_jsonl(policy.TEST, rows)
    policy.swap_pictures(tmp_path / "swapped")
    lines = (tmp_path / "swapped/questions_test.jsonl").read_text().splitlines()
    images = {row["id"]: row["images"][0] for row in map(json.loads, lines)}
    following = {0: 2, 2: 4, 4: 0, 1: 3, 3: 5, 5: 1}
    assert images == {number: f"../data/{other}.png" for number, other in following.items()}


def test_calls_land_where_the_ideal_ones_do():
    question = {"scene": SCENE, "ideal": [TURN, STEP]}
    near = [{**TURN, "value": 20}, {**STEP, "value": 0.8}]
    assert policy.lands([TURN, STEP], question) and policy.lands(near, question)
    assert not policy.lands([TURN], question)
    assert not policy.lands([{**TURN, "value": 14}, STEP], question)
    assert not policy.lands([TURN, {**STEP, "value": 0.6}], question)
    assert not policy.lands([TURN, {**STEP, "reference_image": 1}], question)


def test_the_policys_table_says_what_the_answers_say(tmp_path, questions):
    answered(tmp_path, "two-phase", 10, [TURN, STEP])
    answered(tmp_path, "two-phase", 20, [TURN], seed=1)
    answered(tmp_path, "gain-only", 15)
    answered(tmp_path, "direct-only", 10)
    lines = policy.table(tmp_path)
    middle = lines.index("By family:")
    rows = cells(lines[: middle - 1])
    row = rows["two-phase"]
    assert row[:7] == ["0 1", "0.750", "", "0.750", "100%", "1.50", row[6]]
    assert row[7:10] == ["0.750", "0%", "0.00"]
    assert row[11:] == ["100", ".388, 61.5%, 0.78"]
    assert row[6] == row[10] == "+0.000 [+0.000 +0.000]"  # seed 0 alone has both
    row = rows["gain-only"]
    assert row[:2] == ["0", "0.750"] and row[3:6] == ["0.750", "0%", "0.00"]
    assert row[2].startswith("+0.250 [+0.") and row[6] == row[10] == row[2]
    assert rows["direct-only"][2] == "+0.000 [+0.000 +0.000]" and rows["direct-only"][6] == ""
    families = cells(lines[middle + 2 :])
    assert families["two-phase"] == ["0.750, 0%, 100%", "0.750, 100%, 50%"]


def test_the_picture_of_degraded_simulators_waits_for_every_cell(tmp_path, questions):
    pytest.importorskip("extras.report.curves")
    answered(tmp_path, "direct-only", 10)
    for yaw in policy.YAW_ERRORS:
        for missing in policy.MISSING:
            policy.draw_degraded(tmp_path)
            assert not (tmp_path / "imagining-pays.png").exists()
            answered(tmp_path, f"degraded-{yaw}-{missing}", 20 - yaw // 5 - missing // 5, [TURN])
    policy.draw_degraded(tmp_path)
    assert (tmp_path / "imagining-pays.png").exists()


def test_paired_bootstrap_is_sharper_than_two_intervals_and_refuses_other_questions():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    answers = []
    for bar in (0.6, 0.5):
        rows = [{"key": i, "scene": i, "correct": float(h < bar)} for i, h in enumerate(hard)]
        answers.append(rows)
    a, b = answers
    result = demo.paired_bootstrap(a, list(reversed(b)))
    right = [row["correct"] for row in a]
    assert result["difference"] == pytest.approx(np.mean(right) - np.mean(hard < 0.5))
    assert result["ci95"][0] > 0 and np.diff(result["ci95"])[0] < 0.7 * np.diff(interval(right))[0]
    assert demo.paired_bootstrap(a, a)["ci95"] == [0, 0]
    with pytest.raises(ValueError, match="same questions"):
        demo.paired_bootstrap(a, b[1:])
