"""
Astra-VL, the policy: a Qwen3-VL that thinks, may ask a world model for a view, looks at it, and answers.

    python policy.py --images a.png b.png --ask "Which object is behind you?" --options "red box" "blue ball"

prints the dialogue and saves the imagined views. Tiny and published checkpoints are the same class. Three things are
here: Policy (weights, tokenizer, image preparation, one forward pass), `rollout` (questions -> sampled dialogues) and
`token_logprobs` (dialogues -> what training needs). What a dialogue is, word by word, stands in lib/dialogue.py; how
turns are written for many dialogues at once, in lib/rollout.py.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable
from functools import lru_cache, partial
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import AutoImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.utils import logging

from lib.bagel_files import (
    complain,
    find_folder,
    from_library,
    load_network,
    load_tokenizer,
    read_json,
)
from lib.checkpoints import contents, misfits, write_gathered
from lib.dialogue import Trajectory
from lib.distributed import default_device, fail, is_main, say
from lib.images import check_shape, load_image
from lib.packing import padded
from lib.protocol import MAX_TURNS, NO_SIMULATOR, NOTE, PHRASES, SEAM
from lib.records import write_json
from lib.rollout import Layout, Writer
from lib.simulators import NO_VIEW, imagine_each, load_simulator
from lib.stage import bounded, newest, run_stage
from lib.streams import stream_seed, torch_stream
from lib.tiny import MOTION_PHRASES, stamp, tiny_policy_config, tiny_tokenizer

logging.disable_progress_bar()  # of loading and saving: seconds at most, inside our own bars
logging.set_verbosity_error()  # what does not fit is said in our own sentences

TOWER_TOKENS = 16_384  # of the vision tower at a time: 64 images of 512 x 512
HEAD_TOKENS = 512  # of the language head at a time: 0.3 GB of logits with the published vocabulary
WEIGHTS = "model.safetensors"
# what servers read and we do not: kept as it came
SERVED = ("video_preprocessor_config.json", "processor_config.json", "chat_template.json")

# of preprocessor_config.json, what `Policy.pixels` does: it could only ignore any other
IMAGE_SETTINGS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "temporal_patch_size": 2,
}

# ---- weights, tokens, pixels ----------------------------------------------------------------------------------------


def encode_text(tokenizer, text: str) -> list[int]:
    """Text -> token ids. Around a SEAM it is read apart: words of data that spell <|im_end|> are not its id."""
    ids = []
    for piece in text.split(SEAM):
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


class Policy:
    """A Qwen3-VL with its tokenizer and image preparation; `tiny`, `load` and `save` are the ways in and out.

    model         transformers' Qwen3VLForConditionalGeneration; its vision tower is `vision`
    encode_text   text -> token ids, that of data by way of `lib.protocol.as_words`
    image_config  preprocessor_config.json: patch_size, merge_size, size (limits of the area in pixels); "stamped" is
                  true of a tiny policy alone
    served        {name: content} of json files that only servers read (SERVED)
    banned        (vocabulary,) bool: special tokens a policy must not write, so that it cannot promise an image
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer, image_config: dict):
        if "mm_encoder_outputs" not in signature(model.model.forward).parameters:
            fail(  # the model would not see its images
                "This version of transformers cannot take images that are encoded already: install 5.23 or later."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.served = {}
        self.vision = model.model.visual
        self.device = model.lm_head.weight.device
        self.image_token_id = model.config.image_token_id
        self.encode_text = lru_cache(20_000)(partial(encode_text, tokenizer))
        model.model.language_model.set_attn_implementation("shared_attention")  # lib/rollout.py

        banned = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
        banned[: len(tokenizer)] = False  # rows beyond the tokenizer pad the embedding
        for number, token in tokenizer.added_tokens_decoder.items():
            banned[number] |= token.special
        banned[tokenizer.eos_token_id] = False
        self.banned = banned.to(self.device)

    @classmethod
    def tiny(cls, seed: int = 0, device="cpu") -> "Policy":
        """Random weights, 1.9 M of them."""
        tokenizer = tiny_tokenizer(PHRASES + MOTION_PHRASES)
        config, images = tiny_policy_config(tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("weights", seed, "policy"))
            model = Qwen3VLForConditionalGeneration(config).to(device).eval()
        return cls(model, tokenizer, IMAGE_SETTINGS | images)

    @classmethod
    def load(
        cls, path: str | Path, device="cpu", dtype: torch.dtype | None = None, prepare=None
    ) -> "Policy":
        """Read a checkpoint: a folder that `save` wrote, or any Qwen3-VL by folder or hub id.

        dtype     None: to answer questions, that is bf16 on a GPU, else the checkpoint's own
        prepare   called with the model while it is still on the meta device (freezing, adapters, sharding): each rank
                  then reads its own rows only
        The hub id of the paper's base is Qwen/Qwen3-VL-8B-Instruct. Ends the program with a sentence if there is no
        checkpoint, or one that does not fit: nothing is drawn at random, and no setting is ignored.
        """
        try:
            folder = find_folder(path, "A tiny one is made by: python train_sft.py")
            config = read_config(folder)
            images = read_image_config(folder, config)
            tokenizer = read_tokenizer(folder, config)
            with torch.device("meta"):
                model = from_library(
                    lambda _: Qwen3VLForConditionalGeneration(config), folder, "config"
                )
            files = weights_files(folder)
            stored_type = check_weights(folder, files, model)
            on_gpu = torch.device(device).type == "cuda"
            model.to(dtype or (torch.bfloat16 if on_gpu else stored_type)).eval()
            if prepare:
                prepare(model)
            fill(model, files, device)
            policy = cls(model, tokenizer, images)
            for name in SERVED:
                if (folder / name).exists():
                    policy.served[name] = read_json(folder / name)
            return policy
        except (OSError, ValueError) as error:
            fail(f"No policy could be read from {path}: {error}")

    def save(self, folder: str | Path, tensors: Iterable | None = None) -> None:
        """Write weights, tokenizer and image preparation in the public layout, and what servers want beside them.

        tensors   (name, tensor) pairs that stand in for the model's own, such as extras.lora.merged's; maybe sharded
        Called on every rank; rank 0 writes. Tied weights have one name.
        """
        folder = Path(folder)
        names = dict(self.model.named_parameters())
        pairs = self.model.state_dict().items() if tensors is None else tensors
        write_gathered(folder / WEIGHTS, ((name, x) for name, x in pairs if name in names))
        if not is_main():
            return
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        images = self.image_config | {"processor_class": "Qwen3VLProcessor"}
        write_json(folder / "preprocessor_config.json", images)
        for name, content in self.served.items():
            write_json(folder / name, content)

    @property
    def is_tiny(self) -> bool:
        """True of a policy whose images carry their number (lib.tiny.stamp)."""
        return self.image_config.get("stamped", False)

    @property
    def turn_limit(self) -> int:
        """Tokens of a turn if the caller gives no limit: tiny policies think in few words, published ones at length."""
        return 256 if self.is_tiny else 4096

    def grid(self, image: np.ndarray) -> tuple[int, int]:
        """Rows and columns of language tokens an image (H, W, 3) becomes: Qwen's rounding, area within the limits.

        Raises PictureError for an image that is more than 200 times as long as it is wide.
        """
        check_shape(image)
        # a token's side in pixels; the limits are areas, whatever they are called
        unit = self.image_config["patch_size"] * self.image_config["merge_size"]
        limits = self.image_config["size"]
        smallest, largest = limits["shortest_edge"], limits["longest_edge"]
        height, width = smart_resize(*image.shape[:2], unit, smallest, largest)
        return height // unit, width // unit

    def pixels(self, numbered: list[tuple[int, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut images into patches as Qwen does: those of one merged token are neighbours, a still lasts two frames.

        numbered  (number in the dialogue, image (H, W, 3) uint8 of any size) each
        returns   patches (N, 3 * 2 * patch²) float32 in [-1, 1]; grids (images, 3): 1, rows, columns of patches
        """
        patch, merge = self.image_config["patch_size"], self.image_config["merge_size"]
        patches, grids = [], []
        for number, image in numbered:
            rows, columns = self.grid(image)
            size = (columns * merge * patch, rows * merge * patch)
            if image.shape[1::-1] != size:
                image = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
            if self.is_tiny:
                image = stamp(image, number)
            x = image.reshape(rows, merge, patch, columns, merge, patch, 3)
            x = x.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column, merge, merge, 3, patch, patch
            x = np.repeat(x[:, :, :, :, :, None], 2, axis=5)  # two frames
            patches.append(x.reshape(rows * columns * merge**2, -1))
            grids.append((1, rows * merge, columns * merge))
        patches = torch.from_numpy(np.concatenate(patches)).to(self.device)
        return patches.float() / 127.5 - 1, torch.tensor(grids, device=self.device)

    @torch.no_grad()
    def encode(self, numbered: list[tuple[int, np.ndarray]]) -> list:
        """What the frozen tower makes of images, per image (1 + deepstack levels, tokens, width).

        numbered  (number in the dialogue, image) each
        Kept on a GPU until a step is over, so there in bf16, as the language model would take it anyhow.
        """
        chunks, room = [], 0
        for number, image in numbered:
            tokens = math.prod(self.grid(image))
            if tokens > room:
                chunks.append([])
                room = TOWER_TOKENS
            chunks[-1].append((number, image))
            room -= tokens
        features = []
        for chunk in chunks:
            patches, grids = self.pixels(chunk)
            # on the CPU: every layer of the tower asks for them, and would wait for a GPU
            lengths = grids.prod(1).cpu()
            options = {"grid_thw": grids, "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0))}
            out = self.vision(patches.to(self.vision.dtype), **options)
            levels = torch.stack([out.pooler_output, *out.deepstack_features])
            if self.device.type == "cuda":
                levels = levels.bfloat16()
            sizes = lengths // self.image_config["merge_size"] ** 2  # tokens of each image
            features += levels.split(sizes.tolist(), 1)
        return features

    def hidden(self, ids, positions, mask, features=None, cache=None) -> torch.Tensor:
        """One pass over ids (B, L) with M-RoPE positions (3, B, L) -> (B, L, width), which `logits` reads.

        mask      a batch's: `Layout.mask`; with a cache: (B, 1, L, keys) bool, True = may look
        features  (1 + levels, image tokens, width): all images of the batch in row order, from `encode`
        cache     takes in the keys and values of all tokens
        """
        vision = None
        if features is not None:
            levels = [(level,) for level in features[1:]]
            image = SimpleNamespace(pooler_output=(features[0],), deepstack_features=levels)
            vision = {"image": image}
        # The whole model is called, not its language part alone: FSDP gathers weights in the root's hook.
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            mm_encoder_outputs=vision,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=[-1],
            logits_to_keep=ids.new_empty(0),  # skips the head
        ).hidden_states[-1]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The language head: hidden states (..., width) -> logits (..., vocabulary), float32."""
        logits = self.model.lm_head(hidden).float()
        return logits.masked_fill(self.banned, -1e9)  # exp gives exactly 0


def newest_policy() -> Path:
    """The folder in out/ or out/demo/ of the policy that was trained last; ends the program if there is none."""
    folder = newest(("phase2", "phase1", "sft"))
    if folder is None:
        fail("There is no policy in out/ yet. `python train_sft.py` trains one; or name one.")
    return folder


# ---- a folder that somebody else may have written -------------------------------------------------------------------


def read_config(folder: Path) -> Qwen3VLConfig:
    """config.json. Raises ValueError if it is no Qwen3-VL's."""
    family = read_json(folder / "config.json").get("model_type")
    if family != "qwen3_vl":
        raise ValueError(
            f"{folder}/config.json is of a {family!r}, and the policy is a 'qwen3_vl', such as "
            f"Qwen/Qwen3-VL-8B-Instruct."
        )
    return from_library(Qwen3VLConfig.from_pretrained, folder, "config")


def read_image_config(folder: Path, config: Qwen3VLConfig) -> dict:
    """preprocessor_config.json, or what processor_config.json nests of it. Raises ValueError if `pixels` does otherwise."""
    processor = from_library(AutoImageProcessor.from_pretrained, folder, "preprocessor_config.json")
    images = json.loads(processor.to_json_string())
    vision = config.vision_config
    expected = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    wrong = []
    for key, value in (IMAGE_SETTINGS | expected).items():
        if images.get(key) != value:
            wrong.append(f"{key} is {images.get(key)!r}, not {value!r}")
    size = images.get("size") or {}
    smallest, largest = size.get("shortest_edge"), size.get("longest_edge")
    if type(smallest) is not int or type(largest) is not int or not 0 < smallest <= largest:
        wrong.append(f"size is {size}, not {{shortest_edge, longest_edge}}: two areas in pixels")
    remedy = "Take preprocessor_config.json from the checkpoint that it was trained from."
    complain(f"The image settings in {folder} are not a Qwen3-VL's", wrong, remedy)
    return images


def read_tokenizer(folder: Path, config: Qwen3VLConfig):
    """The tokenizer. Raises ValueError if it cannot end a turn or pad a row, or numbers its tokens otherwise."""
    tokenizer = load_tokenizer(folder, config.text_config.vocab_size)
    wrong = []
    if tokenizer.eos_token != "<|im_end|>":
        wrong.append(f"its end token is {tokenizer.eos_token}, not <|im_end|>")
    if tokenizer.pad_token_id is None:
        wrong.append("it has no pad token")
    ids = tokenizer.get_vocab()
    for name in ("vision_start", "vision_end", "image"):
        token = "<|image_pad|>" if name == "image" else f"<|{name}|>"
        number = getattr(config, f"{name}_token_id")
        if ids.get(token) != number:
            wrong.append(f"{token} is {ids.get(token)}, in config.json {number}")
    remedy = "Take tokenizer_config.json from the checkpoint that it was trained from."
    complain(f"The tokenizer in {folder} is not a Qwen3-VL's", wrong, remedy)
    return tokenizer


def weights_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists() or (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    shards = dict(read_json(index).get("weight_map") or {}).values()
    return [folder / str(shard) for shard in sorted(set(shards))]


def check_weights(folder: Path, files: list[Path], model) -> torch.dtype:
    """The type of the weights. Raises ValueError unless the files hold every tensor, in its shape, and nothing else."""
    tensors = {}
    for file in files:
        tensors |= contents(file)
    expected = model.state_dict()
    if model.config.tie_word_embeddings and "lm_head.weight" not in tensors:
        del expected["lm_head.weight"]  # the embedding is the head
    remedy = "Fetch it again, or save the whole model anew under transformers' own names."
    complain(f"{folder} does not fit its config.json", misfits(expected, tensors), remedy)
    return tensors["model.language_model.norm.weight"].dtype


def fill(model: Qwen3VLForConditionalGeneration, files: list[Path], device) -> None:
    """Put a model on the meta device, maybe sharded, on its device: weights from files, rotary frequencies computed."""
    for file in files:
        load_network(model, file, device, part=True)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    tower, text = model.model.visual, model.model.language_model
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(model.config.vision_config).to(device)
    text.rotary_emb = type(text.rotary_emb)(model.config.text_config).to(device)


# ---- sampling dialogues ---------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(
    policy: Policy,
    questions: list[dict],
    simulator=None,
    mode: str = "agentic",
    group_size: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_turns: int = MAX_TURNS,
    max_new_tokens: int = 64,
    rows: int = 64,
) -> list[Trajectory]:
    """Let the policy hold `group_size` dialogues per question; returns Trajectories, question-major.

    questions        rows of out/data/questions_*.jsonl; "images" are paths or arrays
    simulator        anything with imagine(list of Query) -> list of views; None: calls are told that there is none
    temperature      1 samples from the policy itself, 0 is greedy
    max_turns, max_new_tokens (per turn): more ends the dialogue as truncated
    rows             dialogues written together, of one question at least: memory and speed only. Each draws from its
                     own stream, of (seed, question id, number in the group): what it samples does not depend on others
    """
    was_training = policy.model.training
    policy.model.eval()  # checkpointing in training mode would drop the cache silently
    trajectories = []
    at_once = max(1, rows // group_size)
    for first in range(0, len(questions), at_once):
        prompts = []
        for question in questions[first : first + at_once]:
            images = [load_image(image) for image in question["images"]]
            prompts.append(Trajectory.start(policy, question, images, mode))
        encode_images(policy, prompts)

        dialogues = []
        for prompt in prompts:
            name = prompt.question.get("id", prompt.question["question"])
            for member in range(group_size):
                dialogues.append(prompt.fork())
                dialogues[-1].stream = (seed, name, member)
        write_turns(
            policy, dialogues, max_turns, max_new_tokens, temperature, simulator, group_size
        )
        trajectories += dialogues
    policy.model.train(was_training)
    return trajectories


@torch.no_grad()
def write_turns(
    policy: Policy,
    dialogues: list[Trajectory],
    max_turns: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    simulator=None,
    group_size: int = 1,
) -> None:
    """Let the policy write turns, and answer its calls, until every dialogue is done.

    dialogues   with features, those of a group neighbours and equal so far
    What a dialogue samples, and the simulator's noise, depend on its `stream` and the turn alone.
    """
    uniforms = torch.empty(len(dialogues), max_turns, max_new_tokens, dtype=torch.float64)
    for d, dialogue in enumerate(dialogues):
        uniforms[d].uniform_(generator=torch_stream("rollout", *dialogue.stream))
    writer = Writer(policy, dialogues, group_size)
    for turn in range(max_turns):
        members = [d for d, dialogue in enumerate(dialogues) if not dialogue.done]
        if not members:
            break
        turns = writer.write(members, uniforms[:, turn], temperature, max_new_tokens)
        for d, (ids, logprobs) in zip(members, turns, strict=True):
            dialogues[d].add_turn(policy, ids, logprobs)
            if turn + 1 == max_turns and dialogues[d].answer is None:
                dialogues[d].truncated = True

        waiting = [d for d in members if not dialogues[d].done]
        views = views_of_turn(simulator, dialogues, waiting, turn, obey_seed=temperature == 0)
        for d in waiting:
            if dialogues[d].call and views.get(d) is None:
                dialogues[d].reply = NO_VIEW if simulator else NO_SIMULATOR
            dialogues[d].observe(policy, image=views.get(d))
        encode_images(policy, [dialogues[d] for d in waiting])


def views_of_turn(simulator, dialogues, waiting, turn, obey_seed) -> dict:
    """The views that dialogues wait for, all in one batch -> {number of the dialogue: view, or None if refused}.

    obey_seed   whether a call may choose its noise: in evaluation, which is greedy, not in training
    """
    calling = [d for d in waiting if dialogues[d].call and simulator]
    queries = []
    for d in calling:
        noise = stream_seed("imagine", *dialogues[d].stream, turn)
        queries.append(dialogues[d].query(noise, obey_seed))
    return dict(zip(calling, imagine_each(simulator, queries), strict=True))


def encode_images(policy: Policy, trajectories: list[Trajectory]) -> None:
    """Fill in the `features` that are missing: the tower is frozen, so what it made of an image stays true."""
    missing = []
    for t in trajectories:
        missing += list(enumerate(t.images, 1))[len(t.features) :]
    encoded = iter(policy.encode(missing))
    for t in trajectories:
        t.features += [next(encoded) for _ in t.images[len(t.features) :]]


# ---- log-probabilities for training ---------------------------------------------------------------------------------


class DialogueBatch(NamedTuple):
    """B dialogues of up to L tokens in R rows of C cells, right-padded; `collate` makes it. All on the policy's device."""

    # of the rows (lib.rollout.Layout)
    ids: torch.Tensor  # (R, C)
    positions: torch.Tensor  # (3, R, C), M-RoPE's
    mask: torch.Tensor  # `Layout.mask`: (R, C) 1 = token, if no row is shared
    # (1 + levels, tokens, width): the tower's of all images, in row order
    features: torch.Tensor | None
    # of the dialogues, (B, L - 1) each, about the second token to the last
    targets: torch.Tensor  # the token itself
    predecessors: torch.Tensor  # where in ids.flatten() the token before it stands
    loss_mask: torch.Tensor  # 1.0 on what the policy wrote
    loss_weights: torch.Tensor  # its weight in a supervised loss
    logprobs: torch.Tensor  # the rollout's


def collate(
    policy: Policy, trajectories: list[Trajectory], share_prompts: bool = False
) -> DialogueBatch:
    """Trajectories -> one batch for `token_logprobs`.

    share_prompts   dialogues with the same prompt share a row: the prompt with its images is computed once, as in
                    `rollout`. Each sees the prompt and itself, at its own positions, so the numbers are the same
    """
    encode_images(policy, trajectories)
    layout = Layout.of(trajectories, share_prompts)
    ids = torch.full((len(layout.rows), layout.width), policy.tokenizer.pad_token_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    predecessors = [[] for _ in trajectories]
    features = []
    for row, numbers in enumerate(layout.rows):
        for member, number in enumerate(numbers):
            t = trajectories[number]
            columns = layout.columns(row, member, len(t.ids) - 1)
            ids[row, columns] = torch.tensor(t.ids[:-1])
            positions[:, row, columns] = torch.tensor(t.positions[:-1]).T
            predecessors[number] = [row * layout.width + column for column in columns]
            features += t.features if member == 0 else t.features[t.provenance.count(None) :]

    def table(lists: list[list]) -> torch.Tensor:
        return padded([torch.tensor(row) for row in lists]).to(policy.device)

    return DialogueBatch(
        ids=ids.to(policy.device),
        positions=positions.to(policy.device),
        mask=layout.mask().to(policy.device),
        features=torch.cat(features, 1) if features else None,
        targets=table([t.ids[1:] for t in trajectories]),
        predecessors=table(predecessors),
        loss_mask=table([t.loss_mask[1:] for t in trajectories]).float(),
        loss_weights=table([t.loss_weights[1:] for t in trajectories]),
        logprobs=table([t.logprobs[1:] for t in trajectories]),
    )


def token_logprobs(
    policy: Policy, batch: DialogueBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of what the policy wrote, under the distribution `rollout` samples from.

    returns   (B, L - 1) each: column t is about token t + 1; 0 where that token is not the policy's. The first is
              differentiable.
    The language head runs on the policy's tokens alone, HEAD_TOKENS at a time, and once more in backward: of a whole
    batch the logits, 151,936 per token, would be larger than the model.
    """
    own = batch.loss_mask > 0  # (B, L - 1)
    hidden = policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)  # (R, C, width)
    hidden = hidden.flatten(0, 1)[batch.predecessors[own]]  # (n, width)
    chunks = zip(hidden.split(HEAD_TOKENS), batch.targets[own].split(HEAD_TOKENS), strict=True)
    logprobs, entropies = [], []
    for chunk in chunks:
        of_chunk = checkpoint(chosen_logprobs, policy, *chunk, temperature, use_reentrant=False)
        logprobs.append(of_chunk[0])
        entropies.append(of_chunk[1])
    zeros = torch.zeros_like(batch.loss_mask)
    return (
        zeros.masked_scatter(own, torch.cat(logprobs)),
        zeros.masked_scatter(own, torch.cat(entropies)),
    )


def chosen_logprobs(policy, hidden, tokens, temperature):
    """Hidden states (n, width) before tokens (n,) -> their log-probabilities and, without gradient, entropies."""
    logprobs = torch.log_softmax(policy.logits(hidden) / temperature, -1)  # (n, vocabulary)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", nargs="+", required=True, help="the views, in order: Image-1, Image-2, ...")
    add("--ask", required=True, help="the question")
    add("--options", nargs="*", default=[], help="answers to choose from, lettered A, B, C, ...")
    add(
        "--model",
        help="policy folder or hub id (default: the last stage trained, in out/ or out/demo/)",
    )
    add("--wm", help="world model folder or hub id (default: out/wm or out/demo/wm)")
    add(
        "--mode",
        choices=list(NOTE),
        default="agentic",
        help="direct: no tool; forced: must imagine first",
    )
    add(
        "--max-new-tokens",
        type=bounded(int, 1),
        help="per turn (default: 4096, of a tiny policy 256)",
    )
    add("--seed", type=int, default=0, help="of the simulator's noise")
    add("--out", default="out/ask", help="imagined views and the dialogue are saved here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Ask one question and show the dialogue."""
    args = parse_args(argv)
    device = default_device()
    options = []
    for i, text in enumerate(args.options):
        options.append(text if re.match(r"[A-Z]\. ", text) else f"{chr(65 + i)}. {text}")
    images = [load_image(path) for path in args.images]
    question = {"question": args.ask, "options": options, "images": images}
    path = args.model or newest_policy()
    simulator = None if args.mode == "direct" else load_simulator("tuned", device, args.wm)
    try:
        policy = Policy.load(path, device)
        sizes = {image.shape[:2] for image in images}
        if policy.is_tiny and sizes != {(32, 32)}:
            say("A tiny policy knows rooms of 32 x 32 pixels only: the rest it can but guess.")
        limit = args.max_new_tokens or policy.turn_limit
        (trajectory,) = rollout(
            policy,
            [question],
            simulator,
            args.mode,
            temperature=0.0,
            seed=args.seed,
            max_new_tokens=limit,
        )
    except (OSError, ValueError) as error:
        fail(str(error))
    print(trajectory.transcript())
    out = Path(args.out)
    if (out / "dialogue.json").exists():  # of another dialogue, with its pictures
        for picture in out.glob("image_*.png"):
            picture.unlink()
    trajectory.save(out)
    trajectory.draw(out / "dialogue.png")
    answer = "No answer." if trajectory.answer is None else f"Answer: {trajectory.answer}."
    print(f"{answer} Imagined views: {trajectory.valid_calls}. Pictures: {out}")


if __name__ == "__main__":
    run_stage(main)
