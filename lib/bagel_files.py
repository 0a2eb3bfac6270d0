"""
Files of models: where they are and whether they fit; the files of a BAGEL checkpoint, and its autoencoder.

  ema.safetensors      the network (1223 tensors in the released model), keys as `lib/bagel.Bagel` names its modules
  ae.safetensors       the FLUX autoencoder in its original names; here it runs in diffusers' AutoencoderKL
  llm_config.json      Qwen2 sizes              vit_config.json   SigLIP sizes (its last layer is not built)
  config.json          ours, under "astra": picture limits, latent kind and departures; without it: plain BAGEL
  tokenizer files      Qwen2's
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lib.checkpoints import contents, local_rows, misfits, write_gathered
from lib.distributed import is_main
from lib.records import write_json

NETWORK, AUTOENCODER = "ema.safetensors", "ae.safetensors"
HUB_FILES = "*.safetensors *.json *.txt *.jinja README.md".split()  # taken of a hub id
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
REMEDY = "Fetch it again, or name another."


# ---- any model: is it there, does it fit ----------------------------------------------------------------------------------


def find_folder(path: str | Path, maker: str = "") -> Path:
    """A checkpoint's folder: `path`, or the download of that hub id. FileNotFoundError ends with `maker` or how to fetch."""
    if Path(path).is_dir():
        return Path(path)
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "out/")):
        raise FileNotFoundError(f"There is no folder {path}. {maker}".strip())
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        sentence = f"{path} is no folder here, and the hub does not give it ({in_a_line(error)})."
        fetch = f"`hf download {path} --local-dir {Path(path).name}`"
        raise FileNotFoundError(f"{sentence} Fetch it and name its folder: {fetch}.") from error


def in_a_line(error: Exception) -> str:
    """The first 300 letters of what an error says, in one line; its name if it says nothing."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def from_library(load: Callable, folder: Path, what: str):
    """`load(folder)` of a library. Raises ValueError whatever it raises: that of tokenizers is a bare Exception."""
    try:
        return load(folder)
    except Exception as error:
        sentence = f"The {what} in {folder} cannot be read ({in_a_line(error)})."
        raise ValueError(f"{sentence} {REMEDY}") from error


def read_json(path: Path) -> dict:
    """What a JSON file holds. Raises ValueError if it is missing, broken or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. {REMEDY}")
    return content


def complain(sentence: str, phrases: list[str], remedy: str = REMEDY) -> None:
    """Raise ValueError with the sentence, the first few phrases and what to do, if there are any phrases."""
    if phrases:
        more = f" and {len(phrases) - 4} more" if len(phrases) > 4 else ""
        raise ValueError(f"{sentence}: {'; '.join(phrases[:4])}{more}. {remedy}")


def check_finite(path: Path, tensors: Iterable) -> None:
    """Raise ValueError naming those of the (name, tensor) pairs that hold NaN or infinity. 10 GB/s on a CPU core."""
    broken = []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(torch.aminmax(tensor.detach()))  # both NaN where there is any
            broken += [name] * (not ends.isfinite().all())
    complain(f"{path} holds NaN or infinity", broken)


def load_tokenizer(folder: Path, vocabulary: int):
    """The tokenizer in a folder. Raises ValueError if markers are not in it, or tokens beyond the embedding's rows."""
    from transformers import AutoTokenizer

    tokenizer = from_library(AutoTokenizer.from_pretrained, folder, "tokenizer")
    ids = tokenizer.get_vocab()
    wrong = [f"{marker} (missing)" for marker in MARKERS if marker not in ids]
    beyond = [f"{token!r} ({i} of {vocabulary})" for token, i in ids.items() if i >= vocabulary]
    complain(f"The tokenizer in {folder} does not fit its model", wrong + beyond)
    return tokenizer


# ---- BAGEL's autoencoder --------------------------------------------------------------------------------------------------


class FluxLatents:
    """The FLUX.1 autoencoder, frozen: every 8 x 8 pixels become one latent cell of 16 numbers. Runs in fp32."""

    cell = 8
    channels = 16
    scale, shift = 0.3611, 0.1159
    sizes = {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }

    def __init__(self, path: Path):
        """path: ae.safetensors, in FLUX's names.

        fp32 tensors are used as they are, not copied. Raises ValueError naming what is missing, unknown or misshapen.
        """
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        self.path = path
        contents(path)  # says what is wrong with a broken file
        tensors = load_file(path)
        unfit = f"{path} is not a FLUX autoencoder"
        with torch.device("meta"):
            self.vae = AutoencoderKL(**self.sizes)
        state = convert_ldm_vae_checkpoint(tensors, self.sizes)  # in the names of diffusers
        complain(unfit, misfits(self.vae.state_dict(), state))
        others = len(tensors) - len(state)  # which the conversion does not know
        complain(unfit, [f"{others} of its tensors are no part of one"] * (others > 0))
        check_finite(path, state.items())
        self.vae.load_state_dict({key: x.float() for key, x in state.items()}, assign=True)
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


# ---- folders -------------------------------------------------------------------------------------------------------------


def read_files(folder: Path) -> dict[str, dict]:
    """The contents of {"llm_config", "vit_config", "config"}.json; the last may be missing. Raises ValueError."""
    files = {name: read_json(folder / f"{name}.json") for name in ("llm_config", "vit_config")}
    config = folder / "config.json"
    return files | {"config": read_json(config) if config.exists() else {}}


def weights_file(folder: Path, name: str) -> Path:
    """A file of weights in a folder. Raises FileNotFoundError naming it, and what lies there in its place."""
    if not (folder / name).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        there = f"there are {', '.join(others[:4])}" if others else "no .safetensors file is there"
        layout = f"the network is one file {NETWORK}, the autoencoder {AUTOENCODER}"
        raise FileNotFoundError(f"{folder} has no {name}: {there}. In BAGEL's layout {layout}.")
    return folder / name


def table_sizes(path: Path, layout: dict[str, Tensor]) -> tuple[int, int, int]:
    """What no json file says, off the shapes in a network's file: vocabulary, latent grid, numbers per latent token."""
    words = "language_model.model.embed_tokens.weight"
    places, latents = "latent_pos_embed.pos_embed", "vae2llm.weight"
    sizes = {key: layout[key].shape if key in layout else () for key in (words, places, latents)}
    wrong = [f"{key} {tuple(shape)}" for key, shape in sizes.items() if len(shape) != 2]
    complain(f"{path} lacks matrices of a BAGEL", wrong)
    return len(layout[words]), round(len(layout[places]) ** 0.5), layout[latents].shape[1]


def load_network(network: nn.Module, path: Path, device, part: bool = False) -> None:
    """Fill what is on the meta device in a network from a safetensors file, tensor by tensor, straight to its place.

    part   of several files: it need not hold all, and may hold more
    Of a sharded network each rank reads its own rows only; buffers are whole on every rank. On the CPU a tensor that
    has the type already is the mapped file itself: nothing is read until it is used, and what is written into it stays
    in this process. Raises ValueError naming what is missing, left over, misshapen or not finite.
    """
    state, layout = network.state_dict(), contents(path)
    empty = {k: v for k, v in state.items() if v.is_meta and (k in layout or not part)}
    complain(f"{path} does not fit its json files", [] if part else misfits(empty, layout))
    tensors = {}
    with safe_open(path, "pt") as file:
        for key, value in empty.items():
            first, rows = local_rows(value)
            # to the device first: the file's type is seldom the larger one
            tensor = file.get_slice(key)[first : first + len(rows)].to(device).to(value.dtype)
            if isinstance(value, DTensor):
                mesh, size = value.device_mesh, {"shape": value.shape, "stride": value.stride()}
                tensor = DTensor.from_local(tensor, mesh, value.placements, **size)
            tensors[key] = tensor
    check_finite(path, ((key, local_rows(tensor)[1]) for key, tensor in tensors.items()))
    network.load_state_dict(tensors, assign=True, strict=len(tensors) == len(state))


def write_checkpoint(folder: str | Path, tensors, layout: dict, files: dict, tokenizer, coder):
    """Write a checkpoint in the public layout. Called on every rank; rank 0 writes.

    tensors, layout   the network: (name, tensor) pairs, maybe sharded, and {name: tensor as it is in the file}
    files             the contents of {"llm_config", "vit_config", "config"}.json;   coder: the autoencoder
    """
    folder = Path(folder)
    typed = ((name, tensor.to(layout[name].dtype)) for name, tensor in tensors)
    write_gathered(folder / NETWORK, typed)
    if is_main():
        for name, content in files.items():
            write_json(folder / f"{name}.json", content)
        tokenizer.save_pretrained(folder)
        coder.save(folder)
