"""
Does our BAGEL compute what the original computes? Recordings of the original's tensors, reproduced one by one.

  python tests/bagel_parity.py FOLDER

FOLDER is a checkpoint in the public layout with recordings beside it: reference.json (sizes, and the options of every
case), resize_table.json and a .safetensors file per case. It is loaded by the ordinary `WorldModel.load` and every file
found is reproduced: resizing, encoders, packed training steps and their gradients, cached contexts, every step of an
edit or of a picture from words, text. One line per case: each thing compared, its largest difference and the limit.
Exit code 0: all passed; 1: some failed, or could not be read; 2: there is nothing here to compare with.

Shapes: L tokens of a sequence, n latent tokens of a picture, C numbers each; "und" and "gen" as in lib/bagel.py.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import world_model  # noqa: E402
from lib.bagel import (  # noqa: E402
    GEN,
    LATENT_PATCH,
    ContextImage,
    ContextText,
    MemoryAttention,
    patchify,
    resize,
    resized,
    to_images,
    to_pixels,
    token_grid,
    unpatchify,
)
from lib.bagel_files import AUTOENCODER, NETWORK, FluxLatents  # noqa: E402
from lib.packing import Text, VaeImage, VitImage, pack, sight, table_ids  # noqa: E402
from world_model import WorldModel  # noqa: E402

# From the original's inferencer.py (ByteDance-Seed/Bagel, Apache-2.0): its defaults, for the options that a case leaves
# out, and what it says first when it is to think before it answers or draws.
OPTIONS = {
    "cfg_text_scale": 3.0,
    "cfg_img_scale": 1.5,
    "cfg_interval": [0.4, 1.0],
    "timestep_shift": 3.0,
    "num_timesteps": 50,
    "cfg_renorm_min": 0.0,
    "cfg_renorm_type": "global",
    "enable_taylorseer": False,
    "think": False,
    "understanding_output": False,
    "max_think_token_n": 1000,
    "do_sample": False,
    "text_temperature": 0.3,
    "image_shapes": None,
}
PROMPT = (
    "You should first think about the {0} process in the mind and then {1}. \nThe {0} process is enclosed "
    "within <think> </think> tags, i.e. <think> {0} process here </think> {2} here"
)
TO_ANSWER = PROMPT.format("reasoning", "provide the user with the answer", "answer")
TO_DRAW = PROMPT.format("planning", "generate the image", "image")


# ---------------------------------------------------------------- one recording


class Recording(dict):
    """The tensors of one file; remembers which of them were asked for."""

    def __init__(self, path):
        super().__init__(load_file(path))
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def unread(self):
        """The names of the tensors nobody asked for, their numbers left out."""
        return ", ".join(
            sorted({re.sub(r"\d+", "*", key) for key in self if key not in self.asked})
        )


class Case:
    """One file beside its model and what reference.json tells, and what was found: {what: (difference, limit)}."""

    def __init__(self, folder, name, model, reference, data):
        self.folder, self.name, self.model, self.network = folder, name, model, model.network
        self.reference, self.data, self.error = reference, data, None
        self.found, self.remarks = {}, []
        self.stride = (
            reference["vae"]["downsample"] * reference["bagel"]["latent_patch_size"]
        )  # pixels per token

    @property
    def told(self):
        """What reference.json tells about this case."""
        if self.name not in self.reference["cases"]:
            raise ValueError("reference.json tells nothing about it")
        return self.reference["cases"][self.name]

    def other(self, name):
        """Another case of the folder, to take inputs from."""
        return Case(
            self.folder,
            name,
            self.model,
            self.reference,
            Recording(self.folder / f"{name}.safetensors"),
        )

    def compare(self, what, ours, theirs, limit=1e-4, scale=1.0):
        """Note the largest difference, times `scale`. Limits 0 and 1 are for whole numbers (indices, grey levels)."""
        ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{what}: ours has the shape {tuple(ours.shape)}, the recording {tuple(theirs.shape)}"
            )
        distance = (
            scale * (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
        )
        distance = math.inf if math.isnan(distance) else distance
        if limit in (0, 1) and distance < math.inf:
            distance = round(distance)
        self.found[what] = max(distance, self.found.get(what, (0, 0))[0]), limit

    @property
    def ok(self):
        return (
            not self.error
            and bool(self.found)
            and all(far <= limit for far, limit in self.found.values())
        )

    def __str__(self):
        def short(number):
            return (
                f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-")
                if 0 < number < 1
                else f"{number:g}"
            )

        parts = [
            f"{what} {short(far)} ({short(limit)})" for what, (far, limit) in self.found.items()
        ]
        parts += [f"[{remark}]" for remark in self.remarks] + [self.error] * bool(self.error)
        return "  ".join([f"{self.name:<20}", *parts, "ok" if self.ok else "FAILED"])


# ---------------------------------------------------------------- pictures and encoders


def resize_table(case):
    """Rows of (transform, images in the sample, width, height -> new width, new height)."""
    rows = [dict(zip(case.data["columns"], row, strict=True)) for row in case.data["rows"]]
    for row in rows:
        *limits, most = case.data["settings"][row["transform"]]
        size = resized(row["width"], row["height"], limits, most / row["img_num"])
        case.compare(f"{len(rows)} sizes", size, [row["new_width"], row["new_height"]], 0)


def transform(case):
    """One picture -> the pixels of the autoencoder and of the ViT, in grey levels (Pillow's versions differ by one)."""
    for name, limits in (
        ("vae", case.model.settings.vae_limits),
        ("vit", case.model.settings.vit_limits),
    ):
        ours = to_pixels(resize(case.data["image"].numpy(), limits))
        case.compare(f"{name} pixels", ours, case.data[name], 1, scale=127.5)


def encoders(case):
    """Pixels -> latent -> pixels, pixels -> ViT features -> tokens, times -> embeddings."""
    data, network, coder = case.data, case.network, case.model.autoencoder
    case.compare("moments", torch.cat(coder.moments(data["vae_pixels"]), 1), data["vae_moments"])
    latent = coder.draw(*coder.moments(data["vae_pixels"]), data["vae_eps"])
    case.compare("latent", latent, data["vae_latent"])
    case.compare("decoded", coder.decode(data["vae_latent"]), data["vae_decoded"])
    side, pixels = network.config.vit_patch, data["vit_pixels"][None]
    patches = patchify(pixels, side)
    ids = table_ids([length // side for length in pixels.shape[-2:]], network.config.vit_grid)
    case.compare("patches", patches[0], data["vit_patches"])
    case.compare("position ids", ids, data["vit_position_ids"], 0)
    case.compare(
        "features",
        network.vit_model["vision_model"](patches, ids, None, False)[0],
        data["vit_features"],
    )
    case.compare("ViT tokens", network.embed_vit(patches, ids)[0], data["vit_tokens"])
    case.compare("times", network.time_embedder(data["times"]), data["time_embedding"])


# ---------------------------------------------------------------- training


def segments(case):
    """A recorded pack, told by its indices -> (samples, order, velocities).

    samples   for lib/packing.pack, one list of Text, VitImage and VaeImage segments each; a noisy picture is a branch
    order     (L,) where in the original's sequence our tokens stand: und tokens first, then gen
    velocities   (N, C) eps - x0 of all targets
    Where the case drops pictures, a gap in the positions is a dropped one.
    """
    told, data, special = case.told, case.data, case.reference["special_tokens"]
    columns, positions = case.network.config.vit_grid, data["in.packed_position_ids"].tolist()
    ids = dict(
        zip(
            data["in.packed_text_indexes"].tolist(),
            data["in.packed_text_ids"].tolist(),
            strict=True,
        )
    )
    ends = {special["eos_token_id"], special["end_of_image"]}
    gaps = bool(told.get("dropout", {}).keys() & {"vae", "vit"})
    is_vae, grids, latents = (
        set(data["in.packed_vae_token_indexes"].tolist()),
        told["patchified_vae_latent_shapes"],
        0,
    )
    is_vit, views, pictures = set(), iter(()), zip(data["out.padded_latent"], grids, strict=True)
    if "in.packed_vit_tokens" in data:
        is_vit, sizes = (
            set(data["in.packed_vit_token_indexes"].tolist()),
            data["in.vit_token_seqlens"].tolist(),
        )
        views = zip(
            data["in.packed_vit_tokens"].split(sizes),
            data["in.packed_vit_position_ids"].split(sizes),
            strict=True,
        )
    samples, und, gen, velocities, at = [], [], [], [], 0
    for length in told["sample_lens"]:
        sample, position, stop = (
            [],
            0,
            min(at + length, told["sequence_length"]),
        )  # behind it: padding
        while at < stop:
            if gaps:
                sample += [VitImage(None, None, keep=False)] * (positions[at] - position)
                position = positions[at]
            end = next(i for i in range(at + 1, stop) if ids.get(i) in ends)
            inside = list(range(at + 1, end))
            if ids[at] == special["bos_token_id"]:
                sample.append(Text([ids[i] for i in range(at, end + 1)]))
                und, position = und + [at, *inside, end], position + end + 1 - at
            elif inside[0] in is_vae:
                latent, (rows, width) = next(pictures)
                u = data["in.packed_timesteps"][latents].sigmoid().item()
                t = told["timestep_shift"] * u / (1 + (told["timestep_shift"] - 1) * u)
                tokens = patchify(
                    latent[None, :, : rows * LATENT_PATCH, : width * LATENT_PATCH], LATENT_PATCH
                )[0]
                if t > 0:
                    noise = data["out.noise"][latents : latents + len(inside)]
                    x_t, branch = (1 - t) * tokens + t * noise, len(sample) + 1
                    velocities.append(noise - tokens)
                    sample.append(VaeImage(x_t, (rows, width), branch=branch, t=t))
                else:
                    sample.append(VaeImage(tokens, (rows, width)))
                und, gen, latents, position = (
                    und + [at, end],
                    gen + inside,
                    latents + len(inside),
                    position + (t == 0),
                )
            elif inside[0] in is_vit:
                patches, places = next(views)
                sample.append(
                    VitImage(
                        patches,
                        (places.max().item() // columns + 1, places.max().item() % columns + 1),
                    )
                )
                und, position = und + [at, *inside, end], position + 1
            else:
                raise ValueError(f"token {at} of the pack begins no segment")
            at = end + 1
        samples.append(sample)
    return samples, torch.tensor(und + gen), torch.cat(velocities)


def attention_of(told, data):
    """(L, L) bool of what the original lets each token see, from its masks or from its splits; None if not recorded."""
    masks = [
        data[f"in.nested_attention_mask.{i}"] == 0
        for i in range(len(told["sample_lens"]))
        if f"in.nested_attention_mask.{i}" in data
    ]
    if masks:
        return torch.block_diag(*masks).bool()
    if not {"split_lens", "attn_modes"} <= told.keys():
        return None

    def each(lengths):  # which split, or sample, a token is in
        return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[
            : told["sequence_length"]
        ]

    split, sample = each(told["split_lens"]), each(told["sample_lens"])
    whole, noise = (
        torch.tensor([mode in modes for mode in told["attn_modes"]])[split]
        for modes in (("full", "noise"), ("noise",))
    )
    same, before = (
        split[:, None] == split,
        torch.arange(len(split))[:, None] >= torch.arange(len(split)),
    )
    return (sample[:, None] == sample) & (before | same & whole) & ~(noise & ~same)


def word_logits(network, und):
    """The last layer's und tokens -> logits of the next word (B, U, V)."""
    model = network.language_model["model"]
    return network.language_model["lm_head"](model["norm"](und)).float()


def losses(case, batch, order, velocities):
    """A pack -> squared errors (n, C) of its targets, cross entropies of its words, hidden states (L, H)."""
    und, gen = case.network.last_layer(batch)
    mse = (case.network.output(gen)[batch.target_mask] - velocities).square()
    here = {place: i for i, place in enumerate(order.tolist())}
    scored = [here[place] for place in case.data["in.ce_loss_indexes"].tolist()]
    ce = F.cross_entropy(
        word_logits(case.network, und)[0, scored],
        case.data["in.packed_label_ids"],
        reduction="none",
    )
    norms = case.network.language_model["model"]
    return mse, ce, torch.cat([norms["norm"](und), norms["norm" + GEN](gen)], 1)[0]


def cached_velocities(network, samples):
    """The velocities of all targets of a pack (n, C), each by the forward of inference from what stands before it."""
    c, found = network.config, []
    targets = [(row, i) for row in samples for i, s in enumerate(row) if s.branch]
    for sample, i in targets:
        before, target = [s for s in sample[:i] if not s.branch], sample[i]
        memory = network.memory(1)
        for s in before:
            if not s.keep:  # a dropped picture
                memory.next = memory.next + 1
            elif isinstance(s, Text):
                text = ContextText(torch.tensor([s.ids]), torch.tensor([len(s.ids)]))
                network.read_text(memory, text)
            elif isinstance(s, VitImage):
                pixels = unpatchify(s.patches[None], c.vit_patch, *s.grid)
                network.read_images(memory, [ContextImage(None, pixels)])
            else:
                latent = unpatchify(s.x_t[None], LATENT_PATCH, *s.grid)
                network.read_images(memory, [ContextImage(latent, None)])
        branch, markers = branch_of(network, memory), network.embed_markers(1)
        place = network.latent_pos_embed(table_ids(target.grid, c.latent_grid))
        extra = network.time_embedder(torch.tensor([target.t])) + place
        rope = network.rope(branch.next[:, None].expand(-1, 2 + len(place)))
        hidden = network.denoise(target.x_t[None], extra[None], markers, rope, [branch])
        found.append(network.output(hidden)[0])
    return torch.cat(found)


def training(case):
    """A pack, from its latents on: who sees whom, hidden states, velocities, losses. And the latents from pixels."""
    data, told, network = case.data, case.told, case.network
    if "in.padded_images" in data:
        latents_of_a_pack(case)
    samples, order, velocities = segments(case)
    batch, mask = pack([samples], network.markers, network.config), attention_of(told, data)
    case.compare("positions", batch.tokens.position[0], data["in.packed_position_ids"][order], 0)
    case.compare("positions", batch.latent_ids[0], data["in.packed_latent_position_ids"], 0)
    if "in.packed_vit_position_ids" in data:
        case.compare(
            "positions",
            batch.patch_ids[batch.patch_ids >= 0],
            data["in.packed_vit_position_ids"],
            0,
        )
    case.compare(
        "targets", order[batch.ids.shape[1] :][batch.target_mask[0]], data["in.mse_loss_indexes"], 0
    )
    if mask is None:
        case.remarks.append("no mask recorded")
    else:
        case.compare("mask", sight(batch.tokens, batch.tokens)[0], mask[order][:, order], 0)
    mse, ce, hidden = losses(case, batch, order, velocities)
    case.compare("hidden", hidden, data["out.hidden"][order])
    case.compare("velocities", network(batch)[batch.target_mask], data["out.velocity"])
    case.compare("cached velocities", cached_velocities(network, samples), data["out.velocity"])
    case.compare("losses", mse, data["out.mse"])
    case.compare("losses", ce, data["out.ce"])
    weights = data["in.ce_loss_weights"]
    for name, mean in (
        ("mse", mse.mean()),
        ("ce", ce.mean()),
        ("ce_reweighted", (ce * weights).sum() / weights.sum()),
    ):
        case.compare("means", mean, told[name])


def latents_of_a_pack(case):
    """The pictures of a pack: each is one of the sources, resized; together, padded, they give the latents."""
    data, limits = case.data, case.model.settings.vae_limits
    sources = [
        to_pixels(resize(data[key].numpy(), limits)) for key in data if key.startswith("image.")
    ]
    for image, (rows, columns) in zip(
        data["in.padded_images"], case.told["patchified_vae_latent_shapes"], strict=True
    ):
        image = image[:, : rows * case.stride, : columns * case.stride]
        alike = [source for source in sources if source.shape == image.shape] or [
            torch.full_like(image, math.nan)
        ]
        case.compare(
            "pixels",
            min(alike, key=lambda source: (source - image).abs().max()),
            image,
            1,
            scale=127.5,
        )
    coder = case.model.autoencoder
    ours = coder.draw(*coder.moments(data["in.padded_images"]), data["out.vae_eps"])
    case.compare("encoder", ours, data["out.padded_latent"])


def gradients(case):
    """The gradient of ce mean + mse mean, relative to each weight's largest entry, of the pack it is named after."""
    names = [case.name.removesuffix("_grads"), "train_flex", "train_nested"]
    there = [name for name in names if (case.folder / f"{name}.safetensors").exists()]
    if not there:
        raise ValueError("the pack whose gradients these are is not in the folder")
    source = case.other(there[0])
    samples, order, velocities = segments(source)
    batch = pack([samples], case.network.markers, case.network.config)
    mse, ce, _ = losses(source, batch, order, velocities)
    weights = dict(case.network.named_parameters())
    ours = dict(
        zip(weights, torch.autograd.grad(ce.mean() + mse.mean(), weights.values()), strict=True)
    )
    # A softmax ignores what is added to all its scores: of the ViT's k_proj.bias only rounding is recorded.
    for key in [key for key in case.data if not re.match(r"vit_model\..*k_proj\.bias", key)]:
        theirs = case.data[key]
        case.compare("relative", ours[key], theirs, scale=1 / (theirs.abs().max().item() or 1.0))
    case.remarks.append(f"{len(case.data)} of {len(weights)} weights, the pack of {source.name}")


# ---------------------------------------------------------------- inference


def options(case):
    """All options of a case. Raises ValueError for one that would change the outcome in a way unknown here."""
    o = OPTIONS | case.told.get("options", {})
    unknown = [*(o.keys() - OPTIONS.keys()), *(["do_sample"] if o["do_sample"] else [])]
    if unknown:
        raise ValueError(f"options not understood: {', '.join(unknown)}")
    return o


def inputs(case, latents=True):
    """The inputs of a case in order, ContextImage and ContextText; first its prompt, if it thinks."""
    parts, images, model, o = [], 0, case.model, options(case)
    for item in [TO_ANSWER if o["understanding_output"] else TO_DRAW] * o["think"] + case.told[
        "inputs"
    ]:
        if item != "IMAGE":
            parts.append(model.texts([item]))
            continue
        image = resize(case.data[f"input_image.{images}"].numpy(), model.settings.vae_limits)
        latent = None
        if latents:
            moments = model.autoencoder.moments(to_pixels(image)[None])
            latent = model.autoencoder.draw(*moments, case.data[f"vae_eps.{images}"])
        pixels = to_pixels(resize(image, model.settings.vit_limits))[None]
        parts.append(ContextImage(latent, pixels))
        images += 1
    return parts


def branch_of(network, memory):
    """What a target sees of a memory of one row; nothing here has a motion (Settings.rays)."""
    return memory.branch()


def read(network, memory, parts):
    """Parts into a memory, neighbouring images in one pass -> the Branch before the last text.

    The Branch at the end, if an image comes last: guidance by the sentence then does nothing, as in BAGEL.
    """
    before_text = branch_of(network, memory)
    for kind, neighbours in itertools.groupby(parts, key=type):
        if kind is ContextImage:
            network.read_images(memory, list(neighbours))
            before_text = branch_of(network, memory)
            continue
        for text in neighbours:
            before_text = branch_of(network, memory)
            network.read_text(memory, text)
    return before_text


def contexts(network, parts, thought):
    """Read what a case reads -> {"full", "no_text", "no_image"}: a Branch each.

    A thought stands behind the rest in "full" alone; "no_text" is what "full" was before the last text of `parts`.
    """
    full, no_image = network.memory(1), network.memory(1)
    no_text = read(network, full, parts)
    read(network, full, thought)
    read(network, no_image, [part for part in parts if isinstance(part, ContextText)])
    return {
        "full": branch_of(network, full),
        "no_text": no_text,
        "no_image": branch_of(network, no_image),
    }


def token_count(network, part):
    """How many tokens an image or a text takes in a memory."""
    if isinstance(part, ContextText):
        return part.ids.shape[1]
    count = 0
    for pixels, side in ((part.latent, LATENT_PATCH), (part.pixels, network.config.vit_patch)):
        if pixels is not None:
            count += pixels.shape[-2] // side * (pixels.shape[-1] // side) + 2
    return count


def reading_order(network, parts):
    """Where in the original's sequence each token of a Memory stands: ours holds neighbouring images und before gen."""
    order, at = [], 0
    for kind, group in itertools.groupby(parts, key=type):
        und, gen = [], []
        for part in group:
            pieces = [part]
            if kind is ContextImage:
                pieces = [part._replace(pixels=None), part._replace(latent=None)]
            for i, piece in enumerate(pieces):
                places = list(range(at, at + token_count(network, piece)))
                is_latent = kind is ContextImage and i == 0
                und += places[:1] + places[-1:] if is_latent else places
                gen += places[1:-1] if is_latent else []
                at += len(places)
        order += und + gen
    return order


def compare_contexts(case, branches, parts):
    """Lengths, positions, keys and values of the recorded contexts. parts: what "full" has read, in order."""
    orders = [reading_order(case.network, parts)] * 2
    orders.append(list(range(branches["no_image"].keys[0].shape[2])))
    for (name, branch), order in zip(branches.items(), orders, strict=True):
        length = branch.keys[0].shape[2]
        if f"context.{name}.kv_len" not in case.data:
            continue
        told = torch.cat([case.data[f"context.{name}.{key}"] for key in ("kv_len", "rope")])
        case.compare("counts", [length, branch.next.item()], told, 0)
        for kind, layers in (("k", branch.keys), ("v", branch.values)):
            for i, layer in enumerate(layers if length else ()):
                ours = layer[0].transpose(0, 1)  # (L, kv_heads, d)
                theirs = case.data[f"context.{name}.{kind}.{i}"][order[:length]]
                case.compare("caches", ours, theirs)


def read_word(network, memory, word):
    """`Bagel.read_text` of one word -> the last layer's (1, 1, H), of which a simulator only needs the keys."""
    und = network.embed_text(torch.tensor([[word]]))
    positions = memory.next[:, None]
    attention = MemoryAttention(memory, positions)
    und, _ = network.run_layers(und, und[:, :0], network.rope(positions), attention)
    memory.next = memory.next + 1
    return und


def written(case, parts):
    """Greedy text behind `parts`, compared with the recorded one -> the text without its markers."""
    network, model, tokens, logits, limit = (
        case.network,
        case.model,
        [],
        [],
        options(case)["max_think_token_n"],
    )
    memory = network.memory(1)
    read(network, memory, parts)
    word = model.bos
    while len(tokens) < limit and (word != model.eos or not tokens):
        tokens.append(word)
        logits.append(word_logits(network, read_word(network, memory, word))[0, 0])
        word = logits[-1].argmax().item()
    case.compare("tokens", tokens, case.data["text_tokens"].flatten(), 0)
    case.compare("logits", torch.stack(logits), case.data["text_logits"].flatten(0, -2))
    text = model.tokenizer.decode(tokens).split("<|im_end|>")[0].split("<|im_start|>")[1]
    if case.told.get("text_output"):
        case.compare("text", text == case.told["text_output"][0], True, 0)
    return text


def understanding(case):
    """Images, seen by the ViT alone, and a question -> an answer, greedily."""
    written(case, inputs(case, latents=False))


def watched_sample(network, branches, noise, grid, settings):
    """`euler_sample` -> (its result (n, C), [(x, t, velocities of the branches, guided velocity)] of its steps)."""

    def watched(name):
        return mock.patch.object(world_model, name, wraps=getattr(world_model, name))

    with watched("velocity_from_output") as velocity, watched("guided") as guided:
        latent = world_model.euler_sample(network, branches, noise, grid, settings)[0]
    calls, steps = iter(velocity.call_args_list), []
    for v in [call.args[0] for call in guided.call_args_list]:
        _, x, t, _ = [next(calls) for _ in v][0].args
        steps.append((x[0], t, [one[0] for one in v], world_model.guided(v, settings)[0]))
    return latent, steps


def generation(case):
    """An edit, or a picture from words: its contexts, each step of the sampler, which runs by itself, and the image."""
    data, network, o = case.data, case.network, options(case)
    settings = dataclasses.replace(
        case.model.settings,
        steps=o["num_timesteps"] - 1,
        shift=o["timestep_shift"],
        text_scale=o["cfg_text_scale"],
        image_scale=o["cfg_img_scale"],
        renorm=o["cfg_renorm_type"],
        renorm_min=o["cfg_renorm_min"],
        interval=tuple(o["cfg_interval"]),
        taylor=o["enable_taylorseer"],
    )
    grid, noise = (
        [side // case.stride for side in data["image_shape"].tolist()],
        data["step.0.x"][None],
    )
    parts = inputs(case)
    thought = [case.model.texts([written(case, parts)])] if o["think"] else []
    branches = contexts(network, parts, thought)
    compare_contexts(case, branches, [*parts, *thought])
    count = 1  # branches that differ; without images or thought, the third is the first
    if settings.text_scale > 1:
        has_third = thought or "IMAGE" in case.told["inputs"]
        count = 3 if settings.image_scale > 1 and has_third else 2
    branches = list(branches.values())[:count]
    latent, steps = watched_sample(network, branches, noise, grid, settings)
    case.compare(
        "counts", len(steps), len({key.split(".")[1] for key in data if key.startswith("step.")}), 0
    )
    for i, (x, t, v, w) in enumerate(steps):
        if (
            len(v) == 2 and "IMAGE" not in case.told["inputs"]
        ):  # without images the third is the first
            v = [*v, v[0]]
        case.compare("latents", [t], data[f"step.{i}.t"])
        case.compare("latents", x, data[f"step.{i}.x"])
        for name, ours in zip(("full", "no_text", "no_image"), v, strict=False):
            if f"step.{i}.v_{name}" in data:
                case.compare("velocities", ours, data[f"step.{i}.v_{name}"])
        case.compare("guided", w, data[f"step.{i}.v"])
    case.compare("latents", latent, data["final_latent"])
    if "image" in data:
        image = to_images(
            case.model.autoencoder.decode(unpatchify(latent[None], LATENT_PATCH, *grid))
        )[0]
        case.compare("image", torch.from_numpy(image), data["image"], 1)


def versus(case):
    """One context and (x_t, t) through the training and the cached forward: ours agree, and with the recorded ones.

    The context is a pack, or the inputs of an edit; where the file tells neither, a pack beside it stands in.
    """
    if "in.packed_text_ids" in case.data:
        return training(case)
    told, network, patch = (
        case.reference["cases"].get(case.name, {}),
        case.network,
        case.network.config.vit_patch,
    )
    x, t = (
        next((case.data[key] for key in keys if key in case.data), None)
        for keys in (("x_t", "x"), ("t",))
    )
    if "input_image.0" in case.data and "inputs" in told and x is not None and t is not None:
        sample = []
        for item in inputs(case):
            if isinstance(item, ContextText):
                sample.append(Text(item.ids[0].tolist()))
                continue
            latent, pixels = item
            sides = [side // patch for side in pixels.shape[-2:]]
            sample.append(VaeImage(patchify(latent, LATENT_PATCH)[0], token_grid(latent)))
            sample.append(VitImage(patchify(pixels, patch)[0], sides))
        grid = next(
            s.grid for s in reversed(sample) if isinstance(s, VaeImage) and len(s.x_t) == len(x)
        )
        samples = [[*sample, VaeImage(x, grid, branch=1, t=t.item())]]
    else:
        packs = [
            path.stem for path in case.folder.glob("train_*.safetensors") if case.name != path.stem
        ]
        packs = [name for name in packs if name in case.reference["cases"]] or ["train_nested"]
        samples, *_ = segments(case.other(min(packs)))
        case.remarks.append(
            f"its context is not understood: only our two forwards are compared, on {min(packs)}"
        )
    batch = pack([samples], network.markers, network.config)
    trained, cached = network(batch)[batch.target_mask], cached_velocities(network, samples)
    case.compare("training against cached", trained, cached)
    for key in [
        key for key in case.data if not case.remarks and case.data.get(key).shape == trained.shape
    ]:
        if key not in case.data.asked:
            case.compare(key, trained, case.data[key])
            case.compare(key, cached, case.data[key])


# ---------------------------------------------------------------- the folder


def opened(folder):
    """A folder -> (model, reference.json's contents, the case files). Raises with a sentence if it is none."""
    if not (folder / "reference.json").is_file():
        raise ValueError(
            f"{folder} holds no reference.json: give a folder of recordings beside their checkpoint."
        )
    reference = json.loads((folder / "reference.json").read_text())
    files = [*folder.glob("*_table.json"), *sorted(folder.glob("*.safetensors"))]
    files = [file for file in files if file.name not in (NETWORK, AUTOENCODER)]
    if not files:
        raise ValueError(f"{folder} holds a checkpoint, but no recordings.")
    vae = reference["vae"]
    widths = [vae["ch"] * times for times in vae["ch_mult"]]
    sizes = FluxLatents.sizes | {"block_out_channels": widths}
    with mock.patch.object(FluxLatents, "sizes", sizes):
        model = WorldModel.load(folder)
    limits = {f"{kind}_limits": tuple(reference[f"{kind}_transform"]) for kind in ("vae", "vit")}
    model.settings = dataclasses.replace(model.settings, **limits)
    model.autoencoder.scale, model.autoencoder.shift = (
        vae[f"{key}_factor"] for key in ("scale", "shift")
    )
    return model, reference, files


def reproduction(name, data):
    """Which function reproduces a file: told by its name, or by what it holds."""
    kinds = {
        "rows": resize_table,
        "vit": transform,
        "vae_moments": encoders,
        "in.packed_text_ids": training,
        "step.0.x": generation,
        "text_logits": understanding,
    }
    if name.startswith("train_versus"):
        return versus
    if name.endswith("_grads"):
        return gradients
    for key, reproduce in kinds.items():
        if key in data:
            return reproduce
    raise ValueError(f"what it holds is not known here: {', '.join(list(data)[:5])}")


def checked(file, model, reference):
    """Reproduce one file -> its Case. One that cannot be read, or is not understood, has failed."""
    case = Case(file.parent, file.stem, model, reference, {})
    try:
        case.data = (
            Recording(file) if file.suffix == ".safetensors" else json.loads(file.read_text())
        )
        reproduce = reproduction(case.name, case.data)
        with torch.set_grad_enabled(reproduce is gradients):
            reproduce(case)
        if isinstance(case.data, Recording) and case.data.unread():
            case.remarks.append(f"not compared: {case.data.unread()}")
    except Exception as error:  # what a strange file causes is a finding, not the end of the run
        case.error = " ".join(f"{type(error).__name__}: {error}".split())
    return case


def parse_args(argv=None):
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="recordings beside their checkpoint")
    return p.parse_args(argv)


def main(argv=None):
    """Reproduce every recording of a folder; returns the exit code."""
    folder = parse_args(argv).folder
    try:
        model, reference, files = opened(folder)
    except Exception as error:  # each library has its own error class
        print(
            error if isinstance(error, (OSError, ValueError)) else f"{folder}: {error!r}",
            file=sys.stderr,
        )
        return 2
    failed = 0
    for file in files:
        case = checked(file, model, reference)
        print(case, flush=True)
        failed += not case.ok
    print(f"{len(files) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
