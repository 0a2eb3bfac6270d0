"""pytest tests/test_bagel_files.py: BAGEL's files in and out, also by many ranks.  CPU, about 5 s."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flux import to_flux
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from torch import nn

from lib import checkpoints
from lib.bagel_files import FluxLatents, load_network, write_checkpoint
from lib.distributed import is_main, setup, shard

# ---------------------------------------------------------------- the network


class Small(nn.Module):
    """What matters to loading: parameters whose rows do not divide by 2 or 4, fewer rows than ranks, a fixed table."""

    def __init__(self):
        super().__init__()
        self.inside, self.out, self.gate = (
            nn.Linear(6, 7),
            nn.Linear(7, 3, bias=False),
            nn.Linear(7, 1),
        )
        self.table = nn.Buffer(torch.zeros(5, 7))

    def forward(self, x):
        x = torch.tanh(self.inside(x)) + self.table[0]
        return self.out(x) * self.gate(x)


def on_meta():
    with torch.device("meta"):
        return Small()


def small_file(path, dtype):
    """A checkpoint of a Small with random weights; returns its tensors."""
    torch.manual_seed(0)
    tensors = {
        key: torch.randn_like(value).to(dtype) for key, value in Small().state_dict().items()
    }
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_has_the_file_s_numbers_in_the_type_asked_for(tmp_path, dtype):
    tensors, network = small_file(tmp_path / "f", dtype), on_meta()
    load_network(network, tmp_path / "f", "cpu")
    state = network.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in tensors.items())
    assert {type(p) for p in network.parameters()} == {
        nn.Parameter
    } and not network.table.requires_grad
    network(torch.ones(2, 6)).sum().backward()


def private_megabytes():
    """Memory of this process that is not a map of a file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_network_is_the_mapped_file_and_training_leaves_the_file_alone(tmp_path):
    """No copy in memory; what a step writes into the map stays in this process."""
    save_file({"weight": torch.ones(4000, 4000), "bias": torch.ones(4000)}, tmp_path / "f")  # 64 MB
    with torch.device("meta"):
        network = nn.Linear(4000, 4000)
    before = private_megabytes()
    load_network(network, tmp_path / "f", "cpu")
    assert network.weight.sum() == 16e6 and private_megabytes() - before < 16
    with torch.no_grad():
        network.weight[:2].fill_(3)
    assert network.weight[:2].mean() == 3 and load_file(tmp_path / "f")["weight"].mean() == 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda t: t.pop("out.weight"), r"out.weight \(3, 7\) \(file: missing\)"),
        (lambda t: t.update(more=torch.zeros(1)), r"more \(not a part of the model\)"),
        (lambda t: t.update(table=torch.zeros(7, 5)), r"table \(5, 7\) \(file: \(7, 5\)\)"),
    ],
)
def test_a_file_that_does_not_fit_is_named(tmp_path, change, sentence):
    tensors = small_file(tmp_path / "f", torch.float32)
    change(tensors)
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ValueError, match=f"does not fit its json files: {sentence}"):
        load_network(on_meta(), tmp_path / "f", "cpu")


def load_sharded(folder, per_machine):
    """Every rank loads its rows in fp32; then come a pass, a training state, and the whole by `write_checkpoint`."""
    os.environ["LOCAL_WORLD_SIZE"], folder = per_machine, Path(folder)
    world, network = setup(threads=1), on_meta()
    shard(network, [network.inside], world)
    load_network(network, folder / "f", "cpu")
    assert network.inside.weight.to_local().shape[0] == (4, 3)[world.rank % 2]  # of 7
    y = network(torch.ones(1, 6)).detach()
    checkpoints.save_state(folder / "training", 1, network.state_dict(), {})
    like = checkpoints.contents(folder / "f")
    out, tensors = folder / f"by_{world.size}", network.state_dict().items()
    write_checkpoint(out, tensors, like, {}, Nothing(), Nothing())
    if is_main():
        save_file({"y": y}, out / "y")


class Nothing:
    """A tokenizer and an autoencoder without files."""

    def save(self, folder):
        pass

    save_pretrained = save


def test_sharded_load_is_the_load_of_one_process(tmp_path):
    """4 ranks on machines of 2: HSDP, sharded inside each machine and replicated between them. And saved again."""
    tensors, network = small_file(tmp_path / "f", torch.bfloat16), on_meta()
    on_ranks(4, load_sharded, tmp_path, 2)
    load_network(network, tmp_path / "f", "cpu")
    folder = tmp_path / "by_4"
    assert torch.equal(load_file(folder / "y")["y"], network(torch.ones(1, 6)))
    again = load_file(folder / "ema.safetensors")
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[key].view(torch.int16), tensors[key].view(torch.int16)) for key in tensors
    )
    state = {key: torch.zeros(value.shape) for key, value in tensors.items()}
    checkpoints.load_state(tmp_path / "training", state)  # each row was saved once
    assert all(torch.equal(state[key], tensors[key].float()) for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_file_is_the_loaded_one_byte_for_byte(tmp_path, dtype):
    tensors, network = small_file(tmp_path / "f", dtype), on_meta()
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    load_network(network, tmp_path / "f", "cpu")
    layout, files = checkpoints.contents(tmp_path / "f"), {"llm_config": {"hidden_size": 6}}
    tensors = network.state_dict().items()
    write_checkpoint(tmp_path / "out", tensors, layout, files, Nothing(), Nothing())
    assert (tmp_path / "out" / "ema.safetensors").read_bytes() == (tmp_path / "f").read_bytes()
    assert json.loads((tmp_path / "out" / "llm_config.json").read_text()) == {"hidden_size": 6}


# ---------------------------------------------------------------- the FLUX autoencoder


def flux_shapes(channels, multipliers, latent):
    """Names and shapes of ae.safetensors, as FLUX.1 publishes it."""
    widths, shapes = [channels * m for m in multipliers], {}

    def conv(name, out, inside, size):
        shapes.update({f"{name}.weight": (out, inside, size, size), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name, inside, out):
        norm(f"{name}.norm1", inside), conv(f"{name}.conv1", out, inside, 3)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out, 3)
        if inside != out:
            conv(f"{name}.nin_shortcut", out, inside, 1)

    def middle(name, width):
        block(f"{name}.block_1", width, width), block(f"{name}.block_2", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)

    inside, levels = channels, len(widths)
    conv("encoder.conv_in", channels, 3, 3)
    for i, width in enumerate(widths):
        for j in range(2):
            block(f"encoder.down.{i}.block.{j}", inside if j == 0 else width, width)
        inside = width
        if i < levels - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    (
        middle("encoder.mid", inside),
        norm("encoder.norm_out", inside),
        conv("encoder.conv_out", 2 * latent, inside, 3),
    )
    conv("decoder.conv_in", inside, latent, 3), middle("decoder.mid", inside)
    for i in reversed(range(levels)):
        for j in range(3):
            block(f"decoder.up.{i}.block.{j}", inside if j == 0 else widths[i], widths[i])
        inside = widths[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", inside, inside, 3)
    norm("decoder.norm_out", inside), conv("decoder.conv_out", 3, inside, 3)
    return shapes


def test_flux_autoencoder_keys_fit_diffusers():
    from diffusers import AutoencoderKL

    shapes = flux_shapes(128, (1, 2, 4, 4), 16)
    assert (
        len(shapes) == 244 and sum(int(np.prod(shape)) for shape in shapes.values()) == 83_819_683
    )
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    assert {to_flux(key, 4) for key in vae.state_dict()} == set(shapes)
    assert (
        to_flux("decoder.up_blocks.0.resnets.0.norm1.weight", 4)
        == "decoder.up.3.block.0.norm1.weight"
    )


@pytest.fixture(scope="module")
def flux_tensors():
    g = torch.Generator().manual_seed(0)
    shapes = flux_shapes(32, (1, 1, 2, 2), 16)
    return {key: 0.05 * torch.randn(shape, generator=g) for key, shape in shapes.items()}


def flux_of(tmp_path, tensors):
    """The autoencoder of these tensors."""
    save_file(tensors, tmp_path / "ae.safetensors", metadata={"format": "pt"})
    return FluxLatents(tmp_path / "ae.safetensors")


def test_flux_autoencoder_draws_from_its_moments(tmp_path, flux_tensors):
    flux, g = flux_of(tmp_path, flux_tensors), torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 48, generator=g)
    mean, log_variance = flux.moments(pixels)
    assert mean.shape == log_variance.shape == (2, 16, 4, 6)
    streams = [torch.Generator().manual_seed(seed) for seed in range(2)]
    noise = torch.stack([torch.randn(16, 4, 6, generator=stream) for stream in streams])
    again = [torch.Generator().manual_seed(seed) for seed in range(2)]
    want = 0.3611 * (mean + torch.exp(0.5 * log_variance) * noise - 0.1159)
    assert torch.equal(flux.encode(pixels, again), want)
    assert torch.equal(flux.draw(mean, log_variance, noise), want)
    assert torch.equal(flux.encode(pixels), 0.3611 * (mean - 0.1159))
    assert flux.decode(want).shape == pixels.shape


def test_flux_log_variance_is_not_clamped(tmp_path, flux_tensors):
    """diffusers would clamp it to 20 in its own class for the posterior; BAGEL does not."""
    large = {"encoder.conv_out.bias": torch.full((32,), 50.0)}
    flux = flux_of(tmp_path, flux_tensors | large)
    assert flux.moments(torch.zeros(1, 3, 16, 16))[1].max() > 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_autoencoder_is_saved_as_it_came(tmp_path, flux_tensors, dtype):
    flux = flux_of(tmp_path, {key: value.to(dtype) for key, value in flux_tensors.items()})
    came = (tmp_path / "ae.safetensors").read_bytes()
    (tmp_path / "out").mkdir()
    flux.save(tmp_path / "out")
    flux.save(tmp_path)  # over the file that it is a map of
    for folder in (tmp_path, tmp_path / "out"):
        assert (folder / "ae.safetensors").read_bytes() == came


@pytest.mark.parametrize(
    "key, sentence",
    [
        (
            "encoder.mid.attn_1.q.weight",
            r"encoder.mid_block.attentions.0.to_q.weight \(64, 64\) \(file: missing\)",
        ),
        (
            "encoder.conv_out.weight",
            r"encoder.conv_out.weight \(32, 64, 3, 3\) \(file: missing\)",
        ),
        (
            "decoder.up.3.block.1.norm2.bias",
            r"decoder.up_blocks.0.resnets.1.norm2.bias \(64,\) \(file: missing\)",
        ),
    ],
)
def test_missing_and_unknown_tensors_of_the_autoencoder_are_named(
    tmp_path, flux_tensors, key, sentence
):
    words = "ae.safetensors is not a FLUX autoencoder: "
    with pytest.raises(ValueError, match=words + sentence):
        flux_of(tmp_path, {name: value for name, value in flux_tensors.items() if name != key})
    with pytest.raises(ValueError, match=r"quant_conv.bias \(not a part of the model\)"):
        flux_of(tmp_path, flux_tensors | {"quant_conv.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=words + "2 of its tensors are no part of one"):
        flux_of(tmp_path, flux_tensors | {"a": torch.zeros(2), "encoder.b": torch.zeros(2)})
