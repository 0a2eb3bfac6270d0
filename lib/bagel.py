"""
The network of BAGEL (arXiv 2505.14683), its modules named as the keys of the public checkpoint.

Two experts share every attention: "und" (text, ViT tokens, the markers around images) and "gen" (latents) have their
own norms, projections and MLP. The tokens of a sequence are ordered by expert, U und tokens first and then G gen
tokens, so that each expert works on one plain tensor; where a token stands in the sequence is told by its RoPE position
alone, and so is what it sees: a query sees the keys whose position is not larger than its own.

  segment          tokens                          experts             RoPE positions
  text             <|im_start|> words <|im_end|>   und                 one each, consecutive      (causal)
  ViT image        start, features, end            und                 one for all of them        (bidirectional)
  VAE image, t = 0 start, latents, end             und, gen..., und    one for all of them
  target, noisy    start, latents, end             und, gen..., und    the last one of all        (seen by itself)

Shapes: B contexts, R rows (a row = one target of one context), N = U + G tokens, K keys in a cache, H width, d head
width; grid (h, w) latent tokens of an image, n = h w; C numbers per latent token. Positions and lengths live on the
CPU, so that masks are decided without waiting for the device.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lib.bagel_files import patchify

GEN = "_moe_gen"                # what the generation expert's modules are called after the understanding expert's
HIDDEN = 2**30                  # the position of a key that no query may see
LATENT_PATCH = 2                # latent cells per token and side
MAX_IMAGES = 8                  # context images that Settings.learned_places can number


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
    latent: str = "flux"                            # "flux", or "pixels": no autoencoder (lib/bagel_files.PixelLatents)
    vae_limits: tuple = (1024, 512, 16)             # (max_side, min_side, stride) of the pictures, pixels
    vit_limits: tuple = (980, 224, 14)
    # the sampler; BAGEL's numbers for editing
    steps: int = 49                                 # network evaluations ("50 timesteps" in the original)
    shift: float = 3.0                              # > 1 spends more of them near noise
    text_scale: float = 4.0                         # guidance away from "no sentence"; 1 = no guidance at all
    image_scale: float = 2.0                        # guidance away from "no images"; 1 = off
    renorm: str = "text_channel"                    # "text_channel", "channel" or "global"
    renorm_min: float = 0.0
    interval: tuple = (0.0, 1.0)                    # guide only while low < t <= high


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
    vit_patch: int              # pixels
    vit_grid: int               # ViT patches per side that have a position
    latent_grid: int            # latent tokens per side that have a position
    latent_numbers: int         # numbers per latent token
    settings: Settings

    @classmethod
    def read(cls, llm, vit, astra, vocabulary, latent_grid, latent_numbers):
        """From the json files' contents (dicts); the last three are read off tensors by `WorldModel.load`."""
        return cls(width=llm["hidden_size"], layers=llm["num_hidden_layers"], heads=llm["num_attention_heads"],
                   kv_heads=llm["num_key_value_heads"], mlp=llm["intermediate_size"], vocabulary=vocabulary,
                   eps=llm["rms_norm_eps"], rope_base=llm.get("rope_theta", 1e6), vit_width=vit["hidden_size"],
                   vit_layers=vit["num_hidden_layers"] - 1,         # BAGEL drops the last one
                   vit_heads=vit["num_attention_heads"], vit_mlp=vit["intermediate_size"], vit_patch=vit["patch_size"],
                   vit_grid=vit["image_size"] // vit["patch_size"], latent_grid=latent_grid,
                   latent_numbers=latent_numbers,
                   settings=Settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in astra.items()}))


# ---------------------------------------------------------------- parts

class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics in fp32, the rest in x's own type."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = t.float()[:, None] * 10_000.0 ** (-torch.arange(self.frequencies, device=t.device) / self.frequencies)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1).to(self.mlp[0].weight.dtype))


class PositionTable(nn.Module):
    """Fixed sin-cos table (grid * grid, H): row r * grid + c holds [s(c), s(r)], s(x) = [sin(x w_k), cos(x w_k)].

    learned   a table of that shape that is trained (Settings.learned_places)
    """

    def __init__(self, grid, width, learned):
        super().__init__()
        w = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        angle = torch.arange(grid, dtype=torch.float64)[:, None] * w
        s = torch.cat([angle.sin(), angle.cos()], -1)                                        # (grid, H / 2)
        table = torch.cat([s[None].expand(grid, -1, -1), s[:, None].expand(-1, grid, -1)], -1)
        self.grid = grid
        table = table.reshape(grid * grid, width).float()
        self.pos_embed = nn.Parameter(table) if learned else nn.Buffer(table)

    def forward(self, rows, columns):
        """(rows * columns, H): the top left corner of the table; it is not stretched to the picture."""
        return self.pos_embed.view(self.grid, self.grid, -1)[:rows, :columns].flatten(0, 1)


class VisionLayer(nn.Module):
    """A SigLIP layer: LayerNorm, full attention within the image, gelu MLP."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vit_heads
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.vit_width, eps=1e-6) for _ in range(2))
        self.self_attn = nn.ModuleDict({name: nn.Linear(c.vit_width, c.vit_width)
                                        for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = GeluMLP(c.vit_width, c.vit_mlp, c.vit_width)

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn["out_proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """SigLIP without its last layer: pixels (B, 3, h * patch, w * patch) -> features (B, h * w, width), row-major."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.grid = c.vit_patch, c.vit_grid
        self.embeddings = nn.ModuleDict({"patch_embedding": nn.Linear(3 * c.vit_patch**2, c.vit_width),
                                         "position_embedding": nn.Embedding(c.vit_grid**2, c.vit_width)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(c) for _ in range(c.vit_layers))})
        self.post_layernorm = nn.LayerNorm(c.vit_width, eps=1e-6)

    def forward(self, pixels):
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        ids = torch.arange(self.grid**2, device=pixels.device).view(self.grid, self.grid)[:rows, :columns].flatten()
        x = self.embeddings["patch_embedding"](patchify(pixels, self.patch))
        x = x + self.embeddings["position_embedding"](ids)
        for layer in self.encoder["layers"]:
            x = layer(x)
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

    def joined(self, name, und, gen):
        """Queries, keys or values of und (B, U, H) and gen (B, G, H) tokens, side by side: (B, heads, U + G, d)."""
        parts = [getattr(self, f"{name}_proj{expert}")(x).unflatten(-1, (-1, self.head))
                 for x, expert in ((und, ""), (gen, GEN))]
        if name != "v":
            parts = [getattr(self, f"{name}_norm{expert}")(x) for x, expert in zip(parts, ("", GEN))]
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

    def forward(self, und, gen, rope, mask, past, needed="all"):
        """Tokens ordered by expert, und (B, U, H) first, then gen (B, G, H) -> (und, gen, key, value).

        rope    (cos, sin) of the U + G tokens;   mask (B, 1, N, K + N) added to the scores, or None: all see all
        past    (key, value) each (B, kv_heads, K, d) of what stands before, or None
        needed  tokens whose result is used: "all", "gen" or "none" (keys and values only). In the last layer the others
                need no query and no MLP; they come back as they are.
        key, value (B, kv_heads, U + G, d) of these tokens: the key after norm and rotation, as caches hold it.
        """
        a, skip = self.self_attn, 0 if needed == "all" else und.shape[1]
        u, g = self.input_layernorm(und), self.input_layernorm_moe_gen(gen)
        key, value = rotate(a.joined("k", u, g), rope), a.joined("v", u, g)
        if needed == "none":
            return und, gen, key, value
        query = rotate(a.joined("q", u[:, skip:], g), [part[:, :, skip:] for part in rope])
        keys, values = (key, value) if past is None else (torch.cat(pair, 2) for pair in zip(past, (key, value)))
        y = F.scaled_dot_product_attention(query, keys, values, None if mask is None else mask[:, :, skip:],
                                           enable_gqa=keys.shape[1] != query.shape[1])
        y = y.transpose(1, 2).flatten(2)                                                     # (B, N, heads * d)
        gen = gen + a.o_proj_moe_gen(y[:, und.shape[1] - skip:])
        gen = gen + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(gen))
        if needed == "all":
            und = und + a.o_proj(y[:, :und.shape[1]])
            und = und + self.mlp(self.post_attention_layernorm(und))
        return und, gen, key, value


@dataclass
class Cache:
    """Keys and values of a stretch of context, one (B, kv_heads, K, d) pair per layer.

    positions  (B, K) RoPE position of every key, on the CPU; HIDDEN where a row has no such token
    next       (B,) the position after it, on the CPU
    """

    layers: list
    positions: torch.Tensor
    next: torch.Tensor

    def rows(self, index):
        """The cache of rows `index` (R,), repeats allowed: several targets share one context."""
        here = index.to(self.layers[0][0].device)
        layers = [(k.index_select(0, here), v.index_select(0, here)) for k, v in self.layers]
        return Cache(layers, self.positions[index], self.next[index])

    def then(self, other):
        """This cache followed by `other`, which was computed after it."""
        layers = [tuple(torch.cat(pair, 2) for pair in zip(a, b)) for a, b in zip(self.layers, other.layers)]
        return Cache(layers, torch.cat([self.positions, other.positions], 1), other.next)

    def hidden(self, next=None):
        """The same keys, seen by nobody; what follows stands at position `next` (default 0)."""
        next = torch.zeros_like(self.next) if next is None else next
        return Cache(self.layers, torch.full_like(self.positions, HIDDEN), next)


def stacked(caches):
    """Caches of equal length below one another: (B, ...) each -> (len(caches) * B, ...)."""
    layers = [tuple(torch.cat(part) for part in zip(*pairs)) for pairs in zip(*(cache.layers for cache in caches))]
    return Cache(layers, torch.cat([c.positions for c in caches]), torch.cat([c.next for c in caches]))


# ---------------------------------------------------------------- the network

class Bagel(nn.Module):
    """The network of the checkpoint, its modules named as the checkpoint's keys.

    Who sees whom, in one line: a query sees a key whose RoPE position is not larger. All tokens of an image segment
    share one position and the words of a text have one each, so images are bidirectional inside, text is causal, and
    both see all that stands before. A noisy target has the last position: nothing sees it but itself.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.language_model = nn.ModuleDict({
            "model": nn.ModuleDict({
                "embed_tokens": nn.Embedding(c.vocabulary, c.width),
                "layers": nn.ModuleList(Layer(c) for _ in range(c.layers)),
                "norm": RMSNorm(c.width, c.eps), "norm" + GEN: RMSNorm(c.width, c.eps)}),
            "lm_head": nn.Linear(c.width, c.vocabulary, bias=False)})   # BAGEL can write; a simulator never does
        self.vit_model = nn.ModuleDict({"vision_model": VisionTransformer(c)})
        self.connector = GeluMLP(c.vit_width, c.width, c.width)
        self.vit_pos_embed = PositionTable(c.vit_grid, c.width, c.settings.learned_places)
        self.latent_pos_embed = PositionTable(c.latent_grid, c.width, c.settings.learned_places)
        self.time_embedder = TimeEmbedder(c.width)
        self.vae2llm, self.llm2vae = nn.Linear(c.latent_numbers, c.width), nn.Linear(c.width, c.latent_numbers)
        if c.settings.motion_to_target:
            self.motion2llm = nn.Linear(c.width, c.width)
        if c.settings.learned_places:
            self.image_number = nn.Embedding(MAX_IMAGES, c.width)
        self.markers = (0, 1)           # ids of <|vision_start|>, <|vision_end|>; WorldModel asks its tokenizer

    @property
    def blocks(self):
        """The modules that FSDP gathers one at a time."""
        return [*self.language_model["model"]["layers"], *self.vit_model["vision_model"].encoder["layers"]]

    # ---- embeddings: every kind of token -> (B, tokens, H)

    def embed_text(self, ids):
        return self.language_model["model"]["embed_tokens"](ids)

    def embed_markers(self, batch):
        """The two tokens around every image: (batch, 2, H)."""
        return self.embed_text(torch.tensor(self.markers, device=self.vae2llm.weight.device)).expand(batch, -1, -1)

    def embed_latent(self, tokens, t, grid):
        """tokens (B, n, C), t (B,) or (1,), grid (h, w) with n = h w. Clean context images come with t = 0."""
        tokens = self.vae2llm(tokens.to(self.vae2llm.weight.dtype))
        return tokens + self.time_embedder(t)[:, None] + self.latent_pos_embed(*grid).to(tokens.dtype)

    def embed_vit(self, pixels):
        """pixels (B, 3, H, W) in [-1, 1] -> (B, tokens, H)."""
        rows, columns = (side // self.config.vit_patch for side in pixels.shape[-2:])
        tokens = self.connector(self.vit_model["vision_model"](pixels.to(self.vae2llm.weight.dtype)))
        return tokens + self.vit_pos_embed(rows, columns).to(tokens.dtype)

    def embed_target(self, x, t, grid, motion):
        """Noisy latents x (R, n, C) at times t (R,) -> (markers (R, 2, H), latent tokens (R, n, H))."""
        gen = self.embed_latent(x, t, grid)
        return self.embed_markers(len(x)), gen if motion is None else gen + motion[:, None].to(gen.dtype)

    def embed_motion(self, ids, lengths):
        """The sentence in one vector (R, H), its words summed without <|im_start|> and <|im_end|>; or None."""
        if not self.config.settings.motion_to_target:
            return None
        place = torch.arange(ids.shape[1])
        words = ((place > 0) & (place < lengths[:, None] - 1)).to(ids.device)
        return self.motion2llm((self.embed_text(ids) * words[..., None]).sum(1))

    def no_motion(self, motion):
        """What `embed_motion` gives for an empty sentence."""
        return None if motion is None else self.motion2llm.bias.expand_as(motion)

    # ---- the layers

    def layout(self, positions, past=None):
        """(rope, mask) of tokens at RoPE `positions` (B, N), a CPU tensor, behind a cache: everything the layers need.

        The mask is (B, 1, N, K + N), added to the attention scores, or None where all see all.
        """
        seen = positions if past is None else torch.cat([past.positions, positions], 1)
        mask = seen[:, None, None, :] <= positions[:, None, :, None]
        device, dtype = self.vae2llm.weight.device, self.vae2llm.weight.dtype
        mask = None if mask.all() else torch.where(mask, 0.0, -torch.inf).to(device, dtype)
        head = self.config.width // self.config.heads
        frequencies = self.config.rope_base ** (-torch.arange(0, head, 2, device=device) / head)
        angle = positions.to(device)[:, None, :, None] * frequencies                         # (B, 1, N, d / 2)
        angle = torch.cat([angle, angle], -1)
        return (angle.cos().to(dtype), angle.sin().to(dtype)), mask

    def run(self, und, gen, layout, past=None, needed="all"):
        """Through all layers -> (und, gen, [(key, value) of each]); of und and gen only what is `needed` is right."""
        (rope, mask), layers, pairs = layout, self.language_model["model"]["layers"], []
        for i, layer in enumerate(layers):
            und, gen, key, value = layer(und, gen, rope, mask, None if past is None else past.layers[i],
                                         needed if i == len(layers) - 1 else "all")
            pairs.append((key, value))
        return und, gen, pairs

    def output(self, gen):
        """The last layer's latent tokens -> the network's prediction (R, n, C)."""
        return self.llm2vae(self.language_model["model"]["norm" + GEN](gen)).float()

    # ---- what stands before the target: caches

    def read_images(self, images, past=None, keep=None):
        """Context images, I pairs (latent (B, c, 2 h, 2 w), ViT pixels (B, 3, H, W)) -> their Cache, behind `past`.

        The first takes positions 0 (VAE) and 1 (ViT), the next 2 and 3, ... counted from where `past` ends. Sizes may
        differ from image to image, not from row to row.
        keep    (B, 2 I) bool, on the CPU: segments that are False are seen by nobody (condition dropout), or None
        """
        batch, zero = len(images[0][0]), torch.zeros(1, device=self.vae2llm.weight.device)
        und, gen, und_positions, gen_positions = [], [], [], []
        for i, (latent, pixels) in enumerate(images):
            number = self.image_number.weight[i] if self.config.settings.learned_places else 0
            grid, vit, marker = token_grid(latent), self.embed_vit(pixels) + number, self.embed_markers(batch)
            und += [marker, marker[:, :1], vit, marker[:, 1:]]
            gen += [self.embed_latent(patchify(latent, LATENT_PATCH), zero, grid) + number]
            und_positions += [2 * i] * 2 + [2 * i + 1] * (vit.shape[1] + 2)
            gen_positions += [2 * i] * (grid[0] * grid[1])
        start = torch.zeros(batch, dtype=torch.long) if past is None else past.next
        segment = torch.tensor(und_positions + gen_positions)
        positions = start[:, None] + segment
        if keep is not None:
            positions = torch.where(keep[:, segment], positions, HIDDEN)
        layout = self.layout(positions, past)
        _, _, pairs = self.run(torch.cat(und, 1), torch.cat(gen, 1), layout, past, needed="none")
        return Cache(pairs, positions, start + 2 * len(images))

    def text_positions(self, lengths, size, start):
        """RoPE positions (R, size) of texts of `lengths` (R,) that begin at `start` (R,); padding is HIDDEN."""
        place = torch.arange(size)
        return torch.where(place < lengths[:, None], start[:, None] + place, HIDDEN)

    def read_text(self, ids, lengths, past=None):
        """Texts ids (R, L), right-padded, `lengths` (R,) on the CPU -> the Cache of the text alone, behind `past`."""
        start = torch.zeros_like(lengths) if past is None else past.next
        positions, und = self.text_positions(lengths, ids.shape[1], start), self.embed_text(ids)
        _, _, pairs = self.run(und, und[:, :0], self.layout(positions, past), past, needed="none")
        return Cache(pairs, positions, start + lengths)

    # ---- training

    def forward(self, images, owner, ids, lengths, x, t, grid, keep=None, other=None):
        """One training pass: every context is read once and shared by its targets. Returns the prediction (R, n, C).

        images, keep   as in `read_images`, B contexts;   owner (R,) CPU: the context of each row
        ids, lengths   the sentence of each row, as in `read_text`; length 0 = no sentence (condition dropout)
        x              (R, n, C) noisy latents of the targets at times t (R,), grid (h, w)
        other          (ids, lengths) of other sentences: a second prediction comes back, under them, without gradient
        """
        past = self.read_images(images, keep=keep).rows(owner)
        output = self.branch(past, ids, lengths, x, t, grid)
        if other is None:
            return output
        with torch.no_grad():
            return output, self.branch(past, *other, x, t, grid)

    def branch(self, past, ids, lengths, x, t, grid):
        """The rows' own part of `forward`: sentence and noisy target together, behind their contexts `past`."""
        markers, gen = self.embed_target(x, t, grid, self.embed_motion(ids, lengths))
        positions = torch.cat([self.text_positions(lengths, ids.shape[1], past.next),
                               (past.next + lengths)[:, None].expand(-1, 2 + x.shape[1])], 1)
        und = torch.cat([self.embed_text(ids), markers], 1)
        _, gen, _ = self.run(und, gen, self.layout(positions, past), past, needed="gen")
        return self.output(gen)


def token_grid(latent):
    """(h, w): the latent tokens of a latent (B, c, 2 h, 2 w)."""
    return latent.shape[-2] // LATENT_PATCH, latent.shape[-1] // LATENT_PATCH
