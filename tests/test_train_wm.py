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
from lib.geometry import Motion
from lib.protocol import call_of
from lib.records import read_log
from lib.simulators import image_poses
from lib.stage import Interrupt
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
    """A run of four small steps."""
    words = f"--data {rooms} --out {out} --steps 4 --contexts 4 --micro-contexts 4 --warmup 1 --eval-every 100"
    return [*words.split(), "--warp-weight", "0.1", *more]


def groups_of(rooms):
    """Groups of training triples, some with fewer targets than others."""
    groups = train_wm.load_groups([str(rooms)], "train", most=8)
    return [group[i % 3 :] for i, group in enumerate(groups)]


def batch_of(rooms, *more, groups=None, first=0, model=None):
    """The Pack and LossTargets of some groups, by default all; the groups are those from `first` of step 3."""
    args = train_wm.parse_args(flags(rooms, "out", *more))
    groups = groups_of(rooms) if groups is None else groups
    keys = [(0, 3, first + i) for i in range(len(groups))]
    model = model or WorldModel.tiny(0)
    return train_wm.make_batch(groups, keys, model, train_wm.read_image, args)


# ---- losses


def test_flow_matching_is_zero_at_the_truth_and_t_squared_apart():
    """The same guess, once as a velocity and once as a clean latent."""
    g = torch.Generator().manual_seed(0)
    x0, noise, guess = (torch.randn(3, 5, 4, generator=g) for _ in range(3))
    t = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    x_t = (1 - t) * x0 + t * noise
    assert train_wm.flow_matching(x0, x0, noise, "x0").abs().max() == 0
    assert train_wm.flow_matching(noise - x0, x0, noise, "velocity").abs().max() == 0
    of_velocity = train_wm.flow_matching((x_t - guess) / t, x0, noise, "velocity")
    of_x0 = train_wm.flow_matching(guess, x0, noise, "x0")
    torch.testing.assert_close(t[..., 0] ** 2 * of_velocity, of_x0, rtol=1e-4, atol=1e-5)


def test_content_term_counts_seen_tokens_only():
    x0_hat, warp = torch.ones(2, 4), torch.full((2, 4), 3.0)
    term = train_wm.content(x0_hat, warp, seen_share=torch.tensor([0.25, 0.0]))
    torch.testing.assert_close(term, torch.tensor([0.25 * 4, 0.0]))


# ---- batches


def test_a_velocity_is_drawn_to_the_warp_less_and_less_as_noise_goes():
    """The best x0_hat under flow matching and a tenth of the content term, by its gradient."""
    x0, warp, noise = torch.zeros(1, 4), torch.ones(1, 4), torch.full((1, 4), 0.5)
    for t, pull in ((1.0, 0.1 / 1.1), (0.5, 0.025 / 1.025)):
        x_t = (1 - t) * x0 + t * noise
        velocity = ((x_t - pull) / t).requires_grad_()  # x0_hat = pull, between 0 and the warp
        loss = train_wm.flow_matching(velocity, x0, noise, "velocity")
        loss = loss + 0.1 * train_wm.content(x_t - t * velocity, warp, torch.ones(1))
        loss.sum().backward()
        assert velocity.grad.abs().max() < 1e-6


def test_mirrored_rooms_keep_their_ring():
    """Turning left by 90 degrees ends at the next image of the ring; in the mirror, a right turn at the one before."""
    files = {}
    for k in range(4):  # the columns of each picture differ
        files[k] = np.full((2, 2, 3), 10 * k, np.uint8) + np.array([[[0], [1]]], np.uint8)
    files["warp"] = np.dstack([files[3], np.full((2, 2), 255, np.uint8)])
    row = {"context": range(4), "provenance": [None] * 4, "reference": 3}
    row |= {"target": 3, "warp": "warp"}
    row["motion"] = {"kind": "dangle", "amount": -90.0}
    calls = [None] * 4 + [call_of(2, Motion("dangle", -90.0))]  # ends at Image-3
    chained = row | {"context": (0, 1, 2, 3, 2), "provenance": calls}
    mirrored = 0
    for seed in range(8):
        stream = torch.Generator().manual_seed(seed)
        p = train_wm.read_pictures([row], files.get, with_warps=True)
        p = train_wm.augmented(p, stream)
        step = {-90: 1, 90: -1}[p.motions[0].amount]
        assert np.array_equal(p.targets[0], p.context[p.reference - 1 + step])
        assert np.array_equal(p.warps[0, ..., :3], p.targets[0])
        mirrored += step == -1
    assert 0 < mirrored < 8

    p = train_wm.mirrored(train_wm.read_pictures([chained], files.get, with_warps=True))
    *ring, imagined = image_poses(len(p.context), p.provenance)
    same = [np.array_equal(image, p.context[4]) for image in p.context[:4]].index(True)
    np.testing.assert_allclose(imagined, ring[same], atol=1e-6)


def test_warps_lie_on_the_target(rooms):
    """Where a context view sees the target, the warped context shows what the target shows."""
    _, targets = batch_of(rooms)
    assert targets.x0.shape == targets.warp.shape == (len(targets.seen_share), 192)
    assert targets.seen_share.mean() > 0.85
    near = (targets.warp - targets.x0).square().mean()
    shifted = (targets.warp.roll(16, 0) - targets.x0).square().mean()  # of the next view
    assert near < 0.2 * shifted


def test_x_t_lies_between_the_target_and_its_noise(rooms):
    pack, targets = batch_of(rooms)
    t = pack.t[pack.picture[pack.target_mask]][:, None]
    want = (1 - t) * targets.x0 + t * targets.noise
    torch.testing.assert_close(pack.x_t[pack.target_mask], want, rtol=0, atol=0)
    assert (pack.t[pack.image_index >= 0] == 0).all() and (pack.t[pack.image_index < 0] > 0).all()


def test_batches_do_not_depend_on_how_a_step_is_divided(rooms):
    _, whole = batch_of(rooms)
    parts = [batch_of(rooms, groups=[g], first=i)[1] for i, g in enumerate(groups_of(rooms))]
    for divided, together in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(divided), together, rtol=0, atol=0)


def test_gradient_does_not_depend_on_micro_batches(rooms):
    """Groups with unequal numbers of targets expose a mean of means."""
    model, groups = WorldModel.tiny(0), groups_of(rooms)
    assert len({len(group) for group in groups}) > 1
    with torch.no_grad():
        model.network.llm2vae.weight.normal_(std=0.05)
    firsts = range(0, len(groups), 2)
    parts = [batch_of(rooms, groups=groups[i : i + 2], first=i, model=model) for i in firsts]
    whole = batch_of(rooms, model=model)
    tokens = len(whole[1].x0)
    gradients = []
    for batches in ([whole], parts):
        model.network.zero_grad()
        for pack, targets in batches:
            terms = train_wm.losses(model.network, pack, targets, warp_weight=0.1)
            (sum(terms.values()) / tokens).backward()
        parameters = [p for p in model.network.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def commands(pack):
    """What commands each target of a pack, in order: (dx, dy, dz, dangle, dphi)."""
    return [tuple(delta) for delta in pack.delta[pack.image_index < 0].tolist()]


def test_shuffled_instructions_are_all_of_other_targets(rooms):
    group = groups_of(rooms)[:1]
    true = commands(batch_of(rooms, groups=group)[0])
    shuffled = commands(batch_of(rooms, "--shuffle-instructions", groups=group)[0])
    assert sorted(true) == sorted(shuffled)
    assert not any(a == b for a, b in zip(true, shuffled, strict=True))


def test_a_lone_target_is_no_choice_and_does_not_count_as_nearest(rooms):
    model, group = WorldModel.tiny(0), groups_of(rooms)[0]
    alone, _ = train_wm.imagine_held_out(model, [group[:1]], train_wm.read_image)
    assert alone.keys() == {"mse"}
    scores, _ = train_wm.imagine_held_out(model, [group[:1], group[:4]], train_wm.read_image)
    assert scores["nearest_chance"] == 0.25


def test_condition_dropout_hides_sentences_and_segments(rooms):
    dropout = "--drop-text 0.5 --drop-vae 0.5 --drop-vit 1.0"
    pack, _ = batch_of(rooms, *dropout.split())
    assert 0 < np.mean([any(motion) for motion in commands(pack)]) < 1
    assert (pack.patch_ids == -1).all()  # no ViT picture is left
    assert 0 < (pack.image_index >= 0).sum() < 4 * len(pack.ids)


def test_times_are_shifted_towards_noise(rooms):
    pack, _ = batch_of(rooms, "--train-shift", "4.0")
    t = pack.t[pack.image_index < 0]
    s = torch.logit(t) - math.log(4.0)
    assert abs(s.mean()) < 0.5 and 0.6 < s.std() < 1.5
    u = torch.sigmoid(s)
    torch.testing.assert_close(t, 4 * u / (1 + 3 * u))  # BAGEL's formula


# ---- whole runs


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--warp-weight", "-2"),
        ("--drop-text", "-0.1"),
        ("--lr", "nan"),
        ("--train-shift", "0"),
        ("--threads", "0"),
        ("--size", "24"),
    ],
)
def test_impossible_flags_are_refused_by_name(flag, value, capsys):
    with pytest.raises(SystemExit):
        train_wm.parse_args([flag, value])
    error = capsys.readouterr().err.splitlines()[-1]
    assert flag in error and value in error


def test_several_folders_are_trained_together(rooms, tmp_path):
    """As the paper's five datasets of scans are: every context of each, with its own pictures."""
    more = tmp_path / "more"
    shutil.copytree(rooms, more)
    alone = train_wm.load_groups([str(rooms)], "train", most=8)
    both = train_wm.load_groups([str(rooms), str(more)], "train", most=8)
    views = [Path(group[0]["context"][0]) for group in both]
    assert len(both) == 2 * len(alone) == 2 * sum(view.is_relative_to(more) for view in views)


def test_astra_takes_the_datasets_that_are_there_and_names_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train_wm.present_folders(train_wm.SCANS) == train_wm.SCANS  # none: reading them fails
    for name in ("scannet", "dl3dv"):
        Path("out", name).mkdir(parents=True)
        Path("out", name, "triples_train.jsonl").write_text("")
    assert train_wm.present_folders(train_wm.SCANS) == ["out/scannet", "out/dl3dv"]
    assert "Without out/scannetpp, out/matterport, out/arkitscenes:" in capsys.readouterr().out
    assert train_wm.present_folders(["mine"]) == ["mine"]


def test_missing_data_is_a_sentence(rooms, tmp_path):
    with pytest.raises(SystemExit, match="train.jsonl is missing. `python data.py triples"):
        train_wm.main(flags(tmp_path / "nothing", tmp_path / "out"))
    with pytest.raises(SystemExit, match=r"1000 are more than the 5 in --data"):
        train_wm.main(flags(rooms, tmp_path / "out", "--contexts", "1000"))


def test_held_out_pictures_may_have_an_alpha_channel(rooms):
    """Training puts them on white; so does the look at held-out views."""

    def read_opaque(path):
        image = train_wm.read_image(path)[..., :3]
        return np.concatenate([image, np.full_like(image[..., :1], 255)], -1)

    model, group = WorldModel.tiny(0), groups_of(rooms)[:1]
    with_alpha, _ = train_wm.imagine_held_out(model, group, read_opaque)
    assert with_alpha == train_wm.imagine_held_out(model, group, train_wm.read_image)[0]


@pytest.mark.slow
@pytest.mark.slow
def test_batches_made_ahead_give_the_losses_of_batches_made_in_turn(rooms, tmp_path, monkeypatch):
    train_wm.main(flags(rooms, tmp_path / "ahead"))
    monkeypatch.setattr(train_wm, "prefetched", map)
    train_wm.main(flags(rooms, tmp_path / "in_turn"))
    ahead, in_turn = (read_log(tmp_path / name / "log.jsonl") for name in ("ahead", "in_turn"))
    assert ahead == in_turn and len(ahead) == 4


def test_inside_ema_weights_the_two_have_changed_places():
    weight, ema = torch.nn.Parameter(torch.tensor([1.0])), torch.tensor([2.0])
    with pytest.raises(KeyError), train_wm.ema_weights([weight], [ema]):
        assert weight.item() == 2 and ema.item() == 1
        raise KeyError
    assert weight.item() == 1 and ema.item() == 2


def test_resumed_run_equals_unbroken_run(rooms, tmp_path, monkeypatch):
    train_wm.main(flags(rooms, tmp_path / "whole"))
    for stop_after in (1, 3):
        answers = iter([step == stop_after for step in range(1, 100)])
        monkeypatch.setattr(Interrupt, "requested", lambda self, answers=answers: next(answers))
        with pytest.raises(SystemExit) as left:
            train_wm.main(flags(rooms, tmp_path / "parts"))
        assert left.value.code == 130
    monkeypatch.undo()
    train_wm.main(flags(rooms, tmp_path / "parts"))
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    assert a == b and [row["step"] for row in a] == [0, 1, 2, 3] and a[3]["nearest"] is not None
    assert (tmp_path / "parts" / "done.json").exists() and (
        tmp_path / "parts" / "views.png"
    ).exists()
    with pytest.raises(SystemExit) as left:  # a finished run says so and stays
        train_wm.main(flags(rooms, tmp_path / "parts"))
    assert left.value.code == 0


def test_orthogonal_keeps_directions_and_brings_singular_values_near_one():
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()  # largest 1 at most
    for _ in range(4):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.65 < s.min() and s.max() < 1.25
    torch.testing.assert_close(train_wm.orthogonal(x), u * s @ vh, rtol=0, atol=1e-4)
    torch.testing.assert_close(train_wm.orthogonal(x.mT), (u * s @ vh).mT, rtol=0, atol=1e-4)


def test_muon_moves_matrices_along_momentum_and_all_else_as_adamw_does():
    """Two steps of one matrix inside a layer, beside a bias and a matrix outside, against both rules by hand."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 4, 4, generator=generator) for _ in range(2)]
    options = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.01}
    inside, *others = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    twins = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    muon = train_wm.Muon([inside], others, **options)
    adamw = torch.optim.AdamW(twins, **options)
    muon.state[inside]["exp_avg"] = torch.zeros(4, 4)  # lib/checkpoints.training_tensors makes it
    for gradient in gradients:
        for p, g in zip([inside, *others], gradient, strict=True):
            p.grad = g.clone()
        for p, g in zip(twins, gradient[1:], strict=True):
            p.grad = g.clone()
        muon.step()
        adamw.step()
    expected = torch.ones(4, 4)
    momentum = torch.zeros(4, 4)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient[0]
        direction = train_wm.orthogonal(0.05 * gradient[0] + 0.95 * momentum)
        # 0.4 sqrt(4) lr
        expected = expected * (1 - 0.1 * 0.01) - 0.1 * 0.8 * direction
    torch.testing.assert_close(inside.detach(), expected)
    torch.testing.assert_close(others, twins)


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(rooms, tmp_path):
    train_wm.main(flags(rooms, tmp_path / "one", "--steps", "2"))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 train_wm.py".split()
    two = flags(rooms, tmp_path / "two", "--steps", "2", "--micro-contexts", "1")
    subprocess.run([sys.executable, *torchrun, *two], check=True, cwd=ROOT, capture_output=True)
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5, msg=key)
    a, b = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    for key in train_wm.LOSSES:
        assert a[-1][key] == pytest.approx(b[-1][key], rel=1e-4)


@pytest.mark.slow
def test_adapters_train_beside_frozen_weights_and_are_merged_when_saved(rooms, tmp_path):
    """--lora: from a checkpoint, in the same layout again; only what has an adapter has changed."""
    lora = pytest.importorskip("extras.lora")
    model = WorldModel.tiny(0)
    with torch.no_grad():
        model.network.llm2vae.weight.normal_(std=0.05)  # zero would stop every gradient
    model.save(tmp_path / "base")
    more = f"--init {tmp_path / 'base'} --lora 4 --lr 1e-2"
    train_wm.main(flags(rooms, tmp_path / "lora", *more.split()))
    before, after = (load_file(tmp_path / name / "ema.safetensors") for name in ("base", "lora"))
    assert {key: value.shape for key, value in before.items()} == {
        key: value.shape for key, value in after.items()
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(re.fullmatch(lora.LANGUAGE_LAYERS + r"\.weight", key) for key in changed)
    assert len(list((tmp_path / "lora").glob("*.safetensors"))) == 1
    WorldModel.load(tmp_path / "lora")


@pytest.mark.slow
def test_training_lowers_the_loss(rooms, tmp_path):
    train_wm.main(flags(rooms, tmp_path, "--steps", "30", "--lr", "2e-3"))
    loss = [row["loss_flow"] for row in read_log(tmp_path / "log.jsonl")]
    assert np.mean(loss[-5:]) < 0.6 * np.mean(loss[:5])
