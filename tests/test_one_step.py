"""docs/one-step.md: the recorded step by hand, against the trainer and against the page. `pytest tests/test_one_step.py`"""

from dataclasses import fields

import numpy as np
import pytest
import torch

import rewards
import train_rl
from docs import one_step
from lib.dialogue import Trajectory
from lib.packing import padded
from lib.protocol import parse_turn

# what score_by_hand, surrogate_by_hand and the page itself spell out
FLAGS = train_rl.parse_args(["--phase", "2", "--divide-by-std"])


@pytest.fixture(scope="module")
def recording():
    return one_step.load_recording()


@pytest.fixture(scope="module")
def episodes(recording):
    """The same rollouts as the trainer rewards them."""
    groups = train_rl.reward_rollouts([recording.rollouts], [recording.direct], FLAGS)
    train_rl.set_advantages(groups, FLAGS.divide_by_std)
    return groups[0]


def test_a_dialogue_is_saved_and_loaded(recording, tmp_path):
    dialogue = recording.rollouts[0]
    dialogue.save(tmp_path)
    again = one_step.load_dialogue(tmp_path)
    for field in fields(Trajectory):
        if field.name != "images":
            assert getattr(again, field.name) == getattr(dialogue, field.name), field.name
    assert all(map(np.array_equal, again.images, dialogue.images))
    assert again.transcript() == dialogue.transcript()


def trainers_loss(recording, episodes, new_logprobs):
    """grpo_loss per token of the group. new_logprobs: per rollout (L,)"""
    old = padded([episode.old_logprobs for episode in episodes])
    new = [torch.tensor(logprobs[1:]) for logprobs in new_logprobs]
    masks = [torch.tensor(t.loss_mask[1:]).float() for t in recording.rollouts]
    advantages = torch.tensor([episode.advantage for episode in episodes])
    mask = padded(masks)
    loss = train_rl.grpo_loss(padded(new), old, advantages, mask)
    return float(loss / sum(episode.n_tokens for episode in episodes))


def test_rewards_and_advantages_by_hand_are_the_trainers(recording, episodes):
    scores = recording.scores()
    assert scores.e_direct == episodes[0].match_direct
    assert scores.e.tolist() == [episode.match for episode in episodes]
    assert scores.f.tolist() == [episode.format for episode in episodes]
    gains = [
        rewards.tool_gain(episode.match, episode.trajectory.valid_calls, episode.match_direct)
        for episode in episodes
    ]
    assert scores.gain.tolist() == gains
    np.testing.assert_allclose(scores.reward, [episode.reward for episode in episodes], atol=1e-12)
    trainers = [episode.advantage for episode in episodes]
    np.testing.assert_allclose(recording.advantages(), trainers, atol=1e-6)


def test_the_loss_by_hand_is_the_trainers(recording, episodes):
    """Before the update, where the ratios are 1, and after it, where the clip acts on both sides."""
    ratios, advantages = recording.ratios(), recording.advantages()
    ones = [np.ones_like(ratio) for ratio in ratios]
    before = trainers_loss(recording, episodes, [t.logprobs for t in recording.rollouts])
    after = trainers_loss(recording, episodes, recording.new_logprobs)
    assert one_step.loss_by_hand(ones, advantages) == pytest.approx(before, abs=1e-6)
    assert one_step.loss_by_hand(ratios, advantages) == pytest.approx(after, abs=1e-6)
    assert after < before and one_step.clip_acts(recording)


def test_silent_tokens_by_hand_are_those_of_the_log(recording, episodes):
    for episode, ratio in zip(episodes, recording.ratios(), strict=True):
        stats = train_rl.clip_stats(
            torch.tensor(ratio)[None], torch.tensor([episode.advantage]), train_rl.CLIP_HIGH
        )
        trainers = (stats["clipped_low"] | stats["clipped_high"])[0]
        assert one_step.is_silent(ratio, episode.advantage).tolist() == trainers.tolist()


def test_the_page_contains_the_tables_as_they_come_out(recording):
    page = one_step.PAGE.read_text()
    assert one_step.with_tables(page, recording) == page


def test_a_page_without_a_mark_is_refused(recording):
    with pytest.raises(ValueError, match="<!-- question -->"):
        one_step.with_tables("# One step\n", recording)


def test_the_recorded_group_disagrees_as_the_page_says(recording):
    assert one_step.group_disagrees(recording.rollouts, recording.direct)
    assert not one_step.group_disagrees(recording.rollouts[:1] * 8, recording.direct)
    assert len(recording.rollouts) == FLAGS.group and len(recording.direct) == FLAGS.direct_rollouts


def test_texts_masks_and_positions_of_the_recorded_tokens(recording):
    """The turns are what the mask marks, and positions follow M-RoPE: an image of h x w tokens takes max(h, w)."""
    for t, texts in zip(recording.rollouts, recording.tokens, strict=True):
        written = [text for text, own in zip(texts, t.loss_mask, strict=True) if own]
        assert "".join(written) == "".join(f"{turn}<|im_end|>" for turn in t.turns)
        time = 0
        images = 0
        for j, text in enumerate(texts):
            if text != "<|image_pad|>":
                time = max(t.positions[j - 1]) + 1 if j else 0
                assert t.positions[j] == (time, time, time)
            elif texts[j - 1] != "<|image_pad|>":
                images += 1
                start = time + 1
                square = [
                    (start, start + row, start + column) for row in (0, 1) for column in (0, 1)
                ]
                assert t.positions[j : j + 4] == square
        assert images == len(t.images)


def test_today_s_parser_reads_every_turn_of_the_well_formed(recording):
    """A call may be refused, for what it asks and not for how it is written."""
    well_formed = [t for t in recording.rollouts + recording.direct if t.well_formed]
    turns = [turn for t in well_formed for turn in t.turns]
    assert len(turns) > 12 and all(parse_turn(turn).error is None for turn in turns)


def test_a_recording_is_small():
    size = sum(file.stat().st_size for file in one_step.RECORDING.glob("**/*") if file.is_file())
    assert size < 300_000


def test_recording_without_a_demo_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="`make demo` makes it"):
        one_step.main(["--record"])
    assert (one_step.RECORDING / "recording.json").exists()
