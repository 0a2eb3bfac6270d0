"""The names of FLUX's autoencoder, so that tests can write ae.safetensors of a random one."""

import re

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
