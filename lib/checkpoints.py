"""
Tensors on disk: safetensors files written and read tensor by tensor, and what resumes an interrupted run.

  out/wm/training/step_000500/rank_00000.safetensors, rank_00001.safetensors, ...     each rank's rows of every tensor
                              state.json                                              the step, the clock

FSDP2 shards a tensor by rows (DTensor), so the parts in the files of the ranks, one behind another, are the whole: any
number of ranks can go on from it, each reading its own rows. The ranks see one file system. Nothing is gathered but the
finished model (`write_whole`, `whole`).
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from lib.common import disk, fail, global_sum, is_main, wait_for_all

TYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPE_NAMES = {
    dtype: name for name, dtype in TYPES.items()
}  # in the order in which safetensors lays tensors down


# ---------------------------------------------------------------- one file


def contents(path):
    """{name: tensor on the meta device}: the shapes and types in a safetensors file. Raises ValueError if broken."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: torch.empty(part.get_shape(), dtype=TYPES[part.get_dtype()], device="meta")
                for name, part in parts.items()
            }
    except Exception as error:  # safetensors has its own error class for a cut-off file
        raise ValueError(
            f"The checkpoint file {path} cannot be read ({error}). Fetch or train it again."
        ) from error


def write_file(path, named, like):
    """Write a safetensors file, one tensor at a time, beside its place, then renamed.

    named   (name, tensor) pairs in any order, on any device, maybe made one by one
    like    {name: tensor of the shape and type to write}, also on the meta device: all that the file will hold
    Raises ValueError unless `named` brings exactly these names and shapes. What safetensors' own `save_file` would
    write, byte for byte, but that one holds all tensors in host memory first.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    order = list(TYPE_NAMES)
    for name in sorted(like, key=lambda name: (order.index(like[name].dtype), name)):
        start, end = end, end + like[name].numel() * like[name].itemsize
        header[name] = {
            "dtype": TYPE_NAMES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8 bytes
    path, missing = Path(path), set(like)
    beside = path.with_name(path.name + ".partial")
    try:
        with disk(path):
            with open(beside, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name, tensor in named:
                    if name not in missing or tensor.shape != like[name].shape:
                        raise ValueError(
                            f"{path} cannot hold {name} {tuple(tensor.shape)}: "
                            + (
                                f"its shape there is {tuple(like[name].shape)}"
                                if name in missing
                                else "it is there already"
                                if name in like
                                else "there is no such tensor in it"
                            )
                        )
                    missing.remove(name)
                    file.seek(8 + len(text) + header[name]["data_offsets"][0])
                    numbers = tensor.detach().to(like[name].dtype).cpu().contiguous()
                    file.write(numbers.reshape(-1).view(torch.uint8).numpy())
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(sorted(missing)[:4])}: {len(missing)} tensors not given"
                )
            # A model that was read from this very file is a map of it: renaming leaves the old file to the map.
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------- sharded tensors


def share(tensor):
    """This rank's part of a tensor -> (number of its first row, the part itself). A plain tensor is its own part."""
    if not isinstance(tensor, DTensor):
        return 0, tensor
    first = 0
    for ranks, rank, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate(), tensor.placements
    ):
        if (
            placement.is_shard()
        ):  # as torch.chunk: every rank ceil(rows / ranks), the last ones fewer
            assert placement.is_shard(0), f"{placement} divides something else than rows"
            first = min(rank * -(-len(tensor) // ranks), len(tensor))
    with torch.no_grad():
        return first, tensor.to_local()


def is_saved_here(tensor):
    """True on the one rank that saves this part: the first of the replicas, rank 0 for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return is_main()
    return all(
        rank == 0 or placement.is_shard()
        for rank, placement in zip(tensor.device_mesh.get_coordinate(), tensor.placements)
    )


def full(tensor):
    """The whole of a tensor, on every rank (a collective if it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(named):
    """Gather sharded tensors: an iterable of (name, tensor) -> {name: whole CPU copy} on rank 0, {} on the others.

    Every rank must call it with the same names in the same order. Rank 0's memory must hold them all: `write_whole`
    needs less.
    """
    tensors = {}
    for name, tensor in named:
        gathered = full(tensor)
        if is_main():
            tensors[name] = gathered.detach().to("cpu", copy=True).contiguous()
    return tensors


def write_whole(path, named, like):
    """`write_file` for sharded tensors: called on every rank, gathered one tensor at a time, written by rank 0."""
    gathered = ((name, full(tensor.detach())) for name, tensor in named)
    if is_main():
        write_file(path, gathered, like)
    else:
        for _ in gathered:  # only takes part in the collectives
            pass


# ---------------------------------------------------------------- what resumes a run


def training_tensors(model, optimizer):
    """{name: tensor} of what AdamW changes: the trainable parameters and its moments, the tensors themselves.

    The moments are made here if there was no step yet, as AdamW would make them, so that they can be restored.
    """
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            if not optimizer.state[p]:
                fused = optimizer.defaults[
                    "fused"
                ]  # the fused kernel wants its count of steps beside p
                optimizer.state[p].update(
                    step=torch.zeros((), device=p.device if fused else "cpu"),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
            tensors[f"model.{name}"] = p
            tensors |= {
                f"optimizer.{key}.{name}": value for key, value in optimizer.state[p].items()
            }
    return tensors


def save_state(folder, step, tensors, state):
    """Save folder/step_000012, every rank its own rows; the older checkpoint goes when this one is complete.

    step      steps done so far: the step a resumed run begins with
    tensors   {name: tensor}, sharded or the same on every rank
    state     what else the loop must know, JSON
    Called on every rank. An interrupted or failed save leaves the older checkpoint as it was.
    """
    folder, failure = Path(folder), None
    place, beside = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    rank = dist.get_rank() if dist.is_initialized() else 0
    if is_main():
        for left in folder.glob("step_*.partial"):  # of a run that was killed
            shutil.rmtree(left)
        with disk(place):
            beside.mkdir(parents=True)
    wait_for_all()
    try:
        mine = {name: share(tensor)[1] for name, tensor in tensors.items() if is_saved_here(tensor)}
        write_file(beside / f"rank_{rank:05d}.safetensors", mine.items(), mine)
        if is_main():
            with disk(place):
                (beside / "state.json").write_text(
                    json.dumps({"step": step, **state}, indent=1) + "\n"
                )
    except (
        Exception,
        SystemExit,
    ) as error:  # the other ranks must hear of it, or they wait for ever
        failure = error
    failures = global_sum(float(failure is not None))
    if is_main():
        if failures:
            shutil.rmtree(beside)
        else:
            shutil.rmtree(place, ignore_errors=True)
            os.replace(beside, place)
            for other in folder.glob("step_*"):
                if other != place:
                    shutil.rmtree(other)
    wait_for_all()
    if failure:
        raise failure
    if failures:
        fail(f"Another rank could not write {place}. What was saved before is untouched.")


def load_state(folder, tensors):
    """Copy the newest complete checkpoint of `folder` into `tensors`, in place, and return (step, state).

    tensors   as `save_state` took them; they may be sharded over another number of ranks
    returns   None, and changes nothing, where there is no checkpoint
    """
    places = sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".partial")
    if not places:
        return None
    try:
        state = json.loads((places[-1] / "state.json").read_text())
        restore(places[-1], tensors)
        return state.pop("step"), state
    except Exception as error:  # safetensors, JSON and the file system each have their own class
        fail(
            f"The checkpoint {places[-1]} cannot be read ({error}). Remove it and run the same command again: "
            f"it starts from {'the checkpoint before it' if len(places) > 1 else 'the beginning'}."
        )


@torch.no_grad()
def restore(place, tensors):
    """Fill `tensors` in place from the files in the folder `place`: of each tensor the rows that this rank holds."""
    files, shapes = sorted(place.glob("rank_*.safetensors")), {}
    for path in files:
        for name, part in contents(path).items():
            rows = shapes[name][0] if shapes.get(name) else 0
            shapes[name] = (rows + len(part), *part.shape[1:]) if part.dim() else ()
    wrong = [
        f"{name} {tuple(tensors[name].shape) if name in tensors else '(unknown)'}, saved "
        f"{shapes.get(name, 'nothing')}"
        for name in tensors | shapes
        if name not in tensors or shapes.get(name) != tuple(tensors[name].shape)
    ]
    if wrong:
        fail(
            f"The checkpoint {place} does not fit this model: {wrong[0]}"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + ". Give another --out."
        )
    done = dict.fromkeys(tensors, 0)  # rows of each tensor in the files read so far
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                first, mine = share(tensors[name])
                if not mine.dim():
                    mine.copy_(file.get_tensor(name))
                    continue
                part, before = file.get_slice(name), done[name]
                done[name] += part.get_shape()[0]
                start, stop = max(first, before), min(first + len(mine), done[name])
                if start < stop:
                    mine[start - first : stop - first].copy_(part[start - before : stop - before])
