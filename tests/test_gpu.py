"""What only a GPU can show: compiled flex attention, compiled sampling, bf16 against fp32. `pytest -q -m gpu`"""

import dataclasses

import numpy as np
import pytest
import torch

from lib.bagel import ContextImage, ContextText
from lib.packing import dense_attention, flex_attention_for
from policy import Policy, collate, rollout, token_logprobs
from tests.test_world_model import SMALL, packed, random_network, sampled, small_pack

WIDE = dataclasses.replace(
    SMALL, width=128, mlp=192
)  # 32 numbers per head: Triton wants 16 at least
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def near(a, b, share):
    """The largest difference is at most `share` of the largest entry of b."""
    assert (a.float().cpu() - b.float().cpu()).abs().max() <= share * b.float().abs().max().cpu()


@pytest.mark.parametrize(
    "dtype, share", [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)]
)  # Triton rounds to TF32
def test_compiled_flex_attention_equals_the_dense_mask(dtype, share):
    tokens = packed(random_network(), *small_pack(), together=True).tokens.to("cuda")
    n, g = tokens.order.shape[1], torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(1, heads, n, 64, generator=g).to("cuda", dtype).requires_grad_()
        for heads in (4, 2, 2)
    )
    gradients = []
    for attend in (dense_attention(tokens, tokens, dtype), flex_attention_for(tokens, tokens)):
        y = attend(q, k, v)
        gradients.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    for dense, flex in zip(*gradients, strict=True):
        near(flex, dense, share)


@pytest.mark.parametrize("views", [True, False])
def test_a_training_step_in_bf16_is_near_fp32_on_the_cpu(views):
    """The velocities and every large gradient of a pack: flex attention and bf16 against SDPA and fp32."""
    keep = (
        None if views else torch.tensor([[True, False] * 2] * 2)
    )  # dropout took every ViT segment
    outcomes = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        network = random_network(WIDE).to(device, dtype)
        pack = packed(network, *small_pack(), keep, together=True).to(torch.device(device))
        velocity = network(pack)[pack.target_mask]
        velocity.square().mean().backward()
        outcomes.append([velocity, *(p.grad for p in network.parameters() if p.grad is not None)])
    for fp32, bf16 in zip(*outcomes, strict=True):
        if fp32.abs().max() > 1e-3:
            near(bf16, fp32, 0.15)


def test_compiled_blocks_have_the_gradients_of_others():
    """One graph for all layers, whatever their number, with recomputation as in training."""
    outcomes = []
    for compiled in (False, True):
        network = random_network(WIDE).to("cuda")
        network.recompute = True
        if compiled:
            network.compile_blocks()
        pack = packed(network, *small_pack(), together=True).to(torch.device("cuda"))
        velocity = network(pack)[pack.target_mask]
        velocity.square().mean().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        outcomes.append({"velocity": velocity} | gradients)
    for name, eager in outcomes[0].items():
        if eager.abs().max() > 1e-3:
            near(outcomes[1][name], eager, 2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_sampling_in_bf16_is_near_fp32_on_the_cpu(compiled):
    images, _, ids, lengths, _, _, grid = (
        small_pack()
    )  # two rows, sentences of 4 and 6 tokens: masked
    settings = dataclasses.replace(SMALL.settings, steps=4, text_scale=2.0, image_scale=1.5)
    noise, views = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(3)), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        network = random_network(WIDE).to(device, dtype)
        if compiled and device == "cuda":
            network.compile_blocks()
        context = [ContextImage(z.to(device), p.to(device)) for z, p, _ in images]
        text = ContextText(ids[:2].to(device), lengths[:2])
        views.append(sampled(network, context, text, noise.to(device), grid, settings))
    near(views[1], views[0], 0.15)


def test_a_policy_in_bf16_writes_and_learns_near_fp32_on_the_cpu():
    """Log-probs of one rollout, written by the decoding step and computed again for the update, on both devices."""
    question = {
        "question": "Which?",
        "options": ["A. red", "B. blue"],
        "answer": "A",
        "images": list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)),
    }
    policy = Policy.tiny()
    dialogues = rollout(policy, [question], group_size=4, mode="direct", max_new_tokens=16)
    expected = token_logprobs(policy, collate(policy, dialogues, share_prompts=True))[0]
    fast = Policy(
        Policy.tiny().model.to("cuda", torch.bfloat16), policy.tokenizer, policy.image_config
    )
    near(
        token_logprobs(
            fast,
            collate(
                fast, [dataclasses.replace(t, features=[]) for t in dialogues], share_prompts=True
            ),
        )[0],
        expected,
        0.1,
    )
    for t in rollout(fast, [question], group_size=4, mode="direct", max_new_tokens=16):
        again = token_logprobs(fast, collate(fast, [t]))[0][0].cpu()
        near(torch.tensor(t.logprobs[1:]), again.float(), 0.1)
