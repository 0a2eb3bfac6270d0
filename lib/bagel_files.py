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
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lib.checkpoints import contents, local_rows, write_gathered
from lib.distributed import is_main
from lib.records import write_json

NETWORK, AUTOENCODER = "ema.safetensors", "ae.safetensors"
UNFIT = f"{AUTOENCODER} is not a FLUX autoencoder"
BAGEL_MAX_PIXELS = 14 * 14 * 9 * 1024  # of a picture that BAGEL is shown
# names in diffusers' autoencoder and in FLUX's: of its attention, of the rest
FLUX_ATTN = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
FLUX_NAMES = {
    "encoder.down_blocks.": "encoder.down.",
    "resnets": "block",
    "samplers.0.conv": "sample.conv",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


# ---- pictures ------------------------------------------------------------------------------------------------------------


def resized(width: int, height: int, limits: tuple, max_pixels: float = BAGEL_MAX_PIXELS) -> tuple:
    """The size BAGEL gives a picture: (width, height) in pixels, multiples of the stride.

    limits   (max_side, min_side, stride) in pixels; where both cannot hold, min_side wins at first, max_side at last.
    The aspect ratio is kept up to rounding (Python's round, half to even). A picture over max_pixels is shrunk by the
    ratio of the *areas* used as a ratio of sides: the original's slip, kept because the released weights live with it.
    """
    max_side, min_side, stride = limits

    def snapped(scale):
        sides = (round(round(side * scale) / stride) * stride for side in (width, height))
        return tuple(max(stride, side) for side in sides)

    scale = max(min(max_side / max(width, height), 1.0), min_side / min(width, height))
    width, height = snapped(scale)
    if width * height > max_pixels:
        width, height = snapped(max_pixels / (width * height))
    if max(width, height) > max_side:
        width, height = snapped(max_side / max(width, height))
    return width, height


def resize(image: np.ndarray, limits: tuple) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 -> the same picture at the size of `resized`, bicubic as in the original."""
    height, width = image.shape[:2]
    size = resized(width, height, limits)
    if size == (width, height):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 array (..., H, W, 3) -> float32 tensor (..., 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(images)).movedim(-1, -3) / 255 - 0.5) / 0.5


def to_images(pixels: Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) array; truncated, not rounded, as in the original."""
    return ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).movedim(-3, -1).cpu().numpy()


# ---- autoencoders: two classes with cell, channels, encode, decode and save ---------------------------------------------


class PixelLatents:
    """An "autoencoder" without weights for the tiny model: every 4 x 4 pixels become one latent cell of 48 numbers."""

    cell, channels = 4, 48  # pixels per latent cell and side, numbers per cell

    def encode(self, pixels, streams=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, 48, H/4, W/4); draws nothing from `streams`."""
        return F.pixel_unshuffle(pixels, self.cell)

    def decode(self, latent):
        """latent (B, 48, h, w) -> pixels (B, 3, 4 h, 4 w)."""
        return F.pixel_shuffle(latent, self.cell)

    def save(self, folder):
        """Nothing to write."""


class FluxLatents:
    """The FLUX.1 autoencoder, frozen: every 8 x 8 pixels become one latent cell of 16 numbers. Runs in fp32."""

    cell = 8
    scale, shift = 0.3611, 0.1159

    def __init__(self, path: Path):
        """path: ae.safetensors, in FLUX's names; the sizes are read from the shapes.

        fp32 tensors are used as they are, not copied. Raises ValueError naming what is missing, unknown or misshapen.
        """
        from diffusers import AutoencoderKL

        self.path = path
        tensors = load_file(path)
        encoder = [key.split(".") for key in tensors if key.startswith("encoder.down.")]
        levels = len({key[2] for key in encoder})
        blocks = len({key[4] for key in encoder if key[2:4] == ["0", "block"]})
        sizes = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(1, levels))]
        sizes.append("encoder.conv_out.weight")
        complain(UNFIT, [f"{key} (missing)" for key in sizes if key not in tensors])
        *widths, moments = (len(tensors[key]) for key in sizes)
        self.channels = moments // 2
        with torch.device("meta"):
            self.vae = AutoencoderKL(
                block_out_channels=widths,
                layers_per_block=blocks,
                latent_channels=self.channels,
                norm_num_groups=32,
                down_block_types=["DownEncoderBlock2D"] * levels,
                up_block_types=["UpDecoderBlock2D"] * levels,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
        state = self.vae.state_dict()
        expected = {}
        for key, value in state.items():
            # FLUX's attention is made of 1 x 1 convolutions, (out, in, 1, 1), diffusers' of linear layers, (out, in).
            ones = (1, 1) if ".attentions." in key and value.dim() == 2 else ()
            expected[to_flux(key, levels)] = (*value.shape, *ones)
        complain(UNFIT, misfits(expected, tensors, "it"))
        for key, value in state.items():
            state[key] = tensors[to_flux(key, levels)].float().view(value.shape)
        self.vae.load_state_dict(state, assign=True)
        self.vae.requires_grad_(False).eval()

    def moments(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> mean and log variance of the posterior, (B, C, H/8, W/8) each."""
        with torch.no_grad():  # two pictures at a time: a large one takes gigabytes on the way
            halves = torch.cat([self.vae.encoder(pair) for pair in pixels.float().split(2)])
        return halves.chunk(2, 1)

    def draw(self, mean, log_variance, noise):
        """The moments of a posterior and standard normal noise, (B, C, h, w) each -> a latent drawn, as BAGEL does."""
        return self.scale * (mean + torch.exp(0.5 * log_variance) * noise.to(mean) - self.shift)

    def encode(self, pixels, streams=None):
        """pixels (B, 3, H, W) in [-1, 1] -> latent (B, C, H/8, W/8), each drawn by its own of B generators, or the mean."""
        mean, log_variance = self.moments(pixels)
        noise = torch.zeros(())
        if streams is not None:
            noise = torch.stack([torch.randn(mean.shape[1:], generator=s) for s in streams])
        return self.draw(mean, log_variance, noise)

    def decode(self, latent):
        """latent (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), about [-1, 1]."""
        latent = latent.float() / self.scale + self.shift
        return torch.cat([self.vae.decoder(pair) for pair in latent.split(2)])

    def to(self, device):
        self.vae.to(device)
        return self

    def save(self, folder):
        """Write ae.safetensors as it came: it is frozen."""
        if not Path(folder).samefile(self.path.parent):
            shutil.copyfile(self.path, Path(folder) / AUTOENCODER)


def to_flux(key: str, levels: int) -> str:
    """A key of diffusers' AutoencoderKL -> its name in ae.safetensors, FLUX's own, e.g.

    decoder.up_blocks.0.resnets.0.norm1.weight -> decoder.up.3.block.0.norm1.weight     (level 3 of 4 runs first)
    """
    if match := re.match(r"decoder\.up_blocks\.(\d+)", key):
        key = key.replace(match[0], f"decoder.up.{levels - 1 - int(match[1])}")
    if match := re.search(r"mid_block\.resnets\.(\d)", key):
        key = key.replace(match[0], f"mid.block_{int(match[1]) + 1}")
    for diffusers, flux in FLUX_ATTN.items():
        key = key.replace(f"mid_block.attentions.0.{diffusers}.", f"mid.attn_1.{flux}.")
    for diffusers, flux in FLUX_NAMES.items():
        key = key.replace(diffusers, flux)
    return key


# ---- folders -------------------------------------------------------------------------------------------------------------


def find_checkpoint(path: str | Path) -> Path:
    """The local folder of a checkpoint: `path` itself, or the download of that Hugging Face hub id."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "out/")):
        hint = "`python train_wm.py` makes one in out/wm."
        raise FileNotFoundError(f"There is no world model at {path}. {hint}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path)))


def read_files(folder: Path) -> dict[str, dict]:
    """The contents of {"llm_config", "vit_config", "config"}.json; the last may be missing. Raises ValueError."""
    files = {"config": {}}
    for name in ("llm_config", "vit_config", "config"):
        path = folder / f"{name}.json"
        if name == "config" and not path.exists():
            continue
        try:
            files[name] = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            needs = f"A BAGEL folder holds {NETWORK}, llm_config.json and vit_config.json."
            raise ValueError(f"{path} cannot be read ({error}). {needs}") from error
    return files


def table_sizes(path: Path, layout: dict[str, Tensor]) -> tuple[int, int, int]:
    """What no json file says, off the shapes in a network's file: vocabulary, latent grid, numbers per latent token."""
    words = "language_model.model.embed_tokens.weight"
    places, latents = "latent_pos_embed.pos_embed", "vae2llm.weight"
    missing = [f"{key} (missing)" for key in (words, places, latents) if key not in layout]
    complain(f"{path} is not a BAGEL", missing)
    return len(layout[words]), round(len(layout[places]) ** 0.5), layout[latents].shape[1]


def misfits(expected: dict, tensors: dict, whole: str) -> list[str]:
    """What keeps a file from fitting, as phrases: {name: shape} expected for `whole`, {name: tensor} in the file."""
    phrases = []
    for key, shape in expected.items():
        actual = tuple(tensors[key].shape) if key in tensors else "missing"
        if actual != shape:
            phrases.append(f"{key} {tuple(shape)} (file: {actual})")
    return phrases + [f"{key} (not a part of {whole})" for key in tensors if key not in expected]


def complain(sentence: str, phrases: list[str]) -> None:
    """Raise ValueError with the sentence and the first few phrases, if there are any."""
    if phrases:
        more = f" and {len(phrases) - 4} more" if len(phrases) > 4 else ""
        raise ValueError(f"{sentence}: {'; '.join(phrases[:4])}{more}")


def load_network(network: nn.Module, path: Path, device, dtype: torch.dtype) -> None:
    """Fill what is on the meta device in a network from a safetensors file, tensor by tensor, straight to its place.

    Of a sharded network each rank reads its own rows only; buffers are whole on every rank. On the CPU a tensor that
    has the type already is the mapped file itself: nothing is read until it is used, and what is written into it stays
    in this process. Raises ValueError naming what is missing, left over or misshapen.
    """
    state = network.state_dict()
    empty = {key: value for key, value in state.items() if value.is_meta}
    shapes = {key: value.shape for key, value in empty.items()}
    complain(f"{path} does not fit its json files", misfits(shapes, contents(path), "BAGEL"))
    tensors = {}
    with safe_open(path, "pt") as file:
        for key, value in empty.items():
            first, rows = local_rows(value)
            # to the device first: the file's type is seldom the larger one
            tensor = file.get_slice(key)[first : first + len(rows)].to(device).to(dtype)
            if isinstance(value, DTensor):
                mesh, size = value.device_mesh, {"shape": value.shape, "stride": value.stride()}
                tensor = DTensor.from_local(tensor, mesh, value.placements, **size)
            tensors[key] = tensor
    network.load_state_dict(tensors, assign=True, strict=len(tensors) == len(state))


def write_checkpoint(folder: str | Path, tensors, layout: dict, files: dict, tokenizer, coder):
    """Write a checkpoint in the public layout. Called on every rank; rank 0 writes.

    tensors, layout   the network: (name, tensor) pairs, maybe sharded, and {name: tensor as it is in the file}
    files             the contents of {"llm_config", "vit_config", "config"}.json;   coder: the autoencoder
    """
    folder = Path(folder)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    write_gathered(folder / NETWORK, tensors, layout)
    if is_main():
        for name, content in files.items():
            write_json(folder / f"{name}.json", content)
        tokenizer.save_pretrained(folder)
        coder.save(folder)
