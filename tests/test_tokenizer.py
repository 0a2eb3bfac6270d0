"""The tiny tokenizer: any text survives, phrases are single tokens, special tokens are Qwen's."""

import re

import pytest
from transformers import AutoTokenizer

from lib.geometry import KINDS, UNITS, Motion
from lib.protocol import call_of, call_text
from lib.simulators import instruction
from lib.tiny import MOTION_PHRASES, SPECIAL, TAGS, WORDS, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "turn 45 degrees to the left",
        "reduce  two\n\n spaces\t",
        "é 漢字 🙂 \x00",
        "<think",
        "</answer>",
        "a<|im_end|>\nb",
        '{"name": "world_simulator_tool", "arguments": {"reference_image": 12, "motion_type": "',
    ],
)
def test_any_text_is_decoded_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_stays_small_and_words_are_single_tokens(tokenizer):
    assert len(tokenizer) < 600
    for word in (*SPECIAL, *TAGS, *WORDS):
        assert len(tokenizer.encode(word)) == 1, word


def test_every_motion_of_the_grid_takes_few_tokens(tokenizer):
    """Based on the last image | , | turn | 45 | degrees | to the left | ."""
    for kind in KINDS:
        for amount in (
            [0.1 * n for n in range(1, 31)] if UNITS[kind] == "meters" else range(5, 185, 5)
        ):
            for sign in (1, -1):
                motion = Motion(kind, sign * round(amount, 1))
                text = instruction(motion)
                ids = tokenizer.encode(text)
                assert len(ids) <= 7 and tokenizer.decode(ids) == text, text
                call = tokenizer.encode(call_text(call_of(2, motion)))
                assert len(call) == 9, call


def test_special_tokens_are_skipped_and_tags_are_not(tokenizer):
    ids = tokenizer.encode(
        "<|im_start|>user\n<think>x</think><|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n<think>x</think>"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )


def test_saved_and_loaded_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>assistant\n<think> red  é</think><answer>B</answer><|im_end|>"
    assert (
        loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
    )
    assert (
        loaded.get_vocab() == tokenizer.get_vocab()
        and loaded.eos_token_id == tokenizer.eos_token_id
    )


def test_further_phrases_become_tokens_and_keep_the_ids_of_the_others(tokenizer):
    longer = tiny_tokenizer(["A fixed sentence with <answer></answer> inside."])
    assert len(longer.encode("A fixed sentence with <answer></answer> inside.")) == 1
    for text in ("turn 45 degrees", "<answer>"):
        assert longer.encode(text) == tokenizer.encode(text)
    assert all(re.fullmatch(r"<\|.*\|>", token) for token in longer.all_special_tokens)


def test_questions_about_motions_are_short_in_their_phrases():
    prompts = pytest.importorskip("extras.world2vlm.words").PROMPTS
    words = {
        "object": "barrel",
        "box1": "[48, 558, 226, 681]",
        "box2": "[30, 504, 199, 1000]",
        "sequence": "move left 0.5 meters; turn right 40 degrees",
        "claim": "move left 0.5 meters and turn right 40 degrees",
    }
    tokenizer, lengths = tiny_tokenizer(MOTION_PHRASES), {}
    for task, prompt in prompts.items():
        text = prompt.format(**words)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        lengths[task] = len(ids)
    assert lengths["A1"] == lengths["A2"] == lengths["A3"] == 1 and max(lengths.values()) < 50
    for answer, length in (
        ("true", 1),
        ("no", 1),
        ("move left 0.5 meters; turn right 40 degrees", 7),
    ):
        assert len(tokenizer.encode(answer)) == length
