"""
Speed of the world model's sampler against the straightforward one of bench/naive.py: `python -m bench wm`.

The two ways take turns (A B A B ...) on the same queries; their medians are compared, and so are their latents. Shares
are of the best torch.mm rate over the layers' own shapes, kept up for seconds right behind each run (beside it, of the
best burst), and count the arithmetic that is needed (`needed_flops`), not what was done. `Squares` stands in for the
autoencoder, so that the sampler alone is timed.
"""

import contextlib
import json
import statistics
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench import naive
from data import MOTIONS
from lib.bagel import LATENT_PATCH, Bagel, Config, Settings
from lib.bagel_files import resized
from lib.common import keep_freed_memory
from lib.geometry import Query, instruction
from lib.rooms import random_room, render, ring
from lib.tiny import tiny_tokenizer
from world_model import WorldModel, initialise

# ---------------------------------------------------------------- models and queries


class Squares:
    """A stand-in for the FLUX autoencoder that takes no time: 8 x 8 pixels, projected to 16 numbers, plus noise."""

    cell, channels, random = 8, 16, True

    def __init__(self):
        draw = torch.randn(
            3 * self.cell**2, self.channels, generator=torch.Generator().manual_seed(0)
        )
        self.basis = torch.linalg.qr(draw)[0]  # (192, 16), orthonormal

    def encode(self, pixels, noise=0.0):
        """pixels (B, 3, H, W) -> latent (B, 16, H/8, W/8)."""
        cells = F.pixel_unshuffle(pixels, self.cell)
        return torch.einsum("bphw,pc->bchw", cells, self.basis.to(pixels.device)) + 0.1 * noise

    def decode(self, latent):
        """latent (B, 16, h, w) -> pixels (B, 3, 8 h, 8 w)."""
        cells = torch.einsum("bchw,pc->bphw", latent.float(), self.basis.to(latent.device))
        return F.pixel_shuffle(cells, self.cell)


def middle(pixels=256, layers=8):
    """The middle size, where arithmetic is the bound: 63 M parameters in its layers, pictures of `pixels` a side."""
    settings = Settings(
        vae_limits=(pixels, pixels, 16), vit_limits=(pixels // 14 * 14, pixels // 14 * 14, 14)
    )
    config = Config(
        width=512,
        layers=layers,
        heads=8,
        kv_heads=4,
        mlp=2048,
        vocabulary=len(tiny_tokenizer()),
        eps=1e-6,
        rope_base=1e6,
        vit_width=256,
        vit_layers=4,
        vit_heads=4,
        vit_mlp=1024,
        vit_patch=14,
        vit_grid=20,
        latent_grid=16,
        latent_numbers=64,
        settings=settings,
    )
    network = Bagel(config)
    initialise(network)
    return WorldModel(stirred(network), Squares(), tiny_tokenizer(), files={})


def stirred(network):
    """The network with every weight moved a little, so that llm2vae is not zero and no expert is its twin's copy."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return network.requires_grad_(False).eval()


def rollout_queries(rooms=8):
    """What a rollout asks at once: four questions in each room, each from another view of its ring of four."""
    queries = []
    for seed in range(rooms):
        images = list(
            render(random_room(seed), np.stack(ring(np.random.default_rng(seed))), size=32)["rgb"]
        )
        for reference in range(1, 5):
            motion = MOTIONS[len(queries) % len(MOTIONS)]
            queries.append(
                Query(images, reference, instruction(motion, reference), seed=len(queries))
            )
    return queries


def pair_queries(count, pixels):
    """`count` queries, each with two pictures and a sentence of its own."""
    rng = np.random.default_rng(0)
    return [
        Query(
            list(rng.integers(0, 256, (2, pixels, pixels, 3), dtype=np.uint8)),
            2,
            instruction(MOTIONS[i % len(MOTIONS)], 2),
            seed=i,
        )
        for i in range(count)
    ]


# ---------------------------------------------------------------- measuring


class Comparison(NamedTuple):
    """Medians, in seconds, of the fast way and of the straightforward one; the largest difference of their latents."""

    fast: float
    naive: float
    fast_cpu: float
    naive_cpu: float
    max_diff: float


@contextlib.contextmanager
def latents_of(model):
    """A list that collects every final latent (c, 2 h, 2 w): what `model.autoencoder.decode` is given."""
    seen, decode = [], model.autoencoder.decode
    model.autoencoder.decode = lambda latent: (seen.extend(latent), decode(latent))[1]
    try:
        yield seen
    finally:
        model.autoencoder.decode = decode


def timed(model, imagine):
    """Run `imagine` once: (seconds, seconds of CPU over all threads, latents)."""
    with latents_of(model) as latents:
        wall, cpu = time.perf_counter(), time.process_time()
        imagine()
        return time.perf_counter() - wall, time.process_time() - cpu, latents


def compare(title, model, queries, repeats, after=lambda: None, **changes):
    """A B A B ...: `repeats` times WorldModel.imagine, then the straightforward way, on the same queries.

    after   called behind each A

    All queries have pictures of the same sizes: then `imagine` decodes them in their order, and latents can be paired.
    """
    model.imagine(queries, **changes | {"steps": 1})  # warm up
    naive.imagine(model, queries[:1], **changes | {"steps": 1})
    rows = []
    for i in range(repeats):
        fast, fast_cpu, ours = timed(model, lambda: model.imagine(queries, **changes))
        after()
        slow, slow_cpu, theirs = timed(model, lambda: naive.imagine(model, queries, **changes))
        diff = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        rows.append((fast, slow, fast_cpu, slow_cpu, diff))
        print(
            f"  {title}, pair {i + 1} of {repeats}: {fast:.2f} s against {slow:.2f} s", flush=True
        )
    *medians, _ = (statistics.median(column) for column in zip(*rows))
    return Comparison(*medians, max_diff=max(row[-1] for row in rows))


def best_matmul_rate(config, rows, device="cpu", dtype=torch.float32, seconds=0.15):
    """The best torch.mm rate (FLOP/s) over the layers' shapes, each with several numbers of rows up to `rows`."""
    h, kv, best = config.width, config.width // config.heads * config.kv_heads, 0.0
    for inside, out in ((h, h), (h, kv), (h, config.mlp), (config.mlp, h)):
        weight = torch.randn(out, inside, device=device, dtype=dtype).t()
        for m in sorted({min(rows, m) for m in (128, 256, 512, 1024, 2048, 8192)}):
            x, y = (torch.randn(m, side, device=device, dtype=dtype) for side in (inside, out))
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                start = clock(device)
                for _ in range(3):
                    torch.mm(x, weight, out=y)
                best = max(best, 3 * 2 * m * inside * out / (clock(device) - start))
    return best


def sustained_matmul_rate(config, rows, seconds=3.0):
    """The same over runs of `seconds` on the CPU, without a pause, the best shape's mean: what the machine keeps up.

    Servers shared with others give their full rate in bursts only; a run of minutes is compared with this one, measured
    right behind it.
    """
    h, means = config.width, []
    for inside, out in ((h, h), (h, config.mlp), (config.mlp, h)):
        weight, m = torch.randn(out, inside).t(), min(rows, 1024)
        x, y = torch.randn(m, inside), torch.empty(m, out)
        start, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            torch.mm(x, weight, out=y)
            count += 1
        means.append(count * 2 * m * inside * out / spent)
    return max(means)


def clock(device):
    """Seconds, when all that was asked of the device so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def needed_flops(config, words, images, tokens, steps, branches):
    """The arithmetic of linear layers and of attention that one view needs, whatever the program does; in FLOP.

    words     tokens of the sentence;   images   (latent tokens, ViT tokens) of each context image
    tokens    latent tokens of the view;   branches   1; 2 with "no text"; 3 with "no images" as well
    A multiply-add is 2. Keys count where a query may see them; in the last layer only the tokens whose result is used
    need more than keys and values. Left out: norms, softmax, activations, embeddings of time, place and words.
    """
    c, head = config, config.width // config.heads
    key_value, rest = 4 * c.width * head * c.kv_heads, 4 * c.width**2 + 6 * c.width * c.mlp

    def segment(count, seen, used):
        """`count` tokens that see `seen` keys each, on average; `used` of them are read after the last layer."""
        return c.layers * count * key_value + ((c.layers - 1) * count + used) * (
            rest + 4 * c.width * seen
        )

    def causal(past):
        return segment(words, past + (words + 1) / 2, 0)

    flops, past = 0.0, 0
    for latent, vit in images:
        flops += 2 * latent * c.latent_numbers * c.width + segment(latent + 2, past + latent + 2, 0)
        flops += (
            vit * 2 * (3 * c.vit_patch**2 * c.vit_width + c.vit_width * c.width + c.width**2)
        )  # and connector
        flops += (
            vit
            * c.vit_layers
            * (8 * c.vit_width**2 + 4 * c.vit_width * c.vit_mlp + 4 * c.vit_width * vit)
        )
        flops += segment(vit + 2, past + latent + 2 + vit + 2, 0)
        past += latent + vit + 4
    flops += causal(past) + (causal(0) if branches == 3 else 0)
    ends = 4 * tokens * c.latent_numbers * c.width  # vae2llm and llm2vae
    return flops + steps * sum(
        segment(tokens + 2, before + tokens + 2, tokens) + ends
        for before in (past + words, past, words)[:branches]
    )


# ---------------------------------------------------------------- where the time goes

GROUPS = {
    "matmul": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "copies": ("copy_", "cat", "stack", "index", "gather", "scatter", "fill_", "zero_", "repeat"),
}


def where_time_goes(model, queries, **changes):
    """Seconds of one Euler step of the fast way: {"matmul", "attention", "copies", "elementwise", "Python"}.

    The difference between two steps and one, so that reading the context does not count. "elementwise" is all the rest
    of torch (norms, SiLU, rotation, sums), "Python" what passes between torch's operations.
    """
    totals = []
    for steps in (1, 2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            start = time.perf_counter()
            model.imagine(queries, **changes | {"steps": steps})
            wall = time.perf_counter() - start
        groups = dict.fromkeys((*GROUPS, "elementwise"), 0.0)
        for event in profile.key_averages():
            name = event.key.removeprefix("aten::")
            kind = next(
                (kind for kind, starts in GROUPS.items() if name.startswith(starts)), "elementwise"
            )
            groups[kind] += event.self_cpu_time_total / 1e6
        totals.append(groups | {"Python": wall - sum(groups.values())})
    return {kind: totals[1][kind] - totals[0][kind] for kind in totals[0]}


# ---------------------------------------------------------------- bench.py wm


def wm(args):
    """The demo's model with a rollout's queries, then the middle size alone and in a batch of eight: tables, JSON."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rooms, pixels, layers, repeats = (2, 64, 2, 1) if args.quick else (8, 256, 8, args.repeats)
    demo = WorldModel.load(args.model) if args.model else WorldModel.tiny()
    if not args.model:
        stirred(demo.network)
    model, changes = (
        middle(pixels, layers),
        {"steps": args.steps, "text_scale": 4.0, "image_scale": 2.0},
    )
    print(
        f"fast against straightforward, {args.threads} CPU threads, fp32; the middle size: two {pixels} x {pixels} "
        f"pictures, {args.steps} steps, both guidances",
        flush=True,
    )
    rows = {"demo32": compare("demo's model", demo, rollout_queries(rooms), repeats)}
    flops, rate, kept_up = {}, 0.0, {}
    for batch in (1, 8):
        queries = pair_queries(batch, pixels)
        pairs = repeats if batch == 1 else (repeats + 1) // 2
        rates, tokens = [], 3 * batch * (pixels // 16) ** 2
        rows[f"b{batch}"] = compare(
            f"middle size, batch {batch}",
            model,
            queries,
            pairs,
            lambda: rates.append(
                sustained_matmul_rate(model.network.config, tokens, 0.05 if args.quick else 3.0)
            ),
            **changes,
        )
        kept_up[f"b{batch}"] = statistics.median(rates)
        flops[f"b{batch}"] = sum(work_of(model, query, args.steps) for query in queries)
        rate = max(rate, best_matmul_rate(model.network.config, tokens))
    shares = {name: flops[name] / rows[name].fast / kept_up[name] for name in flops}
    bursts = {name: flops[name] / rows[name].fast / rate for name in flops}

    print(
        f"\n{'median seconds':16}{'fast':>10}{'naive':>10}{'ratio':>8}{'CPU ratio':>11}{'max diff':>11}"
    )
    for name, row in rows.items():
        print(
            f"{name:16}{row.fast:10.3f}{row.naive:10.3f}{row.naive / row.fast:8.2f}"
            f"{row.naive_cpu / row.fast_cpu:11.2f}{row.max_diff:11.1e}"
        )
    print(
        f"\n{'work':16}{'GFLOP':>10}{'GFLOP/s':>10}{'torch.mm':>10}{'share':>8}   torch.mm: kept up for seconds, "
        f"right behind the run; its best burst: {rate / 1e9:.0f}"
    )
    for name in flops:
        ours = flops[name] / rows[name].fast
        print(
            f"{name:16}{flops[name] / 1e9:10.0f}{ours / 1e9:10.0f}{kept_up[name] / 1e9:10.0f}{shares[name]:8.1%}"
        )
    step = where_time_goes(model, pair_queries(8, pixels), **changes)
    print(f"\n{'one step of b8':16}{'seconds':>10}{'share':>10}")
    for kind, seconds in step.items():
        print(f"{kind:16}{seconds:10.3f}{seconds / sum(step.values()):10.1%}")

    print(
        json.dumps(
            {
                "bench": "wm",
                "threads": args.threads,
                "steps": args.steps,
                "quick": args.quick,
                **{f"speedup_{name}": round(row.naive / row.fast, 3) for name, row in rows.items()},
                "speedup_demo32_cpu": round(rows["demo32"].naive_cpu / rows["demo32"].fast_cpu, 3),
                "matmul_share": round(shares["b8"], 3),
                "matmul_share_b1": round(shares["b1"], 3),
                "matmul_gflops": round(kept_up["b8"] / 1e9, 1),
                "matmul_share_of_burst": round(bursts["b8"], 3),
                "matmul_gflops_burst": round(rate / 1e9, 1),
                "max_diff": max(row.max_diff for row in rows.values()),
            }
        )
    )


def work_of(model, query, steps):
    """`needed_flops` of a query with both guidances, all its pictures of one size."""
    c, (height, width) = model.network.config, query.images[0].shape[:2]
    latent, vit = sides(model, width, height)
    words = model.texts([query.instruction])[1].item()
    return needed_flops(c, words, [(latent, vit)] * len(query.images), latent, steps, branches=3)


def sides(model, width, height):
    """Tokens of a picture: as latents, as ViT features."""
    cell = model.autoencoder.cell * LATENT_PATCH
    return tuple(
        w * h // size**2
        for size, (w, h) in (
            (cell, resized(width, height, model.settings.vae_limits)),
            (model.network.config.vit_patch, resized(width, height, model.settings.vit_limits)),
        )
    )
