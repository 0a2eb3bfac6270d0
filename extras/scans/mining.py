"""
Hard questions for RL: those of a corpus that a policy hardly ever answers right.

  python -m extras.scans.mining --questions out/sensenova/questions_train.jsonl --policy Qwen/Qwen3-VL-8B-Instruct
  torchrun --standalone --nproc_per_node 8 -m extras.scans.mining ...      the processes share the questions

As readers report of the paper, it kept what its base policy answers right at most once in five samples.
In: questions_train.jsonl.  Out: out/mined/questions_{train,val}.jsonl, and answers.jsonl, from which an interrupted
run goes on. Such a set is for training alone: the answers of a model chose it, and a guesser would pass for hard too.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import numpy as np

from extras.scans.make import holds_others, with_relative_paths
from lib.distributed import fail, is_main, progress, say, setup, split_work, wait_for_all
from lib.images import with_pictures
from lib.records import SPLITS, Question, disk, load_jsonl, read_log, save_jsonl
from lib.stage import bounded, lock_folder, run_stage
from lib.streams import stream_seed
from policy import Policy, rollout
from rewards import exact_match, name_gold

BATCH = 16  # questions of a process that are logged together
ROWS = 16  # dialogues written together: of an 8B policy at most 13 GB of keys and values


def mine(
    source: str | Path,
    out: str | Path,
    policy: str,
    samples: int = 5,
    at_most: int = 1,
    seed: int = 0,
) -> None:
    """Keep the questions that a policy answers right at most `at_most` times in `samples`.

    source   questions_train.jsonl;  policy   folder or hub id, which answers directly at temperature 1
    Writes out/questions_{train,val}.jsonl, one in twenty for validation, each row with "mined", and says which share a
    guesser would keep. Stops with a sentence if `out` holds questions of another corpus, which it would drop.
    """
    source, out = Path(source), Path(out)
    setup()
    questions = with_pictures(questions_to_mine(source, out))
    settings = {"policy": str(policy), "samples": samples, "seed": seed}
    right = ask_often(questions, out, settings)
    if not is_main():
        return
    splits = {"train": [], "val": []}
    for question in questions:
        if right[question["id"]] > at_most:
            continue
        mined = {"right": right[question["id"]], "of": samples}
        split = "val" if stream_seed("mined", question["id"]) % 20 == 0 else "train"
        splits[split].append(with_relative_paths(question | {"mined": mined}, out))
    for split, rows in splits.items():
        save_jsonl(out / f"questions_{split}.jsonl", rows)
    hard = sum(len(rows) for rows in splits.values())
    rate = np.mean([right[question["id"]] for question in questions]) / samples
    guess = np.mean([guessers_share(len(row["options"]), samples, at_most) for row in questions])
    say(
        f"{hard} of {len(questions)} questions kept ({hard / len(questions):.1%}): at most {at_most} right "
        f"in {samples}. The policy is right in {rate:.1%} of its answers; of a pure guesser's questions {guess:.1%} "
        f"would be kept."
    )


def questions_to_mine(source, out):
    """The rows of `source`; a sentence where they may not be mined, or would take the place of others in `out`."""
    if "train" not in source.stem:
        fail(
            f"{source} is not for training: only questions_train.jsonl may be mined, or the test would be chosen by "
            f"what a model gets wrong."
        )
    questions = load_jsonl(source, Question, name_gold)
    ids = {question["id"] for question in questions}
    if len(ids) < len(questions):
        fail(
            f"Some questions of {source} share an id, and one's answers would stand for the other: make ids unique."
        )
    if holds_others([out / f"questions_{split}.jsonl" for split in SPLITS], "id", ids):
        fail(
            f"{out} holds questions of something else, and they would be lost: give {source} an --out of its own."
        )
    return questions


def ask_often(questions: list[dict], out: Path, settings: dict) -> dict[str, int]:
    """Let a policy answer what it has not yet answered -> {id of a question: how many of its answers are right}.

    settings   {"policy", "samples", "seed"}: answers in out/answers.jsonl that were given under others do not count
    The processes share the questions; the first one writes.
    """
    world = setup()
    log = out / "answers.jsonl"
    if is_main():
        save_jsonl(log, read_log(log))  # without a line that a kill tore
    wait_for_all()
    right = {row["id"]: row["right"] for row in read_log(log) if settings.items() <= row.items()}
    open_questions = [question for question in questions if question["id"] not in right]
    policy = Policy.load(settings["policy"], world.device) if open_questions else None
    ask = partial(answer_records, policy, settings=settings)
    at_once = BATCH * world.size
    truncated = 0
    for step in progress(math.ceil(len(open_questions) / at_once), title="ask"):
        rows = split_work(ask, open_questions[step * at_once : (step + 1) * at_once])
        right |= {row["id"]: row["right"] for row in rows}
        truncated += sum(row["truncated"] for row in rows)
        if is_main():
            with disk(log), log.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    if truncated:
        say(f"{truncated} of these answers were cut off, and count as wrong.")
    return right


def answer_records(policy: Policy, questions: list[dict], settings: dict) -> list[dict]:
    """Ask some questions at temperature 1 -> lines of answers.jsonl."""
    samples = settings["samples"]
    trajectories = rollout(
        policy,
        questions,
        None,
        "direct",
        group_size=samples,
        temperature=1.0,
        seed=settings["seed"],
        max_new_tokens=policy.turn_limit,
        rows=ROWS,
    )
    rows = []
    for k, question in enumerate(questions):
        group = trajectories[k * samples : (k + 1) * samples]
        right = sum(exact_match(trajectory.answer, question) for trajectory in group)
        truncated = sum(trajectory.truncated for trajectory in group)
        row = {"id": question["id"], "right": int(right), "truncated": truncated}
        rows.append(row | settings)
    return rows


def guessers_share(options: int, samples: int, at_most: int) -> float:
    """The chance that a blind guesser is right at most `at_most` times in `samples`; 1 where there are no options."""
    p = 1 / options if options else 0.0
    return sum(math.comb(samples, k) * p**k * (1 - p) ** (samples - k) for k in range(at_most + 1))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", required=True, help="a questions_train.jsonl")
    parser.add_argument("--policy", required=True, help="folder or hub id of the base policy")
    parser.add_argument("--out", default="out/mined", help="folder of the files")
    parser.add_argument("--samples", type=bounded(int, 1), default=5, help="answers per question")
    parser.add_argument("--at-most", type=int, default=1, help="right answers of a hard question")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    args = parser.parse_args(argv)
    if not 0 <= args.at_most < args.samples:
        parser.error(
            f"--at-most {args.at_most} of --samples {args.samples}: must be 0 or more and less than the samples; "
            f"else none or all questions are kept"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Mine one corpus."""
    args = parse_args(argv)
    lock_folder(args.out)
    mine(args.questions, args.out, args.policy, args.samples, args.at_most, args.seed)


if __name__ == "__main__":
    run_stage(main)
