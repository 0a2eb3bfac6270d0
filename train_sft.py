"""
The cold start of a policy from random weights: it learns to see, then to hold the dialogue, from scripts.

  CPU        python train_sft.py                                          # out/data -> out/sft
  baseline   python train_sft.py --lessons direct --start out/sft --out out/direct    # never imagines
  resume     the same command

A pretrained Qwen3-VL needs none of this and starts with train_rl.py, as in the paper. A tiny policy knows neither
colours nor letters. First its vision tower learns to see, by a linear probe of exact facts (`teach_to_see`); then it
is frozen, as in the paper, and the language model learns from scripted dialogues by a plain supervised loop:

  loss = sum_j w_j (-log p(token_j)) / sum_j w_j      over the tokens that the policy writes in the scripts

  look     "largest in Image-3: red. left third of Image-1: none. …": perception, in the layout of real dialogues
  direct   <think>largest in Image-3: red</think><answer> red</answer>, with and without the tool in the prompt;
           where the view is not given it has to guess what "the new view" would show
  tool     the call, the imagined view as the next image (here the true one), then reading it and answering
  slip     a tool script that first calls with an impossible image, is told so, and repairs the call

There are as many tool scripts (slips included) as direct ones, all about questions that name a motion. But whether to
call is a choice that reinforcement learning is to find: where both are open the first word of a tool script counts
little (DECISION), so that the cold start ends with few calls, and slips leave some of those invalid. Tokens that name
what is asked (NAMED) or carry a fact (FACT) count more. The answer is the option's words: to turn a word into its
letter is one more look-up that a small transformer does not learn in minutes.
Out: the policy, log.jsonl (per step: loss, share of facts that are right), done.json.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from data import ensure, load_jsonl
from lib import checkpoints, common
from lib.dialogue import Trajectory
from lib.pictures import load_image
from lib.questions import ASKS
from lib.rooms import COLOURS
from policy import Policy, collate

FACT, NAMED, DECISION = 4.0, 3.0, 0.6                 # weights of tokens; every other scripted token counts 1
SAY = {"largest": "largest in", "leftmost": "furthest left in", "rightmost": "furthest right in",
       "left": "left third of", "centre": "centre third of", "right": "right third of"}
NAMES = [*COLOURS, "none"]                            # what a fact can say
LESSONS = {                                           # share of each kind of script: at first, and when it is mixed
    "all": {"look": (1.0, 0.20), "direct": (0.0, 0.40), "tool": (0.0, 0.30), "slip": (0.0, 0.10)},
    "direct": {"look": (0.25, 0.25), "direct": (0.75, 0.75)},
}
MIXING = (0.3, 0.5)                                   # the shares change between these points of the run
PRESETS = {"tiny": dict(see_steps=350, steps=800, batch=32, lr=1.5e-3, warmup=20, lr_floor=0.03, micro_batch=8,
                        save_every=50)}


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="out/data", help="folder of questions_train.jsonl; made if missing")
    p.add_argument("--out", default="out/sft", help="folder of the policy")
    p.add_argument("--start", help="policy to start from (default: random weights; the tower learns to see first)")
    # these change the numbers
    p.add_argument("--lessons", choices=list(LESSONS), default="all",
                   help="all: a tool user; direct: the baseline that never imagines")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--see-steps", type=int, help="updates of the vision tower, 128 images each")
    p.add_argument("--steps", type=int, help="updates of the language model")
    p.add_argument("--batch", type=int, help="dialogues per update, all ranks together")
    p.add_argument("--lr", type=float, help="AdamW peak learning rate")
    p.add_argument("--warmup", type=int, help="steps")
    p.add_argument("--lr-floor", type=float, help="share of the peak that the cosine ends at")
    # these do not
    p.add_argument("--micro-batch", type=int, help="dialogues per forward pass and rank")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, help="CPU threads")
    return common.parse_with_preset(p, PRESETS, argv)


class Lesson:
    """A question with its images, the true view its command leads to, and what each of them shows, exactly."""

    def __init__(self, question):
        self.question, self.shows, self.command = question, question["shows"], question["command"]
        self.images = [load_image(path) for path in question["images"]]
        self.view = soften(load_image(question["view"]), np.random.default_rng(question["scene"]["room"]))
        self.features = {}                            # of the frozen tower, by (number, image)


def soften(image, rng):
    """Blur and grain of a random strength, about as a small simulator draws: a view that is imagined is never sharp."""
    soft, rounds = image.astype(np.float32), int(rng.integers(0, 5))
    for _ in range(rounds):                           # each round: [1 2 1] / 4 down the rows and along the columns
        wide = np.pad(soft, ((1, 1), (1, 1), (0, 0)), mode="edge")
        wide = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
        soft = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    return np.clip(soft + rng.normal(0, 2 * rounds, soft.shape) + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- first the tower learns to see

def teach_to_see(policy, lessons, args):
    """Train the vision tower alone: linear probes must find every fact and the number of the image in its tokens.

    The mean of an image's tokens has to tell who is largest, leftmost, …; each token has to tell the number stamped
    on the image. (Measured, one core: .93 of the facts after 60 CPU-s; learned through the language model, which cannot
    speak yet, .5 after 80.) At the end the last layer is scaled so that image tokens are as large as words.
    """
    tower, width, batch = policy.vision, policy.model.config.text_config.hidden_size, 128
    pictures = [(image, [-100 if show[ask] is None else NAMES.index(show[ask]) for ask in ASKS])
                for lesson in lessons for image, show in zip([*lesson.images, lesson.view], lesson.shows)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        facts, number = (nn.Linear(width, n).to(policy.device) for n in (len(ASKS) * len(NAMES), 9))
    optimizer = torch.optim.AdamW([*tower.parameters(), *facts.parameters(), *number.parameters()], lr=2e-3,
                                  betas=(0.9, 0.95), weight_decay=0.01)
    for step in (bar := common.progress(args.see_steps, 0, "learning to see")):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * common.cosine(step, args.see_steps, 20, 0.05)
        rng = np.random.default_rng(common.stable_seed(args.seed, "see", step))
        drawn = [pictures[i] for i in rng.integers(len(pictures), size=batch)]
        numbers = np.where(rng.random(batch) < 0.8, rng.integers(1, 6, batch), rng.integers(1, 10, batch))
        patches, grids = policy.pixels([(int(n), image) for n, (image, _) in zip(numbers, drawn)])
        tokens = tower(patches, grid_thw=grids).pooler_output.view(batch, -1, width)             # (B, tokens, width)
        said = facts(tokens.mean(1)).view(batch, len(ASKS), len(NAMES))
        true = torch.tensor([labels for _, labels in drawn], device=policy.device)               # (B, asks)
        which = torch.from_numpy(numbers - 1).to(policy.device)[:, None].expand(tokens.shape[:2])
        loss = (F.cross_entropy(said.flatten(0, 1), true.flatten())
                + F.cross_entropy(number(tokens).flatten(0, 1), which.flatten()))
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix(right=f"{(said.argmax(-1) == true)[true >= 0].float().mean():.2f}")
    size = tokens.norm(dim=-1).mean().item()
    for parameter in tower.merger.linear_fc2.parameters():
        parameter.data.div_(size)


# ---------------------------------------------------------------- scripts

def look_parts(rng, shows, count=12):
    """Statements about random images: only the colours count, what is looked at is drawn and not learned."""
    parts = []
    for _ in range(count):
        k, ask = int(rng.integers(len(shows))), str(rng.choice(list(ASKS)))
        if shows[k][ask] is not None:
            parts += [(SAY[ask], 0), (f" Image-{k + 1}:", 0), (f" {shows[k][ask]}", FACT), (". ", 0)]
    return parts


def answer_parts(question, where):
    """The thought that names what is asked, of which view, and what it shows; then the answer."""
    words = question["options"]["ABCD".index(question["answer"])].split(". ")[1]
    thought = [("The camera:", NAMED)] if question["ask"] is None else [(SAY[question["ask"]], NAMED), (where, NAMED)]
    return [("<think>", 1), *thought, (f" {words}", FACT), ("</think>", 1), ("<answer>", 1), (f" {words}", 1),
            ("</answer>", 1), ("<|im_end|>", 1)]


def call_parts(command, first=1.0):
    """A tool call; `first` weighs the choice to call."""
    return [("<think>", 1), ("I need to see it.", first), ("</think>", 1), ("<tool_call>", 1),
            ('{"name": "imagine", "arguments": {"image":', 1), (f" {command['image']}", 1), (', "motion": "', 1),
            (command["kind"], 1), ('", "amount":', 1), (f" {command['amount']:g}", 1), ("}}", 1), ("</tool_call>", 1),
            ("<|im_end|>", 1)]


def script(policy, lesson, kind, rng, calling=True):
    """Write one dialogue of the given kind -> Trajectory whose `logprobs` slot holds the weights of its tokens.

    calling   whether a look may include a call and its view (not for the baseline that never imagines)
    """
    question, given = lesson.question, len(lesson.images)
    mode = str(rng.choice(["forced", "agentic"] if kind in ("tool", "slip") else ["direct", "agentic"]))
    dialogue = Trajectory.start(policy, question, lesson.images, mode)

    def say(parts):
        """Add a turn; the weights travel in the place of the rollout's log-probs."""
        tokens = [(policy.tokens(text), weight) for text, weight in parts]
        weights = [float(weight) for ids, weight in tokens for _ in ids]
        dialogue.say(policy, [i for ids, _ in tokens for i in ids], weights)

    choice = 1.0 if mode == "forced" else DECISION
    if kind == "direct":
        say(answer_parts(question, " the new view:" if question["needs_view"] else f" Image-{question['shown_by']}:"))
    elif kind == "look" and (mode == "direct" or not calling):
        say(look_parts(rng, lesson.shows[:given]))
    else:
        if kind == "slip":
            say(call_parts(lesson.command | {"image": int(rng.integers(given + 1, 10))}, choice))
            dialogue.observe(policy)
        say(call_parts(lesson.command, {"tool": choice, "slip": 1.0, "look": 0.0}[kind]))
        dialogue.observe(policy, image=lesson.view)
        say(look_parts(rng, lesson.shows) if kind == "look" else answer_parts(question, f" Image-{given + 1}:"))
    dialogue.features = [lesson.features[pair] for pair in enumerate(map(id, dialogue.images), 1)]
    return dialogue


# ---------------------------------------------------------------- the loss

def scripted_loss(policy, batch):
    """Weighted negative log-likelihood of the scripts.

    batch     from `collate`; its `logprobs` slot holds the weights (B, L)
    returns   sum of w (-log p): divide by the sum of w of the whole update, all ranks; and how many of the facts (the
              tokens that weigh FACT) were right, and how many there were
    """
    weights = batch["logprobs"][:, 1:]                                                      # (B, L - 1)
    columns = (weights > 0).any(0).nonzero()[:, 0]                                          # (K,)
    logits = policy.forward(batch["ids"], batch["positions"], batch["mask"], batch["features"], keep=columns)
    targets, weights = batch["ids"][:, 1:][:, columns], weights[:, columns]                 # (B, K)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    facts = weights == FACT
    return (weights * nll).sum(), ((logits.argmax(-1) == targets) & facts).sum().item(), facts.sum().item()


# ---------------------------------------------------------------- the loop

def batches_of_step(policy, lessons, args, step, world):
    """This rank's share of the scripts of one step, in micro-batches; they depend on (seed, step, place) alone."""
    done = min(1, max(0, (step / args.steps - MIXING[0]) / (MIXING[1] - MIXING[0])))
    shares = {kind: early + (late - early) * done for kind, (early, late) in LESSONS[args.lessons].items()}
    dialogues, moving = [], [lesson for lesson in lessons if lesson.question["motion"]]
    for place in range(world.rank, args.batch, world.size):
        rng = np.random.default_rng(common.stable_seed(args.seed, "script", step, place))
        kind = str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))
        known = moving if kind in ("tool", "slip") else lessons
        dialogues.append(script(policy, known[rng.integers(len(known))], kind, rng, calling="tool" in shares))
    dialogues.sort(key=lambda dialogue: len(dialogue.ids))              # neighbours of like length: little padding
    return [collate(policy, dialogues[i:i + args.micro_batch]) for i in range(0, len(dialogues), args.micro_batch)]


def open_policy(args, lessons, world):
    """The policy with a frozen tower that sees: of --start, or a new one, taught (and kept for a resumed run)."""
    if args.start:
        policy = Policy.load(common.need(args.start, "python train_sft.py"), world.device, torch.float32)
    else:
        policy, taught = Policy.tiny(args.seed, device=world.device), Path(args.out) / "training" / "tower.safetensors"
        if common.is_main() and not taught.exists():
            teach_to_see(policy, lessons, args)
            with common.written_whole(taught.parent) as part:
                save_file(policy.vision.state_dict(), part / taught.name)
        common.wait_for_all()
        policy.vision.load_state_dict(load_file(taught))
    policy.vision.requires_grad_(False)
    for lesson in lessons:
        pairs = [*enumerate(lesson.images, 1), (len(lesson.images) + 1, lesson.view)]
        lesson.features = {(n, id(image)): x for (n, image), x in zip(pairs, policy.encode(pairs))}
    return policy


def main(argv=None):
    """The stage: the tower learns to see, then the language model learns from scripts."""
    args = parse_args(argv)
    common.begin("train_sft", args, neutral=("threads", "save_every", "micro_batch"))
    world, out = common.setup(args.threads), Path(args.out)
    if args.batch % world.size:
        common.fail(f"--batch {args.batch} cannot be shared evenly by {world.size} processes; take a multiple of it.")
    if common.is_main():
        ensure(args.data)
    common.wait_for_all()
    lessons = [Lesson(question) for question in load_jsonl(Path(args.data) / "questions_train.jsonl")]
    clock = common.Clock()
    policy = open_policy(args, lessons, world)
    blocks = policy.model.model.language_model.layers
    model = common.shard(policy.model, blocks, world, ignored=policy.vision.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.01)
    tensors = checkpoints.training_tensors(model, optimizer)
    first, state = checkpoints.load_state(out / "training", tensors) or (0, {})
    log, clock.before = common.MetricLog(out / "log.jsonl", first), state.get("clock", clock.before)
    model.train()

    with common.Interrupt() as stop:
        for step in (bar := common.progress(args.steps, first, f"sft, lessons: {args.lessons}")):
            rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batches, sums = batches_of_step(policy, lessons, args, step, world), np.zeros(3)
            total = common.global_sum(float(sum(batch["logprobs"].sum() for batch in batches)))     # weights, all ranks
            for batch in batches:
                loss, right, facts = scripted_loss(policy, batch)
                (loss / total).backward()                                       # a local sum over a global count
                sums += loss.item(), right, facts
            norm = common.clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means = common.global_means({"loss": (sums[0], total / world.size), "facts": (sums[1], sums[2])})
            log.write(step, **means, grad_norm=norm, lr=rate)
            bar.set_postfix({key: f"{value:.2f}" for key, value in means.items()})
            stopping = stop.requested()
            if stopping or (step + 1) % args.save_every == 0:
                checkpoints.save_state(out / "training", step + 1, tensors, {"clock": clock.read()})
            if stopping:
                stop.leave(step + 1)

    weights = checkpoints.whole(model.named_parameters())
    if common.is_main():
        with common.written_whole(out) as part:
            policy.save(part, weights)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
