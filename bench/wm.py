"""
Speed of the world model's sampler against the straightforward one of bench/naive.py: `python -m bench wm`.

The two ways take turns (A B A B ...) on the same queries; their medians are compared, and so are their latents. Shares
are of the best torch.mm rate over the layers' own shapes, kept up for seconds right behind each run (beside it, of the
best burst), and count the arithmetic that is needed (`needed_flops`), not what was done. `Squares` stands in for the
autoencoder, so that the sampler alone is timed.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench import naive
from bench.timing import best_matmul_rate, print_json, sustained_matmul_rate
from data import MOTIONS
from lib.bagel import LATENT_PATCH, Bagel, Config, Settings, resized
from lib.distributed import keep_freed_memory
from lib.geometry import Query
from lib.rooms import random_room, render, ring
from lib.scores import text_table
from lib.simulators import instruction
from lib.tiny import tiny_tokenizer
from world_model import WorldModel, initialise

GUIDED = {"text_scale": 4.0, "image_scale": 2.0}

# ---- models and queries ----------------------------------------------------------------------------------------------


class Squares:
    """A stand-in for the FLUX autoencoder that takes no time: 8 x 8 pixels, projected to 16 numbers. It draws nothing."""

    cell, channels = 8, 16

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(3 * self.cell**2, self.channels, generator=generator)
        self.basis = torch.linalg.qr(matrix)[0]  # (192, 16), orthonormal

    def encode(self, pixels, streams=None):
        """pixels (B, 3, H, W) -> latent (B, 16, H/8, W/8)."""
        cells = F.pixel_unshuffle(pixels, self.cell)
        return torch.einsum("bphw,pc->bchw", cells, self.basis.to(pixels.device))

    def decode(self, latent):
        """latent (B, 16, h, w) -> pixels (B, 3, 8 h, 8 w)."""
        cells = torch.einsum("bchw,pc->bphw", latent.float(), self.basis.to(latent.device))
        return F.pixel_shuffle(cells, self.cell)


def middle_model(pixels: int = 256, layers: int = 8) -> WorldModel:
    """The middle size, where arithmetic is the bound: 63 M parameters in its layers, pictures of `pixels` a side."""
    side = pixels // 14 * 14
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
        token_channels=64,
        settings=Settings(vae_limits=(pixels, pixels, 16), vit_limits=(side, side, 14)),
    )
    network = Bagel(config)
    initialise(network)
    return WorldModel(stirred(network), Squares(), tiny_tokenizer(), files={})


def stirred(network: Bagel) -> Bagel:
    """The network with every weight moved a little, so that llm2vae is not zero and no expert is its twin's copy."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return network.requires_grad_(False).eval()


def rollout_queries(rooms: int = 8) -> list[Query]:
    """What a rollout asks at once: four questions in each room, each from another view of its ring of four."""
    queries = []
    for seed in range(rooms):
        poses = np.stack(ring(np.random.default_rng(seed)))
        images = list(render(random_room(seed), poses, size=32)["rgb"])
        for reference in range(1, 5):
            number = len(queries)
            sentence = instruction(MOTIONS[number % len(MOTIONS)], reference)
            queries.append(Query(images, reference, sentence, seed=number))
    return queries


def pair_queries(count: int, pixels: int) -> list[Query]:
    """`count` queries, each with two pictures and a sentence of its own."""
    rng = np.random.default_rng(0)
    queries = []
    for number in range(count):
        images = list(rng.integers(0, 256, (2, pixels, pixels, 3), dtype=np.uint8))
        sentence = instruction(MOTIONS[number % len(MOTIONS)], 2)
        queries.append(Query(images, 2, sentence, seed=number))
    return queries


# ---- measuring -------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Medians, in seconds, of the fast way and of the straightforward one; the largest difference of their latents."""

    fast: float
    naive: float
    fast_cpu: float
    naive_cpu: float
    max_diff: float


@contextlib.contextmanager
def latents_of(model: WorldModel) -> Iterator[list]:
    """A list that collects every final latent (c, 2 h, 2 w): what `model.autoencoder.decode` is given."""
    latents = []
    decode = model.autoencoder.decode

    def watched(latent):
        latents.extend(latent)
        return decode(latent)

    model.autoencoder.decode = watched
    try:
        yield latents
    finally:
        model.autoencoder.decode = decode


def timed_run(model: WorldModel, imagine: Callable) -> tuple[float, float, list]:
    """Run `imagine` once: (seconds, seconds of CPU over all threads, latents)."""
    with latents_of(model) as latents:
        wall, cpu = time.perf_counter(), time.process_time()
        imagine()
        return time.perf_counter() - wall, time.process_time() - cpu, latents


def compare_ways(
    title: str,
    model: WorldModel,
    queries: list[Query],
    repeats: int,
    after: Callable = lambda: None,
    **changes,
) -> Comparison:
    """A B A B ...: `repeats` times WorldModel.imagine, then the straightforward way, on the same queries.

    after   called behind each A
    All queries have pictures of the same sizes: then `imagine` decodes them in their order, and latents can be paired.
    """
    model.imagine(queries, **changes | {"steps": 1})  # warm up
    naive.imagine(model, queries[:1], **changes | {"steps": 1})
    pairs = []
    for number in range(repeats):
        fast, fast_cpu, ours = timed_run(model, lambda: model.imagine(queries, **changes))
        after()
        slow, slow_cpu, theirs = timed_run(model, lambda: naive.imagine(model, queries, **changes))
        gaps = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        pairs.append(Comparison(fast, slow, fast_cpu, slow_cpu, max(gaps)))
        line = f"{fast:.2f} s against {slow:.2f} s"
        print(f"  {title}, pair {number + 1} of {repeats}: {line}", flush=True)
    columns = list(zip(*pairs, strict=True))
    return Comparison(*map(statistics.median, columns[:4]), max_diff=max(columns[4]))


def needed_flops(config, words: int, images: list, tokens: int, steps: int, branches: int) -> float:
    """The arithmetic of linear layers and of attention that one view needs, whatever the program does; in FLOP.

    words     tokens of the sentence;   images   (latent tokens, ViT tokens) of each context image
    tokens    latent tokens of the view;   branches   1; 2 with "no text"; 3 with "no images" as well
    A multiply-add is 2. Keys count where a query may see them; in the last layer only the tokens whose result is used
    need more than keys and values. Left out: norms, softmax, activations, embeddings of time, place and words.
    """
    c = config
    key_value = 4 * c.width * (c.width // c.heads) * c.kv_heads
    rest = 4 * c.width**2 + 6 * c.width * c.mlp

    def segment(count, keys, used):
        """`count` tokens that see `keys` keys each, on average; `used` of them are read after the last layer."""
        full = (
            c.layers - 1
        ) * count + used  # tokens times layers that need more than keys and values
        return c.layers * count * key_value + full * (rest + 4 * c.width * keys)

    def sentence(past):
        return segment(words, past + (words + 1) / 2, 0)

    flops, past = 0.0, 0
    for latent, vit in images:
        flops += 2 * latent * c.token_channels * c.width
        flops += segment(latent + 2, past + latent + 2, 0)
        patches = 3 * c.vit_patch**2 * c.vit_width
        connector = c.vit_width * c.width + c.width**2
        flops += vit * 2 * (patches + connector)
        layer = 8 * c.vit_width**2 + 4 * c.vit_width * c.vit_mlp + 4 * c.vit_width * vit
        flops += vit * c.vit_layers * layer
        flops += segment(vit + 2, past + latent + 2 + vit + 2, 0)
        past += latent + vit + 4
    flops += sentence(past)
    if branches == 3:
        flops += sentence(0)
    ends = 4 * tokens * c.token_channels * c.width  # vae2llm and llm2vae
    for before in (past + words, past, words)[:branches]:
        flops += steps * (segment(tokens + 2, before + tokens + 2, tokens) + ends)
    return flops


def work_of(model: WorldModel, query: Query, steps: int) -> float:
    """`needed_flops` of a query with both guidances, all its pictures of one size."""
    height, width = query.images[0].shape[:2]
    latent, vit = picture_tokens(model, width, height)
    words = len(model.token_ids(query.instruction))
    images = [(latent, vit)] * len(query.images)
    return needed_flops(model.network.config, words, images, latent, steps, branches=3)


def picture_tokens(model: WorldModel, width: int, height: int) -> tuple[int, int]:
    """Tokens of a picture: as latents, as ViT features."""
    cell = model.autoencoder.cell * LATENT_PATCH
    patch = model.network.config.vit_patch
    columns, rows = resized(width, height, model.settings.vae_limits)
    vit_columns, vit_rows = resized(width, height, model.settings.vit_limits)
    return columns * rows // cell**2, vit_columns * vit_rows // patch**2


# ---- python -m bench wm ----------------------------------------------------------------------------------------------


def wm(args) -> None:
    """The demo's model with a rollout's queries, then the middle size alone and in a batch of eight: tables, JSON."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    rooms, pixels, layers, repeats = (2, 64, 2, 1) if args.quick else (8, 256, 8, args.repeats)
    demo = WorldModel.load(args.model) if args.model else WorldModel.tiny()
    if not args.model:
        stirred(demo.network)
    model = middle_model(pixels, layers)
    changes = GUIDED | {"steps": args.steps}
    print(
        f"fast against straightforward, {args.threads} CPU threads, fp32; the middle size: two {pixels} x {pixels} "
        f"pictures, {args.steps} steps, both guidances",
        flush=True,
    )
    rows = {"demo32": compare_ways("demo's model", demo, rollout_queries(rooms), repeats)}
    flops, sustained, burst = {}, {}, 0.0
    for batch in (1, 8):
        name, queries = f"b{batch}", pair_queries(batch, pixels)
        tokens, rates = 3 * batch * (pixels // 16) ** 2, []

        def measure(tokens=tokens, rates=rates):
            seconds = 0.05 if args.quick else 3.0
            rates.append(sustained_matmul_rate(model.network.config, tokens, seconds))

        title = f"middle size, batch {batch}"
        pairs = repeats if batch == 1 else (repeats + 1) // 2
        rows[name] = compare_ways(title, model, queries, pairs, measure, **changes)
        sustained[name] = statistics.median(rates)
        flops[name] = sum(work_of(model, query, args.steps) for query in queries)
        burst = max(burst, best_matmul_rate(model.network.config, tokens))
    report(args, rows, flops, sustained, burst)


def report(args, rows: dict, flops: dict, sustained: dict, burst: float) -> None:
    """The tables of `wm`, and its line of JSON."""
    lines = []
    for name, row in rows.items():
        ratios = [row.naive / row.fast, row.naive_cpu / row.fast_cpu]
        lines.append([name, row.fast, row.naive, *ratios, f"{row.max_diff:.1e}"])
    head = ["median seconds", "fast", "naive", "ratio", "CPU ratio", "max diff"]
    print("\n" + text_table(head, lines))
    rates = {name: flops[name] / rows[name].fast for name in flops}
    lines = []
    for name, rate in rates.items():
        giga = [f"{value / 1e9:.0f}" for value in (flops[name], rate, sustained[name])]
        lines.append([name, *giga, f"{rate / sustained[name]:.1%}"])
    print(text_table(["work", "GFLOP", "GFLOP/s", "torch.mm", "share"], lines))
    print(f"torch.mm: kept up for seconds, right behind the run; its best burst: {burst / 1e9:.0f}")
    results = {"bench": "wm", "threads": args.threads, "steps": args.steps, "quick": args.quick}
    for name, row in rows.items():
        results[f"speedup_{name}"] = row.naive / row.fast
    demo = rows["demo32"]
    results["speedup_demo32_cpu"] = demo.naive_cpu / demo.fast_cpu
    results["matmul_share"] = rates["b8"] / sustained["b8"]
    results["matmul_share_b1"] = rates["b1"] / sustained["b1"]
    results["matmul_gflops"] = sustained["b8"] / 1e9
    results["matmul_share_of_burst"] = rates["b8"] / burst
    results["matmul_gflops_burst"] = burst / 1e9
    results["max_diff"] = max(row.max_diff for row in rows.values())
    print_json(results)
