"""
Packed sequences: segments of text, ViT features and latents side by side, and who sees whom in them.

Training reads sequences of mixed sizes in one pass. A sequence is a list of segments of one or more samples, e.g.

  [VAE 1][ViT 1][VAE 2][ViT 2] ["turn left" [target a]] ["move 1 m forward" [target b]]     two branches, one context

Three numbers per token decide what a query sees, and one its RoPE angle:

  sample    samples of one sequence do not see each other
  order     counts text tokens and image segments: text is causal, an image sees all of itself and all before it
  group     0: seen by all that follows; k > 0: seen by group k alone (a noisy target, or a branch with its sentence)
  position  RoPE. A text token and an image segment take one each; a private group does not advance the shared count,
            so the clean copy that follows a noisy target stands at the same position

This is the original's rule for its three attention modes (causal, full, noise) and one thing more: a group
may hold a sentence, so several targets share one context. Tokens are ordered by expert, "und" first, then "gen".
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HIDDEN = 2**30  # the order of a key that no query may see


# ---------------------------------------------------------------- who sees whom


class Tokens(NamedTuple):
    """What is known of each token of B sequences, (B, N) integers each; see the top of this file."""

    position: torch.Tensor
    order: torch.Tensor
    sample: torch.Tensor
    group: torch.Tensor

    @classmethod
    def plain(cls, position):
        """One sample, nothing private, and the position is the order: a context as inference reads it."""
        return cls(position, position, torch.zeros_like(position), torch.zeros_like(position))

    def to(self, device):
        return Tokens(*(part.to(device, non_blocking=True) for part in self))


def sees(order, key_order, sample, key_sample, group, key_group):
    """The rule, for one query and one key or for tensors of them that broadcast."""
    return (sample == key_sample) & (key_order <= order) & ((key_group == 0) | (key_group == group))


def sight(queries, keys):
    """(B, N, K) bool: what each of the queries (Tokens) sees of the keys (Tokens)."""
    pairs = [part for q, k in zip(queries[1:], keys[1:]) for part in (q[:, :, None], k[:, None, :])]
    return sees(*pairs)


def dense_attention(queries, keys, dtype):
    """A function (q, k, v) -> y by SDPA with a mask over all pairs, or without one where all see all."""
    seen = sight(queries, keys)
    mask = (
        None
        if seen.all()
        else torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
    )

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def flex_attention_for(queries, keys, compiled=True):
    """The same function by flex attention: blocks of 128 x 128 pairs that see nothing are never computed.

    No mask over all pairs exists at any time: the rule is evaluated inside the kernel.
    compiled   False evaluates the same rule without a compiler (tests; it is slow and dense)
    """
    (_, order, sample, group), (_, key_order, key_sample, key_group) = queries, keys

    def rule(b, head, q, k):
        return sees(
            order[b, q],
            key_order[b, k],
            sample[b, q],
            key_sample[b, k],
            group[b, q],
            key_group[b, k],
        )

    make_blocks, kernel = (
        compiled_once(f) if compiled else f for f in (create_block_mask, flex_attention)
    )
    blocks = make_blocks(
        rule, len(order), None, order.shape[1], key_order.shape[1], device=order.device
    )

    def attend(q, k, v):
        return kernel(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return attend


@functools.cache
def compiled_once(function):
    """torch.compile of a function, once per process, for any length.

    Each kind of call (one row or several, with a gradient or without, ...) is compiled for itself, seven or eight in
    all. Beyond dynamo's own limit, 8, a call would fall back, unsaid, to scores that fill the memory: here it fails.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


def attention(queries, keys, device, dtype):
    """What `queries` see of `keys` (Tokens) as a function (q, k, v) -> y.

    q (B, heads, N, d), k and v (B, kv_heads, K, d), y like q. Flex attention on a GPU, a masked SDPA elsewhere.
    """
    if device.type == "cuda":
        return flex_attention_for(queries.to(device), keys.to(device))
    return dense_attention(queries, keys, dtype)


# ---------------------------------------------------------------- packing


class Text(NamedTuple):
    """Token ids with their <|im_start|> and <|im_end|>. A sentence that is not kept is gone without a trace."""

    ids: list
    group: int = 0
    keep: bool = True


class View(NamedTuple):
    """A picture as the ViT takes it: patches (n, 3 * patch²), grid (h, w). Not kept, its position stays empty."""

    patches: torch.Tensor
    grid: tuple
    number: int = 0  # which context image it is (Settings.learned_places)
    group: int = 0
    keep: bool = True


class Latent(NamedTuple):
    """A picture as latent tokens (n, C), grid (h, w): clean, or with `noise` (n, C) at time t > 0 a target."""

    tokens: torch.Tensor
    grid: tuple
    number: int = 0
    group: int = 0
    keep: bool = True
    t: float = 0.0
    noise: torch.Tensor = None
    said: tuple = ()  # the ids of the words that command it (Settings.motion_to_target)


class Pack(NamedTuple):
    """B packed sequences of U und tokens and G gen tokens, padded; I_v ViT pictures, I latent pictures in all."""

    tokens: Tokens  # (B, U + G), on the CPU
    ids: torch.Tensor  # (B, U) word ids; 0 where a ViT feature stands
    patches: torch.Tensor  # (I_v, L, 3 * patch²) padded to the longest
    patch_ids: torch.Tensor  # (I_v, L) row * grid + column; -1 for padding
    patch_numbers: torch.Tensor  # (I_v,) which context image
    patch_places: torch.Tensor  # (sum of lengths,) where ViT features go among B * U
    latents: torch.Tensor  # (B, G, C) clean
    noise: torch.Tensor  # (B, G, C)
    latent_ids: torch.Tensor  # (B, G) row * grid + column
    image: torch.Tensor  # (B, G) which of the I latent pictures
    t: torch.Tensor  # (I,) fp32
    numbers: torch.Tensor  # (I,) which context image; -1 for a target
    said: torch.Tensor  # (I, W) ids of the words that command it, 0 for padding
    said_mask: torch.Tensor  # (I, W) float
    target: torch.Tensor  # (B, G) bool: a token that the loss is about

    def to(self, device):
        """The pack on a device; `tokens` stay on the CPU, unless FSDP moves them: masks are decided where they are."""
        return Pack(self.tokens, *(part.to(device, non_blocking=True) for part in self[1:]))


class Sequence:
    """One sequence in the making; its und and gen tokens are rows (position, order, sample, group) of plain numbers."""

    def __init__(self):
        self.und, self.ids = [], []
        self.gen, self.latents, self.noise, self.latent_ids, self.image, self.target = (
            [],
            [],
            [],
            [],
            [],
            [],
        )

    def add_gen(self, s, rows, image, columns):
        """Append the tokens of Latent `s`, the picture number `image`; `columns`: those of the position table."""
        self.gen += rows
        self.latents.append(s.tokens)
        self.noise.append(torch.zeros_like(s.tokens) if s.noise is None else s.noise)
        self.latent_ids.append(table_ids(s.grid, columns))
        self.image += [image] * len(rows)
        self.target += [s.noise is not None] * len(rows)


def table_ids(grid, columns):
    """Which row of a position table each token of a picture takes: (h * w,) = row * columns + column."""
    return (torch.arange(grid[0])[:, None] * columns + torch.arange(grid[1])).flatten()


def pack(sequences, markers, config):
    """Sequences -> Pack. A sequence is a list of samples, a sample a list of Text, View and Latent segments in order.

    markers   ids of <|vision_start|> and <|vision_end|>;   config: lib/bagel.Config, for the sides of position tables
    Every sequence needs a picture as latents (the target of the loss).
    """
    made, views, places, pictures = [], [], [], []
    for samples in sequences:
        out = Sequence()
        for number, segments in enumerate(samples):
            positions, order = {0: 0}, 0  # the next RoPE position of each group
            for s in segments:
                position = positions.setdefault(s.group, positions[0])
                row = (position, order, number, s.group)
                if isinstance(s, Text):
                    if s.keep:
                        out.ids += s.ids
                        out.und += [
                            (position + i, order + i, number, s.group) for i in range(len(s.ids))
                        ]
                        positions[s.group], order = position + len(s.ids), order + len(s.ids)
                    continue
                positions[s.group] = position + 1
                if not s.keep:
                    continue
                if isinstance(s, View):
                    places.append((len(made), len(out.ids) + 1))
                    views.append(s)
                    between = [0] * len(s.patches)
                else:
                    out.add_gen(s, [row] * len(s.tokens), len(pictures), config.latent_grid)
                    pictures.append(s)
                    between = []
                ids = [markers[0], *between, markers[1]]
                out.ids += ids
                out.und += [row] * len(ids)
                order += 1
        made.append(out)
    return assembled(made, views, places, pictures, config)


def assembled(made, views, places, pictures, config):
    """Finished `Sequence`s and their pictures -> Pack: everything padded to the longest and joined."""

    def padded(parts, fill=0):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

    def numbers(lists):
        longest, nothing = (
            max(map(len, lists)),
            (0, HIDDEN, -1, 0),
        )  # padding sees padding, is seen by padding
        return torch.tensor([rows + [nothing] * (longest - len(rows)) for rows in lists])

    tokens = torch.cat(
        [numbers([s.und for s in made]), numbers([s.gen for s in made])], 1
    )  # (B, U + G, 4)
    width = max(len(s.ids) for s in made)
    where = [
        row * width + first + torch.arange(len(v.patches)) for (row, first), v in zip(places, views)
    ]
    words = [torch.tensor(p.said, dtype=torch.long) for p in pictures]
    words = padded([w if len(w) else torch.zeros(1, dtype=torch.long) for w in words])
    spoken = torch.arange(words.shape[1]) < torch.tensor([[len(p.said)] for p in pictures])
    nothing = torch.zeros(1, 1, 3 * config.vit_patch**2)  # no ViT picture at all: one of padding
    return Pack(
        tokens=Tokens(*tokens.unbind(-1)),
        ids=padded([torch.tensor(s.ids) for s in made]),
        patches=padded([v.patches for v in views]) if views else nothing,
        patch_ids=padded([table_ids(v.grid, config.vit_grid) for v in views], -1)
        if views
        else torch.full((1, 1), -1),
        patch_numbers=torch.tensor([v.number for v in views] or [0]),
        patch_places=torch.cat(where) if views else torch.zeros(0, dtype=torch.long),
        latents=padded([torch.cat(s.latents) for s in made]),
        noise=padded([torch.cat(s.noise) for s in made]),
        latent_ids=padded([torch.cat(s.latent_ids) for s in made]),
        image=padded([torch.tensor(s.image) for s in made]),
        t=torch.tensor([float(p.t) for p in pictures]),
        numbers=torch.tensor([-1 if p.noise is not None else p.number for p in pictures]),
        said=words,
        said_mask=spoken.float(),
        target=padded([torch.tensor(s.target) for s in made], False),
    )
