"""pytest tests/extras/test_lora.py: LoRA by hand.  CPU, about 5 s."""

import copy
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from extras.lora import LANGUAGE_LAYERS, QWEN_LAYERS, LoraLinear, add_lora, merged
from lib import checkpoints
from lib.bagel_files import load_network
from lib.distributed import clip_gradients, setup, shard, sum_gradients
from policy import Policy
from world_model import WorldModel

CPU, NAMES = torch.device("cpu"), r"blocks\.\d\.(q|o)_proj"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(self.norm(x))))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(6, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def small(dtype=torch.float32, device=CPU):
    """A frozen Small with an adapter in its blocks -> (network, adapters, the weights it had before)."""
    torch.manual_seed(0)
    network = Small().to(dtype)
    before = copy.deepcopy(network.state_dict())
    return network, add_lora(network, names=NAMES, rank=2, seed=0, device=device), before


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_fresh_adapters_change_nothing():
    network, adapters, before = small()
    plain = Small()
    plain.load_state_dict(before)
    x = drawn(5, 6)
    assert torch.equal(network(x), plain(x))
    after = dict(merged(network))
    assert list(after) == list(before) and all(
        torch.equal(after[key], before[key]) for key in before
    )
    assert len(adapters) == 8 and sum(p.requires_grad for p in network.parameters()) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_compute_what_the_trained_adapters_do(dtype):
    network, adapters, before = small(dtype)
    optimizer, x = torch.optim.AdamW(adapters, lr=0.05), drawn(5, 6).to(dtype)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).float().square().sum().backward()
        optimizer.step()
    state = network.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before)  # the base did not move
    assert all(p.dtype == torch.float32 for p in adapters)
    after, plain = dict(merged(network)), Small().to(dtype)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    assert [key for key in before if not torch.equal(after[key], before[key])] == [
        f"blocks.{i}.{name}_proj.weight" for i in range(2) for name in "qo"
    ]
    plain.load_state_dict(after)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(plain(x), network(x), rtol=limit, atol=limit)
    assert not torch.allclose(plain(x), small(dtype)[0](x), atol=0.1)


def test_gradient_of_an_adapter_is_the_finite_difference():
    network, adapters, _ = small(torch.float64)
    x, g = drawn(5, 6).double(), torch.Generator().manual_seed(0)
    for p in adapters:
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64)

    def loss():
        return network(x).square().sum()

    for gradient, p in zip(torch.autograd.grad(loss(), adapters), adapters, strict=True):
        direction, step = torch.randn(p.shape, generator=g, dtype=torch.float64), 1e-6
        with torch.no_grad():
            p += step * direction
            up = loss()
            p -= 2 * step * direction
            down = loss()
            p += step * direction
        assert (up - down).item() / (2 * step) == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-6
        )


def test_names_of_bagel_s_language_layers():
    """q, k, v, o, gate, up and down, of two experts; nothing in the ViT, whose layers have a q_proj too."""
    network = WorldModel.tiny(0).network
    layers, before = len(network.language_model["model"]["layers"]), set(network.state_dict())
    add_lora(network, names=LANGUAGE_LAYERS, rank=1, seed=0, device=CPU)
    changed = [name for name, module in network.named_modules() if isinstance(module, LoraLinear)]
    assert len(changed) == 14 * layers and not any("vit" in name for name in changed)
    assert {name for name, _ in merged(network)} == before
    with pytest.raises(ValueError, match="nothing to learn.*no_such_proj"):
        add_lora(network, "no_such_proj", 1, 0, CPU)


def test_names_of_qwen_s_language_layers():
    model = Policy.tiny().model
    add_lora(model, names=QWEN_LAYERS, rank=1, seed=0, device=CPU)
    changed = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert len(changed) == 7 * 4 and not any("visual" in name for name in changed)


def test_dropout_acts_on_the_correction_in_training_alone():
    torch.manual_seed(0)
    module, x = nn.Linear(6, 9), drawn(4, 6)
    plain = module(x)
    box = nn.ModuleDict({"q_proj": module})
    (a, b) = add_lora(box, names="q_proj", rank=2, seed=0, device=CPU, dropout=0.25)
    b.data = drawn(9, 2)
    correction = 2 * x @ a.T @ b.T
    torch.testing.assert_close(box.eval()["q_proj"](x), plain + correction)
    box.train()
    several = torch.stack([box["q_proj"](x) - plain for _ in range(4000)])
    assert not torch.allclose(several[0], several[1])
    torch.testing.assert_close(several.mean(0), correction, atol=0.15, rtol=0.1)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(4, 6), 0.25)
    torch.manual_seed(1)
    torch.testing.assert_close(box["q_proj"](x) - plain, 2 * (x * mask) @ a.T @ b.T)


def train_sharded(folder):
    """Load a bf16 base, sharded already, and take two steps on this rank's share of 5 rows; write the merged model."""
    world, folder = setup(threads=1), Path(folder)
    with torch.device("meta"):
        network = Small().bfloat16()
    adapters = add_lora(network, NAMES, 2, 0, CPU)
    shard(network, network.blocks, world, ignored=adapters)
    load_network(network, folder / "base", "cpu")
    optimizer, x = (
        torch.optim.AdamW(adapters, lr=0.05),
        drawn(5, 6).bfloat16()[world.rank :: world.size],
    )
    for _ in range(2):
        optimizer.zero_grad()
        network(x).float().square().sum().backward()
        sum_gradients(adapters)
        norm = clip_gradients(adapters, 1e9)
        optimizer.step()
    checkpoints.write_gathered(folder / f"by_{world.size}", merged(network))
    state = checkpoints.training_tensors(network, optimizer)
    checkpoints.save_state(folder / "training", 2, state, {"norm": norm})


def test_ranks_with_a_sharded_frozen_base_learn_what_one_process_learns(tmp_path):
    save_file(small(torch.bfloat16)[2], tmp_path / "base")
    one, two = blank(), blank()  # what a run saves: the adapters and their moments
    train_sharded(tmp_path)
    norm_of_one = checkpoints.load_state(tmp_path / "training", one)[1]["norm"]
    on_ranks(2, train_sharded, tmp_path)
    norm_of_two = checkpoints.load_state(tmp_path / "training", two)[1]["norm"]
    assert norm_of_two == pytest.approx(norm_of_one, rel=0.02)  # bf16 sums, in another order
    for key in one:
        torch.testing.assert_close(
            two[key], one[key], rtol=0.05, atol=0.05 * one[key].abs().max().item()
        )
    files = [load_file(tmp_path / name) for name in ("base", "by_1", "by_2")]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for key, base in files[0].items():
        moved = (files[1][key] - base).float()
        torch.testing.assert_close((files[2][key] - base).float(), moved, rtol=0.1, atol=0.03)
        assert ("_proj.weight" in key) == bool(moved.any())


def blank():
    """What `train_sharded` saves, before the first step."""
    network, adapters, _ = small(torch.bfloat16)
    return checkpoints.training_tensors(network, torch.optim.AdamW(adapters))
