"""Model folders that somebody else wrote: each broken one beside its sentence, whole ones bit for bit; servers."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from flux import narrow_flux
from PIL import Image
from safetensors.torch import load_file, save_file

import world_model
from lib.bagel import Bagel, Config
from lib.bagel_files import AUTOENCODER, MARKERS, NETWORK, check_finite
from lib.packing import table_ids
from policy import Policy
from world_model import WorldModel, initialise

DATA = Path(__file__).parent / "data"
POLICY_WEIGHTS = "model.safetensors"


def tensors_of(file, change):
    """A change of the tensors in a file, given as a function of {name: tensor} that returns them."""

    def rewrite(folder):
        tensors = {name: x.clone() for name, x in load_file(folder / file).items()}
        save_file(change(tensors), folder / file, {"format": "pt"})

    return rewrite


def json_of(file, **values):
    """A change of a JSON file: values by their names ("text_config.vocab_size" as text_config__vocab_size); None: gone."""

    def rewrite(folder):
        content = json.loads((folder / file).read_text())
        for path, value in values.items():
            *parents, key = path.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            place[key] = value
            if value is None:
                del place[key]
        (folder / file).write_text(json.dumps(content))

    return rewrite


def text_of(file, change):
    """A change of a text file, given as a function of its text; None takes the file away."""

    def rewrite(folder):
        if change is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(change((folder / file).read_text()))

    return rewrite


def renamed(file, name):
    """A file gets another name."""
    return lambda folder: (folder / file).rename(folder / name)


def without(part):
    """Tensors whose names do not hold this."""
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def with_nan(name):
    """One number of a tensor is lost."""

    def change(tensors):
        tensors[name].view(-1)[3] = torch.nan
        return tensors

    return change


# ---- policies


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "whole"
    Policy.tiny().save(folder)
    return folder


def compiled(tensors):
    return {
        name.replace("language_model.", "language_model._orig_mod."): tensors[name]
        for name in tensors
    }


def only_pickled(folder):
    torch.save(load_file(folder / POLICY_WEIGHTS), folder / "pytorch_model.bin")
    (folder / POLICY_WEIGHTS).unlink()


def shard_missing(folder):
    names = dict.fromkeys(load_file(folder / POLICY_WEIGHTS), "model-00001-of-00002.safetensors")
    (folder / POLICY_WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.language_model.norm.weight"
BROKEN_POLICIES = {
    "a layer is missing": (
        tensors_of(POLICY_WEIGHTS, without(".layers.2.")),
        r"does not fit its config.json: .*layers\.2\.\S+ \(\d+.*\) \(file: missing\);.* and 7 more\. Fetch it",
    ),
    "names of torch.compile": (
        tensors_of(POLICY_WEIGHTS, compiled),
        r"embed_tokens.weight \(\d+, 128\) \(file: missing\).*_orig_mod.* and \d+ more.*transformers' own names",
    ),
    "another shape": (
        tensors_of(POLICY_WEIGHTS, lambda t: t | {NORM: torch.ones(64)}),
        rf"{NORM} \(128,\) \(file: \(64,\)\)",
    ),
    "a tensor too many": (
        tensors_of(POLICY_WEIGHTS, lambda t: t | {"score.weight": torch.ones(2)}),
        r"score.weight \(not a part of the model\)",
    ),
    "no head": (
        json_of("config.json", tie_word_embeddings=False),
        r"lm_head.weight \(\d+, 128\) \(file: missing\)",
    ),
    "a number lost": (
        tensors_of(POLICY_WEIGHTS, with_nan(NORM)),
        f"model.safetensors holds NaN or infinity: {NORM}",
    ),
    "cut off": (
        lambda folder: (folder / POLICY_WEIGHTS).write_bytes(b"\0" * 9000),
        "model.safetensors cannot be read",
    ),
    "no weights": (text_of(POLICY_WEIGHTS, None), "model.safetensors cannot be read .No such file"),
    "a shard is missing": (shard_missing, "model-00001-of-00002.safetensors cannot be read"),
    "pickled weights": (only_pickled, "model.safetensors cannot be read"),
    "another family": (
        json_of("config.json", model_type="qwen2_5_vl"),
        "config.json is of a 'qwen2_5_vl', and the policy is a 'qwen3_vl'",
    ),
    "no family": (json_of("config.json", model_type=None), "config.json is of a None"),
    "no config": (text_of("config.json", None), "config.json cannot be read"),
    "a config that is a list": (text_of("config.json", lambda t: "[]"), "holds no JSON object"),
    "more layers than weights": (
        json_of("config.json", text_config__num_hidden_layers=5),
        r"layers\.4\..*missing",
    ),
    "no attention heads": (
        json_of("config.json", text_config__num_attention_heads=0),
        "The config in .* cannot be read",
    ),
    "no tokenizer": (text_of("tokenizer.json", None), "The tokenizer in .* cannot be read"),
    "half a tokenizer": (
        text_of("tokenizer.json", lambda t: '{"version": "1.0"}'),
        "The tokenizer in .* cannot be read",
    ),
    "no end token": (
        json_of("tokenizer_config.json", eos_token=None),
        r"its end token is None, not <\|im_end\|>",
    ),
    "another end token": (
        json_of("tokenizer_config.json", eos_token="<|endoftext|>"),
        r"its end token is <\|endoftext\|>, not <\|im_end\|>",
    ),
    "no pad token": (json_of("tokenizer_config.json", pad_token=None), "it has no pad token"),
    "fewer words than tokens": (
        json_of("config.json", text_config__vocab_size=500),
        r"does not fit its model: .* \(5\d\d of 500\)",
    ),
    "image tokens elsewhere": (
        json_of("config.json", image_token_id=7),
        r"<\|image_pad\|> is \d+, in config.json 7",
    ),
    "another mean": (
        json_of("preprocessor_config.json", image_mean=[0.48, 0.46, 0.41]),
        r"image_mean is \[0.48, 0.46, 0.41\], not \[0.5, 0.5, 0.5\]",
    ),
    "other patches": (
        json_of("preprocessor_config.json", patch_size=14),
        "patch_size is 14, not 8.*Take preprocessor_config.json from",
    ),
    "not normalised": (
        json_of("preprocessor_config.json", do_normalize=False),
        "do_normalize is False, not True",
    ),
    "one limit of the area": (
        json_of("preprocessor_config.json", size={"longest_edge": 4096}),
        "size is {'longest_edge': 4096}, not",
    ),
    "no image settings": (
        text_of("preprocessor_config.json", None),
        "The preprocessor_config.json in .* cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN_POLICIES)
def test_a_policy_that_does_not_fit_is_a_sentence(policy_folder, tmp_path, case):
    change, sentence = BROKEN_POLICIES[case]
    folder = shutil.copytree(policy_folder, tmp_path / "whole copy")
    change(folder)
    with pytest.raises(SystemExit) as left:
        Policy.load(folder)
    said = str(left.value)
    assert said.startswith(f"No policy could be read from {folder}: ") and "\n" not in said
    assert re.search(sentence, said), said


def same_weights(policy, folder):
    ours, theirs = policy.model.state_dict(), Policy.load(folder).model.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def shards(folder):
    model = Policy.load(folder).model
    (folder / POLICY_WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def nested(folder):
    """As trainers on transformers 5 save it."""
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    outer = {"processor_class": "Qwen3VLProcessor", "image_processor": inner}
    (folder / "processor_config.json").write_text(json.dumps(outer))


EMBEDDING = "model.language_model.embed_tokens.weight"
WHOLE_POLICIES = {
    "as it was saved": lambda folder: None,
    "in shards": shards,
    "image settings in processor_config.json": nested,
    "the tied head is in the file too": tensors_of(
        POLICY_WEIGHTS, lambda t: t | {"lm_head.weight": t[EMBEDDING].clone()}
    ),
}


@pytest.mark.parametrize("case", WHOLE_POLICIES)
def test_a_policy_that_fits_is_read_bit_for_bit(policy_folder, tmp_path, case):
    folder = shutil.copytree(policy_folder, tmp_path / "copy")
    WHOLE_POLICIES[case](folder)
    policy = Policy.tiny()
    assert same_weights(policy, folder)
    again = Policy.load(folder)
    assert again.image_config == policy.image_config
    again.save(tmp_path / "again")
    assert same_weights(policy, tmp_path / "again")


def test_max_pixels_alone_is_obeyed(policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "copy")
    json_of("preprocessor_config.json", max_pixels=4096)(folder)
    image = np.zeros((64, 64, 3), np.uint8)
    assert Policy.load(policy_folder).grid(image) == (2, 2)
    assert Policy.load(folder).grid(image) == (4, 4)


def test_transformers_opens_a_saved_policy(policy_folder):
    model = transformers.AutoModelForImageTextToText.from_pretrained(policy_folder)
    assert torch.equal(model.lm_head.weight, Policy.tiny().model.lm_head.weight)
    content = json.loads((policy_folder / "preprocessor_config.json").read_text())
    assert content["processor_class"] == "Qwen3VLProcessor" and content["patch_size"] == 8


def test_a_saved_policy_keeps_what_servers_read(policy_folder, tmp_path):
    folder = shutil.copytree(policy_folder, tmp_path / "copy")
    (folder / "video_preprocessor_config.json").write_text('{"max_frames": 32}')
    Policy.load(folder).save(tmp_path / "again")
    videos = json.loads((tmp_path / "again" / "video_preprocessor_config.json").read_text())
    assert videos["max_frames"] == 32


def test_transformers_processor_prepares_the_pixels_of_a_saved_policy(policy_folder):
    processor = transformers.AutoImageProcessor.from_pretrained(policy_folder)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    theirs = processor(images=[Image.fromarray(image)], return_tensors="pt")
    policy = Policy.load(policy_folder)
    policy.image_config["stamped"] = False
    torch.testing.assert_close(theirs["pixel_values"], policy.pixels([(1, image)])[0])


# ---- world models


def published_files():
    """What the json files of BAGEL's published folder say, for a network of width 32."""
    llm = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "vocab_size": 261,
    }
    vit = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "image_size": 980,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
    }
    return {"llm_config": llm, "vit_config": vit, "config": {"model_type": "bagel"}}


def flux_file(path, seed, channels=16):
    """A narrow FLUX autoencoder with random weights, in FLUX's names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_file(narrow_flux(latent_channels=channels), path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the layout of ByteDance-Seed/BAGEL-7B-MoT: its files, its tables, bf16; narrow, with random weights."""
    folder = tmp_path_factory.mktemp("published")
    files = published_files()
    network = Bagel(Config.read(files, 261, latent_grid=64, token_channels=64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialise(network)
        torch.nn.init.normal_(network.llm2vae.weight, std=0.02)
    state = {name: tensor.bfloat16() for name, tensor in network.state_dict().items()}
    save_file(state, folder / NETWORK)
    flux_file(folder / AUTOENCODER, seed=0)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder)
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.mark.slow
def test_the_published_checkpoint_on_one_photograph(published, tmp_path, monkeypatch, capsys):
    """README's command, but for two steps, the hub in its place a folder in its layout."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append(name) or published
    )
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    command = "--model ChaimZhu/Astra-WM --images photo.jpg --steps 2 --motion"
    world_model.main([*command.split(), "turn left 30 degrees"])
    assert asked == ["ChaimZhu/Astra-WM"]
    assert Image.open("view.png").size == (768, 512)  # BAGEL's own size of a 600 x 400 picture
    assert "view.png (768 x 512, ChaimZhu/Astra-WM)" in capsys.readouterr().out


def test_a_published_checkpoint_is_saved_as_it_came(published, tmp_path):
    WorldModel.load(published).save(tmp_path)
    for name in (NETWORK, AUTOENCODER):
        ours, theirs = load_file(tmp_path / name), load_file(published / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype for key in ours)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "bagel"}
    again = WorldModel.load(tmp_path)
    assert again.token_ids("turn left") == WorldModel.load(published).token_ids("turn left")


def without_token(token):
    def change(text):
        content = json.loads(text)
        added = content["added_tokens_decoder"]
        kept = {number: entry for number, entry in added.items() if entry["content"] != token}
        content["added_tokens_decoder"] = kept
        content["additional_special_tokens"].remove(token)
        content["eos_token"] = None  # it would add its token anew
        return json.dumps(content)

    return text_of("tokenizer_config.json", change)


BROKEN_WORLD_MODELS = {
    "a tensor is missing": (
        tensors_of(NETWORK, without("llm2vae.bias")),
        r"ema.safetensors does not fit its json files: llm2vae.bias \(64,\) \(file: missing\)",
    ),
    "a tensor too many": (
        tensors_of(NETWORK, lambda t: t | {"value_head.weight": torch.ones(2)}),
        r"value_head.weight \(not a part of the model\)",
    ),
    "another shape": (
        tensors_of(NETWORK, lambda t: t | {"llm2vae.bias": torch.ones(16)}),
        r"llm2vae.bias \(64,\) \(file: \(16,\)\)",
    ),
    "a table that is no square": (
        tensors_of(NETWORK, lambda t: t | {"latent_pos_embed.pos_embed": torch.ones(4000, 32)}),
        r"latent_pos_embed.pos_embed \(3969, 32\) \(file: \(4000, 32\)\)",
    ),
    "no table": (
        tensors_of(NETWORK, without("latent_pos_embed")),
        r"lacks matrices of a BAGEL: latent_pos_embed.pos_embed \(\)",
    ),
    "a number lost": (
        tensors_of(NETWORK, with_nan("time_embedder.mlp.0.bias")),
        "ema.safetensors holds NaN or infinity: time_embedder.mlp.0.bias",
    ),
    "a number of the autoencoder lost": (
        tensors_of(AUTOENCODER, with_nan("decoder.conv_in.bias")),
        "ae.safetensors holds NaN or infinity: decoder.conv_in.bias",
    ),
    "another name": (
        renamed(NETWORK, "model.safetensors"),
        "has no ema.safetensors: there are ae.safetensors, model.safetensors. In BAGEL's layout",
    ),
    "shards": (
        renamed(NETWORK, "ema-00001-of-00002.safetensors"),
        "has no ema.safetensors: there are ae.safetensors, ema-00001-of-00002.safetensors",
    ),
    "no autoencoder": (text_of(AUTOENCODER, None), "has no ae.safetensors: there are ema.saf"),
    "half an autoencoder": (
        lambda folder: (folder / AUTOENCODER).write_bytes(b"\0" * 500),
        "ae.safetensors cannot be read",
    ),
    "an autoencoder of another width": (
        lambda folder: flux_file(folder / AUTOENCODER, seed=0, channels=4),
        "ae.safetensors is not a FLUX autoencoder: encoder.conv_out.weight",
    ),
    "no llm_config": (text_of("llm_config.json", None), "llm_config.json cannot be read"),
    "no vit_config": (text_of("vit_config.json", None), "vit_config.json cannot be read"),
    "broken JSON": (text_of("vit_config.json", lambda t: t[:40]), "vit_config.json cannot be read"),
    "JSON of another kind": (text_of("llm_config.json", lambda t: "3"), "holds no JSON object"),
    "no width": (
        json_of("llm_config.json", hidden_size=None),
        "llm_config.json: hidden_size is None",
    ),
    "a width in words": (
        json_of("llm_config.json", hidden_size="32"),
        "hidden_size is '32', not a size",
    ),
    "another language model": (
        json_of("llm_config.json", model_type="llama"),
        "llm_config.json: model_type is 'llama'; BAGEL's is 'qwen2'",
    ),
    "another vision tower": (
        json_of("vit_config.json", model_type="clip_vision_model"),
        "vit_config.json: model_type is 'clip_vision_model'",
    ),
    "more layers than weights": (
        json_of("llm_config.json", num_hidden_layers=3),
        r"layers\.2\..*missing",
    ),
    "no tokenizer": (text_of("tokenizer_config.json", None), "The tokenizer in .* cannot be read"),
    "an unknown setting": (
        json_of("config.json", astra={"colour": "red"}),
        "config.json asks for colour, which this version",
    ),
    "a setting of another kind": (
        json_of("config.json", astra={"steps": "fifty"}),
        "config.json: steps is 'fifty', which is nothing like 49",
    ),
    "no steps": (json_of("config.json", astra={"steps": 0}), "config.json: steps is 0"),
    "limits of another kind": (
        json_of("config.json", astra={"vae_limits": [1024, 512, 0]}),
        r"vae_limits is \(1024, 512, 0\), which is nothing like \(1024, 512, 16\)",
    ),
    "more images than numbers": (
        json_of("config.json", astra={"learned_places": True, "max_context": 9}),
        "max_context is 9, over 8",
    ),
    "an unknown prediction": (
        json_of("config.json", astra={"prediction": "noise"}),
        "prediction is 'noise'",
    ),
}
for marker in MARKERS:
    BROKEN_WORLD_MODELS[f"no {marker}"] = (
        without_token(marker),
        re.escape(f"does not fit its model: {marker} (missing)"),
    )


@pytest.mark.parametrize("case", BROKEN_WORLD_MODELS)
def test_a_world_model_that_does_not_fit_is_a_sentence(published, tmp_path, case):
    change, sentence = BROKEN_WORLD_MODELS[case]
    folder = shutil.copytree(published, tmp_path / "copy")
    change(folder)
    with pytest.raises((ValueError, OSError), match=sentence) as raised:
        WorldModel.load(folder)
    assert "\n" not in str(raised.value)


def test_a_picture_larger_than_its_position_table_is_refused():
    """A row too long would take the places of the next row, and nobody would see it."""
    assert table_ids((2, 3), 4).tolist() == [0, 1, 2, 4, 5, 6]
    for grid in ((1, 5), (5, 1), (9, 9)):
        with pytest.raises(ValueError, match=f"{grid[0]} x {grid[1]} tokens.*table has 4 x 4"):
            table_ids(grid, 4)
    model = WorldModel.tiny(vae_limits=(64, 32, 8))
    wide = np.zeros((32, 64, 3), np.uint8)
    query = world_model.Query(
        [wide], 1, "Base on the viewpoint of Image-1, turn left 5 degrees.", 0
    )
    with pytest.raises(ValueError, match="4 x 8 tokens.*vae_limits"):
        model.imagine([query], steps=1)
    with pytest.raises(ValueError, match="pictures have up to 64: lower vae_limits"):
        model.check_tables()
    WorldModel.tiny().check_tables()


# ---- both


@pytest.mark.parametrize("path", ["nobody/nothing", "out/nowhere", "./nowhere"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_a_sentence(path, tmp_path, monkeypatch):
    """Offline, as all tests: the hub's own words stand inside."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("a.png")
    command = ["--images", "a.png", "--motion", "turn left 30 degrees", "--model", path]
    for load, hint in (
        (lambda: Policy.load(path), "python train_sft.py"),
        (lambda: world_model.main(command), "python train_wm.py"),
    ):
        with pytest.raises(SystemExit) as left:
            load()
        words, fetch = "There is no folder", "hf download nobody/nothing --local-dir nothing"
        other = fetch
        if path == "nobody/nothing":
            words, hint, other = "the hub does not give it", fetch, hint
        assert other not in str(left.value)
        assert words in str(left.value) and path in str(left.value) and hint in str(left.value)
        assert "\n" not in str(left.value)


def test_what_the_hub_says_is_one_line(monkeypatch):
    def refuse(name, **how):
        raise OSError(
            "404 Client Error.\n\nRepository Not Found for url: https://hub\nPlease log in."
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    words = "(404 Client Error. Repository Not Found for url: https://hub Please log in). Fetch it"
    with pytest.raises(SystemExit, match=re.escape(words)):
        Policy.load("nobody/nothing")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_none_are_found(value, dtype):
    good = torch.linspace(-6e4, 6e4, 1001).to(dtype)
    tensors = {"good": good, "none": good[:0], "ids": torch.arange(3), "one": torch.ones(())}
    check_finite(Path("f"), tensors.items())
    bad = good.clone()
    bad[700] = value
    with pytest.raises(ValueError, match="f holds NaN or infinity: bad. "):
        check_finite(Path("f"), (tensors | {"bad": bad}).items())
