"""
TRL's GRPOTrainer on our policy, for `python -m bench grpo --against trl`. TRL is no requirement: pip install trl==1.16.0

It is given what ours has: the weights, the prompts token by token, the group, the lengths, one micro-batch, the frozen
tower. TRL renders prompts through a chat template: Qwen3-VL's own, with our tool's JSON in the place of what TRL reads
from a docstring. In tool mode both sides are made to say the same two calls and answer; else both write a fixed number
of tokens. TRL runs at its defaults but for what makes the work the same.
"""

import copy
import itertools
import json
import time

import torch
from datasets import IterableDataset
from PIL import Image
from transformers import LogitsProcessorList, Qwen3VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template, qwen3_vl_chat_template

from lib.geometry import Motion
from lib.protocol import IMAGE_TOKEN, TOOL, prompt_text
from lib.simulators import phrase


class Stills(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = IMAGE_TOKEN, "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [IMAGE_TOKEN, self.video_token]
        )


def row(question, mode):
    """A question as a row of TRL's dataset: the user's message with places for its images, and the images."""
    images = [Image.fromarray(image) for image in question["images"]]
    said = (
        prompt_text(question, mode, len(images))
        .split("<|im_start|>user\n")[1]
        .split("<|im_end|>")[0]
    )
    if not images:
        return {"prompt": [{"role": "user", "content": said}]}
    first, *texts = said.split(f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>")
    parts = [{"type": "text", "text": first}]
    for text in texts:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return {"prompt": [{"role": "user", "content": parts}], "images": images}


def processor_of(policy, images):
    """The policy's tokenizer, with its image preparation if there are images, as TRL takes them."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.response_template = qwen3_template
    template = qwen3_vl_chat_template.replace("tool | tojson", json.dumps(json.dumps(TOOL)))
    if not images:
        tokenizer.chat_template = template
        return tokenizer
    config = {
        key: policy.image_config[key]
        for key in ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean")
    }
    return Stills(
        Qwen2VLImageProcessorPil(**config, image_std=config["image_mean"]), tokenizer, template
    )


def forced(model, scripts):
    """Let model.generate write token ids: row r writes scripts[r % len(scripts)], one turn per call and in a circle."""
    generate, turns = model.generate, itertools.cycle(zip(*scripts, strict=True))

    def write(input_ids, **options):
        said, start = next(turns), input_ids.shape[1]

        def force(so_far, logits):
            step = so_far.shape[1] - start
            tokens = torch.tensor([said[row % len(said)][step] for row in range(len(logits))])
            return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0)

        return generate(
            input_ids=input_ids, logits_processor=LogitsProcessorList([force]), **options
        )

    model.generate = write


def steps(policy, questions, mode, group, length, view, scripts, count, seconds, between, folder):
    """`count` steps of GRPOTrainer -> ([what each step did, CpuSeconds], grad norms, token ids of the last rollouts).

    length     tokens to write per rollout, or with `scripts` the most that a completion may have, replies included
    view       what the tool shows;   scripts   see `forced`, or None
    seconds    makes a CpuSeconds;   between   called after every step, its time not counted
    """

    def world_simulator_tool(reference_image: int, motion_type: str, value: float) -> list:
        """Imagine a view.

        Args:
            reference_image: number of the image
            motion_type: what the camera does
            value: how far
        """
        motion = phrase(Motion(motion_type, value))
        text = f"Imagined from Image-{reference_image}, {motion}. Image-{reference_image + 1}: "
        return [{"type": "text", "text": text}, {"type": "image", "image": Image.fromarray(view)}]

    class Clock(TrainerCallback):
        """Closes the account of a step, lets `between` run, opens the next."""

        def on_step_begin(self, *_, **__):
            if not spent:
                self.open()

        def on_step_end(self, *_, **__):
            spent[-1]["update"] = time.process_time() - self.start - spent[-1]["sample"]
            between()
            if len(spent) < count:
                self.open()

        def open(self):
            spent.append(seconds())
            self.start = time.process_time()

    def generate(inputs):
        with spent[-1]("sample"):
            return ours(inputs)

    def remember(prompts):
        said.clear()
        result = rollouts(prompts)
        said.extend(prompt + written for prompt, written in zip(result[0], result[1], strict=True))
        return result

    spent, said = [], []
    model = copy.deepcopy(policy.model)
    model.model.visual.requires_grad_(False)
    if scripts:
        forced(model, scripts)
    config = GRPOConfig(
        output_dir=folder,
        max_steps=count,
        per_device_train_batch_size=len(questions) * group,
        num_generations=group,
        max_completion_length=length,
        learning_rate=0.0,
        adam_beta2=0.99,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs=None if scripts else {"min_new_tokens": length},
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        config,
        IterableDataset.from_generator(lambda: (row(question, mode) for question in questions)),
        tools=[world_simulator_tool] if scripts else None,
        callbacks=[Clock()],
        processing_class=processor_of(policy, bool(questions[0]["images"])),
    )
    ours, trainer._generate_and_score_completions = (
        trainer._generate_and_score_completions,
        generate,
    )
    rollouts, trainer._generate = trainer._generate, remember
    trainer.train()
    return (
        spent,
        [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        said,
    )
