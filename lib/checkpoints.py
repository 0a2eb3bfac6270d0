"""
Tensors on disk: safetensors files that are whole or not there, and what resumes an interrupted run.

  out/wm/training/step_000500/rank_00000.safetensors, rank_00001.safetensors, ...     each rank's rows of every tensor
                              state.json                                              the step, the clock

FSDP2 shards a tensor by rows (DTensor), so the parts in the files of the ranks, one behind another, are the whole: any
number of ranks can go on from it, each reading its own rows. The ranks see one file system. Nothing is gathered but the
finished model (`write_gathered`).
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lib.distributed import fail, full, global_sum, is_main, wait_for_all
from lib.records import MetricLog, disk, sync, whole_file, write_json
from lib.streams import Clock

BROKEN = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)  # of a file


# ---- one file ------------------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, Tensor]:
    """{name: tensor on the meta device}: the shapes and types in a safetensors file. Raises ValueError if broken."""
    try:
        with safe_open(path, "pt") as file:
            # on the CPU a tensor is a map of the file: no number is read
            return {name: file.get_tensor(name).to("meta") for name in file.keys()}
    except BROKEN as error:
        if "allocate memory" in str(error):
            fail(f"{path} is too large for the memory that is free here ({error}). Free some.")
        sentence = f"The checkpoint file {path} cannot be read ({error}). Fetch or train it again."
        raise ValueError(sentence) from error


def misfits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """What keeps the tensors of a file from fitting those of a model, as phrases."""
    phrases = []
    for name, tensor in expected.items():
        actual = tuple(found[name].shape) if name in found else "missing"
        if actual != tuple(tensor.shape):
            phrases.append(f"{name} {tuple(tensor.shape)} (file: {actual})")
    foreign = [f"{name} (not a part of the model)" for name in found if name not in expected]
    return phrases[:2] + foreign + phrases[2:]  # names spelt otherwise show early


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file beside its place, then renamed; tensors of a GPU take as much host memory meanwhile."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A model that was read from this very file is a map of it: renaming leaves the old file to the map.
    with whole_file(path) as beside:
        save_file(tensors, beside, {"format": "pt"})
        sync(beside)


# ---- sharded tensors -----------------------------------------------------------------------------------------------------


def local_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """This rank's rows of a tensor -> (number of the first, the rows themselves). A plain tensor is whole."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    mesh, placements = tensor.device_mesh, tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    with torch.no_grad():
        return offset[0], tensor.to_local()


def is_saved_here(tensor):
    """True on the one rank that saves these rows: the first of the replicas, rank 0 for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return is_main()
    ranks = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(rank == 0 or placement.is_shard() for rank, placement in ranks)


def write_gathered(path: Path, tensors: Iterable) -> None:
    """`write_file` of (name, tensor) pairs, maybe sharded: called on every rank, gathered one by one, written by rank 0."""
    gathered = {}
    for name, tensor in tensors:
        whole = full(tensor.detach())
        if is_main():
            gathered[name] = whole.cpu()
    if is_main():
        write_file(path, gathered)


# ---- what resumes a run --------------------------------------------------------------------------------------------------


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{name: tensor} of what AdamW changes: the trainable parameters and its moments, the tensors themselves.

    The moments are made here if there was no step yet, as AdamW would make them, so that they can be restored.
    """
    tensors = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        if not state:
            is_fused = optimizer.defaults["fused"]  # that kernel wants its count of steps beside p
            state["step"] = torch.zeros((), device=p.device if is_fused else "cpu")
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        tensors[f"model.{name}"] = p
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return tensors


class TrainingState:
    """What a run goes on from: tensors and clock in `out`/training, and its metric log.

    start   the step to begin with
    """

    def __init__(self, out: str | Path, tensors: dict[str, Tensor]):
        """tensors   those of `training_tensors`, and maybe more: what was saved is copied into them."""
        self.folder = Path(out) / "training"
        self.tensors = tensors
        self.start, state = load_state(self.folder, tensors)
        self.clock = Clock(state.get("clock"))
        self.log = MetricLog(Path(out) / "log.jsonl", self.start)

    def save(self, done: int) -> None:
        """Save what there is after `done` steps."""
        save_state(self.folder, done, self.tensors, {"clock": self.clock.read()})


def save_state(folder: str | Path, step: int, tensors: dict[str, Tensor], state: dict) -> None:
    """Save folder/step_000012, every rank its own rows; the older checkpoint goes when this one is complete.

    step      steps done so far: the step a resumed run begins with
    tensors   {name: tensor}, sharded or the same on every rank
    state     what else the loop must know, JSON
    Called on every rank. An interrupted or failed save leaves the older checkpoint as it was.
    """
    folder = Path(folder)
    place, beside = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    rank = dist.get_rank() if dist.is_initialized() else 0
    if is_main():
        for killed in folder.glob("step_*.partial"):
            shutil.rmtree(killed)
        with disk(place):
            beside.mkdir(parents=True)
    wait_for_all()
    is_written = False
    try:
        rows = {name: local_rows(x)[1] for name, x in tensors.items() if is_saved_here(x)}
        write_file(beside / f"rank_{rank:05d}.safetensors", rows)
        if is_main():
            write_json(beside / "state.json", {"step": step, **state})
            sync(beside / "state.json")
        sync(beside)
        is_written = True
    finally:  # the other ranks must hear of any failure, or they wait for ever
        failures = global_sum(float(not is_written))
        if is_main() and failures:
            shutil.rmtree(beside)
        elif is_main():
            shutil.rmtree(place, ignore_errors=True)
            os.replace(beside, place)
            sync(folder)  # a power loss must not find the older one gone and this one empty
            for older in set(folder.glob("step_*")) - {place}:
                shutil.rmtree(older)
        wait_for_all()
    if failures:
        fail(f"Another rank could not write {place}. What was saved before is untouched.")


def load_state(folder: str | Path, tensors: dict[str, Tensor]) -> tuple[int, dict]:
    """Copy the newest complete checkpoint of `folder` into `tensors`, in place, and return (step, state).

    tensors   as `save_state` took them; they may be sharded over another number of ranks
    returns   (0, {}), and changes nothing, where there is no checkpoint
    """
    places = sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".partial")
    if not places:
        return 0, {}
    try:
        state = json.loads((places[-1] / "state.json").read_text())
        files = sorted(places[-1].glob("rank_*.safetensors"))
        compare_shapes(places[-1], files, tensors)
        rows_before = dict.fromkeys(tensors, 0)  # of each tensor, in the files read so far
        for path in files:
            restore_file(path, tensors, rows_before)
        return state.pop("step"), state
    except BROKEN as error:
        start = "the checkpoint before it" if len(places) > 1 else "the beginning"
        again = f"Remove it and run the same command again: it starts from {start}."
        fail(f"The checkpoint {places[-1]} cannot be read ({error}). {again}")


def compare_shapes(place, files, tensors):
    """Exit where the files of the checkpoint `place` hold other tensors than these."""
    saved = {}
    for path in files:
        for name, rows in contents(path).items():
            saved[name] = torch.cat([saved[name], rows]) if name in saved else rows
    for phrase in misfits(tensors, saved):
        fail(f"The checkpoint {place} does not fit this model: {phrase}. Give another --out.")


@torch.no_grad()
def restore_file(path, tensors, rows_before):
    """Copy into `tensors` what this rank holds of the rows in a file, and add their numbers to `rows_before`."""
    with safe_open(path, "pt") as file:
        for name in file.keys():
            first, rows = local_rows(tensors[name])
            if not rows.dim():
                rows.copy_(file.get_tensor(name))
                continue
            stored, before = file.get_slice(name), rows_before[name]
            after = rows_before[name] = before + stored.get_shape()[0]
            start, stop = max(first, before), min(first + len(rows), after)
            if start < stop:
                rows[start - first : stop - first] = stored[start - before : stop - before]
