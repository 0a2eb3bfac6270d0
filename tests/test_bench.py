"""bench.py, and the fast sampler against the straightforward one of tests/naive.py. `pytest tests/test_bench.py`"""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from lib.geometry import Query
from tests import naive
from world_model import WorldModel

GUIDED = {"text_scale": 3.0, "image_scale": 2.0}
BAGEL = {"prediction": "velocity", "motion_to_target": False, "reference_first": False, "learned_places": False}


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
    motions = ["turn left 45 degrees", "move 1.5 meters to the left", "look up 10 degrees", "turn right 90 degrees"]
    return [Query(images[:count], reference, f"Base on the viewpoint of Image-{reference}, {motion}.", seed)
            for seed, (count, reference, motion) in enumerate(zip((2, 2, 3, 4), (1, 2, 2, 4), motions))]


@pytest.mark.parametrize("departures", [{}, BAGEL], ids=["tiny", "bagel"])
@pytest.mark.parametrize("changes", [{}, {"text_scale": 3.0}, {**GUIDED, "renorm": "text_channel"},
                                     {**GUIDED, "renorm": "channel", "shift": 3.0, "renorm_min": 0.5},
                                     {**GUIDED, "renorm": "global", "interval": (0.3, 0.9)}],
                         ids=["plain", "text", "text_channel", "channel", "global"])
def test_the_fast_sampler_equals_the_straightforward_one(departures, changes):
    """A mixed batch in one call, against each query alone, branch by branch."""
    model = lively(**departures)
    with bench.latents_of(model) as fast:
        views = model.imagine(queries(), **changes)
    for query, view in zip(queries(), views):
        latent = naive.latent(model, query, **changes)
        assert min((latent[0] - z).abs().max() for z in fast if z.shape == latent.shape[1:]) < 1e-4
        other = naive.imagine(model, [query], **changes)[0]
        assert view.shape == other.shape and np.abs(view.astype(int) - other).max() <= 1


def test_bench_wm_ends_with_one_line_of_json(capsys):
    bench.main(["wm", "--quick", "--threads", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"speedup_demo32", "speedup_demo32_cpu", "speedup_b1", "speedup_b8", "matmul_share"} <= result.keys()
    assert result["max_diff"] < 1e-4 and result["threads"] == 1


def test_counted_arithmetic_is_what_the_straightforward_way_does():
    """It does a little more: queries and MLP of the last layer for tokens whose result nobody reads."""
    model, (query,) = bench.middle(64, layers=4), bench.pair_queries(1, 64)

    def attention(query, key, *_, **__):
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]

    with FlopCounterMode(display=False, custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}) as counter:
        naive.imagine(model, [query], steps=3, text_scale=4.0, image_scale=2.0)
    assert 1.0 < counter.get_total_flops() / bench.work_of(model, query, steps=3) < 1.2
