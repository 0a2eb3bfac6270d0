"""
Speed of the policy's rollouts and of a GRPO step, as ratios in one run: `python -m bench rollout`, `python -m bench grpo`.

Both ways do the same work: a policy with random weights is made to say what a trained one would, by drawing from the
uniform numbers that lead to these words (`uniforms_that_say`). Times are CPU seconds of this process.
"""

import contextlib
import io
import statistics
import tempfile
from argparse import Namespace
from unittest import mock

import numpy as np
import torch

import policy as policy_file
import train_rl
from bench import naive
from bench.timing import Seconds, medians, print_json
from data import MOTIONS
from lib.dialogue import Trajectory
from lib.distributed import World, fail, keep_freed_memory
from lib.geometry import Motion
from lib.protocol import call_of, call_text
from lib.rollout import Writer
from lib.rooms import TrueRenderer, random_room, render, ring
from lib.scores import text_table
from policy import Policy, collate

# ---- a policy that says what it is told ------------------------------------------------------------------------------


def call_turn(image: int, motion) -> str:
    """A turn that calls the simulator, in the words that the cold start teaches."""
    return f"<think>I need to see it.</think>{call_text(call_of(image, motion))}"


def answer_turn(letter: str) -> str:
    """A turn that answers."""
    return f"<think>largest in the new view: red</think><answer> {letter}</answer>"


def dialogue_of(policy: Policy, question: dict, turns: list[str], view=None) -> Trajectory:
    """A dialogue of these turns; after each call the given view, or what the room shows."""
    dialogue = Trajectory.start(policy, question, question["images"], "agentic")
    for turn in turns:
        dialogue.say(policy, turn)
        if dialogue.call:
            seen = TrueRenderer().imagine([dialogue.query(seed=0)])[0] if view is None else view
            dialogue.observe(policy, image=seen)
    return dialogue


def scripted_dialogue(policy: Policy, question: dict, seed: int) -> Trajectory:
    """A call, a call on the new view, an answer."""
    rng = np.random.default_rng(seed)
    turns = []
    for image in (int(rng.integers(1, 5)), 5):
        turns.append(call_turn(image, MOTIONS[rng.integers(len(MOTIONS))]))
    return dialogue_of(policy, question, [*turns, answer_turn("A")])


@torch.no_grad()
def uniforms_that_say(policy: Policy, dialogues: list[Trajectory]) -> torch.Tensor:
    """The numbers in [0, 1) from which `lib.streams.sample_tokens` draws these dialogues:
    (dialogues, turns, tokens), float64.

    Of each token the middle of its stretch of the cumulative distribution: a policy with random weights then says what
    a trained one would, and each way to write has to find the same distributions to say the same.
    """
    batch = collate(policy, dialogues)
    hidden = policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
    probabilities = torch.softmax(policy.logits(hidden).double(), -1)
    targets = batch.targets[..., None]
    upper = probabilities.cumsum(-1).gather(-1, targets)
    middles = (upper - probabilities.gather(-1, targets) / 2)[..., 0]  # (dialogues, L - 1)
    uniforms = torch.zeros(len(dialogues), 3, 64, dtype=torch.float64)
    for d, dialogue in enumerate(dialogues):
        wrote = np.flatnonzero(dialogue.loss_mask)
        ends = np.flatnonzero(np.diff(wrote) > 1) + 1
        for turn, tokens in enumerate(np.split(wrote, ends)):
            uniforms[d, turn, : len(tokens)] = middles[d, tokens - 1]
    return uniforms


def saying(way: type, uniforms: torch.Tensor) -> type:
    """A writer like `way` that draws from `uniforms` (dialogues, turns, tokens)."""

    class Scripted(way):
        turn = -1

        def write(self, members, _, temperature, limit):
            self.turn += 1
            return super().write(members, uniforms[:, self.turn], temperature, limit)

    return Scripted


def timed_rollout(policy, questions, group, way, uniforms, seconds: Seconds, **options):
    """policy.rollout with a writer of class `way` that draws from `uniforms` -> its dialogues; `seconds` by part."""

    class Watched(saying(way, uniforms)):
        @seconds("prefill")
        def feed(self, n):  # the straightforward writer has none
            super().feed(n)

        @seconds("decode" if way is Writer else "generate")
        def write(self, *arguments):
            return super().write(*arguments)

    class Simulator(TrueRenderer):
        @seconds("simulator")
        def imagine(self, queries):
            return super().imagine(queries)

    def no_features(*_):
        """`generate` encodes the images itself."""

    encode = seconds("prefill")(policy_file.encode_images) if way is Writer else no_features
    with mock.patch.multiple(policy_file, Writer=Watched, encode_images=encode), seconds("rest"):
        return policy_file.rollout(policy, questions, Simulator(), group_size=group, **options)


# ---- python -m bench rollout -----------------------------------------------------------------------------------------


def room_questions(rooms: int) -> list[dict]:
    """One question in each of some rooms, as the demo asks them: four views of 32 x 32 pixels, four options."""
    questions = []
    for seed in range(rooms):
        poses = np.stack(ring(np.random.default_rng(seed)))
        question = {
            "id": f"room_{seed}",
            "question": "Start from Image-2 and turn left 45 degrees. Then which object looks largest?",
            "options": ["A. red", "B. green", "C. blue", "D. white"],
            "images": list(render(random_room(seed), poses, size=32)["rgb"]),
            "scene": {"room": seed, "poses": poses.tolist()},
        }
        questions.append(question)
    return questions


def rollout_bench(args: Namespace) -> None:
    """The policy's rollouts: tokens per second of CPU against `generate` from scratch every turn, same tokens."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rooms, group, repeats = (2, 2, 1) if args.quick else (8, 8, args.repeats)
    policy, questions = Policy.tiny(), room_questions(rooms)
    script = []
    for q, question in enumerate(questions):
        for member in range(group):
            script.append(scripted_dialogue(policy, question, seed=len(questions) * member + q))
    uniforms = uniforms_that_say(policy, script)
    written = sum(sum(t.loss_mask) for t in script)
    print(
        f"{len(script)} dialogues of three turns ({rooms} questions x {group}), {args.threads} CPU thread(s), fp32: "
        f"{len(script[0].ids)} tokens each, {written // len(script)} of them written, prompts of "
        f"{script[0].prompt_length} with 4 images",
        flush=True,
    )
    runs, same = {"fast": [], "naive": []}, True
    for _ in range(1 + repeats):
        for name, way in (("fast", Writer), ("naive", naive.Writer)):
            seconds = Seconds()
            dialogues = timed_rollout(policy, questions, group, way, uniforms, seconds)
            same &= [t.ids for t in dialogues] == [t.ids for t in script]
            runs[name].append(seconds)
    spent = {name: medians(own[1:]) for name, own in runs.items()}  # the first warms up
    whole = {name: sum(parts.values()) for name, parts in spent.items()}
    policy_only = {name: whole[name] - parts["simulator"] for name, parts in spent.items()}
    results = {"bench": "rollout", "threads": args.threads, "quick": args.quick}
    results["same_tokens"] = same
    results["speedup"] = policy_only["naive"] / policy_only["fast"]
    results["speedup_with_simulator"] = whole["naive"] / whole["fast"]
    for name, parts in spent.items():
        rate = written / policy_only[name]
        results[f"tokens_per_second_{name}"] = rate
        rows = [[part, seconds, f"{seconds / whole[name]:.1%}"] for part, seconds in parts.items()]
        print("\n" + text_table([f"{name}, CPU seconds", f"{whole[name]:.3f}", ""], rows))
        print(f"{rate:.0f} tokens/s without the simulator")
    for part, seconds in spent["fast"].items():
        results[f"{part}_share"] = seconds / whole["fast"]
    print_json(results)


# ---- python -m bench grpo --against trl ------------------------------------------------------------------------------

CALLS = [call_turn(2, Motion("dangle", -45)), call_turn(3, Motion("dy", 0.5))]
SCRIPTS = [[*CALLS, answer_turn(letter)] for letter in "AB"]
PARTS = ("sample", "update")  # of a step, as the table shows them
IMAGES = {"text": 0, "image": 2, "tool": 2}  # of a question, by what is compared


class Still:
    """A simulator that costs nothing: always the same view."""

    def __init__(self, view):
        self.view = view

    def imagine(self, queries):
        return [self.view] * len(queries)


def grpo(args: Namespace) -> None:
    """One GRPO step against TRL's: a table of CPU seconds per mode, then the JSON line."""
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        from bench import trl_step
    except ImportError as error:
        fail(
            f"--against trl needs TRL, which is no requirement of this repository ({error}): pip install trl==1.16.0"
        )
    questions, group = (2, 2) if args.quick else (8, 8)
    print(
        f"{questions} questions x {group} rollouts, one micro-batch, frozen tower, one thread, fp32; CPU seconds",
        flush=True,
    )
    results = {"bench": "grpo", "against": "trl", "quick": args.quick}
    rows = []
    for name in IMAGES:
        pair = grpo_against_trl(trl_step, name, questions, group, args)
        sides, totals = {}, {}
        for side in ("ours", "trl"):
            runs = pair[side]
            sides[side] = medians([{part: run[part] for part in PARTS} for run in runs])
            totals[side] = statistics.median(sum(run.values()) for run in runs)
            for part, seconds in sides[side].items():
                results[f"{part}_{side}_{name}"] = seconds
        ratio = totals["trl"] / totals["ours"]
        results[f"ratio_{name}"] = ratio
        results[f"same_{'tokens' if name == 'tool' else 'prompts'}_{name}"] = pair["same"]
        columns = []
        for side in ("ours", "trl"):
            columns += [totals[side], *sides[side].values()]
        rows.append([name, round(pair["tokens"]), round(pair["written"]), *columns, ratio])
    head = "tokens written ours sample update TRL sample update ratio".split()
    print(text_table(["", *head], rows))
    results["grad_norm_tool"] = pair["norm"]
    results["grad_norm_trl_tool"] = pair["norm_trl"]
    print_json(results)


def picture_question(number: int, images: list) -> dict:
    """A question whose words fit any picture."""
    return {
        "id": f"q{number}",
        "question": f"Start from Image-1 and turn left {5 * number + 5} degrees. Then which object looks largest?",
        "options": ["A. red", "B. green", "C. blue", "D. white"],
        "answer": "A",
        "images": images,
    }


def grpo_against_trl(trl_step, name: str, count: int, group: int, args: Namespace) -> dict:
    """A B A B ...: a step of TRL, then one of ours, the first pair dropped -> what the table needs of one mode."""
    tool = name == "tool"
    mode = "agentic" if tool else "direct"
    length = 8 if args.quick else 32
    sizes = {"width": 256, "heads": 8, "kv_heads": 4, "mlp": 864}
    policy = Policy.tiny(**sizes, vision_width=64, vision_depth=4, side=64)
    policy.image_config["stamped"] = False
    policy.vision.requires_grad_(False)
    rng = np.random.default_rng(0)
    view, *pictures = rng.integers(0, 256, (1 + 2 * count, 64, 64, 3), dtype=np.uint8)
    questions = []
    for q in range(count):
        questions.append(picture_question(q, pictures[2 * q : 2 * q + IMAGES[name]]))
    writer, scripts = Writer, None
    if tool:  # every other rollout of a group answers B, the rest A
        dialogues = []
        for question in questions:
            for turns in SCRIPTS * (group // 2):
                dialogues.append(dialogue_of(policy, question, turns, view))
        writer = saying(Writer, uniforms_that_say(policy, dialogues))
        scripts = [[policy.encode_text(turn + "<|im_end|>") for turn in turns] for turns in SCRIPTS]
    else:
        policy.banned[policy.tokenizer.eos_token_id] = True  # all write the same number of tokens
    limit = 64 if tool else length
    ours = OurStep(policy, questions, Still(view), mode, group, limit, writer)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        theirs, norms_trl, rollouts_trl = trl_step.steps(
            policy,
            questions,
            mode,
            group,
            256 if tool else length,
            view,
            scripts,
            1 + (1 if args.quick else args.repeats),
            Seconds,
            ours.step,
            folder,
        )
    same = True
    for ids, dialogue in zip(rollouts_trl, ours.dialogues, strict=True):
        end = len(dialogue.ids) if tool else dialogue.prompt_length  # all of it, or the prompt
        same &= ids[:end] == dialogue.ids[:end]
    return {
        "ours": ours.runs[1:],
        "trl": theirs[1:],
        "same": same,
        "norm": ours.norms[-1],
        "norm_trl": norms_trl[-1],
        "tokens": np.mean([len(t.ids) for t in ours.dialogues]),
        "written": np.mean([sum(t.loss_mask) for t in ours.dialogues]),
    }


class OurStep:
    """A step of train_rl.py, with what each run took. Of zero length: the words put into its mouth stay its own."""

    def __init__(self, policy, questions, simulator, mode, group, limit, writer):
        self.policy, self.questions, self.simulator = policy, questions, simulator
        self.mode, self.group, self.writer = mode, group, writer
        flags = {"questions": len(questions), "group": group, "minibatches": 1, "lr": 0}
        flags |= {"micro-batch-cells": 10**9, "max-new-tokens": limit}
        self.args = train_rl.parse_args([f"--{key}={value}" for key, value in flags.items()])
        weights = [p for p in policy.model.parameters() if p.requires_grad]
        options = {"lr": 0.0, "betas": train_rl.BETAS, "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(weights, **options)
        self.runs, self.norms, self.dialogues = [], [], []

    def step(self) -> None:
        """Sample, score, update; rollouts earn 0 and 1 in turns."""
        seconds = Seconds()
        with mock.patch.object(policy_file, "Writer", self.writer), seconds("sample"):
            rollouts = train_rl.sample_groups(
                self.policy,
                self.questions,
                self.simulator,
                self.mode,
                self.args,
                step=0,
                size=self.group,
                temperature=train_rl.TEMPERATURE,
            )
        self.dialogues = sum(rollouts, [])
        with seconds("score"):
            groups = train_rl.reward_rollouts(rollouts, [], self.args)
            for group in groups:
                for number, episode in enumerate(group):
                    episode.reward = float(number % 2)
            train_rl.set_advantages(groups, divide_by_std=True)
            alone = World(0, 1, torch.device("cpu"))
            minibatches = train_rl.split_minibatches(groups, len(self.questions), 1, alone)
        with seconds("update"):
            metrics = train_rl.update(self.policy, self.optimizer, minibatches, 10**9)
        self.norms.append(metrics["grad_norm"])
        self.runs.append(seconds)
