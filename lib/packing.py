"""
Packed sequences: segments of text, ViT features and latents side by side, and who sees whom in them.

Training reads sequences of mixed sizes in one pass. A sequence is a list of segments of one or more samples, e.g.

  [VAE 1][ViT 1][VAE 2][ViT 2] ["… to the left." [target a]] ["… to the right." [target b]]     two branches, one context

Three numbers per token decide what a query sees, and one its RoPE angle:

  sample    samples of one sequence do not see each other
  order     counts text tokens and image segments: text is causal, an image sees all of itself and all before it
  branch    0: seen by all that follows; k > 0: seen by branch k alone (a noisy target, maybe with its sentence)
  position  RoPE. A text token and an image segment take one each; a branch does not advance the shared count

This is the original's rule for its three attention modes (causal, full, noise) and one thing more: a branch
may hold a sentence, so several targets share one context. Tokens are ordered by expert, "und" first, then "gen".
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

NEVER_SEEN = 2**30  # the order, and in a context the position, of padding: later than any query


# ---- who sees whom -------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """What is known of each token of B sequences, (B, N) integers each, or of one token, integers: see the top."""

    position: Tensor
    order: Tensor
    sample: Tensor
    branch: Tensor

    @classmethod
    def plain(cls, position: Tensor) -> "Tokens":
        """One sample, nothing private, and the position is the order: a context as inference reads it."""
        return cls(position, position, torch.zeros_like(position), torch.zeros_like(position))

    def to(self, device: torch.device) -> "Tokens":
        return Tokens(*(numbers.to(device, non_blocking=True) for numbers in self))


def sees(order, sample, branch, key_order, key_sample, key_branch):
    """The rule, for one query and one key or for tensors of them that broadcast."""
    is_shared = (key_branch == 0) | (key_branch == branch)
    return (sample == key_sample) & (key_order <= order) & is_shared


def sight(queries: Tokens, keys: Tokens) -> Tensor:
    """(B, N, K) bool: what each query sees of each key."""
    q = Tokens(*(numbers[:, :, None] for numbers in queries))
    k = Tokens(*(numbers[:, None, :] for numbers in keys))
    return sees(*q[1:], *k[1:])


def dense_attention(queries: Tokens, keys: Tokens, dtype: torch.dtype) -> Callable:
    """A function (q, k, v) -> y by SDPA with a mask over all pairs, or without one where all see all."""
    visible = sight(queries, keys)
    mask = None
    if not visible.all():
        mask = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]
    return partial(F.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)


def flex_attention_for(queries: Tokens, keys: Tokens) -> Callable:
    """The same function by flex attention, its rule inside the kernel: blocks of 128 x 128 unseen pairs cost nothing."""
    _, order, sample, branch = queries
    _, key_order, key_sample, key_branch = keys

    def rule(b, head, q, k):
        query = (order[b, q], sample[b, q], branch[b, q])
        return sees(*query, key_order[b, k], key_sample[b, k], key_branch[b, k])

    counts = (order.shape[1], key_order.shape[1])
    make_blocks = compiled_once(create_block_mask)
    blocks = make_blocks(rule, len(order), None, *counts, device=order.device)
    return partial(compiled_once(flex_attention), block_mask=blocks, enable_gqa=True)


@cache
def compiled_once(function: Callable) -> Callable:
    """torch.compile of a function, once per process, for any length.

    Each kind of call (one row or several, with a gradient or without, ...) is compiled for itself, seven or eight in
    all. Beyond dynamo's own limit, 8, a call would fall back, unsaid, to scores that fill the memory: here it fails.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


def make_attention(queries: Tokens, keys: Tokens, like: Tensor) -> Callable:
    """What `queries` see of `keys` (Tokens) as a function (q, k, v) -> y of tensors on like's device, of its type.

    q (B, heads, N, d), k and v (B, kv_heads, K, d), y like q. Flex attention on a GPU, a masked SDPA elsewhere.
    """
    if like.is_cuda:
        return flex_attention_for(queries.to(like.device), keys.to(like.device))
    return dense_attention(queries, keys, like.dtype)


# ---- segments ------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Token ids with their <|im_start|> and <|im_end|>. Without `keep` (condition dropout) it is gone without a trace."""

    ids: list
    branch: int = 0
    keep: bool = True


class VitImage(NamedTuple):
    """A picture as the ViT takes it. Without `keep` its position stays empty."""

    patches: Tensor  # (n, 3 * patch²)
    grid: tuple  # (h, w), n = h w
    image_index: int = 0  # which context image, counted back from the reference, the last one
    keep: bool = True
    branch: int = 0  # always: a context


class VaeImage(NamedTuple):
    """A picture as latent tokens x_t = (1 - t) x0 + t noise: clean at t = 0, a target of the loss at any other time."""

    x_t: Tensor  # (n, C)
    grid: tuple
    image_index: int = 0  # as a VitImage's
    keep: bool = True
    branch: int = 0
    t: float = 0.0
    # (5,) how it stands to the levelled reference: dx, dy, dz, dangle, dphi (Settings.rays)
    delta: Sequence[float] = (0.0,) * 5


class Pack(NamedTuple):
    """B packed sequences of U und tokens and G gen tokens, padded; I_v ViT pictures, I latent pictures in all."""

    tokens: Tokens  # (B, U + G), on the CPU
    ids: Tensor  # (B, U) word ids; 0 where a ViT feature stands
    patches: Tensor  # (I_v, L, 3 * patch²) padded to the longest
    patch_ids: Tensor  # (I_v, L) row * grid + column; -1 for padding
    patch_image_index: Tensor  # (I_v,) which context image
    feature_index: Tensor  # (sum of lengths,) where ViT features go among B * U
    x_t: Tensor  # (B, G, C)
    latent_ids: Tensor  # (B, G) row * grid + column
    picture: Tensor  # (B, G) which of the I latent pictures
    target_mask: Tensor  # (B, G) bool: a token that the loss is about
    t: Tensor  # (I,) fp32
    image_index: Tensor  # (I,) which context image; -1 for a target
    delta: Tensor  # (I, 5) how a picture stands to the levelled reference: a target by command

    def to(self, device: torch.device) -> "Pack":
        """The pack on a device; `tokens` stay on the CPU, unless FSDP moves them: masks are decided where they are."""
        return Pack(self.tokens, *(x.to(device, non_blocking=True) for x in self[1:]))


# ---- packing -------------------------------------------------------------------------------------------------------------


PADDING = Tokens(0, NEVER_SEEN, sample=-1, branch=0)  # sees padding, and is seen by padding alone


class Sequence:
    """One sequence in the making."""

    def __init__(self, markers):
        self.markers = markers
        self.samples = 0
        self.ids = []  # of the und tokens
        self.und = []  # Tokens of one each
        self.gen = []  # the same of the gen tokens
        self.vit_images = []  # (VitImage, where its features begin among the und tokens)
        self.vae_images = []

    def add_sample(self, segments):
        """Append the segments of one more sample."""
        next_position = {0: 0}  # of each branch
        order = 0
        for segment in segments:
            position = next_position.setdefault(segment.branch, next_position[0])
            is_text = isinstance(segment, Text)
            if is_text and not segment.keep:
                continue
            length = len(segment.ids) if is_text else 1
            next_position[segment.branch] = position + length
            if segment.keep:
                self.add_segment(segment, Tokens(position, order, self.samples, segment.branch))
                order += length
        self.samples += 1

    def add_segment(self, segment, first):
        """Append a segment that is there, `first` its first token."""
        if isinstance(segment, Text):
            self.ids += segment.ids
            for i in range(len(segment.ids)):
                token = first._replace(position=first.position + i, order=first.order + i)
                self.und.append(token)
            return
        features = 0
        if isinstance(segment, VitImage):
            features = len(segment.patches)
            self.vit_images.append((segment, len(self.ids) + 1))
        else:
            self.vae_images.append(segment)
            self.gen += [first] * len(segment.x_t)
        start, end = self.markers
        self.ids += [start, *[0] * features, end]
        self.und += [first] * (features + 2)


def table_ids(grid: tuple, columns: int) -> Tensor:
    """Which row of a position table each token of a picture takes: (h * w,) = row * columns + column."""
    if max(grid) > columns:
        sizes = f"{grid[0]} x {grid[1]} tokens; the position table has {columns} x {columns}"
        raise ValueError(f"A picture has {sizes}. Lower vae_limits or vit_limits in config.json.")
    return (torch.arange(grid[0])[:, None] * columns + torch.arange(grid[1])).flatten()


def pack(samples: list, markers: tuple, config) -> Pack:
    """Sequences -> Pack. A sequence is a list of samples, a sample a list of segments in order.

    samples   [sequence][sample][segment], segments Text, VitImage and VaeImage
    markers   ids of <|vision_start|> and <|vision_end|>;   config: lib/bagel.Config, for the sides of position tables
    Every sequence needs a picture as latents (the target of the loss).
    """
    sequences, vae_images = [], []
    for row in samples:
        sequence = Sequence(markers)
        for segments in row:
            sequence.add_sample(segments)
        sequences.append(sequence)
        vae_images += sequence.vae_images
    ids = padded([torch.tensor(sequence.ids) for sequence in sequences])  # (B, U)
    vit_images, feature_index = [], [torch.zeros(0, dtype=torch.long)]
    for b, sequence in enumerate(sequences):
        for image, first in sequence.vit_images:
            vit_images.append(image)
            feature_index.append(b * ids.shape[1] + first + torch.arange(len(image.patches)))
    lengths = torch.tensor([len(image.x_t) for image in vae_images])
    is_target = torch.tensor([image.t > 0 for image in vae_images])
    latent_ids = [table_ids(image.grid, config.latent_grid) for image in vae_images]
    context_index = torch.tensor([image.image_index for image in vae_images])

    deltas = np.stack([image.delta for image in vae_images])

    def by_sequence(values):  # (gen tokens of all, ...) -> (B, G, ...)
        return padded(values.split([len(sequence.gen) for sequence in sequences]))

    und = token_rows([sequence.und for sequence in sequences])
    gen = token_rows([sequence.gen for sequence in sequences])
    # contiguous each: compiled attention reads them for every pair
    numbers = torch.cat([und, gen], 1).movedim(-1, 0).contiguous()  # (4, B, U + G)
    # without any picture for the ViT there is one of padding
    patches = [image.patches for image in vit_images] or [torch.zeros(1, 3 * config.vit_patch**2)]
    patch_ids = [table_ids(image.grid, config.vit_grid) for image in vit_images]
    return Pack(
        tokens=Tokens(*numbers),
        ids=ids,
        patches=padded(patches),
        patch_ids=padded(patch_ids or [torch.full((1,), -1)], -1),
        patch_image_index=torch.tensor([image.image_index for image in vit_images] or [0]),
        feature_index=torch.cat(feature_index),
        x_t=by_sequence(torch.cat([image.x_t for image in vae_images])),
        latent_ids=by_sequence(torch.cat(latent_ids)),
        picture=by_sequence(torch.arange(len(vae_images)).repeat_interleave(lengths)),
        target_mask=by_sequence(is_target.repeat_interleave(lengths)),
        t=torch.tensor([float(image.t) for image in vae_images]),
        image_index=torch.where(is_target, -1, context_index),
        delta=torch.tensor(deltas, dtype=torch.float32),
    )


def padded(tensors, fill=0):
    """Tensors (n, ...) -> (B, longest, ...)."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def token_rows(lists):
    """The Tokens of B sequences, one by one -> (B, longest, 4)."""
    longest = max(map(len, lists))
    return torch.tensor([rows + [PADDING] * (longest - len(rows)) for rows in lists])
