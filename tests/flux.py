"""FLUX's autoencoder, narrow and with random weights: what tests write as ae.safetensors."""

import re

from diffusers import AutoencoderKL

from lib.bagel_files import FluxLatents

# conftest.py gives them to `FluxLatents` in every test
NARROW = FluxLatents.sizes | {"block_out_channels": [32, 32, 64, 64]}

# names in diffusers' autoencoder and in FLUX's: of its attention, of the rest
FLUX_ATTN = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
FLUX_NAMES = {
    "encoder.down_blocks.": "encoder.down.",
    "resnets": "block",
    "samplers.0.conv": "sample.conv",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def to_flux(key: str, levels: int) -> str:
    """A key of diffusers' AutoencoderKL -> its name in ae.safetensors, FLUX's own (of 4 levels 3 is decoded first)."""
    if match := re.match(r"decoder\.up_blocks\.(\d+)", key):
        key = key.replace(match[0], f"decoder.up.{levels - 1 - int(match[1])}")
    if match := re.search(r"mid_block\.resnets\.(\d)", key):
        key = key.replace(match[0], f"mid.block_{int(match[1]) + 1}")
    for diffusers, flux in FLUX_ATTN.items():
        key = key.replace(f"mid_block.attentions.0.{diffusers}.", f"mid.attn_1.{flux}.")
    for diffusers, flux in FLUX_NAMES.items():
        key = key.replace(diffusers, flux)
    return key


def narrow_flux(**sizes):
    """The tensors of its file, drawn from torch's own generator."""
    vae = AutoencoderKL(**NARROW | sizes)
    tensors = {}
    for key, value in vae.state_dict().items():
        ones = (1, 1) if ".attentions." in key and value.dim() == 2 else ()
        tensors[to_flux(key, 4)] = value.reshape(*value.shape, *ones).contiguous()
    return tensors
