"""Ranks that compute as one, and the random streams that no rank moves. `pytest tests/test_distributed.py`"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks

from lib import distributed, streams


def two_steps(out):
    """Two steps of a small module on this rank's share of 5 rows; saves what rank 0 saw in `out`."""
    world = distributed.setup(threads=1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    model.scale = torch.nn.Parameter(torch.ones(3))  # whole on every rank
    distributed.shard(model, [model[0]], world, ignored=[model.scale])
    sharded = [p for p in model.parameters() if p is not model.scale]
    optimizer = torch.optim.AdamW(sharded, lr=0.1)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))[world.rank :: world.size]
    n = distributed.global_sum(float(len(x)))
    for _ in range(2):
        model.zero_grad()
        ((model(x) * model.scale).square().sum() / n).backward()
        distributed.sum_gradients(model.parameters())
        gradients = {name: distributed.full(p.grad) for name, p in model.named_parameters()}
        norm = distributed.clip_gradients(sharded, 0.5)
        optimizer.step()
    with distributed.unsharded(model), torch.no_grad():
        for _ in range(1 + world.rank):  # ranks may differ in their number of passes
            model(x)
    means = distributed.Means(["value", "nothing"])
    for value in range(1 + world.rank):  # 0 on rank 0; 0 and 1 on rank 1
        means.add("value", torch.tensor(float(value)))
    means = means.read()
    if distributed.is_main():
        torch.save({"n": n, "norm": norm, "gradients": gradients, "means": means}, out)


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    """FSDP's default is a mean over ranks, which would give half; 3 rows on one rank and 2 on the other expose more."""
    two_steps(tmp_path / "one.pt")
    on_ranks(2, two_steps, tmp_path / "two.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert one["n"] == two["n"] == 5 and len(one["gradients"]) == 5
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-4)
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-5)
    assert one["means"] == {"value": 0.0} and two["means"] == {"value": 1 / 3}


def one_gives_up(folder):
    """Rank 1 ends with a sentence, and rank 0 knows nothing of it."""
    (Path(folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    if distributed.setup(threads=1).rank == 1:
        distributed.fail("This is enough.")
    time.sleep(60)


def test_a_rank_that_fails_is_heard_and_the_others_end(tmp_path):
    start = time.monotonic()
    words = "rank 1 ended with 1:\n(.*\n)+SystemExit: This is enough."
    with pytest.raises(AssertionError, match=words):
        on_ranks(2, one_gives_up, tmp_path)
    assert time.monotonic() - start < 30
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_a_gradient_that_is_not_finite_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert distributed.clip_gradients([weight], 1.0) == pytest.approx(5)
    assert weight.grad.norm() == pytest.approx(1)
    weight.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(SystemExit, match="not finite"):
        distributed.clip_gradients([weight], 1.0)


def squares_of_two_ranks(out):
    """What both ranks know of work that each did in part."""
    world = distributed.setup(threads=1)
    done = []

    def square(items):
        done.extend(items)
        return [item**2 for item in items]

    results = distributed.split_work(square, list(range(5)))
    torch.save({"done": done, "results": results}, f"{out}.{world.rank}")


def test_work_is_shared_and_its_results_are_on_every_rank_in_order(tmp_path):
    on_ranks(2, squares_of_two_ranks, tmp_path / "out")
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert first == {"done": [0, 2, 4], "results": [0, 1, 4, 9, 16]}
    assert second == {"done": [1, 3], "results": [0, 1, 4, 9, 16]}


def test_means_are_sums_over_counts():
    means = distributed.Means(["loss", "share", "nothing"])
    means.add("loss", torch.tensor(6.0), 4)
    means.add("loss", 2.0, 0)
    for share in (True, False, True, True):
        means.add("share", share)
    assert means.read() == {"loss": 2.0, "share": 0.75}
    with pytest.raises(KeyError):
        means.add("another", 1.0)


# ---- random streams --------------------------------------------------------------------------------------------------


def test_streams_are_stable_and_apart():
    """The number is written down: a seed that changes between versions would change every stored result."""
    assert streams.stable_hash(0, "a", 1) == 3567593624700274890
    keys = ((0, "a", 1), (0, "a", 1), (0, "b", 1), (0, "a", 2))
    draws = [torch.rand(4, generator=streams.torch_stream("order", *key)) for key in keys]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    with pytest.raises(KeyError, match="no random stream 'ordre'"):
        streams.torch_stream("ordre", 0)


def test_what_is_prefetched_comes_in_order_one_ahead_and_its_failure_with_it():
    made = []

    def make(item):
        made.append(item)
        if item == 3:
            distributed.fail("The third is broken.")
        return 10 * item

    ahead = streams.prefetched(make, range(4))
    assert next(ahead) == 0 and next(ahead) == 10 and next(ahead) == 20
    with pytest.raises(SystemExit, match="third is broken"):
        next(ahead)
    assert made == [0, 1, 2, 3]
    assert list(streams.prefetched(make, [])) == []


def test_every_pass_draws_each_row_once_and_no_step_draws_one_twice():
    passes = np.reshape([streams.rows_of_step(8, 4, step, 0) for step in range(6)], (3, 8)).tolist()
    assert all(sorted(each) == list(range(8)) for each in passes) and passes[0] != passes[1]
    steps = [streams.rows_of_step(10, 4, step, 0) for step in range(40)]  # two left in every pass
    for a, b in zip(steps[::2], steps[1::2], strict=True):
        assert len(set(a + b)) == 8
    assert np.bincount(np.ravel(steps), minlength=10).min() > 8
