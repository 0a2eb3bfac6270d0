"""
What makes a resumed run equal to an unbroken one: every random stream of the project by name, the rows and the
learning rate of a step, seconds that are carried over, inputs that may have changed meanwhile; the commit.

A draw depends on the name of its stream and on the keys beside it (seed, step, index), never on what was drawn before.
So no use of one stream moves another, any number of ranks draws the same, and the step is all that a resumed run has to
restore.
"""

import hashlib
import json
import math
import shutil
import subprocess
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.distributed import fail, global_sum, say
from lib.protocol import parse_object

STREAMS = {
    # the small world: keys (seed of the room, ...)
    "room": "size, colours and furniture of a room",
    "triples of a room": "where the cameras stand, and which motions are asked for",
    "questions of a room": "which questions, their options and their order",
    "clips of a room": "cameras and questions of a clip",
    "walk through a room": "the cameras of a room told as a scan",
    "degraded view": "what the true renderer, made worse on purpose, leaves out",
    "soft view": "how blurred a true view is that stands for an imagined one",
    # scans: keys (seed, ...)
    "triples of a scan": "which frames become context and target",
    "held-out scans": "which triples of test scans are kept",
    "split": "which part a place belongs to",
    # World2VLM: keys (seed or place, ...)
    "anchor of a room": "where the motions of a room start",
    "motion questions": "programs and options of the questions about a motion",
    "balance": "which records stay where one answer is too frequent",
    # training: keys (seed, step, ...)
    "weights": "what a network starts from",
    "adapters": "what LoRA starts from",
    "dropout": "of the adapters",
    "order": "which rows a step takes",
    "batch": "augmentation, condition dropout, times and noise of one context",
    "wording": "which sentence says a motion",
    "tower": "pictures and numbers of a step that teaches the tower to see",
    "script": "kind, lesson and wording of a scripted dialogue",
    # dialogues: keys (seed, question, number in the group, ...)
    "rollout": "the tokens a policy samples",
    "run": "one seed for all rollouts of a step",
    "imagine": "the noise of a simulator's view",
    "scores": "what a search takes where a policy gives no score",
    "mined": "which mined questions are held out",
    # measuring: keys (seed, ...)
    "bootstrap": "which rooms an interval draws",
    "text guess": "the order in which the text-only guesser learns",
}


def stable_hash(*keys) -> int:
    """A 63-bit integer that depends on the keys alone: ("rollout", 0, 12) gives the same one on every machine."""
    digest = hashlib.sha256(json.dumps(keys, default=int).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream_seed(name: str, *keys) -> int:
    """The seed of a stream. Raises KeyError for a name that STREAMS does not list."""
    if name not in STREAMS:
        raise KeyError(f"there is no random stream {name!r}: lib/streams.py lists them")
    return stable_hash(name, *keys)


def torch_stream(name: str, *keys) -> torch.Generator:
    """A generator on the CPU for one stream."""
    return torch.Generator().manual_seed(stream_seed(name, *keys))


def numpy_stream(name: str, *keys) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(stream_seed(name, *keys))


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float):
    """Draw a token per row by inverting the cumulative distribution at a uniform number.

    logits (n, V) float32, uniforms (n,) in [0, 1) -> tokens (n,) and their log-probabilities (n,) under what was drawn
    from; temperature 0 takes the most likely token, and its log-probability at temperature 1
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().double().cumsum(-1)
        goal = uniforms.to(cumulative.device) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, goal[:, None], right=True)[:, 0]  # none of mass 0
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # of logits that are not numbers
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def rows_of_step(total: int, count: int, step: int, *keys) -> list[int]:
    """Which `count` of `total` rows a step takes, none twice: pass after pass, each in an order of its own.

    What is left of a pass when it no longer fills a step is left out of that pass.   keys   of the stream "order"
    """
    epoch, batch = divmod(step, total // count)
    order = torch.randperm(total, generator=torch_stream("order", *keys, epoch))
    return order[batch * count : (batch + 1) * count].tolist()


def prefetched(make: Callable, items: Iterable) -> Iterator:
    """make(item) of each item in order, the next one made in a thread while the caller works with this one.

    On a GPU the thread has a stream of its own, and waits for nothing that the caller asked for. What is made is to be
    kept until the device is done with it: its memory belongs to that stream.
    """
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def make_aside(item):
        with torch.cuda.stream(stream):
            made = make(item)
        if stream:
            stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for item in items:
            ahead, ready = thread.submit(make_aside, item), ahead
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


def cosine(step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning-rate factor: a linear rise to 1 over `warmup` steps, then a cosine down to `floor` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, args: Namespace) -> float:
    """Give every group of an optimiser the rate of this step, by --lr, --steps, --warmup and --lr-floor; return it."""
    lr = args.lr * cosine(step, args.steps, args.warmup, args.lr_floor)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class Clock:
    """Wall and CPU seconds of a stage (all ranks together), carried over interruptions through its saved `read()`."""

    def __init__(self, before: dict | None = None):
        self.before = before or {"seconds": 0.0, "cpu_seconds": 0.0}
        self.start = time.time()
        self.cpu_start = time.process_time()

    def read(self) -> dict[str, float]:
        """{"seconds", "cpu_seconds"} so far (a collective)."""
        seconds = self.before["seconds"] + time.time() - self.start
        cpu_seconds = global_sum(time.process_time() - self.cpu_start)
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(self.before["cpu_seconds"] + cpu_seconds, 2),
        }


def fingerprints(settings: dict) -> dict[str, str]:
    """{file: its size and check sum} of all that the flags name and that is there: files of rows, models, configs.

    Of a file above 64 MB, its size and the time of its last change.
    """
    found = {}
    for key, value in settings.items():
        names = value if isinstance(value, list) else [value]
        for path in (Path(name) for name in names if isinstance(name, str) and key != "out"):
            files = [*path.glob("*.jsonl"), *path.glob("*.json"), *path.glob("*.safetensors")]
            for file in sorted(files):
                size = file.stat().st_size
                content = zlib.crc32(file.read_bytes()) if size < 2**26 else file.stat().st_mtime_ns
                found[str(file)] = f"{size} {content}"
    return found


def compare_with_earlier_run(out: Path, settings: dict, inputs: dict) -> None:
    """Stop with a sentence where `out` holds a run with other flags, or one that is finished; say what else changed."""
    done = None
    try:
        if (out / "done.json").exists():
            done = parse_object((out / "done.json").read_text())
        before = parse_object((out / "args.json").read_text())
    except (OSError, ValueError):
        fail(f"args.json or done.json of {out} cannot be read. Remove it, or give another --out.")
    changed = []
    for key, value in settings.items():
        if before.get(key) != value:
            changed.append(f"--{key.replace('_', '-')} {before.get(key)} (now {value})")
    if changed:
        fail(f"{out} holds a run with {', '.join(changed)}. Give another --out, or remove {out}.")
    if done:
        say(
            f"{out} is finished ({done['steps']} steps, {done['seconds']:.0f} s); remove it to redo."
        )
        raise SystemExit(0)
    earlier = before.get("inputs", {})
    other = [file for file in earlier if earlier[file] != inputs.get(file)]
    if other:
        say(f"CHANGED since {out} began: {', '.join(other)}. It goes on; remove it to begin anew.")


def commit_of_code() -> str | None:
    """The commit of this code, "-dirty" behind it if files differ; None outside its own git checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
