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
from functools import lru_cache, partial
from inspect import signature
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file, logging

from extras.world2vlm.words import PIECES
from lib.common import at_least, fail, newest, run
from lib.dialogue import NO_SIMULATOR, NOTE, PAD, PHRASES, Trajectory
from lib.images import load_image
from lib.rollout import Writer, layout_of
from lib.simulators import NO_VIEW, imagine_each, load_simulator
from lib.streams import stream_seed, torch_stream
from lib.tiny import tiny_tokenizer

logging.disable_progress_bar()  # of loading and saving: seconds at most, inside our own bars

# ---- weights, tokens, pixels ----------------------------------------------------------------------------------------


class Policy:
    """A Qwen3-VL with its tokenizer and image preparation; `tiny`, `load` and `save` are the ways in and out.

    model       transformers' Qwen3VLForConditionalGeneration; its vision tower is `vision`
    images      preprocessor_config.json: patch_size, merge_size, size (limits of the area in pixels)
    banned      (vocabulary,) bool: special tokens a policy must not write, so that it cannot promise an image
    """

    def __init__(self, model, tokenizer, images):
        if (
            "mm_encoder_outputs" not in signature(model.model.forward).parameters
        ):  # it would not see its images
            fail(
                "This version of transformers cannot take images that are encoded already: install 5.23 or later."
            )
        self.model, self.tokenizer, self.images = model, tokenizer, images
        self.vision = model.model.visual
        model.model.language_model.set_attn_implementation("shared_attention")
        self.device = model.lm_head.weight.device
        self.banned = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
        self.banned[: len(tokenizer)] = False  # rows beyond the tokenizer pad the embedding
        self.banned[[i for i, token in tokenizer.added_tokens_decoder.items() if token.special]] = (
            True
        )
        self.banned[tokenizer.eos_token_id] = False
        self.banned = self.banned.to(self.device)
        self.pad_id = model.config.image_token_id
        self.tokens = lru_cache(20_000)(
            lambda text: tokenizer.encode(text, add_special_tokens=False)
        )

    @classmethod
    def tiny(
        cls,
        seed=0,
        width=128,
        depth=4,
        heads=4,
        kv_heads=2,
        mlp=384,
        vision_width=128,
        vision_depth=2,
        patch=8,
        merge=2,
        side=32,
        device="cpu",
    ):
        """Random weights, 1.9 M of them; an image of side² pixels becomes (side / patch / merge)² = 4 tokens."""
        tokenizer = tiny_tokenizer(PHRASES + PIECES)
        names = {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (
                ("image", PAD),
                ("video", "<|video_pad|>"),
                ("vision_start", "<|vision_start|>"),
                ("vision_end", "<|vision_end|>"),
            )
        }
        head = width // heads
        config = Qwen3VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=mlp,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head,
                tie_word_embeddings=True,
                max_position_embeddings=4096,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                initializer_range=width
                ** -0.5,  # the usual 0.02 is for wide models; this keeps a vector's length
                eos_token_id=tokenizer.eos_token_id,
                rope_parameters=dict(
                    rope_type="default",
                    rope_theta=5e6,
                    mrope_interleaved=True,
                    mrope_section=[head // 2 - 2 * (head // 8), head // 8, head // 8],
                ),
            ),  # time, row, column
            vision_config=dict(
                depth=vision_depth,
                hidden_size=vision_width,
                intermediate_size=3 * vision_width,
                num_heads=4,
                patch_size=patch,
                spatial_merge_size=merge,
                temporal_patch_size=2,
                out_hidden_size=width,
                num_position_embeddings=(side // patch) ** 2,
                deepstack_visual_indexes=[0],
            ),
            tie_word_embeddings=True,
            **names,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("weights", seed, "policy"))
            model = Qwen3VLForConditionalGeneration(config).to(device).eval()
        images = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": patch,
            "merge_size": merge,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": side * side, "longest_edge": side * side},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "stamped": True,
        }
        return cls(model, tokenizer, images)

    @property
    def turn_limit(self):
        """Tokens of a turn if the caller gives no limit: tiny policies think in few words, published ones at length."""
        return 256 if self.images.get("stamped") else 4096

    @classmethod
    def load(cls, path, device="cpu", dtype=None):
        """Read a checkpoint: a folder that `save` wrote, or any Qwen3-VL by folder or hub id.

        dtype   None: to answer questions, that is bf16 on a GPU, else the checkpoint's own
        The hub id of the paper's base is Qwen/Qwen3-VL-8B-Instruct. Ends the program with a sentence if there is no
        checkpoint or it cannot be read.
        """
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else "auto")
        try:
            images = json.loads(Path(cached_file(path, "preprocessor_config.json")).read_text())
            model = (
                Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=dtype).to(device).eval()
            )
            return cls(model, AutoTokenizer.from_pretrained(path), images)
        except (
            Exception
        ) as error:  # the file system, JSON, safetensors and the hub each have their own
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            fail(
                f"No policy could be read from {path}: {reason} A tiny one is made by: python train_sft.py"
            )

    def save(self, folder, state_dict=None):
        """Write weights, tokenizer and image preparation in the public layout.

        state_dict   the whole weights, gathered, if the model itself is sharded
        """
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(
            json.dumps(self.images, indent=1) + "\n"
        )

    def grid(self, image):
        """Rows and columns of language tokens an image (H, W, 3) becomes: Qwen's rounding, area within the limits."""
        height, width = image.shape[:2]
        unit = self.images["patch_size"] * self.images["merge_size"]
        low, high = (
            self.images["size"]["shortest_edge"],
            self.images["size"]["longest_edge"],
        )  # areas, in pixels
        if max(height, width) > 200 * min(height, width):
            raise ValueError(
                f"an image of {width} x {height} pixels is too narrow: the limit is 1 : 200"
            )
        rows, columns = round(height / unit), round(width / unit)
        if rows * columns * unit**2 > high:
            shrink = math.sqrt(height * width / high)
            rows, columns = math.floor(height / shrink / unit), math.floor(width / shrink / unit)
        elif rows * columns * unit**2 < low:
            grow = math.sqrt(low / (height * width))
            rows, columns = math.ceil(height * grow / unit), math.ceil(width * grow / unit)
        return max(1, rows), max(1, columns)

    def pixels(self, numbered):
        """Cut images into patches as Qwen does: those of one merged token are neighbours, a still lasts two frames.

        numbered  (number in the dialogue, image (H, W, 3) uint8 of any size) each
        returns   patches (N, 3 * 2 * patch²) float32 in [-1, 1]; grids (images, 3): 1, rows, columns of patches
        """
        patch, merge = self.images["patch_size"], self.images["merge_size"]
        patches, grids = [], []
        for number, image in numbered:
            rows, columns = self.grid(image)
            size = (columns * merge * patch, rows * merge * patch)
            if image.shape[1::-1] != size:
                image = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
            if self.images.get("stamped"):
                image = stamp(image, number)
            x = image.reshape(rows, merge, patch, columns, merge, patch, 3)
            x = x.transpose(0, 3, 1, 4, 6, 2, 5)[
                :, :, :, :, :, None
            ]  # row, column, merge, merge, 3, 1, patch, patch
            patches.append(np.repeat(x, 2, axis=5).reshape(rows * columns * merge**2, -1))
            grids.append((1, rows * merge, columns * merge))
        patches = torch.from_numpy(np.concatenate(patches)).to(self.device)
        return patches.float() / 127.5 - 1, torch.tensor(grids, device=self.device)

    @torch.no_grad()
    def encode(self, numbered, at_once=16_384):
        """What the frozen tower makes of images, per image (1 + deepstack levels, tokens, width). Each array once.

        numbered  (number in the dialogue, image) each;  at_once: tokens, 64 images of 512 x 512
        Kept on a GPU until a step is over, so there in bf16, as the language model would take it anyhow.
        """
        distinct = {(number, id(image)): (number, image) for number, image in numbered}
        tokens = np.cumsum([math.prod(self.grid(image)) for _, image in distinct.values()])
        found = {}
        for _, chunk in groupby(zip((tokens - 1) // at_once, distinct.items()), key=itemgetter(0)):
            keys, part = zip(*(item for _, item in chunk))
            patches, grids = self.pixels(part)
            out = self.vision(patches.to(self.vision.dtype), grid_thw=grids)
            levels = torch.stack(
                [out.pooler_output, *out.deepstack_features]
            )  # (1 + levels, tokens, width)
            levels = levels.to(torch.bfloat16 if self.device.type == "cuda" else levels.dtype)
            sizes = (grids.prod(1) // self.images["merge_size"] ** 2).tolist()
            found |= dict(zip(keys, levels.split(sizes, 1)))
        return [found[number, id(image)] for number, image in numbered]

    def hidden(self, ids, positions, mask, features=None, cache=None):
        """One pass over ids (B, L) with M-RoPE positions (3, B, L) -> (B, L, width), which `logits` reads.

        mask      (B, L) 1 = token, 0 = padding; (B, 1, L, keys) bool, True = may look; or that of `shared_attention`
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

    def logits(self, hidden):
        """The language head: hidden states (..., width) -> logits (..., vocabulary), float32."""
        logits = self.model.lm_head(hidden).float()
        return logits.masked_fill(self.banned, -1e9)  # exp gives exactly 0


def stamp(image, number):
    """Mark an image (H, W, 3) with its number: that many black squares along the upper edge, as on a contact sheet.

    A departure of the tiny model ("stamped" in preprocessor_config.json): to bind the words "Image-3" to the picture
    behind them takes a two-step look-up that a small transformer does not learn in minutes (measured: facts of one
    image among four stayed at .3 for 60 CPU-s without, and reached .55 within 30 with it). Published checkpoints know
    how to, and see their images as they are. The simulator never sees the mark.
    """
    image, side = image.copy(), max(1, image.shape[0] // 16)
    for k in range(number):
        image[:side, 3 * side * k // 2 : 3 * side * k // 2 + side] = 0
    return image


# ---- sampling dialogues ---------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(
    policy,
    questions,
    simulator=None,
    mode="agentic",
    group_size=1,
    temperature=1.0,
    seed=0,
    max_rounds=3,
    max_turns=10,
    max_new_tokens=64,
    rows=64,
):
    """Let the policy hold `group_size` dialogues per question; returns Trajectories, question-major.

    questions        rows of out/data/questions_*.jsonl; "images" are paths or arrays
    simulator        anything with imagine(list of Query) -> list of views; None: calls are told that there is none
    temperature      1 samples from the policy itself, 0 is greedy
    max_rounds       views per dialogue; max_turns, max_new_tokens (per turn): more ends the dialogue as truncated
    rows             dialogues written together: memory and speed only. Each draws from its own stream, given by
                     (seed, question id, number in the group), so what it samples does not depend on the others.
    """
    was_training = policy.model.training
    policy.model.eval()  # checkpointing in training mode would drop the cache silently
    finished, step = [], max(1, rows // group_size)
    for start in range(0, len(questions), step):
        prompts = [
            Trajectory.start(
                policy, question, [load_image(i) for i in question["images"]], mode, max_rounds
            )
            for question in questions[start : start + step]
        ]
        encode_images(policy, prompts)
        dialogues = [prompt.fork() for prompt in prompts for _ in range(group_size)]
        streams = [
            (seed, dialogue.question.get("id", dialogue.question["question"]), d % group_size)
            for d, dialogue in enumerate(dialogues)
        ]
        uniforms = torch.stack(
            [
                torch.rand(
                    max_turns,
                    max_new_tokens,
                    dtype=torch.float64,
                    generator=torch_stream("rollout", *stream),
                )
                for stream in streams
            ]
        )
        go_on(policy, dialogues, uniforms, temperature, simulator, streams, group_size)
        finished += dialogues
    policy.model.train(was_training)
    return finished


@torch.no_grad()
def go_on(policy, dialogues, uniforms, temperature=0.0, simulator=None, streams=None, group_size=1):
    """Let the policy write turns, and answer its calls, until every dialogue is done.

    dialogues   Trajectories with features, those of a group neighbours and equal so far
    uniforms    (dialogues, turns, tokens per turn) float64 in [0, 1): what sampling draws
    streams     what the simulator's noise depends on, besides the turn
    """
    writer, turns, limit = Writer(policy, dialogues, group_size), *uniforms.shape[1:]
    for turn in range(turns):
        members = [d for d, dialogue in enumerate(dialogues) if not dialogue.done]
        if not members:
            break
        for d, (ids, logprobs) in zip(
            members, writer.write(members, uniforms[:, turn], temperature, limit)
        ):
            dialogues[d].say(policy, ids, logprobs)
            dialogues[d].truncated |= turn + 1 == turns and dialogues[d].answer is None
        reply(
            policy,
            simulator,
            [
                (dialogues[d], stream_seed("imagine", *(streams[d] if streams else ()), turn))
                for d in members
                if not dialogues[d].done
            ],
        )


def reply(policy, simulator, waiting):
    """Give every waiting dialogue its observation; all views of a turn are imagined in one batch.

    waiting   (Trajectory, seed of the simulator) pairs
    """
    calling = [(dialogue, seed) for dialogue, seed in waiting if dialogue.call and simulator]
    views = iter(imagine_each(simulator, [dialogue.query(seed) for dialogue, seed in calling]))
    for dialogue, _ in waiting:
        view = next(views) if dialogue.call and simulator else None
        if dialogue.call and view is None:
            dialogue.reply = NO_VIEW if simulator else NO_SIMULATOR
        dialogue.observe(policy, image=view)
    encode_images(policy, [dialogue for dialogue, _ in waiting])


def encode_images(policy, trajectories):
    """Fill in the `features` that are missing: the tower is frozen, so what it made of an image stays true."""
    missing = [
        pair for t in trajectories for pair in list(enumerate(t.images, 1))[len(t.features) :]
    ]
    encoded = iter(policy.encode(missing))
    for t in trajectories:
        t.features += [next(encoded) for _ in t.images[len(t.features) :]]


# ---- log-probabilities for training ---------------------------------------------------------------------------------

HEAD_TOKENS = 512  # at the language head at a time: 0.3 GB of logits with the published vocabulary


class DialogueBatch(NamedTuple):
    """B dialogues of up to L tokens in R rows of C cells, right-padded; `collate` makes it. All on the policy's device."""

    # of the rows (lib.rollout.Layout)
    ids: torch.Tensor  # (R, C)
    positions: torch.Tensor  # (3, R, C), M-RoPE's
    mask: torch.Tensor  # (R, C) 1 = token, or that of `shared_attention` if dialogues share rows
    features: (
        torch.Tensor | None
    )  # (1 + levels, tokens, width): the tower's of all images, in row order
    # of the dialogues, (B, L - 1) each, about the second token to the last
    targets: torch.Tensor  # the token itself
    predecessors: torch.Tensor  # where in ids.flatten() the token before it stands
    loss_mask: torch.Tensor  # 1.0 on what the policy wrote
    loss_weights: torch.Tensor  # what a supervised loss counts it
    logprobs: torch.Tensor  # the rollout's


def collate(policy, trajectories, share=False) -> DialogueBatch:
    """Trajectories -> one batch for `token_logprobs`.

    share   dialogues with the same prompt share a row: the prompt with its images is computed once, as in `rollout`.
            Each sees the prompt and itself, at its own positions, so the numbers are the same
    """
    encode_images(policy, trajectories)
    layout = layout_of(trajectories, share)
    ids = torch.full((len(layout.rows), layout.width), policy.tokenizer.pad_token_id)
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    predecessors = [[] for _ in trajectories]
    features = []
    for row, numbers in enumerate(layout.rows):
        for branch, number in enumerate(numbers):
            t = trajectories[number]
            columns = layout.columns(row, branch, len(t.ids) - 1)
            ids[row, columns] = torch.tensor(t.ids[:-1])
            positions[:, row, columns] = torch.tensor(t.positions[:-1]).T
            predecessors[number] = [row * layout.width + column for column in columns]
            features += t.features if branch == 0 else t.features[t.provenance.count(None) :]
    batch = DialogueBatch(
        ids=ids,
        positions=positions,
        mask=layout.mask(),
        features=None,
        targets=padded([t.ids[1:] for t in trajectories]),
        predecessors=padded(predecessors),
        loss_mask=padded([t.loss_mask[1:] for t in trajectories]).float(),
        loss_weights=padded([t.loss_weights[1:] for t in trajectories]),
        logprobs=padded([t.logprobs[1:] for t in trajectories]),
    )
    batch = DialogueBatch(*(x if x is None else x.to(policy.device) for x in batch))
    return batch._replace(features=torch.cat(features, 1) if features else None)


def shared_attention(module, query, key, value, mask, scaling=None, **options):
    """What transformers' attention layers call: SDPA, or SDPA for rows in which dialogues share a prompt.

    query (R, heads, C, head dim), key and value (R, kv heads, C, head dim). Of a row that is shared, the first `prompt`
    cells are the prompt, and `branches` stretches of `rest` cells follow, C = prompt + branches * rest
    mask   (R, branches, rest, prompt + rest) bool: what each branch sees of the prompt and of itself. The prompt sees
           itself causally. A mask as long as the query, or none, is the ordinary case
    The arithmetic is that of separate rows: no cell is compared with another branch's.
    """
    attend = partial(
        sdpa_attention_forward, module, scaling=scaling, **options
    )  # -> (R, cells, heads, width), None
    if mask is None or mask.shape[2] == query.shape[2]:
        return attend(query, key, value, mask)
    rows, branches, rest, seen = mask.shape
    prompt = seen - rest
    first, _ = attend(*(x[:, :, :prompt] for x in (query, key, value)), None)  # None: causal

    def of_branch(x):  # -> (R, branches, heads, rest, head dim)
        return x[:, :, prompt:].unflatten(2, (branches, rest)).transpose(1, 2)

    def with_prompt(x):  # -> (R * branches, kv heads, prompt + rest, head dim)
        again = x[:, None, :, :prompt].expand(-1, branches, -1, -1, -1)
        return torch.cat([again, of_branch(x)], 3).flatten(0, 1)

    then, _ = attend(
        of_branch(query).flatten(0, 1),
        with_prompt(key),
        with_prompt(value),
        mask.flatten(0, 1)[:, None],
    )
    return torch.cat([first, then.unflatten(0, (rows, branches)).flatten(1, 2)], 1), None


AttentionInterface.register("shared_attention", shared_attention)
AttentionMaskInterface.register("shared_attention", sdpa_mask)  # of ordinary masks (B, L)


def padded(lists):
    """Lists of unequal length -> one tensor (lists, longest), 0 behind the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in lists], True)


def token_logprobs(policy, batch, temperature=1.0):
    """Log-probability and entropy of what the policy wrote, under the distribution `rollout` samples from.

    returns   (B, L - 1) each: column t is about token t + 1; 0 where that token is not the policy's. The first is
              differentiable.
    The language head runs on the policy's tokens alone, HEAD_TOKENS at a time, and once more in backward: of a whole
    batch the logits, 151,936 per token, would be larger than the model.
    """
    wrote = batch.loss_mask > 0  # (B, L - 1)
    hidden = policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
    hidden = hidden.flatten(0, 1)[batch.predecessors[wrote]]  # (n, width)
    parts = [
        checkpoint(chosen_logprobs, policy, *part, temperature, use_reentrant=False)
        for part in zip(hidden.split(HEAD_TOKENS), batch.targets[wrote].split(HEAD_TOKENS))
    ]
    return tuple(
        torch.zeros(wrote.shape, device=wrote.device).masked_scatter(wrote, torch.cat(part))
        for part in zip(*parts)
    )


def chosen_logprobs(policy, hidden, tokens, temperature):
    """Hidden states (n, width) before tokens (n,) -> their log-probabilities and, without gradient, entropies."""
    logprobs = torch.log_softmax(policy.logits(hidden) / temperature, -1)  # (n, vocabulary)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropy


# ---- command line ---------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--images",
        nargs="+",
        required=True,
        help="the given views, in order: Image-1, Image-2, ...",
    )
    p.add_argument("--ask", required=True, help="the question")
    p.add_argument(
        "--options",
        nargs="*",
        default=[],
        help="answers to choose from; they are lettered A, B, C, ...",
    )
    p.add_argument(
        "--model",
        help="policy folder or hub id (default: the last stage trained, in out/ or out/demo/)",
    )
    p.add_argument("--wm", help="world model folder or hub id (default: out/wm or out/demo/wm)")
    p.add_argument(
        "--mode",
        choices=list(NOTE),
        default="agentic",
        help="direct: no tool; forced: must imagine first",
    )
    p.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    p.add_argument(
        "--max-new-tokens", type=int, help="per turn (default: 4096, of a tiny policy 256)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", default="out/ask", help="imagined views and the dialogue are saved here"
    )
    return at_least(p, p.parse_args(argv), [("max_new_tokens", 1), ("temperature", 0)])


def main(argv=None):
    """Ask one question and show the dialogue."""
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = [
        text if re.match(r"[A-Z]\. ", text) else f"{chr(65 + i)}. {text}"
        for i, text in enumerate(args.options)
    ]
    question = {
        "question": args.ask,
        "options": options,
        "images": [load_image(path) for path in args.images],
    }
    model = (
        args.model
        or newest(("phase2", "phase1", "sft"))
        or fail(
            "There is no policy in out/ yet. Train one with: python train_sft.py   (or name one with --model)"
        )
    )
    simulator = None if args.mode == "direct" else load_simulator("tuned", device, args.wm)
    try:
        policy = Policy.load(model, device)
        (trajectory,) = rollout(
            policy,
            [question],
            simulator,
            args.mode,
            temperature=args.temperature,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens or policy.turn_limit,
        )
    except (OSError, ValueError) as error:
        fail(str(error))
    for kind, content in trajectory.lines():
        print(content if kind == "text" else " ".join(f"[Image-{number}]" for number in content))
    if (Path(args.out) / "dialogue.json").exists():  # of another dialogue, with its pictures
        for picture in Path(args.out).glob("image_*.png"):
            picture.unlink()
    trajectory.save(args.out)
    trajectory.draw(Path(args.out) / "dialogue.png")
    print(
        f"{'No answer.' if trajectory.answer is None else f'Answer: {trajectory.answer}.'} "
        f"Imagined views: {trajectory.valid_calls}. Pictures: {args.out}"
    )


if __name__ == "__main__":
    run(main)
