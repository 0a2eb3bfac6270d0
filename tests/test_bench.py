"""The benchmarks, and the fast sampler against the straightforward one of bench/naive.py. `pytest tests/test_bench.py`"""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import policy as policy_file
from bench import __main__ as bench
from bench import gpu, naive
from bench import policy as policy_bench
from bench import wm as wm_bench
from lib.geometry import Query
from policy import Policy, rollout
from world_model import WorldModel

GUIDED = {"text_scale": 3.0, "image_scale": 2.0}
BAGEL = {
    "prediction": "velocity",
    "rays": False,
    "words": True,
    "learned_places": False,
}


def lively(**changes):
    """The tiny model with weights that all matter (llm2vae starts at zero, each gen expert as its und twin)."""
    model = WorldModel.tiny(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def queries():
    """Two to four images, two sizes among them: the tiny model sees 32 x 32 and 32 x 16 pixels as they are."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, width, 3), dtype=np.uint8) for width in (32, 16, 32, 32)]
    motions = [
        "turn 45 degrees to the left",
        "move 1.5 meters to the left",
        "pitch up by 10 degrees",
        "turn 90 degrees to the right",
    ]
    return [
        Query(
            images[:count],
            reference,
            f"Base on the viewpoint of Image-{reference}, {motion}.",
            seed,
        )
        for seed, (count, reference, motion) in enumerate(
            zip((2, 2, 3, 4), (1, 2, 2, 4), motions, strict=True)
        )
    ]


@pytest.mark.parametrize("departures", [{}, BAGEL], ids=["tiny", "bagel"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_scale": 3.0},
        {**GUIDED, "renorm": "text_channel"},
        {**GUIDED, "renorm": "channel", "shift": 3.0, "renorm_min": 0.5},
        {**GUIDED, "renorm": "global", "interval": (0.3, 0.9)},
    ],
    ids=["plain", "text", "text_channel", "channel", "global"],
)
def test_the_fast_sampler_equals_the_straightforward_one(departures, changes):
    """A mixed batch in one call, against each query alone, branch by branch."""
    model = lively(**departures)
    with wm_bench.latents_of(model) as fast:
        views = model.imagine(queries(), **changes)
    for query, view in zip(queries(), views, strict=True):
        latent = naive.latent(model, query, **changes)
        assert min((latent[0] - z).abs().max() for z in fast if z.shape == latent.shape[1:]) < 1e-4
        other = naive.imagine(model, [query], **changes)[0]
        assert view.shape == other.shape and np.abs(view.astype(int) - other).max() <= 1


def test_attention_may_come_in_any_layout(monkeypatch):
    """Kernels that take a mask lay their result out as (rows, tokens, heads, width), which a CPU never does."""
    usual, expected = (
        torch.nn.functional.scaled_dot_product_attention,
        lively().imagine(queries(), **GUIDED),
    )

    def in_another_layout(*arguments, **options):
        return usual(*arguments, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", in_another_layout)
    for view, other in zip(expected, lively().imagine(queries(), **GUIDED), strict=True):
        assert np.array_equal(view, other)


def test_bench_wm_ends_with_one_line_of_json(capsys):
    bench.main(["wm", "--quick", "--threads", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"speedup_demo32", "speedup_b1", "speedup_b8"} <= result.keys()
    assert result["max_diff"] < 1e-4 and result["threads"] == 1


def test_counted_arithmetic_is_what_the_straightforward_way_does():
    """It does a little more: queries and MLP of the last layer for tokens whose result nobody reads."""
    model, (query,) = wm_bench.middle_model(64, layers=4), wm_bench.pair_queries(1, 64)

    def attention(query, key, *_, **__):
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    with FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention},
    ) as counter:
        naive.imagine(model, [query], steps=3, text_scale=4.0, image_scale=2.0)
    assert 1.0 < counter.get_total_flops() / gpu.work_of(model, query, steps=3) < 1.2


# ---------------------------------------------------------------- the policy


def line_of(capsys, *command):
    bench.main(list(command))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_generate_from_scratch_samples_what_the_rollout_samples(monkeypatch):
    """The straightforward writer, under sampling: the same tokens and log-probs, whatever the length of the prompts."""
    policy, questions = Policy.tiny(), policy_bench.room_questions(3)
    for count, question in enumerate(questions, 1):
        question["images"] = question["images"][:count]
    fast = rollout(policy, questions, group_size=2, max_turns=2, max_new_tokens=10)
    monkeypatch.setattr(policy_file, "Writer", naive.Writer)
    slow = rollout(policy, questions, group_size=2, max_turns=2, max_new_tokens=10)
    assert [t.ids for t in fast] == [t.ids for t in slow] and len({tuple(t.ids) for t in fast}) == 6
    for a, b in zip(fast, slow, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_bench_rollout_says_the_script_both_ways(capsys):
    result = line_of(capsys, "rollout", "--quick")
    assert result["same_tokens"] and result["speedup"] > 0
    shares = [result[f"{part}_share"] for part in ("prefill", "decode", "simulator", "rest")]
    assert sum(shares) == pytest.approx(1, abs=0.01)


# ---------------------------------------------------------------- the published shapes, here on tiny models


def counted(step):
    """FLOP of matrix products and attention that torch counts in `step()`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["train_wm", "train_rl"])
def test_the_work_of_an_update_is_what_torch_counts(name, capsys, monkeypatch):
    """Beside it: padding and masked attention more; less where nothing below a layer needs a gradient."""
    monkeypatch.setattr(gpu, "timed", lambda step, *_: (counted(step), 0.0))
    monkeypatch.setattr(gpu, "best_matmul_rate", lambda *_: 1e12)
    result = line_of(capsys, name)
    done = result["seconds_off"] / (result["tflop"] * 1e12)
    assert 0.9 < done < 1.35
    assert result["seconds_on"] > 1.2 * result["seconds_off"]  # checkpointing: forward once more


def test_decoding_is_measured_against_the_memorys_bound():
    result = gpu.decoding(Policy.tiny(), count=2, group=2, length=6, side=32, repeats=1)
    assert 0 < result["share_of_bandwidth_bound"] < 1 and result["speedup"] > 0
