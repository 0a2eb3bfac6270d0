"""
What every stage shares: process start, random streams, FSDP2 by hand, whole files, the metric log, Ctrl-C.

One process on a laptop uses no torch.distributed at all. Under torchrun (gloo on CPU, NCCL on GPUs) the same calls work
over all ranks. Three rules make one rank and many give the same numbers:
  - gradients are *summed* over ranks, and a loss is a local sum divided by a *global* count (`global_sum`);
  - every random draw comes from a stream of its own (lib/streams.py): the step is all a resumed run restores;
  - a file is written beside its place and renamed when complete, so a killed run never leaves half a checkpoint.

A stage's folder: the model at its top, `training/` (what resumes an interrupted run), `log.jsonl`, `args.json`,
pictures, and `done.json` as the last file written. The same command continues an unfinished run; on a finished one it
says so.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# ---------------------------------------------------------------- processes

PATIENCE = timedelta(
    hours=6
)  # of a rank for the others: while they sample, they share nothing for long


class World(NamedTuple):
    """This process among the others: `rank` of `size`, `local_rank` on its machine, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def setup(threads=None):
    """Start this process, alone or as one of torchrun's, and return its World.

    threads   CPU threads of this process; None keeps torch's choice, or 1 among several processes of torchrun
    On a GPU there is always a process group, of one if need be: FSDP's mixed precision (bf16 arithmetic, fp32 weights
    in the optimiser) then works on one GPU as on many.
    """
    rank, size, local_rank = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available()
    if threads or size > 1:
        torch.set_num_threads(threads or 1)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        elif cuda:
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, local_rank, device)


def keep_freed_memory():
    """Let the C library keep large blocks that torch frees, for the next tensor of that size; no effect but on glibc.

    By itself it gives them back to the system, which hands them out again page by page, each one filled with zeros
    (README, Speed).
    """
    trim, top_pad, mmap = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((trim, 2**31 - 1), (top_pad, 2**26), (mmap, 2**30)) if mallopt else ():
        mallopt(option, size)


def is_main():
    """True on rank 0: the one process that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*words):
    """Print a line, on rank 0 only, without tearing a progress bar apart."""
    if is_main():
        tqdm.write(" ".join(str(word) for word in words))


def fail(sentence):
    """Stop with a sentence: what came in, what was needed, what to type next."""
    raise SystemExit(sentence)


def progress(steps, start=0, title=""):
    """A progress bar over `range(start, steps)`, silent on every rank but 0."""
    return tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=title,
        disable=not is_main(),
        dynamic_ncols=True,
    )


def wait_for_all():
    """Let every rank reach this line (files that rank 0 wrote are then there for all)."""
    if dist.is_initialized():
        dist.barrier()


def global_sum(x):
    """Sum over ranks. A number comes back as a float, a tensor as a new tensor of the same shape and type."""
    if not isinstance(x, torch.Tensor):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return global_sum(torch.tensor(x, dtype=torch.float64, device=device)).item()
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def global_max(x):
    """The largest of a number over all ranks, as a float."""
    value = torch.tensor(
        float(x), dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def total(values):
    """Numbers -> (sum, count), as `global_means` takes them."""
    return float(sum(values)), len(values)


def global_means(totals):
    """{key: (sum, count) on this rank} -> {key: mean over all ranks}; a key that counted nothing is left out.

    A sum over a count, never a mean of means: ranks may have counted different numbers.
    """
    sums = torch.tensor(list(totals.values()), dtype=torch.float64)  # (keys, 2)
    sums = global_sum(sums.cuda() if torch.cuda.is_available() else sums).tolist()
    return {key: number / count for key, (number, count) in zip(totals, sums) if count}


# ---------------------------------------------------------------- schedules


def cosine(step, steps, warmup=0, floor=0.0):
    """Learning-rate factor: a linear rise to 1 over `warmup` steps, then a cosine down to `floor` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer, rate):
    """Let every group of an optimiser learn at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---------------------------------------------------------------- sharding


def shard(model, blocks, world, ignored=()):
    """Shard each block, then the root (FSDP2). Does nothing where there is no process group.

    blocks    the modules gathered one at a time, such as the decoder layers; everything else belongs to the root
    ignored   parameters left whole on every rank: a frozen vision tower has no gradient to share, and left whole it
              needs no collective, so ranks may see different numbers of images
    Gradients are summed: the loss is already divided by the global count. Without the last line gloo refuses to reduce.
    On GPUs: bf16 arithmetic, fp32 weights, fp32 gradient sums; inputs are left as they come (rotary angles and
    diffusion times lose too much in bf16). Across machines the mesh shards inside each and replicates between them.
    """
    if not dist.is_initialized():
        return model
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    shape, names = (
        ((world.size,), ("shard",))
        if per_machine >= world.size
        else ((world.size // per_machine, per_machine), ("replicate", "shard"))
    )
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if world.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored = set(ignored)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


@contextlib.contextmanager
def gathered(model):
    """Hold the whole model on every rank, for rollouts: ranks may then run different numbers of forward passes."""
    wait_for_all()  # with PATIENCE; groups across machines have NCCL's ten minutes
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield model
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def sum_gradients(parameters):
    """Sum over ranks the gradients of parameters that are whole on every rank, which FSDP leaves alone (`ignored`)."""
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not dist.is_initialized() or not parameters:
        return
    for p in parameters:
        p.grad = (
            torch.zeros_like(p) if p.grad is None else p.grad
        )  # all ranks sum, whatever they have seen
    flat = global_sum(
        torch.cat([p.grad.flatten() for p in parameters])
    )  # one collective, not one for each
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(gradient.view_as(p))


def clip_gradients(parameters, max_norm):
    """Scale the gradients down to a global norm of at most `max_norm`; return the norm before, as a float.

    Ends the program with a sentence if it is not finite: the weights would be lost, and the next checkpoint with them.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    return (
        norm
        if math.isfinite(norm)
        else fail(
            "The gradient is not finite. The last checkpoint is kept; give a smaller --lr and another --out."
        )
    )


# ---------------------------------------------------------------- files


def write_text(path, text):
    """Write a text file whole: beside its place, then renamed. Folders above it are made."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text)
        os.replace(beside, path)


def write_json(path, value):
    """Write a JSON file whole."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def disk(path):
    """Turn a full disk, or a place that cannot be written, into a sentence.

    safetensors reports a full disk as its own error, so the text counts, not the class.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            fail(
                f"The disk is full: {path} could not be written. What was saved before is untouched; free some space "
                f"and run the same command again, it continues."
            )
        if isinstance(
            error, (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
        ):
            fail(f"{error.filename}: {error.strerror}. Name another file or folder.")
        raise


@contextlib.contextmanager
def written_whole(folder):
    """`with written_whole(out) as part: model.save(part)`: the files appear in `folder` when all are complete.

    On rank 0, which writes; the others only learn the name, so that a save may gather tensors from them.
    """
    folder = Path(folder)
    part = folder / ".partial"
    if not is_main():
        yield part
        return
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk(folder):
            part.mkdir(parents=True)
            yield part
            for file in sorted(part.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class MetricLog:
    """`log.jsonl`: one JSON line per step, {"step": 12, "reward": 0.8, ...}. A resumed run writes its steps anew.

    path   the file; lines of `resume_step` and later, and a line cut off by a kill, are dropped when it is opened
    """

    def __init__(self, path, resume_step=0):
        self.path = Path(path)
        if not is_main():
            return
        kept = [row for row in read_log(self.path) if row["step"] < resume_step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step, **metrics):
        """Append one line; numbers keep six digits, and what is not a finite number becomes null."""
        if not is_main():
            return
        with disk(self.path), open(self.path, "a") as file:
            file.write(
                json.dumps(
                    {"step": step, **{key: readable(value) for key, value in metrics.items()}}
                )
                + "\n"
            )


def read_log(path):
    """The rows of a `log.jsonl`, oldest first; a last line cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def readable(value):
    """A number as a log shows it: six digits, None for nan and infinity; anything else (strings, lists) as it is."""
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return (
        {key: readable(part) for key, part in value.items()} if isinstance(value, dict) else value
    )


# ---------------------------------------------------------------- a stage's beginning and end


def parse_with_preset(parser, presets, argv=None, least=()):
    """Parse flags whose defaults come from `--preset`: a preset is a dict {flag: default}; what the user types wins.

    least   as in `at_least`
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for p in (first, parser):
        p.add_argument(
            "--preset",
            choices=list(presets),
            default=next(iter(presets)),
            help="defaults of other flags",
        )
    parser.allow_abbrev = False
    preset = presets[first.parse_known_args(argv)[0].preset]
    unknown = set(preset) - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"the preset names flags that do not exist: {sorted(unknown)}")
    parser.set_defaults(**preset)
    return at_least(parser, parser.parse_args(argv), least)


def at_least(parser, args, least):
    """The parsed flags, if none of them is out of bounds: (flag, smallest value) or (flag, smallest, largest)."""
    for key, low, *high in least:
        value = getattr(args, key)
        if value is not None and not (
            low <= value <= (high[0] if high else math.inf)
        ):  # nan fails too
            parser.error(
                f"--{key.replace('_', '-')} {value}: must be {low} or more"
                + (f", and {high[0]} at most" if high else "")
            )
    return args


def begin(title, args, neutral=(), needs=()):
    """Say what runs, and look at args.out: finished already, begun with other flags, or free to go.

    neutral   flags that never change the numbers (threads, micro-batch): they may differ when a run goes on
    needs     (path, command that makes it) of every input
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    say(
        f"{title}: {args.preset} preset on {device}"
        + (f" x {processes}" if processes > 1 else "")
        + ("" if args.preset == "astra" else "; the paper's run is --preset astra")
    )
    out, flags = (
        Path(args.out),
        {key: value for key, value in vars(args).items() if key not in neutral},
    )
    done = None
    if (out / "done.json").exists() or (out / "training").exists():
        try:
            done = (
                json.loads((out / "done.json").read_text())
                if (out / "done.json").exists()
                else None
            )
            before = json.loads((out / "args.json").read_text())
        except (OSError, json.JSONDecodeError):
            fail(
                f"{out} holds a run whose args.json or done.json cannot be read. Remove {out} or give another --out."
            )
        changed = [
            f"--{key.replace('_', '-')} {before[key]} (now {value})"
            for key, value in flags.items()
            if before.get(key, value) != value
        ]  # a flag that is new since then changed nothing
        if changed:
            fail(
                f"{out} holds a run with {', '.join(changed)}. Give another --out, or remove {out} to start over."
            )
    if done:
        say(
            f"{out} is finished ({done['steps']} steps, {done['seconds']:.0f} s). Remove it to train again."
        )
        raise SystemExit(0)
    for path, command in needs:
        need(path, command)
    if is_main():
        write_json(out / "args.json", flags)


def need(path, command):
    """The path of an input, or a sentence that says which command makes it. A hub id such as Qwen/Qwen3-VL passes."""
    here = Path(path)
    if not here.exists() and (
        str(path).startswith(("out/", ".", "/", "~")) or str(path).count("/") != 1
    ):
        fail(f"{path} is missing. `{command}` makes it.")
    if (here / "args.json").exists() and not (here / "done.json").exists():
        fail(f"{path} is not finished. Run `{command}` again: it continues where it stopped.")
    return path


def finish(folder, steps, clock):
    """Write done.json, the last file of a stage, and drop the training state that only an interrupted run needs."""
    spent = clock.read()
    if is_main():
        write_json(Path(folder) / "done.json", {**spent, "steps": steps})
        shutil.rmtree(Path(folder) / "training", ignore_errors=True)
    say(
        f"{folder} is complete: {steps} steps, {spent['seconds']:.0f} s, {spent['cpu_seconds']:.0f} CPU-s."
    )
    wait_for_all()


def newest(stages, file="config.json"):
    """The folder of out/<stage> or out/demo/<stage> whose `file` was written last, or None if there is none."""
    files = [Path(root) / stage / file for root in ("out", "out/demo") for stage in stages]
    files = [path for path in files if path.exists()]
    return max(files, key=lambda path: path.stat().st_mtime).parent if files else None


def run(main):
    """Run a stage's `main`; an interrupt or a full disk outside its loop ends in a sentence, not in a traceback.

    SIGTERM is an interrupt too: Ctrl-C itself is ignored by what a script has started with `&`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with disk("what the stage was writing"):
            main()
            leave()
    except KeyboardInterrupt:
        say("Stopped. The same command goes on from what was saved.")
        raise SystemExit(130) from None


def leave():
    """End this rank, all together: one that goes first may take down another that still listens to it.

    Without Python's own teardown: DTensor's caches keep gloo's threads alive beyond destroy_process_group, and one of
    them that then still frees a tensor asks an interpreter for its lock that is gone, and aborts a run that is done.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Clock:
    """Wall and CPU seconds of a stage (all ranks together), carried over interruptions through its saved `read()`."""

    def __init__(self, before=None):
        self.before = before or {"seconds": 0.0, "cpu_seconds": 0.0}
        self.start, self.cpu_start = time.time(), time.process_time()

    def read(self):
        """{"seconds", "cpu_seconds"} so far (a collective)."""
        return {
            "seconds": round(self.before["seconds"] + time.time() - self.start, 2),
            "cpu_seconds": round(
                self.before["cpu_seconds"] + global_sum(time.process_time() - self.cpu_start), 2
            ),
        }


class Stopwatch(dict):
    """Seconds per part of a step: `with seconds("update"): ...` adds to seconds["update"]."""

    @contextlib.contextmanager
    def __call__(self, part):
        start = time.perf_counter()
        yield
        self[part] = self.get(part, 0.0) + time.perf_counter() - start


class Interrupt:
    """`with Interrupt() as stop:` Ctrl-C or SIGTERM only raises a flag, so that the loop can end its step and save.

    A second Ctrl-C stops at once, without saving.
    """

    def __enter__(self):
        self.flag = False
        self.handlers = {
            sig: signal.signal(sig, self.raised) for sig in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error):
        for sig, handler in self.handlers.items():
            signal.signal(sig, handler)

    def raised(self, sig, frame):
        """Signal handler: remember; on the second Ctrl-C give up at once."""
        if self.flag and sig == signal.SIGINT:
            raise KeyboardInterrupt
        self.flag = True
        say("Stopping after this step, then saving (Ctrl-C again: at once, without saving).")

    def requested(self):
        """True if any rank was asked to stop (a collective: call it once per step on every rank)."""
        return global_sum(float(self.flag)) > 0

    def save_or_leave(self, done, args, save):
        """After `done` steps: `save()` where --save-every, the last step or Ctrl-C asks for it; after Ctrl-C, leave."""
        leaving = self.requested()
        if leaving or done % args.save_every == 0 or done == args.steps:
            save()
        if leaving:
            self.leave(done)

    def leave(self, step):
        """Say how to go on, and exit with 130, so that a Makefile stops too."""
        say(f"Stopped after step {step}; saved. The same command goes on from there.")
        raise SystemExit(130)
