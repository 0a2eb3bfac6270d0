"""
Speed at the published shapes on one GPU, with random weights and no files: `python -m bench ... --preset astra`.

MFU is the share of the best torch.mm rate over the layers' own shapes, measured in the same run, and counts the
arithmetic that is needed, not what was done: a second forward pass for checkpointing is not work. Backward counts twice
its forward pass. The training steps are the stages' own functions, on one GPU sharded over itself (bf16 arithmetic,
fp32 weights), with as many layers as fit. `--preset tiny` runs the same code on the demo's models and a CPU: it shows
that it runs, and measures little.
"""

import dataclasses
import gc
import json
import statistics
from types import SimpleNamespace

import numpy as np
import torch

import train_rl
import train_wm as wm_stage
from bench import naive
from bench.policy import Seconds, timed_rollout
from bench.wm import (
    Squares,
    best_matmul_rate,
    clock,
    needed_flops,
    pair_queries,
    sides,
    work_of,
)
from data import MOTIONS
from lib import budget, common
from lib.dialogue import Trajectory
from lib.geometry import Motion, instruction
from lib.protocol import PHRASES
from lib.rollout import Writer
from lib.streams import torch_stream
from lib.tiny import MOTION_PHRASES, tiny_tokenizer
from policy import Policy
from world_model import WorldModel, initialise

QWEN_IMAGES = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
}


# ---------------------------------------------------------------- models


def true_bagel(device, dtype, layers=28):
    """BAGEL-7B-MoT's shapes (14.6 B parameters) straight on the device, with random weights and no files."""
    network = budget.bagel_7b(layers).to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(1.0)  # norms and position tables; the rest is drawn next
        initialise(network)
        network.llm2vae.weight.normal_(std=0.02)
    return WorldModel(network, Squares(), tiny_tokenizer(), files={})


def true_policy(device, dtype, layers=36):
    """Qwen3-VL-8B's shapes (8.8 B parameters) straight on the device, with random weights and the tiny tokenizer."""
    return Policy(
        budget.qwen3_vl_8b(layers, device, dtype).eval(),
        tiny_tokenizer(PHRASES + MOTION_PHRASES),
        QWEN_IMAGES,
    )


def layers_that_fit(shapes, layers, device):
    """How many layers leave room for activations, with fp32 weights, gradients and two moments: 16 bytes a parameter.

    At least 4: the policy adds what its tower found to the first three, and nothing to the last.
    """
    room = 0.6 * torch.cuda.get_device_properties(device).total_memory / 16 - shapes.root
    return max(4, min(layers, int(room // shapes.block)))


def need_gpu(args):
    """End with a sentence where the published shapes have no weights, or no GPU to stand on."""
    if args.what in ("wm", "rollout") and not (args.model or args.random_init):
        common.fail(
            "--preset astra needs weights: give --model FOLDER, or --random-init to build the shapes without "
            "files."
        )
    if not torch.cuda.is_available():
        common.fail(
            f"--preset astra needs a GPU. `python -m bench {args.what} --preset tiny` runs on a CPU."
        )


# ---------------------------------------------------------------- measuring


def timed(step, repeats, device):
    """Run `step` once to warm up, then `repeats` times -> (median seconds, peak GiB), or None if memory is short."""
    try:
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            start = clock(device.type)
            step()
            seconds.append(clock(device.type) - start)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return statistics.median(
        seconds
    ), torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def training_table(name, step, switch, tokens, flops, rate, args, device):
    """A step with checkpointing and without it: a table, and the JSON line.

    switch   called with True or False before the steps;   flops   needed forward and backward
    """
    print(
        f"{'checkpointing':16}{'s':>8}{'tokens/s':>10}{'TFLOP':>9}{'MFU':>8}{'peak GiB':>10}",
        flush=True,
    )
    results = {
        "bench": name,
        "preset": args.preset,
        "layers": args.layers,
        "tokens": tokens,
        "tflop": round(flops / 1e12, 6),
        "matmul_tflops": round(rate / 1e12, 3),
    }
    for on in (True, False):
        switch(on)
        found, word = timed(step, args.repeats, device), "on" if on else "off"
        if found is None:
            print(f"{word:16}  does not fit")
            continue
        seconds, peak = found
        print(
            f"{word:16}{seconds:8.2f}{tokens / seconds:10.0f}{flops / 1e12:9.3f}{flops / seconds / rate:8.1%}"
            f"{peak:10.1f}",
            flush=True,
        )
        results |= {
            f"seconds_{word}": round(seconds, 4),
            f"mfu_{word}": round(flops / seconds / rate, 4),
            f"tokens_per_second_{word}": round(tokens / seconds, 1),
            f"peak_gib_{word}": round(peak, 2),
        }
    print(json.dumps(results))


def bandwidth(device, megabytes):
    """Bytes per second that the device's memory reads and writes: the best of ten copies."""
    x, best = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device), 0.0
    y = torch.empty_like(x)
    for _ in range(10):
        start = clock(device.type)
        y.copy_(x)
        best = max(best, 2 * len(x) / (clock(device.type) - start))
    return best


# ---------------------------------------------------------------- python -m bench wm --preset astra


def wm(args):
    """Seconds per 512 x 512 view, peak memory and MFU of BAGEL in bf16: a table, and the JSON line."""
    need_gpu(args)
    model = (
        WorldModel.load(args.model, "cuda", torch.bfloat16)
        if args.model
        else true_bagel("cuda", torch.bfloat16)
    )
    model.network.requires_grad_(False).eval()
    print(json.dumps(sampling(model, pixels=512, steps=args.steps, repeats=args.repeats)))


def sampling(model, pixels, steps, repeats):
    """The measurement itself, on the model's own device."""
    device, dtype = model.device, model.network.vae2llm.weight.dtype
    config, results = model.network.config, {"bench": "wm", "preset": "astra", "steps": steps}
    rate = best_matmul_rate(config, 8192, device.type, dtype)
    print(
        f"{pixels} x {pixels} views, {steps} steps, both guidances, two context images, {dtype}; best matmul "
        f"{rate / 1e12:.1f} TFLOP/s"
    )
    print(f"{'batch':>5}{'s per view':>12}{'TFLOP':>10}{'MFU':>8}{'peak GiB':>10}", flush=True)
    for batch in (1, 4, 8):
        queries = pair_queries(batch, pixels)
        model.imagine(queries, steps=2)  # compile
        found = timed(lambda: model.imagine(queries, steps=steps), repeats, device)
        if found is None:
            print(f"{batch:5}  does not fit")
            continue
        flops, (wall, peak) = sum(work_of(model, query, steps) for query in queries), found
        print(
            f"{batch:5}{wall / batch:12.3f}{flops / 1e12:10.1f}{flops / wall / rate:8.1%}{peak:10.1f}",
            flush=True,
        )
        results |= {
            f"seconds_per_view_b{batch}": round(wall / batch, 4),
            f"peak_gib_b{batch}": round(peak, 2),
            f"mfu_b{batch}": round(flops / wall / rate, 4),
        }
    return results | {"matmul_tflops": round(rate / 1e12, 3)}


# ---------------------------------------------------------------- bench.py rollout --preset astra


def rollout(args):
    """Prefill and decoding of Qwen3-VL-8B in bf16, beside the memory's bound and plain `generate`."""
    need_gpu(args)
    policy = Policy.load(args.model, "cuda") if args.model else true_policy("cuda", torch.bfloat16)
    print(json.dumps(decoding(policy, 16, 8, 256, 512, args.repeats)))


def decoding(policy, questions, group, length, side, repeats):
    """Direct answers of `length` tokens, `group` for each question about two images, ours and through `generate`."""
    device = policy.device
    policy.banned[policy.tokenizer.eos_token_id] = True  # all write as many tokens
    asked, rows = picture_questions(questions, side), questions * group
    uniforms = torch.rand(
        rows, 1, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    options = dict(mode="direct", max_turns=1, max_new_tokens=length, rows=rows)
    spent = {}
    for name, way in (("fast", Writer), ("generate", naive.Writer)):
        runs = []
        for _ in range(repeats + 1):  # the first warms up
            seconds, dialogues = timed_rollout(
                policy, asked, group, way, uniforms, Seconds(lambda: clock(device.type)), **options
            )
            runs.append(seconds)
        spent[name] = {part: statistics.median(run[part] for run in runs[1:]) for part in runs[0]}
    prompt = dialogues[0].loss_mask.index(1)
    shapes = budget.policy_shapes(policy.model)
    bytes_each = policy.model.lm_head.weight.element_size()
    weights = (shapes.layers * shapes.block + policy.model.lm_head.weight.numel()) * bytes_each
    keys = (
        shapes.layers * shapes.key_value * (prompt + length / 2) * rows * bytes_each
    )  # of a mean step
    rate = bandwidth(device, 2048 if device.type == "cuda" else 64)
    bound = rows / ((weights + keys) / rate)
    prefill, decode = (
        questions * prompt / spent["fast"]["prefill"],
        rows * length / spent["fast"]["decode"],
    )
    whole = {name: rows * length / sum(parts.values()) for name, parts in spent.items()}
    print(
        f"{questions} questions x {group} rollouts, two {side} x {side} images each, prompts of {prompt} tokens, "
        f"{length} written; memory {rate / 1e9:.0f} GB/s\n"
        f"prefill, images included     {prefill:10.0f} tokens/s\n"
        f"decode                       {decode:10.0f} tokens/s, {decode / bound:.0%} of {bound:.0f}, the bound by "
        f"weights, keys and values read\n"
        f"written per second, in all   {whole['fast']:10.0f}; by `generate` {whole['generate']:.0f}: "
        f"{whole['fast'] / whole['generate']:.2f} times",
        flush=True,
    )
    return {
        "bench": "rollout",
        "prefill_tokens_per_second": round(prefill, 1),
        "decode_tokens_per_second": round(decode, 1),
        "share_of_bandwidth_bound": round(decode / bound, 4),
        "bandwidth_gb": round(rate / 1e9, 1),
        "speedup": round(whole["fast"] / whole["generate"], 3),
    }


def picture_questions(count, side):
    """Questions about two pictures of noise."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, 2, side, side, 3), dtype=np.uint8)
    return [
        {
            "id": f"q{q}",
            "images": list(pair),
            "options": ["A. red", "B. green", "C. blue", "D. white"],
            "answer": "A",
            "question": f"Start from Image-1 and turn left {5 * q + 5} degrees. Then which object looks largest?",
        }
        for q, pair in enumerate(pictures)
    ]


# ---------------------------------------------------------------- bench.py train_wm


def train_wm(args):
    """An update of the simulator by train_wm.py's own functions, on one context with all its targets."""
    if args.preset == "astra":
        need_gpu(args)
    world = common.setup(args.threads)
    flags = wm_stage.parse_args(
        ["--preset", args.preset, "--drop-text", "0", "--drop-vit", "0", "--drop-vae", "0"]
    )
    if args.preset == "astra":
        args.layers = args.layers or layers_that_fit(
            budget.bagel_shapes(budget.bagel_7b()), 28, world.device
        )
        model = true_bagel(world.device, torch.float32, args.layers)
        model.autoencoder.random = False
    else:
        model = WorldModel.tiny()
        model.network.to(world.device)
    network = common.shard(model.network, model.network.blocks, world)
    args.layers = network.config.layers
    side, views = (512 if args.preset == "astra" else 32), 4
    groups, read = noise_triples(flags.micro_contexts, views, flags.targets, side)
    streams = [torch_stream("batch", 0, 0, i) for i in range(len(groups))]
    pack, targets = wm_stage.make_batch(groups, streams, model, read, flags)
    tokens, flops = work_of_update(model, groups, views, side)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def step():
        parts = wm_stage.losses(network, pack, targets, flags.warp_weight)
        (sum(parts.values()) / len(targets.x0)).backward()
        common.clip_gradients(network.parameters(), flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    rate = best_matmul_rate(network.config, 8192, world.device.type, dtype)
    print(
        f"{args.layers} layers, {len(groups)} context(s) of {views} views with {flags.targets} targets, {side} x "
        f"{side}: {tokens:,} tokens; best matmul {rate / 1e12:.2f} TFLOP/s"
    )
    training_table(
        "train_wm",
        step,
        lambda on: setattr(network, "recompute", on),
        tokens,
        flops,
        rate,
        args,
        world.device,
    )


def noise_triples(contexts, views, targets, side):
    """Rows of triples whose pictures are noise, by context, and what reads a picture."""
    rng, pictures = np.random.default_rng(0), {}

    def picture(name, channels=3):
        pictures[name] = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
        return name

    groups = []
    for c in range(contexts):
        context = [picture(f"{c} view {v}") for v in range(views)]
        groups.append(
            [
                {
                    "context": context,
                    "reference": views,
                    "target": picture(f"{c} target {k}"),
                    "warp": picture(f"{c} warp {k}", 4),
                    "motion": dataclasses.asdict(MOTIONS[k % len(MOTIONS)]),
                }
                for k in range(targets)
            ]
        )
    return groups, pictures.__getitem__


def work_of_update(model, groups, views, side):
    """(tokens, FLOP forward and backward) of an update: each context is read once for all of its targets."""
    c, (latent, vit) = model.network.config, sides(model, side, side)
    images, tokens, flops = [(latent, vit)] * views, 0, 0.0
    read = needed_flops(c, 0, images, 0, 0, 1)
    for row in (row for group in groups for row in group):
        words = model.texts([instruction(Motion(**row["motion"]), row["reference"])])[1].item()
        tokens += words + latent + 2
        flops += needed_flops(c, words, images, latent, 1, 1) - read
    return tokens + len(groups) * views * (latent + vit + 4), 3 * (flops + len(groups) * read)


# ---------------------------------------------------------------- bench.py train_rl


def train_rl_step(args):
    """A GRPO update by train_rl.py's own functions, on finished dialogues about two images."""
    if args.preset == "astra":
        need_gpu(args)
    world = common.setup(args.threads)
    flags = train_rl.parse_args(
        ["--preset", args.preset, "--lr", "0", "--micro-batch-tokens", "8192"]
    )
    flags.gradient_checkpointing = True
    if args.preset == "astra":
        shapes = budget.policy_shapes(budget.qwen3_vl_8b())
        policy = true_policy(
            world.device, torch.float32, args.layers or layers_that_fit(shapes, 36, world.device)
        )
        side, length = 512, 512
    else:
        policy, side, length = Policy.tiny(device=world.device), 32, 64
    train_rl.prepare(policy, flags, world)
    args.layers = policy.model.config.text_config.num_hidden_layers
    rows = written_rows(policy, questions=4, group=8, length=length, side=side)
    tokens, flops = work_of_rows(policy, rows, group=8)
    learned = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learned, lr=0.0, betas=train_rl.BETAS, weight_decay=0.0, fused=True
    )

    def switch(on):
        (
            policy.model.gradient_checkpointing_enable
            if on
            else policy.model.gradient_checkpointing_disable
        )()

    text = policy.model.config.text_config
    shape = SimpleNamespace(
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size,
    )
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    rate = best_matmul_rate(shape, 8192, world.device.type, dtype)
    print(
        f"{args.layers} layers, 4 questions x 8 dialogues, two {side} x {side} images, {length} tokens written: "
        f"{tokens:,} tokens; best matmul {rate / 1e12:.2f} TFLOP/s"
    )
    training_table(
        "train_rl",
        lambda: train_rl.update(policy, optimizer, [rows], flags.micro_batch_tokens),
        switch,
        tokens,
        flops,
        rate,
        args,
        world.device,
    )


def written_rows(policy, questions, group, length, side):
    """Rows of finished dialogues, as an update gets them: random words, every other rollout right."""
    rng, rows = np.random.default_rng(0), []
    for question in picture_questions(questions, side):
        prompt = Trajectory.start(policy, question, question["images"], "direct")
        for g in range(group):
            dialogue = prompt.fork()
            dialogue.say(policy, rng.integers(0, 100, length).tolist(), [0.0] * length)
            old = torch.zeros(len(dialogue.ids) - 1)
            right = float(g % 2)
            episode = train_rl.Episode(dialogue, right, right, 1.0, old, advantage=2.0 * right - 1)
            rows.append(episode)
    return rows


def work_of_rows(policy, rows, group):
    """(tokens, FLOP forward and backward) of an update: a group's prompt once, the head on written tokens alone."""
    c, flops, tokens = policy.model.config.text_config, 0.0, 0
    weights = sum(
        p.numel() for p in policy.model.model.language_model.layers[0].parameters() if p.dim() > 1
    )
    pair = 4 * c.num_attention_heads * c.head_dim  # a query and a key: score and weighted value
    for i in range(0, len(rows), group):
        prompt = rows[i].trajectory.loss_mask.index(1)
        rests = [len(row.trajectory.ids) - 1 - prompt for row in rows[i : i + group]]
        pairs = prompt * (prompt + 1) / 2 + sum(
            rest * prompt + rest * (rest + 1) / 2 for rest in rests
        )
        tokens += prompt + sum(rests)
        flops += c.num_hidden_layers * (2 * weights * (prompt + sum(rests)) + pair * pairs)
        written = sum(sum(row.trajectory.loss_mask) for row in rows[i : i + group])
        flops += 2 * written * c.hidden_size * c.vocab_size
    return tokens, 3 * flops
