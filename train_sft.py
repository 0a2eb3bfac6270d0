"""
The cold start of a tiny policy: supervised learning of scripted dialogues, from random weights.

  CPU        python train_sft.py                                          # out/data -> out/sft
  baseline   python train_sft.py --lessons direct --start out/sft --out out/direct    # never imagines
  resume     the same command

A pretrained Qwen3-VL needs none of it and starts with train_rl.py, as in the paper. A tiny policy knows neither colours
nor letters. First its vision tower learns to see, by a linear probe of exact facts (`teach_to_see`); then it is frozen,
as in the paper, and the language model learns from scripts by a plain supervised loop:

  loss = sum_j w_j (-log p(token_j)) / sum_j w_j      over the tokens that the policy writes in the scripts

  look     "largest in Image-3: red. left third of Image-1: none. …": perception, in the layout of real dialogues
  search   "red is in Image-1: none Image-2: -30 Image-3: none Image-4: none. …": how many degrees off the middle
  ring     "behind you Image-2: Image-4: …": from which image one turns, if what Image-2 shows is to be behind one
  direct   <think>largest in Image-3: red</think><answer> red</answer>, with and without the tool in the prompt;
           where the view is not given it has to guess what "the new view" would show
  tool     the calls, each imagined view as the next image (here the true one), then reading it and answering
  slip     a tool script that first calls with an impossible image, reads what is wrong, and repairs the call

"Turn until the red object is behind you" names no image and no angle. The thought then scans the images for red, names
the one that shows it, then the one to turn from. Each word of it is one look-up: a thought that jumps over one of these
steps is not learned in minutes.

There are as many tool scripts (slips included) as direct ones, all about questions with a motion. But whether to
call is a choice that reinforcement learning is to find: where both are open the first word of a tool script counts
less (DECISION), so that the cold start ends with few calls, and slips leave some of those invalid. Tokens that name
what is looked for (NAMED) or carry a fact (FACT) count more. The answer is the option's words: to turn a word into its
letter is one more look-up that a small transformer does not learn in minutes.

Out: the policy, done.json, log.jsonl. Per step: loss; facts, the share of fact tokens that are right; grad_norm; lr.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lib.checkpoints import TrainingState, training_tensors
from lib.dialogue import Trajectory
from lib.distributed import (
    Means,
    World,
    clip_gradients,
    fail,
    global_sum,
    is_main,
    progress,
    setup,
    shard,
    wait_for_all,
)
from lib.images import load_image, soften
from lib.protocol import as_words, call_text
from lib.questions import ASKS, RELATIONS, STEP
from lib.records import Question, load_jsonl, whole_folder
from lib.rooms import COLOURS
from lib.stage import (
    Flag,
    Interrupt,
    begin,
    finish,
    parse_flags,
    run_stage,
)
from lib.streams import cosine, numpy_stream, set_learning_rate, stream_seed
from policy import DialogueBatch, Policy, collate
from rewards import name_gold

FACT = 4.0  # weights of tokens; every other scripted token counts 1
NAMED = 3.0
NOWHERE = 1.5  # that an object is not in an image: said three times as often as where it is
DECISION = 0.6
ASK_WORDS = {
    "largest": "largest in",
    "leftmost": "furthest left in",
    "rightmost": "furthest right in",
    "left": "left third of",
    "centre": "centre third of",
    "right": "right third of",
}
FACT_WORDS = [*COLOURS, "none"]  # what a fact can say
ANGLES = range(-45, 46, STEP)  # of an object from the middle of an image, degrees
LESSONS = {  # share of each kind of script: at first, and when it is mixed
    "all": {
        "look": (0.50, 0.12),
        "search": (0.50, 0.20),
        "ring": (0.0, 0.08),
        "direct": (0.0, 0.30),
        "tool": (0.0, 0.24),
        "slip": (0.0, 0.06),
    },
    "direct": {"look": (0.10, 0.10), "search": (0.15, 0.15), "direct": (0.75, 0.75)},
}
LESSON_KEYS = (  # of a question: lessons are about rooms
    *("id", "images", "question", "options", "answer", "category", "needs_view", "scene"),
    *("ask", "named", "relation", "shown_by", "ideal", "views", "shows"),
)
MIXING = (0.25, 0.4)  # the shares change between these points of the run
BETAS = (0.9, 0.95)  # of AdamW, as its weight decay
WEIGHT_DECAY = 0.01

FLAGS = [  # a pretrained policy needs no cold start: there is no astra preset
    Flag("--data", "out/data", None, "folder of questions_train.jsonl"),
    Flag("--out", "out/sft", None, "folder of the policy"),
    Flag("--start", None, None, "a policy that sees; default: random weights, and see first"),
    # these change the numbers
    Flag(
        "--lessons",
        "all",
        None,
        "all: a tool user; direct: the baseline that never imagines",
        choices=tuple(LESSONS),
    ),
    Flag("--seed", 0, None, "of weights and scripts"),
    Flag("--see-steps", 700, None, "updates of the vision tower, 128 images each", 1),
    Flag("--steps", 1600, None, "updates of the language model", 1),
    Flag("--batch", 32, None, "dialogues per update, all ranks together", 1),
    Flag("--lr", 1.5e-3, None, "AdamW peak learning rate", 0),
    Flag("--warmup", 20, None, "steps to the peak", 0),
    Flag("--lr-floor", 0.03, None, "share of the peak that the cosine ends at", 0, 1),
    # memory, speed and safety only
    Flag("--micro-batch", 8, None, "dialogues per forward pass and rank", 1, neutral=True),
    Flag("--save-every", 50, None, "steps between checkpoints", 1, neutral=True),
    Flag("--threads", None, None, "CPU threads per process", 1, kind=int, neutral=True),
]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    args = parse_flags(__doc__, FLAGS, argv)
    if args.preset == "astra":
        args.parser.error(
            "--preset astra: a pretrained policy needs no cold start; it begins with train_rl.py"
        )
    return args


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """A policy with a frozen tower that sees, and a step on each batch of scripts."""
    args = parse_args(argv)
    file = Path(args.data) / "questions_train.jsonl"
    needs = [(file, f"python data.py --out {args.data}")]
    if args.start:
        needs.append((args.start, "python train_sft.py"))
    world = setup(args.threads)
    begin("train_sft", args, FLAGS, needs)
    if args.batch % world.size:
        fail(
            f"--batch {args.batch} cannot be shared evenly by {world.size} processes; take a multiple of it."
        )
    out = Path(args.out)
    questions = load_jsonl(file, Question, name_gold, LESSON_KEYS)
    if not any(question["ideal"] for question in questions):
        fail(f"{file} has no question that takes a call; `python data.py questions` makes some.")
    lessons = [Lesson.load(question) for question in questions]
    policy = policy_that_sees(args, lessons, world)
    policy.vision.requires_grad_(False)
    for lesson in lessons:
        lesson.features = policy.encode(list(enumerate(lesson.images, 1)))
    families = by_family(lessons)
    moving_families = by_family([lesson for lesson in lessons if lesson.question["ideal"]])

    layers = policy.model.model.language_model.layers
    model = shard(policy.model, layers, world, ignored=policy.vision.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    training = TrainingState(out, training_tensors(model, optimizer))
    model.train()

    bar = progress(args.steps, training.start, f"sft, {args.lessons}")
    with Interrupt() as stop:
        for step in bar:
            lr = set_learning_rate(optimizer, step, args)
            scripts = scripts_of_step(policy, families, moving_families, args, step, world)
            batches = []
            for start in range(0, len(scripts), args.micro_batch):
                batches.append(collate(policy, scripts[start : start + args.micro_batch]))
            total = global_sum(float(sum(batch.loss_weights.sum() for batch in batches)))

            means = Means(("loss", "facts"))
            for batch in batches:
                result = supervised_loss(policy, batch)
                (result.loss / total).backward()  # a local sum over a global count
                means.add("loss", result.loss.item(), batch.loss_weights.sum().item())
                is_fact = batch.loss_weights == FACT
                means.add("facts", (result.correct & is_fact).sum().item(), is_fact.sum().item())
            grad_norm = clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            metrics = means.read()
            training.log.write(step, **metrics, grad_norm=grad_norm, lr=lr)
            bar.set_postfix({key: f"{value:.2f}" for key, value in metrics.items()})
            stop.save_or_leave(step + 1, args, training.save)

    with whole_folder(out) as part:
        policy.save(part)
    finish(out, args.steps, training.clock)


class SupervisedLoss(NamedTuple):
    """What `supervised_loss` returns of a batch of B dialogues of up to L tokens."""

    loss: torch.Tensor  # scalar, differentiable: sum of w (-log p)
    nll: torch.Tensor  # (B, L - 1) -log p of each token, without gradient; 0 where w is 0
    correct: torch.Tensor  # (B, L - 1) bool: the token is the most likely one; False where w is 0


def supervised_loss(policy: Policy, batch: DialogueBatch) -> SupervisedLoss:
    """Negative log-likelihood, weighted per token by `batch.loss_weights` and *summed*.

    Divide by the sum of the weights of the whole update, all ranks, or let the weights themselves sum to 1.
    """
    weighted = batch.loss_weights > 0  # (B, L - 1)
    places = batch.predecessors[weighted]
    hidden = policy.hidden(batch.ids, batch.positions, batch.mask, batch.features)
    logits = policy.logits(hidden.flatten(0, 1)[places])  # (n, vocabulary), n tokens with a weight
    targets = batch.targets[weighted]
    nll = F.cross_entropy(logits, targets, reduction="none")  # (n,)
    loss = (batch.loss_weights[weighted] * nll).sum()
    correct = logits.argmax(-1) == targets
    return SupervisedLoss(
        loss,
        torch.zeros_like(batch.loss_weights).masked_scatter(weighted, nll.detach()),
        torch.zeros_like(weighted).masked_scatter(weighted, correct),
    )


# ---- lessons ---------------------------------------------------------------------------------------------------------


@dataclass
class Lesson:
    """A question with its pictures, and what each of them shows, exactly."""

    question: dict  # records.Question of a room
    images: list[np.ndarray]  # those of the question, then the views that its ideal calls lead to
    shows: list[dict]  # the facts of each
    features: list[torch.Tensor] | None = None  # what the frozen tower makes of each

    @classmethod
    def load(cls, question: dict) -> "Lesson":
        """Read the pictures; the true views become as soft as imagined ones."""
        images = [load_image(path) for path in question["images"]]
        rng = numpy_stream("soft view", question["scene"]["room"], question["id"])
        for path in question["views"]:
            images.append(soften(load_image(path), rng))
        return cls(question, images, question["shows"])


# ---- first the tower learns to see -----------------------------------------------------------------------------------


def policy_that_sees(args: Namespace, lessons: list[Lesson], world: World) -> Policy:
    """A policy with a tower that sees: --start, or a new one that is taught (once: a resumed run reads the tower)."""
    if args.start:
        return Policy.load(args.start, world.device, torch.float32)
    policy = Policy.tiny(args.seed, device=world.device)
    tower = Path(args.out) / "training" / "tower.safetensors"
    if is_main() and not tower.exists():
        teach_to_see(policy, lessons, args.see_steps, args.seed)
        with whole_folder(tower.parent) as part:
            save_file(policy.vision.state_dict(), part / tower.name)
    wait_for_all()
    policy.vision.load_state_dict(load_file(tower))
    return policy


def teach_to_see(policy: Policy, lessons: list[Lesson], steps: int, seed: int) -> None:
    """Train the vision tower alone: linear probes must find every fact and the number of the image in its tokens.

    The mean of an image's tokens has to tell who is largest, leftmost, …, and where each colour stands; each token has
    to tell the number stamped on the image. (Measured, one core: .93 of the facts after 60 CPU-s; learned through the
    language model, which cannot speak yet, .5 after 80.) At the end the last layer is scaled so that image tokens are
    as large as words.
    """
    batch = 128
    tower = policy.vision
    width = policy.model.config.text_config.hidden_size
    images = [image for lesson in lessons for image in lesson.images]
    shows = [facts for lesson in lessons for facts in lesson.shows]
    fact_table = torch.tensor([fact_labels(facts) for facts in shows], device=policy.device)
    angle_table = torch.tensor([angle_labels(facts) for facts in shows], device=policy.device)
    angle_weights = torch.ones(len(ANGLES) + 1, device=policy.device)
    angle_weights[-1] = 0.25  # absent: five of eight colours
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("weights", seed, "probes"))
        fact_probe = nn.Linear(width, len(ASKS) * len(FACT_WORDS)).to(policy.device)
        number_probe = nn.Linear(width, 9).to(policy.device)
        angle_probe = nn.Linear(width, len(COLOURS) * len(angle_weights)).to(policy.device)
    trainable = [*tower.parameters()]
    for probe in (fact_probe, number_probe, angle_probe):
        trainable += probe.parameters()
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, betas=BETAS, weight_decay=WEIGHT_DECAY)
    bar = progress(steps, 0, "learning to see")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * cosine(step, steps, 20, 0.05)
        rng = numpy_stream("tower", seed, step)
        chosen = rng.integers(len(images), size=batch)
        few = rng.random(batch) < 0.8  # as in most dialogues
        numbers = np.where(few, rng.integers(1, 6, batch), rng.integers(1, 10, batch))
        stamped = [(int(n), images[i]) for n, i in zip(numbers, chosen, strict=True)]
        patches, grids = policy.pixels(stamped)
        tokens = tower(patches, grid_thw=grids).pooler_output.view(batch, -1, width)

        fact_logits = fact_probe(tokens.mean(1)).view(batch, len(ASKS), len(FACT_WORDS))
        true_facts = fact_table[chosen]  # (batch, asks)
        angle_logits = angle_probe(tokens.mean(1)).view(batch, len(COLOURS), -1)
        true_angles = angle_table[chosen]  # (batch, colours)
        true_numbers = torch.from_numpy(numbers - 1).to(policy.device)
        true_numbers = true_numbers.repeat_interleave(tokens.shape[1])  # (batch * tokens,)
        loss = F.cross_entropy(fact_logits.flatten(0, 1), true_facts.flatten())
        loss += F.cross_entropy(number_probe(tokens).flatten(0, 1), true_numbers)
        loss += 2 * F.cross_entropy(
            angle_logits.flatten(0, 1), true_angles.flatten(), angle_weights
        )
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            facts_right = (fact_logits.argmax(-1) == true_facts)[true_facts >= 0].float().mean()
            present = true_angles < len(ANGLES)
            angles_right = (angle_logits.argmax(-1) == true_angles)[present].float().mean()
            bar.set_postfix(facts=f"{facts_right:.2f}", angles=f"{angles_right:.2f}")
    size = tokens.norm(dim=-1).mean().item()
    for parameter in tower.merger.linear_fc2.parameters():
        parameter.data.div_(size)


def fact_labels(facts: dict) -> list[int]:
    """The facts of an image as indices into FACT_WORDS, per key of ASKS; -100, which the loss ignores, where there is none."""
    return [-100 if facts[ask] is None else FACT_WORDS.index(facts[ask]) for ask in ASKS]


def angle_labels(facts: dict) -> list[int]:
    """Where an image shows each of COLOURS: the index into ANGLES, the number of them where it does not."""
    present = {colour: ANGLES.index(angle) for colour, angle in facts["angle"].items()}
    return [present.get(colour, len(ANGLES)) for colour in COLOURS]


# ---- scripts: turns as (text, weight of its tokens in the loss) ------------------------------------------------------


def look_texts(rng: np.random.Generator, shows: list[dict]) -> list[tuple[str, float]]:
    """Statements about random images: only the colours count, what is looked at is drawn and not learned."""
    turn = []
    for _ in range(12):
        number = int(rng.integers(len(shows)))
        ask = str(rng.choice(list(ASKS)))
        fact = shows[number][ask]
        if fact is not None:
            turn += [(f"{ASK_WORDS[ask]} Image-{number + 1}:", 0), (f" {fact}", FACT), (". ", 0)]
    return turn


def search_texts(colour: str, shows: list[dict], own: float = 1) -> list[tuple[str, float]]:
    """Image by image where an object is: degrees off the middle, to the right above zero. `own`: the other words."""
    texts = [(f" {colour}", own), (" is in", own)]
    for number, facts in enumerate(shows, 1):
        angle = facts["angle"].get(colour)
        texts.append((f" Image-{number}:", own))
        texts.append((" none", NOWHERE) if angle is None else (f" {angle or 'centre'}", FACT))
    return [*texts, (".", own)]


def searches(rng: np.random.Generator, shows: list[dict]) -> list[tuple[str, float]]:
    """Where objects are; which ones is drawn and not learned."""
    texts = []
    for colour in rng.permutation(list(COLOURS))[:4]:
        texts += search_texts(str(colour), shows, own=0)
    return texts


def ring_texts(relation: str, found: int, start: int, own: float = 1) -> list[tuple[str, float]]:
    """What `Image-found` shows is to be `relation`: one turns from `Image-start`."""
    return [(f" {relation}", own), (f" Image-{found}:", own), (f" Image-{start}:", FACT)]


def rings(rng: np.random.Generator) -> list[tuple[str, float]]:
    """How the views of a ring lie to each other, in words alone."""
    texts = []
    for _ in range(14):
        relation = str(rng.choice(list(RELATIONS)))
        found = int(rng.integers(4))
        start = (found + RELATIONS[relation][0]) % 4
        texts += [*ring_texts(relation, found + 1, start + 1, own=0), (".", 0)]
    return texts


def finding_texts(lesson: Lesson) -> list[tuple[str, float]]:
    """The thought that finds the image to turn from; none where the question names it."""
    question = lesson.question
    if question["named"] is None:
        return []
    shows = lesson.shows[: len(question["images"])]
    found = next(n for n, facts in enumerate(shows, 1) if question["named"] in facts["angle"])
    start = question["shown_by"] or question["ideal"][0]["reference_image"]
    texts = search_texts(question["named"], shows)
    return [*texts, *ring_texts(question["relation"], found, start), (" ", 1)]


def answer_texts(question: dict, view: str) -> list[tuple[str, float]]:
    """The thought that names what is asked, of which view, and what it shows; then the answer."""
    option = question["options"]["ABCD".index(question["answer"])]
    words = as_words(option.split(". ")[1])
    thought = f"{ASK_WORDS[question['ask']]} {view}:"
    rest = f"</think><answer> {words}</answer><|im_end|>"
    return [(thought, NAMED), (f" {words}", FACT), (rest, 1)]


def call_texts(command: dict, decision: float = 1.0) -> list[tuple[str, float]]:
    """A tool call; `decision` weighs the choice to call."""
    return [("I need to see it.", decision), (f"</think>{call_text(command)}<|im_end|>", 1)]


def script(
    policy: Policy, lesson: Lesson, kind: str, rng: np.random.Generator, calling: bool = True
) -> Trajectory:
    """Write one dialogue of a kind of LESSONS.

    calling   whether a look may include a call and its view (not for the baseline that never imagines)
    """
    question = lesson.question
    given = len(question["images"])
    views = lesson.images[given:]
    modes = ["forced", "agentic"] if kind in ("tool", "slip") else ["direct", "agentic"]
    mode = str(rng.choice(modes))
    decision = 1.0 if mode == "forced" else DECISION
    dialogue = Trajectory.start(policy, question, lesson.images[:given], mode)

    def write(turn):
        ids, weights = [], []
        for text, weight in turn:
            tokens = policy.encode_text(text)
            ids += tokens
            weights += [float(weight)] * len(tokens)
        dialogue.add_turn(policy, ids, loss_weights=weights)

    thought = [("<think>", 1), *finding_texts(lesson)]
    if kind == "direct":
        name = "the new view" if question["needs_view"] else f"Image-{question['shown_by']}"
        write([*thought, *answer_texts(question, name)])
    elif kind == "look":
        if calling and mode == "agentic" and views:
            write([("<think>", 0), *call_texts(question["ideal"][0], decision=0.0)])
            dialogue.observe(policy, image=views[0])
        write(look_texts(rng, lesson.shows[: len(dialogue.images)]))
    elif kind == "search":
        write(searches(rng, lesson.shows[:given]))
    elif kind == "ring":
        write(rings(rng))
    else:
        if kind == "slip":
            wrong = int(rng.integers(given + 1, 10))
            impossible = question["ideal"][0] | {"reference_image": wrong}
            write([*thought, *call_texts(impossible, decision)])
            dialogue.observe(policy)
            decision = 1.0  # it is made: what follows repairs it
            thought = [("<think>", 1)]
        for call, view in zip(question["ideal"], views, strict=True):
            write([*thought, *call_texts(call, decision)])
            dialogue.observe(policy, image=view)
            thought = [("<think>", 1)]
        write([*thought, *answer_texts(question, f"Image-{len(dialogue.images)}")])
    dialogue.features = lesson.features[: len(dialogue.images)]
    return dialogue


def by_family(lessons: list[Lesson]) -> list[list[Lesson]]:
    """The lessons of each family of questions, in the order in which the families appear."""
    families = {}
    for lesson in lessons:
        families.setdefault(lesson.question["category"], []).append(lesson)
    return list(families.values())


def scripts_of_step(
    policy: Policy,
    families: list[list[Lesson]],
    moving_families: list[list[Lesson]],
    args: Namespace,
    step: int,
    world: World,
) -> list[Trajectory]:
    """This rank's share of the scripts of one step, by length: neighbours are padded little.

    families, moving_families   of all lessons, and of those that have calls to make
    A script depends on (seed, step, number in the batch) alone.
    """
    begin_mixing, end_mixing = MIXING
    mixed = (step / args.steps - begin_mixing) / (end_mixing - begin_mixing)
    mixed = min(1, max(0, mixed))
    kinds = list(LESSONS[args.lessons])
    shares = [early + (late - early) * mixed for early, late in LESSONS[args.lessons].values()]
    scripts = []
    for number in range(world.rank, args.batch, world.size):
        rng = numpy_stream("script", args.seed, step, number)
        kind = str(rng.choice(kinds, p=np.array(shares) / sum(shares)))
        # whatever their numbers, every family counts the same
        choice = moving_families if kind in ("tool", "slip") else families
        family = choice[rng.integers(len(choice))]
        lesson = family[rng.integers(len(family))]
        scripts.append(script(policy, lesson, kind, rng, calling="tool" in kinds))
    return sorted(scripts, key=lambda dialogue: len(dialogue.ids))


if __name__ == "__main__":
    run_stage(main)
