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

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList

from lib.bagel import (
    GEN,
    LATENT_PATCH,
    patchify,
    ray_angles,
    ray_direction,
    ray_features,
    to_images,
    unpatchify,
)
from lib.geometry import delta_of
from lib.simulators import read_instruction, renumbered
from lib.streams import sample_tokens


@torch.inference_mode()
def imagine(model, queries, **changes):
    """What `WorldModel.imagine` computes, one query after the other: list of Query -> list of (H, W, 3) uint8."""
    views = []
    for query in queries:
        views.append(to_images(model.autoencoder.decode(latent(model, query, **changes)))[0])
    return views


@torch.inference_mode()
def latent(model, query, **changes):
    """The view of one query as a latent (1, c, 2 h, 2 w), as `model.autoencoder.decode` takes it.

    Draws from the query's own generator: the posterior noise of the context images in the order shown, then the noise
    (n, C) that becomes the view. `changes` are fields of Settings.
    """
    network, s = model.network, replace(model.settings, **changes)
    stream = torch.Generator().manual_seed(query.seed)
    images, deltas = model.arrange(query.images, query.reference, query.provenance, s)
    encoded = []
    for image, delta in zip(images, deltas, strict=True):
        encoded.append(model.context_image([image], [stream], delta[None]))
    ids = model.texts([renumbered(query.instruction, len(images))])[0][0]

    full = nothing(network)
    for i, (clean, pixels, _) in enumerate(encoded):
        number = len(encoded) - 1 - i
        read_vae(network, full, clean, number, deltas[i])
        read_vit(network, full, pixels, number)
    no_text, no_image = copy.deepcopy(full), nothing(network)
    if network.config.settings.words:
        read_text(network, full, ids)
        read_text(network, no_image, ids)

    grid = [side // LATENT_PATCH for side in encoded[-1][0].shape[-2:]]
    x = torch.randn(grid[0] * grid[1], network.config.token_channels, generator=stream)
    x = x.to(model.device)
    command = delta_of(read_instruction(query.instruction)[1]) + deltas[-1]
    motion = rays(network, command, grid)
    silence = rays(network, [0, 0, 0, 0, 0], grid)
    tau = torch.linspace(1, 0, s.steps + 1)
    times = s.shift * tau / (1 + (s.shift - 1) * tau)
    low, high = torch.tensor(s.interval, dtype=torch.float32).tolist()
    for t, t_next in itertools.pairwise(times):
        tokens = embed_latent(network, x, t, grid)
        v = velocity(network, full, tokens, x, t, motion)
        if s.text_scale > 1 and low < t <= high:
            v_no_text = velocity(network, no_text, tokens, x, t, silence)
            v_no_image = None
            if s.image_scale > 1:
                v_no_image = velocity(network, no_image, tokens, x, t, motion)
            v = guided(v, v_no_text, v_no_image, s)
        x = x - (t - t_next) * v
    return unpatchify(x[None], LATENT_PATCH, *grid)


# ---------------------------------------------------------------- one step


def velocity(network, context, tokens, x, t, motion):
    """The velocity (n, C) at time t of the noisy latents x (n, C), embedded as tokens (n, H), behind a context."""
    markers = embed_text(network, network.markers)
    vectors, angles = motion
    tokens = torch.cat([markers[:1], tokens + vectors, markers[1:]])
    h = run(network, context, tokens, len(x), angles)
    output = network.llm2vae(h)[1:-1]
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


def read_vae(network, context, clean, number, delta):
    """Append a clean latent (1, c, 2 h, 2 w), the context image `number` (from 0), at `delta` (5,) from the reference:
    all its tokens on one position."""
    tokens = patchify(clean, LATENT_PATCH)[0]
    grid = [side // LATENT_PATCH for side in clean.shape[-2:]]
    tokens = embed_latent(network, tokens, 0.0, grid) + image_number(network, number)
    vectors, angles = rays(network, delta, grid)
    markers = embed_text(network, network.markers)
    x = torch.cat([markers[:1], tokens + vectors, markers[1:]])
    run(network, context, x, len(tokens), angles, append=True)


def read_vit(network, context, pixels, number):
    """Append the ViT's features of a picture (1, 3, H, W): all of them on one position too."""
    features = gelu_mlp(network.connector, vit(network, pixels))
    grid = [side // network.config.vit_patch for side in pixels.shape[-2:]]
    features = features + places(network.vit_pos_embed, grid) + image_number(network, number)
    markers = embed_text(network, network.markers)
    run(network, context, torch.cat([markers[:1], features, markers[1:]]), append=True)


# ---------------------------------------------------------------- the language model with two experts


def run(network, context, x, image=0, angles=(), causal=False, append=False):
    """One segment x (N, H) through all layers, behind a context -> (N, H) after the last norm.

    image    how many latent tokens stand between the two markers of x: they go to the generation expert. 0: none
    angles   of their rays, by `rays`
    causal   a text: one RoPE position per token, and no token sees a later one. Else all share one, and all see all
    append   put the segment's keys and values into the context and advance its position
    """
    c, lm = network.config, network.language_model["model"]
    count = len(x)
    past = len(context.keys[0])
    split = None
    if image:
        order = torch.arange(count, device=x.device)
        split = order[[0, -1]], order[1:-1]
    steps = torch.arange(count) if causal else torch.zeros(count)
    rope = rotation(network, (context.next + steps).to(x.device), angles)
    mask = None
    if causal:
        mask = torch.ones(count, past + count, dtype=torch.bool, device=x.device).tril(past)
    for i, layer in enumerate(lm["layers"]):
        y = expert(rms_norm, layer, "input_layernorm", x, split)
        q, keys, values = project(layer.self_attn, y, split, rope)
        keys = torch.cat([context.keys[i], keys])  # (K + N, kv_heads, d)
        values = torch.cat([context.values[i], values])
        y = attend(q, keys, values, attn_mask=mask, enable_gqa=c.kv_heads != c.heads)
        x = x + expert(linear, layer.self_attn, "o_proj", y, split)
        y = expert(rms_norm, layer, "post_attention_layernorm", x, split)
        x = x + expert(swiglu, layer, "mlp", y, split)
        if append:
            context.keys[i], context.values[i] = keys, values
    if append:
        context.next += count if causal else 1
    return expert(rms_norm, lm, "norm", x, split)


def expert(apply, module, name, x, split):
    """apply(module.name, x) of x (N, H).

    split   where latents stand between markers: the indices of the tokens of both experts, of which the second gets its
            own, and zeros take in the results
    """
    if split is None:
        return apply(getattr(module, name), x)
    und, gen = split
    text = apply(getattr(module, name), x[und])
    out = text.new_zeros(len(x), *text.shape[1:])
    out[und] = text
    out[gen] = apply(getattr(module, name + GEN), x[gen])
    return out


def project(attention, x, split, rope):
    """Queries, keys, values (N, heads, d), the first two normed and turned to their positions."""
    heads = []
    for name in "qkv":
        y = expert(linear, attention, f"{name}_proj", x, split).unflatten(
            -1, (-1, rope[0].shape[-1])
        )
        if name != "v":
            y = rotate(expert(rms_norm, attention, f"{name}_norm", y, split), rope)
        heads.append(y)
    return heads


def attend(q, k, v, **options):
    """Attention over (tokens, heads, d) -> (N, heads d)."""
    q, k, v = (u.transpose(0, 1)[None] for u in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, **options)
    return y[0].transpose(0, 1).flatten(1)


def rotation(network, positions, ray_angles):
    """RoPE's (cos, sin), each (N, 1, d): d / 2 angles, twice ("rotate half" layout).

    With Settings.rays only a quarter of them are of positions, and the others of the rays of latent tokens.
    """
    c = network.config
    head = c.width // c.heads
    exponent = -torch.arange(0, head, 2, device=positions.device) / head
    angle = positions[:, None] * c.rope_base**exponent
    if c.settings.rays:
        angle[:, head // 8 :] = 0
        if len(ray_angles):
            angle[1:-1, head // 8 :] = ray_angles
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """x (N, heads, d) turned to its positions."""
    half = x.shape[-1] // 2
    return x * rope[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rope[1]


def linear(module, x):
    return module(x)


def gelu_mlp(module, x):
    return module.fc2(F.gelu(module.fc1(x), approximate="tanh"))


def rms_norm(module, x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * module.weight


def swiglu(module, x):
    return module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))


# ---------------------------------------------------------------- embeddings


def embed_text(network, ids):
    """Word and marker tokens: ids (N,), a tensor or a tuple -> (N, H)."""
    table = network.language_model["model"]["embed_tokens"].weight
    return table[torch.as_tensor(ids, device=table.device)]


def embed_latent(network, x, t, grid):
    """Latents (n, C) at time t -> (n, H): a linear layer, plus the time, plus the place in the picture."""
    angle = t * 10_000.0 ** (-torch.arange(128, device=x.device) / 128)
    time = network.time_embedder.mlp(torch.cat([angle.cos(), angle.sin()])[None])
    return network.vae2llm(x) + time + places(network.latent_pos_embed, grid)


def places(table, grid):
    """The rows (h w, H) of a position table for a picture of grid (h, w): its top left corner."""
    rows, columns = (torch.arange(side, device=table.pos_embed.device) for side in grid)
    return table.pos_embed[(rows[:, None] * table.grid + columns).flatten()]


def rays(network, delta, grid):
    """With Settings.rays what each latent token is told of its ray at a relative pose (5,), and the angles that its ray turns
    heads by: (h w, H), (h w, 3 d / 8). Else nothing: 0, ().
    """
    c = network.config
    if not c.settings.rays:
        return 0, ()
    delta = torch.tensor(delta, dtype=torch.float32)
    vectors, angles = [], []
    for row, column in itertools.product(range(grid[0]), range(grid[1])):
        x, y = (torch.tensor(2 * (place + 0.5) / c.latent_grid - 1) for place in (column, row))
        direction = ray_direction(delta, x, y)
        vectors.append(network.motion2llm(ray_features(delta, direction)))
        angles.append(ray_angles(delta, direction, c.width // c.heads // 8))
    return torch.stack(vectors), torch.stack(angles)


def image_number(network, number):
    """With Settings.learned_places the embedding (1, H) of context image `number`. Else 0."""
    if not network.config.settings.learned_places:
        return 0
    return network.image_number.weight[number][None]


def vit(network, pixels):
    """SigLIP's features (n, vit width) of a picture (1, 3, H, W)."""
    c, tower = network.config, network.vit_model["vision_model"]
    table = tower.embeddings["position_embedding"].weight.view(c.vit_grid, c.vit_grid, -1)
    rows, columns = (side // c.vit_patch for side in pixels.shape[-2:])
    x = tower.embeddings["patch_embedding"](patchify(pixels, c.vit_patch)[0])
    x = x + table[:rows, :columns].flatten(0, 1)
    for layer in tower.encoder["layers"]:
        y = layer.layer_norm1(x)
        heads = []
        for name in "qkv":
            heads.append(layer.self_attn[f"{name}_proj"](y).unflatten(-1, (c.vit_heads, -1)))
        x = x + layer.self_attn["out_proj"](attend(*heads))
        x = x + gelu_mlp(layer.mlp, layer.layer_norm2(x))
    return tower.post_layernorm(x)


# ---------------------------------------------------------------- the turns of many dialogues


class Writer:
    """What lib.rollout's Writer does, in one call of transformers' `generate` per turn: it reads everything anew.

    All that write stand in one batch, left-padded, and share a KV cache until the turn ends; each row brings its own
    prompt, and all its images go through the tower again. Tokens are drawn by `lib.streams.sample_tokens` from the same
    uniform numbers, so both writers say the same.
    """

    def __init__(self, policy, dialogues, group_size=1):
        self.policy, self.dialogues = policy, dialogues

    def write(self, members, uniforms, temperature, limit):
        """One turn of the dialogues `members` -> (ids, logprobs) of each; arguments as in lib.rollout."""
        policy = self.policy
        stop, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
        dialogues = [self.dialogues[d] for d in members]
        longest = max(len(dialogue.ids) for dialogue in dialogues)
        rows, numbered = [], []
        for dialogue in dialogues:
            rows.append([pad] * (longest - len(dialogue.ids)) + dialogue.ids)
            numbered += enumerate(dialogue.images, 1)
        ids = torch.tensor(rows, device=policy.device)
        lengths = torch.tensor([len(dialogue.ids) for dialogue in dialogues])
        mask = torch.arange(longest) >= longest - lengths[:, None]
        patches, grids = policy.pixels(numbered) if numbered else (None, None)
        logprobs = []

        def draw(so_far, logits):
            """A logits processor: leaves `generate` no choice but the token that is drawn here."""
            numbers = uniforms[members, so_far.shape[1] - longest]
            logits = logits.masked_fill(policy.banned, -1e9)
            tokens, chosen = sample_tokens(logits, numbers, temperature)
            logprobs.append(chosen)
            return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

        written = policy.model.generate(
            input_ids=ids,
            attention_mask=mask.long().to(policy.device),
            pixel_values=patches,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == policy.image_token_id).long(),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=stop,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([draw]),
        )
        turns = []
        chosen = torch.stack(logprobs, 1).tolist()
        for turn, numbers in zip(written[:, longest:].tolist(), chosen, strict=True):
            end = turn.index(stop) + 1 if stop in turn else limit
            turns.append((turn[:end], numbers[:end]))
        return turns
