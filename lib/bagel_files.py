"""
The files of a BAGEL checkpoint, and the way pictures go in and out of it.

  ema.safetensors      the network (1223 tensors in the released model), keys as `world_model.Bagel` names its modules
  ae.safetensors       the FLUX autoencoder in its original names; here it runs in diffusers' AutoencoderKL
  llm_config.json      Qwen2 sizes              vit_config.json   SigLIP sizes (its last layer is not built)
  config.json          ours, under "astra": picture limits, latent kind and departures; without it: plain BAGEL
  tokenizer files      Qwen2's

  picture --resize--> pixels in [-1, 1] --encode--> latent                    latent --decode--> pixels --> picture
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NETWORK, AUTOENCODER = "ema.safetensors", "ae.safetensors"
MAX_PIXELS = 14 * 14 * 9 * 1024


# ---------------------------------------------------------------- pictures

def resized(width, height, limits, max_pixels=MAX_PIXELS):
    """The size BAGEL gives a picture: (width, height) in pixels, multiples of the stride.

    limits   (max_side, min_side, stride) in pixels; where both cannot hold, min_side wins at first, max_side at last.
    The aspect ratio is kept up to rounding (Python's round, half to even). A picture over max_pixels is shrunk by the
    ratio of the *areas* used as a ratio of sides: the original's slip, kept because the released weights live with it.
    """
    max_side, min_side, stride = limits

    def snapped(scale):
        return tuple(max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))

    scale = max(min(max_side / max(width, height), 1.0), min_side / min(width, height))
    width, height = snapped(scale)
    if width * height > max_pixels:
        width, height = snapped(max_pixels / (width * height))
    if max(width, height) > max_side:
        width, height = snapped(max_side / max(width, height))
    return width, height


def resize(image, limits):
    """(H, W, 3) uint8 -> the same picture at the size of `resized`, bicubic as in the original."""
    height, width = image.shape[:2]
    size = resized(width, height, limits)
    if size == (width, height):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC))


def to_pixels(images):
    """uint8 array (..., H, W, 3) -> float32 tensor (..., 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(images)).movedim(-1, -3) / 255 - 0.5) / 0.5


def to_images(pixels):
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) array; truncated, not rounded, as in the original."""
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


def patchify(x, size):
    """(B, C, H, W) -> tokens (B, H/size * W/size, size * size * C); row-major, in a token (row, column, channel)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def unpatchify(tokens, size, rows, columns):
    """The inverse of `patchify`: tokens (B, rows * columns, size * size * C) -> (B, C, rows * size, columns * size)."""
    x = tokens.reshape(len(tokens), rows, columns, size, size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * size, columns * size)


# ---------------------------------------------------------------- autoencoders: two classes with the same two calls

class PixelLatents:
    """An "autoencoder" without weights for the tiny model: every 4 x 4 pixels become one latent cell of 48 numbers."""

    cell, channels = 4, 48      # pixels per latent cell and side, numbers per cell
    random = False              # encode draws no noise

    def encode(self, pixels, noise=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, 48, H/4, W/4)."""
        return F.pixel_unshuffle(pixels, self.cell)

    def decode(self, latent):
        """latent (B, 48, h, w) -> pixels (B, 3, 4 h, 4 w)."""
        return F.pixel_shuffle(latent, self.cell)

    def to(self, device, dtype=None):
        return self

    def save(self, folder):
        """Nothing to write."""


class FluxLatents:
    """The FLUX.1 autoencoder, frozen: every 8 x 8 pixels become one latent cell of 16 numbers. Runs in fp32."""

    cell, random = 8, True
    scale, shift = 0.3611, 0.1159

    def __init__(self, tensors):
        """tensors: the state dict of ae.safetensors, in FLUX's names; the sizes are read from the shapes."""
        from diffusers import AutoencoderKL
        levels = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in tensors if key.startswith("encoder.down.0.block."))
        self.channels = len(tensors["encoder.conv_out.weight"]) // 2
        self.vae = AutoencoderKL(
            block_out_channels=[len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
            layers_per_block=blocks, latent_channels=self.channels, norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            use_quant_conv=False, use_post_quant_conv=False)
        self.vae.load_state_dict({to_diffusers(key, levels): value.float().reshape(value.shape[:2]) if
                                  ".attn_1." in key and value.dim() == 4 else value.float()
                                  for key, value in tensors.items()}, strict=True)
        self.vae.requires_grad_(False).eval()
        self.tensors = tensors

    def encode(self, pixels, noise=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, C, H/8, W/8), drawn from the posterior as BAGEL does.

        noise   standard normal of the latent's shape; None draws it from torch's own generator
        """
        with torch.no_grad():
            mean, log_variance = self.vae.encoder(pixels.float()).chunk(2, 1)
        noise = torch.randn_like(mean) if noise is None else noise.to(mean)
        return self.scale * (mean + torch.exp(0.5 * log_variance) * noise - self.shift)

    def decode(self, latent):
        """latent (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), about [-1, 1]."""
        return self.vae.decoder(latent.float() / self.scale + self.shift)

    def to(self, device, dtype=None):
        self.vae.to(device)
        return self

    def save(self, folder):
        """Write ae.safetensors as it came."""
        save_file(self.tensors, Path(folder) / AUTOENCODER)


def to_diffusers(key, levels):
    """A key of ae.safetensors in FLUX's names -> the name diffusers gives it, e.g.

    decoder.up.3.block.0.norm1.weight -> decoder.up_blocks.0.resnets.0.norm1.weight     (level 3 of 4 runs first)
    """
    key = re.sub(r"encoder\.down\.", "encoder.down_blocks.", key)
    key = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", key)
    key = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", key)
    key = re.sub(r"\.(down|up)sample\.conv", r".\1samplers.0.conv", key)
    key = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", key)
    for old, new in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        key = key.replace(f"mid.attn_1.{old}.", f"mid_block.attentions.0.{new}.")
    return key.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")


# ---------------------------------------------------------------- folders

def find(path):
    """The local folder of a checkpoint: `path` itself, or the download of that Hugging Face hub id."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "out/")):
        raise FileNotFoundError(f"There is no world model at {path}. `python train_wm.py` makes one in out/wm.")
    from huggingface_hub import snapshot_download
    return Path(snapshot_download(str(path)))


def read_json(path, missing=None):
    """The contents of a JSON file; `missing`, where it is given, stands for a file that is not there."""
    path = Path(path)
    if missing is not None and not path.exists():
        return missing
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). A BAGEL folder holds {NETWORK}, llm_config.json and "
                         f"vit_config.json.") from error


def shapes(path):
    """{name: shape} of a safetensors file, without reading the tensors."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except Exception as error:                                  # safetensors has its own error class for a cut-off file
        raise ValueError(f"The checkpoint file {path} cannot be read ({error}). Fetch or train it again.") from error


def load_network(network, path, device, dtype):
    """Fill a network built on the meta device from a safetensors file: every key must be there, none left over."""
    wanted, there = network.state_dict(), shapes(path)
    wrong = [f"{key} {tuple(value.shape)} (file: {there.get(key, 'missing')})" for key, value in wanted.items()
             if there.get(key) != tuple(value.shape)]
    wrong += [f"{key} (not a part of BAGEL)" for key in there if key not in wanted]
    if wrong:
        raise ValueError(f"{path} does not fit its json files: {'; '.join(wrong[:4])}"
                         + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""))
    tensors = load_file(path, device=str(device))
    network.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)


def save_folder(folder, tensors, files, tokenizer, autoencoder):
    """Write a checkpoint in the public layout; `files`: the contents of {"llm_config", "vit_config", "config"}.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, folder / NETWORK)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save_pretrained(folder)
    autoencoder.save(folder)


def load_tokenizer(folder):
    """The tokenizer of a checkpoint: Qwen2's, or the tiny one; BAGEL's four markers are looked up in it by name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    whole = (Path(folder) / "tokenizer.json").exists()              # else vocab.json and merges.txt
    return (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)
