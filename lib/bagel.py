"""
The network of BAGEL (arXiv 2505.14683), its modules named as the keys of the public checkpoint.

Two experts share every attention: "und" (text, ViT tokens, the markers around images) and "gen" (latents) have their
own norms, projections and MLP. The tokens of a sequence are ordered by expert, U und tokens first and then G gen
tokens, so that each expert works on one plain tensor; where a token stands in the sequence is told by numbers beside
it (lib/packing.py), and so is what it sees.

  segment          tokens                          experts             RoPE positions
  text             <|im_start|> words <|im_end|>   und                 one each, consecutive      (causal)
  ViT image        start, features, end            und                 one for all of them        (bidirectional)
  VAE image, t = 0 start, latents, end             und, gen..., und    one for all of them
  target, noisy    start, latents, end             und, gen..., und    the last one of all        (seen by itself)

Training reads whole packs (`Bagel.forward`). Inference reads the context once into a memory (lib/memory.py) and then
lets the noisy target look at it in every step (`Bagel.denoise`).

Shapes: B sequences, R rows (a row = one view to imagine), N = U + G tokens, K keys in a memory, H width, d head width;
grid (h, w) latent tokens of an image, n = h w; C numbers per latent token. Positions live on the CPU, so that masks
are decided without waiting for the device.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib.bagel_files import patchify
from lib.memory import Memory
from lib.packing import HIDDEN, attention, table_ids

GEN = "_moe_gen"  # what the generation expert's modules are called after the understanding expert's
LATENT_PATCH = 2  # latent cells per token and side
MAX_IMAGES = 8  # context images that Settings.learned_places can number


@dataclass(frozen=True)
class Settings:
    """What `config.json` holds under "astra": departures from BAGEL (all off by default) and the sampler's defaults."""

    # "velocity", or "x0": the network's output is the clean latent and v = (x_t - x0) / t. A velocity carries noise,
    # and width 128 cannot carry the 192 noisy numbers of a tiny token: without this nothing is learned in minutes.
    prediction: str = "velocity"
    # Add the sentence's word embeddings, summed and through one linear layer (motion2llm), to the target tokens.
    # Attention finds the words too, but only after many more images than minutes allow.
    motion_to_target: bool = False
    # Turn the ring of context images until the reference comes first, and call it Image-1 in the sentence: the model
    # need not learn to look a number up. Ring order is kept: [ref, ref + 1, ..., wrapping].
    reference_first: bool = False
    # Places inside a picture, and the number of a context image, as learned embeddings of scale 1. BAGEL has smooth
    # sin-cos tables for the one and only RoPE for the other; random embeddings are told apart from the first step.
    learned_places: bool = False
    max_context: int = 4  # images shown at most: the reference and its nearest neighbours
    latent: str = "flux"  # "flux", or "pixels": no autoencoder (lib/bagel_files.PixelLatents)
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
    taylor: bool = False  # approximate: compute one step in three (world_model.Taylor)


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
    latent_numbers: int  # numbers per latent token
    settings: Settings

    @classmethod
    def read(cls, llm, vit, astra, vocabulary, latent_grid, latent_numbers):
        """From the json files' contents (dicts); the last three are read off tensors by `WorldModel.load`.

        Raises ValueError where "astra" holds what this code does not know, a departure it could only ignore.
        """
        if unknown := set(astra) - {field.name for field in fields(Settings)}:
            raise ValueError(
                f"config.json asks for {', '.join(sorted(unknown))}, which this version of the code does "
                f"not know: it would compute something else."
            )
        return cls(
            width=llm["hidden_size"],
            layers=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            kv_heads=llm["num_key_value_heads"],
            mlp=llm["intermediate_size"],
            vocabulary=vocabulary,
            eps=llm["rms_norm_eps"],
            rope_base=llm.get("rope_theta", 1e6),
            vit_width=vit["hidden_size"],
            vit_layers=vit["num_hidden_layers"] - 1,  # BAGEL drops the last one
            vit_heads=vit["num_attention_heads"],
            vit_mlp=vit["intermediate_size"],
            vit_patch=vit["patch_size"],
            vit_grid=vit["image_size"] // vit["patch_size"],
            latent_grid=latent_grid,
            latent_numbers=latent_numbers,
            settings=Settings(
                **{key: tuple(v) if isinstance(v, list) else v for key, v in astra.items()}
            ),
        )


# ---------------------------------------------------------------- parts


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in fp32, the rest in x's own type."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        ) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., width) -> (..., width)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        # Many tokens fall out of a CPU's cache between the two steps; in pieces of 8 MB, and in place, they stay.
        pieces = x.flatten(0, -2).split(max(1, 2**21 // self.up_proj.out_features))
        return torch.cat(
            [
                self.down_proj(
                    F.silu(self.gate_proj(piece), inplace=True).mul_(self.up_proj(piece))
                )
                for piece in pieces
            ]
        ).view_as(x)


class GeluMLP(nn.Module):
    """Linear, gelu (tanh form), Linear: in the ViT's layers, and as the connector from the ViT to the LLM."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedder(nn.Module):
    """t (R,) in [0, 1] -> (R, H). The frequencies fit t * 1000, but BAGEL feeds t itself; so it was trained."""

    def __init__(self, width, frequencies=128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t):
        angle = t.float()[:, None] * 10_000.0 ** (
            -torch.arange(self.frequencies, device=t.device) / self.frequencies
        )
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


def kept_or_recomputed(recompute, layer, *inputs):
    """layer(*inputs); with `recompute` its insides are forgotten, and computed again when the gradient needs them."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class VisionLayer(nn.Module):
    """A SigLIP layer: LayerNorm, full attention within the image, gelu MLP."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vit_heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.vit_width, eps=1e-6) for _ in range(2))
        self.self_attn = nn.ModuleDict(
            {
                name: nn.Linear(c.vit_width, c.vit_width)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            }
        )
        self.mlp = GeluMLP(c.vit_width, c.vit_mlp, c.vit_width)

    def forward(self, x, mask):
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + self.self_attn["out_proj"](
            F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """SigLIP without its last layer: the patches of images -> features, both row-major."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(3 * c.vit_patch**2, c.vit_width),
                "position_embedding": nn.Embedding(c.vit_grid**2, c.vit_width),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(c) for _ in range(c.vit_layers))}
        )
        self.post_layernorm = nn.LayerNorm(c.vit_width, eps=1e-6)

    def forward(self, patches, ids, mask=None, recompute=False):
        """patches (B, n, 3 * patch²), ids (n,) or (B, n) in the position table -> (B, n, width).

        mask   (B, 1, 1, n) added to the scores: a large negative number hides padding; None where there is none
        """
        x = self.embeddings["patch_embedding"](patches) + self.embeddings["position_embedding"](ids)
        for layer in self.encoder["layers"]:
            x = kept_or_recomputed(recompute, layer, x, mask)
        return self.post_layernorm(x)


def rotate(x, rope):
    """Rotary positions, "rotate half" layout: x (B, heads, N, d), rope = (cos, sin), each (B, 1, N or 1, d)."""
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

    def joined(self, name, und, gen):
        """Queries, keys or values of und (B, U, H) and gen (B, G, H) tokens, side by side: (B, heads, U + G, d)."""
        parts = [
            getattr(self, f"{name}_proj{expert}")(x).unflatten(-1, (-1, self.head))
            for x, expert in ((und, ""), (gen, GEN))
        ]
        if name != "v":
            parts = [
                getattr(self, f"{name}_norm{expert}")(x) for x, expert in zip(parts, ("", GEN))
            ]
        return torch.cat(parts, 1).transpose(1, 2)


class Layer(nn.Module):
    """One transformer layer with two experts: every weight exists twice, the attention is over all tokens."""

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        for expert in ("", GEN):
            self.add_module(f"mlp{expert}", SwiGLU(c.width, c.mlp))
            self.add_module(f"input_layernorm{expert}", RMSNorm(c.width, c.eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(c.width, c.eps))

    def forward(self, und, gen, rope, attend, needed="all"):
        """Tokens ordered by expert, und (B, U, H) first, then gen (B, G, H) -> (und, gen).

        rope     (cos, sin) of the U + G tokens
        attend   (query, key, value), each (B, heads, U + G, d), the key after norm and rotation -> like query; decides
                 who sees whom, and keeps keys and values where they are needed again
        needed   tokens whose result is used: "all", "gen", or "none" (keys and values only): the last layer spares the
                 others the MLP, and they come back as they are
        """
        a, split = self.self_attn, und.shape[1]
        u, g = self.input_layernorm(und), self.input_layernorm_moe_gen(gen)
        key, value = rotate(a.joined("k", u, g), rope), a.joined("v", u, g)
        if needed == "none":
            attend(None, key, value)
            return und, gen
        y = attend(rotate(a.joined("q", u, g), rope), key, value).transpose(
            1, 2
        )  # (B, N, heads, d)
        gen = gen + a.o_proj_moe_gen(y[:, split:].flatten(2))
        gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        if needed == "all":
            und = und + a.o_proj(y[:, :split].flatten(2))
            und = und + self.mlp(self.post_attention_layernorm(und))
        return und, gen


# ---------------------------------------------------------------- the network


class Bagel(nn.Module):
    """The network of the checkpoint, its modules named as the checkpoint's keys."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.language_model = nn.ModuleDict(
            {
                "model": nn.ModuleDict(
                    {
                        "embed_tokens": nn.Embedding(c.vocabulary, c.width),
                        "layers": nn.ModuleList(Layer(c) for _ in range(c.layers)),
                        "norm": RMSNorm(c.width, c.eps),
                        "norm" + GEN: RMSNorm(c.width, c.eps),
                    }
                ),
                "lm_head": nn.Linear(c.width, c.vocabulary, bias=False),
            }
        )  # BAGEL can write; a simulator never does
        self.vit_model = nn.ModuleDict({"vision_model": VisionTransformer(c)})
        self.connector = GeluMLP(c.vit_width, c.width, c.width)
        self.vit_pos_embed = PositionTable(c.vit_grid, c.width, c.settings.learned_places)
        self.latent_pos_embed = PositionTable(c.latent_grid, c.width, c.settings.learned_places)
        self.time_embedder = TimeEmbedder(c.width)
        self.vae2llm, self.llm2vae = (
            nn.Linear(c.latent_numbers, c.width),
            nn.Linear(c.width, c.latent_numbers),
        )
        if c.settings.motion_to_target:
            self.motion2llm = nn.Linear(c.width, c.width)
        if c.settings.learned_places:
            self.image_number = nn.Embedding(MAX_IMAGES, c.width)
        self.markers = (
            0,
            1,
        )  # ids of <|vision_start|>, <|vision_end|>; WorldModel asks its tokenizer
        self.recompute = False  # activation checkpointing of every layer, the ViT's too

    @property
    def blocks(self):
        """The modules that FSDP gathers one at a time."""
        return [
            *self.language_model["model"]["layers"],
            *self.vit_model["vision_model"].encoder["layers"],
        ]

    @property
    def dtype(self):
        """What the arithmetic runs in. FSDP's bf16 copies of fp32 weights have it while a forward pass runs."""
        return self.vae2llm.weight.dtype

    @property
    def device(self):
        return self.vae2llm.weight.device

    # ---- the layers

    def rope(self, positions):
        """RoPE positions (B, N) or (B, 1), on the CPU -> (cos, sin), each (B, 1, N, d); the angles are fp32."""
        head = self.config.width // self.config.heads
        frequencies = self.config.rope_base ** (
            -torch.arange(0, head, 2, device=self.device) / head
        )
        angle = positions.to(self.device)[:, None, :, None] * frequencies
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def run(self, und, gen, rope, attends, needed):
        """Through all layers, `attends` holding one function each -> (und, gen); only what is `needed` is right."""
        layers = self.language_model["model"]["layers"]
        for i, (layer, attend) in enumerate(zip(layers, attends)):
            und, gen = kept_or_recomputed(
                self.recompute,
                layer,
                und,
                gen,
                rope,
                attend,
                needed if i == len(layers) - 1 else "all",
            )
        return und, gen

    def output(self, gen):
        """The last layer's latent tokens -> the network's prediction (B, n, C)."""
        return self.llm2vae(self.language_model["model"]["norm" + GEN](gen)).float()

    def write(self, und):
        """The last layer's und tokens -> logits of the next word (B, U, V)."""
        return self.language_model["lm_head"](self.language_model["model"]["norm"](und)).float()

    # ---- training: a whole pack at once

    def forward(self, pack):
        """lib/packing.Pack -> the network's prediction at every latent token (B, G, C); see `pack.target`."""
        return self.output(self.hidden(pack, needed="gen")[1])

    def hidden(self, pack, needed="all"):
        """What the last layer gives for the tokens of a pack: und (B, U, H), gen (B, G, H)."""
        und, gen = self.embed(pack)
        attend = attention(pack.tokens, pack.tokens, self.device, self.dtype)
        return self.run(
            und, gen, self.rope(pack.tokens.position), [attend] * self.config.layers, needed
        )

    def embed(self, pack):
        """The embeddings of a pack: und (B, U, H) and gen (B, G, H), with x_t = (1 - t) x0 + t eps (t = 0: clean)."""
        t = pack.t[pack.image][..., None]  # (B, G, 1)
        x = (1 - t) * pack.latents + t * pack.noise
        each = self.time_embedder(pack.t)  # (I, H)
        if self.config.settings.learned_places:
            each = (
                each + self.image_number(pack.numbers.clamp(min=0)) * (pack.numbers >= 0)[:, None]
            )
        if self.config.settings.motion_to_target:
            words = (self.embed_text(pack.said) * pack.said_mask[..., None].to(self.dtype)).sum(1)
            each = each + self.motion2llm(words) * (pack.numbers < 0)[:, None]
        gen = (
            self.vae2llm(x.to(self.dtype))
            + each[pack.image]
            + self.latent_pos_embed(pack.latent_ids).to(self.dtype)
        )
        und, vit = self.embed_text(pack.ids), self.embed_vit(pack.patches, pack.patch_ids)
        if self.config.settings.learned_places:
            vit = vit + self.image_number(pack.patch_numbers)[:, None]
        where = pack.patch_ids.flatten() >= 0
        # A pack without any picture holds one of padding alone, so that every rank of FSDP runs the ViT once.
        flat = (
            und.flatten(0, 1).index_copy(0, pack.patch_places, vit.flatten(0, 1)[where])
            + 0 * vit.mean()
        )
        return flat.view_as(und), gen

    # ---- embeddings: every kind of token -> (B, tokens, H)

    def embed_text(self, ids):
        return self.language_model["model"]["embed_tokens"](ids)

    def embed_markers(self, batch):
        """The two tokens around every image: (batch, 2, H)."""
        return self.embed_text(torch.tensor(self.markers, device=self.device)).expand(batch, -1, -1)

    def embed_vit(self, patches, ids):
        """patches (B, n, 3 * patch²) of pictures in [-1, 1], ids (n,) or (B, n) in the tables, -1 = padding."""
        # -1e4, not -inf or the least number: kernels multiply by log2(e), and a row without a picture sees nothing else
        mask = (
            None
            if ids.dim() == 1
            else torch.zeros(ids.shape, device=ids.device, dtype=self.dtype).masked_fill_(
                ids < 0, -1e4
            )[:, None, None]
        )
        ids = ids.clamp(min=0)
        features = self.vit_model["vision_model"](patches.to(self.dtype), ids, mask, self.recompute)
        return self.connector(features) + self.vit_pos_embed(ids).to(self.dtype)

    def embed_motion(self, ids, lengths):
        """The sentence in one vector (R, H), its words summed without <|im_start|> and <|im_end|>."""
        if not self.config.settings.motion_to_target:
            return self.no_motion()[0]
        place = torch.arange(ids.shape[1])
        words = ((place > 0) & (place < lengths[:, None] - 1)).to(ids.device)
        return self.motion2llm((self.embed_text(ids) * words[..., None]).sum(1))

    def no_motion(self):
        """What `embed_motion` gives for an empty sentence, (1, 1, H); zeros where the departure is off."""
        if not self.config.settings.motion_to_target:
            return torch.zeros_like(self.vae2llm.bias)[None, None]
        return self.motion2llm.bias[None, None]

    # ---- inference: the context once into a memory, then the target step by step

    def memory(self, rows, capacity, room=0):
        """An empty Memory for R rows that read `capacity` tokens, with `room` for a target on both sides."""
        return Memory(self.config, rows, capacity, room, self.vae2llm.weight.detach())

    def length_of(self, part):
        """How many tokens an image (latent, ViT pixels) or a text (ids, lengths) takes in a memory."""
        a, b = part
        if a is not None and a.dim() == 2:
            return a.shape[1]
        sizes = ((a, LATENT_PATCH), (b, self.config.vit_patch))
        return sum(
            x.shape[-2] // side * (x.shape[-1] // side) + 2 for x, side in sizes if x is not None
        )

    def read_images(self, memory, images):
        """Context images into a memory: a list of (latent (R, c, 2 h, 2 w), ViT pixels (R, 3, H, W)), either or None.

        Each latent and each ViT image takes one position. Sizes may differ from image to image, not from row to row.
        """
        rows, order, und, gen, und_order, gen_order = len(memory.next), 0, [], [], [], []
        zero, marker = (
            self.time_embedder(torch.zeros(1, device=self.device)),
            self.embed_markers(rows),
        )
        for i, (latent, pixels) in enumerate(images):
            number = self.image_number.weight[i] if self.config.settings.learned_places else 0
            if latent is not None:
                grid = token_grid(latent)
                ids = table_ids(grid, self.config.latent_grid).to(self.device)
                tokens = self.vae2llm(patchify(latent, LATENT_PATCH).to(self.dtype))
                gen.append(tokens + (zero + self.latent_pos_embed(ids).to(self.dtype) + number))
                und.append(marker)
                und_order, gen_order, order = (
                    und_order + [order] * 2,
                    gen_order + [order] * len(ids),
                    order + 1,
                )
            if pixels is not None:
                grid = [side // self.config.vit_patch for side in pixels.shape[-2:]]
                ids = table_ids(grid, self.config.vit_grid).to(self.device)
                und += [
                    marker[:, :1],
                    self.embed_vit(patchify(pixels, self.config.vit_patch), ids) + number,
                    marker[:, 1:],
                ]
                und_order, order = und_order + [order] * (len(ids) + 2), order + 1
        positions = memory.next[:, None] + torch.tensor(und_order + gen_order)
        gen = torch.cat(gen, 1) if gen else marker[:, :0]
        self.run(
            torch.cat(und, 1), gen, self.rope(positions), memory.extend(positions), needed="none"
        )
        memory.next = memory.next + order

    def read_text(self, memory, ids, lengths, needed="none"):
        """Texts ids (R, L), right-padded, `lengths` (R,) on the CPU, into a memory; returns und (R, L, H) if needed."""
        place = torch.arange(ids.shape[1])
        positions = torch.where(place < lengths[:, None], memory.next[:, None] + place, HIDDEN)
        und = self.embed_text(ids)
        und, _ = self.run(und, und[:, :0], self.rope(positions), memory.extend(positions), needed)
        memory.next = memory.next + lengths
        return und

    def denoise(self, x, extra, markers, rope, branches):
        """The last layer's latent tokens (R * branches, n, H) for noisy latents x (R * branches, n, C), by branch.

        extra     what is added to the embedded latents: time, place, motion; (R * branches or 1, n, H)
        markers   (R * branches, 2, H);   rope: of one token per row;   branches: what each sees (`Branch`)
        """
        gen = self.vae2llm(x.to(self.dtype)) + extra

        def attending(layer):
            def attend(q, k, v):
                parts = zip(branches, *(part.chunk(len(branches)) for part in (q, k, v)))
                return torch.cat([branch.attend(layer, *part) for branch, *part in parts])

            return attend

        attends = [attending(layer) for layer in range(self.config.layers)]
        return self.run(markers, gen, rope, attends, needed="gen")[1]


def token_grid(latent):
    """(h, w): the latent tokens of a latent (B, c, 2 h, 2 w)."""
    return latent.shape[-2] // LATENT_PATCH, latent.shape[-1] // LATENT_PATCH
