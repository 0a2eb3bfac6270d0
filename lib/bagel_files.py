"""
The files of a BAGEL checkpoint, and the way pictures go in and out of it.

  ema.safetensors      the network (1223 tensors in the released model), keys as `lib/bagel.Bagel` names its modules
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
from torch.distributed.tensor import DTensor

from lib.checkpoints import contents, share, write_file, write_whole
from lib.common import is_main

NETWORK, AUTOENCODER = "ema.safetensors", "ae.safetensors"
UNFIT = f"{AUTOENCODER} is not a FLUX autoencoder"
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
        return tuple(
            max(stride, round(round(side * scale) / stride) * stride) for side in (width, height)
        )

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
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC)
    )


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

    cell, channels = 4, 48  # pixels per latent cell and side, numbers per cell
    random = False  # encode draws no noise

    def encode(self, pixels, noise=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, 48, H/4, W/4)."""
        return F.pixel_unshuffle(pixels, self.cell)

    def decode(self, latent):
        """latent (B, 48, h, w) -> pixels (B, 3, 4 h, 4 w)."""
        return F.pixel_shuffle(latent, self.cell)

    def to(self, device):
        return self

    def save(self, folder):
        """Nothing to write."""


class FluxLatents:
    """The FLUX.1 autoencoder, frozen: every 8 x 8 pixels become one latent cell of 16 numbers. Runs in fp32."""

    cell, random = 8, True
    scale, shift = 0.3611, 0.1159

    def __init__(self, tensors):
        """tensors: the state dict of ae.safetensors, in FLUX's names; the sizes are read from the shapes.

        fp32 tensors are used as they are, not copied. Raises ValueError naming what is missing, unknown or misshapen.
        """
        from diffusers import AutoencoderKL

        self.levels = len({key.split(".")[2] for key in tensors if key.startswith("encoder.down.")})
        blocks = len(
            {key.split(".")[4] for key in tensors if key.startswith("encoder.down.0.block.")}
        )
        sizes = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(1, self.levels))]
        sizes.append("encoder.conv_out.weight")
        complain(UNFIT, [f"{key} (missing)" for key in sizes if key not in tensors])
        *widths, numbers = (len(tensors[key]) for key in sizes)
        self.channels = numbers // 2
        with torch.device("meta"):
            self.vae = AutoencoderKL(
                block_out_channels=widths,
                layers_per_block=blocks,
                latent_channels=self.channels,
                norm_num_groups=32,
                down_block_types=["DownEncoderBlock2D"] * self.levels,
                use_quant_conv=False,
                use_post_quant_conv=False,
                up_block_types=["UpDecoderBlock2D"] * self.levels,
            )
        self.names = {key: to_flux(key, self.levels) for key in self.vae.state_dict()}
        # FLUX's attention is made of 1 x 1 convolutions, (out, in, 1, 1), diffusers' of linear layers, (out, in).
        wanted = {
            self.names[key]: (*value.shape, 1, 1)
            if ".attentions." in key and value.dim() == 2
            else value.shape
            for key, value in self.vae.state_dict().items()
        }
        complain(UNFIT, misfits(wanted, tensors, "it"))
        self.vae.load_state_dict(
            {
                key: tensors[self.names[key]].float().view(value.shape)
                for key, value in self.vae.state_dict().items()
            },
            assign=True,
        )
        self.vae.requires_grad_(False).eval()
        self.layout = {key: value.to("meta") for key, value in tensors.items()}

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> mean and log variance of the posterior, (B, C, H/8, W/8) each."""
        with torch.no_grad():  # two pictures at a time: a large one takes gigabytes on the way
            return torch.cat([self.vae.encoder(part) for part in pixels.float().split(2)]).chunk(
                2, 1
            )

    def draw(self, mean, log_variance, noise=None):
        """The moments of a posterior (B, C, h, w) -> a latent drawn from it, as BAGEL does.

        noise   standard normal of the latent's shape; None draws it from torch's own generator
        """
        noise = torch.randn_like(mean) if noise is None else noise.to(mean)
        return self.scale * (mean + torch.exp(0.5 * log_variance) * noise - self.shift)

    def encode(self, pixels, noise=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, C, H/8, W/8); noise as in `draw`."""
        return self.draw(*self.moments(pixels), noise)

    def decode(self, latent):
        """latent (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), about [-1, 1]."""
        return torch.cat(
            [self.vae.decoder(part / self.scale + self.shift) for part in latent.float().split(2)]
        )

    def to(self, device):
        self.vae.to(device)
        return self

    def save(self, folder):
        """Write ae.safetensors, every tensor as it came."""
        state = self.vae.state_dict()
        named = (
            (name, state[key].view(self.layout[name].shape)) for key, name in self.names.items()
        )
        write_file(Path(folder) / AUTOENCODER, named, self.layout)


def to_flux(key, levels):
    """A key of diffusers' AutoencoderKL -> its name in ae.safetensors, FLUX's own, e.g.

    decoder.up_blocks.0.resnets.0.norm1.weight -> decoder.up.3.block.0.norm1.weight     (level 3 of 4 runs first)
    """
    key = key.replace("encoder.down_blocks.", "encoder.down.").replace(
        "samplers.0.conv", "sample.conv"
    )
    key = re.sub(
        r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", key
    )
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key).replace(
        "resnets", "block"
    )
    for old, new in (
        ("group_norm", "norm"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
        ("to_out.0", "proj_out"),
    ):
        key = key.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


# ---------------------------------------------------------------- folders


def find(path):
    """The local folder of a checkpoint: `path` itself, or the download of that Hugging Face hub id."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "out/")):
        raise FileNotFoundError(
            f"There is no world model at {path}. `python train_wm.py` makes one in out/wm."
        )
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
        raise ValueError(
            f"{path} cannot be read ({error}). A BAGEL folder holds {NETWORK}, llm_config.json and "
            f"vit_config.json."
        ) from error


def misfits(wanted, there, whole):
    """What keeps a file from fitting, as phrases: {name: shape} wanted for `whole`, {name: tensor} there."""
    found = {key: tuple(there[key].shape) if key in there else "missing" for key in wanted}
    return [
        f"{key} {tuple(shape)} (file: {found[key]})"
        for key, shape in wanted.items()
        if found[key] != shape
    ] + [f"{key} (not a part of {whole})" for key in there if key not in wanted]


def complain(sentence, wrong):
    """Raise ValueError with the sentence and the first few phrases of `wrong`, if there are any."""
    if wrong:
        raise ValueError(
            f"{sentence}: {'; '.join(wrong[:4])}"
            + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )


def load_network(network, path, device, dtype):
    """Fill what is on the meta device in a network from a safetensors file, tensor by tensor, straight to its place.

    Of a network that is sharded already (common.shard) each rank reads its own rows only; buffers are whole on every
    rank. On the CPU a tensor that has the type already is the mapped file itself: nothing is read until it is used,
    and what is written into it stays in this process. Raises ValueError naming what is missing, left over or misshapen.
    """
    state = network.state_dict()
    wanted, there = {key: value for key, value in state.items() if value.is_meta}, contents(path)
    shapes = {key: value.shape for key, value in wanted.items()}
    complain(f"{path} does not fit its json files", misfits(shapes, there, "BAGEL"))
    tensors = {}
    with safe_open(path, "pt") as file:
        for key, value in wanted.items():
            first, mine = share(value)
            # to the device first: the file's type is seldom the larger one
            tensor = file.get_slice(key)[first : first + len(mine)].to(device).to(dtype)
            tensors[key] = (
                tensor
                if mine is value
                else DTensor.from_local(
                    tensor,
                    value.device_mesh,
                    value.placements,
                    shape=value.shape,
                    stride=value.stride(),
                )
            )
    network.load_state_dict(tensors, assign=True, strict=len(tensors) == len(state))


def write_folder(folder, named, like, files, tokenizer, autoencoder):
    """Write a checkpoint in the public layout. Called on every rank; rank 0 writes.

    named, like   the network: (name, tensor) pairs, maybe sharded, and {name: tensor of its shape and type in the file}
    files         the contents of {"llm_config", "vit_config", "config"}.json
    """
    folder = Path(folder)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NETWORK, named, like)
    if is_main():
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        tokenizer.save_pretrained(folder)
        autoencoder.save(folder)


def load_tokenizer(folder):
    """The tokenizer of a checkpoint: Qwen2's, or the tiny one; BAGEL's four markers are looked up in it by name."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    whole = (Path(folder) / "tokenizer.json").exists()  # else vocab.json and merges.txt
    return (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)
