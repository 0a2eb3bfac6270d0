"""
What a GPU has to hold while a stage runs, from the shapes of the models: bytes by part, without allocating any.

Sharding is lib.common's: each block and the root are spread over the GPUs of a machine and copied between machines, so
more than 8 GPUs make the steps faster, not the shards smaller. Weights, gradients and AdamW's two moments are fp32,
arithmetic is bf16. Exact: weights, gradients, moments, simulator, keys and values. Estimates: what is gathered, and
activations (what one layer keeps for its backward pass, by the widths of its matrices). Left out: CUDA's context, the
allocator's fragments, NCCL's buffers, the frozen autoencoder (0.2 GB); leave 8 GB for them.
"""

from typing import NamedTuple

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from lib.bagel import Bagel, Config

MACHINE = 8  # GPUs that shard; see lib.common.shard
FP32, BF16 = 4, 2


class Shapes(NamedTuple):
    """A model in numbers of parameters, and of one layer the widths that decide about memory."""

    learned: int  # sharded
    frozen: int  # whole on every GPU
    block: int  # the largest unit that is gathered for itself
    root: int  # what belongs to no block: gathered through forward and backward
    layers: int
    width: int
    mlp: int
    key_value: int  # numbers a token leaves in the cache of a layer: key and value of all heads
    vocabulary: int


def qwen3_vl_8b(layers=36, device="meta", dtype=torch.float32):
    """Qwen3-VL-8B-Instruct's shapes, 8.77 B parameters (its config.json on the hub); weights that are not meta: random.

    layers   of the language model; the published one has 36
    """
    text = dict(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    vision = dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[8, 16, 24],
    )
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)


def bagel_7b(layers=28):
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
        return Bagel(Config.read(files, vocabulary=152064, latent_grid=64, latent_numbers=64))


def count(parameters):
    return sum(p.numel() for p in parameters)


def policy_shapes(model):
    """Of a Qwen3-VL whose vision tower is frozen, as train_rl.py trains it."""
    c, layers = model.config.text_config, model.model.language_model.layers
    frozen, everything = count(model.model.visual.parameters()), count(model.parameters())
    return Shapes(
        everything - frozen,
        frozen,
        count(layers[0].parameters()),
        everything - frozen - count(layers.parameters()),
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        2 * c.num_key_value_heads * c.head_dim,
        c.vocab_size,
    )


def bagel_shapes(network):
    """Of a BAGEL network, all of it trained, as train_wm.py trains it."""
    c, blocks = network.config, [count(block.parameters()) for block in network.blocks]
    return Shapes(
        count(network.parameters()),
        0,
        max(blocks),
        count(network.parameters()) - sum(blocks),
        c.layers,
        c.width,
        c.mlp,
        2 * c.kv_heads * c.width // c.heads,
        c.vocabulary,
    )


def trained(s, gpus, average=False):
    """What stays on a GPU between steps, and its gradients: {"weights", "gradients", "optimiser"} in bytes.

    average   a moving average of the weights besides, counted as weights
    """
    shard = s.learned / min(gpus, MACHINE)
    return {
        "weights": FP32 * (shard * (1 + average) + s.frozen),
        "gradients": FP32 * shard,
        "optimiser": 2 * FP32 * shard,
    }  # upper bounds: what no loss reaches has no gradient


def gathered(s, backward):
    """Whole units beside the shards, bf16: root and two layers (the next is fetched early); with their gradients in
    backward, and once more the root's in fp32, as they are summed over the GPUs."""
    unit = s.root + 2 * s.block
    return BF16 * unit * (1 + backward) + FP32 * s.root * backward


def activations(s, tokens, recompute, heads_tokens=0):
    """What forward keeps for backward, bf16: the input of each layer, and the inside of one layer or of all.

    Inside a layer: 12 vectors of its width (norms twice, query, key and value before and after norm and rotation,
    attention, sums) and 4 of its MLP's (gate, its SiLU, up, product). `heads_tokens` at the language head at a time:
    logits in bf16 and three times in fp32 (masked, normalised, gradient).
    """
    inside = BF16 * tokens * (12 * s.width + 4 * s.mlp)
    return (
        BF16 * tokens * s.width * s.layers + inside if recompute else inside * s.layers
    ) + heads_tokens * s.vocabulary * (BF16 + 3 * FP32)


def cache(s, tokens):
    """Keys and values of `tokens` tokens in all layers, bf16."""
    return BF16 * tokens * s.layers * s.key_value


def rl_budget(
    policy,
    simulator,
    gpus,
    rows,
    length,
    features,
    view_tokens,
    micro_batch_tokens,
    head_tokens,
    recompute,
):
    """train_rl.py on GPUs -> {"rollout": {part: bytes}, "update": {part: bytes}}; what is not held is 0.

    rows, length    dialogues written together, and tokens in the longest
    features        bytes of what the vision tower makes of a step's images, which stays until the step is over
    view_tokens     tokens of context and view that the simulator keeps while it imagines for all rows
    The rollout gathers the whole policy in bf16 beside the shards, and has no gradients yet.
    """
    standing, simulator_weights = trained(policy, gpus), BF16 * simulator.learned
    nothing = {
        "gathered": 0,
        "simulator": simulator_weights,
        "features": features,
        "KV cache": 0,
        "activations": 0,
    }
    return {
        "rollout": standing
        | nothing
        | {
            "gradients": 0,
            "gathered": BF16 * policy.learned,
            "KV cache": cache(policy, rows * length) + cache(simulator, view_tokens),
        },
        "update": standing
        | nothing
        | {
            "gathered": gathered(policy, backward=True),
            "activations": activations(policy, micro_batch_tokens, recompute, head_tokens),
        },
    }


def wm_budget(simulator, gpus, tokens, view_tokens, recompute):
    """train_wm.py on GPUs -> {"update": {part: bytes}, "look": {…}}: everything is trained, and an average is kept.

    A look at held-out views lays the weights aside, puts the average in their place and gathers all of it in bf16.
    """
    standing = trained(simulator, gpus, average=True)
    nothing = {"gathered": 0, "simulator": 0, "features": 0, "KV cache": 0, "activations": 0}
    return {
        "update": standing
        | nothing
        | {
            "gathered": gathered(simulator, backward=True),
            "activations": activations(simulator, tokens, recompute),
        },
        "look": standing
        | nothing
        | {
            "weights": standing["weights"] + trained(simulator, gpus)["weights"],
            "gradients": 0,
            "gathered": BF16 * simulator.learned,
            "KV cache": cache(simulator, view_tokens),
        },
    }
