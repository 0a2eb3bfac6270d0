"""
Speed of the fast paths, as ratios to the straightforward way (tests/naive.py) in the same run.

  python bench.py wm                   the world model on two CPU cores: 10 minutes, with nothing else on the machine
  python bench.py wm --quick           the same at toy size, in seconds: shows that it runs, measures nothing
  python bench.py wm --preset astra --random-init     BAGEL's true shapes on one GPU: 5 minutes, no files needed
  python bench.py rollout              dialogues of the policy, two calls each, against `generate` every turn: a minute
  python bench.py grpo --against trl   a GRPO step against TRL's, where TRL is installed: 3 minutes
  python bench.py memory --preset astra               what each of 8, 16, 64 GPUs holds, counted: seconds, no GPU
  python bench.py data                 triples of a scan: seconds per scan, and how they grow with its frames: 3 minutes

The two ways take turns (A B A B ...) on the same queries; their medians are compared, and so are their latents. Shares
are of the best torch.mm rate over the layers' own shapes, kept up for seconds right behind each run (beside it, of the
best burst), and count the arithmetic that is needed (`needed_flops`), not what was done. Prints tables for a reader;
the last line is one JSON object for a program.
`Squares` stands in for the autoencoder, so that the sampler alone is timed.
"""

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import train_rl
import train_wm
from data import MOTIONS
from lib import budget
from lib.bagel import Bagel, Config, Settings
from lib.bagel_files import resized
from lib.common import fail, keep_freed_memory, run
from lib.geometry import Query, instruction
from lib.rooms import random_room, render, ring
from lib.scans import write_folder
from lib.scenes import read_scene, room_scene
from lib.tokenizer import tiny_tokenizer
from lib.triples import Rules, find_triples, write_triples
from policy import HEAD_TOKENS, Policy
from tests import naive, policy_speed
from world_model import MAX_TOKENS, WorldModel, initialise


# ---------------------------------------------------------------- models and queries

class Squares:
    """A stand-in for the FLUX autoencoder that takes no time: 8 x 8 pixels, projected to 16 numbers, plus noise."""

    cell, channels, random = 8, 16, True

    def __init__(self):
        draw = torch.randn(3 * self.cell**2, self.channels, generator=torch.Generator().manual_seed(0))
        self.basis = torch.linalg.qr(draw)[0]                                               # (192, 16), orthonormal

    def encode(self, pixels, noise):
        """pixels (B, 3, H, W) -> latent (B, 16, H/8, W/8)."""
        cells = F.pixel_unshuffle(pixels, self.cell)
        return torch.einsum("bphw,pc->bchw", cells, self.basis.to(pixels.device)) + 0.1 * noise

    def decode(self, latent):
        """latent (B, 16, h, w) -> pixels (B, 3, 8 h, 8 w)."""
        cells = torch.einsum("bchw,pc->bphw", latent.float(), self.basis.to(latent.device))
        return F.pixel_shuffle(cells, self.cell)


def middle(pixels=256, layers=8):
    """The middle size, where arithmetic is the bound: 63 M parameters in its layers, pictures of `pixels` a side."""
    settings = Settings(vae_limits=(pixels, pixels, 16), vit_limits=(pixels // 14 * 14, pixels // 14 * 14, 14))
    config = Config(width=512, layers=layers, heads=8, kv_heads=4, mlp=2048, vocabulary=len(tiny_tokenizer()), eps=1e-6,
                    rope_base=1e6, vit_width=256, vit_layers=4, vit_heads=4, vit_mlp=1024, vit_patch=14, vit_grid=20,
                    latent_grid=16, latent_numbers=64, settings=settings)
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
        images = list(render(random_room(seed), np.stack(ring(np.random.default_rng(seed))), size=32)["rgb"])
        for reference in range(1, 5):
            motion = MOTIONS[len(queries) % len(MOTIONS)]
            queries.append(Query(images, reference, instruction(motion, reference), seed=len(queries)))
    return queries


def pair_queries(count, pixels):
    """`count` queries, each with two pictures and a sentence of its own."""
    rng = np.random.default_rng(0)
    return [Query(list(rng.integers(0, 256, (2, pixels, pixels, 3), dtype=np.uint8)), 2,
                  instruction(MOTIONS[i % len(MOTIONS)], 2), seed=i) for i in range(count)]


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
    model.imagine(queries, **changes | {"steps": 1})                                        # warm up
    naive.imagine(model, queries[:1], **changes | {"steps": 1})
    rows = []
    for i in range(repeats):
        fast, fast_cpu, ours = timed(model, lambda: model.imagine(queries, **changes))
        after()
        slow, slow_cpu, theirs = timed(model, lambda: naive.imagine(model, queries, **changes))
        diff = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        rows.append((fast, slow, fast_cpu, slow_cpu, diff))
        print(f"  {title}, pair {i + 1} of {repeats}: {fast:.2f} s against {slow:.2f} s", flush=True)
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
        return c.layers * count * key_value + ((c.layers - 1) * count + used) * (rest + 4 * c.width * seen)

    def causal(past):
        return segment(words, past + (words + 1) / 2, 0)

    flops, past = 0.0, 0
    for latent, vit in images:
        flops += 2 * latent * c.latent_numbers * c.width + segment(latent + 2, past + latent + 2, 0)
        flops += vit * 2 * (3 * c.vit_patch**2 * c.vit_width + c.vit_width * c.width + c.width**2)      # and connector
        flops += vit * c.vit_layers * (8 * c.vit_width**2 + 4 * c.vit_width * c.vit_mlp + 4 * c.vit_width * vit)
        flops += segment(vit + 2, past + latent + 2 + vit + 2, 0)
        past += latent + vit + 4
    flops += causal(past) + (causal(0) if branches == 3 else 0)
    ends = 4 * tokens * c.latent_numbers * c.width                                          # vae2llm and llm2vae
    return flops + steps * sum(segment(tokens + 2, before + tokens + 2, tokens) + ends
                               for before in (past + words, past, words)[:branches])


# ---------------------------------------------------------------- where the time goes

GROUPS = {"matmul": ("mm", "addmm", "bmm", "baddbmm"), "attention": ("_scaled_dot_product",),
          "copies": ("copy_", "cat", "stack", "index", "gather", "scatter", "fill_", "zero_", "repeat")}


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
            kind = next((kind for kind, starts in GROUPS.items() if name.startswith(starts)), "elementwise")
            groups[kind] += event.self_cpu_time_total / 1e6
        totals.append(groups | {"Python": wall - sum(groups.values())})
    return {kind: totals[1][kind] - totals[0][kind] for kind in totals[0]}


# ---------------------------------------------------------------- bench.py wm

def wm(args):
    """The world model: one table per question, then the JSON line."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    print(json.dumps(wm_at_true_size(args) if args.preset == "astra" else wm_against_naive(args)))


def wm_against_naive(args):
    """The demo's model with a rollout's queries, then the middle size alone and in a batch of eight."""
    rooms, pixels, layers, repeats = (2, 64, 2, 1) if args.quick else (8, 256, 8, args.repeats)
    demo = WorldModel.load(args.model) if args.model else WorldModel.tiny()
    if not args.model:
        stirred(demo.network)
    model, changes = middle(pixels, layers), {"steps": args.steps, "text_scale": 4.0, "image_scale": 2.0}
    print(f"fast against straightforward, {args.threads} CPU threads, fp32; the middle size: two {pixels} x {pixels} "
          f"pictures, {args.steps} steps, both guidances", flush=True)
    rows = {"demo32": compare("demo's model", demo, rollout_queries(rooms), repeats)}
    flops, rate, kept_up = {}, 0.0, {}
    for batch in (1, 8):
        queries = pair_queries(batch, pixels)
        pairs = repeats if batch == 1 else (repeats + 1) // 2
        rates, tokens = [], 3 * batch * (pixels // 16) ** 2
        rows[f"b{batch}"] = compare(f"middle size, batch {batch}", model, queries, pairs, lambda: rates.append(
            sustained_matmul_rate(model.network.config, tokens, 0.05 if args.quick else 3.0)), **changes)
        kept_up[f"b{batch}"] = statistics.median(rates)
        flops[f"b{batch}"] = sum(work_of(model, query, args.steps) for query in queries)
        rate = max(rate, best_matmul_rate(model.network.config, tokens))
    shares = {name: flops[name] / rows[name].fast / kept_up[name] for name in flops}
    bursts = {name: flops[name] / rows[name].fast / rate for name in flops}

    print(f"\n{'median seconds':16}{'fast':>10}{'naive':>10}{'ratio':>8}{'CPU ratio':>11}{'max diff':>11}")
    for name, row in rows.items():
        print(f"{name:16}{row.fast:10.3f}{row.naive:10.3f}{row.naive / row.fast:8.2f}"
              f"{row.naive_cpu / row.fast_cpu:11.2f}{row.max_diff:11.1e}")
    print(f"\n{'work':16}{'GFLOP':>10}{'GFLOP/s':>10}{'torch.mm':>10}{'share':>8}   torch.mm: kept up for seconds, "
          f"right behind the run; its best burst: {rate / 1e9:.0f}")
    for name in flops:
        ours = flops[name] / rows[name].fast
        print(f"{name:16}{flops[name] / 1e9:10.0f}{ours / 1e9:10.0f}{kept_up[name] / 1e9:10.0f}{shares[name]:8.1%}")
    step = where_time_goes(model, pair_queries(8, pixels), **changes)
    print(f"\n{'one step of b8':16}{'seconds':>10}{'share':>10}")
    for kind, seconds in step.items():
        print(f"{kind:16}{seconds:10.3f}{seconds / sum(step.values()):10.1%}")

    return {"bench": "wm", "threads": args.threads, "steps": args.steps, "quick": args.quick,
            **{f"speedup_{name}": round(row.naive / row.fast, 3) for name, row in rows.items()},
            "speedup_demo32_cpu": round(rows["demo32"].naive_cpu / rows["demo32"].fast_cpu, 3),
            "matmul_share": round(shares["b8"], 3), "matmul_share_b1": round(shares["b1"], 3),
            "matmul_gflops": round(kept_up["b8"] / 1e9, 1), "matmul_share_of_burst": round(bursts["b8"], 3),
            "matmul_gflops_burst": round(rate / 1e9, 1), "max_diff": max(row.max_diff for row in rows.values())}


def work_of(model, query, steps):
    """`needed_flops` of a query with both guidances, all its pictures of one size."""
    c, (height, width) = model.network.config, query.images[0].shape[:2]
    latent, vit = (w * h // size**2 for size, (w, h) in (
        (16, resized(width, height, model.settings.vae_limits)),
        (c.vit_patch, resized(width, height, model.settings.vit_limits))))
    words = model.texts([query.instruction])[1].item()
    return needed_flops(c, words, [(latent, vit)] * len(query.images), latent, steps, branches=3)


def wm_at_true_size(args):
    """Seconds per 512 x 512 view, peak memory and model FLOPs utilisation of BAGEL's shapes in bf16 on one GPU."""
    if not torch.cuda.is_available():
        fail("--preset astra needs a GPU: 29 GB of bf16 weights. `python bench.py wm` runs on a CPU.")
    if not (args.model or args.random_init):
        fail("--preset astra needs weights: give --model FOLDER, or --random-init to build the shapes without files.")
    model = WorldModel.load(args.model, "cuda", torch.bfloat16) if args.model else true_shapes("cuda")
    return at_true_size(model, pixels=512, steps=args.steps, repeats=args.repeats)


def at_true_size(model, pixels, steps, repeats):
    """The measurement itself, on the model's own device."""
    device, dtype = model.device.type, model.network.vae2llm.weight.dtype
    config, results = model.network.config, {"bench": "wm", "preset": "astra", "steps": steps}
    rate = best_matmul_rate(config, 8192, device, dtype)
    print(f"{pixels} x {pixels} views, {steps} steps, both guidances, two context images, {dtype}; best matmul "
          f"{rate / 1e12:.1f} TFLOP/s")
    print(f"{'batch':>5}{'s per view':>12}{'TFLOP':>10}{'MFU':>8}{'peak GiB':>10}", flush=True)
    for batch in (1, 4, 8):
        queries, seconds = pair_queries(batch, pixels), []
        model.imagine(queries, steps=2)                                                     # compile, warm up
        for _ in range(repeats):
            start = clock(device)
            model.imagine(queries, steps=steps)
            seconds.append(clock(device) - start)
        flops, wall = sum(work_of(model, query, steps) for query in queries), statistics.median(seconds)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        print(f"{batch:5}{wall / batch:12.3f}{flops / 1e12:10.1f}{flops / wall / rate:8.1%}{memory:10.1f}", flush=True)
        results |= {f"seconds_per_view_b{batch}": round(wall / batch, 4), f"peak_gib_b{batch}": round(memory, 2),
                    f"mfu_b{batch}": round(flops / wall / rate, 4)}
    return results | {"matmul_tflops": round(rate / 1e12, 1)}


def true_shapes(device):
    """BAGEL-7B-MoT's shapes (14.6 B parameters) in bf16 straight on the device, with random weights and no files."""
    network = budget.bagel_7b().to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    for tensor in network.state_dict().values():
        tensor.fill_(1.0)                                       # norms and position tables; the rest is drawn next
    initialise(network)
    network.llm2vae.weight.normal_(std=0.02)
    return WorldModel(network, Squares(), tiny_tokenizer(), files={})


# ---------------------------------------------------------------- bench.py memory

PICTURE, SENTENCE, GIVEN = 512, 20, 4       # of the astra budget: pixels a side, tokens of an instruction, views


def memory(args):
    """What each GPU holds while train_rl.py and train_wm.py run, in GB by part: tables, then the JSON line."""
    tiny = args.preset == "tiny"
    rl, wm_flags = train_rl.PRESETS[args.preset], train_wm.PRESETS[args.preset]
    model, network = ((Policy.tiny().model, WorldModel.tiny().network) if tiny else
                      (budget.qwen3_vl_8b(), budget.bagel_7b()))
    policy, simulator = budget.policy_shapes(model), budget.bagel_shapes(network)
    side = 32 if tiny else PICTURE
    limits = network.config.settings.vae_limits, network.config.settings.vit_limits
    latent, vit = (math.prod(resized(side, side, limit)) // cell**2 + 2
                   for limit, cell in zip(limits, (16, network.config.vit_patch)))
    vision = model.config.vision_config
    unit, levels = vision.patch_size * vision.spatial_merge_size, 1 + len(vision.deepstack_visual_indexes)
    context = GIVEN * (latent + vit) + wm_flags["targets"] * (latent + SENTENCE)
    results = {"bench": "memory", "preset": args.preset, "policy_parameters": policy.learned + policy.frozen,
               "simulator_parameters": simulator.learned, "length": args.length}
    print(f"policy {results['policy_parameters'] / 1e6:,.1f} M parameters, simulator {simulator.learned / 1e6:,.1f} M; "
          f"dialogues of {args.length:,} tokens, {rl['micro_batch_tokens']:,} tokens a pass; simulator updates of "
          f"{context:,} tokens a pass. GB per GPU:")
    for gpus in args.gpus:
        dialogues = -(-rl["questions"] * rl["group"] // gpus)
        rows = min(rl["rows"], dialogues)
        images = (GIVEN / rl["group"] + 3) * dialogues              # of a step; 3: as many as may be imagined
        features = budget.BF16 * images * (side // unit)**2 * levels * policy.width
        tables = {f"train_rl {phase}": parts for phase, parts in budget.rl_budget(
            policy, simulator, gpus, rows, args.length, features, MAX_TOKENS, rl["micro_batch_tokens"], HEAD_TOKENS,
            rl.get("gradient_checkpointing", False)).items()}
        tables["train_wm update"] = budget.wm_budget(simulator, gpus, wm_flags["micro_contexts"] * context,
                                                     wm_flags["recompute"])["update"]
        parts = list(tables["train_wm update"])
        print(f"\n{f'{gpus} GPUs':18}" + "".join(f"{part:>12}" for part in parts) + f"{'total':>10}{'of 80 GB':>10}")
        for title, table in tables.items():
            total = sum(table.values())
            print(f"{title:18}" + "".join(f"{table[part] / 1e9:12.2f}" for part in parts) +
                  f"{total / 1e9:10.2f}{total / 80e9:10.0%}")
            results[f"{title.replace(' ', '_')}_gb_{gpus}"] = round(total / 1e9, 3)
        each = budget.cache(policy, args.length)
        room = 72e9 - sum(tables["train_rl rollout"].values()) + rows * each            # of 80 GB, 8 left free
        served = room + tables["train_rl rollout"]["simulator"] + budget.cache(simulator, MAX_TOKENS)
        fits, fits_served = max(0, int(room // each)), max(0, int(served // each))
        print(f"{rows} dialogues are written together; {fits} fit beside the simulator, {fits_served} if it is a URL")
        results |= {f"rollout_rows_{gpus}": rows, f"rollout_rows_that_fit_{gpus}": fits,
                    f"rollout_rows_that_fit_with_served_simulator_{gpus}": fits_served}
    print(json.dumps(results))


# ---------------------------------------------------------------- bench.py data

def data(args):
    """Triples of one scan on one core: CPU-seconds by the number of frames that are looked at."""
    size, counts = (64, (20, 40)) if args.quick else (512, (60, 120, 240))
    scans, cores, rows = 11_292, 16, {}                                  # the paper's; cores of a workstation
    with tempfile.TemporaryDirectory() as folder:
        room = room_scene(0, counts[-1], size)
        write_folder(Path(folder) / "scans" / "room", room.frames, room.up)
        print(f"one room as a scan: {counts[-1]} frames of {size} x {size}, JPEG and 16-bit PNG; one core\n"
              f"{'frames':>8}{'CPU s':>8}{'to find':>9}{'triples':>9}{'per s':>8}", flush=True)
        for count in counts:
            scene, rules = read_scene("folder", Path(folder) / "scans", "room"), Rules(frames=count, size=size)
            start = time.process_time()
            find_triples(scene, np.random.default_rng(0), rules)
            found = time.process_time()
            triples = len(write_triples(scene, Path(folder) / f"out{count}", 0, rules)[0])      # finds them once more
            spent = time.process_time() - found
            rows[count] = spent, triples
            print(f"{count:8}{spent:8.1f}{found - start:9.1f}{triples:9}{triples / spent:8.2f}", flush=True)
    seconds, triples = rows[counts[-1]]
    hours = scans * seconds / cores / 3600
    print(f"{scans:,} scans, the paper's, on {cores} cores: {hours:.1f} hours, {scans * triples:,} triples (paper: "
          f"544,197)")
    print(json.dumps({"bench": "data", "quick": args.quick, "triples_per_second_per_core": round(triples / seconds, 3),
                      "cpu_seconds_per_scan": {count: round(row[0], 2) for count, row in rows.items()},
                      "hours_for_the_papers_scans": round(hours, 2)}))


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_subparsers(dest="what", required=True)
    w = what.add_parser("wm", help="the world model's sampler", description="The world model's sampler.")
    w.set_defaults(bench=wm)
    w.add_argument("--preset", choices=("tiny", "astra"), default="tiny",
                   help="tiny: against tests/naive.py on the CPU; astra: BAGEL's true size on one GPU")
    w.add_argument("--model", help="folder of a checkpoint: the demo's model, or astra's (default: random weights)")
    w.add_argument("--random-init", action="store_true", help="astra: build the shapes without any file")
    w.add_argument("--steps", type=int, help="Euler steps (default: 25 at the middle size, 49 at the true size)")
    w.add_argument("--repeats", type=int, default=3, help="runs of each kind (half as many of batch 8); medians count")
    w.add_argument("--threads", type=int, default=2, help="CPU threads")
    w.add_argument("--quick", action="store_true", help="tiny: 2 steps, one pair, 2 layers, 64 x 64 pictures")
    r = what.add_parser("rollout", help="the policy's rollouts", description="The policy's rollouts.")
    r.set_defaults(bench=policy_speed.rollout, preset="tiny", steps=1)
    r.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians count")
    r.add_argument("--threads", type=int, default=1, help="CPU threads")
    r.add_argument("--quick", action="store_true", help="two questions x two rollouts, one run of each kind")
    g = what.add_parser("grpo", help="one GRPO step", description="One GRPO step.")
    g.set_defaults(bench=policy_speed.grpo, preset="tiny", steps=1)
    g.add_argument("--against", choices=("trl",), default="trl", help="whose step stands beside ours")
    g.add_argument("--repeats", type=int, default=3, help="steps of each; medians count")
    g.add_argument("--quick", action="store_true", help="two questions x two rollouts, one step of each")
    m = what.add_parser("memory", help="what each GPU holds", description="What each GPU holds.")
    m.set_defaults(bench=memory, steps=1, quick=False)
    m.add_argument("--preset", choices=("tiny", "astra"), default="astra")
    m.add_argument("--gpus", type=int, nargs="+", help="default: 8 16 64; tiny: 1")
    m.add_argument("--length", type=int, help="tokens of the longest dialogue (default: 4096; tiny: 160)")
    d = what.add_parser("data", help="triples of scans", description="Triples of scans.")
    d.set_defaults(bench=data, preset="tiny", steps=1)
    d.add_argument("--quick", action="store_true", help="40 frames of 64 x 64 pixels")
    args = p.parse_args(argv)
    if args.what == "memory":
        args.gpus, args.length = (args.gpus or ([1] if args.preset == "tiny" else [8, 16, 64]),
                                  args.length or (160 if args.preset == "tiny" else 4096))
    args.steps = args.steps or (2 if args.quick else 49 if args.preset == "astra" else 25)
    return args


def main(argv=None):
    """Run one benchmark."""
    args = parse_args(argv)
    args.bench(args)


if __name__ == "__main__":
    run(main)
