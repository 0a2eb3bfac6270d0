"""8-bit weights: what a layer of them computes, what the whole weighs, and how far off true width is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.gpu import bagel_7b
from extras.int8 import Int8Linear, quantise, quantise_bagel
from lib.bagel import Layer
from world_model import WorldModel


def test_a_row_is_whole_numbers_times_its_scale():
    linear = nn.Linear(3, 3)
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-2.54, 2.54, 1.27]])
    linear.load_state_dict({"weight": weight, "bias": torch.tensor([0.0, 1.0, 0.0])})
    small = Int8Linear(linear, "cpu")
    assert small.levels.tolist() == [
        [127, -50, 0],
        [0, 0, 0],
        [-127, 127, 64],
    ]  # 63.5 is even at 64
    x = torch.tensor([[1.0, 2.0, 100.0]])
    torch.testing.assert_close(small(x), torch.tensor([[0.27, 1.0, 130.54]]))


def test_a_model_of_8_bits_is_read_from_the_same_file_and_imagines_nearly_the_same(tmp_path):
    WorldModel.tiny().save(tmp_path)
    whole = WorldModel.load(tmp_path).network
    small = WorldModel.load(tmp_path, int8=True).network
    layers = [module for module in small.modules() if isinstance(module, Int8Linear)]
    config = small.config
    assert len(layers) == 14 * config.layers + 6 * config.vit_layers  # nothing of them is left out
    ids = torch.arange(5)[None]
    assert torch.equal(small.embed_text(ids), whole.embed_text(ids))
    x = torch.randn(2, 7, config.width, generator=torch.Generator().manual_seed(0))
    ours, theirs = (n.language_model["model"]["layers"][0].mlp for n in (small, whole))
    assert 0 < (ours(x) - theirs(x)).norm() / theirs(x).norm() < 0.03


def test_bagel_fits_a_card_of_24_gb():
    def gigabytes(network):
        return sum(x.numel() * x.itemsize for x in network.state_dict().values()) / 1e9

    network = bagel_7b().to(torch.bfloat16)  # on the meta device
    assert gigabytes(network) == pytest.approx(29.2, abs=0.05)
    quantise_bagel(network, "meta")
    assert gigabytes(network) == pytest.approx(14.7, abs=0.05)


class Everyone:
    """An attention in which every token sees every other."""

    def attend(self, layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.slow
def test_a_layer_of_true_width_is_as_near_as_two_digits():
    """Random weights at the scale of Qwen2.5's own beginning (0.02): beside fp32, and beside what bf16 alone loses."""
    torch.manual_seed(0)
    config = bagel_7b().config
    layer = Layer(config, 0)
    for weight in layer.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.02)
    und, gen = torch.randn(1, 8, config.width), torch.randn(1, 64, config.width)
    rope = (torch.ones(1, 1, 1, 128), torch.zeros(1, 1, 1, 128))

    @torch.no_grad()
    def added(dtype):
        """What the layer adds to the residual stream of the latent tokens."""
        inputs = und.to(dtype), gen.to(dtype), [x.to(dtype) for x in rope]
        return (layer(*inputs, Everyone())[1].float() - gen.to(dtype).float()).double()

    exact = added(torch.float32)
    layer.to(torch.bfloat16)
    bf16 = added(torch.bfloat16)
    quantise([layer], "cpu")
    int8 = added(torch.bfloat16)
    off_bf16, off_int8 = ((x - exact).norm() / exact.norm() for x in (bf16, int8))
    print(
        f"bf16 {off_bf16:.4f}, int8 {off_int8:.4f}, between {(int8 - bf16).norm() / bf16.norm():.4f}"
    )
    assert off_bf16 < 0.01 and off_bf16 < off_int8 < 0.03
