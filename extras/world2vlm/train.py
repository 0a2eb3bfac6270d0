"""
World2VLM's first stage (arXiv 2604.26934): a policy that sees learns from questions about what a camera motion shows.

  CPU        python -m extras.world2vlm.train                             # out/sft, out/world2vlm -> out/w2v
  8 GPUs     torchrun --standalone --nproc_per_node 8 -m extras.world2vlm.train --preset astra
                                                                          # Qwen3-VL-8B, out/taught -> out/w2v-astra
  resume     the same command

It learns to answer <think></think><answer>move left 0.5 meters</answer>, without any tool:

  loss = lambda_inv L_inv + lambda_fwd L_fwd,     L = sum_i w_i (-log p(y_i | x_i)) / sum_i w_i

over the questions i of a direction (inverse: A1 A2 A3 D3; forward: the others) in one update; y_i is all that the
policy writes, w_i what the teacher's picture is worth. The paper says nothing of w and gives no lambdas; its code mixes
both directions, which is 1 and 1 but for the number of questions and tokens of each. The published policy is a
Qwen2.5-VL-7B, ours a Qwen3-VL: the protocol and Astra's runs are of that family. Rank, alpha and dropout of the adapters
are the paper's, all else of the astra preset is its released code's.

A tiny policy has never compared two pictures. Turns alone teach that in minutes; of all tasks at once it has learned
only formats by then. So three runs, each with --start from the one before: --tasks A2 (400 steps), --tasks A1 A2 (500),
all (600 and more).

Out: the policy, done.json, log.jsonl. Per step: loss; inverse and forward, L_inv and L_fwd in nats per answer; eval, on
questions_val.jsonl before and after: mean rewards per task (evaluate.py).
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch

from extras.lora import QWEN_LAYERS, add_lora, merged
from extras.world2vlm.evaluate import held_out_means
from extras.world2vlm.words import INVERSE, TASKS
from lib.checkpoints import TrainingState, training_tensors
from lib.dialogue import Trajectory
from lib.distributed import (
    Means,
    World,
    clip_gradients,
    fail,
    progress,
    setup,
    shard,
    sum_gradients,
)
from lib.images import load_image, with_pictures
from lib.protocol import as_words
from lib.records import Question, load_jsonl, whole_folder
from lib.stage import (
    Flag,
    Interrupt,
    begin,
    finish,
    parse_flags,
    run_stage,
)
from lib.streams import rows_of_step, set_learning_rate, stream_seed
from policy import Policy, collate
from train_sft import BETAS, supervised_loss

FLAGS = [  # 797 steps of 128: one epoch of the paper's 102,066 questions
    Flag("--data", "out/world2vlm", "out/taught", "folder of questions_{train,val}.jsonl"),
    Flag("--start", "out/sft", "Qwen/Qwen3-VL-8B-Instruct", "policy to start from"),
    Flag("--out", "out/w2v", "out/w2v-astra", "folder of the policy"),
    # these change the numbers
    Flag("--seed", 0, 0, "of the order of questions, adapters and dropout"),
    Flag("--tasks", list(TASKS), list(TASKS), "only these, such as A2 first", choices=TASKS),
    Flag("--lambda-inv", 1.0, 1.0, "of the inverse questions; 0: none are asked", 0),
    Flag("--lambda-fwd", 1.0, 1.0, "of the forward questions; 0: none are asked", 0),
    Flag("--steps", 800, 797, "updates", 1),
    Flag("--batch", 32, 128, "questions per update, all ranks together", 1),
    Flag("--lr", 1.5e-3, 1e-5, "AdamW peak learning rate", 0),
    Flag("--warmup", 20, 40, "steps to the peak", 0),
    Flag("--lr-floor", 0.03, 0.0, "share of the peak that the cosine ends at", 0, 1),
    Flag("--weight-decay", 0.01, 0.1, "of AdamW", 0),
    Flag("--lora", 0, 256, "rank of the adapters, alpha is twice that; 0: all weights learn", 0),
    Flag("--dropout", 0.0, 0.05, "of the adapters (another for another --micro-batch)", 0, 0.99),
    Flag("--eval-questions", 200, 200, "held out, before and after; 0: none", 0),
    Flag("--max-new-tokens", 64, 256, "per held-out answer", 1),
    # memory, speed and safety only
    Flag("--rows", 64, 8, "held-out questions at once", 1, neutral=True),
    Flag("--micro-batch", 8, 8, "answers per forward pass and rank", 1, neutral=True),
    Flag("--gradient-checkpointing", False, True, "recompute activations", neutral=True),
    Flag("--save-every", 50, 40, "steps between checkpoints", 1, neutral=True),
    Flag("--threads", None, None, "CPU threads per process", 1, kind=int, neutral=True),
]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    args = parse_flags(__doc__, FLAGS, argv)
    if not args.lambda_inv and not args.lambda_fwd:
        args.parser.error("nothing is learned where both lambdas are 0")
    return args


def main(argv: list[str] | None = None) -> None:
    """The answers of a step, their loss, its gradient, a step of AdamW; and again."""
    args = parse_args(argv)
    needs = [
        (args.start, "python train_sft.py"),
        (
            Path(args.data, "questions_train.jsonl"),
            f"python -m extras.world2vlm.questions --out {args.data}",
        ),
    ]
    world, out = setup(args.threads), Path(args.out)
    begin("world2vlm train", args, FLAGS, needs)
    rows, held_out = questions_to_learn(args, world)
    lora_on_gpu = args.lora and world.device.type == "cuda"
    frozen_type = torch.bfloat16 if lora_on_gpu else torch.float32
    policy = Policy.load(args.start, world.device, frozen_type)
    policy.vision.requires_grad_(False)
    # half of a tiny step is to look; of a real tower there is too much to keep
    features = encode_pictures(policy, rows) if args.preset == "tiny" else {}

    adapters = []
    if args.lora:
        adapters = add_lora(
            policy.model, QWEN_LAYERS, args.lora, args.seed, world.device, args.dropout
        )
    if args.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
    layers = policy.model.model.language_model.layers
    model = shard(policy.model, layers, world, ignored=[*policy.vision.parameters(), *adapters])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=args.lr, betas=BETAS, weight_decay=args.weight_decay, fused=True
    )
    training = TrainingState(out, training_tensors(model, optimizer))
    model.train()

    with Interrupt() as stop:
        for step in (bar := progress(args.steps, training.start, "world2vlm")):
            metrics = {"lr": set_learning_rate(optimizer, step, args)}
            if step == 0 and held_out:
                metrics["eval"] = held_out_means(policy, held_out, args, world)
            torch.manual_seed(stream_seed("dropout", args.seed, step, world.rank))
            answers = answers_of_step(policy, rows, features, args, step, world)
            losses = accumulate_gradient(policy, answers, args.micro_batch, world)
            sum_gradients(adapters)  # FSDP sums those of all else
            metrics["grad_norm"] = clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            training.log.write(step, **losses, **metrics)
            bar.set_postfix({key: f"{value:.2f}" for key, value in losses.items()})
            stop.save_or_leave(step + 1, args, training.save)

    if held_out:
        training.log.write(args.steps, eval=held_out_means(policy, held_out, args, world))
    with whole_folder(out) as part:
        policy.save(part, merged(model))
    finish(out, args.steps, training.clock)


# ---- the loss -------------------------------------------------------------------------------------------------------


def accumulate_gradient(
    policy: Policy, answers: list[Trajectory], micro_batch: int, world: World
) -> dict[str, float]:
    """Add this rank's part of the gradient -> {"loss", "inverse", "forward"} of all ranks."""
    means = Means(("loss", "inverse", "forward"))
    means.add("loss", 0.0, 1 / world.size)  # the loss weights of all ranks make one loss
    for start in range(0, len(answers), micro_batch):
        chunk = answers[start : start + micro_batch]
        result = supervised_loss(policy, collate(policy, chunk))
        result.loss.backward()
        means.add("loss", result.loss.item(), 0)
        for answer, nll in zip(chunk, result.nll.sum(1).tolist(), strict=True):
            weight = answer.question["weight"]
            means.add(direction_of(answer.question), weight * nll, weight)
    return means.read()


def lambdas_of(args: Namespace) -> dict[str, float]:
    """{direction: its lambda}."""
    return {"inverse": args.lambda_inv, "forward": args.lambda_fwd}


def direction_of(row: dict) -> str:
    """ "inverse" or "forward"."""
    return "inverse" if row["category"] in INVERSE else "forward"


def loss_shares(rows: list[dict], lambdas: dict[str, float]) -> list[float]:
    """What -log p of each answer counts: lambda of its direction times w over all w of that direction.

    rows   all questions of an update, whichever rank has them
    """
    sums = Counter()
    for row in rows:
        sums[direction_of(row)] += row["weight"]
    directions = map(direction_of, rows)
    return [lambdas[d] * row["weight"] / sums[d] for d, row in zip(directions, rows, strict=True)]


# ---- questions and answers ------------------------------------------------------------------------------------------


def questions_to_learn(args: Namespace, world: World) -> tuple[list[dict], list[dict]]:
    """The questions of --tasks whose lambda is not 0, and the held-out ones; a sentence where there are too few."""
    file, lambdas = Path(args.data, "questions_train.jsonl"), lambdas_of(args)
    rows = [row for row in load_jsonl(file, Question) if row["category"] in args.tasks]
    rows = with_pictures([row for row in rows if lambdas[direction_of(row)]])
    if args.batch % world.size:
        fail(
            f"--batch {args.batch} cannot be shared evenly by {world.size} processes; take a multiple of it."
        )
    if not rows:
        fail(f"{file} has no question of the tasks {' '.join(args.tasks)} whose lambda is not 0.")
    if args.batch > len(rows):
        fail(
            f"A step asks no question twice: {file} has {len(rows)} of these tasks, --batch asks for {args.batch}."
        )
    held_out = with_pictures(load_jsonl(Path(args.data, "questions_val.jsonl"), Question))
    return rows, held_out[: args.eval_questions]


def encode_pictures(policy: Policy, rows: list[dict]) -> dict[tuple[int, str], torch.Tensor]:
    """{(number, path): what the frozen tower makes of it} of all pictures."""
    pairs = list(dict.fromkeys(pair for row in rows for pair in enumerate(row["images"], 1)))
    images = [(number, load_image(path)) for number, path in pairs]
    return dict(zip(pairs, policy.encode(images), strict=True))


def true_answer(policy: Policy, row: dict, features: dict, share: float = 1.0) -> Trajectory:
    """The dialogue in which the true answer is given at once; `share` is the loss weight of each of its tokens."""
    images = [load_image(path) for path in row["images"]]
    dialogue = Trajectory.start(policy, row, images, "direct")
    dialogue.add_turn(policy, f"<think></think><answer>{as_words(str(row['answer']))}</answer>")
    dialogue.loss_weights = [share * weight for weight in dialogue.loss_weights]
    if features:
        dialogue.features = [features[pair] for pair in enumerate(row["images"], 1)]
    return dialogue


def answers_of_step(
    policy: Policy, rows: list[dict], features: dict, args: Namespace, step: int, world: World
) -> list[Trajectory]:
    """This rank's answers of one step; the loss weights of all ranks together make the loss."""
    batch = [rows[index] for index in rows_of_step(len(rows), args.batch, step, args.seed)]
    pairs = list(zip(batch, loss_shares(batch, lambdas_of(args)), strict=True))
    mine = pairs[world.rank :: world.size]
    answers = [true_answer(policy, row, features, share) for row, share in mine]
    return sorted(answers, key=lambda answer: len(answer.ids))  # of like length: little padding


if __name__ == "__main__":
    run_stage(main)
