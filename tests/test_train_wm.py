"""Training of the world simulator: losses by hand, batches, resuming, ranks. `pytest tests/test_train_wm.py`"""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import train_wm
from lib import common, lora
from world_model import WorldModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Triples of a few rooms."""
    folder = tmp_path_factory.mktemp("data")
    data.make_triples(folder, rooms=5, held_out=1, threads=1)
    (folder / "questions_test.jsonl").touch()  # nothing else is to be made
    return folder


def flags(rooms, out, *more):
    return [
        "--data",
        str(rooms),
        "--out",
        str(out),
        "--steps",
        "4",
        "--contexts",
        "4",
        "--micro-contexts",
        "4",
        "--warmup",
        "1",
        "--look-every",
        "100",
        "--pose-every",
        "2",
        "--warp-weight",
        "0.1",
        "--seen-weight",
        "0.1",
        "--pose-weight",
        "1",
        *more,
    ]


def contexts(rooms, split="train"):
    """The contexts of a split, some with fewer targets than others."""
    found = train_wm.contexts_of(data.load_jsonl(rooms / f"triples_{split}.jsonl"), most=8)
    return [group[i % 3 :] for i, group in enumerate(found)]


def batch_of(rooms, *more, groups=slice(None), with_pose=False):
    args = train_wm.parse_args(flags(rooms, "out", *more))
    model = WorldModel.tiny(0)
    return (
        args,
        model,
        train_wm.collate(
            contexts(rooms)[groups], model, train_wm.read_image, args, 3, 0, with_pose
        ),
    )


# ---------------------------------------------------------------- losses


def test_flow_matching_is_zero_at_the_truth_and_t_squared_apart():
    g = torch.Generator().manual_seed(0)
    x0, eps, out = (torch.randn(3, 5, 4, generator=g) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    x = (1 - t) * x0 + t * eps
    assert train_wm.flow_matching(x0, x0, eps, "x0").abs().max() == 0
    assert train_wm.flow_matching(eps - x0, x0, eps, "velocity").abs().max() == 0
    of_velocity = train_wm.flow_matching(
        (x - out) / t, x0, eps, "velocity"
    )  # the same guess, told as a velocity
    of_x0 = train_wm.flow_matching(out, x0, eps, "x0")
    torch.testing.assert_close(t[..., 0] ** 2 * of_velocity, of_x0, rtol=1e-4, atol=1e-5)


def test_pose_term_by_hand():
    """Two targets of one context, one token of two numbers each; each is the other's `other`."""
    x0 = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # apart by (4 + 0) / 2 = 2
    target, other, t = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
    blind = torch.tensor(
        [[1.0, 0.0], [1.0, 0.0]], requires_grad=True
    )  # the same view whatever is said
    term = train_wm.pose(blind, blind, x0, t, target, other, times=(0.3, 0.9), margin=0.5)
    torch.testing.assert_close(term, torch.full((2,), 0.5 * 2.0))  # as far from both views
    term.sum().backward()
    torch.testing.assert_close(blind.grad, (blind - x0).detach())  # through the true sentence only
    zero = dict(
        x0_hat=x0, x0_other=x0[other], x0=x0, t=t, target=target, other=other, times=(0.3, 0.9)
    )
    assert train_wm.pose(**zero).abs().max() == 0  # each sentence its view
    zero |= dict(x0_hat=blind, x0_other=blind)
    assert train_wm.pose(**zero | {"times": (0.5, 0.9)}).abs().max() == 0  # t is not inside
    assert (
        train_wm.pose(**zero | {"x0": x0[:1].expand(2, -1)}).abs().max() == 0
    )  # one view with two names
    assert train_wm.pose(**zero | {"other": target}).abs().max() == 0  # no other target


def test_pose_distance_is_a_mean_over_the_tokens_of_each_target():
    """Targets of two and of one token: each token carries the term of its own target."""
    x0, target = torch.zeros(3, 1), torch.tensor([0, 0, 1])
    x0_hat, other = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([2, 2, 1])
    x0[2] = 1.0
    term = train_wm.pose(
        x0_hat, torch.zeros(3, 1), x0, torch.full((3,), 0.5), target, other, (0.3, 0.9), margin=0.0
    )
    torch.testing.assert_close(term, torch.tensor([5.0, 5.0, 0.0]))  # (1 + 9) / 2 - 0;  1 - 1


def test_content_term_counts_seen_cells_only():
    x0_hat, x0, warp = torch.ones(2, 4), torch.zeros(2, 4), torch.full((2, 4), 3.0)
    seen = torch.tensor([1.0, 0.0])
    term = train_wm.content(x0_hat, x0, warp, seen, seen_weight=0.5, warp_weight=0.25)
    torch.testing.assert_close(term, torch.tensor([0.5 * 1 + 0.25 * 4, 0.0]))


# ---------------------------------------------------------------- batches


def test_mirrored_rooms_keep_their_ring():
    """Turning left by 90 degrees ends at the next image of the ring; in the mirror, a right turn at the one before."""
    pictures = {
        k: np.full((2, 2, 3), 10 * k, np.uint8) + np.array([[[0], [1]]], np.uint8) for k in range(4)
    }
    pictures["warp"] = np.dstack(
        [pictures[3], np.full((2, 2), 255, np.uint8)]
    )  # each picture's columns differ
    rows = [
        {
            "context": range(4),
            "reference": 3,
            "target": 3,
            "warp": "warp",
            "motion": {"kind": "turn left", "amount": 90.0},
        }
    ]
    mirrored = 0
    for seed in range(8):
        stream = torch.Generator().manual_seed(seed)
        context, reference, motions, targets, warps = train_wm.pictures(
            rows, pictures.get, True, stream
        )
        step = {"turn left": 1, "turn right": -1}[motions[0].kind]
        assert np.array_equal(targets[0], context[reference - 1 + step])
        assert np.array_equal(warps[0, ..., :3], targets[0])
        mirrored += step == -1
    assert 0 < mirrored < 8


def test_warps_lie_on_the_target(rooms):
    """Where a context view sees the target, the warped context shows what the target shows."""
    _, _, batch = batch_of(rooms)
    assert batch.x0.shape == batch.warp.shape == (len(batch.seen), 192) and batch.seen.mean() > 0.85
    shown = (batch.warp - batch.x0).square().mean()
    shifted = (batch.warp[batch.other] - batch.x0).square().mean()
    assert shown < 0.2 * shifted


def test_batches_do_not_depend_on_how_a_step_is_divided(rooms):
    args, model, whole = batch_of(rooms)
    groups = contexts(rooms)
    parts = [
        train_wm.collate(groups[i : i + 1], model, train_wm.read_image, args, step=3, first=i)
        for i in range(len(groups))
    ]
    for key in ("t", "eps", "x0", "warp", "seen"):
        divided = torch.cat([getattr(part, key) for part in parts])
        torch.testing.assert_close(divided, getattr(whole, key), rtol=0, atol=0)


def test_gradient_does_not_depend_on_micro_batches(rooms):
    """Contexts with unequal numbers of targets expose a mean of means."""
    args, model, whole = batch_of(rooms, with_pose=True)
    groups = contexts(rooms)
    assert len({len(group) for group in groups}) > 1
    with torch.no_grad():
        model.network.llm2vae.weight.normal_(std=0.05)
    parts = [
        train_wm.collate(groups[i : i + 2], model, train_wm.read_image, args, 3, i, with_pose=True)
        for i in range(0, len(groups), 2)
    ]
    gradients = []
    for batches in ([whole], parts):
        model.network.zero_grad()
        for batch in batches:
            (sum(train_wm.losses(model.network, batch, args).values()) / len(whole.x0)).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def sentences(pack):
    """The words of every text segment of a pack's branches, in order."""
    group = pack.tokens.group[:, : pack.ids.shape[1]]
    return [
        tuple(ids[g == k].tolist())
        for ids, g in zip(pack.ids, group)
        for k in range(1, int(g.max()) + 1)
    ]


def test_shuffled_instructions_are_other_targets_words(rooms):
    _, model, true = batch_of(rooms, groups=slice(1))
    _, _, shuffled = batch_of(rooms, "--shuffle-instructions", groups=slice(1))
    rows = [sentences(batch.pack) for batch in (true, shuffled)]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


def test_the_pose_term_reads_another_targets_sentence_under_the_same_noise(rooms):
    _, _, batch = batch_of(rooms, groups=slice(2), with_pose=True)
    true, other = sentences(batch.pack), sentences(batch.pack_other)
    first = [int((batch.target == k).nonzero()[0]) for k in range(len(true))]
    assert other == [true[int(batch.target[batch.other[i]])] for i in first] and true != other
    for key in ("latents", "noise", "t", "target"):
        assert torch.equal(getattr(batch.pack, key), getattr(batch.pack_other, key))


def test_a_target_without_its_sentence_has_no_other(rooms):
    args, _, batch = batch_of(
        rooms, "--drop-text", "1", "--pose-weight", "1", "--pose-times", "0", "1", with_pose=True
    )
    assert torch.equal(batch.other, torch.arange(len(batch.other)))
    x0_hat = batch.x0 + torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(0))
    assert (
        train_wm.pose(
            x0_hat, batch.x0, batch.x0, batch.t, batch.target, batch.other, args.pose_times
        ).sum()
        == 0
    )


def test_condition_dropout_hides_sentences_and_segments(rooms):
    _, model, batch = batch_of(
        rooms, "--drop-text", "0.5", "--drop-vae", "0.5", "--drop-vit", "1.0"
    )
    texts = [len(words) > 2 for words in sentences(batch.pack)]  # two markers are always there
    assert 0 < np.mean(texts) < 1
    assert (batch.pack.patch_ids == -1).all()  # no ViT picture is left
    contexts_left = (batch.pack.numbers >= 0).sum()
    assert 0 < contexts_left < 4 * len(batch.pack.ids)


def test_the_control_moves_the_weights_to_random_places(rooms):
    _, _, batch = batch_of(rooms)
    _, _, control = batch_of(rooms, "--control")
    assert not torch.equal(batch.seen, control.seen)
    torch.testing.assert_close(batch.seen.sort()[0], control.seen.sort()[0])


def test_times_are_shifted_towards_noise(rooms):
    _, _, batch = batch_of(rooms, "--shift", "4.0")
    s = torch.logit(batch.t) - math.log(4.0)
    assert abs(s.mean()) < 0.5 and 0.6 < s.std() < 1.5
    u = torch.sigmoid(s)
    torch.testing.assert_close(batch.t, 4 * u / (1 + 3 * u))  # BAGEL's formula


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--ema", "2"),
        ("--drop-text", "-0.1"),
        ("--lr", "nan"),
        ("--shift", "0"),
        ("--threads", "0"),
        ("--pose-times", "0.9 0.1"),
    ],
)
def test_impossible_flags_are_refused_by_name(flag, value, capsys):
    with pytest.raises(SystemExit):
        train_wm.parse_args([flag, *value.split()])
    assert f"{flag} {value}" in capsys.readouterr().err


def test_several_folders_are_trained_together(rooms, tmp_path):
    """As the paper's five datasets of scans are: every context of each, with its own pictures."""
    shutil.copytree(rooms, tmp_path / "more")
    alone, both = (
        [
            group
            for split in train_wm.load_data(
                train_wm.parse_args(["--data", *map(str, folders), "--look-contexts", "100"]),
                common.World(0, 1, 0, None),
            )
            for group in split
        ]
        for folders in ([rooms], [rooms, tmp_path / "more"])
    )
    assert len(both) == 2 * len(alone)
    assert {Path(group[0]["context"][0]).is_relative_to(tmp_path / "more") for group in both} == {
        True,
        False,
    }


def test_held_out_pictures_may_have_an_alpha_channel(rooms):
    """Training puts them on white; so does the look at held-out views."""

    def clear(path):
        image = train_wm.read_image(path)[..., :3]
        return np.concatenate([image, np.full_like(image[..., :1], 255)], -1)

    model, groups = WorldModel.tiny(0), contexts(rooms)[:1]
    assert (
        train_wm.look(model, groups, clear)[0]
        == train_wm.look(model, groups, train_wm.read_image)[0]
    )


def test_resumed_run_equals_unbroken_run(rooms, tmp_path, monkeypatch):
    train_wm.main(flags(rooms, tmp_path / "whole"))
    for stop_after in (1, 3):
        calls = iter(range(100))
        monkeypatch.setattr(
            common.Interrupt, "requested", lambda self: next(calls) + 1 == stop_after
        )
        with pytest.raises(SystemExit) as left:
            train_wm.main(flags(rooms, tmp_path / "parts"))
        assert left.value.code == 130
    monkeypatch.undo()
    train_wm.main(flags(rooms, tmp_path / "parts"))
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (common.read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert a == b and [row["step"] for row in a] == [0, 1, 2, 3] and a[3]["nearest"] is not None
    assert (tmp_path / "parts" / "done.json").exists() and (
        tmp_path / "parts" / "views.png"
    ).exists()
    with pytest.raises(SystemExit) as left:  # a finished run says so and stays
        train_wm.main(flags(rooms, tmp_path / "parts"))
    assert left.value.code == 0


def test_two_ranks_train_the_model_of_one(rooms, tmp_path):
    train_wm.main(flags(rooms, tmp_path / "one", "--steps", "2"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "train_wm.py",
    ]
    command += flags(rooms, tmp_path / "two", "--steps", "2", "--micro-contexts", "1")
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5, msg=key)


def test_adapters_train_beside_frozen_weights_and_are_merged_when_saved(rooms, tmp_path):
    """--lora: from a checkpoint, in the same layout again; only what has an adapter has changed."""
    model = WorldModel.tiny(0)
    with torch.no_grad():
        model.network.llm2vae.weight.normal_(std=0.05)  # zero would stop every gradient
    model.save(tmp_path / "base")
    train_wm.main(
        flags(
            rooms,
            tmp_path / "lora",
            "--init",
            str(tmp_path / "base"),
            "--lora",
            "4",
            "--lr",
            "1e-2",
        )
    )
    before, after = (load_file(tmp_path / name / "ema.safetensors") for name in ("base", "lora"))
    assert {key: value.shape for key, value in before.items()} == {
        key: value.shape for key, value in after.items()
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(re.fullmatch(lora.LANGUAGE_LAYERS + r"\.weight", key) for key in changed)
    assert len(list((tmp_path / "lora").glob("*.safetensors"))) == 1
    WorldModel.load(tmp_path / "lora")


def test_training_lowers_the_loss(rooms, tmp_path):
    train_wm.main(flags(rooms, tmp_path, "--steps", "30", "--lr", "2e-3"))
    loss = [row["loss_flow"] for row in common.read_log(tmp_path / "log.jsonl")]
    assert np.mean(loss[-5:]) < 0.6 * np.mean(loss[:5])
