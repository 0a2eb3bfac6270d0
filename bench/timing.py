"""Clocks, and the rates that a machine reaches: what the benchmarks measure with."""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Seconds(dict):
    """Seconds by part: `with seconds("update"):` or `@seconds("update")`. Of nested parts the inner one pays.

    now   the clock: this process's CPU time, unless another is given
    """

    def __init__(self, now: Callable[[], float] = time.process_time):
        super().__init__()
        self.now = now

    @contextlib.contextmanager
    def __call__(self, part: str):
        start = self.now()
        before = sum(self.values())
        yield
        inner = sum(self.values()) - before
        self[part] = self.get(part, 0.0) + self.now() - start - inner


def medians(runs: list[dict]) -> dict[str, float]:
    """The median of each part over several runs."""
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def timed(step: Callable, repeats: int, device: torch.device) -> tuple[float, float] | None:
    """Run `step` once to warm up, then `repeats` times -> (median seconds, peak GiB), or None if memory is short."""
    on_gpu = device.type == "cuda"
    seconds = []
    try:
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            start = clock(device.type)
            step()
            seconds.append(clock(device.type) - start)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return statistics.median(seconds), peak


def layer_matrices(config) -> list[tuple[int, int]]:
    """(in, out) of the products of a decoder layer; config: anything with width, heads, kv_heads and mlp."""
    width, head = config.width, config.width // config.heads
    return [
        (width, width),
        (width, head * config.kv_heads),
        (width, config.mlp),
        (config.mlp, width),
    ]


def best_matmul_rate(config, rows: int, device="cpu", dtype=torch.float32, seconds=0.15) -> float:
    """The best torch.mm rate (FLOP/s) over the layers' shapes, each with several numbers of rows up to `rows`."""
    best = 0.0
    for inside, out in layer_matrices(config):
        weight = torch.randn(out, inside, device=device, dtype=dtype).t()
        for m in sorted({min(rows, m) for m in (128, 256, 512, 1024, 2048, 8192)}):
            x = torch.randn(m, inside, device=device, dtype=dtype)
            y = torch.empty(m, out, device=device, dtype=dtype)
            begin = time.perf_counter()
            while time.perf_counter() - begin < seconds:
                start = clock(device)
                for _ in range(3):
                    torch.mm(x, weight, out=y)
                best = max(best, 3 * 2 * m * inside * out / (clock(device) - start))
    return best


def print_json(results: dict) -> None:
    """The last line, for a program: floats with four digits."""
    rounded = {}
    for key, value in results.items():
        rounded[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    print(json.dumps(rounded))
