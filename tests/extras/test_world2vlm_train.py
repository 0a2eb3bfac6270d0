"""World2VLM's two trainings and its evaluation: pytest tests/test_world2vlm_train.py.  CPU, 40 s."""

import itertools
import json

import numpy as np
import pytest
import torch
from ranks import on_ranks

from extras.world2vlm import evaluate, train, train_rl
from extras.world2vlm.evaluate import answer_record, task_means
from extras.world2vlm.questions import make_room_questions
from extras.world2vlm.rewards import world2vlm
from extras.world2vlm.train import answers_of_step, loss_shares, parse_args, true_answer
from extras.world2vlm.words import TASKS
from lib import stage
from lib.distributed import World
from lib.records import load_jsonl, read_log, save_jsonl
from lib.streams import rows_of_step
from policy import Policy, collate
from train_sft import supervised_loss

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    out = tmp_path_factory.mktemp("motions")
    make_room_questions(out, rooms=5, held_out=(1, 1), threads=1)
    return out


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("start")
    Policy.tiny().save(out)
    return out


def learn(motions, start, out, *more):
    flags = f"--data {motions} --start {start} --out {out} --steps 2 --batch 4 --threads 1"
    train.main([*flags.split(), "--eval-questions", "4", *more])


def log_of(out):
    """The log without what depends on the clock."""
    rows = read_log(out / "log.jsonl")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def equal_weights(one, other, **tolerance):
    one, other = (Policy.load(folder).model.state_dict() for folder in (one, other))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, **tolerance)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_shares_by_hand():
    tasks = (("A1", 1.0), ("A4", 0.8), ("D3", 0.5), ("D1", 0.2))
    rows = [{"category": task, "weight": w} for task, w in tasks]
    lambdas = {"inverse": 2.0, "forward": 3.0}
    want = [2 * 1 / 1.5, 3 * 0.8, 2 * 0.5 / 1.5, 3 * 0.2]
    assert loss_shares(rows, lambdas) == pytest.approx(want)
    assert loss_shares(rows[:1], lambdas) == [2.0]  # no forward question in this update


def test_the_loss_is_the_papers_by_hand(motions):
    """lambda_inv L_inv + lambda_fwd L_fwd of an update of 12, each answer alone, token by token."""
    policy, rows = Policy.tiny(), load_jsonl(motions / "questions_train.jsonl")
    rows = [row | {"weight": 1.0 if i % 2 else 0.25} for i, row in enumerate(rows)]
    args = parse_args(["--lambda-inv", "2", "--lambda-fwd", "0.5", "--batch", "12"])
    sums = {True: np.zeros(2), False: np.zeros(2)}
    for row in [rows[index] for index in rows_of_step(len(rows), 12, 1, 0)]:
        answer = true_answer(policy, row, {})
        first = answer.prompt_length
        text = policy.tokenizer.decode(answer.ids[first:])
        assert text == f"<think></think><answer>{row['answer']}</answer><|im_end|>"
        assert answer.answer == row["answer"] and answer.well_formed
        batch = collate(policy, [answer])
        with torch.no_grad():
            hidden = policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
            logits = policy.logits(hidden)[0]
        logprobs = torch.log_softmax(logits, -1)
        nll = -sum(logprobs[t - 1, answer.ids[t]].item() for t in range(first, len(answer.ids)))
        sums[row["category"] in ("A1", "A2", "A3", "D3")] += row["weight"] * nll, row["weight"]
    (inverse, inverse_weight), (forward, forward_weight) = sums[True], sums[False]
    by_hand = 2 * inverse / inverse_weight + 0.5 * forward / forward_weight
    for ranks, micro_batch in ((1, 12), (1, 5), (2, 12)):
        loss = 0.0
        for rank in range(ranks):
            world = World(rank, ranks, ALONE.device)
            answers = answers_of_step(policy, rows, {}, args, 1, world)
            for i in range(0, len(answers), micro_batch):
                batch = collate(policy, answers[i : i + micro_batch])
                loss += supervised_loss(policy, batch).loss.item()
        assert loss == pytest.approx(by_hand, rel=1e-4)


def test_pictures_that_are_looked_at_once_teach_the_same(motions):
    policy, rows = Policy.tiny(), load_jsonl(motions / "questions_train.jsonl")[:12]
    features = train.encode_pictures(policy, rows)
    assert len(features) == len({pair for row in rows for pair in enumerate(row["images"], 1)})
    for row in rows:
        once, again = (collate(policy, [true_answer(policy, row, f)]) for f in (features, {}))
        assert torch.equal(once.ids, again.ids)
        torch.testing.assert_close(once.features, again.features, atol=1e-5, rtol=1e-4)


# ---- the first stage ------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, *steps):
    stops = iter(steps)
    monkeypatch.setattr(stage.Interrupt, "requested", lambda self: next(stops, False))


@pytest.mark.slow
def test_resumed_run_equals_unbroken_run(motions, start, tmp_path, monkeypatch):
    flags = "--steps 4 --save-every 2 --lora 2 --dropout 0.2".split()
    learn(motions, start, tmp_path / "whole", *flags)
    interrupted(monkeypatch, False, False, True)
    with pytest.raises(SystemExit):
        learn(motions, start, tmp_path / "broken", *flags)
    learn(motions, start, tmp_path / "broken", *flags)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    equal_weights(tmp_path / "whole", tmp_path / "broken", rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(motions, start, tmp_path):
    """Adapters are whole on every rank, what is frozen is sharded; recomputing activations changes nothing either."""
    flags = "--micro-batch 1 --lora 2 --gradient-checkpointing".split()
    learn(motions, start, tmp_path / "one", *flags[:4])
    on_ranks(2, learn, motions, start, tmp_path / "two", *flags)
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one.pop("eval", None) == two.pop("eval", None)
        assert one == pytest.approx(two, rel=1e-3)
    equal_weights(tmp_path / "one", tmp_path / "two", atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_one_direction_alone_is_a_row_of_the_ablation(motions, start, tmp_path):
    for name, other in (("forward", "inverse"), ("inverse", "forward")):
        learn(motions, start, tmp_path / name, f"--lambda-{other[:3].replace('for', 'fwd')}", "0")
        *steps, end = log_of(tmp_path / name)
        assert all(name in row and other not in row for row in steps)
        assert steps[0]["eval"].keys() == end["eval"].keys() and "A3_exact" in end["eval"]
    learn(motions, start, tmp_path / "turns", "--tasks", "A2", "A1")
    assert "forward" not in log_of(tmp_path / "turns")[0]
    with pytest.raises(SystemExit, match="no question of the tasks A4"):
        learn(motions, start, tmp_path / "none", "--tasks", "A4", "--lambda-fwd", "0")
    with pytest.raises(SystemExit):
        parse_args(["--lambda-inv", "0", "--lambda-fwd", "0"])


@pytest.mark.slow
def test_adapters_are_merged_where_the_paper_has_them(motions, start, tmp_path):
    learn(motions, start, tmp_path, "--lr", "0.01", "--lora", "2", "--dropout", "0.1")
    before, after = (Policy.load(folder).model.state_dict() for folder in (start, tmp_path))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    attention = [f"self_attn.{name}" for name in "qkvo"]
    linears = [*attention, "mlp.gate", "mlp.up", "mlp.down"]
    pairs = itertools.product(range(4), linears)
    want = {f"model.language_model.layers.{i}.{name}_proj.weight" for i, name in pairs}
    assert before.keys() == after.keys() and changed == want
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (start, tmp_path)
    ]
    assert abs(sizes[0] - sizes[1]) < 2000  # tied weights are not written twice


def test_presets_and_missing_inputs(start, tmp_path):
    args = parse_args(["--preset", "astra"])
    assert (args.lora, args.dropout, args.batch) == (256, 0.05, 128)
    assert args.start == "Qwen/Qwen3-VL-8B-Instruct" and args.tasks == list(TASKS)
    with pytest.raises(SystemExit, match="python -m extras.world2vlm.questions --out"):
        learn(tmp_path / "none", start, tmp_path / "w2v")
    with pytest.raises(SystemExit, match="`python train_sft.py` makes it"):
        learn(tmp_path / "none", tmp_path / "no_policy", tmp_path / "w2v")


# ---- the second stage -----------------------------------------------------------------------------------------------


def reinforce(motions, start, out, *more):
    flags = f"--data {motions} --policy {start} --out {out} --steps 2 --questions 4 --group 2"
    flags += " --eval-questions 4 --eval-every 2 --max-new-tokens 16 --threads 1"
    train_rl.main([*flags.split(), *more])


@pytest.fixture
def alternating(monkeypatch):
    """The two rollouts of a group earn 0.25 and 0.75: a random policy never answers right."""
    totals = itertools.cycle([0.25, 0.75])

    def record(question, answer):
        record = answer_record(question, answer)
        record["parts"]["total"] = next(totals)
        return record

    monkeypatch.setattr(train_rl, "answer_record", record)


@pytest.mark.slow
def test_the_second_stage_learns_from_its_own_rewards(motions, start, tmp_path, alternating):
    reinforce(motions, start, tmp_path / "rl")
    first, second, end = log_of(tmp_path / "rl")
    tasks = {key.split("_")[0] for key in first} & set(TASKS)
    assert tasks and all(0.25 <= first[f"{task}_total"] <= 0.75 for task in tasks)
    assert first["call_rate"] == 0 and first["reward"] == 0.5 and first["groups_flat"] == 0
    assert first["tokens"] > 0 and first["grad_norm"] > 0 and first["kl"] >= 0
    assert second["kl"] > 0 and set(end) == {"step", "eval"} and "eval" in first
    changed = Policy.load(tmp_path / "rl").model.state_dict()
    before = Policy.load(start).model.state_dict()
    assert any(not torch.equal(before[key], changed[key]) for key in before)


@pytest.mark.slow
def test_a_resumed_second_stage_equals_an_unbroken_one(
    motions, start, tmp_path, alternating, monkeypatch
):
    reinforce(motions, start, tmp_path / "whole", "--save-every", "1")
    interrupted(monkeypatch, True)
    with pytest.raises(SystemExit):
        reinforce(motions, start, tmp_path / "broken", "--save-every", "1")
    reinforce(motions, start, tmp_path / "broken", "--save-every", "1")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    equal_weights(tmp_path / "whole", tmp_path / "broken", rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_reinforce_what_one_does(motions, start, tmp_path, alternating):
    reinforce(motions, start, tmp_path / "one")
    on_ranks(2, reinforce, motions, start, tmp_path / "two")
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one.pop("eval", None) == two.pop("eval", None)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    equal_weights(tmp_path / "one", tmp_path / "two", atol=1e-4, rtol=1e-3)


def test_flags_of_the_second_stage():
    args = train_rl.parse_args([])
    assert (args.group, args.kl_weight, train_rl.CLIP_ABOVE) == (4, 0.01, 0.3)
    with pytest.raises(SystemExit):
        train_rl.parse_args(["--questions", "5"])


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_means_by_hand():
    rows = [
        {"id": "a", "category": "A2", "answer": "turn left 20 degrees"},
        {"id": "b", "category": "A2", "answer": "turn left 90 degrees"},
        {"id": "c", "category": "D2", "answer": "yes"},
    ]
    answers = ["turn left 20 degrees", "turn left 110 degrees", None]
    means = task_means(map(answer_record, rows, answers))
    second = world2vlm("A2", rows[1]["answer"], answers[1])["total"]
    assert 0.8 < second < 1 and means["A2_total"] == pytest.approx((1 + second) / 2)
    assert means["A2_exact"] == 0.5 and means["D2_total"] == means["D2_exact"] == 0
    assert "A1_total" not in means and "D2_accuracy" in means


def test_the_evaluation_goes_on_where_it_was_stopped(motions, start, tmp_path, monkeypatch):
    rows = load_jsonl(motions / "questions_test.jsonl")[:4]
    save_jsonl(tmp_path / "questions_test.jsonl", rows)
    asked = []

    def rollout(policy, questions, **_):
        asked.extend(question["id"] for question in questions)
        if len(asked) == 3:
            raise KeyboardInterrupt
        answer = Policy.tiny()
        return [true_answer(answer, question, {}) for question in questions]

    monkeypatch.setattr(evaluate, "rollout", rollout)
    command = f"--data {tmp_path} --policy {start} --out {tmp_path}/out --rows 1".split()
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    evaluate.main(command)
    assert asked == [rows[i]["id"] for i in (0, 1, 2, 2, 3)]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["n"] == 4 and set(results.values()) >= {1.0}
    records = read_log(tmp_path / "out/predictions.jsonl")
    assert [record["key"] for record in records] == [row["id"] for row in rows]
    assert all(record["correct"] == pytest.approx(1) and record["exact"] == 1 for record in records)


def ask(motions, start, out):
    command = f"--data {motions} --policy {start} --out {out} --limit 5 --threads 1"
    evaluate.main(command.split())


@pytest.mark.slow
def test_two_ranks_ask_what_one_asks(motions, start, tmp_path):
    ask(motions, start, tmp_path / "one")
    on_ranks(2, ask, motions, start, tmp_path / "two")
    one, two = (read_log(tmp_path / name / "predictions.jsonl") for name in ("one", "two"))
    assert one == two and len(one) == 5
