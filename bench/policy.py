"""
Speed of the policy's rollouts and of a GRPO step, as ratios in one run: `python -m bench rollout`, `python -m bench grpo`.

Both ways do the same work: a policy with random weights is made to say what a trained one would, by drawing from the
uniform numbers that lead to these words (`uniforms_that_say`). Times are CPU seconds of this process.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from unittest import mock

import numpy as np
import torch

import policy as policy_file
import train_rl
from bench import naive
from data import MOTIONS
from lib.common import World, fail, keep_freed_memory
from lib.rollout import Writer
from lib.rooms import TrueRenderer, random_room, render, ring
from policy import Policy, Trajectory, collate

# ---------------------------------------------------------------- bench.py rollout


def rollout(args):
    """The policy's rollouts: tokens per second of CPU against `generate` from scratch every turn, same tokens."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    rooms, group, repeats = (2, 2, 1) if args.quick else (8, 8, args.repeats)
    policy, questions = Policy.tiny(), room_questions(rooms)
    script = [
        scripted_dialogue(policy, question, seed=len(questions) * g + q)
        for q, question in enumerate(questions)
        for g in range(group)
    ]
    uniforms, written = uniforms_that_say(policy, script), sum(sum(t.loss_mask) for t in script)
    print(
        f"{len(script)} dialogues of three turns ({rooms} questions x {group}), {args.threads} CPU thread(s), fp32: "
        f"{len(script[0].ids)} tokens each, {written // len(script)} of them written, prompts of "
        f"{script[0].loss_mask.index(1)} with 4 images",
        flush=True,
    )
    rows, same = {"fast": [], "naive": []}, True
    for repeat in range(repeats + 1):
        for name, way in (("fast", Writer), ("naive", naive.Writer)):
            seconds, dialogues = timed_rollout(policy, questions, group, way, uniforms, Seconds())
            same &= [t.ids for t in dialogues] == [t.ids for t in script]
            rows[name] += [seconds] if repeat else []  # the first warms up
    spent = {
        name: {part: statistics.median(row[part] for row in table) for part in table[0]}
        for name, table in rows.items()
    }
    whole = {name: sum(parts.values()) for name, parts in spent.items()}
    policy_only = {name: whole[name] - parts["simulator"] for name, parts in spent.items()}
    for name, parts in spent.items():
        print(
            f"\n{name + ', CPU seconds':24}{whole[name]:9.3f}   {written / policy_only[name]:.0f} tokens/s without "
            f"the simulator"
        )
        for part, seconds in parts.items():
            print(f"  {part:22}{seconds:9.3f}{seconds / whole[name]:9.1%}")
    print(
        json.dumps(
            {
                "bench": "rollout",
                "threads": args.threads,
                "quick": args.quick,
                "same_tokens": same,
                "speedup": round(policy_only["naive"] / policy_only["fast"], 3),
                "speedup_with_simulator": round(whole["naive"] / whole["fast"], 3),
                **{
                    f"tokens_per_second_{name}": round(written / seconds, 1)
                    for name, seconds in policy_only.items()
                },
                **{
                    f"{part}_share": round(seconds / whole["fast"], 3)
                    for part, seconds in spent["fast"].items()
                },
            }
        )
    )


def room_questions(rooms):
    """One question in each of some rooms, as the demo asks them: four views of 32 x 32 pixels, four options."""
    questions = []
    for seed in range(rooms):
        poses = np.stack(ring(np.random.default_rng(seed)))
        questions.append(
            {
                "id": f"room_{seed}",
                "question": "Start from Image-2 and turn left 45 degrees. Then which "
                "object looks largest?",
                "options": ["A. red", "B. green", "C. blue", "D. white"],
                "images": list(render(random_room(seed), poses, size=32)["rgb"]),
                "scene": {"room": seed, "poses": poses.tolist()},
            }
        )
    return questions


def scripted_dialogue(policy, question, seed):
    """A dialogue in the words that the cold start teaches: a call, a call on the new view, an answer."""
    dialogue, rng = (
        Trajectory.start(policy, question, question["images"], "agentic"),
        np.random.default_rng(seed),
    )
    for image in (int(rng.integers(1, 5)), 5):
        motion = MOTIONS[rng.integers(len(MOTIONS))]
        dialogue.say(
            policy,
            '<think>I need to see it.</think><tool_call>{"name": "imagine", "arguments": {"image":'
            f' {image}, "motion": "{motion.kind}", "amount": {motion.amount:g}}}}}</tool_call>',
        )
        dialogue.observe(policy, image=TrueRenderer().imagine([dialogue.query(seed=0)])[0])
    dialogue.say(policy, "<think>largest in the new view: red</think><answer> A</answer>")
    return dialogue


@torch.no_grad()
def uniforms_that_say(policy, dialogues):
    """The numbers in [0, 1) from which `lib.rollout.sample` draws these dialogues: (dialogues, turns, tokens), float64.

    Of each token the middle of its stretch of the cumulative distribution: a policy with random weights then says what
    a trained one would, and each way to write has to find the same distributions to say the same.
    """
    batch = collate(policy, dialogues)
    logits = policy.logits(policy.hidden(batch.ids, batch.positions, batch.mask, batch.features))
    share, chosen = torch.softmax(logits.double(), -1), batch.targets[..., None]
    aim = (share.cumsum(-1).gather(-1, chosen) - share.gather(-1, chosen) / 2)[
        ..., 0
    ]  # (dialogues, L - 1)
    uniforms = torch.zeros(len(dialogues), 3, 64, dtype=torch.float64)
    for d, dialogue in enumerate(dialogues):
        wrote = np.flatnonzero(dialogue.loss_mask)
        for turn, places in enumerate(np.split(wrote, np.flatnonzero(np.diff(wrote) > 1) + 1)):
            uniforms[d, turn, : len(places)] = aim[d, places - 1]
    return uniforms


def saying(way, uniforms):
    """A writer like `way` that draws from `uniforms` (dialogues, turns, tokens)."""

    class Scripted(way):
        turn = -1

        def write(self, members, _, temperature, limit):
            self.turn += 1
            return super().write(members, uniforms[:, self.turn], temperature, limit)

    return Scripted


def timed_rollout(policy, questions, group, way, uniforms, seconds, **options):
    """policy.rollout with a writer of class `way` that draws from `uniforms` -> (`seconds`, by part, dialogues)."""

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

    # `generate` encodes the images itself
    encode = seconds("prefill")(policy_file.encode_images) if way is Writer else lambda *_: None
    with mock.patch.multiple(policy_file, Writer=Watched, encode_images=encode), seconds("rest"):
        dialogues = policy_file.rollout(policy, questions, Simulator(), group_size=group, **options)
    return seconds, dialogues


class Seconds(dict):
    """Seconds by part: `with seconds("update"):` or `@seconds("update")`. Of nested parts the inner one pays.

    now   the clock: this process's CPU time, unless another is given
    """

    def __init__(self, now=time.process_time):
        super().__init__()
        self.now = now

    @contextlib.contextmanager
    def __call__(self, part):
        start, before = self.now(), sum(self.values())
        yield
        self[part] = self.get(part, 0.0) + self.now() - start - (sum(self.values()) - before)


# ---------------------------------------------------------------- bench.py grpo

THOUGHT = "<think>I need to see it.</think>"
CALLS = [
    THOUGHT
    + '<tool_call>{"name": "imagine", "arguments": {"image": 2, "motion": "turn left", "amount": 45}}'
    "</tool_call>",
    THOUGHT + '<tool_call>{"name": "imagine", "arguments": {"image": 3, "motion": "move forward", '
    '"amount": 0.5}}</tool_call>',
]
SCRIPTS = [
    [*CALLS, f"<think>largest in the new view: red</think><answer> {letter}</answer>"]
    for letter in "AB"
]
GRPO_MODES = {
    "text": dict(images=0, mode="direct"),
    "image": dict(images=2, mode="direct"),
    "tool": dict(images=2, mode="agentic"),
}


class Still:
    """A simulator that costs nothing: always the same view."""

    def __init__(self, view):
        self.view = view

    def imagine(self, queries):
        return [self.view] * len(queries)


def two_calls(policy, question, turns, view):
    """A dialogue of these turns, the same view shown after each call."""
    dialogue = Trajectory.start(policy, question, question["images"], "agentic")
    for turn in turns:
        dialogue.say(policy, turn)
        if dialogue.call:
            dialogue.observe(policy, image=view)
    return dialogue


def grpo(args):
    """One GRPO step against TRL's: a table of CPU seconds per mode, then the JSON line."""
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        from tests import trl_step
    except ImportError as error:
        fail(
            f"--against trl needs TRL, which is no requirement of this repository ({error}): pip install trl==1.16.0"
        )
    questions, group = (2, 2) if args.quick else (8, 8)
    results = {"bench": "grpo", "against": "trl", "quick": args.quick}
    print(
        f"{questions} questions x {group} rollouts, one micro-batch, frozen tower, one thread, fp32; CPU seconds\n"
        f"{'':8}{'tokens':>8}{'written':>9}{'ours':>9}{'sample':>9}{'update':>9}{'TRL':>9}{'sample':>9}{'update':>9}"
        f"{'ratio':>8}",
        flush=True,
    )
    for name in GRPO_MODES:
        found = grpo_against_trl(trl_step, name, questions, group, args)
        ours, theirs = (
            {part: statistics.median(row[part] for row in rows) for part in ("sample", "update")}
            for rows in (found["ours"], found["theirs"])
        )
        totals = [
            statistics.median(sum(row.values()) for row in rows)
            for rows in (found["ours"], found["theirs"])
        ]
        print(
            f"{name:8}{found['tokens']:8.0f}{found['written']:9.0f}{totals[0]:9.3f}{ours['sample']:9.3f}"
            f"{ours['update']:9.3f}{totals[1]:9.3f}{theirs['sample']:9.3f}{theirs['update']:9.3f}"
            f"{totals[1] / totals[0]:8.2f}",
            flush=True,
        )
        results |= {
            f"ratio_{name}": round(totals[1] / totals[0], 3),
            **{
                f"{part}_{side}_{name}": round(row[part], 3)
                for side, row in (("ours", ours), ("trl", theirs))
                for part in row
            },
            f"same_{'tokens' if name == 'tool' else 'prompts'}_{name}": found["same"],
        }
    results |= {"grad_norm_tool": found["norm"], "grad_norm_trl_tool": found["norm_trl"]}
    print(json.dumps(results))


def grpo_against_trl(trl_step, name, questions, group, args):
    """A B A B ...: a step of TRL, then one of ours, the first pair dropped -> what the table needs of one mode."""
    mode, tool = GRPO_MODES[name]["mode"], name == "tool"
    policy = Policy.tiny(
        width=256, heads=8, kv_heads=4, mlp=864, vision_width=64, vision_depth=4, side=64
    )
    policy.images["stamped"] = False
    policy.vision.requires_grad_(False)
    length = 8 if args.quick else 32
    rng = np.random.default_rng(0)
    view, *pictures = rng.integers(0, 256, (1 + 2 * questions, 64, 64, 3), dtype=np.uint8)
    asked = [
        {
            "id": f"q{q}",
            "question": f"Start from Image-1 and turn left {5 * q + 5} degrees. Then which object "
            "looks largest?",
            "options": ["A. red", "B. green", "C. blue", "D. white"],
            "answer": "A",
            "images": pictures[2 * q : 2 * q + 2][: GRPO_MODES[name]["images"]],
        }
        for q in range(questions)
    ]
    # A step of zero length costs the same, and the words that are put into the policy's mouth stay its own.
    flags = train_rl.parse_args(
        [
            f"--{key}={value}"
            for key, value in {
                "questions": questions,
                "group": group,
                "minibatches": 1,
                "micro-batch-tokens": 10**9,
                "lr": 0,
                "max-new-tokens": 64 if tool else length,
            }.items()
        ]
    )
    optimizer = torch.optim.AdamW(
        [p for p in policy.model.parameters() if p.requires_grad],
        lr=0.0,
        betas=train_rl.BETAS,
        weight_decay=0.0,
        fused=True,
    )
    writer, scripts = Writer, None
    if tool:  # every other rollout of a group answers B, the rest A
        script = [
            two_calls(policy, question, turns, view)
            for question in asked
            for turns in SCRIPTS * (group // 2)
        ]
        writer = saying(Writer, uniforms_that_say(policy, script))
        scripts = [[policy.tokens(turn + "<|im_end|>") for turn in turns] for turns in SCRIPTS]
    else:
        policy.banned[policy.tokenizer.eos_token_id] = True  # all write the same number of tokens
    ours, norms, last, alone = [], [], [], World(0, 1, 0, torch.device("cpu"))

    def our_step():
        seconds = Seconds()
        with mock.patch.object(policy_file, "Writer", writer), seconds("sample"):
            last[:] = train_rl.sample_trajectories(
                policy, asked, Still(view), mode, flags, group=group
            )
        with seconds("score"):
            episodes = [train_rl.score(dialogue, flags) for dialogue in last]
            for i, episode in enumerate(episodes):
                episode.reward = float(i % 2)
            train_rl.set_advantages(episodes, group, divide_by_std=True)
            minibatches = train_rl.split_minibatches(episodes, group, questions, 1, alone)
        with seconds("update"):
            stats = train_rl.update(policy, optimizer, minibatches, flags.micro_batch_tokens)
            norms.append(stats["grad_norm"])
        ours.append(seconds)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        theirs, norms_trl, said = trl_step.steps(
            policy,
            asked,
            mode,
            group,
            256 if tool else length,
            view,
            scripts,
            1 + (1 if args.quick else args.repeats),
            Seconds,
            our_step,
            folder,
        )
    ends = [
        len(t.ids) if tool else t.loss_mask.index(1) for t in last
    ]  # all that is said, or the prompt
    same = [ids[:end] for ids, end in zip(said, ends)] == [
        t.ids[:end] for t, end in zip(last, ends)
    ]
    return {
        "ours": ours[1:],
        "theirs": theirs[1:],
        "same": same,
        "norm": norms[-1],
        "norm_trl": norms_trl[-1],
        "tokens": np.mean([len(t.ids) for t in last]),
        "written": np.mean([sum(t.loss_mask) for t in last]),
    }
