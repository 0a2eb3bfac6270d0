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

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HIDDEN = 2**30  # the order of a key that no query may see


# ---- who sees whom -------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """What is known of each token of B sequences, (B, N) integers each; see the top of this file."""

    position: Tensor
    order: Tensor
    sample: Tensor
    group: Tensor

    @classmethod
    def plain(cls, position: Tensor) -> "Tokens":
        """One sample, nothing private, and the position is the order: a context as inference reads it."""
        return cls(position, position, torch.zeros_like(position), torch.zeros_like(position))

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(*(numbers.to(device, non_blocking=True) for numbers in self))


def sees(order, key_order, sample, key_sample, group, key_group):
    """The rule, for one query and one key or for tensors of them that broadcast."""
    return (sample == key_sample) & (key_order <= order) & ((key_group == 0) | (key_group == group))


def sight(queries: Tokens, keys: Tokens) -> Tensor:
    """(B, N, K) bool: what each query sees of each key."""
    q = Tokens(*(numbers[:, :, None] for numbers in queries))
    k = Tokens(*(numbers[:, None, :] for numbers in keys))
    return sees(q.order, k.order, q.sample, k.sample, q.group, k.group)


def dense_attention(queries: Tokens, keys: Tokens, dtype: torch.dtype) -> Callable:
    """A function (q, k, v) -> y by SDPA with a mask over all pairs, or without one where all see all."""
    visible = sight(queries, keys)
    mask = None
    if not visible.all():
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]
    return partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)


def flex_attention_for(queries: Tokens, keys: Tokens, compiled: bool = True) -> Callable:
    """The same function by flex attention: blocks of 128 x 128 pairs that see nothing are never computed.

    No mask over all pairs exists at any time: the rule is evaluated inside the kernel.
    compiled   False evaluates the same rule without a compiler (tests; it is slow and dense)
    """
    _, order, sample, group = queries
    _, key_order, key_sample, key_group = keys

    def rule(b, head, q, k):
        return sees(
            order[b, q],
            key_order[b, k],
            sample[b, q],
            key_sample[b, k],
            group[b, q],
            key_group[b, k],
        )

    make_blocks, kernel = create_block_mask, flex_attention
    if compiled:
        make_blocks, kernel = compiled_once(make_blocks), compiled_once(kernel)
    counts = (order.shape[1], key_order.shape[1])
    blocks = make_blocks(rule, len(order), None, *counts, device=order.device)
    return partial(kernel, block_mask=blocks, enable_gqa=True)


@cache
def compiled_once(function: Callable) -> Callable:
    """torch.compile of a function, once per process, for any length.

    Each kind of call (one row or several, with a gradient or without, ...) is compiled for itself, seven or eight in
    all. Beyond dynamo's own limit, 8, a call would fall back, unsaid, to scores that fill the memory: here it fails.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


def attention(queries: Tokens, keys: Tokens, device: torch.device, dtype: torch.dtype) -> Callable:
    """What `queries` see of `keys` (Tokens) as a function (q, k, v) -> y.

    q (B, heads, N, d), k and v (B, kv_heads, K, d), y like q. Flex attention on a GPU, a masked SDPA elsewhere.
    """
    if device.type == "cuda":
        return flex_attention_for(queries.to(device), keys.to(device))
    return dense_attention(queries, keys, dtype)


# ---- segments ------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Token ids with their <|im_start|> and <|im_end|>. Without `keep` (condition dropout) it is gone without a trace."""

    ids: list
    group: int = 0
    keep: bool = True


class View(NamedTuple):
    """A picture as the ViT takes it. Without `keep` its position stays empty."""

    patches: Tensor  # (n, 3 * patch²)
    grid: tuple  # (h, w), n = h w
    number: int = 0  # which context image it is (Settings.learned_places)
    group: int = 0
    keep: bool = True


class Latent(NamedTuple):
    """A picture as latent tokens x_t = (1 - t) x0 + t eps: clean at t = 0, a target of the loss at any other time."""

    x_t: Tensor  # (n, C)
    grid: tuple
    number: int = 0
    group: int = 0
    keep: bool = True
    t: float = 0.0
    motion_ids: list = []  # the words that command a target (Settings.motion_to_target)


class Pack(NamedTuple):
    """B packed sequences of U und tokens and G gen tokens, padded; I_v ViT pictures, I latent pictures in all."""

    tokens: Tokens  # (B, U + G), on the CPU
    ids: Tensor  # (B, U) word ids; 0 where a ViT feature stands
    patches: Tensor  # (I_v, L, 3 * patch²) padded to the longest
    patch_ids: Tensor  # (I_v, L) row * grid + column; -1 for padding
    patch_numbers: Tensor  # (I_v,) which context image
    patch_places: Tensor  # (sum of lengths,) where ViT features go among B * U
    x_t: Tensor  # (B, G, C)
    latent_ids: Tensor  # (B, G) row * grid + column
    image: Tensor  # (B, G) which of the I latent pictures
    target: Tensor  # (B, G) bool: a token that the loss is about
    t: Tensor  # (I,) fp32
    numbers: Tensor  # (I,) which context image; -1 for a target
    motion_ids: Tensor  # (I, W) the words that command a target, 0 for padding
    motion_mask: Tensor  # (I, W) bool: a word

    def to(self, device: torch.device) -> "Pack":
        """The pack on a device; `tokens` stay on the CPU, unless FSDP moves them: masks are decided where they are."""
        return Pack(self.tokens, *(x.to(device, non_blocking=True) for x in self[1:]))


# ---- packing -------------------------------------------------------------------------------------------------------------


class Sequence:
    """One sequence in the making. A row is what `Tokens` knows of a token: (position, order, sample, group)."""

    def __init__(self, markers):
        self.markers = markers
        self.samples = 0
        self.ids = []  # of the und tokens
        self.und = []  # their rows
        self.gen = []  # the rows of the gen tokens
        self.views = []  # (View, where its features begin among the und tokens)
        self.latents = []

    def add_sample(self, segments):
        """Append the segments of one more sample."""
        next_position = {0: 0}  # of each group
        order = 0
        for segment in segments:
            position = next_position.setdefault(segment.group, next_position[0])
            is_text = isinstance(segment, Text)
            if is_text and not segment.keep:
                continue
            length = len(segment.ids) if is_text else 1
            next_position[segment.group] = position + length
            if segment.keep:
                self.add_segment(segment, position, order)
                order += length
        self.samples += 1

    def add_segment(self, segment, position, order):
        """Append a segment that is there."""
        row = (position, order, self.samples, segment.group)
        if isinstance(segment, Text):
            for i, word in enumerate(segment.ids):
                self.ids.append(word)
                self.und.append((position + i, order + i, *row[2:]))
            return
        features = 0
        if isinstance(segment, View):
            features = len(segment.patches)
            self.views.append((segment, len(self.ids) + 1))
        else:
            self.latents.append(segment)
            self.gen += [row] * len(segment.x_t)
        start, end = self.markers
        self.ids += [start, *[0] * features, end]
        self.und += [row] * (features + 2)


def table_ids(grid: tuple, columns: int) -> Tensor:
    """Which row of a position table each token of a picture takes: (h * w,) = row * columns + column."""
    return (torch.arange(grid[0])[:, None] * columns + torch.arange(grid[1])).flatten()


def pack(sequences: list, markers: tuple, config) -> Pack:
    """Sequences -> Pack. A sequence is a list of samples, a sample a list of Text, View and Latent segments in order.

    markers   ids of <|vision_start|> and <|vision_end|>;   config: lib/bagel.Config, for the sides of position tables
    Every sequence needs a picture as latents (the target of the loss).
    """
    rows, views, places, latents = [], [], [], []
    for samples in sequences:
        row = Sequence(markers)
        for segments in samples:
            row.add_sample(segments)
        rows.append(row)
        latents += row.latents
    und = max(len(row.ids) for row in rows)
    for b, row in enumerate(rows):
        for view, first in row.views:
            views.append(view)
            places.append(b * und + first + torch.arange(len(view.patches)))
    lengths = torch.tensor([len(latent.x_t) for latent in latents])
    targets = torch.tensor([latent.t > 0 for latent in latents])
    words = [torch.tensor(latent.motion_ids, dtype=torch.long) for latent in latents]

    def by_sequence(values):  # (gen tokens of all, ...) -> (B, G, ...)
        return padded(values.split([len(row.gen) for row in rows]))

    tokens = torch.cat([padded_rows([r.und for r in rows]), padded_rows([r.gen for r in rows])], 1)
    patches, patch_ids = view_tensors(views, config)
    return Pack(
        tokens=Tokens(*tokens.unbind(-1)),
        ids=padded([torch.tensor(row.ids) for row in rows]),
        patches=patches,
        patch_ids=patch_ids,
        patch_numbers=torch.tensor([view.number for view in views] or [0]),
        patch_places=torch.cat(places) if views else torch.zeros(0, dtype=torch.long),
        x_t=by_sequence(torch.cat([latent.x_t for latent in latents])),
        latent_ids=by_sequence(torch.cat([table_ids(z.grid, config.latent_grid) for z in latents])),
        image=by_sequence(torch.arange(len(latents)).repeat_interleave(lengths)),
        target=by_sequence(targets.repeat_interleave(lengths)),
        t=torch.tensor([float(latent.t) for latent in latents]),
        numbers=torch.where(targets, -1, torch.tensor([latent.number for latent in latents])),
        motion_ids=padded(words),
        motion_mask=padded([torch.ones(len(ids), dtype=torch.bool) for ids in words]),
    )


def padded(tensors, fill=0):
    """Tensors (n, ...) -> (B, longest, ...)."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def padded_rows(lists):
    """The rows of B sequences -> (B, longest, 4). Padding sees padding and is seen by padding alone."""
    longest = max(map(len, lists))
    padding = (0, HIDDEN, -1, 0)
    return torch.tensor([rows + [padding] * (longest - len(rows)) for rows in lists])


def view_tensors(views, config):
    """The patches and patch_ids of a Pack; without any picture one of padding."""
    if not views:
        return torch.zeros(1, 1, 3 * config.vit_patch**2), torch.full((1, 1), -1)
    ids = [table_ids(view.grid, config.vit_grid) for view in views]
    return padded([view.patches for view in views]), padded(ids, -1)
