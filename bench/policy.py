"""
Speed of the policy's rollouts against the straightforward way, as a ratio in one run: `python -m bench rollout`.

Both ways do the same work: a policy with random weights is made to say what a trained one would, by drawing from the
uniform numbers that lead to these words (`uniforms_that_say`). Times are CPU seconds of this process.
"""

import time
from argparse import Namespace
from unittest import mock

import numpy as np
import torch

import policy as policy_file
from bench import naive
from bench.timing import Seconds, medians, print_json
from bench.wm import ring_views
from data import MOTIONS
from lib.dialogue import Trajectory
from lib.protocol import call_of, call_text
from lib.rollout import Writer
from lib.rooms import TrueRenderer
from lib.scores import text_table
from policy import Policy, collate

# ---- a policy that says what it is told ------------------------------------------------------------------------------


def scripted_dialogue(policy: Policy, question: dict, seed: int) -> Trajectory:
    """A call, a call on the new view, an answer, in the words that the cold start teaches."""
    rng = np.random.default_rng(seed)
    dialogue = Trajectory.start(policy, question, question["images"], "agentic")
    for image in (int(rng.integers(1, 5)), 5):
        call = call_of(image, MOTIONS[rng.integers(len(MOTIONS))])
        dialogue.add_turn(policy, f"<think>I need to see it.</think>{call_text(call)}")
        (view,) = TrueRenderer().imagine([dialogue.query(seed=0)])
        dialogue.observe(policy, image=view)
    dialogue.add_turn(policy, "<think>largest in the new view: red</think><answer> A</answer>")
    return dialogue


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


def timed_rollout(policy, questions, group, way, uniforms, seconds: Seconds, **options):
    """policy.rollout with a writer of class `way` -> its dialogues; `seconds` by part.

    uniforms   (dialogues, turns, tokens): what it draws from
    """

    class Watched(way):
        """The writer by the clock; its draws are `uniforms`."""

        turn = -1

        @seconds("prefill")
        def feed(self, n):  # the straightforward writer has none
            super().feed(n)

        @seconds("decode" if way is Writer else "generate")
        def write(self, members, _, temperature, limit):
            self.turn += 1
            return super().write(members, uniforms[:, self.turn], temperature, limit)

    class Simulator(TrueRenderer):
        @seconds("simulator")
        def imagine(self, queries):
            return super().imagine(queries)

    def no_features(*_):
        """`generate` encodes the images itself."""

    encode = seconds("prefill")(policy_file.encode_images) if way is Writer else no_features
    with mock.patch.multiple(policy_file, Writer=Watched, encode_images=encode), seconds("rest"):
        return policy_file.rollout(policy, questions, Simulator(), group_size=group, **options)


def compare_writers(policy, questions, group, uniforms, repeats, now=time.process_time, **options):
    """Our way and `generate` in turns, the first pair to warm up -> ({way: median seconds by part}, [dialogues of a run])."""
    runs = {"fast": [], "generate": []}
    dialogues = []
    for _ in range(1 + repeats):
        for name, way in (("fast", Writer), ("generate", naive.Writer)):
            seconds = Seconds(now)
            dialogues.append(
                timed_rollout(policy, questions, group, way, uniforms, seconds, **options)
            )
            runs[name].append(seconds)
    return {name: medians(own[1:]) for name, own in runs.items()}, dialogues


# ---- python -m bench rollout -----------------------------------------------------------------------------------------


def room_questions(rooms: int) -> list[dict]:
    """One question in each of some rooms, as the demo asks them: four views of 32 x 32 pixels, four options."""
    questions = []
    for seed in range(rooms):
        images, poses = ring_views(seed)
        question = {
            "id": f"room_{seed}",
            "question": "Start from Image-2 and turn left 45 degrees. Then which object looks largest?",
            "options": ["A. red", "B. green", "C. blue", "D. white"],
            "images": images,
            "scene": {"room": seed, "poses": poses.tolist()},
        }
        questions.append(question)
    return questions


def rollout_bench(args: Namespace) -> None:
    """The policy's rollouts: tokens per second of CPU against `generate` from scratch every turn, same tokens."""
    torch.set_num_threads(args.threads)
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
    spent, dialogues = compare_writers(policy, questions, group, uniforms, repeats)
    same = True
    for own in dialogues:
        same &= [t.ids for t in own] == [t.ids for t in script]
    whole = {name: sum(parts.values()) for name, parts in spent.items()}
    policy_only = {name: whole[name] - parts["simulator"] for name, parts in spent.items()}
    results = {"bench": "rollout", "threads": args.threads, "quick": args.quick}
    results["same_tokens"] = same
    results["speedup"] = policy_only["generate"] / policy_only["fast"]
    results["speedup_with_simulator"] = whole["generate"] / whole["fast"]
    for name, parts in spent.items():
        rate = written / policy_only[name]
        results[f"tokens_per_second_{name}"] = rate
        rows = [[part, seconds, f"{seconds / whole[name]:.1%}"] for part, seconds in parts.items()]
        print("\n" + text_table([f"{name}, CPU seconds", f"{whole[name]:.3f}", ""], rows))
        print(f"{rate:.0f} tokens/s without the simulator")
    for part, seconds in spent["fast"].items():
        results[f"{part}_share"] = seconds / whole["fast"]
    print_json(results)
