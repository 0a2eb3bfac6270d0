"""
The cold start of a policy from random weights: a plain supervised loop over scripted dialogues.

  loss = sum_j w_j (-log p(token_j)) / sum_j w_j      over the tokens that the policy writes in the scripts

  CPU        python train_sft.py                                          # out/data -> out/sft
  baseline   python train_sft.py --lessons direct --start out/sft --out out/direct    # never imagines
  resume     the same command

A pretrained Qwen3-VL needs none of this and starts with train_rl.py, as in the paper. A tiny policy knows neither
colours nor letters, so four kinds of scripts teach it what the 8B model brings along:

  look     "Image-3: the largest is red. Image-1: on the left is none. …": perception, in the layout of real dialogues
  direct   <think>Image-3: the largest is red, so B</think><answer>B</answer>, with and without the tool in the prompt;
           where the view is not given it has to guess what "The new view" would show
  tool     the call, the imagined view as the next image (here the true one), then reading it and answering
  slip     a tool script that first calls with an impossible image, is told so, and repairs the call

There are as many tool scripts as direct ones. But whether to call is a choice that reinforcement learning is to find:
where both are open the first word of a tool script counts little (DECISION), so that the cold start ends with few
calls, and slips leave some of those invalid. Tokens that carry the facts (colours, letters) count more.
Out: the policy, log.jsonl (per step: loss, accuracy of colours and letters, by kind of script), curves.png.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import ASKS, ensure, facts, load_image, load_jsonl
from lib import common
from lib.geometry import KINDS, Motion, move_camera
from lib.rooms import random_room, render
from policy import Policy, Trajectory, collate

COLOUR, LETTER, DECISION = 3.0, 6.0, 0.25             # weights of tokens; every other scripted token counts 1
SAY = {"largest": "the largest is", "leftmost": "the leftmost is", "rightmost": "the rightmost is",
       "left": "on the left is", "centre": "in the centre is", "right": "on the right is"}
LESSONS = {                                           # share of each kind of script: at first, and later on
    "all": {"look": (0.85, 0.20), "direct": (0.09, 0.40), "tool": (0.05, 0.34), "slip": (0.01, 0.06)},
    "direct": {"look": (0.20, 0.20), "direct": (0.80, 0.80)},
}
PRESETS = {"tiny": dict(steps=700, batch=32, micro_batch=8, lr=1.5e-3, warmup=20, lr_floor=0.05, save_every=50)}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="out/data", help="folder of questions_train.jsonl; made if missing")
    p.add_argument("--out", default="out/sft", help="folder of the policy")
    p.add_argument("--start", help="policy to start from (default: random weights)")
    # these change the numbers
    p.add_argument("--lessons", choices=list(LESSONS), default="all", help="all: a tool user; direct: the baseline that never imagines")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--batch", type=int, help="dialogues per update, all ranks together")
    p.add_argument("--lr", type=float, help="AdamW peak learning rate")
    p.add_argument("--warmup", type=int, help="steps")
    p.add_argument("--lr-floor", type=float, help="share of the peak that the cosine ends at")
    # these do not
    p.add_argument("--micro-batch", type=int, help="dialogues per forward pass and rank")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, help="CPU threads")
    return common.parse_with_preset(p, PRESETS, argv)


# ---------------------------------------------------------------- what the scripts are about

class Lesson:
    """A question with its images and what they truly show: per image a dict {ask: colour, "none", or None = unclear}.

    `target` is the view that the call of a tool script shows, rendered; what it shows stands last in `shows`.
    """

    def __init__(self, question):
        self.question = question
        room = random_room(question["scene"]["room"])
        poses = [np.array(pose) for pose in question["scene"]["poses"]]
        self.images = [load_image(path) for path in question["images"]]
        # the call of a tool script; a question without a motion needs none, and gets one that does not help
        self.command = question["motion"] or {"image": question["shown_by"] or 1, "kind": "turn left", "amount": 45.0}
        target = move_camera(poses[self.command["image"] - 1], Motion(self.command["kind"], self.command["amount"]))
        self.target = render(room, target, len(self.images[0]))["rgb"][0]
        ids = render(room, np.stack([*poses, target]), len(self.target), supersample=1)["ids"]
        self.shows = []
        for view in ids:
            found = facts(view, len(room.things))
            self.shows.append({ask: None if found[ask] is None else "none" if found[ask] < 0 else room.things[found[ask]].colour
                               for ask in ASKS})


def look_parts(rng, shows, count=12):
    """Statements about random images: only the colours count, what is looked at is drawn and not learned."""
    parts = []
    for _ in range(count):
        k, ask = int(rng.integers(len(shows))), str(rng.choice(list(ASKS)))
        colour = shows[k][ask]
        if colour is not None:
            parts += [(f"Image-{k + 1}: ", 0), (SAY[ask], 0), (f" {colour}", COLOUR), (". ", 0)]
    return parts


def answer_parts(lesson, where, first=1.0):
    """The thought that names the view and what it shows, then the letter; `first` weighs the choice not to call."""
    question = lesson.question
    option = question["options"]["ABCD".index(question["answer"])].split(maxsplit=1)[1]
    if question["category"] == "camera-camera":
        thought = [("The camera:", first), (f" {option}", COLOUR)]
    else:
        thought = [(where, first), (SAY[question["ask"]], 1), (f" {option}", COLOUR)]
    return [("<think>", 1), *thought, (", so", 1), (f" {question['answer']}", LETTER), ("</think>", 1), ("<answer>", 1),
            (question["answer"], LETTER), ("</answer>", 1), ("<|im_end|>", 1)]


def call_parts(command, first=1.0):
    """A tool call; `first` weighs the choice to call."""
    return [("<think>", 1), ("I need to see it.", first), ("</think>", 1), ("<tool_call>", 1),
            ('{"name": "imagine", "arguments": {"image":', 1), (f" {command['image']}", 1), (', "motion": "', 1),
            (command["kind"], 1), ('", "amount":', 1), (f" {command['amount']:g}", 1), ("}}", 1), ("</tool_call>", 1),
            ("<|im_end|>", 1)]


def script(policy, lesson, kind, rng, done=1.0):
    """Write one dialogue of the given kind -> Trajectory whose `logprobs` slot holds the weights of its tokens.

    done    share of the run: looking begins with one image, and with all of them after 30 %
    """
    question, given = lesson.question, len(lesson.images)
    if kind == "look" and rng.random() > min(1, done / 0.3):
        mode = "direct"
        k = int(rng.integers(given))
        dialogue = Trajectory.start(policy, question, [lesson.images[k]], mode)
        parts = look_parts(rng, [lesson.shows[k]])
        tokens = [(policy.tokens(text), weight) for text, weight in parts]
        dialogue.say(policy, [i for ids, _ in tokens for i in ids], [float(weight) for ids, weight in tokens for _ in ids])
        return dialogue
    mode = "direct" if kind in ("look", "direct") and rng.random() < 0.5 else "agentic"
    if kind in ("tool", "slip"):
        mode = "forced" if rng.random() < 0.5 else "agentic"
    dialogue = Trajectory.start(policy, question, lesson.images, mode)

    def say(parts):
        """Add a turn; the weights travel in the place of the rollout's log-probs."""
        tokens = [(policy.tokens(text), weight) for text, weight in parts]
        dialogue.say(policy, [i for ids, _ in tokens for i in ids], [float(weight) for ids, weight in tokens for _ in ids])

    choice = 1.0 if mode == "forced" else DECISION
    if kind == "direct":
        say(answer_parts(lesson, "The new view: " if question["needs_view"] else f"Image-{question['shown_by']}: "))
    elif kind == "look" and mode == "direct":
        say(look_parts(rng, lesson.shows[:given]))
    else:
        if kind == "slip":
            say(call_parts(lesson.command | {"image": int(rng.integers(given + 1, 10))}, choice))
            dialogue.observe(policy)
        say(call_parts(lesson.command, {"tool": choice, "slip": 1.0, "look": 0.0}[kind]))
        dialogue.observe(policy, image=lesson.target)
        in_new = question["motion"] is not None
        say(look_parts(rng, lesson.shows) if kind == "look" else
            answer_parts(lesson, f"Image-{given + 1 if in_new else question['shown_by']}: "))
    return dialogue


# ---------------------------------------------------------------- the loss

def scripted_loss(policy, batch):
    """Weighted negative log-likelihood of the scripts.

    batch     from `collate(…, pixels=True)`; its `logprobs` slot holds the weights (B, L)
    returns   sum of w (-log p): divide by the sum of w of the whole update, all ranks; and what was hit, found by its
              weight: {"colour": right, "colours": all, "letter": right, "letters": all}
    """
    weights = batch["logprobs"][:, 1:]                                                      # (B, L - 1)
    columns = (weights > 0).any(0).nonzero()[:, 0]                                          # (K,)
    logits = policy.forward(*(batch[key] for key in ("ids", "positions", "mask")), batch["features"], keep=columns)                                 # (B, K, vocabulary)
    targets, weights = batch["ids"][:, 1:][:, columns], weights[:, columns]                 # (B, K)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    hits, right = {}, logits.argmax(-1) == targets
    for name, weight in (("colour", COLOUR), ("letter", LETTER)):
        hits |= {name: (right & (weights == weight)).sum().item(), f"{name}s": (weights == weight).sum().item()}
    return (weights * nll).sum(), hits


# ---------------------------------------------------------------- the loop

def kinds_of_step(lessons, done, count, rng):
    """Kinds of script of one batch: the shares move from the first to the second over 40 % of the run."""
    shares = {kind: early + (late - early) * min(1, done / 0.4) for kind, (early, late) in LESSONS[lessons].items()}
    return rng.choice(list(shares), count, p=np.array(list(shares.values())) / sum(shares.values()))


def collate_step(policy, lessons, args, step, world):
    """This rank's share of the dialogues of one step; they depend on (seed, step, place) alone."""
    rng = np.random.default_rng(common.stable_seed(args.seed, "kinds", step))
    kinds = kinds_of_step(args.lessons, step / args.steps, args.batch, rng)[world.rank::world.size]
    dialogues = []
    for i, kind in enumerate(kinds):
        rng = np.random.default_rng(common.stable_seed(args.seed, "script", step, i * world.size + world.rank))
        dialogues.append(script(policy, lessons[rng.integers(len(lessons))], kind, rng))
    dialogues.sort(key=lambda dialogue: len(dialogue.ids))                # neighbours of like length: little padding
    return [collate(policy, dialogues[i:i + args.micro_batch], pixels=True) for i in range(0, len(dialogues), args.micro_batch)]


def main(argv=None):
    args = parse_args(argv)
    common.begin("train_sft", args, neutral=("threads", "save_every", "micro_batch"))
    world, out = common.setup(args.threads), Path(args.out)
    if common.is_main():
        ensure(args.data)
    common.wait_for_all()
    lessons = [Lesson(q) for q in common.progress_over(load_jsonl(Path(args.data) / "questions_train.jsonl"), "lessons")]
    start = args.start and common.need(args.start, "python train_sft.py")
    policy = Policy.load(start, world.device, torch.float32) if start else Policy.tiny(args.seed)
    model = common.shard(policy.model.to(world.device), policy.model.model.language_model.layers, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first, tensors, state = common.load_state(out / "training") or (0, None, {})
    if tensors:
        common.restore_training(model, optimizer, tensors)
    log, clock = common.MetricLog(out / "log.jsonl", first), common.Clock(state.get("clock"))

    with common.Interrupt() as stop:
        for step in (bar := common.progress(args.steps, first, f"sft, {args.lessons}")):
            rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            batches = collate_step(policy, lessons, args, step, world)
            total = common.global_sum(float(sum(batch["logprobs"].sum() for batch in batches)))     # weights, all ranks
            sums = Counter()
            for batch in batches:
                loss, hits = scripted_loss(policy, batch)
                (loss / total).backward()                                       # a local sum over a global count
                sums.update({"loss": loss.item(), **hits})
            norm = common.clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means = common.global_means({"loss": (sums["loss"], total / world.size), **{
                name: (sums[name], sums[f"{name}s"]) for name in ("colour", "letter")}})
            log.write(step, **means, grad_norm=norm, lr=rate)
            bar.set_postfix({key: f"{value:.2f}" for key, value in means.items()})
            stopping = stop.requested()
            if stopping or (step + 1) % args.save_every == 0:
                common.save_state(out / "training", step + 1, common.training_tensors(model, optimizer), {"clock": clock.read()})
            if stopping:
                stop.leave(step + 1)

    model.eval()
    weights = common.whole(model.named_parameters())
    if common.is_main():
        with common.written_whole(out) as part:
            policy.save(part, weights)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    main()
