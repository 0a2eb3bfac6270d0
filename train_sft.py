"""
Supervised stages: the cold start of a policy from random weights, and World2VLM's answers about camera motions.

  CPU        python train_sft.py                                          # out/data -> out/sft
  baseline   python train_sft.py --lessons direct --start out/sft --out out/direct    # never imagines
  World2VLM  python train_sft.py --task world2vlm                         # out/world2vlm, out/sft -> out/w2v
  8 GPUs     torchrun --standalone --nproc_per_node 8 train_sft.py --task world2vlm --preset astra
  resume     the same command

Cold start. A pretrained Qwen3-VL needs none of it and starts with train_rl.py, as in the paper. A tiny policy knows
neither colours nor letters. First its vision tower learns to see, by a linear probe of exact facts (`teach_to_see`);
then it is frozen, as in the paper, and the language model learns from scripted dialogues by a plain supervised loop:

  loss = sum_j w_j (-log p(token_j)) / sum_j w_j      over the tokens that the policy writes in the scripts

  look     "largest in Image-3: red. left third of Image-1: none. …": perception, in the layout of real dialogues
  direct   <think>largest in Image-3: red</think><answer> red</answer>, with and without the tool in the prompt;
           where the view is not given it has to guess what "the new view" would show
  tool     the call, the imagined view as the next image (here the true one), then reading it and answering
  slip     a tool script that first calls with an impossible image, is told so, and repairs the call

There are as many tool scripts (slips included) as direct ones, all about questions that name a motion. But whether to
call is a choice that reinforcement learning is to find: where both are open the first word of a tool script counts
less (DECISION), so that the cold start ends with few calls, and slips leave some of those invalid. Tokens that name
what is asked (NAMED) or carry a fact (FACT) count more. The answer is the option's words: to turn a word into its
letter is one more look-up that a small transformer does not learn in minutes.

World2VLM (arXiv 2604.26934, its first stage). A policy that sees learns from questions about what a camera motion shows
(`data.py world2vlm`) to answer <think></think><answer>move left 0.5 meters</answer>, without any tool:

  loss = lambda_inv L_inv + lambda_fwd L_fwd,     L = sum_i w_i (-log p(y_i | x_i)) / sum_i w_i

over the questions i of a direction (inverse: A1 A2 A3 D3; forward: the others) in one update; y_i is all that the
policy writes, w_i what the teacher's picture is worth. Its paper says nothing of w and gives no lambdas; its code mixes
both directions, which is 1 and 1 but for the number of questions and tokens of each. The published policy is a
Qwen2.5-VL-7B, ours a Qwen3-VL: the protocol and Astra's runs are of that family. At true size, LoRA as in World2VLM's.

A tiny policy has never compared two pictures. Turns alone teach that in minutes; of all tasks at once it has learned
only formats by then. So three runs, each with --start from the one before: --tasks A2 (400 steps), --tasks A1 A2 (500),
all (600 and more).

Out: the policy, done.json, log.jsonl. Per step: loss; facts, the share that is right; inverse and forward, L_inv and
L_fwd in nats per answer; eval, on questions_val.jsonl: {task: mean reward, share of perfect answers}.
"""

import argparse
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from extras.world2vlm.rewards import FULL, world2vlm
from extras.world2vlm.words import INVERSE, TASKS
from lib import checkpoints, common
from lib.dialogue import Trajectory
from lib.images import load_image
from lib.lora import QWEN_LAYERS, add_lora, merged
from lib.questions import ASKS
from lib.records import load_jsonl
from lib.rooms import COLOURS
from lib.streams import numpy_stream, rows_of_step, stream_seed
from policy import Policy, collate, rollout, token_logprobs

FACT, NAMED, DECISION = 4.0, 3.0, 0.6  # weights of tokens; every other scripted token counts 1
SAY = {
    "largest": "largest in",
    "leftmost": "furthest left in",
    "rightmost": "furthest right in",
    "left": "left third of",
    "centre": "centre third of",
    "right": "right third of",
}
NAMES = [*COLOURS, "none"]  # what a fact can say
LESSONS = {  # share of each kind of script: at first, and when it is mixed
    "all": {"look": (1.0, 0.20), "direct": (0.0, 0.40), "tool": (0.0, 0.30), "slip": (0.0, 0.10)},
    "direct": {"look": (0.25, 0.25), "direct": (0.75, 0.75)},
}
MIXING = (0.3, 0.5)  # the shares change between these points of the run
PRESETS = {
    "tiny": dict(
        steps=800,
        batch=32,
        lr=1.5e-3,
        warmup=20,
        lr_floor=0.03,
        weight_decay=0.01,
        micro_batch=8,
        save_every=50,
    ),
    # World2VLM: the paper's adapters, all else from its released code; 797 updates: one epoch of 102,066 questions
    "astra": dict(
        steps=797,
        batch=128,
        lr=1e-5,
        warmup=40,
        lr_floor=0.0,
        weight_decay=0.1,
        micro_batch=8,
        save_every=40,
        lora=256,
        dropout=0.05,
        gradient_checkpointing=True,
        data="out/taught",
        out="out/w2v-astra",
    ),
}
OF_TASK = {  # defaults of flags that only one task has, or has otherwise
    "cold": dict(data="out/data", out="out/sft", lessons="all", see_steps=350),
    "world2vlm": dict(
        data="out/world2vlm",
        out="out/w2v",
        tasks=list(TASKS),
        lambda_inv=1.0,
        lambda_fwd=1.0,
        lora=0,
        dropout=0.0,
        eval_questions=200,
    ),
}
ASKED = {
    "tiny": {},
    "astra": dict(max_new_tokens=256, rows=8),
}  # of rollout, when held-out questions are asked
NEUTRAL = ("threads", "save_every", "micro_batch", "gradient_checkpointing")


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--task", choices=list(OF_TASK), default="cold", help="cold: the cold start (default)"
    )
    p.add_argument(
        "--data",
        help="folder of questions_train.jsonl (default: out/data, made if missing; out/world2vlm; "
        "astra: out/taught)",
    )
    p.add_argument(
        "--out", help="folder of the policy (default: out/sft; out/w2v; astra: out/w2v-astra)"
    )
    p.add_argument(
        "--start",
        help="policy to start from (default: cold start, random weights, and the tower learns to "
        "see first; world2vlm, out/sft, or Qwen/Qwen3-VL-8B-Instruct with --preset astra)",
    )
    # these change the numbers
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="updates of the language model")
    p.add_argument("--batch", type=int, help="dialogues per update, all ranks together")
    p.add_argument("--lr", type=float, help="AdamW peak learning rate")
    p.add_argument("--warmup", type=int, help="steps")
    p.add_argument("--lr-floor", type=float, help="share of the peak that the cosine ends at")
    p.add_argument("--weight-decay", type=float)
    cold = p.add_argument_group("cold start")
    cold.add_argument(
        "--lessons",
        choices=list(LESSONS),
        help="all (default): a tool user; direct: the baseline that never imagines",
    )
    cold.add_argument(
        "--see-steps", type=int, help="updates of the vision tower, 128 images each (default 350)"
    )
    w2v = p.add_argument_group("world2vlm")
    w2v.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        help="only these, such as A2 first: a tiny policy learns to "
        "compare two pictures in minutes from turns, and hardly from all tasks at once (default: all)",
    )
    w2v.add_argument(
        "--lambda-inv", type=float, help="of the inverse questions (default 1; 0: none are asked)"
    )
    w2v.add_argument(
        "--lambda-fwd", type=float, help="of the forward questions (default 1; 0: none are asked)"
    )
    w2v.add_argument(
        "--lora",
        type=int,
        help="train adapters of this rank, alpha twice that (tiny: 0, all weights)",
    )
    w2v.add_argument("--dropout", type=float, help="of the adapters")
    w2v.add_argument(
        "--eval-questions", type=int, help="held out, before and after (default 200; 0: none)"
    )
    # these do not, but that the dropout is another for another --micro-batch
    p.add_argument("--micro-batch", type=int, help="dialogues per forward pass and rank")
    p.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in backward"
    )
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, help="CPU threads")
    args = common.parse_with_preset(
        p,
        PRESETS,
        argv,
        [
            *((key, 1) for key in ("steps", "batch", "micro_batch", "save_every", "threads")),
            ("lr_floor", 0, 1),
            *(
                (key, 0)
                for key in (
                    "warmup",
                    "lr",
                    "weight_decay",
                    "lambda_inv",
                    "lambda_fwd",
                    "lora",
                    "dropout",
                    "eval_questions",
                    "see_steps",
                )
            ),
        ],
    )
    if args.dropout is not None and args.dropout >= 1:
        p.error(f"--dropout {args.dropout}: must be below 1")
    if args.preset == "astra" and args.task == "cold":
        p.error("--preset astra is of --task world2vlm: a pretrained policy needs no cold start")
    for task, defaults in OF_TASK.items():
        for key, value in defaults.items():
            if task == args.task and getattr(args, key) is None:
                setattr(args, key, value)
            if key not in OF_TASK[args.task] and getattr(args, key) is not None:
                p.error(f"--{key.replace('_', '-')} is of --task {task}")
    if args.task == "world2vlm":
        if not args.lambda_inv and not args.lambda_fwd:
            p.error("nothing is learned where both lambdas are 0")
        args.start = args.start or (
            "Qwen/Qwen3-VL-8B-Instruct"
            if args.preset == "astra"
            else str(common.newest(("sft",)) or "out/sft")
        )
    return args


class Lesson:
    """A question with its images, the true view its command leads to, and what each of them shows, exactly."""

    def __init__(self, question):
        self.question, self.shows, self.command = question, question["shows"], question["command"]
        self.images = [load_image(path) for path in question["images"]]
        self.view = soften(
            load_image(question["view"]),
            numpy_stream("soft view", question["scene"]["room"], question["id"]),
        )
        self.features = {}  # of the frozen tower, by (number, id of the image)


def soften(image, rng):
    """Blur and grain of a random strength, about as a small simulator draws: a view that is imagined is never sharp."""
    soft, rounds = image.astype(np.float32), int(rng.integers(0, 5))
    for _ in range(rounds):  # each round: [1 2 1] / 4 down the rows and along the columns
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
    pictures = [
        (image, [-100 if show[ask] is None else NAMES.index(show[ask]) for ask in ASKS])
        for lesson in lessons
        for image, show in zip([*lesson.images, lesson.view], lesson.shows)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("weights", args.seed, "probes"))
        facts, number = (nn.Linear(width, n).to(policy.device) for n in (len(ASKS) * len(NAMES), 9))
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *facts.parameters(), *number.parameters()],
        lr=2e-3,
        betas=(0.9, 0.95),
        weight_decay=0.01,
    )
    for step in (bar := common.progress(args.see_steps, 0, "learning to see")):
        common.set_rate(optimizer, 2e-3 * common.cosine(step, args.see_steps, 20, 0.05))
        rng = numpy_stream("tower", args.seed, step)
        drawn = [pictures[i] for i in rng.integers(len(pictures), size=batch)]
        numbers = np.where(
            rng.random(batch) < 0.8, rng.integers(1, 6, batch), rng.integers(1, 10, batch)
        )
        patches, grids = policy.pixels([(int(n), image) for n, (image, _) in zip(numbers, drawn)])
        tokens = tower(patches, grid_thw=grids).pooler_output.view(
            batch, -1, width
        )  # (B, tokens, width)
        said = facts(tokens.mean(1)).view(batch, len(ASKS), len(NAMES))
        true = torch.tensor([labels for _, labels in drawn], device=policy.device)  # (B, asks)
        which = torch.from_numpy(numbers - 1).to(policy.device)[:, None].expand(tokens.shape[:2])
        loss = F.cross_entropy(said.flatten(0, 1), true.flatten()) + F.cross_entropy(
            number(tokens).flatten(0, 1), which.flatten()
        )
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
            parts += [
                (SAY[ask], 0),
                (f" Image-{k + 1}:", 0),
                (f" {shows[k][ask]}", FACT),
                (". ", 0),
            ]
    return parts


def answer_parts(question, where):
    """The thought that names what is asked, of which view, and what it shows; then the answer."""
    words = question["options"]["ABCD".index(question["answer"])].split(". ")[1]
    thought = (
        [("The camera:", NAMED)]
        if question["ask"] is None
        else [(SAY[question["ask"]], NAMED), (where, NAMED)]
    )
    return [
        ("<think>", 1),
        *thought,
        (f" {words}", FACT),
        ("</think>", 1),
        ("<answer>", 1),
        (f" {words}", 1),
        ("</answer>", 1),
        ("<|im_end|>", 1),
    ]


def call_parts(command, first=1.0):
    """A tool call; `first` weighs the choice to call."""
    return [
        ("<think>", 1),
        ("I need to see it.", first),
        ("</think>", 1),
        ("<tool_call>", 1),
        ('{"name": "imagine", "arguments": {"image":', 1),
        (f" {command['image']}", 1),
        (', "motion": "', 1),
        (command["kind"], 1),
        ('", "amount":', 1),
        (f" {command['amount']:g}", 1),
        ("}}", 1),
        ("</tool_call>", 1),
        ("<|im_end|>", 1),
    ]


def script(policy, lesson, kind, rng, calling=True):
    """Write one dialogue of the given kind -> Trajectory whose `loss_weights` say what is learned.

    calling   whether a look may include a call and its view (not for the baseline that never imagines)
    """
    question, given = lesson.question, len(lesson.images)
    mode = str(
        rng.choice(["forced", "agentic"] if kind in ("tool", "slip") else ["direct", "agentic"])
    )
    dialogue = Trajectory.start(policy, question, lesson.images, mode)

    def say(parts):
        tokens = [(policy.tokens(text), weight) for text, weight in parts]
        weights = [float(weight) for ids, weight in tokens for _ in ids]
        dialogue.say(policy, [i for ids, _ in tokens for i in ids], loss_weights=weights)

    choice = 1.0 if mode == "forced" else DECISION
    if kind == "direct":
        say(
            answer_parts(
                question,
                " the new view:" if question["needs_view"] else f" Image-{question['shown_by']}:",
            )
        )
    elif kind == "look" and (mode == "direct" or not calling):
        say(look_parts(rng, lesson.shows[:given]))
    else:
        if kind == "slip":
            say(call_parts(lesson.command | {"image": int(rng.integers(given + 1, 10))}, choice))
            dialogue.observe(policy)
        say(call_parts(lesson.command, {"tool": choice, "slip": 1.0, "look": 0.0}[kind]))
        dialogue.observe(policy, image=lesson.view)
        say(
            look_parts(rng, lesson.shows)
            if kind == "look"
            else answer_parts(question, f" Image-{given + 1}:")
        )
    dialogue.features = [lesson.features[pair] for pair in enumerate(map(id, dialogue.images), 1)]
    return dialogue


# ---------------------------------------------------------------- the loss of the cold start


def scripted_loss(policy, batch):
    """Weighted negative log-likelihood of the scripts.

    batch     from `collate`
    returns   sum of w (-log p): divide by the sum of w of the whole update, all ranks; and {"facts": (how many of the
              tokens that weigh FACT were right, how many there were)}
    """
    taught = batch.loss_weights > 0  # (B, L - 1)
    weights, targets = batch.loss_weights[taught], batch.targets[taught]  # (n,) each
    logits = policy.logits(
        policy.hidden(
            batch.ids, batch.positions, batch.mask, batch.features, batch.predecessors[taught]
        )
    )
    nll = F.cross_entropy(logits, targets, reduction="none")
    facts = weights == FACT
    right = ((logits.argmax(-1) == targets) & facts).sum().item()
    return (weights * nll).sum(), {"facts": (right, facts.sum().item())}


# ---------------------------------------------------------------- World2VLM


def shares(rows, lambdas):
    """What -log p of each answer counts in the loss: lambda of its direction times w over all w of that direction.

    rows      all questions of an update, whichever rank has them
    lambdas   {True: of the inverse questions, False: of the forward ones}
    """
    sums = Counter()
    for row in rows:
        sums[row["category"] in INVERSE] += row["weight"]
    return [
        lambdas[inverse] * row["weight"] / sums[inverse]
        for row in rows
        for inverse in [row["category"] in INVERSE]
    ]


def seen(policy, rows):
    """{(number, path): what the frozen tower makes of it} of all pictures: to look each time takes half of a step."""
    pairs = list(dict.fromkeys(pair for row in rows for pair in enumerate(row["images"], 1)))
    return dict(zip(pairs, policy.encode([(number, load_image(path)) for number, path in pairs])))


def answered(policy, row, features=None):
    """The dialogue in which the true answer to a question is given at once; features   of `seen`, if it was called."""
    dialogue = Trajectory.start(policy, row, [load_image(path) for path in row["images"]], "direct")
    dialogue.say(policy, f"<think></think><answer>{row['answer']}</answer>")
    dialogue.features = [features[pair] for pair in enumerate(row["images"], 1)] if features else []
    return dialogue


def answers_of_step(policy, rows, features, args, step, world):
    """This rank's share of the answers of one step in micro-batches, with their "share", "weight", "inverse" (B,).

    And 1, what the loss has to be divided by: the shares are of all ranks already.
    """
    asked = [rows[place] for place in rows_of_step(len(rows), args.batch, step, args.seed)]
    counts = shares(asked, {True: args.lambda_inv, False: args.lambda_fwd})
    mine = [
        (answered(policy, row, features), share, row["weight"], row["category"] in INVERSE)
        for row, share in list(zip(asked, counts))[world.rank :: world.size]
    ]
    mine.sort(key=lambda each: len(each[0].ids))  # neighbours of like length: little padding
    batches = []
    for i in range(0, len(mine), args.micro_batch):
        dialogues, *numbers = zip(*mine[i : i + args.micro_batch])
        numbers = (
            torch.tensor(each, dtype=torch.float32, device=policy.device) for each in numbers
        )
        numbers = dict(zip(("share", "weight", "inverse"), numbers, strict=True))
        batches.append((collate(policy, dialogues), numbers))
    return batches, 1.0


def answer_loss(policy, batch_and_numbers):
    """-log p(y | x), summed over the tokens of each answer, by `shares` -> (scalar, {metric: (sum, count)})."""
    batch, numbers = batch_and_numbers
    nll = -token_logprobs(policy, batch)[0].sum(1)  # (B,)
    weights = {
        "inverse": numbers["weight"] * numbers["inverse"],
        "forward": numbers["weight"] * (1 - numbers["inverse"]),
    }
    return (numbers["share"] * nll).sum(), {
        key: ((w * nll.detach()).sum().item(), w.sum().item()) for key, w in weights.items()
    }


def graded(rows, answers):
    """Answers (texts or None) to questions -> {task: {"reward": mean, "exact": share of full reward}}, of all ranks."""
    earned = {task: [] for task in TASKS}
    for row, answer in zip(rows, answers, strict=True):
        earned[row["category"]].append(world2vlm(row["category"], row["answer"], answer)["total"])
    return {
        task: common.global_means(
            {
                "reward": common.total(rewards),
                "exact": common.total([reward > FULL for reward in rewards]),
            }
        )
        for task, rewards in earned.items()
    }


def held_out(policy, rows, args, world):
    """Greedy answers to questions, each rank its share -> what `graded` makes of them; also printed."""
    mine = rows[world.rank :: world.size]
    with common.gathered(policy.model):
        dialogues = rollout(policy, mine, None, "direct", temperature=0.0, **ASKED[args.preset])
    table = graded(mine, [dialogue.answer for dialogue in dialogues])
    common.say(
        "held out, mean reward and share of perfect answers: "
        + ", ".join(
            f"{task} {means['reward']:.2f} {means['exact']:.2f}"
            for task, means in table.items()
            if means
        )
    )
    return table


# ---------------------------------------------------------------- the loop


def scripts_of_step(policy, lessons, moving, args, step, world):
    """This rank's share of the scripts of one step, in micro-batches, and the weight of all tokens of all ranks.

    The scripts depend on (seed, step, place) alone. `moving` are the lessons that name a motion.
    """
    done = min(1, max(0, (step / args.steps - MIXING[0]) / (MIXING[1] - MIXING[0])))
    shares = {
        kind: early + (late - early) * done for kind, (early, late) in LESSONS[args.lessons].items()
    }
    dialogues = []
    for place in range(world.rank, args.batch, world.size):
        rng = numpy_stream("script", args.seed, step, place)
        kind = str(
            rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values()))
        )
        known = moving if kind in ("tool", "slip") else lessons
        dialogues.append(
            script(policy, known[rng.integers(len(known))], kind, rng, calling="tool" in shares)
        )
    dialogues.sort(
        key=lambda dialogue: len(dialogue.ids)
    )  # neighbours of like length: little padding
    batches = [
        collate(policy, dialogues[i : i + args.micro_batch])
        for i in range(0, len(dialogues), args.micro_batch)
    ]
    return batches, common.global_sum(float(sum(batch.loss_weights.sum() for batch in batches)))


def open_policy(args, lessons, world):
    """The policy with a tower that sees: of --start, or a new one, taught (and kept for a resumed run)."""
    if args.start:
        policy = Policy.load(
            common.need(args.start, "python train_sft.py"), world.device, torch.float32
        )
    else:
        policy, taught = (
            Policy.tiny(args.seed, device=world.device),
            Path(args.out) / "training" / "tower.safetensors",
        )
        if common.is_main() and not taught.exists():
            teach_to_see(policy, lessons, args)
            with common.written_whole(taught.parent) as part:
                save_file(policy.vision.state_dict(), part / taught.name)
        common.wait_for_all()
        policy.vision.load_state_dict(load_file(taught))
    for lesson in lessons:
        pairs = [*enumerate(lesson.images, 1), (len(lesson.images) + 1, lesson.view)]
        lesson.features = {(n, id(image)): x for (n, image), x in zip(pairs, policy.encode(pairs))}
    return policy


def main(argv=None):
    """The stage: a policy with a frozen tower that sees, its lessons, and a step on each batch of them."""
    args = parse_args(argv)
    train, val = (Path(args.data) / f"questions_{part}.jsonl" for part in ("train", "val"))
    makes = f"python data.py world2vlm --out {args.data}"
    makes += " --anchors DIR --teacher out/wm-astra" if args.preset == "astra" else ""
    common.begin(
        f"train_sft --task {args.task}",
        args,
        NEUTRAL,
        () if args.task == "cold" else ((args.start, "python train_sft.py"), (train, makes)),
    )
    world, out, clock = common.setup(args.threads), Path(args.out), common.Clock()
    if args.batch % world.size:
        common.fail(
            f"--batch {args.batch} cannot be shared evenly by {world.size} processes; take a multiple of it."
        )
    if args.task == "cold":
        if common.is_main():
            from data import ensure  # it reaches for all kinds of data, which training does not

            ensure(args.data, ["questions", "mindcube"])
        common.wait_for_all()
        lessons, asked = [Lesson(question) for question in load_jsonl(train)], []
        policy = open_policy(args, lessons, world)
        moving = [lesson for lesson in lessons if lesson.question["motion"]]
        batches_of_step, loss_of = partial(scripts_of_step, policy, lessons, moving), scripted_loss
    else:
        rows, asked = load_jsonl(train), load_jsonl(val)[: args.eval_questions]
        rows = [
            row
            for row in rows
            if row["category"] in args.tasks
            and (args.lambda_inv if row["category"] in INVERSE else args.lambda_fwd)
        ]
        if not rows:
            common.fail(
                f"{train} has no question of the tasks {' '.join(args.tasks)} whose lambda is not 0."
            )
        if args.batch > len(rows):
            common.fail(
                f"A step asks no question twice: {train} has {len(rows)} of these tasks, --batch asks for "
                f"{args.batch}."
            )
        dtype = (
            torch.bfloat16 if args.lora and world.device.type == "cuda" else torch.float32
        )  # of what is frozen
        policy = Policy.load(args.start, world.device, dtype)
        features = (
            seen(policy, rows) if args.preset == "tiny" else None
        )  # of a real tower: too many to keep
        batches_of_step, loss_of = partial(answers_of_step, policy, rows, features), answer_loss
    policy.vision.requires_grad_(False)
    adapters = (
        add_lora(
            policy.model,
            args.lora,
            2 * args.lora,
            QWEN_LAYERS,
            args.seed,
            world.device,
            args.dropout,
        )
        if args.lora
        else []
    )
    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    model = common.shard(
        policy.model,
        policy.model.model.language_model.layers,
        world,
        ignored=[*policy.vision.parameters(), *adapters],
    )
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    tensors = checkpoints.training_tensors(model, optimizer)
    first, state = checkpoints.load_state(out / "training", tensors) or (0, {})
    log, clock.before = common.MetricLog(out / "log.jsonl", first), state.get("clock", clock.before)
    model.train()

    with common.Interrupt() as stop:
        for step in (
            bar := common.progress(args.steps, first, f"sft, {args.lessons or args.task}")
        ):
            held = {"eval": held_out(policy, asked, args, world)} if asked and step == 0 else {}
            rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
            common.set_rate(optimizer, rate)
            if args.lora:
                torch.manual_seed(stream_seed("dropout", args.seed, step, world.rank))
            batches, total = batches_of_step(args, step, world)
            sums = defaultdict(lambda: [0.0, 0.0])  # {metric: [sum, count]} of this rank
            sums["loss"][1] = total / world.size
            for batch in batches:
                loss, parts = loss_of(policy, batch)
                (loss / total).backward()  # a local sum over a global count
                for key, (number, count) in {"loss": (loss.item(), 0), **parts}.items():
                    sums[key][0] += number
                    sums[key][1] += count
            common.sum_gradients(model.parameters())  # of adapters; FSDP sums its own
            norm = common.clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means = common.global_means(sums)
            log.write(step, **means, grad_norm=norm, lr=rate, **held)
            bar.set_postfix({key: f"{value:.2f}" for key, value in means.items()})
            stop.save_or_leave(
                step + 1,
                args,
                lambda: checkpoints.save_state(
                    out / "training", step + 1, tensors, {"clock": clock.read()}
                ),
            )

    if asked:
        log.write(args.steps, eval=held_out(policy, asked, args, world))
    own = {name for name, _ in model.named_parameters()}  # tied weights have one name here
    weights = checkpoints.whole((name, tensor) for name, tensor in merged(model) if name in own)
    if common.is_main():
        with common.written_whole(out) as part:
            policy.save(part, weights)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
