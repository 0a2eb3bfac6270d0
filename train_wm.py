"""
Train the world simulator: context views + a camera motion in words -> the view from there (the paper's Astra-WM).

  laptop       python train_wm.py                              # tiny preset: minutes on one core -> out/wm
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_wm.py --preset astra    # out/scannet, ... -> out/wm-astra
  control      python train_wm.py --shuffle-instructions --out out/wm-untuned     # same data and compute, any motion
  resume       the same command: it goes on from the newest checkpoint in --out

In:  triples_{train,val}.jsonl in --data (data.py makes the rooms).
Out: the averaged model in BAGEL's layout, log.jsonl, args.json, done.json, views.png (context, motion, imagined, true).

With x_t = (1 - t) x0 + t eps, t = 1 pure noise, and x0_hat = x_t - t v_hat, the loss per latent token is
  flow matching       |v_hat - (eps - x0)|^2, or |x0_hat - x0|^2 where the model predicts x0 (Settings.prediction)
  view consistency    ours, on top: `content` and `pose` below (the paper's "view consistency tuning" is fine-tuning)
The loss falls long before the model looks at its context. Watch `nearest`: the share of held-out views that lie nearest
to the true view of the commanded motion, among the true views of all motions commanded in that room (chance 1 in 8).
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import uuid
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from lib import checkpoints, common, lora
from lib.bagel import LATENT_PATCH, MAX_IMAGES, token_grid
from lib.bagel_files import patchify, resize, to_pixels
from lib.geometry import Motion, Query, instruction, phrase
from lib.images import on_white
from lib.packing import Latent, Pack, Text, View, pack
from lib.records import load_jsonl
from lib.streams import torch_stream
from world_model import WorldModel, clean

PRESETS = {
    # Many small updates: 500 of 28 targets reached `nearest` .7 to .8, 250 of 55, the same 14,000 targets, .3.
    "tiny": dict(
        data=["out/data"],
        out="out/wm",
        init=None,
        steps=2000,
        contexts=4,
        targets=8,
        micro_contexts=4,
        lr=2e-3,
        lr_floor=0.03,
        warmup=60,
        weight_decay=0.01,
        shift=4.5,
        drop_text=0.0,
        drop_vit=0.0,
        drop_vae=0.0,
        warp_weight=0.5,
        augment=True,
        latents=None,
        gradient_checkpointing=False,
        images_in_memory=None,
        look_every=250,
        look_contexts=16,
        save_every=250,
        eps=1e-8,
    ),
    # The paper gives model and data. AdamW with its lr, warm-up, shift and dropout are BAGEL's for fine-tuning and
    # editing; the rest is ours: 64 targets an update, so that 17,000 updates are two epochs of the paper's 544,197.
    "astra": dict(
        data=[
            f"out/{name}" for name in ("scannet", "scannetpp", "matterport", "arkitscenes", "dl3dv")
        ],
        out="out/wm-astra",
        init="ByteDance-Seed/BAGEL-7B-MoT",
        steps=17_000,
        contexts=8,
        targets=8,
        micro_contexts=1,
        lr=2e-5,
        lr_floor=1.0,
        warmup=500,
        weight_decay=0.0,
        shift=4.0,
        drop_text=0.1,
        drop_vit=0.3,
        drop_vae=0.3,
        warp_weight=0.0,
        augment=False,
        latents="data/latents",
        gradient_checkpointing=True,
        images_in_memory=200,
        look_every=1_000,
        look_contexts=2,
        save_every=500,
        eps=1e-15,
    ),
}
NEUTRAL = (
    "threads",
    "micro_contexts",
    "gradient_checkpointing",
    "images_in_memory",
    "save_every",
    "look_every",
    "look_contexts",
)
MIRRORED = {"left": "right", "right": "left"}
COLOURS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


# ---------------------------------------------------------------- batches


def contexts_of(rows, most):
    """Rows of triples -> lists of at most `most` rows with one context and one reference, read once for all."""
    groups = [
        list(group)
        for _, group in groupby(rows, key=lambda row: (row["context"], row["reference"]))
    ]
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def contexts_of_step(contexts, step, count, seed):
    """The `count` contexts of one update; each epoch has its own order. Depends on nothing but the arguments."""
    places = range(step * count, (step + 1) * count)
    orders = {
        epoch: torch.randperm(len(contexts), generator=torch_stream("order", seed, epoch)).tolist()
        for epoch in {place // len(contexts) for place in places}
    }
    return [contexts[orders[place // len(contexts)][place % len(contexts)]] for place in places]


def read_image(path):
    """A picture as uint8 (H, W, 3), or (H, W, 4) where it has an alpha channel; a sentence if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        common.fail(
            f"The picture {path} cannot be read ({error}). Make the triples again, or take their rows out of "
            f"triples_*.jsonl; the same command goes on from the last checkpoint."
        )


def pictures(rows, read, augment, stream):
    """One context with its T targets -> (context, reference, motions, targets (T, H, W, 3), warps (T, H, W, 4)), uint8.

    augment   makes twelve rooms of one: a mirrored room (left and right change places in the words and along the ring)
              and permuted colour channels, drawn from `stream`
    """
    context, reference = [on_white(read(path)) for path in rows[0]["context"]], rows[0]["reference"]
    motions = [Motion(**row["motion"]) for row in rows]
    targets, warps = ([read(row[key]) for row in rows] for key in ("target", "warp"))
    if len({image.shape[:2] for image in targets + warps}) > 1 or any(
        warp.shape[-1] != 4 for warp in warps
    ):
        common.fail(
            f"The targets of one context and their warps must have one size, and the warps an alpha channel: "
            f"look at {rows[0]['target']} and the pictures beside it."
        )
    targets, warps = np.stack([on_white(target) for target in targets]), np.stack(warps)
    if augment:
        mirror, colours = (int(torch.randint(n, (), generator=stream)) for n in (2, len(COLOURS)))
        if mirror:
            context, reference = (
                [image[:, ::-1] for image in reversed(context)],
                len(context) + 1 - reference,
            )
            targets, warps = targets[:, :, ::-1], warps[:, :, ::-1]
            motions = [
                Motion(" ".join(MIRRORED.get(word, word) for word in m.kind.split()), m.amount)
                for m in motions
            ]
        colours = list(COLOURS[colours])
        context, targets, warps = (
            [c[..., colours] for c in context],
            targets[..., colours],
            warps[..., colours + [3]],
        )
    return context, reference, motions, targets, warps


def example(rows, model, read, args, stream):
    """One context with its T targets as the model is shown them; every draw comes from `stream`.

    returns a dict:  context, targets, filled   lists of (H, W, 3) uint8: what is given, what is asked for, and the
                        context warped into each target view, whose holes show the target
                     sentences, seen   T times the tokens of the instruction, and (H, W) uint8: 255 where some view sees
                     keep, said   what condition dropout leaves: VAE and ViT segment of each context image in turns, and
                        the T sentences
                     t, other   (T,) times; and for each target another one, or itself
    """
    context, reference, motions, targets, warps = pictures(rows, read, args.augment, stream)
    sentences = [instruction(motion, reference) for motion in motions]
    if args.shuffle_instructions:
        sentences = [sentences[j] for j in torch.randperm(len(rows), generator=stream).tolist()]
    fit = functools.partial(resize, limits=model.settings.vae_limits)
    seen = [alpha[..., 3] > 127 for alpha in warps]
    context_shown = model.arranged(context, reference, "")[0]
    drop = torch.tensor([args.drop_vae, args.drop_vit] * len(context_shown))
    shown = dict(
        context=[fit(image) for image in context_shown],
        targets=[fit(image) for image in targets],
        # without its term nobody reads the warp: the target then stands in for it and is not another picture to keep
        filled=[
            fit(np.where(s[..., None], warp[..., :3], target) if args.warp_weight else target)
            for s, warp, target in zip(seen, warps, targets)
        ],
        sentences=[
            model.words(model.arranged(context, reference, sentence)[2]) for sentence in sentences
        ],
        seen=[fit(np.repeat(255 * s[..., None].astype(np.uint8), 3, -1))[..., 0] for s in seen],
        keep=(torch.rand(len(drop), generator=stream) >= drop).tolist(),
        said=(torch.rand(len(rows), generator=stream) >= args.drop_text).tolist(),
        t=torch.sigmoid(torch.randn(len(rows), generator=stream) + math.log(args.shift)),
        other=(
            torch.arange(len(rows)) + int(torch.randint(1, max(2, len(rows)), (), generator=stream))
        )
        % len(rows),
    )
    # without a sentence, none tells it from another target
    return shown | {
        "other": torch.where(torch.tensor(shown["said"]), shown["other"], torch.arange(len(rows)))
    }


class Batch(NamedTuple):
    """R targets of some contexts, in all N latent tokens: what the network reads and what it should say."""

    pack: Pack
    pack_other: Pack  # the same with the sentence of another target under each; None where it is not asked for
    x0: torch.Tensor  # (N, C) the targets
    eps: torch.Tensor  # (N, C) their noise
    warp: torch.Tensor  # (N, C) the context warped into the target view; its holes show the target
    seen: torch.Tensor  # (N,) share of a token's pixels that some context view sees
    t: torch.Tensor  # (N,)
    target: torch.Tensor  # (N,) which of the R targets
    other: (
        torch.Tensor
    )  # (N,) the same place in another target of its context, or itself where there is none


class LatentFolder:
    """What the frozen autoencoder says of each picture (posterior mean and log-variance), kept on disk as fp16.

    Without it every epoch would encode every picture again; the draw from the posterior stays fresh. A picture is known
    by its contents, so one that was made anew or mirrored is another.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, image, make):
        """(mean, log_variance) of a picture (H, W, 3) uint8; `make()` where it was never asked for."""
        name = hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()[:24]
        path = self.folder / name[:2] / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{uuid.uuid4().hex}")  # two ranks may meet here
            save_file(
                {key: x.half().cpu() for key, x in zip(("mean", "log_variance"), make())}, beside
            )
            os.replace(beside, path)
        tensors = load_file(path)
        return tensors["mean"].float(), tensors["log_variance"].float()


def encoded(part, model, kept, stream):
    """The pictures of one `example` as latents (1, c, 2 h, 2 w) on the CPU: context and targets drawn, warps not."""
    random, latents = part["context"] + part["targets"], []
    if not model.autoencoder.random:
        return [
            model.autoencoder.encode(to_pixels(image[None])) for image in random + part["filled"]
        ]
    for i, image in enumerate(random + part["filled"]):
        moments = functools.partial(
            model.autoencoder.moments, to_pixels(image[None]).to(model.device)
        )
        mean, log_variance = kept(image, moments) if kept else (x.cpu() for x in moments())
        noise = (
            torch.randn(mean.shape, generator=stream) if i < len(random) else torch.zeros_like(mean)
        )
        latents.append(model.autoencoder.draw(mean, log_variance, noise))
    return latents


def sample_of(part, latents, eps, model, sentences):
    """The segments of one context and its targets, each target a branch with its sentence (lib/packing.py)."""
    segments, patch, images = [], model.network.config.vit_patch, len(part["context"])
    tokens, grids = (
        [patchify(z, LATENT_PATCH)[0] for z in latents],
        [token_grid(z) for z in latents],
    )
    for i, image in enumerate(part["context"]):
        pixels = to_pixels(resize(image, model.settings.vit_limits)[None])
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        segments += [
            Latent(tokens[i], grids[i], number=i, keep=part["keep"][2 * i]),
            View(patchify(pixels, patch)[0], grid, number=i, keep=part["keep"][2 * i + 1]),
        ]
    for k, (ids, said, t, noise) in enumerate(zip(sentences, part["said"], part["t"], eps)):
        segments += [
            Text(ids, group=k + 1, keep=said),
            Latent(
                tokens[images + k],
                grids[images + k],
                group=k + 1,
                t=t,
                noise=noise,
                said=ids[1:-1] if said else (),
            ),
        ]
    return segments


@torch.no_grad()
def collate(groups, model, read, args, step, first, with_pose=False, kept=None):
    """Contexts with their targets -> Batch; context i of `groups` draws from the stream (seed, step, first + i).

    with_pose   also make `pack_other`;   kept: a LatentFolder, or None to encode every picture
    """
    samples, samples_other, rows = [], [], []
    for i, group in enumerate(groups):
        stream = torch_stream("batch", args.seed, step, first + i)
        part = example(group, model, read, args, stream)
        latents, count = encoded(part, model, kept, stream), len(part["targets"])
        x0, warp = (
            torch.cat([patchify(z, LATENT_PATCH) for z in zs])  # (T, n, C)
            for zs in (latents[-2 * count : -count], latents[-count:])
        )
        eps = torch.randn(x0.shape, generator=stream)
        seen = torch.from_numpy(np.stack(part["seen"])[:, None] / np.float32(255))
        seen = patchify(seen, LATENT_PATCH * model.autoencoder.cell).mean(-1)  # (T, n)
        if args.control:
            seen = seen.flatten()[torch.randperm(seen.numel(), generator=stream)].view_as(seen)
        before, n = sum(len(r[0]) * r[0].shape[1] for r in rows), x0.shape[1]
        rows.append(
            (
                x0,
                eps,
                warp,
                seen,
                part["t"][:, None].expand(-1, n),
                (sum(len(r[0]) for r in rows) + torch.arange(count))[:, None].expand(-1, n),
                before + part["other"][:, None] * n + torch.arange(n),
            )
        )
        samples.append(sample_of(part, latents, eps, model, part["sentences"]))
        if with_pose:
            samples_other.append(
                sample_of(part, latents, eps, model, [part["sentences"][j] for j in part["other"]])
            )

    def packed(samples):
        # Flex attention skips what sees nothing, so on a GPU all samples stand in one sequence, without padding.
        sequences = [samples] if model.device.type == "cuda" else [[sample] for sample in samples]
        return (
            pack(sequences, model.network.markers, model.network.config).to(model.device)
            if samples
            else None
        )

    flat = [
        torch.cat([part.flatten(0, 1) for part in parts]).to(model.device) for parts in zip(*rows)
    ]
    return Batch(packed(samples), packed(samples_other), *flat)


# ---------------------------------------------------------------- losses, each (N,): one number per latent token


def flow_matching(output, x0, eps, prediction):
    """Squared error of the network's output, mean over the C numbers of a token. All tensors (N, C).

    "velocity": |v_hat - (eps - x0)|^2, as BAGEL;  "x0": |x0_hat - x0|^2, which weighs time t by t^2 beside the other.
    """
    return (output - (x0 if prediction == "x0" else eps - x0)).square().mean(-1)


def content(x0_hat, x0, warp, seen, seen_weight, warp_weight):
    """Where some context view sees the target, draw what it sees: more weight there, and agreement with the warp.

    The warp is compared in the latent space of the frozen autoencoder, which for pixel latents is the picture itself
    and for FLUX spares a decoder in every step.
    """
    return seen * (
        seen_weight * (x0_hat - x0).square().mean(-1)
        + warp_weight * (x0_hat - warp).square().mean(-1)
    )


def pose(x0_hat, x0_other, x0, t, target, other, times, margin=0.5):
    """Under the true sentence the view must lie nearer to the target than under another sentence, by a margin.

    x0_other  the model's view under the sentence of another target, same context, same noise; without gradient
    times     (low, high): only low < t < high counts. Near 1 the views are still blurs; near 0 the noisy view itself
              gives the target away, whatever is said, and the margin could not be met
    target, other   (N,), see `Batch`
    returns   max(0, d(x0_hat, x0) - d(x0_other, x0) + margin d(x0[other], x0)), d = mean squared distance of two views;
              0 outside `times`, where a target has no other, and where the two sentences lead to the same view
    """

    def distance(a, b):  # of each target: (R,)
        return (
            torch.zeros(len(count), device=x0.device).index_add(
                0, target, (a - b).square().mean(-1)
            )
            / count
        )

    count = torch.bincount(target)
    apart = distance(x0[other], x0)
    term = torch.relu(distance(x0_hat, x0) - distance(x0_other, x0).detach() + margin * apart)
    return (term * (apart > 1e-3))[target] * ((t > times[0]) & (t < times[1]))


def losses(network, batch, args):
    """One forward pass -> {"loss_flow", ...}: the parts of the loss, weighted, summed over latent tokens."""
    prediction, b = network.config.settings.prediction, batch
    x = (1 - b.t[:, None]) * b.x0 + b.t[:, None] * b.eps
    output = network(b.pack)[b.pack.target]  # (N, C)
    x0_hat = clean(output, x, b.t[:, None], prediction)
    parts = {"loss_flow": flow_matching(output, b.x0, b.eps, prediction).sum()}
    if args.seen_weight or args.warp_weight:
        parts["loss_content"] = content(
            x0_hat, b.x0, b.warp, b.seen, args.seen_weight, args.warp_weight
        ).sum()
    if b.pack_other is not None:
        with torch.no_grad():
            x0_other = clean(network(b.pack_other)[b.pack.target], x, b.t[:, None], prediction)
        parts["loss_pose"] = (
            args.pose_weight
            * pose(x0_hat, x0_other, b.x0, b.t, b.target, b.other, args.pose_times).sum()
        )
    return parts


# ---------------------------------------------------------------- looking at it


def look(model, contexts, read):
    """Imagine all targets of held-out contexts -> (metrics, [(context, words, generated, true)]).

    nearest   share of views nearest to the true view of their own motion, among those of the same context
    mse       mean squared error to the true view, pictures in [-1, 1]
    """

    def shown(path):
        return on_white(read(path))

    rows = [row for group in contexts for row in group]
    queries = [
        Query(
            [shown(path) for path in row["context"]],
            row["reference"],
            instruction(Motion(**row["motion"]), row["reference"]),
            seed,
        )
        for seed, row in enumerate(rows)
    ]
    views = iter(model.imagine(queries))
    hits, errors, sheet = [], [], []
    for group in contexts:
        true = [resize(shown(row["target"]), model.settings.vae_limits) for row in group]
        made = [next(views) for _ in group]
        distance = np.array(
            [[np.square((a / 127.5) - (b / 127.5)).mean() for b in true] for a in made]
        )
        hits += (distance.argmin(1) == np.arange(len(group))).tolist()
        errors += np.diag(distance).tolist()
        sheet += [
            (
                [shown(path) for path in row["context"]],
                f"Image-{row['reference']}: {phrase(Motion(**row['motion']))}",
                a,
                b,
            )
            for row, a, b in zip(group, made, true)
        ]
    return {"nearest": float(np.mean(hits)), "mse": float(np.mean(errors))}, sheet


def draw_sheet(path, sheet, side=96):
    """A picture with one line per imagined view: context | motion in words | imagined | true."""
    step, columns, count = side + 4, max(len(context) for context, *_ in sheet), len(sheet)
    words_at = step * columns
    page = Image.new("RGB", (words_at + 200 + 2 * step, 16 + step * count), "white")
    titles = {
        4: "context",
        words_at + 8: "motion",
        words_at + 200: "imagined",
        words_at + 200 + step: "true",
    }
    for x, title in titles.items():
        ImageDraw.Draw(page).text((x, 2), title, "black")
    for i, (context, words, made, true) in enumerate(sheet):
        ImageDraw.Draw(page).text((words_at + 8, 16 + i * step + side // 2 - 6), words, "black")
        places = [k * step for k in range(len(context))] + [words_at + 200, words_at + 200 + step]
        for x, image in zip(places, [*context, made, true]):
            page.paste(
                Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST),
                (x, 16 + i * step),
            )
    page.save(path)


@contextlib.contextmanager
def averaged(parameters, average):
    """Inside, the model's weights are their moving average, and nothing has a gradient."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, mean in zip(parameters, average):
            p.copy_(mean)
        try:
            yield
        finally:
            for p, own in zip(parameters, kept):
                p.copy_(own)


# ---------------------------------------------------------------- the run


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--data",
        nargs="+",
        help="folders with triples_{train,val}.jsonl, one for each dataset of scans",
    )
    p.add_argument("--out", help="folder of the run and of the finished model")
    p.add_argument(
        "--init", help="model to start from, a folder or Hugging Face id; tiny: random weights"
    )
    p.add_argument(
        "--size",
        type=int,
        default=32,
        help="side of the views without --init, pixels; a multiple of 16",
    )
    p.add_argument("--seed", type=int, default=0)
    # these change the numbers
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--contexts", type=int, help="contexts per update, all ranks together")
    p.add_argument(
        "--targets", type=int, help="targets that share one reading of their context, at most"
    )
    p.add_argument("--lr", type=float, help="AdamW peak learning rate")
    p.add_argument(
        "--lr-floor", type=float, help="share of the peak where the cosine ends; 1: constant"
    )
    p.add_argument("--warmup", type=int, help="steps of linear rise")
    p.add_argument("--weight-decay", type=float)
    p.add_argument(
        "--eps",
        type=float,
        help="of AdamW; a gradient of norm 1 has entries of 1e-5 in a model of 14 B",
    )
    p.add_argument("--max-grad-norm", type=float, default=1.0)
    p.add_argument(
        "--ema",
        type=float,
        default=0.995,
        help="decay of the average that is saved; rises from 0.1",
    )
    p.add_argument(
        "--shift", type=float, help="times t = sigmoid(N(0, 1) + ln shift): above 1 towards noise"
    )
    p.add_argument(
        "--drop-text", type=float, help="condition dropout: sentences (what guidance needs)"
    )
    p.add_argument(
        "--drop-vit", type=float, help="condition dropout: ViT segments of context images"
    )
    p.add_argument(
        "--drop-vae", type=float, help="condition dropout: VAE segments of context images"
    )
    p.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="mirrored rooms and permuted colours",
    )
    p.add_argument(
        "--seen-weight", type=float, default=0.0, help="view consistency: more where context sees"
    )
    p.add_argument(
        "--warp-weight", type=float, help="view consistency: agreement with the warped context"
    )
    p.add_argument(
        "--pose-weight",
        type=float,
        default=0.0,
        help="view consistency: true sentence before another",
    )
    p.add_argument(
        "--pose-every", type=int, default=4, help="steps between those with the pose term"
    )
    p.add_argument(
        "--pose-times",
        type=float,
        nargs=2,
        default=[0.7, 0.95],
        help="t at which the pose term counts",
    )
    p.add_argument(
        "--shuffle-instructions",
        action="store_true",
        help="the untuned control: motions of other targets",
    )
    p.add_argument(
        "--control",
        action="store_true",
        help="view consistency on random places instead of seen ones",
    )
    p.add_argument(
        "--lora",
        type=int,
        default=0,
        help="train adapters of this rank (alpha twice that) beside --init",
    )
    # speed, memory and what is shown only
    p.add_argument("--micro-contexts", type=int, help="contexts per forward pass and rank")
    p.add_argument(
        "--latents",
        help="folder for what the autoencoder says of each picture; default for tiny: none",
    )
    p.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations of every layer in backward",
    )
    p.add_argument(
        "--images-in-memory", type=int, help="pictures kept decoded; default for tiny: all"
    )
    p.add_argument(
        "--look-every", type=int, help="steps between views.png and `nearest` on held-out rooms"
    )
    p.add_argument("--look-contexts", type=int, help="held-out contexts to look at")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads per process; small models gain little from more",
    )
    args = common.parse_with_preset(
        p,
        PRESETS,
        argv,
        [
            *(
                (key, 1)
                for key in (
                    "size",
                    "steps",
                    "contexts",
                    "targets",
                    "micro_contexts",
                    "pose_every",
                    "look_every",
                    "look_contexts",
                    "save_every",
                    "threads",
                )
            ),
            *(
                (key, 0)
                for key in (
                    "lr",
                    "eps",
                    "max_grad_norm",
                    "warmup",
                    "weight_decay",
                    "lora",
                    "seen_weight",
                    "warp_weight",
                    "pose_weight",
                )
            ),
            *((key, 0, 1) for key in ("lr_floor", "ema", "drop_text", "drop_vit", "drop_vae")),
            ("shift", 1e-3),
        ],
    )
    if args.size % 16:
        p.error(f"--size {args.size} is not a multiple of 16, the ViT's patch")
    if not args.pose_times[0] < args.pose_times[1]:
        p.error(
            f"--pose-times {args.pose_times[0]} {args.pose_times[1]}: the first must be below the second"
        )
    if args.lora and not args.init:
        p.error(
            "--lora trains adapters beside a model's weights: give --init. A random model has none worth keeping"
        )
    return args


def load_data(args, world):
    """(training contexts, held-out contexts); rank 0 makes the rooms when the tiny preset misses them."""
    first = Path(args.data[0])
    if args.preset == "tiny" and common.is_main() and not (first / "triples_train.jsonl").exists():
        from data import ensure  # it reaches for all kinds of data, which training does not

        ensure(first, ["triples"])
    common.wait_for_all()
    makes, splits = (
        "python data.py triples" + " --dataset NAME --root DIR" * (args.preset == "astra"),
        [],
    )
    for split in ("train", "val"):
        rows = [
            row
            for folder in args.data
            for row in load_jsonl(
                common.need(Path(folder) / f"triples_{split}.jsonl", f"{makes} --out {folder}")
            )
        ]
        if not rows:
            common.fail(
                f"triples_{split}.jsonl in {', '.join(args.data)}: no triples. Of a few scans none may fall to "
                f"{split}: name them in a file, `python data.py triples --dataset ... --{split} FILE`."
            )
        if lacks := {"context", "reference", "motion", "target", "warp"} - set.intersection(
            *map(set, rows)
        ):
            common.fail(
                f"Rows of triples_{split}.jsonl in {', '.join(args.data)} lack {', '.join(sorted(lacks))}; "
                f"data.py says what a triple holds."
            )
        splits.append(contexts_of(rows, args.targets))
    if args.contexts % world.size:
        common.fail(
            f"--contexts {args.contexts} cannot be shared evenly by {world.size} processes: take a multiple."
        )
    return splits[0], splits[1][: args.look_contexts]


def main(argv=None):
    """The stage: batches, losses, a step, the moving average, a look now and then."""
    args = parse_args(argv)
    common.begin("train_wm", args, neutral=NEUTRAL)
    world = common.setup(args.threads)
    out, training = Path(args.out), Path(args.out) / "training"
    train, val = load_data(args, world)
    read = functools.lru_cache(args.images_in_memory)(read_image)
    kept = LatentFolder(args.latents) if args.latents else None

    def prepare(network):
        """Adapters, recomputation, sharding: of --init before its tensors are read."""
        network.recompute = args.gradient_checkpointing
        adapters = (
            lora.add_lora(
                network, args.lora, 2 * args.lora, lora.LANGUAGE_LAYERS, args.seed, world.device
            )
            if args.lora
            else ()
        )
        common.shard(network, network.blocks, world, ignored=adapters)

    try:
        dtype = (
            torch.bfloat16 if args.lora and world.device.type == "cuda" else torch.float32
        )  # of what is frozen
        model = (
            WorldModel.load(args.init, world.device, dtype, prepare)
            if args.init
            else WorldModel.tiny(
                args.seed,
                args.size,
                max_context=min(MAX_IMAGES, max(len(rows[0]["context"]) for rows in train)),
            )
        )
    except (OSError, ValueError) as error:
        common.fail(f"--init {args.init}: {error}")
    if not args.init:
        prepare(model.network.to(world.device))
    network = model.network
    names, parameters = zip(
        *((name, p) for name, p in network.named_parameters() if p.requires_grad)
    )
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.lr,
        betas=(0.9, 0.95),
        eps=args.eps,
        weight_decay=args.weight_decay,
        fused=True,
    )
    average = [p.detach().clone() for p in parameters]
    tensors = checkpoints.training_tensors(network, optimizer)
    tensors |= {f"average.{name}": mean for name, mean in zip(names, average)}
    start, state = checkpoints.load_state(training, tensors) or (0, {})
    clock = common.Clock(state.get("clock"))
    log, share = common.MetricLog(out / "log.jsonl", start), args.contexts // world.size

    with common.Interrupt() as stop:
        bar = common.progress(args.steps, start, "world model")
        for step in bar:
            rate = args.lr * common.cosine(step, args.steps, args.warmup, args.lr_floor)
            common.set_rate(optimizer, rate)
            first, groups = (
                world.rank * share,
                contexts_of_step(train, step, args.contexts, args.seed),
            )
            with_pose = args.pose_weight > 0 and step % args.pose_every == 0
            batches = [
                collate(
                    groups[i : min(i + args.micro_contexts, first + share)],
                    model,
                    read,
                    args,
                    step,
                    i,
                    with_pose,
                    kept,
                )
                for i in range(first, first + share, args.micro_contexts)
            ]
            tokens = common.global_sum(
                float(sum(len(b.x0) for b in batches))
            )  # of this update, all ranks
            metrics = {}
            for batch in batches:
                parts = losses(network, batch, args)
                (sum(parts.values()) / tokens).backward()
                metrics = {
                    key: metrics.get(key, 0) + value.detach() for key, value in parts.items()
                }
            metrics = {
                key: common.global_sum(value).item() / tokens for key, value in metrics.items()
            }
            common.sum_gradients(parameters)
            metrics["grad_norm"] = common.clip_gradients(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)

            done = step + 1
            if done % args.look_every == 0 or done == args.steps:
                with averaged(parameters, average), common.gathered(network):
                    held, sheet = look(model, val, read)
                if common.is_main():
                    draw_sheet(out / "views.png", sheet[:: max(1, len(sheet) // 12)])
                metrics |= held
                common.say(
                    f"step {done}: flow {metrics['loss_flow']:.4f}, held-out views: nearest "
                    f"{held['nearest']:.2f}, mse {held['mse']:.4f}, {clock.read()['cpu_seconds']:.0f} CPU-s"
                )
            log.write(step, **metrics, lr=rate)
            bar.set_postfix(flow=f"{metrics['loss_flow']:.4f}")
            stop.save_or_leave(
                done,
                args,
                lambda: checkpoints.save_state(training, done, tensors, {"clock": clock.read()}),
            )

    with averaged(parameters, average), common.written_whole(out) as part:
        model.save(part, lora.merged(network))
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
