"""
Speed of the world model's sampler against the straightforward one of bench/naive.py: `python -m bench wm`.

The two ways take turns (A B A B ...) on the same queries; their medians are compared, and so are their latents. `Squares`
stands in for the autoencoder, so that the sampler alone is timed.
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
from bench.timing import print_json
from data import MOTIONS
from lib.bagel import Bagel, Config, Settings
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


def ring_views(seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The four given views of a room, as the demo shows them, and their poses (4, 4, 4)."""
    poses = np.stack(ring(np.random.default_rng(seed)))
    return list(render(random_room(seed), poses, size=32)["rgb"]), poses


def rollout_queries(rooms: int = 8) -> list[Query]:
    """What a rollout asks at once: four questions in each room, each from another view of its ring of four."""
    queries = []
    for seed in range(rooms):
        images, _ = ring_views(seed)
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
    """Medians of the fast way and of the straightforward one, in CPU seconds of all threads; the largest difference of
    their latents."""

    fast: float
    naive: float
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


def timed_run(model: WorldModel, imagine: Callable) -> tuple[float, list]:
    """Run `imagine` once: (seconds of CPU over all threads, latents)."""
    with latents_of(model) as latents:
        start = time.process_time()
        imagine()
        return time.process_time() - start, latents


def compare_ways(
    title: str, model: WorldModel, queries: list[Query], repeats: int, **changes
) -> Comparison:
    """A B A B ...: `repeats` times WorldModel.imagine, then the straightforward way, on the same queries.

    All queries have pictures of the same sizes: then `imagine` decodes them in their order, and latents can be paired.
    """
    model.imagine(queries, **changes | {"steps": 1})  # warm up
    naive.imagine(model, queries[:1], **changes | {"steps": 1})
    pairs = []
    for number in range(repeats):
        fast, ours = timed_run(model, lambda: model.imagine(queries, **changes))
        slow, theirs = timed_run(model, lambda: naive.imagine(model, queries, **changes))
        gaps = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
        pairs.append(Comparison(fast, slow, max(gaps)))
        line = f"{fast:.2f} s against {slow:.2f} s"
        print(f"  {title}, pair {number + 1} of {repeats}: {line}", flush=True)
    fast, slow, gaps = zip(*pairs, strict=True)
    return Comparison(statistics.median(fast), statistics.median(slow), max(gaps))


# ---- python -m bench wm ----------------------------------------------------------------------------------------------


def wm(args) -> None:
    """The demo's model with a rollout's queries, then the middle size alone and in a batch of eight: a table, JSON."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rooms, pixels, layers, repeats = (2, 64, 2, 1) if args.quick else (8, 256, 8, args.repeats)
    demo = WorldModel.tiny()
    stirred(demo.network)
    model = middle_model(pixels, layers)
    changes = GUIDED | {"steps": args.steps}
    print(
        f"fast against straightforward, {args.threads} CPU threads, fp32; the middle size: two {pixels} x {pixels} "
        f"pictures, {args.steps} steps, both guidances",
        flush=True,
    )
    rows = {"demo32": compare_ways("demo's model", demo, rollout_queries(rooms), repeats)}
    for batch in (1, 8):
        queries = pair_queries(batch, pixels)
        pairs = repeats if batch == 1 else (repeats + 1) // 2
        title = f"middle size, batch {batch}"
        rows[f"b{batch}"] = compare_ways(title, model, queries, pairs, **changes)
    results = {"bench": "wm", "threads": args.threads, "steps": args.steps, "quick": args.quick}
    lines = []
    for name, row in rows.items():
        results[f"speedup_{name}"] = row.naive / row.fast
        lines.append([name, row.fast, row.naive, row.naive / row.fast, f"{row.max_diff:.1e}"])
    print("\n" + text_table(["median CPU seconds", "fast", "naive", "ratio", "max diff"], lines))
    results["max_diff"] = max(row.max_diff for row in rows.values())
    print_json(results)
