"""pytest tests/test_train_sft.py: the cold start, its scripts and its loss.  CPU, 20 s."""

import re

import numpy as np
import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file

import data
import train_sft
from lib.images import soften
from lib.records import load_jsonl, read_log, save_jsonl
from lib.stage import Interrupt
from policy import Policy, collate, token_logprobs
from train_sft import ASK_WORDS, DECISION, FACT, Lesson, script, supervised_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    rows = [row for seed in range(8) for row in data.room_questions(seed, out, data.FAMILIES)]
    save_jsonl(out / "questions_train.jsonl", rows)
    return out


@pytest.fixture(scope="module")
def policy():
    return Policy.tiny()


@pytest.fixture(scope="module")
def lessons(folder, policy):
    lessons = [Lesson.load(row) for row in load_jsonl(folder / "questions_train.jsonl")]
    for lesson in lessons:
        lesson.features = policy.encode(list(enumerate(lesson.images, 1)))
    return lessons


def weighted_tokens(policy, dialogue):
    """[(text, weight)] of what the policy wrote."""
    rows = zip(dialogue.ids, dialogue.loss_weights, dialogue.loss_mask, strict=True)
    return [(policy.tokenizer.decode([i]), weight) for i, weight, wrote in rows if wrote]


def words_of(question):
    """The right option without its letter."""
    return question["options"]["ABCD".index(question["answer"])].split(". ")[1]


@pytest.fixture(scope="module")
def moving(lessons):
    """Those that are answered by way of a call; some take two."""
    moving = [lesson for lesson in lessons if lesson.question["ideal"]]
    assert {len(lesson.question["ideal"]) for lesson in moving} == {1, 2}
    return moving


@pytest.mark.parametrize("kind, slips", [("direct", 0), ("tool", 0), ("slip", 1)])
def test_scripts_are_dialogues_that_the_protocol_accepts(policy, lessons, moving, kind, slips):
    for seed, lesson in enumerate(lessons if kind == "direct" else moving):
        dialogue = script(policy, lesson, kind, np.random.default_rng(seed))
        calls = 0 if kind == "direct" else len(lesson.question["ideal"])
        assert dialogue.answer == words_of(lesson.question)
        assert (dialogue.valid_calls, dialogue.invalid_calls) == (calls, slips)
        # the answer; of an object that must be found, also its angle and the image to turn from
        facts = 3 if lesson.question["named"] else 1
        assert [weight for _, weight in weighted_tokens(policy, dialogue)].count(FACT) == facts
        assert len(dialogue.features) == len(dialogue.images)


def test_the_choice_to_call_counts_little_unless_it_is_forced(policy, moving):
    for seed in range(12):
        dialogue = script(policy, moving[0], "tool", np.random.default_rng(seed))
        choice = dict(weighted_tokens(policy, dialogue))["I need to see it."]
        assert choice == (1.0 if dialogue.mode == "forced" else DECISION)


def test_looking_teaches_true_facts_and_nothing_else(policy, lessons):
    dialogue = script(policy, lessons[0], "look", np.random.default_rng(0))
    tokens = weighted_tokens(policy, dialogue)
    weights = {weight for _, weight in tokens}
    assert FACT in weights <= {0, 1, FACT, DECISION}
    for place, (word, weight) in enumerate(tokens):
        if weight == FACT:
            (asked, _), (image, _) = tokens[place - 2 : place]
            ask = next(ask for ask, words in ASK_WORDS.items() if words == asked)
            facts = lessons[0].shows[int(image[len(" Image-") : -1]) - 1]
            assert word == f" {facts[ask]}"


def test_the_thought_finds_what_the_calls_need(policy, lessons):
    """ "red is in Image-1: none Image-2: -30 …. behind you Image-2: Image-4:" leads to the first ideal call."""
    finding = [lesson for lesson in lessons if lesson.question["named"]]
    relations = set()
    for lesson in finding:
        question = lesson.question
        kind = "tool" if question["ideal"] else "direct"
        thought = script(policy, lesson, kind, np.random.default_rng(0)).turns[0]
        scan, ring = thought.split(".", 1)
        places = dict(re.findall(r"Image-(\d): (centre|-?\d+)", scan))
        found, start = re.match(rf" {question['relation']} Image-(\d): Image-(\d):", ring).groups()
        assert list(places) == [found]
        angle = float(places[found].replace("centre", "0"))
        turns = [call for call in question["ideal"] if call["motion_type"] == "dangle"]
        assert angle == (turns[0]["value"] if turns else 0)
        assert int(start) == (question["shown_by"] or question["ideal"][0]["reference_image"])
        relations.add(question["relation"])
    assert len(relations) > 1


def test_loss_is_the_weighted_sum_of_log_probs(policy, moving):
    kinds = ("direct", "tool", "slip", "look")
    scripts = []
    for lesson, kind in zip(moving[:4], kinds, strict=True):
        scripts.append(script(policy, lesson, kind, np.random.default_rng(1)))
    batch = collate(policy, scripts)
    with torch.no_grad():
        result = supervised_loss(policy, batch)
        logprobs, _ = token_logprobs(policy, batch)
        logits = policy.logits(
            policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
        )
    taught = batch.loss_weights > 0
    torch.testing.assert_close(result.nll, -logprobs * taught, atol=1e-4, rtol=1e-4)
    assert result.loss.item() == pytest.approx(-(logprobs * batch.loss_weights).sum().item())
    assert torch.equal(result.correct, (logits.argmax(-1) == batch.targets) & taught)


def test_softened_views_keep_their_colours_on_average():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    soft = [soften(image, np.random.default_rng(seed)) for seed in range(24)]
    assert any((s == image).all() for s in soft) and any((s != image).any() for s in soft)
    assert all(abs(float(s.mean()) - float(image.mean())) < 2 for s in soft)


def command(folder, out, *more):
    flags = f"--data {folder} --out {out} --see-steps 2 --steps 4 --batch 4 --save-every 2"
    return [*flags.split(), "--threads", "1", *more]


def stage(*flags):
    train_sft.main(list(flags))


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """Four steps in one go."""
    out = tmp_path_factory.mktemp("run") / "sft"
    stage(*command(folder, out))
    return out


def weights_of(out):
    return load_file(out / "model.safetensors")


@pytest.mark.slow
def test_resumed_run_equals_unbroken_run(folder, unbroken, tmp_path, monkeypatch):
    stops = iter([False, False, True])
    monkeypatch.setattr(Interrupt, "requested", lambda self: next(stops, False))
    with pytest.raises(SystemExit):
        stage(*command(folder, tmp_path))
    stage(*command(folder, tmp_path))
    assert read_log(unbroken / "log.jsonl") == read_log(tmp_path / "log.jsonl")
    whole, resumed = weights_of(unbroken), weights_of(tmp_path)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.slow
def test_two_ranks_and_small_micro_batches_learn_what_one_learns(folder, unbroken, tmp_path):
    on_ranks(2, stage, *command(folder, tmp_path, "--micro-batch", "1"))
    one, two = read_log(unbroken / "log.jsonl"), read_log(tmp_path / "log.jsonl")
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    alone, shared = weights_of(unbroken), weights_of(tmp_path)
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_the_tower_is_frozen_when_the_scripts_are_learned(folder, unbroken, tmp_path):
    stage(*command(folder, tmp_path, "--start", str(unbroken), "--lessons", "direct"))
    before, after = weights_of(unbroken), weights_of(tmp_path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    assert changed == {key for key in before if "visual" not in key}


def test_what_is_missing_or_needs_no_cold_start_is_said(folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="questions_train.jsonl is missing. `python data.py"):
        stage(*command(tmp_path / "none", tmp_path / "sft"))
    with pytest.raises(SystemExit, match="`python train_sft.py` makes it"):
        stage(*command(folder, tmp_path / "sft", "--start", str(tmp_path / "no_policy")))
    with pytest.raises(SystemExit):
        stage("--preset", "astra")
    assert "needs no cold start" in capsys.readouterr().err
