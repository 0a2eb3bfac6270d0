"""
World2VLM's second stage (arXiv 2604.26934): GRPO on questions about camera motions, with the rewards of rewards.py.

  CPU, 4 min   python -m extras.world2vlm.train_rl                        # out/w2v, out/world2vlm -> out/w2v-rl
  4 GPUs       torchrun --standalone --nproc_per_node 4 -m extras.world2vlm.train_rl --preset astra
  resume       the same command

The steps and their words are train_rl.py's: sample, score, advantage, logprob, update. There is no tool, no simulator
and one phase. Group, KL and lr are the paper's, the clip is the default of the framework that ran it, the rest its
released code's, which took 4 GPUs (more take more --questions). Not as released: groups whose rewards are all equal are
left out, weight decay is 0 instead of 0.01, there is no second clip of large ratios, and all questions are asked instead
of 125 of each task.

Out: the policy, log.jsonl, done.json. Log keys are train_rl.py's; "A1_total" and so on are mean rewards per task and
their parts (evaluate.py), of the rollouts of a step, and in "eval" of greedy answers to held-out questions.
"""

from argparse import Namespace
from pathlib import Path

import torch

from extras.world2vlm.evaluate import answer_record, held_out_means, task_means
from lib.checkpoints import TrainingState, training_tensors
from lib.dialogue import Trajectory
from lib.distributed import progress, setup
from lib.stage import (
    Flag,
    Interrupt,
    begin,
    finish,
    parse_flags,
    run_stage,
)
from lib.streams import rows_of_step, set_learning_rate
from train_rl import (
    BETAS,
    FLAGS,
    TEMPERATURE,
    Episode,
    group_means,
    load_policy,
    open_questions,
    rollout_means,
    sample_groups,
    save_policy,
    set_advantages,
    set_logprobs,
    split_minibatches,
    update,
)

CLIP_ABOVE = 0.3
SHARED = (  # flags and defaults as in train_rl.py
    "--seed",
    "--divide-by-std",
    "--minibatches",
    "--lr-floor",
    "--eval-questions",
    "--rows",
    "--micro-batch-cells",
    "--gradient-checkpointing",
    "--lora",
    "--save-every",
    "--threads",
)
MOTION_FLAGS = [
    Flag("--data", ["out/world2vlm"], ["out/taught"], "folders of questions_{train,val}.jsonl"),
    Flag("--policy", "out/w2v", "out/w2v-astra", "the start"),
    Flag("--out", "out/w2v-rl", "out/w2v-rl-astra", "folder of the policy"),
    Flag("--steps", 60, 248, "batches of rollouts", 1),
    Flag("--questions", 16, 4, "per step, all ranks together", 1),
    Flag("--group", 4, 4, "rollouts per question (paper)", 2),
    Flag("--max-new-tokens", 64, 256, "per answer", 1),
    Flag("--lr", 6e-5, 2e-6, "AdamW, peak (astra: paper)", 0),
    Flag("--warmup", 2, 0, "steps to the peak", 0),
    Flag("--kl-weight", 0.01, 0.01, "of the KL to the start policy in the loss (paper)", 0),
    Flag("--eval-every", 12, 62, "steps; 0: never", 0),
    *(flag for flag in FLAGS if flag.name in SHARED),
]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    args = parse_flags(__doc__, MOTION_FLAGS, argv)
    args.simulator = "none"
    if args.questions % args.minibatches:
        args.parser.error(
            f"--questions {args.questions} does not split into --minibatches {args.minibatches} of equal size"
        )
    return args


def episode_of_answer(answer: Trajectory, parts: dict[str, float]) -> Episode:
    """A rollout with the parts of its reward (rewards.py)."""
    return Episode(
        answer,
        reward=parts["total"],
        match=parts["total"],
        format=parts["format"],
        old_logprobs=torch.tensor(answer.logprobs[1:]),
    )


def main(argv: list[str] | None = None) -> None:
    """Sample, score, advantage, logprob, update; and again."""
    args = parse_args(argv)
    needs = [(args.policy, "python -m extras.world2vlm.train")]
    for folder in args.data:
        make = f"python -m extras.world2vlm.questions --out {folder}"
        needs += [(Path(folder, f"questions_{split}.jsonl"), make) for split in ("train", "val")]
    world, out = setup(args.threads), Path(args.out)
    begin("world2vlm train_rl", args, MOTION_FLAGS, needs)
    train, held_out = open_questions(args, world)
    policy, start_policy = load_policy(args, world), load_policy(args, world)

    weights = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=BETAS, weight_decay=0.0, fused=True)
    training = TrainingState(out, training_tensors(policy.model, optimizer))

    with Interrupt() as stop:
        bar = progress(args.steps, training.start, "world2vlm, GRPO")
        for step in bar:
            metrics = {}
            if args.eval_every and step % args.eval_every == 0:
                metrics["eval"] = held_out_means(policy, held_out, args, world)
            metrics["lr"] = set_learning_rate(optimizer, step, args)

            # sample and score: G answers per question of this rank
            order = rows_of_step(len(train), args.questions, step, args.seed)
            questions = [train[row] for row in order[world.rank :: world.size]]
            rollouts = sample_groups(
                policy, questions, None, "direct", args, step, args.group, TEMPERATURE
            )
            records = []
            groups = []
            for answers in rollouts:
                own = [answer_record(answer.question, answer.answer) for answer in answers]
                pairs = zip(answers, own, strict=True)
                groups.append(
                    [episode_of_answer(answer, record["parts"]) for answer, record in pairs]
                )
                records += own

            # advantage: each answer against its group
            set_advantages(groups, args.divide_by_std)
            minibatches = split_minibatches(groups, args.questions, args.minibatches, world)

            # logprob and update
            set_logprobs("start_logprobs", start_policy, minibatches, args.micro_batch_cells)
            if world.device.type == "cuda":  # bf16 rounds otherwise in the rollout's cached passes
                set_logprobs("old_logprobs", policy, minibatches, args.micro_batch_cells)
            metrics |= update(
                policy,
                optimizer,
                minibatches,
                args.micro_batch_cells,
                clip_high=CLIP_ABOVE,
                kl_weight=args.kl_weight,
            )

            metrics |= rollout_means(groups) | group_means(groups) | task_means(records)
            training.log.write(step, **metrics)
            bar.set_postfix(reward=f"{metrics['reward']:.2f}")
            stop.save_or_leave(step + 1, args, training.save)

    if args.eval_every:
        training.log.write(args.steps, eval=held_out_means(policy, held_out, args, world))
    save_policy(policy, out, args)
    finish(out, args.steps, training.clock)


if __name__ == "__main__":
    run_stage(main)
