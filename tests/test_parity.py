"""
BAGEL computes what the original computes: the recordings in tests/data, and those in $BAGEL_RECORDINGS if it is set.

  pytest tests/test_parity.py                                       CPU, about 10 s
  BAGEL_RECORDINGS=path/to/bagel_tiny pytest tests/test_parity.py   the whole set too
"""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from bagel_parity import TO_DRAW, Case, Recording, checked, generation, main, opened, word_logits
from flux import narrow_flux
from safetensors.torch import load_file, save_file

from lib.bagel_files import AUTOENCODER, NETWORK
from lib.packing import Text, VaeImage, pack
from world_model import guided

DATA = Path(__file__).parent / "data"
CASES = sorted(
    file.stem
    for file in [*DATA.glob("*_table.json"), *DATA.glob("*.safetensors")]
    if file.name != NETWORK
)


@pytest.fixture(scope="module")
def autoencoder():
    """A small FLUX autoencoder with random weights, as the tensors of its file."""
    return narrow_flux()


def recordings(place, autoencoder):
    """The public recordings in place/recordings, beside a random autoencoder, which none of them needs."""
    shutil.copytree(DATA, place / "recordings")
    save_file(
        {key: value.contiguous() for key, value in autoencoder.items()},
        place / "recordings" / AUTOENCODER,
    )
    return place / "recordings"


@pytest.fixture
def folder(tmp_path, autoencoder):
    return recordings(tmp_path, autoencoder)


@pytest.fixture(scope="module")
def shared(tmp_path_factory, autoencoder):
    """(folder, its model, its reference.json), opened once for many tests."""
    folder = recordings(tmp_path_factory.mktemp("shared"), autoencoder)
    return folder, *opened(folder)[:2]


def lines(capsys):
    """{case: its printed line}; the last line under "total"."""
    *printed, total = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in printed} | {"total": total}


def change(file, key, how):
    """Rewrite one tensor of a file."""
    tensors = load_file(file)
    tensors[key] = how(tensors[key].clone())
    save_file(tensors, file)


def test_public_recordings_are_reproduced(folder, capsys):
    assert main([str(folder)]) == 0
    said = lines(capsys)
    assert said.pop("total") == f"{len(CASES)} passed, 0 failed"
    assert sorted(said) == CASES and all(line.endswith("  ok") for line in said.values())


@pytest.mark.skipif("BAGEL_RECORDINGS" not in os.environ, reason="BAGEL_RECORDINGS names no folder")
def test_all_recordings_are_reproduced(capsys):
    assert main([os.environ["BAGEL_RECORDINGS"]]) == 0, capsys.readouterr().out


def moved(tensor):
    """One number is moved: an index by one, others by a thousandth of the largest."""
    exact = not tensor.is_floating_point()
    tensor.view(-1)[-1] += 1 if exact else 1e-3 * max(1, tensor.nan_to_num(0, 0, 0).abs().max())
    return tensor


@pytest.mark.parametrize(
    "case, key",
    [
        ("train_nested", "out.hidden"),
        ("train_nested", "out.velocity"),
        ("train_nested", "out.ce"),
        ("train_drop_vae", "out.velocity"),
        ("train_drop_vit", "out.noise"),
        ("train_nested", "in.nested_attention_mask.1"),
        ("train_nested", "in.packed_position_ids"),
        ("train_flex_grads", "llm2vae.weight"),
        ("understand", "text_logits"),
        ("understand", "text_tokens"),
        ("t2i", "context.full.k.1"),
        ("t2i", "context.no_image.rope"),
        ("t2i", "step.3.v_no_text"),
        ("t2i", "step.4.v"),
        ("t2i", "final_latent"),
    ],
)
def test_a_recording_that_says_otherwise_fails(shared, case, key):
    folder, model, reference = shared
    file = folder / f"{case}.safetensors"
    try:
        change(file, key, moved)
        found = checked(file, model, reference)
        assert not found.ok and not found.error
    finally:
        shutil.copy(DATA / file.name, file)


def test_a_recording_that_says_otherwise_fails_alone(folder, capsys):
    change(folder / "train_nested.safetensors", "out.velocity", moved)
    assert main([str(folder)]) == 1
    said = lines(capsys)
    assert said.pop("total") == f"{len(CASES) - 1} passed, 1 failed"
    assert [name for name, line in said.items() if line.endswith("FAILED")] == ["train_nested"]


@pytest.mark.parametrize(
    "key, cases",
    [
        (
            "vit_model.vision_model.post_layernorm.bias",
            ["train_drop_vae", "train_nested", "understand"],
        ),
        (
            "language_model.model.norm_moe_gen.weight",
            ["t2i", "train_drop_vae", "train_drop_vit", "train_nested"],
        ),
        (
            "language_model.model.layers.0.self_attn.q_norm.weight",
            ["t2i", "train_nested", "understand"],
        ),
    ],
)
def test_a_network_that_is_wrong_somewhere_fails_where_that_is_used(folder, capsys, key, cases):
    change(folder / NETWORK, key, lambda weight: weight + 0.02)
    assert main([str(folder)]) == 1
    said = lines(capsys)
    assert all(said[case].endswith("FAILED") for case in cases) and said["resize_table"].endswith(
        "ok"
    )


def test_what_cannot_be_read_or_understood_is_a_failed_line(folder, capsys):
    (folder / "t2i.safetensors").write_bytes((DATA / "t2i.safetensors").read_bytes()[:50_000])
    (folder / "train_empty.safetensors").write_bytes(b"")
    (folder / "resize_table.json").write_text("{")
    save_file({"something": torch.zeros(2)}, folder / "edit_new.safetensors")
    shutil.copy(DATA / "understand.safetensors", folder / "understand_untold.safetensors")
    told = json.loads((folder / "reference.json").read_text())
    told["cases"]["understand"]["options"]["temperature_of_the_room"] = 20
    (folder / "reference.json").write_text(json.dumps(told))
    assert main([str(folder)]) == 1
    said = lines(capsys)
    failed = ["edit_new", "resize_table", "t2i", "train_empty", "understand", "understand_untold"]
    assert sorted(name for name, line in said.items() if line.endswith("FAILED")) == failed
    assert "options not understood: temperature_of_the_room" in said["understand"]
    assert "something" in said["edit_new"] and said["total"] == f"{len(CASES) - 3} passed, 6 failed"


@pytest.mark.parametrize(
    "missing, sentence",
    [
        ("reference.json", "holds no reference.json"),
        (NETWORK, NETWORK),
        (AUTOENCODER, AUTOENCODER),
        ("llm_config.json", "llm_config.json"),
    ],
)
def test_a_folder_that_is_none_is_told_so_in_a_sentence(folder, capsys, missing, sentence):
    (folder / missing).unlink()
    assert main([str(folder)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_a_folder_that_is_not_there_or_holds_no_recordings(folder, capsys):
    assert (
        main([str(folder / "nowhere")]) == 2
        and "nowhere holds no reference.json" in capsys.readouterr().err
    )
    for case in CASES:
        for file in folder.glob(f"{case}.*"):
            file.unlink()
    assert main([str(folder)]) == 2 and "no recordings" in capsys.readouterr().err


def test_position_gaps_are_read_as_dropped_pictures_only_where_pictures_were_dropped(
    folder, capsys
):
    told = json.loads((folder / "reference.json").read_text())
    told["cases"]["train_drop_vae"]["dropout"] = {}
    (folder / "reference.json").write_text(json.dumps(told))
    assert main([str(folder)]) == 1
    assert lines(capsys)["train_drop_vae"].endswith("FAILED")


# ---------------------------------------------------------------- thinking first: not recorded here, packs stand in


def answered(case, before):
    """Greedy text behind segments, from whole packs -> (tokens, logits)."""
    model, network, limit = case.model, case.network, case.told["options"]["max_think_token_n"]
    zeros = torch.zeros(1, network.config.token_channels)
    blank = VaeImage(zeros, (1, 1), branch=1, t=1.0)  # a pack has a target, always
    tokens, logits = [model.bos], []
    while len(logits) < limit:
        und, _ = network.last_layer(
            pack([[[*before, Text(tokens), blank]]], network.markers, network.config)
        )
        logits.append(word_logits(network, und)[0, -3])  # before the target's markers
        tokens.append(logits[-1].argmax().item())
    return torch.tensor(tokens[:-1]), torch.stack(logits)


def test_a_thought_stands_in_the_full_context_alone(folder):
    """`generation` with a prompt and a thought, against what the forward of training gives for each context."""
    model, reference, _ = opened(folder)
    told = json.loads(json.dumps(reference["cases"]["t2i"]))
    told["options"] |= {"think": True, "max_think_token_n": 6, "cfg_img_scale": 2.0}
    reference["cases"]["t2i_think"] = told
    data = Recording(folder / "t2i.safetensors")
    case, network = Case(folder, "t2i_think", model, reference, data), model.network
    prompt, text = (Text(model.token_ids(words)) for words in (TO_DRAW, told["inputs"][0]))
    with torch.no_grad():
        data["text_tokens"], data["text_logits"] = answered(case, [prompt, text])
        thought = Text(
            model.token_ids(
                model.tokenizer.decode(data["text_tokens"]).removeprefix("<|im_start|>")
            )
        )
        settings = dataclasses.replace(
            model.settings, text_scale=4.0, image_scale=2.0, renorm="global"
        )
        x, grid = data["step.0.x"], [side // case.stride for side in data["image_shape"].tolist()]
        times = [data[f"step.{i}.t"] for i in range(told["steps"])] + [torch.zeros(1)]
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            target = VaeImage(x, grid, branch=1, t=t.item())
            packs = [
                pack([[[*before, target]]], network.markers, network.config)
                for before in ([prompt, text, thought], [prompt], [prompt, text])
            ]
            v = [network(one)[one.target_mask] for one in packs]
            data[f"step.{i}.x"], data[f"step.{i}.v"] = (
                x,
                guided([one[None] for one in v], settings)[0],
            )
            data |= {
                f"step.{i}.v_{name}": one
                for name, one in zip(("full", "no_text", "no_image"), v, strict=True)
            }
            x = x - (t - t_next) * data[f"step.{i}.v"]
        data["final_latent"] = x
        for key in [key for key in data if key.startswith("context")]:
            del data[key]
        generation(case)
    assert (
        case.ok and {"tokens", "logits", "velocities", "guided", "latents"} <= case.found.keys()
    ), case
