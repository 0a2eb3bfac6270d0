"""The cold start: pytest tests/test_train_sft.py"""

import json

import numpy as np
import pytest
import torch
from ranks import on_ranks

import data
import train_sft
from extras.benches.mindcube import make_mindcube
from extras.world2vlm.rewards import world2vlm
from lib import streams
from lib.common import World
from policy import Policy, collate, token_logprobs
from train_sft import (
    DECISION,
    FACT,
    Lesson,
    answers_of_step,
    graded,
    main,
    parse_args,
    script,
    shares,
    soften,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=1, held_out=1, threads=1)
    data.make_questions(out, rooms=8, held_out=(1, 1), threads=1)
    make_mindcube(out / "mindcube", out / "questions_test.jsonl")
    return out


@pytest.fixture(scope="module")
def lessons(folder):
    lessons = [Lesson(row) for row in data.load_jsonl(folder / "questions_train.jsonl")]
    policy = Policy.tiny()
    for lesson in lessons:
        pairs = [*enumerate(lesson.images, 1), (len(lesson.images) + 1, lesson.view)]
        lesson.features = {(n, id(image)): x for (n, image), x in zip(pairs, policy.encode(pairs))}
    return policy, lessons


def weighed(policy, dialogue):
    told = zip(dialogue.ids, dialogue.loss_weights, dialogue.loss_mask)
    return [(policy.tokenizer.decode([i]), w) for i, w, wrote in told if wrote]


def test_scripts_are_dialogues_that_the_protocol_accepts(lessons):
    policy, lessons = lessons
    for seed, lesson in enumerate(lessons):
        for kind, calls, slips in (("direct", 0, 0), ("tool", 1, 0), ("slip", 1, 1)):
            dialogue = script(policy, lesson, kind, np.random.default_rng(seed))
            words = lesson.question["options"]["ABCD".index(lesson.question["answer"])].split(". ")[
                1
            ]
            assert (dialogue.answer, dialogue.valid_calls, dialogue.invalid_calls) == (
                words,
                calls,
                slips,
            )
            assert [w for _, w in weighed(policy, dialogue)].count(FACT) == 1


def test_the_choice_to_call_counts_little_unless_it_is_forced(lessons):
    policy, lessons = lessons
    for seed in range(12):
        dialogue = script(policy, lessons[0], "tool", np.random.default_rng(seed))
        choice = dict(weighed(policy, dialogue))["I need to see it."]
        assert choice == (1.0 if dialogue.mode == "forced" else DECISION)


def test_looking_teaches_true_facts_and_nothing_else(lessons):
    policy, lessons = lessons
    dialogue = script(policy, lessons[0], "look", np.random.default_rng(0))
    told = weighed(policy, dialogue)
    assert {weight for _, weight in told} <= {0, 1, FACT, DECISION} and FACT in {
        weight for _, weight in told
    }
    for place, (word, weight) in enumerate(told):
        if weight == FACT:
            ask = next(ask for ask, say in train_sft.SAY.items() if say == told[place - 2][0])
            shown = lessons[0].shows[int(told[place - 1][0][len(" Image-") : -1]) - 1]
            assert word == f" {shown[ask]}"


def test_loss_is_the_weighted_mean_of_log_probs(lessons):
    policy, lessons = lessons
    batch = collate(
        policy,
        [
            script(policy, lesson, kind, np.random.default_rng(1))
            for lesson, kind in zip(lessons, ("direct", "tool", "slip", "look"))
        ],
    )
    with torch.no_grad():
        loss, parts = train_sft.scripted_loss(policy, batch)
        logprobs, _ = token_logprobs(policy, batch)
    assert loss.item() == pytest.approx(-(logprobs * batch.loss_weights).sum().item(), rel=1e-4)
    right, facts = parts["facts"]
    assert facts == (batch.loss_weights == FACT).sum() and 0 <= right <= facts


def test_softened_views_keep_their_colours_on_average():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    soft = [soften(image, np.random.default_rng(seed)) for seed in range(24)]
    assert any((s == image).all() for s in soft) and any((s != image).any() for s in soft)
    assert all(abs(float(s.mean()) - float(image.mean())) < 2 for s in soft)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    out = tmp_path_factory.mktemp("start")
    Policy.tiny().save(out)
    return out


@pytest.mark.parametrize("task", ["cold", "world2vlm"])
def test_resumed_run_equals_unbroken_run(task, folder, motions, start, tmp_path, monkeypatch):
    flags = {
        "cold": ["--data", str(folder), "--see-steps", "2"],
        "world2vlm": [
            "--task",
            "world2vlm",
            "--data",
            str(motions),
            "--start",
            str(start),
            "--eval-questions",
            "4",
            "--lora",
            "2",
            "--dropout",
            "0.2",
        ],
    }[task]
    flags += ["--steps", "4", "--batch", "4", "--save-every", "2", "--threads", "1"]
    main([*flags, "--out", str(tmp_path / "whole")])
    stops = iter([False, False, True])
    monkeypatch.setattr(train_sft.common.Interrupt, "requested", lambda self: next(stops, False))
    with pytest.raises(SystemExit):
        main([*flags, "--out", str(tmp_path / "broken")])
    main([*flags, "--out", str(tmp_path / "broken")])
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "broken")
    whole, broken = (Policy.load(tmp_path / run).model.state_dict() for run in ("whole", "broken"))
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())


# ---- World2VLM ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motions(tmp_path_factory):
    out = tmp_path_factory.mktemp("motions")
    data.make_world2vlm(out, rooms=5, held_out=(1, 1), threads=1)
    return out


def test_shares_by_hand():
    rows = [
        {"category": task, "weight": w}
        for task, w in (("A1", 1.0), ("A4", 0.8), ("D3", 0.5), ("D1", 0.2))
    ]
    assert shares(rows, {True: 2.0, False: 3.0}) == pytest.approx(
        [2 * 1 / 1.5, 3 * 0.8, 2 * 0.5 / 1.5, 3 * 0.2]
    )
    assert shares(rows[:1], {True: 2.0, False: 3.0}) == [2.0]  # no forward question in this update


def test_the_loss_is_the_papers_by_hand(motions):
    """lambda_inv L_inv + lambda_fwd L_fwd of an update of 12, each answer alone, token by token."""
    policy, rows = Policy.tiny(), data.load_jsonl(motions / "questions_train.jsonl")
    rows = [row | {"weight": 1.0 if i % 2 else 0.25} for i, row in enumerate(rows)]
    args = parse_args(
        ["--task", "world2vlm", "--lambda-inv", "2", "--lambda-fwd", "0.5", "--batch", "12"]
    )
    parts = {True: np.zeros(2), False: np.zeros(2)}
    for row in [rows[place] for place in streams.rows_of_step(len(rows), 12, 1, 0)]:
        dialogue = train_sft.answered(policy, row)
        text = policy.tokenizer.decode(
            [i for i, wrote in zip(dialogue.ids, dialogue.loss_mask) if wrote]
        )
        assert text == f"<think></think><answer>{row['answer']}</answer><|im_end|>"
        assert dialogue.answer == row["answer"] and dialogue.well_formed
        batch = collate(policy, [dialogue])
        with torch.no_grad():
            logits = policy.forward(batch.ids, batch.positions, batch.mask, batch.features)[0]
        first = dialogue.loss_mask.index(1)
        logprobs = torch.log_softmax(logits, -1)
        nll = -sum(logprobs[t - 1, dialogue.ids[t]].item() for t in range(first, len(dialogue.ids)))
        parts[row["category"] in ("A1", "A2", "A3", "D3")] += row["weight"] * nll, row["weight"]
    assert all(count for _, count in parts.values())
    for micro_batch in (12, 5):
        args.micro_batch = micro_batch
        batches, total = answers_of_step(policy, rows, None, args, 1, ALONE)
        losses, told = zip(*(train_sft.answer_loss(policy, batch) for batch in batches))
        inverse, forward = (
            (sum(part[key][0] for part in told), sum(part[key][1] for part in told))
            for key in ("inverse", "forward")
        )
        assert (inverse, forward) == (
            pytest.approx(parts[True], rel=1e-4),
            pytest.approx(parts[False], rel=1e-4),
        )
        by_hand = 2 * parts[True][0] / parts[True][1] + 0.5 * parts[False][0] / parts[False][1]
        assert sum(losses).item() / total == pytest.approx(by_hand, rel=1e-4)
    shares_of_ranks = [
        train_sft.answers_of_step(policy, rows, None, args, 1, World(rank, 2, rank, ALONE.device))[
            0
        ]
        for rank in range(2)
    ]
    assert sum(
        train_sft.answer_loss(policy, batch)[0].item()
        for batches in shares_of_ranks
        for batch in batches
    ) == pytest.approx(by_hand, rel=1e-4)


def test_pictures_that_are_looked_at_once_teach_the_same(motions):
    policy, rows = Policy.tiny(), data.load_jsonl(motions / "questions_train.jsonl")[:12]
    kept = train_sft.seen(policy, rows)
    assert len(kept) == len({pair for row in rows for pair in enumerate(row["images"], 1)})
    for row in rows:
        once, again = (
            collate(policy, [train_sft.answered(policy, row, features)])
            for features in (kept, None)
        )
        assert torch.equal(once.ids, again.ids)
        torch.testing.assert_close(once.features, again.features, atol=1e-5, rtol=1e-4)


def test_only_the_tasks_asked_for_are_learned(motions, start, tmp_path):
    flags = [
        "--task",
        "world2vlm",
        "--data",
        str(motions),
        "--start",
        str(start),
        "--steps",
        "1",
        "--batch",
        "4",
        "--threads",
        "1",
        "--eval-questions",
        "0",
    ]
    main([*flags, "--tasks", "A2", "A1", "--out", str(tmp_path / "inverse")])
    assert (
        "inverse" in log_of(tmp_path / "inverse")[0]
        and "forward" not in log_of(tmp_path / "inverse")[0]
    )
    with pytest.raises(SystemExit, match="no question of the tasks A4"):
        main([*flags, "--tasks", "A4", "--lambda-fwd", "0", "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        parse_args(["--tasks", "A2"])


def test_one_direction_alone_is_a_row_of_the_ablation(motions, start, tmp_path):
    flags = [
        "--task",
        "world2vlm",
        "--data",
        str(motions),
        "--start",
        str(start),
        "--steps",
        "1",
        "--batch",
        "4",
        "--threads",
        "1",
        "--eval-questions",
        "8",
    ]
    main([*flags, "--lambda-inv", "0", "--out", str(tmp_path / "forward")])
    main([*flags, "--lambda-fwd", "0", "--out", str(tmp_path / "inverse")])
    for name, other in (("forward", "inverse"), ("inverse", "forward")):
        *steps, end = log_of(tmp_path / name)
        assert all(name in row and other not in row for row in steps)
        assert steps[0]["eval"].keys() == end["eval"].keys() == set(train_sft.TASKS)
        assert {"reward", "exact"} in [set(means) for means in end["eval"].values()]
    with pytest.raises(SystemExit):
        parse_args(["--task", "world2vlm", "--lambda-inv", "0", "--lambda-fwd", "0"])


def test_adapters_are_merged_where_the_paper_has_them(motions, start, tmp_path):
    main(
        [
            "--task",
            "world2vlm",
            "--data",
            str(motions),
            "--start",
            str(start),
            "--steps",
            "2",
            "--batch",
            "4",
            "--lr",
            "0.01",
            "--lora",
            "2",
            "--dropout",
            "0.1",
            "--eval-questions",
            "0",
            "--threads",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    before, after = (Policy.load(folder).model.state_dict() for folder in (start, tmp_path))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and changed == {
        f"model.language_model.layers.{i}.{part}_proj.weight"
        for i in range(4)
        for part in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
            "mlp.down",
        )
    }
    one, other = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (start, tmp_path)
    )
    assert abs(one - other) < 2000  # tied weights are not written twice


def train_for_two_steps(out, motions, start, *more):
    main(
        [
            "--task",
            "world2vlm",
            "--data",
            motions,
            "--start",
            start,
            "--steps",
            "2",
            "--batch",
            "4",
            "--micro-batch",
            "1",
            "--lora",
            "2",
            "--eval-questions",
            "5",
            "--threads",
            "1",
            "--out",
            out,
            *more,
        ]
    )


def test_two_ranks_learn_what_one_learns(motions, start, tmp_path):
    """Adapters are whole on every rank, what is frozen is sharded; recomputing activations changes nothing either."""
    train_for_two_steps(str(tmp_path / "one"), str(motions), str(start))
    on_ranks(2, train_for_two_steps, tmp_path / "two", motions, start, "--gradient-checkpointing")
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert one.pop("eval", None) == two.pop("eval", None)
        assert one == pytest.approx(two, rel=1e-3)
    weights, others = (Policy.load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, atol=1e-4, rtol=1e-3)


def test_grades_by_hand():
    rows = [
        {"category": "A2", "answer": "turn left 20 degrees"},
        {"category": "A2", "answer": "turn left 90 degrees"},
        {"category": "D2", "answer": "yes"},
    ]
    table = graded(rows, ["turn left 20 degrees", "turn left 110 degrees", None])
    second = world2vlm("A2", "turn left 90 degrees", "turn left 110 degrees")["total"]
    assert 0.8 < second < 1 and table["A2"] == {
        "reward": pytest.approx((1 + second) / 2),
        "exact": 0.5,
    }
    assert table["D2"] == {"reward": 0, "exact": 0} and table["A1"] == {}


def test_flags_of_the_other_task_are_refused(capsys):
    for flags, sentence in (
        (["--lora", "8"], "--lora is of --task world2vlm"),
        (["--task", "world2vlm", "--lessons", "all"], "--lessons is of --task cold"),
        (["--preset", "astra"], "needs no cold start"),
    ):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert sentence in capsys.readouterr().err
    args = parse_args(["--task", "world2vlm", "--preset", "astra"])
    assert (args.lora, args.dropout, args.batch, args.start) == (
        256,
        0.05,
        128,
        "Qwen/Qwen3-VL-8B-Instruct",
    )


def test_missing_inputs_are_named_with_their_command(start, tmp_path):
    flags = [
        "--task",
        "world2vlm",
        "--data",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "w2v"),
    ]
    with pytest.raises(SystemExit, match="python data.py world2vlm --out"):
        main([*flags, "--start", str(start)])
    with pytest.raises(SystemExit, match="`python train_sft.py` makes it"):
        main([*flags, "--start", str(tmp_path / "no_policy")])
