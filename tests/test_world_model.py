"""Astra-WM: fast paths against a plain twin, the checkpoint layout, the sampler. `pytest tests/test_world_model.py`"""

import argparse
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_wm
import world_model
from bench.gpu import bagel_7b
from lib import packing
from lib.bagel import (
    GEN,
    LATENT_PATCH,
    RAY_FEATURES,
    Bagel,
    Config,
    ContextImage,
    ContextText,
    PixelLatents,
    Settings,
    patchify,
    ray_angles,
    ray_direction,
    ray_features,
    resized,
    rotate,
    unpatchify,
)
from lib.geometry import Motion, Query, camera_pose
from lib.images import load_image
from lib.packing import (
    Text,
    VaeImage,
    VitImage,
    dense_attention,
    flex_attention_for,
    pack,
    sight,
    table_ids,
)
from lib.protocol import call_of
from lib.simulators import instruction
from world_model import (
    WorldModel,
    euler_sample,
    guidance_branches,
    guided,
    initialise,
    velocity_from_output,
    x0_from_output,
)

SMALL = Config(
    width=32,
    layers=3,
    heads=4,
    kv_heads=2,
    mlp=48,
    vocabulary=40,
    eps=1e-6,
    rope_base=1e6,
    vit_width=16,
    vit_layers=2,
    vit_heads=2,
    vit_mlp=32,
    vit_patch=4,
    vit_grid=6,
    latent_grid=5,
    token_channels=12,
    settings=Settings(),
)


def random_network(config=SMALL, seed=0):
    """A network in which every weight matters (llm2vae starts at zero otherwise)."""
    torch.manual_seed(seed)
    network = Bagel(config)
    initialise(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    network.markers = (38, 39)
    return network


def small_pack(contexts=2, seed=1):
    """Two images of different sizes per context; three targets for the first context, two for the second."""
    g = torch.Generator().manual_seed(seed)
    images = []
    for height, width, pixels in ((4, 6, (8, 12)), (6, 4, (16, 8))):
        latent = torch.randn(contexts, 3, height, width, generator=g)
        images.append(ContextImage(latent, torch.randn(contexts, 3, *pixels, generator=g)))
    owner = torch.tensor([0, 0, 0, 1, 1])[: 5 if contexts == 2 else 3]
    ids = torch.randint(0, 38, (len(owner), 6), generator=g)
    lengths = torch.tensor([4, 6, 3, 5, 6])[: len(owner)]
    x, t = torch.randn(len(owner), 6, 12, generator=g), torch.rand(len(owner), generator=g)
    return images, owner, ids, lengths, x, t, (2, 3)


def motion_of(row):
    """What commands the target of a row: another kind and amount for each of five."""
    return (row + 1) * torch.eye(5)[row]


def packed(network, images, owner, ids, lengths, x, t, grid, keep=None, together=False):
    """`small_pack` through lib/packing: one context a sequence with its targets as branches, or all in one sequence."""
    samples = []
    for b in range(len(images[0][0])):
        segments = []
        for i, (latent, pixels, _) in enumerate(images):
            tokens, patches = (
                patchify(latent[b : b + 1], LATENT_PATCH)[0],
                patchify(pixels[b : b + 1], 4)[0],
            )
            vae, vit = (True, True) if keep is None else keep[b, 2 * i : 2 * i + 2].tolist()
            number = len(images) - 1 - i
            segments += [
                VaeImage(tokens, (latent.shape[2] // 2, latent.shape[3] // 2), number, keep=vae),
                VitImage(patches, (pixels.shape[2] // 4, pixels.shape[3] // 4), number, keep=vit),
            ]
        for k in (owner == b).nonzero().flatten().tolist():
            words = ids[k, : lengths[k]].tolist()
            motion = tuple(motion_of(k).tolist())
            target = VaeImage(x[k], grid, branch=k + 1, t=float(t[k]), delta=motion)
            segments += [Text(words, branch=k + 1, keep=len(words) > 0), target]
        samples.append(segments)
    return pack(
        [samples] if together else [[sample] for sample in samples], network.markers, network.config
    )


def predicted(network, *case, **how):
    """The network's prediction for the targets of `small_pack`: (R, n, C)."""
    p = packed(network, *case, **how)
    return network(p)[p.target_mask].view(len(case[4]), -1, network.config.token_channels)


# ---------------------------------------------------------------- the plain twin: one packed sequence, one dense mask


def dense_prediction(network, images, ids, lengths, x, t, grid):
    """All targets of one context in one packed sequence, in the true order, masked by the original's rule.

    images: (latent (1, ...), pixels (1, ...)) of one context; ids, x, t: its targets. Returns predictions (T, n, C).
    """
    c, tokens = network.config, []  # (embedding, expert, position, split, mode, branch)

    def add(embeddings, expert, positions, split, mode, branch):
        tokens.extend(
            (e, expert, p, split, mode, branch) for e, p in zip(embeddings, positions, strict=True)
        )

    def image(latents, position, split, mode, branch):
        start, end = network.embed_markers(1)[0]
        add([start], "", [position], split, mode, branch)
        add(latents, GEN, [position] * len(latents), split, mode, branch)
        add([end], "", [position], split, mode, branch)

    def latents_of(tokens, t, grid):
        return (
            network.vae2llm(tokens)
            + network.time_embedder(t)
            + network.latent_pos_embed(table_ids(grid, 5))
        )

    for i, (latent, pixels) in enumerate(images):
        start, end = network.embed_markers(1)[0]
        image(
            latents_of(
                patchify(latent, LATENT_PATCH)[0],
                torch.zeros(1),
                (latent.shape[2] // 2, latent.shape[3] // 2),
            ),
            2 * i,
            f"vae {i}",
            "full",
            0,
        )
        features = network.embed_vit(
            patchify(pixels, 4), table_ids([side // 4 for side in pixels.shape[2:]], 6)
        )[0]
        add([start, *features, end], "", [2 * i + 1] * (len(features) + 2), f"vit {i}", "full", 0)
    for row in range(len(x)):
        first, n = 2 * len(images), int(lengths[row])
        add(
            network.embed_text(ids[row, :n]),
            "",
            range(first, first + n),
            f"text {row}",
            "causal",
            row + 1,
        )
        image(
            latents_of(x[row], t[row : row + 1], grid), first + n, f"target {row}", "noise", row + 1
        )

    def sees(i, j):
        (_, _, _, split_i, _, branch_i), (_, _, _, split_j, mode_j, branch_j) = tokens[i], tokens[j]
        same = split_i == split_j
        before = j <= i or (same and mode_j != "causal")
        return branch_j in (0, branch_i) and before and not (mode_j == "noise" and not same)

    mask = torch.tensor([[sees(i, j) for j in range(len(tokens))] for i in range(len(tokens))])
    h = torch.stack([token[0] for token in tokens])
    gen = torch.tensor([token[1] == GEN for token in tokens])
    positions = torch.tensor([token[2] for token in tokens])
    d = c.width // c.heads
    angle = positions[:, None] * c.rope_base ** (-torch.arange(0, d, 2) / d)
    cos, sin = (
        torch.cat([angle, angle], -1).cos()[:, None],
        torch.cat([angle, angle], -1).sin()[:, None],
    )

    def by_expert(module, name, values):
        return torch.where(
            gen.view(-1, *[1] * (values.dim() - 1)),
            getattr(module, name + GEN)(values),
            getattr(module, name)(values),
        )

    def turned(v):  # (N, heads, d)
        return v * cos + torch.cat([-v[..., d // 2 :], v[..., : d // 2]], -1) * sin

    for layer in network.language_model["model"]["layers"]:
        y, a = by_expert(layer, "input_layernorm", h), layer.self_attn
        q, k, v = (by_expert(a, f"{name}_proj", y).unflatten(-1, (-1, d)) for name in "qkv")
        q, k = turned(by_expert(a, "q_norm", q)), turned(by_expert(a, "k_norm", k))
        k, v = (u.repeat_interleave(c.heads // c.kv_heads, 1) for u in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        y = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        h = h + torch.where(gen[:, None], a.o_proj_moe_gen(y), a.o_proj(y))
        h = h + by_expert(layer, "mlp", by_expert(layer, "post_attention_layernorm", h))
    out = network.llm2vae(network.language_model["model"]["norm" + GEN](h))
    targets = torch.tensor([token[4] == "noise" for token in tokens]) & gen
    return out[targets].view(len(x), -1, c.token_channels)


@pytest.mark.parametrize("together", [False, True])
def test_training_forward_equals_one_dense_packed_sequence(together):
    network = random_network()
    images, owner, ids, lengths, x, t, grid = small_pack()
    fast = predicted(network, images, owner, ids, lengths, x, t, grid, together=together)
    slow = torch.cat(
        [
            dense_prediction(
                network,
                [(z[b : b + 1], p[b : b + 1]) for z, p, _ in images],
                ids[owner == b],
                lengths[owner == b],
                x[owner == b],
                t[owner == b],
                grid,
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-5)
    weights = [p for p in network.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(out.square().sum(), weights, allow_unused=True) for out in (fast, slow)
    ]
    for a, b in zip(*gradients, strict=True):
        if a is not None or b is not None:
            a = torch.zeros_like(b) if a is None else a
            torch.testing.assert_close(
                a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-4
            )


def test_flex_attention_and_the_dense_mask_are_one_rule(monkeypatch):
    network = random_network()
    tokens = packed(network, *small_pack(), together=True).tokens
    n, g = tokens.order.shape[1], torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, heads, n, 8, generator=g) for heads in (4, 2, 2))
    want = dense_attention(tokens, tokens, q.dtype)(q, k, v)
    monkeypatch.setattr(packing, "compiled_once", lambda function: function)
    got = flex_attention_for(tokens, tokens)(q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    shown = sight(tokens, tokens)
    assert 0.05 < shown.float().mean() < 0.5, "most pairs of a pack do not see each other"


def test_recomputed_layers_give_the_same_gradients():
    network, case, gradients = random_network(), small_pack(), []
    for network.recompute in (False, True):
        network.zero_grad()
        predicted(network, *case).square().sum().backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def velocity_behind(network, memory, x, t, grid, motion=None):
    """The network's output for noisy latents x (R, n, C) that see all of a memory: one branch, one step.

    motion   (R, 5) what is commanded
    """
    branch = memory.branch(motion)
    markers = network.embed_markers(len(x))
    places = network.latent_pos_embed(table_ids(grid, network.config.latent_grid))
    ids = table_ids(grid, network.config.latent_grid)
    vectors, angles = network.rays(branch.delta[:, None], ids)
    extra = network.time_embedder(torch.full((1,), float(t))) + places + vectors
    rope = network.rope(branch.next[:, None].expand(-1, 2 + len(ids)), angles)
    return network.output(network.denoise(x, extra, markers, rope, [branch]))


def context_of(network, images=(), ids=None):
    """A memory of one row that has read images and a text ids (1, L)."""
    memory = network.memory(1)
    network.read_images(memory, images)
    if ids is not None:
        network.read_text(memory, ContextText(ids, torch.tensor([ids.shape[1]])))
    return memory


DEPARTURES = Settings(prediction="x0", rays=True, learned_places=True)  # those of the demo


@pytest.mark.parametrize("settings", [SMALL.settings, DEPARTURES], ids=["published", "demo"])
def test_cached_sampling_step_equals_training_forward(settings):
    network = random_network(dataclasses.replace(SMALL, settings=settings))
    images, owner, ids, lengths, x, t, grid = small_pack(contexts=1)
    with torch.no_grad():
        want = predicted(network, images, owner, ids, lengths, x, t, grid)
        for row in range(len(x)):
            text = ContextText(ids[row : row + 1, : lengths[row]], lengths[row : row + 1])
            memory = context_of(network, images, text.ids)
            assert memory.branch().mask is None, "one query needs no mask"
            motion = motion_of(row)[None]
            got = velocity_behind(network, memory, x[row : row + 1], t[row], grid, motion)
            torch.testing.assert_close(got[0], want[row], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("keep_text", [True, False])
def test_what_the_demo_trains_on_is_what_it_samples_with(keep_text):
    """train_wm's own segments, packed, against the memory and the motion that `imagine` makes of the same query."""
    model, query = tiny(), queries(2)[1]
    network = random_network(model.network.config)
    network.markers, model.network = model.network.markers, network
    calls = [None, call_of(1, Motion("dphi", 20.0)), call_of(2, Motion("dx", -1.0))]
    images, deltas = model.arrange(query.images, query.reference, calls)
    alpha = np.full((32, 32, 4), 255, np.uint8)
    files = dict(enumerate(query.images)) | {"target": query.images[0], "warp": alpha}
    row = {
        "context": list(range(len(query.images))),
        "reference": query.reference,
        "provenance": calls,
    }
    motion = {"kind": "dx", "amount": -1.5}
    row |= {"target": "target", "warp": "warp", "motion": motion}
    args = train_wm.parse_args(["--no-augment", "--drop-text", str(int(not keep_text))])
    segments, _ = train_wm.make_sample([row], model, files.get, args, (0, 0, 0))
    x_t, t = segments[-1].x_t[None], segments[-1].t
    p = pack([[segments]], network.markers, network.config)
    assert len(np.unique(deltas, axis=0)) == len(images) and deltas[-1, 4] == 20
    context = []
    for k, image in enumerate(images):
        context.append(model.context_image([image], None, deltas[k : k + 1]))
    text = model.texts([instruction(Motion(**motion))], deltas[-1:])
    settings = dataclasses.replace(model.settings, text_scale=4.0)
    with torch.no_grad():
        branches = guidance_branches(network, context, text, settings)
        denoiser = world_model.Denoiser(network, branches, torch.tensor([t]), (4, 4))
        (hidden,) = denoiser.last_layer(x_t, 0, [0 if keep_text else 1])
        got = network.output(hidden)[0]
        torch.testing.assert_close(got, network(p)[p.target_mask], rtol=1e-4, atol=1e-4)


def test_rows_with_texts_of_different_lengths_share_a_memory():
    network = random_network()
    images, owner, ids, lengths, x, t, grid = small_pack(contexts=1)
    with torch.no_grad():
        want = predicted(network, images, owner, ids, lengths, x, torch.full_like(t, 0.5), grid)
        memory = network.memory(len(x))
        size = (len(x), -1, -1, -1)
        rows = [ContextImage(z.expand(size), p.expand(size)) for z, p, _ in images]
        network.read_images(memory, rows)
        network.read_text(memory, ContextText(ids, lengths))
        assert memory.branch().mask is not None
        torch.testing.assert_close(
            velocity_behind(network, memory, x, 0.5, grid), want, rtol=1e-5, atol=2e-5
        )


def test_targets_do_not_see_each_other_and_text_is_causal():
    network = random_network()
    images, owner, ids, lengths, x, t, grid = small_pack(contexts=1)
    with torch.no_grad():
        before = predicted(network, images, owner, ids, lengths, x, t, grid)
        x2 = x.clone()
        x2[0] += 1
        after = predicted(network, images, owner, ids, lengths, x2, t, grid)
        torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=0)
        changed = ids.clone()
        changed[1, 4] = (changed[1, 4] + 1) % 38
        a, b = (context_of(network, ids=i[1:2, :5]).keys[-1] for i in (ids, changed))
        torch.testing.assert_close(a[:, :, :4], b[:, :, :4], rtol=0, atol=0)
        assert not torch.allclose(a[:, :, 4:], b[:, :, 4:])


def test_dropped_segments_and_sentences_are_seen_by_nobody():
    network = random_network()
    images, owner, ids, lengths, x, t, grid = small_pack(contexts=1)
    keep, none = torch.tensor([[True, False, True, True]]), torch.zeros_like(lengths)
    with torch.no_grad():
        other = [images[0]._replace(pixels=images[0].pixels + 1), images[1]]  # for the ViT alone
        a = predicted(network, images, owner, ids, none, x, t, grid, keep=keep)
        b = predicted(network, other, owner, (ids + 1) % 38, none, x, t, grid, keep=keep)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert not torch.allclose(
            predicted(network, images, owner, ids, lengths, x, t, grid),
            predicted(network, other, owner, ids, lengths, x, t, grid),
        )


def test_a_pack_without_any_picture_for_the_vit_still_runs_it():
    """Every rank of FSDP must run every unit: the ViT then reads padding, and adds nothing."""
    network = random_network()
    images, owner, ids, lengths, x, t, grid = small_pack(contexts=1)
    out = predicted(
        network,
        images,
        owner,
        ids,
        lengths,
        x,
        t,
        grid,
        keep=torch.tensor([[True, False, True, False]]),
    )
    out.square().sum().backward()
    gradient = network.vit_model["vision_model"].post_layernorm.weight.grad
    assert out.isfinite().all() and gradient is not None and gradient.abs().max() == 0


# ---------------------------------------------------------------- the sampler


def sampled(network, images, text, noise, grid, settings):
    """A context read, and the views of its rows imagined from noise."""
    with torch.no_grad():
        branches = guidance_branches(network, images, text, settings)
        return euler_sample(network, branches, noise, grid, settings)


@pytest.mark.parametrize("renorm", ["text_channel", "channel", "global"])
def test_guided_sampling_equals_three_separate_branches(renorm):
    """One forward pass for all branches, against each branch run alone from its own context."""
    network = random_network()
    images, _, ids, lengths, _, _, grid = small_pack(contexts=1)
    ids, lengths = ids[:1, :4], lengths[:1]
    settings = dataclasses.replace(
        SMALL.settings, steps=3, text_scale=4.0, image_scale=2.0, renorm=renorm, interval=(0.5, 1.0)
    )
    noise = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(3))
    got = sampled(network, images, ContextText(ids, lengths), noise, grid, settings)

    def v(memory, x, t):
        return velocity_behind(network, memory, x, t, grid)

    with torch.no_grad():
        context, full = context_of(network, images), context_of(network, images, ids)
        words = context_of(network, (), ids)
        x, times = noise, [1.0, 6 / 7, 3 / 5, 0.0]  # 3 tau / (1 + 2 tau) at tau = 1, 2/3, 1/3, 0
        for t, after in itertools.pairwise(times):
            w = v(full, x, t)
            if t > 0.5:
                p, u = w, v(context, x, t) + 4 * (w - v(context, x, t))
                if renorm == "text_channel":
                    u = u * (p.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)).clamp(
                        max=1
                    )
                alone = v(words, x, t)
                w = alone + 2 * (u - alone)
                if renorm == "channel":
                    w = w * (p.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True)).clamp(
                        max=1
                    )
                if renorm == "global":
                    w = w * (p.norm() / w.norm()).clamp(max=1)
            x = x - (t - after) * w
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


def test_a_denoising_step_compiles_whole():
    """No graph break: nothing in the step waits for the device or looks at a tensor's values."""
    network = random_network(dataclasses.replace(SMALL, layers=1))
    images, _, ids, lengths, _, _, grid = small_pack(contexts=1)
    settings = dataclasses.replace(SMALL.settings, steps=2, text_scale=4.0, image_scale=2.0)
    noise = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(3))
    text = ContextText(ids[:1, :4], lengths[:1])
    want = sampled(network, images, text, noise, grid, settings)
    network.denoise = torch.compile(network.denoise, fullgraph=True, backend="aot_eager")
    got = sampled(network, images, text, noise, grid, settings)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_without_an_image_the_third_branch_is_the_first():
    """BAGEL runs "no images" for text-to-image too, where it equals "everything": the effective text scale grows."""
    network = random_network()
    words = ContextText(torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]))
    noise = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(3))
    plain = dataclasses.replace(SMALL.settings, steps=1, shift=1.0, renorm="global", renorm_min=1.0)
    views = []
    for text_scale, image_scale in ((4.0, 1.5), (4.0 + 0.5 * 3.0, 1.0), (4.0, 1.0)):
        scales = {"text_scale": text_scale, "image_scale": image_scale}
        settings = dataclasses.replace(plain, **scales)
        views.append(sampled(network, [], words, noise, (2, 3), settings))
    torch.testing.assert_close(views[0], views[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(views[0], views[2], atol=1e-3)


def test_guidance_of_scale_one_is_off():
    v = torch.ones(2, 5, 12)
    assert guided([v], SMALL.settings) is v


def test_velocity_and_clean_latent_are_two_views_of_one_output():
    x0, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.7, 1.0])[:, None, None]
    x = (1 - t) * x0 + t * noise
    velocity = velocity_from_output(x0, x, t, "x0")
    torch.testing.assert_close(velocity, noise - x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x0_from_output(velocity, x, t, "velocity"), x0, rtol=1e-4, atol=1e-4)


def tiny(seed=0, **changes):
    model = WorldModel.tiny(seed, **changes)
    with torch.no_grad():
        model.network.llm2vae.weight.normal_(
            std=0.05, generator=torch.Generator().manual_seed(seed)
        )
    return model


def queries(count=5):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    motions = [
        "turn 45 degrees to the left",
        "move 1.5 meters to the left",
        "move forward by 1 meters parallel to the ground",
        "pitch up by 10 degrees",
        "turn 90 degrees to the right",
    ]
    return [
        Query(
            images[: 2 + i],
            1 + i % 2,
            f"Base on the viewpoint of Image-{1 + i % 2}, {motions[i]}.",
            seed=10 + i,
        )
        for i in range(count)
    ]


def test_a_query_gives_the_same_view_alone_and_in_a_mixed_batch():
    model = tiny()
    together = model.imagine(queries() + queries()[::-1])
    for query, a, b in zip(queries(), together, together[::-1], strict=False):
        alone = model.imagine([query])[0].astype(int)
        assert (
            alone.shape == (32, 32, 3)
            and np.abs(alone - a).max() <= 1
            and np.abs(alone - b).max() <= 1
        )
    for a, b in zip(together[:5] * 2, model.imagine(queries() * 2, batch=2), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    other = model.imagine([queries()[0]._replace(seed=99)])[0]
    assert np.abs(other.astype(int) - together[0]).max() > 1


def test_the_reference_is_shown_last_after_the_latest_others():
    images = [np.full((32, 32, 3), level, np.uint8) for level in range(5)]
    for most, reference, order in ((4, 5, [1, 2, 3, 4]), (4, 2, [2, 3, 4, 1]), (2, 4, [4, 3])):
        shown, _ = tiny(max_context=most).arrange(images, reference)
        assert [image[0, 0, 0] for image in shown] == order


def test_the_network_is_told_how_images_stand_to_the_reference_in_the_order_shown():
    ring = [np.full((32, 32, 3), level, np.uint8) for level in (0, 60, 120, 180)]
    model = tiny()
    turns = model.arrange(ring, 2)[1]
    np.testing.assert_allclose(np.mod(turns[:, 3], 360), [270, 180, 90, 0], atol=1e-6)
    assert not turns[:, [0, 1, 2, 4]].any()


def test_an_imagined_view_stands_where_its_calls_led():
    """By hand: a metre ahead of Image-2, which looks left, is a metre left of Image-1; from there a look up."""
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 60, 120, 180, 0, 60)]
    ahead = call_of(2, Motion("dy", 1.0))
    calls = [None] * 4 + [ahead, call_of(5, Motion("dphi", 20.0))]
    model = tiny(max_context=6)
    _, deltas = model.arrange(images, 1, calls)  # shown: Image-2 to 6, then 1
    np.testing.assert_allclose(deltas[3], [-1, 0, 0, -90, 0], atol=1e-6)
    np.testing.assert_allclose(deltas[4], [-1, 0, 0, -90, 20], atol=1e-6)
    _, deltas = model.arrange(images, 6, calls)  # shown: Image-1 to 6
    np.testing.assert_allclose(deltas[0], [0, -1, 0, 90, 0], atol=1e-6)
    np.testing.assert_allclose(deltas[5], [0, 0, 0, 0, 20], atol=1e-6)  # levelled: as it looks up


def test_rays_after_a_motion_are_those_of_the_camera_that_moved():
    """By hand: the direction of a pixel of the moved camera, in the reference's axes, and where it is after 2.5 m."""
    x, y = torch.tensor([-0.75, 0.25]), torch.tensor([0.5, -0.25])
    start = [0.4, 1.1, 0.2]  # right, forward, up
    for yaw, pitch in ((65.0, 0.0), (0.0, 20.0), (-120.0, -10.0)):
        motion = torch.tensor([*start, yaw, pitch])
        direction = np.stack([x, y, np.ones(2)], 1) @ camera_pose(0, 0, 0, yaw, pitch)[:3, :3].T
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        direction = direction[:, [0, 2, 1]] * [1, 1, -1]  # right, forward, up
        rays = ray_direction(motion, x, y)
        features = ray_features(motion, rays)
        assert features.shape == (2, RAY_FEATURES)
        azimuth = np.arctan2(direction[:, 0], direction[:, 1])
        np.testing.assert_allclose(features[:, 0], np.arcsin(direction[:, 2]), atol=1e-6)
        np.testing.assert_allclose(features[:, 1:4], np.cross(start, direction), atol=1e-6)
        np.testing.assert_allclose(features[:, 5], np.sin(azimuth), atol=1e-6)
        np.testing.assert_allclose(features[:, 10], np.cos(3 * azimuth), atol=1e-6)
        point = start + 2.5 * direction
        azimuth = np.arctan2(point[:, 0], point[:, 1])
        elevation = np.arctan2(point[:, 2], np.hypot(point[:, 0], point[:, 1]))
        want = np.stack([*(k * azimuth for k in (1, 2, 3, 4)), elevation, 2 * elevation], 1)
        np.testing.assert_allclose(ray_angles(motion, rays, 2), want, atol=1e-5)
    turns = [torch.tensor([0, 0, 0, sign * 180.0, 0]) for sign in (1, -1)]
    half = [ray_features(turn, ray_direction(turn, x, y)) for turn in turns]
    torch.testing.assert_close(*half, rtol=0, atol=1e-5)


def test_a_turn_by_any_amount_moves_context_and_target_alike():
    """Scores between a target's rays and the context's depend on the angle between them alone, as RoPE's do."""
    network = random_network(dataclasses.replace(SMALL, settings=DEPARTURES))
    ids = torch.arange(4)
    q, k = torch.randn(2, 1, 1, 4, network.config.width // network.config.heads).unbind()
    scores = []
    for turn in (0.0, 37.0):
        turned = []
        for vector, yaw in ((q, 20.0 + turn), (k, -50.0 + turn)):
            _, angles = network.rays(torch.tensor([[[0.0, 0.0, 0.0, yaw, 0.0]]]), ids)
            turned.append(rotate(vector, network.rope(torch.zeros(1, 4), angles)))
        scores.append(turned[0] @ turned[1].transpose(2, 3))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_a_sentence_that_names_the_reference_otherwise_gives_the_same_view():
    """It is shown as the last one, whatever its number was, and the sentence says the number in the order shown."""
    images, model = queries(3)[2].images, tiny()
    words = "Base on the viewpoint of Image-{}, move 1 meters to the left."
    last = Query([*images[2:], *images[:2]], len(images), words.format(len(images)), 5)
    views = model.imagine([Query(images, 2, words.format(2), seed=5), last])
    assert np.array_equal(*views)


def test_a_view_has_the_size_of_its_reference():
    images = [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    words = "Based on the last image, pitch up by 10 degrees."
    queries = [Query(images, reference, words, 0) for reference in (1, 2)]
    assert [view.shape for view in tiny().imagine(queries)] == [(32, 32, 3), (16, 32, 3)]


def test_what_the_simulator_does_not_see_is_said_once(capsys):
    model, images = tiny(), [np.zeros((32, 32, 3), np.uint8)] * 6
    for count in (5, 6, 6):
        model.imagine(
            [Query(images[:count], 1, "Base on the viewpoint of Image-1, look up 10 degrees.", 0)],
            steps=1,
        )
    assert capsys.readouterr().out.count("Of more than 5 images the simulator sees") == 1


# ---------------------------------------------------------------- checkpoint files


def test_save_and_load_give_the_same_model(tmp_path):
    model = tiny()
    model.save(tmp_path)
    again = WorldModel.load(tmp_path)
    assert again.settings == model.settings and again.network.config == model.network.config
    ours, theirs = model.network.state_dict(), again.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # weights in a file's map are aligned otherwise, and other kernels round otherwise: into memory of their own
    again.network.load_state_dict(
        {key: value.clone() for key, value in theirs.items()}, assign=True
    )
    for a, b in zip(model.imagine(queries()), again.imagine(queries()), strict=True):
        assert np.array_equal(a, b)


def test_true_size_has_the_released_checkpoint_s_keys():
    state = bagel_7b().state_dict()
    assert len(state) == 1223 and sum(value.numel() for value in state.values()) == 14_607_260_128
    for key, shape in {
        "language_model.model.embed_tokens.weight": (152064, 3584),
        "language_model.lm_head.weight": (152064, 3584),
        "language_model.model.layers.27.self_attn.k_proj_moe_gen.bias": (512,),
        "language_model.model.layers.0.self_attn.q_norm.weight": (128,),
        "language_model.model.layers.0.mlp_moe_gen.down_proj.weight": (3584, 18944),
        "language_model.model.norm_moe_gen.weight": (3584,),
        "time_embedder.mlp.0.weight": (3584, 256),
        "vae2llm.weight": (3584, 64),
        "llm2vae.bias": (64,),
        "latent_pos_embed.pos_embed": (4096, 3584),
        "vit_pos_embed.pos_embed": (4900, 3584),
        "connector.fc1.weight": (3584, 1152),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 588),
        "vit_model.vision_model.encoder.layers.25.self_attn.out_proj.weight": (1152, 1152),
        "vit_model.vision_model.post_layernorm.weight": (1152,),
    }.items():
        assert tuple(state[key].shape) == shape, key


def test_broken_and_missing_checkpoints_are_sentences(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_wm.py"):
        WorldModel.load(tmp_path / "nothing")
    tiny().save(tmp_path)
    whole = (tmp_path / "ema.safetensors").read_bytes()
    (tmp_path / "ema.safetensors").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        WorldModel.load(tmp_path)
    (tmp_path / "ema.safetensors").write_bytes(whole)
    vit = json.loads((tmp_path / "vit_config.json").read_text())
    (tmp_path / "vit_config.json").write_text(json.dumps(vit | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="does not fit"):
        WorldModel.load(tmp_path)


# ---------------------------------------------------------------- small formulas


def test_resize_rule():
    vae, vit = (1024, 512, 16), (980, 224, 14)
    for (w, h), want_vae, want_vit in [
        ((1920, 1080), (1024, 576), (980, 546)),
        ((512, 512), (512, 512), (518, 518)),
        ((64, 100), (512, 800), (224, 350)),
        ((1300, 256), (1024, 208), (980, 196)),
        ((640, 490), (672, 512), (644, 490)),
    ]:
        assert resized(w, h, vae) == want_vae and resized(w, h, vit) == want_vit
    assert resized(32, 32, (32, 32, 8)) == (32, 32)


def test_patchify_order_and_inverse():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 6, generator=g)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 20)
    assert (
        tokens[1, 1 * 3 + 2, (1 * 2 + 0) * 5 + 3] == x[1, 3, 2 * 1 + 1, 2 * 2 + 0]
    )  # token (1, 2): row 1, column 0
    torch.testing.assert_close(unpatchify(tokens, 2, 2, 3), x, rtol=0, atol=0)
    pixels = torch.randn(2, 3, 32, 32, generator=g)
    latent = PixelLatents().encode(pixels)
    assert latent.shape == (2, 48, 8, 8) and torch.equal(PixelLatents().decode(latent), pixels)


def test_position_table_and_time_embedding():
    network = random_network()
    table = network.latent_pos_embed(
        table_ids((2, 3), 5)
    )  # rows 0..1, columns 0..2, of a grid of 5
    w = 10_000.0 ** (-np.arange(8) / 8)
    want = np.concatenate(
        [np.sin(2 * w), np.cos(2 * w), np.sin(1 * w), np.cos(1 * w)]
    )  # row 1, column 2
    np.testing.assert_allclose(table[1 * 3 + 2], want, atol=1e-6)
    t, m = torch.tensor([0.0, 0.3]), network.time_embedder.mlp
    f = torch.exp(-np.log(10_000) * torch.arange(128) / 128)
    wave = torch.cat([torch.cos(t[:, None] * f), torch.sin(t[:, None] * f)], -1)
    torch.testing.assert_close(
        network.time_embedder(t), m[2](F.silu(m[0](wave))), rtol=1e-5, atol=1e-5
    )


def test_command_line_says_what_is_missing_and_draws_a_view(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(f"{name}.png")
    command = ["--images", "a.png", "b.png", "--reference", "1", "--motion", "Turn left 30"]
    with pytest.raises(SystemExit, match="train_wm.py"):
        world_model.main(command)
    tiny().save("out/wm")
    world_model.main(command)
    assert (
        Image.open("view.png").size == (32, 32)
        and "Based on the last image, turn 30 degrees to the left.\n->" in capsys.readouterr().out
    )
    world_model.main([*command, "--context", "1"])
    with pytest.raises(SystemExit, match="no Image-7"):
        world_model.main([*command[:4], "7", *command[5:]])
    with pytest.raises(SystemExit, match="jump"):
        world_model.main([*command[:-1], "jump twice"])
    one = np.asarray(Image.open("view.png"))
    capsys.readouterr()
    world_model.main([*command, "move forward 0.5", "pitch up 10"])
    assert capsys.readouterr().out.count("Based on the last image, ") == 3
    assert not np.array_equal(one, np.asarray(Image.open("view.png")))
    Image.new("RGB", (64, 48)).save("photograph.png")
    world_model.main(["--images", "photograph.png", "--motion", "turn left 30"])
    assert "a tiny model: it knows rooms of 32 x 32 pixels only" in capsys.readouterr().out


def sampler_options_of(line):
    parser = argparse.ArgumentParser()
    world_model.add_sampler_flags(parser)
    return world_model.sampler_options(parser.parse_args(line.split()))


def test_only_the_knobs_that_are_given_turn(tmp_path, capsys):
    assert sampler_options_of("") == {}
    line = "--steps 2 --shift 5 --text-scale 4 --image-scale 1.5 --renorm global --renorm-min 0.2"
    options = sampler_options_of(f"{line} --interval 0.4 1 --taylor")
    assert options == {
        "steps": 2,
        "shift": 5.0,
        "text_scale": 4.0,
        "image_scale": 1.5,
        "renorm": "global",
        "renorm_min": 0.2,
        "interval": (0.4, 1.0),
        "taylor": True,
    }
    assert sampler_options_of("--no-taylor --int8") == {"taylor": False, "int8": True}
    model = tiny()
    model.save(tmp_path)
    turned = WorldModel.load(tmp_path, **options)
    assert turned.settings == dataclasses.replace(model.settings, **options)
    plain = options | {"taylor": False}  # what taylor does stands in extras
    views = WorldModel.load(tmp_path).imagine(queries(2), **plain)
    for a, b in zip(turned.imagine(queries(2), taylor=False), views, strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(SystemExit, match="LOW must be below HIGH"):
        sampler_options_of("--interval 0.8 0.4")
    with pytest.raises(SystemExit):
        sampler_options_of("--renorm local")
    assert "'channel', 'global'" in capsys.readouterr().err


def test_transparent_pictures_lie_on_white_and_unknown_guidance_is_a_sentence(tmp_path):
    pixels = np.full((4, 4, 4), 100, np.uint8)
    pixels[:, :2, 3], pixels[:, 2:, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    shown = load_image(tmp_path / "half.png")
    assert (shown[:, :2] == 255).all() and (shown[:, 2:] == 100).all()
    with pytest.raises(ValueError, match="'local' is none of text_channel"):
        tiny().imagine(queries(1), renorm="local")
