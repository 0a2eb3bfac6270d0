"""
The straightforward ways: to imagine a view (`imagine`), and to write the turns of dialogues (`Writer`, at the end).

The first is BAGEL's inference as one would first write it down from the paper.

One query at a time. Its context is read segment by segment, each behind the keys and values of all before it; the
context without the sentence is a copy, the one without the images is read anew. Each Euler step runs the network up to
three times, one branch of guidance after the other, and each token goes to its expert by gather and scatter. It is the
oracle of the tests and the opponent in `python -m bench wm`: plain, but not slower than this way of working must be. It knows
no step caching (`Settings.taylor`): that is an approximation of what stands here.

It shares with the fast sampler the weights (by the checkpoint's names), the settings and how a picture becomes a latent
(`WorldModel.arrange`, `see`, `texts`), nothing of `Bagel`'s arithmetic, nor of `world_model.euler_sample`.

Shapes: N tokens of one segment, K keys before it, H width, d head width; n = h w latent tokens of C numbers.
"""

import copy
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList

from lib.bagel import GEN, LATENT_PATCH, patchify, unpatchify
from lib.bagel_files import resize, to_images
from lib.geometry import renumbered
from lib.rollout import sample_tokens


@torch.inference_mode()
def imagine(model, queries, **changes):
    """What `WorldModel.imagine` computes, one query after the other: list of Query -> list of (H, W, 3) uint8."""
    return [
        to_images(model.autoencoder.decode(latent(model, query, **changes)))[0] for query in queries
    ]


@torch.inference_mode()
def latent(model, query, **changes):
    """The view of one query as a latent (1, c, 2 h, 2 w), as `model.autoencoder.decode` takes it.

    Draws from the query's own generator: the posterior noise of the context images in the order shown, then the noise
    (n, C) that becomes the view. `changes` are fields of Settings.
    """
    network, s = model.network, replace(model.settings, **changes)
    stream = torch.Generator().manual_seed(query.seed)
    images, reference = model.arrange(query.images, query.reference, s)
    seen = [model.see([resize(np.asarray(image), s.vae_limits)], [stream]) for image in images]
    ids = model.texts([renumbered(query.instruction, reference)])[0][0]

    full = nothing(network)
    for number, (clean, pixels) in enumerate(seen):
        read_vae(network, full, clean, number)
        read_vit(network, full, pixels, number)
    no_text, no_image = copy.deepcopy(full), nothing(network)
    read_text(network, full, ids)
    read_text(network, no_image, ids)

    grid = [side // LATENT_PATCH for side in seen[reference - 1][0].shape[-2:]]
    x = torch.randn(grid[0] * grid[1], network.config.token_channels, generator=stream).to(
        model.device
    )
    motion, silence = motion_to_target(network, ids), motion_to_target(network, ids[:2])
    tau = torch.linspace(1, 0, s.steps + 1)
    times = s.shift * tau / (1 + (s.shift - 1) * tau)
    low, high = torch.tensor(s.interval, dtype=torch.float32).tolist()
    for t, t_next in itertools.pairwise(times):
        tokens = embed_latent(network, x, t, grid)
        v = velocity(network, full, tokens + motion, x, t)
        if s.text_scale > 1 and low < t <= high:
            v_no_text = velocity(network, no_text, tokens + silence, x, t)
            v_no_image = (
                velocity(network, no_image, tokens + motion, x, t) if s.image_scale > 1 else None
            )
            v = guided(v, v_no_text, v_no_image, s)
        x = x - (t - t_next) * v
    return unpatchify(x[None], LATENT_PATCH, *grid)


# ---------------------------------------------------------------- one step


def velocity(network, context, tokens, x, t):
    """The velocity (n, C) at time t of the noisy latents x (n, C), embedded as tokens (n, H), behind a context."""
    markers = embed_text(network, network.markers)
    h = run(network, context, torch.cat([markers[:1], tokens, markers[1:]]), image=len(tokens))
    output = linear(network.llm2vae, h)[1:-1]
    return output if network.config.settings.prediction == "velocity" else (x - output) / t


def guided(v, v_no_text, v_no_image, s):
    """Guidance by the sentence, then by the images; what is longer than v is shrunk to v's length (Settings.renorm)."""

    def shrunk(w, axes=-1):
        ratio = v.norm(dim=axes, keepdim=True) / (w.norm(dim=axes, keepdim=True) + 1e-8)
        return w * ratio.clamp(s.renorm_min, 1.0)

    w = v_no_text + s.text_scale * (v - v_no_text)
    if s.renorm == "text_channel":
        w = shrunk(w)
    if v_no_image is not None:
        w = v_no_image + s.image_scale * (w - v_no_image)
    if s.renorm == "channel":
        w = shrunk(w)
    if s.renorm == "global":
        w = shrunk(w, (0, 1))
    return w


# ---------------------------------------------------------------- what stands before the noisy latents


@dataclass
class Context:
    """What has been read: per layer the keys and values (K, kv_heads, d), and the RoPE position that comes next."""

    keys: list
    values: list
    next: int = 0


def nothing(network):
    """The context in which nothing has been read."""
    c = network.config
    empty = network.vae2llm.weight.new_empty(0, c.kv_heads, c.width // c.heads)
    return Context([empty] * c.layers, [empty] * c.layers)


def read_text(network, context, ids):
    """Append a text, ids (N,) with <|im_start|> and <|im_end|>: causal, one position per word."""
    run(network, context, embed_text(network, ids), causal=True, append=True)


def read_vae(network, context, clean, number):
    """Append a clean latent (1, c, 2 h, 2 w), the context image `number` (from 0): all its tokens on one position."""
    tokens = patchify(clean, LATENT_PATCH)[0]
    grid = [side // LATENT_PATCH for side in clean.shape[-2:]]
    tokens, markers = embed_latent(network, tokens, 0.0, grid), embed_text(network, network.markers)
    tokens = torch.cat([markers[:1], tokens + image_number(network, number), markers[1:]])
    run(network, context, tokens, image=len(tokens) - 2, append=True)


def read_vit(network, context, pixels, number):
    """Append the ViT's features of a picture (1, 3, H, W): all of them on one position too."""
    features = linear(
        network.connector.fc2, gelu(linear(network.connector.fc1, vit(network, pixels)))
    )
    grid = [side // network.config.vit_patch for side in pixels.shape[-2:]]
    features = features + places(network.vit_pos_embed, grid) + image_number(network, number)
    markers = embed_text(network, network.markers)
    run(network, context, torch.cat([markers[:1], features, markers[1:]]), append=True)


# ---------------------------------------------------------------- the language model with two experts


def run(network, context, x, image=0, causal=False, append=False):
    """One segment x (N, H) through all layers, behind a context -> (N, H) after the last norm.

    image    how many latent tokens stand between the two markers of x: they go to the generation expert. 0: none
    causal   a text: one RoPE position per token, and no token sees a later one. Else all share one, and all see all
    append   put the segment's keys and values into the context and advance its position
    """
    c, lm = network.config, network.language_model["model"]
    count, head = len(x), c.width // c.heads
    kinds = torch.tensor([False] + [True] * image + [False], device=x.device)
    gen, und = (kinds.nonzero()[:, 0], (~kinds).nonzero()[:, 0]) if image else (None, None)

    def expert(apply, module, name, y):
        """apply(module.name, y); with latents in y each expert gets its own tokens, and zeros take in the results."""
        if gen is None:
            return apply(getattr(module, name), y)
        part = apply(getattr(module, name), y[und])
        out = part.new_zeros(count, *part.shape[1:])
        out[und], out[gen] = part, apply(getattr(module, name + GEN), y[gen])
        return out

    positions = context.next + (torch.arange(count) if causal else torch.zeros(count))
    rope = rotation(positions.to(x.device), head, c.rope_base)
    past = len(context.keys[0])
    mask = (
        torch.ones(count, past + count, dtype=torch.bool, device=x.device).tril(past)
        if causal
        else None
    )
    for i, layer in enumerate(lm["layers"]):
        attention, y = layer.self_attn, expert(rms_norm, layer, "input_layernorm", x)
        q, k, v = (
            expert(linear, attention, f"{name}_proj", y).unflatten(-1, (-1, head)) for name in "qkv"
        )
        q, k = (
            rotate(expert(rms_norm, attention, f"{name}_norm", u), rope)
            for name, u in (("q", q), ("k", k))
        )
        keys, values = (
            torch.cat([context.keys[i], k]),
            torch.cat([context.values[i], v]),
        )  # (K + N, kv_heads, d)
        y = F.scaled_dot_product_attention(
            *(u.transpose(0, 1)[None] for u in (q, keys, values)),
            attn_mask=mask,
            enable_gqa=c.kv_heads != c.heads,
        )
        x = x + expert(linear, attention, "o_proj", y[0].transpose(0, 1).flatten(1))
        x = x + expert(swiglu, layer, "mlp", expert(rms_norm, layer, "post_attention_layernorm", x))
        if append:
            context.keys[i], context.values[i] = keys, values
    if append:
        context.next += count if causal else 1
    return expert(rms_norm, lm, "norm", x)


def rotation(positions, head, base):
    """RoPE's (cos, sin), each (N, 1, d): d / 2 frequencies, twice ("rotate half" layout)."""
    angle = positions[:, None] * base ** (-torch.arange(0, head, 2, device=positions.device) / head)
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """x (N, heads, d) turned to its positions."""
    half = x.shape[-1] // 2
    return x * rope[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rope[1]


def linear(module, x):
    return F.linear(x, module.weight, module.bias)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def rms_norm(module, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * module.weight


def swiglu(module, x):
    return linear(module.down_proj, F.silu(linear(module.gate_proj, x)) * linear(module.up_proj, x))


# ---------------------------------------------------------------- embeddings


def embed_text(network, ids):
    """Word and marker tokens: ids (N,), a tensor or a tuple -> (N, H)."""
    table = network.language_model["model"]["embed_tokens"].weight
    return table[torch.as_tensor(ids, device=table.device)]


def embed_latent(network, x, t, grid):
    """Latents (n, C) at time t -> (n, H): a linear layer, plus the time, plus the place in the picture."""
    angle = t * 10_000.0 ** (-torch.arange(128, device=x.device) / 128)
    first, _, second = network.time_embedder.mlp
    time = linear(second, F.silu(linear(first, torch.cat([angle.cos(), angle.sin()])[None])))
    return linear(network.vae2llm, x) + time + places(network.latent_pos_embed, grid)


def places(table, grid):
    """The rows (h w, H) of a position table for a picture of grid (h, w): its top left corner."""
    rows, columns = (torch.arange(side, device=table.pos_embed.device) for side in grid)
    return table.pos_embed[(rows[:, None] * table.grid + columns).flatten()]


def motion_to_target(network, ids):
    """With Settings.motion_to_target the sentence's words, summed, through one layer: (1, H). Else 0."""
    return (
        linear(network.motion2llm, embed_text(network, ids[1:-1]).sum(0)[None])
        if network.config.settings.motion_to_target
        else 0
    )


def image_number(network, number):
    """With Settings.learned_places the embedding (1, H) of context image `number`. Else 0."""
    return (
        network.image_number.weight[number][None] if network.config.settings.learned_places else 0
    )


def vit(network, pixels):
    """SigLIP's features (n, vit width) of a picture (1, 3, H, W)."""
    c, tower = network.config, network.vit_model["vision_model"]
    table = tower.embeddings["position_embedding"].weight.view(c.vit_grid, c.vit_grid, -1)
    rows, columns = (side // c.vit_patch for side in pixels.shape[-2:])
    x = linear(tower.embeddings["patch_embedding"], patchify(pixels, c.vit_patch)[0])
    x = x + table[:rows, :columns].flatten(0, 1)
    for layer in tower.encoder["layers"]:
        y = layer_norm(layer.layer_norm1, x)
        q, k, v = (
            linear(layer.self_attn[f"{name}_proj"], y)
            .unflatten(-1, (c.vit_heads, -1))
            .transpose(0, 1)[None]
            for name in "qkv"
        )
        y = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        x = x + linear(layer.self_attn["out_proj"], y)
        y = gelu(linear(layer.mlp.fc1, layer_norm(layer.layer_norm2, x)))
        x = x + linear(layer.mlp.fc2, y)
    return layer_norm(tower.post_layernorm, x)


def layer_norm(module, x):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


# ---------------------------------------------------------------- the turns of many dialogues


class Writer:
    """What lib.rollout's Writer does, in one call of transformers' `generate` per turn: it reads everything anew.

    All that write stand in one batch, left-padded, and share a KV cache until the turn ends; each row brings its own
    prompt, and all its images go through the tower again. Tokens are drawn by `lib.rollout.sample_tokens` from the same
    uniform numbers, so both writers say the same.
    """

    def __init__(self, policy, dialogues, group_size=1):
        self.policy, self.dialogues = policy, dialogues

    def write(self, members, uniforms, temperature, limit):
        """One turn of the dialogues `members` -> (ids, logprobs) of each; arguments as in lib.rollout."""
        policy, shown = self.policy, [self.dialogues[d] for d in members]
        stop, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
        longest = max(len(t.ids) for t in shown)
        ids = torch.tensor([[pad] * (longest - len(t.ids)) + t.ids for t in shown])
        mask = torch.tensor([[0] * (longest - len(t.ids)) + [1] * len(t.ids) for t in shown])
        numbered = [pair for t in shown for pair in enumerate(t.images, 1)]
        patches, grids = policy.pixels(numbered) if numbered else (None, None)
        logprobs = []

        def draw(so_far, logits):
            """A logits processor: leaves `generate` no choice but the token that is drawn here."""
            step = so_far.shape[1] - longest
            tokens, chosen = sample_tokens(
                logits.masked_fill(policy.banned, -1e9), uniforms[members, step], temperature
            )
            logprobs.append(chosen)
            return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

        said = policy.model.generate(
            input_ids=ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            pixel_values=patches,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == policy.image_token_id).long().to(policy.device),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=stop,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([draw]),
        )
        turns, logprobs = said[:, longest:].tolist(), torch.stack(logprobs, 1).tolist()
        ends = [turn.index(stop) + 1 if stop in turn else limit for turn in turns]
        return [
            (turn[:end], chosen[:end])
            for turn, chosen, end in zip(turns, logprobs, ends, strict=True)
        ]
