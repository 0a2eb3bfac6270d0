"""The cold start: pytest tests/test_train_sft.py"""

import json

import numpy as np
import pytest
import torch

import data
import train_sft
from policy import Policy, collate, token_logprobs
from train_sft import DECISION, FACT, Lesson, main, script, soften


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    data.make_triples(out, rooms=1, held_out=1, threads=1)
    data.make_questions(out, rooms=8, held_out=(1, 1), threads=1)
    data.make_mindcube(out / "mindcube", out / "questions_test.jsonl")
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
    return [(policy.tokenizer.decode([i]), w) for i, w, m in zip(dialogue.ids, dialogue.logprobs, dialogue.loss_mask) if m]


def test_scripts_are_dialogues_that_the_protocol_accepts(lessons):
    policy, lessons = lessons
    for seed, lesson in enumerate(lessons):
        for kind, calls, slips in (("direct", 0, 0), ("tool", 1, 0), ("slip", 1, 1)):
            dialogue = script(policy, lesson, kind, np.random.default_rng(seed))
            words = lesson.question["options"]["ABCD".index(lesson.question["answer"])].split(". ")[1]
            assert (dialogue.answer, dialogue.valid_calls, dialogue.invalid_calls) == (words, calls, slips)
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
    for place, (word, weight) in enumerate(told):
        if weight == FACT:
            ask = next(ask for ask, say in train_sft.SAY.items() if say == told[place - 2][0])
            shown = lessons[0].shows[int(told[place - 1][0][len(" Image-"):-1]) - 1]
            assert word == f" {shown[ask]}"


def test_loss_is_the_weighted_mean_of_log_probs(lessons):
    policy, lessons = lessons
    batch = collate(policy, [script(policy, lesson, kind, np.random.default_rng(1)) for lesson, kind in
                             zip(lessons, ("direct", "tool", "slip", "look"))])
    with torch.no_grad():
        loss, right, facts = train_sft.scripted_loss(policy, batch)
        logprobs, _ = token_logprobs(policy, batch)
    assert loss.item() == pytest.approx(-(logprobs * batch["logprobs"][:, 1:]).sum().item(), rel=1e-4)
    assert facts == (batch["logprobs"] == FACT).sum() and 0 <= right <= facts


def test_softened_views_keep_their_colours_on_average():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    soft = [soften(image, np.random.default_rng(seed)) for seed in range(24)]
    assert any((s == image).all() for s in soft) and any((s != image).any() for s in soft)
    assert all(abs(float(s.mean()) - float(image.mean())) < 2 for s in soft)


def test_resumed_run_equals_unbroken_run(folder, tmp_path, monkeypatch):
    flags = ["--data", str(folder), "--see-steps", "2", "--steps", "4", "--batch", "4", "--save-every", "2", "--threads", "1"]
    main([*flags, "--out", str(tmp_path / "whole")])
    stops = iter([False, False, True])
    monkeypatch.setattr(train_sft.common.Interrupt, "requested", lambda self: next(stops, False))
    with pytest.raises(SystemExit):
        main([*flags, "--out", str(tmp_path / "broken")])
    main([*flags, "--out", str(tmp_path / "broken")])
    a, b = ([json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "broken"))
    assert a == b
    whole, broken = (Policy.load(tmp_path / run).model.state_dict() for run in ("whole", "broken"))
    assert all(torch.equal(value, broken[key]) for key, value in whole.items())
