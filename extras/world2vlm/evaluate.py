"""
How well a policy answers World2VLM's held-out questions, greedily and without a tool: mean reward per task.

  python -m extras.world2vlm.evaluate                              # out/w2v, out/world2vlm -> out/eval/world2vlm
  python -m extras.world2vlm.evaluate --policy out/w2v-rl --out out/eval/w2v-rl
  torchrun --standalone --nproc_per_node 8 -m extras.world2vlm.evaluate --preset astra
  resume    the same command

Out: predictions.jsonl, a record per question; results.json, per task the mean of its reward ("A1_total"), the share of
full rewards ("A1_exact") and the means of the reward's parts (rewards.py).
"""

import json
from functools import partial
from pathlib import Path

from tqdm import tqdm

from extras.world2vlm.rewards import BOX_PARTS, FULL, world2vlm
from extras.world2vlm.words import TASKS
from lib.distributed import (
    Means,
    World,
    fail,
    is_main,
    say,
    setup,
    split_work,
    unsharded,
    wait_for_all,
)
from lib.records import Question, disk, load_jsonl, read_log, save_jsonl, write_json
from lib.stage import Flag, begin, finish, parse_flags, run_stage
from lib.streams import Clock
from policy import Policy, rollout

PARTS = ("total", "exact", "format", "action", "order", "numeric", "accuracy", *BOX_PARTS[2:])
FLAGS = [
    Flag("--policy", "out/w2v", "out/w2v-astra", "folder or hub id"),
    Flag("--data", "out/world2vlm", "out/taught", "folder of questions_test.jsonl"),
    Flag("--out", "out/eval/world2vlm", "out/eval/world2vlm-astra", "folder of the results"),
    Flag("--limit", None, None, "only the first N questions", 1, kind=int),
    Flag("--max-new-tokens", 64, 256, "per answer", 1),
    Flag("--rows", 64, 8, "questions at once", 1, neutral=True),
    Flag("--threads", None, None, "CPU threads", 1, kind=int, neutral=True),
]


def answer_record(question: dict, answer: str | None) -> dict:
    """What an answer is worth: {"correct": its total, "exact": 1.0 for a full reward, "parts"}, and to which question."""
    parts = world2vlm(question["category"], question["answer"], answer)
    parts["exact"] = float(parts["total"] > FULL)
    return {
        "key": question["id"],
        "category": question["category"],
        "scene": question.get("scene", {}).get("room", question.get("cluster")),
        "gold": question["answer"],
        "answer": answer,
        "correct": parts["total"],
        "exact": parts["exact"],
        "parts": parts,
    }


def task_means(records: list[dict]) -> dict[str, float]:
    """{"A1_total", "A1_exact", "A1_numeric", ...}: means over the records of all ranks (a collective)."""
    means = Means(f"{task}_{part}" for task in TASKS for part in PARTS)
    for record in records:
        for part, value in record["parts"].items():
            means.add(f"{record['category']}_{part}", value)
    return means.read()


def greedy_records(policy: Policy, questions: list[dict], args) -> list[dict]:
    """Ask questions without a tool; args: max_new_tokens and rows."""
    with unsharded(policy.model):
        dialogues = rollout(
            policy,
            questions,
            mode="direct",
            temperature=0.0,
            max_new_tokens=args.max_new_tokens,
            rows=args.rows,
        )
    pairs = zip(questions, dialogues, strict=True)
    return [answer_record(question, dialogue.answer) for question, dialogue in pairs]


def say_means(means: dict[str, float]) -> None:
    """One line: mean reward and share of full rewards of each task."""
    numbers = []
    for task in TASKS:
        if f"{task}_total" in means:
            numbers.append(f"{task} {means[f'{task}_total']:.2f} {means[f'{task}_exact']:.2f}")
    say(f"held out, mean reward and share of perfect answers: {', '.join(numbers)}")


def held_out_means(policy: Policy, questions: list[dict], args, world: World) -> dict[str, float]:
    """`task_means` of greedy answers, each rank asking its share; also printed."""
    means = task_means(greedy_records(policy, questions[world.rank :: world.size], args))
    say_means(means)
    return means


def main(argv=None):
    """Ask (or go on asking) every question, then summarise."""
    args = parse_flags(__doc__, FLAGS, argv)
    file, out = Path(args.data, "questions_test.jsonl"), Path(args.out)
    needs = [
        (args.policy, "python -m extras.world2vlm.train"),
        (file, f"python -m extras.world2vlm.questions --out {args.data}"),
    ]
    world, clock = setup(args.threads), Clock()
    begin("world2vlm evaluate", args, FLAGS, needs)
    questions = load_jsonl(file, Question)[: args.limit]
    if not questions:
        fail(f"{file} has no question.")
    policy = Policy.load(args.policy, world.device)

    log = out / "training" / "records.jsonl"
    if is_main():
        save_jsonl(log, read_log(log))  # without a line that a kill tore
    wait_for_all()
    answered = {row["key"]: row for row in read_log(log)}
    missing = [question for question in questions if question["id"] not in answered]
    ask = partial(greedy_records, policy, args=args)
    at_once = args.rows * world.size
    for start in tqdm(range(0, len(missing), at_once), desc="ask", disable=not is_main()):
        rows = split_work(ask, missing[start : start + at_once])
        answered |= {row["key"]: row for row in rows}
        if is_main():
            with disk(log), log.open("a") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
    records = [answered[question["id"]] for question in questions]
    means = task_means(records)
    say_means(means)
    if is_main():
        save_jsonl(out / "predictions.jsonl", records)
        write_json(out / "results.json", {"policy": args.policy, "n": len(questions), **means})
    finish(out, len(questions), clock)


if __name__ == "__main__":
    run_stage(main)
