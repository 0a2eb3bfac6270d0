"""
The network of BAGEL (arXiv 2505.14683), its modules named as the keys of the public checkpoint.

Two experts share every attention: "und" (text, ViT tokens, the markers around images) and "gen" (latents) have their
own norms, projections and MLP. The tokens of a sequence are ordered by expert, U und tokens first and then G gen
tokens, so that each expert works on one plain tensor; numbers beside each token (lib/packing.py) say where it stands
in the sequence and what it sees.

  segment          tokens                          experts             RoPE positions
  text             <|im_start|> words <|im_end|>   und                 one each, consecutive      (causal)
  ViT image        start, features, end            und                 one for all of them        (bidirectional)
  VAE image, t = 0 start, latents, end             und, gen..., und    one for all of them
  target, noisy    start, latents, end             und, gen..., und    the last one of all        (seen by itself)

Training reads whole packs (`Bagel.forward`). Inference reads the context once into a `Memory` and then lets the noisy
target look at it in every step (`Bagel.denoise`). The layers are the same; what they attend to is an object with one
method, attend(layer, q, k, v): `PackAttention`, `MemoryAttention` or `TargetAttention`. On a GPU layers are compiled, and
what they attend to is not: it differs from pass to pass.

Shapes: B sequences, R rows (a row = one view to imagine), N = U + G tokens, K keys in a memory, H width, d head width;
grid (h, w) latent tokens of an image, n = h w; C channels of a latent token. Positions live on the CPU, so that masks
are decided without waiting for the device.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib.packing import NEVER_SEEN, Pack, Tokens, make_attention, table_ids

GEN = "_moe_gen"  # what the generation expert's modules are called after the understanding expert's
LATENT_PATCH = 2  # latent cells per token and side
BAGEL_MAX_PIXELS = 14 * 14 * 9 * 1024  # of a picture that BAGEL is shown
CHOICES = {"prediction": ("velocity", "x0"), "latent": ("flux", "pixels")}  # of Settings
FIXED = {  # what must not differ where the json files tell it
    "llm_config": {"model_type": "qwen2", "hidden_act": "silu", "rope_scaling": None},
    "vit_config": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
}
MAX_IMAGES = 8  # context images that Settings.learned_places can number


@dataclass(frozen=True)
class Settings:
    """What `config.json` holds under "astra": departures from BAGEL (all off by default) and the sampler's defaults."""

    # "velocity", or "x0": the network's output is the clean latent and v = (x_t - x0) / t. A velocity carries noise,
    # and width 128 cannot carry the 192 noisy numbers of a tiny token: without this nothing is learned in minutes.
    prediction: str = "velocity"
    # Tell each latent token where its ray goes, in numbers (`ray_features`) and as RoPE angles (`ray_angles`): a target's
    # after the motion that the sentence commands, a context image's from where simulators.image_poses takes it to stand.
    # Attention finds words and neighbours too, but only after many more images than minutes allow; and amounts that
    # training never showed lie between those that it did.
    rays: bool = False
    words: bool = True  # the sentence stands in the sequence as well
    # Places inside a picture, and the number of a context image, as learned embeddings of scale 1. BAGEL has smooth
    # sin-cos tables for the one and only RoPE for the other; random embeddings are told apart from the first step.
    learned_places: bool = False
    max_context: int = 4  # images shown at most: the latest, and the reference as the last one
    latent: str = "flux"  # "flux", or "pixels": no autoencoder (PixelLatents)
    vae_limits: tuple = (1024, 512, 16)  # (max_side, min_side, stride) of the pictures, pixels
    vit_limits: tuple = (980, 224, 14)
    # the sampler; BAGEL's numbers for editing
    steps: int = 49  # network evaluations ("50 timesteps" in the original)
    shift: float = 3.0  # > 1 spends more of them near noise
    text_scale: float = 4.0  # guidance away from "no sentence"; 1 = no guidance at all
    image_scale: float = 2.0  # guidance away from "no images"; 1 = off
    renorm: str = "text_channel"  # "text_channel", "channel" or "global"
    renorm_min: float = 0.0
    interval: tuple = (0.0, 1.0)  # guide only while low < t <= high
    taylor: bool = False  # approximate: compute one step in three (extras/taylor.py)

    def __post_init__(self):
        """Raises ValueError where more images may be shown than can be told apart."""
        if self.learned_places and self.max_context > MAX_IMAGES:
            raise ValueError(
                f"max_context is {self.max_context}, over {MAX_IMAGES}: this model has no numbers for more images."
            )

    @classmethod
    def read(cls, astra: dict) -> "Settings":
        """From config.json. Raises ValueError for names that are no fields, and values of another kind."""
        defaults = {field.name: field.default for field in fields(cls)}
        settings = {}
        for key, value in astra.items():
            value = tuple(value) if isinstance(value, list) else value
            if key not in defaults:
                raise ValueError(
                    f"config.json asks for {key}, which this version of the code does not know."
                )
            is_choice = value in CHOICES.get(key, (value,))
            if not is_choice or not is_like(value, defaults[key]):
                raise ValueError(
                    f"config.json: {key} is {value!r}, which is nothing like {defaults[key]!r}."
                )
            settings[key] = value
        return cls(**settings)


def is_like(value, default) -> bool:
    """Whether a value of config.json is of its default's kind; whole numbers begin at 1."""
    if isinstance(default, tuple):
        is_as_long = isinstance(value, tuple) and len(value) == len(default)
        return is_as_long and all(map(is_like, value, default))
    if isinstance(default, float):
        return type(value) in (int, float)
    return type(value) is type(default) and (type(default) is not int or value > 0)


@dataclass(frozen=True)
class Config:
    """Sizes, read from llm_config.json, vit_config.json and the shapes in the checkpoint."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    eps: float
    rope_base: float
    vit_width: int
    vit_layers: int
    vit_heads: int
    vit_mlp: int
    vit_patch: int  # pixels
    vit_grid: int  # ViT patches per side that have a position
    latent_grid: int  # latent tokens per side that have a position
    token_channels: int  # numbers per latent token
    settings: Settings

    @classmethod
    def read(cls, files: dict, vocabulary: int, latent_grid: int, token_channels: int) -> "Config":
        """From the contents of the json files, by their names; the numbers stand in no file (`bagel_files.table_sizes`).

        Raises ValueError for sizes that are none, and for what this code could only ignore: it would compute another thing.
        """
        for name, fixed in FIXED.items():
            for key, value in fixed.items():
                if files[name].get(key, value) != value:
                    raise ValueError(
                        f"{name}.json: {key} is {files[name][key]!r}; BAGEL's is {value!r}."
                    )
        llm = partial(size_in, files, "llm_config")
        vit = partial(size_in, files, "vit_config")
        return cls(
            width=llm("hidden_size"),
            layers=llm("num_hidden_layers"),
            heads=llm("num_attention_heads"),
            kv_heads=llm("num_key_value_heads"),
            mlp=llm("intermediate_size"),
            vocabulary=vocabulary,
            eps=files["llm_config"].get("rms_norm_eps", 1e-6),
            rope_base=files["llm_config"].get("rope_theta", 1e6),
            vit_width=vit("hidden_size"),
            vit_layers=vit("num_hidden_layers") - 1,  # BAGEL drops the last one
            vit_heads=vit("num_attention_heads"),
            vit_mlp=vit("intermediate_size"),
            vit_patch=vit("patch_size"),
            vit_grid=vit("image_size") // vit("patch_size"),
            latent_grid=latent_grid,
            token_channels=token_channels,
            settings=Settings.read(files["config"].get("astra", {})),
        )


def size_in(files: dict, name: str, key: str) -> int:
    """A size that a json file must tell. Raises ValueError where it is none."""
    size = files[name].get(key)
    if type(size) is not int or size < 1:
        raise ValueError(f"{name}.json: {key} is {size!r}, not a size.")
    return size


# ---- what stands before a target at inference ----------------------------------------------------------------------------


class ContextImage(NamedTuple):
    """A picture of R rows. Either form may be missing (None)."""

    latent: Tensor | None  # (R, c, 2 h, 2 w), clean
    pixels: Tensor | None  # (R, 3, H, W) in [-1, 1], for the ViT
    # (R, 5) how it stands to the levelled reference; None: just so (Settings.rays, `WorldModel.arrange`)
    delta: Tensor | None = None


class ContextText(NamedTuple):
    """A text for R rows."""

    ids: Tensor  # (R, L), right-padded
    lengths: Tensor  # (R,), on the CPU
    # (R, 5) where it leads from the levelled reference: dx, dy, dz, dangle, dphi (Settings.rays)
    delta: Tensor | None = None


# ---- parts of the network ------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in fp32, the rest in x's own type."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., width) -> (..., width)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        gate = F.silu(self.gate_proj(x))
        # of BAGEL's width the product is a gigabyte: without a gradient it takes the gate's place
        out = None if torch.is_grad_enabled() else gate
        return self.down_proj(torch.mul(gate, self.up_proj(x), out=out))


class GeluMLP(nn.Module):
    """Linear, gelu (tanh form), Linear: in the ViT's layers, and as the connector from the ViT to the LLM."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedder(nn.Module):
    """t (R,) in [0, 1] -> (R, H). The frequencies fit t * 1000, but BAGEL feeds t itself; so it was trained."""

    frequencies = 128

    def __init__(self, width):
        super().__init__()
        first, second = nn.Linear(2 * self.frequencies, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t):
        exponent = -torch.arange(self.frequencies, device=t.device) / self.frequencies
        angle = t.float()[:, None] * 10_000.0**exponent
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class PositionTable(nn.Module):
    """Fixed sin-cos table (grid * grid, H): row r * grid + c holds [s(c), s(r)], s(x) = [sin(x w_k), cos(x w_k)].

    learned   a table of that shape that is trained (Settings.learned_places)
    """

    def __init__(self, grid, width, learned):
        super().__init__()
        w = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        angle = torch.arange(grid, dtype=torch.float64)[:, None] * w
        s = torch.cat([angle.sin(), angle.cos()], -1)  # (grid, H / 2)
        table = torch.cat([s[None].expand(grid, -1, -1), s[:, None].expand(-1, grid, -1)], -1)
        self.grid = grid
        table = table.reshape(grid * grid, width).float()
        self.pos_embed = nn.Parameter(table) if learned else nn.Buffer(table)

    def forward(self, ids):
        """ids = row * grid + column, any shape (...) -> (..., H). The table is not stretched to the picture."""
        return self.pos_embed[ids]


def run_layer(recompute, layer, *inputs):
    """layer(*inputs); with `recompute` its activations are forgotten, and computed again when the gradient needs them."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class VisionLayer(nn.Module):
    """A SigLIP layer: LayerNorm, full attention within the image, gelu MLP."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vit_heads
        self.layer_norm1 = nn.LayerNorm(c.vit_width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(c.vit_width, eps=1e-6)
        self.self_attn = nn.ModuleDict()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.self_attn[name] = nn.Linear(c.vit_width, c.vit_width)
        self.mlp = GeluMLP(c.vit_width, c.vit_mlp, c.vit_width)

    def project(self, name, x):
        """x (B, n, width) -> (B, heads, n, d)."""
        return self.self_attn[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, mask):
        y = self.layer_norm1(x)
        q, k, v = (self.project(name, y) for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](y)
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """SigLIP without its last layer: the patches of images -> features, both row-major."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict()
        self.embeddings["patch_embedding"] = nn.Linear(3 * c.vit_patch**2, c.vit_width)
        self.embeddings["position_embedding"] = nn.Embedding(c.vit_grid**2, c.vit_width)
        layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vit_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(c.vit_width, eps=1e-6)

    def forward(self, patches, ids, mask, recompute):
        """patches (B, n, 3 * patch²), ids (n,) or (B, n) in the position table -> (B, n, width).

        mask   (B, 1, 1, n) added to the scores: a large negative number hides padding; None where there is none
        """
        x = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](ids)
        for layer in self.encoder["layers"]:
            x = run_layer(recompute, layer, x, mask)
        return self.post_layernorm(x)


def rotate(x, rope):
    """Rotary positions, "rotate half" layout: x (B, heads, N, d), rope = (cos, sin), each (B, 1, N, d)."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]


class Attention(nn.Module):
    """One attention over all tokens; each expert brings its own projections and its own norms of q and k."""

    def __init__(self, c):
        super().__init__()
        self.head = c.width // c.heads
        for expert in ("", GEN):
            for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
                self.add_module(f"{name}_proj{expert}", nn.Linear(c.width, heads * self.head))
            self.add_module(f"o_proj{expert}", nn.Linear(c.width, c.width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(self.head, c.eps))
            self.add_module(f"k_norm{expert}", RMSNorm(self.head, c.eps))

    def project(self, name, und, gen):
        """The q, k or v of und (B, U, H) and gen (B, G, H) tokens, side by side: (B, heads, U + G, d)."""
        projected = []
        for x, expert in ((und, ""), (gen, GEN)):
            y = getattr(self, f"{name}_proj{expert}")(x).unflatten(-1, (-1, self.head))
            if name != "v":
                y = getattr(self, f"{name}_norm{expert}")(y)
            projected.append(y)
        return torch.cat(projected, 1).transpose(1, 2)


class Layer(nn.Module):
    """One transformer layer with two experts: every weight exists twice, the attention is over all tokens."""

    def __init__(self, c, index):
        super().__init__()
        self.index = index
        self.self_attn = Attention(c)
        for expert in ("", GEN):
            self.add_module(f"mlp{expert}", SwiGLU(c.width, c.mlp))
            self.add_module(f"input_layernorm{expert}", RMSNorm(c.width, c.eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(c.width, c.eps))

    def forward(self, und, gen, rope, attention, keys_only=False):
        """Tokens ordered by expert, und (B, U, H) first, then gen (B, G, H) -> (und, gen).

        rope        (cos, sin) of the U + G tokens
        attention   decides who sees whom, and keeps keys and values where they are needed again
        keys_only   only that: of a context's last layer nobody reads what the tokens become
        """
        heads = self.self_attn
        normed_und = self.input_layernorm(und)
        normed_gen = self.input_layernorm_moe_gen(gen)
        k = rotate(heads.project("k", normed_und, normed_gen), rope)  # (B, kv_heads, N, d)
        v = heads.project("v", normed_und, normed_gen)
        if keys_only:
            attention.store(self, k, v)
            return und, gen
        q = rotate(heads.project("q", normed_und, normed_gen), rope)  # (B, heads, N, d)
        y = attention.attend(self, q, k, v).transpose(1, 2)  # (B, N, heads, d)
        split = und.shape[1]
        und = und + heads.o_proj(y[:, :split].flatten(2))
        gen = gen + heads.o_proj_moe_gen(y[:, split:].flatten(2))
        und = und + self.mlp(self.post_attention_layernorm(und))
        gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        return und, gen


def opaque(function):
    """Compiled layers call it as it is. Without a GPU none is compiled, and compiling takes half a second to import."""
    return torch.compiler.disable(function) if torch.cuda.is_available() else function


class PackAttention:
    """Of a pack: every layer sees by the same rule, and nothing is stored."""

    def __init__(self, tokens, like):
        self.kernel = make_attention(tokens, tokens, like)

    @opaque
    def attend(self, layer, q, k, v):
        return self.kernel(q, k, v)


# ---- the memory of a context ---------------------------------------------------------------------------------------------


class Branch(NamedTuple):
    """What a noisy target sees in one branch of guidance: a context as far as it had been read, and a command."""

    keys: list  # (R, kv_heads, length, d) of each layer
    values: list
    mask: Tensor | None  # (R, 1, 1, length) added to the scores; None: every row has all tokens
    next: Tensor  # (R,) the RoPE position of all tokens of the target, on the CPU
    delta: Tensor  # (R, 5) of `ContextText`; zeros: nothing is commanded


class Memory:
    """Keys and values of a context that R rows have read: a pair (R, kv_heads, length, d) per layer.

    positions   (R, length) RoPE position of every token, on the CPU; NEVER_SEEN where a row has no such token
    next        (R,) the position that follows, on the CPU
    """

    def __init__(self, c: Config, rows: int, like: Tensor):
        nothing = like.new_empty(rows, c.kv_heads, 0, c.width // c.heads)
        self.keys = [nothing] * c.layers
        self.values = [nothing] * c.layers
        self.positions = torch.zeros(rows, 0, dtype=torch.long)
        self.next = torch.zeros(rows, dtype=torch.long)

    @property
    def end(self) -> tuple[int, Tensor]:
        """How many tokens there are so far, and the position that follows."""
        return self.positions.shape[1], self.next

    def branch(self, delta: Tensor | None = None, end: tuple[int, Tensor] | None = None) -> Branch:
        """What a target sees that stands at the end of this memory, or at one that it had: nothing is held twice.

        delta   (R, 5) what is commanded, if anything is
        """
        length, next_position = end or self.end
        padding = self.positions[:, :length] == NEVER_SEEN  # of texts
        mask = None
        if padding.any():
            mask = torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)
            mask = mask[:, None, None].to(self.keys[0])
        if delta is None:
            delta = torch.zeros(len(self.next), 5, device=self.keys[0].device)
        keys = [k[:, :, :length] for k in self.keys]
        values = [v[:, :, :length] for v in self.values]
        return Branch(keys, values, mask, next_position, delta)


class MemoryAttention:
    """Of tokens at `positions` (R, N), CPU, that a Memory reads: they see all before them, a text's causally, an image all of itself."""

    def __init__(self, memory: Memory, positions: Tensor):
        memory.positions = torch.cat([memory.positions, positions], 1)
        self.memory = memory
        queries, keys = Tokens.plain(positions), Tokens.plain(memory.positions)
        self.kernel = make_attention(queries, keys, like=memory.keys[0])

    @opaque
    def store(self, layer, k, v):
        """The memory reads on."""
        memory, i = self.memory, layer.index
        memory.keys[i] = torch.cat([memory.keys[i], k], 2)
        memory.values[i] = torch.cat([memory.values[i], v], 2)

    @opaque
    def attend(self, layer, q, k, v):
        self.store(layer, k, v)
        return self.kernel(q, self.memory.keys[layer.index], self.memory.values[layer.index])


class TargetAttention:
    """Of noisy targets, R rows behind each of several branches: each sees its own tokens and its branch's context."""

    def __init__(self, branches: list[Branch]):
        self.branches = branches

    @opaque
    def attend(self, layer, q, k, v):
        chunks = (x.chunk(len(self.branches)) for x in (q, k, v))
        outputs = []
        for branch, *qkv in zip(self.branches, *chunks, strict=True):
            outputs.append(self.attend_behind(branch, layer.index, *qkv))
        return torch.cat(outputs)

    @staticmethod
    def attend_behind(branch, layer, q, k, v):
        """q (R, heads, N, d), k and v (R, kv_heads, N, d) of one branch's targets.

        The heads that share a key are laid behind one another as more queries of one head: nothing is repeated.
        """
        keys = torch.cat([branch.keys[layer], k], 2)
        values = torch.cat([branch.values[layer], v], 2)
        mask = branch.mask if branch.mask is None else F.pad(branch.mask, (0, k.shape[2]))
        rows, heads, n, d = q.shape
        q = q.reshape(rows, k.shape[1], -1, d)
        y = F.scaled_dot_product_attention(q, keys, values, mask)
        return y.reshape(rows, heads, n, d)  # with a mask, some kernels lay y out in another order


# ---- the network ---------------------------------------------------------------------------------------------------------


class Bagel(nn.Module):
    """The network of the checkpoint, its modules named as the checkpoint's keys."""

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        model = nn.ModuleDict()
        model["embed_tokens"] = nn.Embedding(c.vocabulary, c.width)
        model["layers"] = nn.ModuleList(Layer(c, index) for index in range(c.layers))
        for expert in ("", GEN):
            model[f"norm{expert}"] = RMSNorm(c.width, c.eps)
        self.language_model = nn.ModuleDict({"model": model})
        # BAGEL can write; a simulator never does (`freeze_unused`)
        self.language_model["lm_head"] = nn.Linear(c.width, c.vocabulary, bias=False)
        self.vit_model = nn.ModuleDict({"vision_model": VisionTransformer(c)})
        self.connector = GeluMLP(c.vit_width, c.width, c.width)
        self.vit_pos_embed = PositionTable(c.vit_grid, c.width, c.settings.learned_places)
        self.latent_pos_embed = PositionTable(c.latent_grid, c.width, c.settings.learned_places)
        self.time_embedder = TimeEmbedder(c.width)
        self.vae2llm = nn.Linear(c.token_channels, c.width)
        self.llm2vae = nn.Linear(c.width, c.token_channels)
        if c.settings.rays:
            self.motion2llm = nn.Linear(RAY_FEATURES, c.width)
        if c.settings.learned_places:
            self.image_number = nn.Embedding(MAX_IMAGES, c.width)
        self.markers = (0, 1)  # <|vision_start|>, <|vision_end|>; WorldModel asks its tokenizer
        self.recompute = False  # activation checkpointing of every layer, the ViT's too

    @property
    def blocks(self):
        """The modules that FSDP gathers one at a time."""
        vision = self.vit_model["vision_model"]
        return [*self.language_model["model"]["layers"], *vision.encoder["layers"]]

    def compile_blocks(self):
        """Let torch.compile fuse what stands between matrix products and attention; all blocks share a few graphs."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=True)

    @property
    def dtype(self):
        """What the arithmetic runs in. FSDP's bf16 copies of fp32 weights have it while a forward pass runs."""
        return self.vae2llm.weight.dtype

    @property
    def device(self):
        return self.vae2llm.weight.device

    # ---- the layers

    def rope(self, positions, ray_angles=None):
        """RoPE positions (B, N), on the CPU -> (cos, sin), each (B, 1, N, d); the angles are fp32.

        ray_angles   with Settings.rays (B, n, 3 d / 8) of the last n tokens, the latents: positions keep a quarter of a
                     head, the rest turns by these; by 0 for words and ViT features, which have no ray
        """
        head = self.config.width // self.config.heads
        exponent = -torch.arange(0, head, 2, device=self.device) / head
        frequency = self.config.rope_base**exponent
        angle = positions.to(self.device)[..., None] * frequency  # (B, N, d / 2)
        if self.config.settings.rays:
            angle[..., head // 8 :] = 0
            if ray_angles is not None:
                first = angle.shape[1] - ray_angles.shape[1]
                angle[:, first:, head // 8 :] = ray_angles
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def run_layers(self, und, gen, rope, attention, keys_only=False):
        """Through all layers -> (und, gen) of the last; with `keys_only` these are not what it would make of them."""
        *layers, last = self.language_model["model"]["layers"]
        for layer in layers:
            und, gen = run_layer(self.recompute, layer, und, gen, rope, attention)
        return run_layer(self.recompute, last, und, gen, rope, attention, keys_only)

    def output(self, gen):
        """The last layer's latent tokens -> the network's prediction (B, n, C)."""
        return self.llm2vae(self.language_model["model"]["norm" + GEN](gen)).float()

    def freeze_unused(self):
        """Freeze what no loss of a simulator reaches, words to come: it needs no moments, EMA or place in a checkpoint."""
        model = self.language_model["model"]
        last = model["layers"][-1]
        unused = (last.self_attn.o_proj, last.post_attention_layernorm, last.mlp)
        for module in (*unused, model["norm"], self.language_model["lm_head"]):
            module.requires_grad_(False)

    # ---- training: a whole pack at once

    def forward(self, pack: Pack) -> Tensor:
        """lib/packing.Pack -> the network's prediction at every latent token (B, G, C); see `pack.target_mask`."""
        return self.output(self.last_layer(pack)[1])

    def last_layer(self, pack):
        """What the last layer gives for the tokens of a pack: und (B, U, H), gen (B, G, H)."""
        vectors, angles = self.rays(pack.delta[pack.picture], pack.latent_ids)
        und, gen = self.embed(pack)
        attention = PackAttention(pack.tokens, like=gen)
        rope = self.rope(pack.tokens.position, angles)
        return self.run_layers(und, gen + vectors, rope, attention)

    def embed(self, pack):
        """The embeddings of a pack, rays apart: und (B, U, H) and gen (B, G, H)."""
        per_picture = self.time_embedder(pack.t) + self.index_vector(pack.image_index)  # (I, H)
        places = self.latent_pos_embed(pack.latent_ids).to(self.dtype)
        gen = self.vae2llm(pack.x_t.to(self.dtype)) + per_picture[pack.picture] + places
        padding = pack.patch_ids < 0
        vit = self.embed_vit(pack.patches, pack.patch_ids.clamp(min=0), padding)
        vit = vit + self.index_vector(pack.patch_image_index)[:, None]
        features = vit.flatten(0, 1)[~padding.flatten()]
        und = self.embed_text(pack.ids)
        flat = und.flatten(0, 1).index_copy(0, pack.feature_index, features)
        # A pack without any picture holds one of padding alone, so that every rank of FSDP runs the ViT once.
        return (flat + 0 * vit.mean()).view_as(und), gen

    # ---- embeddings: every kind of token -> (B, tokens, H)

    def embed_text(self, ids):
        return self.language_model["model"]["embed_tokens"](ids)

    def embed_markers(self, batch):
        """The two tokens around every image: (batch, 2, H)."""
        return self.embed_text(torch.tensor(self.markers, device=self.device)).expand(batch, -1, -1)

    def embed_vit(self, patches, ids, padding=None):
        """patches (B, n, 3 * patch²) of pictures in [-1, 1], ids (n,) or (B, n) in the tables, padding (B, n) bool."""
        mask = None
        if padding is not None:
            # -1e4, not -inf or the least number: kernels multiply by log2(e), and a row without a picture sees nothing else
            mask = torch.zeros(ids.shape, device=ids.device, dtype=self.dtype)
            mask = mask.masked_fill_(padding, -1e4)[:, None, None]
        features = self.vit_model["vision_model"](patches.to(self.dtype), ids, mask, self.recompute)
        return self.connector(features) + self.vit_pos_embed(ids).to(self.dtype)

    def index_vector(self, image_index):
        """Which context image: image_index (I,), -1 for none -> (I, H); zeros without Settings.learned_places."""
        if not self.config.settings.learned_places:
            return self.vae2llm.bias.new_zeros(len(image_index), self.config.width)
        return self.image_number(image_index.clamp(min=0)) * (image_index >= 0)[:, None]

    def rays(self, delta: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What latent tokens are told of their rays (B, n, H), and the angles for `rope` (B, n, 3 d / 8).

        delta   (B, n or 1, 5), ids (n,) or (B, n) in the position table. Without Settings.rays zeros and no angles
        """
        c = self.config
        if not c.settings.rays:
            nothing = self.vae2llm.bias.new_zeros(len(delta), 1, c.width)
            return nothing, nothing[:, :0]
        x = (ids % c.latent_grid + 0.5) / c.latent_grid * 2 - 1
        y = (ids // c.latent_grid + 0.5) / c.latent_grid * 2 - 1
        direction = ray_direction(delta, x, y)
        vectors = self.motion2llm(ray_features(delta, direction).to(self.dtype))
        return vectors, ray_angles(delta, direction, c.width // c.heads // 8)

    # ---- inference: the context once into a memory, then the target step by step

    def memory(self, rows: int) -> Memory:
        """An empty Memory for R rows."""
        return Memory(self.config, rows, self.vae2llm.weight.detach())

    def read_images(self, memory: Memory, images: list[ContextImage]) -> None:
        """Context images into a memory.

        Each latent and each ViT image takes one position. Sizes may differ from image to image, not from row to row.
        """
        markers = self.embed_markers(len(memory.next))
        time = self.time_embedder(torch.zeros(1, device=self.device))
        und, gen = [], [markers[:, :0]]  # embeddings (R, n, H); without a latent gen is (R, 0, H)
        ray_angles = []  # of gen
        und_offset, gen_offset = [], []  # of each token's position behind memory.next
        offset = 0
        for i, (latent, pixels, delta) in enumerate(images):
            number = len(images) - 1 - i  # counted from the reference, which is the last one
            index = self.index_vector(torch.tensor([number], device=self.device))
            if latent is not None:
                tokens = self.vae2llm(patchify(latent, LATENT_PATCH).to(self.dtype))
                ids = table_ids(token_grid(latent), self.config.latent_grid).to(self.device)
                places = self.latent_pos_embed(ids).to(self.dtype)
                tokens = tokens + (time + places + index)
                if delta is None:
                    delta = torch.zeros(len(latent), 5, device=self.device)
                vectors, angles = self.rays(delta[:, None], ids)
                gen.append(tokens + vectors)
                ray_angles.append(angles)
                gen_offset += [offset] * tokens.shape[1]
                und.append(markers)
                und_offset += [offset] * 2
                offset += 1
            if pixels is not None:
                side = self.config.vit_patch
                grid = (pixels.shape[-2] // side, pixels.shape[-1] // side)
                ids = table_ids(grid, self.config.vit_grid).to(self.device)
                features = self.embed_vit(patchify(pixels, side), ids) + index
                und += [markers[:, :1], features, markers[:, 1:]]
                und_offset += [offset] * (features.shape[1] + 2)
                offset += 1
        if not images:
            return
        positions = memory.next[:, None] + torch.tensor(und_offset + gen_offset)
        attention = MemoryAttention(memory, positions)
        rope = self.rope(positions, torch.cat(ray_angles, 1) if ray_angles else None)
        self.run_layers(torch.cat(und, 1), torch.cat(gen, 1), rope, attention, keys_only=True)
        memory.next = memory.next + offset

    def read_text(self, memory: Memory, text: ContextText) -> None:
        """Texts into a memory."""
        index = torch.arange(text.ids.shape[1])
        positions = memory.next[:, None] + index
        positions = torch.where(index < text.lengths[:, None], positions, NEVER_SEEN)
        und = self.embed_text(text.ids)
        attention = MemoryAttention(memory, positions)
        self.run_layers(und, und[:, :0], self.rope(positions), attention, keys_only=True)
        memory.next = memory.next + text.lengths

    def denoise(self, x, extra, markers, rope, branches: list[Branch]) -> Tensor:
        """The last layer's latent tokens (R * branches, n, H) for noisy latents x (R * branches, n, C), by branch.

        extra     what is added to the embedded latents: time, place, motion; (R * branches or 1, n, H)
        markers   (R * branches, 2, H);   rope: of all tokens;   branches: what each sees
        """
        gen = self.vae2llm(x.to(self.dtype)) + extra
        return self.run_layers(markers, gen, rope, TargetAttention(branches))[1]


# ---- rays ----------------------------------------------------------------------------------------------------------------

HARMONICS = 8  # of a ray's azimuth
RAY_FEATURES = 2 * HARMONICS + 24  # numbers in all
RAY_METERS = 2.5  # how far along a ray a room's walls and furniture stand, about


def ray_direction(delta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the rays of pixels go at a relative pose: (right, forward, up) of length 1, as a level reference has them.

    delta   (..., 5) dx, dy, dz in metres, dangle, dphi in degrees;  x, y (...) where the ray passes at depth 1, right
             and down: -1 to 1 over a field of view of 90 degrees
    """
    yaw = torch.deg2rad(delta[..., 3])
    pitch = torch.deg2rad(delta[..., 4])
    ahead = pitch.cos() + y * pitch.sin()
    right = ahead * yaw.sin() + x * yaw.cos()
    forward = ahead * yaw.cos() - x * yaw.sin()
    up = pitch.sin() - y * pitch.cos()
    length = (x * x + y * y + 1).sqrt()
    return right / length, forward / length, up / length


def ray_features(delta: Tensor, direction: tuple) -> Tensor:
    """Where rays begin and go (`ray_direction`), in smooth numbers: an amount lies between its neighbours, 180 degrees is -180.

    returns  (..., RAY_FEATURES): harmonics of the ray's azimuth and elevation, its origin, and its moment (Pluecker's
             coordinates of the ray)
    """
    dx, dy, dz = delta[..., :3].unbind(-1)
    right, forward, up = direction
    azimuth = torch.atan2(right, forward)
    elevation = torch.atan2(up, torch.hypot(right, forward))
    moment = (dy * up - dz * forward, dz * right - dx * up, dx * forward - dy * right)
    features = [elevation, *moment, dx * right + dy * forward + dz * up]
    for k in range(1, HARMONICS + 1):
        features += [(k * azimuth).sin(), (k * azimuth).cos()]
    for k in (2, 4):
        features += [(k * elevation).sin(), (k * elevation).cos()]
    for move in (dx, dy, dz):
        features += [move, *((torch.pi * k * move).sin() for k in (0.5, 1, 2, 3))]
    return torch.stack(torch.broadcast_tensors(*features), -1)


def ray_angles(delta: Tensor, direction: tuple, count: int) -> Tensor:
    """By which angles rays (`ray_direction`) turn a head (`Bagel.rope`): (..., 3 * count).

    Where does a ray's point at RAY_METERS stand, seen from the reference? So a token finds those of the context that look
    there: after a turn exactly, after a move but for what stands nearer or farther. Harmonics of its azimuth, 2 * count,
    and octaves of its elevation.
    """
    dx, dy, dz = delta[..., :3].unbind(-1)
    right, forward, up = direction
    right = dx + RAY_METERS * right
    forward = dy + RAY_METERS * forward
    azimuth = torch.atan2(right, forward)
    elevation = torch.atan2(dz + RAY_METERS * up, torch.hypot(right, forward))
    angles = [k * azimuth for k in range(1, 2 * count + 1)]
    angles += [2**k * elevation for k in range(count)]
    return torch.stack(torch.broadcast_tensors(*angles), -1)


# ---- tokens --------------------------------------------------------------------------------------------------------------


def patchify(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> tokens (B, H/size * W/size, size * size * C); row-major, in a token (row, column, channel)."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)


def unpatchify(tokens: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: tokens (B, rows * columns, size * size * C) -> (B, C, rows * size, columns * size)."""
    x = tokens.reshape(len(tokens), rows, columns, size, size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * size, columns * size)


def token_grid(latent: Tensor) -> tuple[int, int]:
    """(h, w): the latent tokens of a latent (B, c, 2 h, 2 w)."""
    return latent.shape[-2] // LATENT_PATCH, latent.shape[-1] // LATENT_PATCH


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
