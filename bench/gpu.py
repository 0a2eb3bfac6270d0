"""
Speed at the published shapes on one GPU, with random weights and no files: `python -m bench ... --preset astra`.

MFU is the share of the best torch.mm rate over the layers' own shapes, measured in the same run, and counts the
arithmetic that is needed, not what was done: a second forward pass for checkpointing is not work. Backward counts twice
its forward pass. The training steps are the stages' own functions, on one GPU sharded over itself (bf16 arithmetic,
fp32 weights), with as many layers as fit. `--preset tiny` runs the same code on the demo's models and a CPU: it shows
that it runs, and measures little.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import train_rl as rl_stage
import train_wm as wm_stage
from bench.policy import compare_writers
from bench.timing import best_matmul_rate, clock, print_json, timed
from bench.wm import Squares, pair_queries
from data import MOTIONS
from lib.bagel import LATENT_PATCH, Bagel, Config, resized
from lib.dialogue import Trajectory
from lib.distributed import clip_gradients, fail, setup, shard
from lib.geometry import Motion, Query
from lib.simulators import instruction
from lib.tiny import tiny_tokenizer
from policy import Policy
from world_model import WorldModel, initialise

QWEN_IMAGES = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
}


# ---- the published shapes --------------------------------------------------------------------------------------------


def bagel_7b(layers: int = 28) -> Bagel:
    """BAGEL-7B-MoT's shapes on the meta device, 14.6 B parameters with its 28 layers."""
    llm = {
        "hidden_size": 3584,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    vit = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 980,
    }
    files = {"llm_config": llm, "vit_config": vit, "config": {}}
    with torch.device("meta"):
        return Bagel(Config.read(files, 152_064, latent_grid=64, token_channels=64))


def true_bagel(device, dtype: torch.dtype, layers: int = 28) -> WorldModel:
    """BAGEL-7B-MoT straight on the device, with random weights and no files."""
    network = bagel_7b(layers).to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(1.0)  # norms and position tables; the rest is drawn next
        initialise(network)
        network.llm2vae.weight.normal_(std=0.02)
    return WorldModel(network, Squares(), tiny_tokenizer(), files={})


def qwen3_vl_8b(layers: int = 36, device="meta", dtype=torch.float32):
    """Qwen3-VL-8B-Instruct's shapes, 8.77 B parameters (its config.json on the hub), with random weights."""
    text = {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)


def true_policy(device, dtype: torch.dtype, layers: int = 36) -> Policy:
    """Qwen3-VL-8B straight on the device, with random weights and the tiny tokenizer."""
    return Policy(qwen3_vl_8b(layers, device, dtype).eval(), tiny_tokenizer(), QWEN_IMAGES)


def count(parameters) -> int:
    """Numbers in some tensors."""
    return sum(p.numel() for p in parameters)


def layers_that_fit(model, blocks, device) -> int:
    """How many decoder layers leave room for activations, with fp32 weights, gradients and two moments: 16 bytes each.

    model, blocks   on the meta device, whole, and its decoder layers
    At least 4: the policy adds what its tower found to the first three, and nothing to the last.
    """
    block = count(blocks[0].parameters())
    root = count(model.parameters()) - len(blocks) * block
    room = 0.6 * torch.cuda.get_device_properties(device).total_memory / 16 - root
    return max(4, min(len(blocks), int(room // block)))


def need_gpu(args: Namespace) -> None:
    """End with a sentence where the published shapes have no GPU to stand on."""
    if not torch.cuda.is_available():
        fail(
            f"--preset astra needs a GPU. `python -m bench {args.what} --preset tiny` runs on a CPU."
        )


# ---- the arithmetic of a view ----------------------------------------------------------------------------------------


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


# ---- a row of a table ------------------------------------------------------------------------------------------------

RATE = 790e12  # FLOP/s in bf16 that docs/true-size.md counts with
HEAD = "{:14}       s   counted{:>10}     TFLOP     MFU  peak GiB"


def speed_of(name: str, step: Callable, repeats: int, device, count, flops, rate) -> dict:
    """Time a step and print its row -> its numbers for the JSON line, keys ending in `name`; {} where it does not fit.

    count   views or tokens of a step;   flops   that it needs;   rate   of torch.mm, in FLOP/s
    "counted" are the seconds that these flops take at RATE: those of the products alone
    """
    measured = timed(step, repeats, device)
    if measured is None:
        print(f"{name:14}  does not fit", flush=True)
        return {}
    seconds, peak = measured
    mfu = flops / seconds / rate
    cells = f"{seconds:8.2f}{flops / RATE:10.2f}{count / seconds:10.3f}{flops / 1e12:10.3f}{mfu:8.1%}{peak:10.1f}"
    print(f"{name:14}{cells}", flush=True)
    return {f"seconds_{name}": seconds, f"mfu_{name}": mfu, f"peak_gib_{name}": peak}


# ---- python -m bench wm --preset astra -------------------------------------------------------------------------------


def wm(args: Namespace) -> None:
    """Seconds per 512 x 512 view, peak memory and MFU of BAGEL in bf16: a table, and the JSON line."""
    need_gpu(args)
    model = true_bagel("cuda", torch.bfloat16)
    model.network.requires_grad_(False).eval()
    print_json(sampling(model, 512, args.steps, args.repeats))


def sampling(model: WorldModel, pixels: int, steps: int, repeats: int) -> dict:
    """The measurement itself, on the model's own device."""
    device, dtype = model.device, model.network.vae2llm.weight.dtype
    rate = best_matmul_rate(model.network.config, 8192, device.type, dtype)
    print(
        f"{pixels} x {pixels} views, {steps} steps, both guidances, two context images, {dtype}; best matmul "
        f"{rate / 1e12:.1f} TFLOP/s"
    )
    print(HEAD.format("batch", "views/s"), flush=True)
    results = {"bench": "wm", "preset": "astra", "steps": steps}
    for way in ("eager", "compiled"):
        if way == "compiled":
            model.network.compile_blocks()
        for batch in (1, 8):
            queries = pair_queries(batch, pixels)

            def step(queries=queries):
                model.imagine(queries, steps=steps)

            flops = sum(work_of(model, query, steps) for query in queries)
            results |= speed_of(f"{way} b{batch}", step, repeats, device, batch, flops, rate)
    return results | {"matmul_tflops": rate / 1e12}


# ---- python -m bench rollout --preset astra --------------------------------------------------------------------------


def rollout(args: Namespace) -> None:
    """Prefill and decoding of Qwen3-VL-8B in bf16, beside the memory's bound and plain `generate`."""
    need_gpu(args)
    policy = true_policy("cuda", torch.bfloat16)
    print_json(decoding(policy, 16, 8, 256, 512, args.repeats))


def decoding(policy: Policy, count: int, group: int, length: int, side: int, repeats: int) -> dict:
    """Direct answers of `length` tokens, `group` for each question about two images, ours and through `generate`."""
    device = policy.device
    policy.banned[policy.tokenizer.eos_token_id] = True  # all write as many tokens
    questions, rows = noise_questions(count, side), count * group
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(rows, 1, length, dtype=torch.float64, generator=generator)
    options = {"mode": "direct", "max_turns": 1, "max_new_tokens": length, "rows": rows}
    now = partial(clock, device.type)
    spent, runs = compare_writers(policy, questions, group, uniforms, repeats, now, **options)
    prompt = runs[0][0].prompt_length
    rate = bandwidth(device, 2048 if device.type == "cuda" else 64)
    bound = rows * rate / bytes_of_step(policy, rows, prompt + length / 2)
    prefill = count * prompt / spent["fast"]["prefill"]
    decode = rows * length / spent["fast"]["decode"]
    whole = {name: rows * length / sum(parts.values()) for name, parts in spent.items()}
    speedup = whole["fast"] / whole["generate"]
    print(
        f"{count} questions x {group} rollouts, two {side} x {side} images each, prompts of {prompt} tokens, "
        f"{length} written; memory {rate / 1e9:.0f} GB/s\n"
        f"prefill, images included     {prefill:10.0f} tokens/s\n"
        f"decode                       {decode:10.0f} tokens/s, {decode / bound:.0%} of {bound:.0f}, the bound by "
        f"weights, keys and values read\n"
        f"written per second, in all   {whole['fast']:10.0f}; by `generate` {whole['generate']:.0f}: "
        f"{speedup:.2f} times",
        flush=True,
    )
    return {
        "bench": "rollout",
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "share_of_bandwidth_bound": decode / bound,
        "bandwidth_gb": rate / 1e9,
        "speedup": speedup,
    }


def bytes_of_step(policy: Policy, rows: int, tokens: float) -> float:
    """What a step of decoding reads: the weights of the language model, and keys and values of `tokens` a row."""
    text = policy.model.config.text_config
    layers = policy.model.model.language_model.layers
    head = policy.model.lm_head.weight
    key_value = 2 * text.num_key_value_heads * text.head_dim
    keys = text.num_hidden_layers * key_value * tokens * rows
    return (count(layers.parameters()) + head.numel() + keys) * head.element_size()


def bandwidth(device, megabytes: int) -> float:
    """Bytes per second that the device's memory reads and writes: the best of ten copies."""
    x = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(10):
        start = clock(device.type)
        y.copy_(x)
        best = max(best, 2 * len(x) / (clock(device.type) - start))
    return best


def noise_questions(count: int, side: int) -> list[dict]:
    """Questions about two pictures of noise, in words that fit any picture."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 2, side, side, 3), dtype=np.uint8)
    questions = []
    for number, pair in enumerate(pictures):
        question = {
            "id": f"q{number}",
            "question": f"Start from Image-1 and turn left {5 * number + 5} degrees. Then which object looks largest?",
            "options": ["A. red", "B. green", "C. blue", "D. white"],
            "answer": "A",
            "images": list(pair),
        }
        questions.append(question)
    return questions


# ---- python -m bench train_wm, train_rl ------------------------------------------------------------------------------


def training_table(
    args: Namespace, step: Callable, switch: Callable, work: tuple, shape, device
) -> None:
    """A step with checkpointing and without it: a table, and the JSON line.

    switch   called with True or False before the steps;   work   (tokens, FLOP needed forward and backward)
    shape    of the decoder, as best_matmul_rate takes it
    """
    tokens, flops = work
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = best_matmul_rate(shape, 8192, device.type, dtype)
    print(f"{tokens:,} tokens; best matmul {rate / 1e12:.2f} TFLOP/s")
    print(HEAD.format("checkpointing", "tokens/s"), flush=True)
    results = {"bench": args.what, "preset": args.preset, "layers": args.layers, "tokens": tokens}
    results |= {"tflop": flops / 1e12, "matmul_tflops": rate / 1e12}
    for word, on in (("on", True), ("off", False)):
        switch(on)
        results |= speed_of(word, step, args.repeats, device, tokens, flops, rate)
    print_json(results)


def train_wm(args: Namespace) -> None:
    """An update of the simulator by train_wm.py's own functions, on one context with all its targets."""
    world = setup(args.threads)
    flags = ["--preset", args.preset, "--drop-text", "0", "--drop-vit", "0", "--drop-vae", "0"]
    flags = wm_stage.parse_args(flags)
    side, views = 32, 4
    if args.preset == "astra":
        need_gpu(args)
        side = 512
        whole = bagel_7b()
        blocks = whole.language_model["model"]["layers"]
        args.layers = args.layers or layers_that_fit(whole, blocks, world.device)
        model = true_bagel(world.device, torch.float32, args.layers)
    else:
        model = WorldModel.tiny()
        model.network.to(world.device)
    network = shard(model.network, model.network.blocks, world)
    args.layers = network.config.layers
    groups, read = noise_triples(flags.micro_contexts, views, wm_stage.TARGETS, side)
    keys = [(0, 0, number) for number in range(len(groups))]
    pack, targets = wm_stage.make_batch(groups, keys, model, read, flags)
    options = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(network.parameters(), **options)

    def step():
        parts = wm_stage.losses(network, pack, targets, flags.warp_weight)
        (sum(parts.values()) / len(targets.x0)).backward()
        clip_gradients(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def switch(on):
        network.recompute = on

    print(f"{args.layers} layers, {len(groups)} context(s) of {views} views, {side} x {side}")
    work = work_of_update(model, groups, views, side)
    training_table(args, step, switch, work, network.config, world.device)


def noise_triples(contexts: int, views: int, targets: int, side: int):
    """Rows of triples whose pictures are noise, by context, and what reads a picture."""
    rng, pictures = np.random.default_rng(0), {}

    def picture(name, channels=3):
        pictures[name] = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
        return name

    groups = []
    for c in range(contexts):
        context = [picture(f"{c} view {v}") for v in range(views)]
        rows = []
        for k in range(targets):
            motion = dataclasses.asdict(MOTIONS[k % len(MOTIONS)])
            row = {"context": context, "reference": views, "motion": motion, "provenance": []}
            row["target"] = picture(f"{c} target {k}")
            row["warp"] = picture(f"{c} warp {k}", 4)
            rows.append(row)
        groups.append(rows)
    return groups, pictures.__getitem__


def work_of_update(model: WorldModel, groups: list, views: int, side: int) -> tuple[int, float]:
    """(tokens, FLOP forward and backward) of an update: each context is read once for all of its targets."""
    c = model.network.config
    latent, vit = picture_tokens(model, side, side)
    images = [(latent, vit)] * views
    reading = needed_flops(c, 0, images, 0, 0, 1)
    tokens = len(groups) * views * (latent + vit + 4)
    flops = len(groups) * reading
    for rows in groups:
        for row in rows:
            sentence = instruction(Motion(**row["motion"]), row["reference"])
            words = len(model.token_ids(sentence)) if c.settings.words else 0
            tokens += words + latent + 2
            flops += needed_flops(c, words, images, latent, 1, 1) - reading
    return tokens, 3 * flops


def train_rl(args: Namespace) -> None:
    """A GRPO update by train_rl.py's own functions, on finished dialogues about two images."""
    world = setup(args.threads)
    flags = ["--preset", args.preset, "--lr", "0", "--gradient-checkpointing"]
    flags = rl_stage.parse_args(flags)
    policy, side, length = None, 32, 64
    if args.preset == "astra":
        need_gpu(args)
        side, length = 512, 512
        whole = qwen3_vl_8b()
        blocks = whole.model.language_model.layers
        args.layers = args.layers or layers_that_fit(whole, blocks, world.device)
        policy = true_policy(world.device, torch.float32, args.layers)
    else:
        policy = Policy.tiny(device=world.device)
    rl_stage.prepare(policy.model, flags, world)
    text = policy.model.config.text_config
    args.layers = text.num_hidden_layers
    episodes = written_episodes(policy, questions=4, group=8, length=length, side=side)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    options = {"lr": 0.0, "betas": rl_stage.BETAS, "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(weights, **options)

    def step():
        rl_stage.update(policy, optimizer, [episodes], 8192)

    def switch(on):
        if on:
            policy.model.gradient_checkpointing_enable()
        else:
            policy.model.gradient_checkpointing_disable()

    shape = SimpleNamespace(
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        mlp=text.intermediate_size,
    )
    print(
        f"{args.layers} layers, 4 questions x 8 dialogues, two {side} x {side} images, {length} tokens written"
    )
    work = work_of_episodes(policy, episodes, group=8)
    training_table(args, step, switch, work, shape, world.device)


def written_episodes(policy: Policy, questions: int, group: int, length: int, side: int) -> list:
    """Finished dialogues, as an update gets them: random words, every other rollout right."""
    rng = np.random.default_rng(0)
    episodes = []
    for question in noise_questions(questions, side):
        prompt = Trajectory.start(policy, question, question["images"], "direct")
        for member in range(group):
            dialogue = prompt.fork()
            dialogue.add_turn(policy, rng.integers(0, 100, length).tolist(), [0.0] * length)
            right = float(member % 2)
            old = torch.zeros(len(dialogue.ids) - 1)
            episode = rl_stage.Episode(dialogue, right, right, 1.0, old, advantage=2 * right - 1)
            episodes.append(episode)
    return episodes


def work_of_episodes(policy: Policy, episodes: list, group: int) -> tuple[int, float]:
    """(tokens, FLOP forward and backward) of an update: a group's prompt once, the head on written tokens alone."""
    c = policy.model.config.text_config
    layer = policy.model.model.language_model.layers[0]
    weights = count(p for p in layer.parameters() if p.dim() > 1)
    pair = 4 * c.num_attention_heads * c.head_dim  # a query and a key: score and weighted value
    tokens, flops = 0, 0.0
    for start in range(0, len(episodes), group):
        dialogues = [episode.trajectory for episode in episodes[start : start + group]]
        prompt = dialogues[0].prompt_length
        own = prompt
        pairs = prompt * (prompt + 1) / 2
        for dialogue in dialogues:
            rest = len(dialogue.ids) - 1 - prompt
            own += rest
            pairs += rest * prompt + rest * (rest + 1) / 2
            flops += 2 * sum(dialogue.loss_mask) * c.hidden_size * c.vocab_size
        flops += c.num_hidden_layers * (2 * weights * own + pair * pairs)
        tokens += own
    return tokens, 3 * flops
