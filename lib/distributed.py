"""
Many processes that compute and speak as one: process start, global sums, FSDP2 by hand.

One process on a laptop uses no torch.distributed at all. Under torchrun (gloo on CPU, NCCL on GPUs) the same calls work
over all ranks. Gradients are *summed* over ranks, and a loss is a local sum divided by a *global* count: so one rank
and many give the same numbers.
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# How long a rank waits for the others: the longest that one may still sample when another is done.
PATIENCE = timedelta(hours=1)
# What nothing that we print or write may hold.
KEYS = ("OPENAI_API_KEY", "SIMULATOR_API_KEY")
URL_PASSWORD = re.compile(r"://[^\s/@\"'<>]+@(?=\[|\w*[a-zA-Z.])")  # before a host; not "…:80@12"


class World(NamedTuple):
    """This process among the others: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


def default_device() -> str:
    """Where new tensors go: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def setup(threads: int | None = None) -> World:
    """Start this process, alone or as one of torchrun's, and return its World.

    threads   CPU threads of this process; None keeps torch's choice, or 1 among several processes
    On a GPU there is always a process group, of one if need be: FSDP's mixed precision (bf16 arithmetic, fp32 weights
    in the optimiser) then works on one GPU as on many.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun
    if threads or size > 1:
        torch.set_num_threads(threads or 1)
    if cuda:
        # keys and values grow while dialogues are written: freed blocks of other sizes must become room for them
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if not dist.is_initialized():
        options = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(**options, timeout=PATIENCE)
        elif cuda:
            dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, device)


def die_with_parent() -> None:
    """Let this process be killed when its parent ends, however that ends (Linux): nobody then writes unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # sys/prctl.h: PR_SET_PDEATHSIG


def is_main() -> bool:
    """True on rank 0: the one process that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_all() -> None:
    """Let every rank reach this line (files that rank 0 wrote are then there for all)."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
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


# ---- what a person reads -----------------------------------------------------------------------------------------------


def say(*words) -> None:
    """Print a line, on rank 0 only, without tearing a progress bar apart."""
    if is_main():
        tqdm.write(without_keys(" ".join(str(word) for word in words)))


def fail(sentence: str) -> NoReturn:
    """Stop with a sentence: what came in, what was needed, what to type next."""
    raise SystemExit(without_keys(str(sentence)))


def without_keys(text: str) -> str:
    """The text without the keys of servers, whoever repeats them. Shorter ones ("EMPTY") are words, no secrets."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if len(key) >= 8:
            text = text.replace(key, "[key]")
    return URL_PASSWORD.sub("://[key]@", text)


def progress(steps: int, start: int = 0, title: str = "") -> tqdm:
    """A progress bar over `range(start, steps)`, silent on every rank but 0."""
    return tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=title,
        disable=not is_main(),
        dynamic_ncols=True,
    )


# ---- numbers of all ranks --------------------------------------------------------------------------------------------


def global_sum(x):
    """Sum over ranks. A number comes back as a float, a tensor as a new tensor of the same shape and type."""
    if not isinstance(x, torch.Tensor):
        return global_sum(torch.tensor(x, dtype=torch.float64, device=default_device())).item()
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def global_max(x: float) -> float:
    """The largest of a number over all ranks."""
    value = torch.tensor(float(x), dtype=torch.float64, device=default_device())
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def split_work(function: Callable, items: list) -> list:
    """function(items), a list as long, on every rank, of which each computes every size-th (a collective)."""
    if not dist.is_initialized():
        return function(items)
    size = dist.get_world_size()
    parts = [None] * size
    dist.all_gather_object(parts, function(items[dist.get_rank() :: size]))
    results = [None] * len(items)
    for rank, part in enumerate(parts):
        results[rank::size] = part
    return results


class Means:
    """Means over all ranks: each rank adds sums and counts, and `read` divides the global ones.

    A sum over a count, never a mean of means: ranks may have counted different numbers.
    keys   all that may be added, so that every rank sums the same numbers in the same order
    """

    def __init__(self, keys: Iterable[str]):
        self.sums = {key: (0.0, 0.0) for key in keys}

    def add(self, key: str, total, count=1.0) -> None:
        """Add to a key's sum and count; tensors stay on their device, without waiting for it."""
        before = self.sums[key]
        self.sums[key] = (before[0] + total, before[1] + count)

    def read(self) -> dict[str, float]:
        """{key: mean} (a collective); a key that counted nothing is left out."""
        flat = [float(number) for pair in self.sums.values() for number in pair]
        sums = torch.tensor(flat, dtype=torch.float64, device=default_device())
        sums = global_sum(sums).view(-1, 2).tolist()  # (keys, 2)
        return {
            key: total / count for key, (total, count) in zip(self.sums, sums, strict=True) if count
        }


# ---- sharding ----------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, blocks: list, world: World, ignored: Iterable = ()) -> nn.Module:
    """Shard each block, then the root (FSDP2). Does nothing where there is no process group.

    blocks    the modules gathered one at a time, such as the decoder layers; everything else belongs to the root
    ignored   parameters left whole on every rank: a frozen vision tower has no gradient to share, and left whole it
              needs no collective, so ranks may see different numbers of images
    Gradients are summed: the loss is already divided by the global count.
    On GPUs: bf16 arithmetic, fp32 weights, fp32 gradient sums; inputs are left as they come (rotary angles and
    diffusion times lose too much in bf16). Across machines the mesh shards inside each and replicates between them.
    """
    if not dist.is_initialized():
        return model
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if per_machine >= world.size:
        shape, names = (world.size,), ("shard",)
    else:
        shape, names = (world.size // per_machine, per_machine), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if world.device.type == "cuda" else None
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ignored = set(ignored)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=ignored)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo reduces nothing else
    return model


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
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


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every rank (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_gradients(parameters: Iterable) -> None:
    """Sum over ranks the gradients of parameters that are whole on every rank, which FSDP leaves alone (`ignored`)."""
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not dist.is_initialized() or not parameters:
        return
    for p in parameters:
        if p.grad is None:  # all ranks sum, whatever they have seen
            p.grad = torch.zeros_like(p)
    # one collective, not one for each
    flat = global_sum(torch.cat([p.grad.flatten() for p in parameters]))
    gradients = flat.split([p.numel() for p in parameters])
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad.copy_(gradient.view_as(p))


def clip_gradients(parameters: Iterable, max_norm: float) -> float:
    """Scale the gradients down to a global norm of at most `max_norm`; return the norm before.

    Ends the program with a sentence if it is not finite: the weights would be lost, and the next checkpoint with them.
    """
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
    norm = full(norm).item()
    if not math.isfinite(norm):
        fail(
            "The gradient is not finite. The last checkpoint is kept; give a smaller --lr and another --out."
        )
    return norm
