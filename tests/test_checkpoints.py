"""pytest tests/test_checkpoints.py: tensors on disk, and resuming on any number of ranks.  CPU, about 5 s."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import checkpoints, distributed
from lib.distributed import World, fail, is_main, setup, shard
from lib.records import whole_folder

# ---------------------------------------------------------------- one file


def some_tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 3, generator=g),
        "a.weight": torch.randn(4, 2, 3, generator=g),
        "half": torch.randn(7, generator=g).bfloat16(),
        "count": torch.tensor(3.0),
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.zeros(0, 4),
        "naïve": torch.ones(2, dtype=torch.float64),
        "turned": torch.randn(3, 5, generator=g).T,
    }


def test_a_file_gives_back_what_was_written(tmp_path):
    tensors = some_tensors()
    checkpoints.write_file(tmp_path / "file", tensors)
    read, layout = load_file(tmp_path / "file"), checkpoints.contents(tmp_path / "file")
    assert read.keys() == layout.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(read[key], value)
        assert (layout[key].shape, layout[key].dtype) == (value.shape, value.dtype)
        assert layout[key].is_meta


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    shared = torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoints.write_file(tmp_path / "file", {"w": shared, "v": shared})
    assert list(tmp_path.iterdir()) == []


def test_a_model_may_be_saved_over_the_file_that_it_is_a_map_of(tmp_path):
    big = {"w": torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))}
    save_file(big, tmp_path / "file")
    mapped = load_file(tmp_path / "file")
    checkpoints.write_file(tmp_path / "file", {"w": mapped["w"] + 1})
    assert torch.equal(mapped["w"], big["w"]) and torch.equal(
        load_file(tmp_path / "file")["w"], big["w"] + 1
    )


def test_a_broken_file_is_a_sentence(tmp_path):
    checkpoints.write_file(tmp_path / "file", some_tensors())
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(ValueError, match="file cannot be read"):
        checkpoints.contents(tmp_path / "file")


# ---------------------------------------------------------------- what resumes a run


def small_state(value):
    return {"w": torch.full((3,), float(value)), "step": torch.tensor(float(value))}


def test_newest_checkpoint_replaces_the_older(tmp_path):
    tensors = small_state(0)
    assert checkpoints.load_state(tmp_path / "training", tensors) == (0, {})
    for step in (1, 2):
        checkpoints.save_state(tmp_path / "training", step, small_state(step), {"note": step})
    assert checkpoints.load_state(tmp_path / "training", tensors) == (2, {"note": 2})
    assert tensors["w"].tolist() == [2.0] * 3 and tensors["step"].item() == 2
    assert [p.name for p in (tmp_path / "training").iterdir()] == ["step_000002"]


def test_a_checkpoint_is_on_the_disk_before_the_older_one_goes(tmp_path, monkeypatch):
    checkpoints.save_state(tmp_path, 1, small_state(1), {})
    synced = []

    def note(number):
        name = Path(os.readlink(f"/proc/self/fd/{number}")).name
        synced.append((name, (tmp_path / "step_000001").exists()))

    monkeypatch.setattr(os, "fsync", note)
    checkpoints.save_state(tmp_path, 2, small_state(2), {})
    names = [name for name, _ in synced]
    assert names[0].endswith(".partial")  # the tensors, before they are renamed
    assert names[1:] == ["state.json", "step_000002.partial", tmp_path.name]
    assert all(is_there for _, is_there in synced)


def test_of_two_whole_checkpoints_the_newer_is_read(tmp_path):
    """A kill between the renaming of the newer and the end of the older leaves both."""
    for step in (9, 10):
        checkpoints.save_state(tmp_path / str(step), step, small_state(step), {"note": step})
        (tmp_path / str(step) / f"step_{step:06d}").rename(tmp_path / f"step_{step:06d}")
    tensors = small_state(0)
    assert (
        checkpoints.load_state(tmp_path, tensors) == (10, {"note": 10})
        and tensors["step"].item() == 10
    )


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "tower.safetensors").touch()
    for step in (1, 2):
        checkpoints.save_state(tmp_path, step, small_state(step), {})
    assert {p.name for p in tmp_path.iterdir()} == {"step_000002", "tower.safetensors"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_full_disk_is_a_sentence_and_keeps_the_older_checkpoint(tmp_path, monkeypatch, error):
    checkpoints.save_state(tmp_path, 1, small_state(1), {})

    def full(*paths):
        raise error

    monkeypatch.setattr(checkpoints.os, "replace", full)
    with pytest.raises(SystemExit, match="disk is full"):
        checkpoints.save_state(tmp_path, 2, small_state(2), {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]
    assert checkpoints.load_state(tmp_path, small_state(0))[0] == 1


def save_and_be_killed(folder):
    """A first checkpoint, and SIGKILL between the tensors and the renaming of a second."""
    rename = os.replace
    checkpoints.save_state(folder, 1, {"w": torch.ones(3)}, {})
    checkpoints.os.replace = lambda a, b: (
        rename(a, b) if "rank" in str(b) else os.kill(os.getpid(), signal.SIGKILL)
    )
    checkpoints.save_state(folder, 2, {"w": torch.zeros(3)}, {})


def test_killed_save_keeps_the_older_checkpoint(tmp_path):
    """The next save clears away what the killed one left."""
    with pytest.raises(AssertionError, match="rank 0 ended with -9"):
        on_ranks(1, save_and_be_killed, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "step_000002.partial"}
    tensors = {"w": torch.zeros(3)}
    assert checkpoints.load_state(tmp_path, tensors)[0] == 1 and tensors["w"].tolist() == [1.0] * 3
    checkpoints.save_state(tmp_path, 3, tensors, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]


def test_unreadable_checkpoint_names_the_folder(tmp_path):
    checkpoints.save_state(tmp_path, 3, small_state(3), {})
    (tmp_path / "step_000003" / "rank_00000.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SystemExit, match="step_000003 cannot be read.*Remove it"):
        checkpoints.load_state(tmp_path, small_state(0))


@pytest.mark.parametrize(
    "tensors, sentence",
    [
        ({"w": torch.zeros(4), "step": torch.zeros(())}, r"w \(4,\) \(file: \(3,\)\)"),
        ({"w": torch.zeros(3)}, r"step \(not a part of the model\)"),
        (small_state(0) | {"v": torch.zeros(2)}, r"v \(2,\) \(file: missing\)"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, tensors, sentence):
    checkpoints.save_state(tmp_path, 3, small_state(3), {})
    with pytest.raises(
        SystemExit, match=f"does not fit this model: {sentence}.*Give another --out"
    ):
        checkpoints.load_state(tmp_path, tensors)


def small_model(world):
    """A module whose rows do not divide by 2 or 4, one of its parameters whole on every rank; fused AdamW."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    model.scale = torch.nn.Parameter(torch.ones(3))
    model[2].weight.requires_grad_(False)
    shard(model, [model[0]], world, ignored=[model.scale])
    sharded = [p for p in model.parameters() if p.requires_grad and p is not model.scale]
    groups = [
        {"params": sharded},
        {"params": [model.scale]},
    ]  # one fused step takes one kind of tensor
    return model, torch.optim.AdamW(groups, lr=0.1, fused=True)


def train(folder, first, last):
    """Steps `first` to `last` from what `folder` holds; then saves there, and the whole tensors in folder/step_<last>.

    Rank 0 alone brings data: the sum over ranks then is exact, and any number of ranks gives the same bits.
    """
    folder, first, last = Path(folder), int(first), int(last)
    world = setup(threads=1)
    model, optimizer = small_model(world)
    tensors = checkpoints.training_tensors(model, optimizer)
    assert checkpoints.load_state(folder / "training", tensors) == (
        first,
        {"note": 5} if first else {},
    )
    for step in range(first, last):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)) * (world.rank == 0)
        ((model(x) * model.scale).square().sum() * (world.rank == 0)).backward()
        distributed.sum_gradients(model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    checkpoints.save_state(folder / "training", last, tensors, {"note": 5})
    found = {name: distributed.full(tensor.detach()) for name, tensor in tensors.items()}
    if is_main():
        torch.save(found, folder / f"after_{last}.pt")


def train_then_fill_the_disk(folder, first, last):
    """`train`; then one of two ranks cannot write: both must end with a sentence, and neither wait for the other."""
    train(folder, first, last)
    world, write = setup(threads=1), checkpoints.write_file

    def full(path, tensors):
        if world.rank == 1:
            fail("The disk is full")
        write(path, tensors)

    checkpoints.write_file = full
    sentence = "The disk is full" if world.rank == 1 else "Another rank could not write"
    with pytest.raises(SystemExit, match=sentence):
        checkpoints.save_state(Path(folder) / "training", 9, {"w": torch.zeros(3)}, {})
    assert [p.name for p in (Path(folder) / "training").iterdir()] == [f"step_{int(last):06d}"]


def test_resumed_on_another_number_of_ranks_equals_an_unbroken_run(tmp_path):
    """One process all the way, against 2 ranks then 1, and 1 then 2: the same bits in weights and moments."""
    for run in ("unbroken", "narrower", "wider"):
        (tmp_path / run).mkdir()
    train(tmp_path / "unbroken", 0, 4)
    on_ranks(2, train_then_fill_the_disk, tmp_path / "narrower", 0, 2)
    saved = tmp_path / "narrower" / "training" / "step_000002"
    assert json.loads((saved / "state.json").read_text()) == {"step": 2, "note": 5}
    parts = [checkpoints.contents(saved / f"rank_0000{rank}.safetensors") for rank in range(2)]
    assert [len(part["model.0.weight"]) for part in parts] == [4, 3]  # rows of the 7, not copies
    assert (
        "model.scale" in parts[0]
        and "model.scale" not in parts[1]
        and "model.2.weight" not in parts[0]
    )
    train(tmp_path / "narrower", 2, 4)
    train(tmp_path / "wider", 0, 2)
    on_ranks(2, train, tmp_path / "wider", 2, 4)
    want = torch.load(tmp_path / "unbroken" / "after_4.pt")
    assert len(want) == 4 * 4
    for run in ("narrower", "wider"):
        got = torch.load(tmp_path / run / "after_4.pt")
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_a_file_too_large_for_memory_is_not_called_broken(tmp_path, monkeypatch):
    def no_room(path, framework):
        raise RuntimeError("unable to mmap 29214685368 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(checkpoints, "safe_open", no_room)
    with pytest.raises(SystemExit, match="too large for the memory that is free here") as error:
        checkpoints.contents(tmp_path / "ema.safetensors")
    assert "again" not in str(error.value) and "Remove" not in str(error.value)


def write_from_ranks(folder):
    """A sharded model written in bf16 by `write_gathered`; no rank but the first touches the disk."""
    world = setup(threads=1)
    model, _ = small_model(world)
    tensors = ((name, tensor.bfloat16()) for name, tensor in model.state_dict().items())
    with whole_folder(folder) as part:
        checkpoints.write_gathered(part / "model.safetensors", tensors)


def test_sharded_model_is_written_as_one_file(tmp_path):
    on_ranks(2, write_from_ranks, tmp_path / "out")
    want, got = (
        small_model(World(0, 1, torch.device("cpu")))[0].state_dict(),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert got.keys() == want.keys() and all(
        torch.equal(got[key], want[key].bfloat16()) for key in want
    )
