"""
Train the world simulator: context views + a camera motion in words -> the view from there (the paper's Astra-WM).

  laptop       python data.py triples && python train_wm.py     # tiny preset: minutes on one core -> out/wm
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_wm.py --preset astra    # out/scannet, ... -> out/wm-astra
  control      python train_wm.py --shuffle-instructions --out out/wm-untuned     # same data and compute, any motion
  resume       the same command: it goes on from the newest checkpoint in --out

In:  triples_{train,val}.jsonl in --data (data.py makes them).
Out: the EMA of the model in BAGEL's layout, log.jsonl, args.json, done.json, views.png (context, motion, imagined, true).

With x_t = (1 - t) x0 + t eps, t = 1 pure noise, and x0_hat = x_t - t v_hat, the loss per latent token is
  flow matching       |v_hat - (eps - x0)|^2, or |x0_hat - x0|^2 where the model predicts x0 (Settings.prediction)
  view consistency    ours, on top: `content` below (the paper's "view consistency tuning" is fine-tuning)
The loss falls long before the model looks at its context. Watch `nearest`: the share of held-out views that lie nearest
to the true view of the commanded motion, among the true views of all motions commanded in that room (chance 1 in 8).
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.bagel import LATENT_PATCH, MAX_IMAGES, token_grid
from lib.bagel_files import patchify, resize, to_pixels
from lib.checkpoints import load_state, save_state, training_tensors
from lib.distributed import (
    Means,
    clip_gradients,
    fail,
    global_sum,
    is_main,
    progress,
    say,
    setup,
    shard,
    sum_gradients,
    unsharded,
)
from lib.geometry import Motion, Query, instruction, phrase
from lib.images import PictureError, decode, on_white
from lib.lora import LANGUAGE_LAYERS, add_lora, merged
from lib.packing import Latent, Pack, Text, View, pack
from lib.records import MetricLog, load_jsonl, whole_folder
from lib.stage import (
    Clock,
    Flag,
    Interrupt,
    begin,
    finish,
    parse_flags,
    run_stage,
    set_learning_rate,
)
from lib.streams import rows_of_step, torch_stream
from world_model import WorldModel, clean

SCANS = [f"out/{name}" for name in ("scannet", "scannetpp", "matterport", "arkitscenes", "dl3dv")]
# The paper gives model and data. Of astra, AdamW with its lr, warm-up, shift and dropout are BAGEL's for fine-tuning and
# editing; the rest is ours: 64 targets an update, so that 17,000 updates are two epochs of the paper's 544,197 triples.
# Of tiny, many small updates: 500 of 28 targets reached `nearest` .7 to .8, 250 of 55, the same 14,000 targets, .3.
FLAGS = [
    Flag("--data", ["out/data"], SCANS, "folders with triples_{train,val}.jsonl, one per dataset"),
    Flag("--out", "out/wm", "out/wm-astra", "folder of the run and of the finished model"),
    Flag(
        "--init", None, "ByteDance-Seed/BAGEL-7B-MoT", "model to start from; tiny: random weights"
    ),
    Flag("--size", 32, 32, "side of the views without --init, pixels; a multiple of 16", 1),
    Flag("--seed", 0, 0, "of every draw"),
    Flag("--steps", 2000, 17_000, "updates", 1),
    Flag("--contexts", 4, 8, "contexts per update, all ranks together", 1),
    Flag("--targets", 8, 8, "targets that share one reading of their context, at most", 1),
    Flag("--lr", 2e-3, 2e-5, "AdamW peak learning rate", 0),
    Flag("--lr-floor", 0.03, 1.0, "share of the peak where the cosine ends; 1: constant", 0, 1),
    Flag("--warmup", 60, 500, "steps of linear rise", 0),
    Flag("--weight-decay", 0.01, 0.0, "of AdamW", 0),
    Flag("--eps", 1e-8, 1e-15, "of AdamW; a gradient of norm 1 has entries of 1e-5 at 14 B", 0),
    Flag("--max-grad-norm", 1.0, 1.0, "longer gradients are scaled down to it", 0),
    Flag("--ema", 0.995, 0.995, "decay of the EMA that is saved; rises from 0.1", 0, 1),
    Flag("--shift", 4.5, 4.0, "t = sigmoid(N(0, 1) + ln shift): above 1 towards noise", 1e-3),
    Flag("--drop-text", 0.0, 0.1, "condition dropout: sentences (what guidance needs)", 0, 1),
    Flag("--drop-vit", 0.0, 0.3, "condition dropout: ViT segments of context images", 0, 1),
    Flag("--drop-vae", 0.0, 0.3, "condition dropout: VAE segments of context images", 0, 1),
    Flag("--augment", True, False, "mirrored rooms and permuted colours"),
    Flag("--warp-weight", 0.5, 0.0, "view consistency: agreement with the warped context", 0),
    Flag("--shuffle-instructions", False, False, "the untuned control: motions of other targets"),
    Flag("--lora", 0, 0, "train adapters of this rank (alpha twice that) beside --init", 0),
    Flag("--latents", None, "data/latents", "folder for the autoencoder's moments of each picture"),
    Flag("--micro-contexts", 4, 1, "contexts per forward pass and rank", 1, neutral=True),
    Flag(
        "--gradient-checkpointing", False, True, "recompute activations in backward", neutral=True
    ),
    Flag("--images-in-memory", None, 200, "pictures kept decoded; default: all", 0, neutral=True),
    Flag("--look-every", 250, 1_000, "steps between looks at held-out views", 1, neutral=True),
    Flag("--look-contexts", 16, 2, "held-out contexts to look at", 1, neutral=True),
    Flag("--save-every", 250, 500, "steps between checkpoints", 1, neutral=True),
    Flag("--threads", 1, 1, "CPU threads per process; small models gain little", 1, neutral=True),
]
LOSSES = ("loss_flow", "loss_content")  # keys of the log, beside grad_norm, lr, nearest and mse
MIRRORED = {"left": "right", "right": "left"}
COLOURS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    args = parse_flags(__doc__, FLAGS, argv)
    if args.size % 16:
        args.parser.error(f"--size {args.size} is not a multiple of 16, the ViT's patch")
    if args.lora and not args.init:
        args.parser.error(
            "--lora trains adapters beside a model's weights: give --init. A random model has none worth keeping"
        )
    return args


# ---- data: triples that share a context ----------------------------------------------------------------------------------


def load_groups(folders: list[str], split: str, most: int) -> list[list[dict]]:
    """The triples of some folders in groups that share a context and a reference, at most `most` in a group.

    A group's context is read once for all of its targets. Ends with a sentence where rows are missing or lack something.
    """
    rows = []
    for folder in folders:
        rows += load_jsonl(Path(folder) / f"triples_{split}.jsonl")
    files = f"triples_{split}.jsonl in {', '.join(folders)}"
    if not rows:
        fail(
            f"{files}: no triples. Of a few scans none may fall to {split}: name them in a file, "
            f"`python data.py triples --dataset ... --{split} FILE`."
        )
    lacking = {"context", "reference", "motion", "target", "warp"} - set.intersection(
        *map(set, rows)
    )
    if lacking:
        fail(
            f"Rows of {files} lack {', '.join(sorted(lacking))}; data.py says what a triple holds."
        )
    groups = []
    for _, group in itertools.groupby(rows, lambda row: (row["context"], row["reference"])):
        group = list(group)
        groups += [group[i : i + most] for i in range(0, len(group), most)]
    return groups


def read_image(path: str) -> np.ndarray:
    """A picture as uint8 (H, W, 3), or (H, W, 4) where it has an alpha channel; a sentence if it cannot be read."""
    try:
        return np.asarray(decode(path))
    except PictureError as error:
        fail(
            f"{error} Make the triples again, or take their rows out of triples_*.jsonl; the same command goes on from "
            f"the last checkpoint."
        )


@dataclass
class Pictures:
    """One context with its T targets, as the files hold them: uint8."""

    context: list  # (H, W, 3) each
    reference: int  # 1-based number of the context view that the motions start from
    motions: list[Motion]
    targets: np.ndarray  # (T, H, W, 3)
    warps: np.ndarray  # (T, H, W, 4) the context warped into each target view; alpha 255 where some context view sees it


def read_pictures(rows: list[dict], read: Callable) -> Pictures:
    """The pictures of a group of triples."""
    targets = [read(row["target"]) for row in rows]
    warps = [read(row["warp"]) for row in rows]
    sizes = {image.shape[:2] for image in targets + warps}
    if len(sizes) > 1 or any(warp.shape[-1] != 4 for warp in warps):
        fail(
            f"The targets of one context and their warps must have one size, and the warps an alpha channel: "
            f"look at {rows[0]['target']} and the pictures beside it."
        )
    return Pictures(
        context=[on_white(read(path)) for path in rows[0]["context"]],
        reference=rows[0]["reference"],
        motions=[Motion(**row["motion"]) for row in rows],
        targets=np.stack([on_white(target) for target in targets]),
        warps=np.stack(warps),
    )


def augmented(p: Pictures, stream: torch.Generator) -> Pictures:
    """One of the twelve rooms that a room makes: mirrored or not, with permuted colours.

    In the mirror, left and right change places in the words and along the ring.
    """
    mirror = int(torch.randint(2, (), generator=stream))
    colours = list(COLOURS[int(torch.randint(len(COLOURS), (), generator=stream))])
    if mirror:
        motions = []
        for motion in p.motions:
            words = [MIRRORED.get(word, word) for word in motion.kind.split()]
            motions.append(Motion(" ".join(words), motion.amount))
        p = Pictures(
            context=[image[:, ::-1] for image in reversed(p.context)],
            reference=len(p.context) + 1 - p.reference,
            motions=motions,
            targets=p.targets[:, :, ::-1],
            warps=p.warps[:, :, ::-1],
        )
    p.context = [image[..., colours] for image in p.context]
    p.targets = p.targets[..., colours]
    p.warps = p.warps[..., [*colours, 3]]
    return p


# ---- batches -------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One context with its T targets as the model is shown them: augmented, resized, with condition dropout."""

    context: list  # (H, W, 3) uint8, in the order in which the model is shown them
    targets: list  # T (H, W, 3) uint8
    warps: list  # T (H, W, 3) uint8: the context warped into each target view; its holes show the target
    visible: list  # T (H, W) uint8: 255 where some context view sees the target
    token_ids: list  # T instructions
    keep_vae: list  # condition dropout leaves the VAE segment of this context image ...
    keep_vit: list  # ... its ViT segment ...
    keep_text: list  # ... and the instruction of this target
    t: Tensor  # (T,) the targets' times


def make_example(rows, model, read, args, stream) -> Example:
    """A group of triples as an Example; every draw comes from `stream`."""
    p = read_pictures(rows, read)
    if args.augment:
        p = augmented(p, stream)
    sentences = [instruction(motion, p.reference) for motion in p.motions]
    if args.shuffle_instructions:
        order = torch.randperm(len(rows), generator=stream).tolist()
        sentences = [sentences[k] for k in order]
    context = model.arranged(p.context, p.reference, "")[0]
    sentences = [model.arranged(p.context, p.reference, sentence)[2] for sentence in sentences]
    drawn = torch.rand(len(context), 2, generator=stream)
    drawn_text = torch.rand(len(rows), generator=stream)
    t = torch.sigmoid(torch.randn(len(rows), generator=stream) + math.log(args.shift))
    torch.randint(2, (), generator=stream)  # unused: recorded runs have a draw here
    fit = functools.partial(resize, limits=model.settings.vae_limits)
    warps, visible = [], []
    for warp, target in zip(p.warps, p.targets, strict=True):
        alpha = np.where(warp[..., 3:] > 127, np.uint8(255), np.uint8(0))  # (H, W, 1)
        visible.append(fit(np.repeat(alpha, 3, -1))[..., 0])
        # without its loss nobody reads the warp: the target stands in for it and is not another picture to encode
        warps.append(fit(np.where(alpha, warp[..., :3], target) if args.warp_weight else target))
    return Example(
        context=[fit(image) for image in context],
        targets=[fit(image) for image in p.targets],
        warps=warps,
        visible=visible,
        token_ids=[model.token_ids(sentence) for sentence in sentences],
        keep_vae=(drawn[:, 0] >= args.drop_vae).tolist(),
        keep_vit=(drawn[:, 1] >= args.drop_vit).tolist(),
        keep_text=(drawn_text >= args.drop_text).tolist(),
        t=t,
    )


class LatentFolder:
    """The frozen autoencoder's moments of each picture (posterior mean and log-variance), kept on disk as fp16.

    Without it every epoch would encode every picture again; the draw from the posterior stays fresh. A picture is known
    by its contents, so one that was made anew or mirrored is another.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def moments(self, image: np.ndarray, model: WorldModel) -> tuple[Tensor, Tensor]:
        """`moments` of a picture, from the folder where it is there."""
        name = hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()[:24]
        path = self.folder / name[:2] / f"{name}.safetensors"
        if not path.exists():
            mean, log_variance = moments(image, model)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{uuid.uuid4().hex}")  # two ranks may meet here
            save_file({"mean": mean.half(), "log_variance": log_variance.half()}, beside)
            os.replace(beside, path)
        tensors = load_file(path)
        return tensors["mean"].float(), tensors["log_variance"].float()


def moments(image: np.ndarray, model: WorldModel) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (1, c, 2 h, 2 w) of the autoencoder's posterior, on the CPU."""
    mean, log_variance = model.autoencoder.moments(to_pixels(image[None]).to(model.device))
    return mean.cpu(), log_variance.cpu()


def encode(image, model, latents: LatentFolder | None, stream=None) -> Tensor:
    """A picture as a latent (1, c, 2 h, 2 w) on the CPU, drawn from its posterior by `stream`; without one, the mean."""
    if not model.autoencoder.random:
        return model.autoencoder.encode(to_pixels(image[None]))
    mean, log_variance = latents.moments(image, model) if latents else moments(image, model)
    noise = torch.zeros_like(mean)
    if stream is not None:
        noise = torch.randn(mean.shape, generator=stream)
    return model.autoencoder.draw(mean, log_variance, noise)


class Targets(NamedTuple):
    """What the loss compares with: the N latent tokens of all targets of a Pack, in its order."""

    x0: Tensor  # (N, C)
    eps: Tensor  # (N, C)
    warp: Tensor  # (N, C) the context warped into the target view; its holes show the target
    visible: Tensor  # (N,) share of a token's pixels that some context view sees


def segments(example: Example, context: list, x_t: Tensor, grid: tuple, model) -> list:
    """The segments of one context and its targets, each target a branch with its sentence (lib/packing.py).

    context   latents (1, c, 2 h, 2 w);   x_t (T, n, C), grid (h, w): the noisy targets
    """
    sample, patch = [], model.network.config.vit_patch
    for i, (image, latent) in enumerate(zip(example.context, context, strict=True)):
        tokens = patchify(latent, LATENT_PATCH)[0]
        pixels = to_pixels(resize(image, model.settings.vit_limits)[None])
        vit_grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        sample.append(Latent(tokens, token_grid(latent), number=i, keep=example.keep_vae[i]))
        view = View(patchify(pixels, patch)[0], vit_grid, number=i, keep=example.keep_vit[i])
        sample.append(view)
    for k, (ids, keep) in enumerate(zip(example.token_ids, example.keep_text, strict=True)):
        words = ids[1:-1] if keep else []
        sample.append(Text(ids, group=k + 1, keep=keep))
        t = float(example.t[k])
        sample.append(Latent(x_t[k], grid, group=k + 1, t=t, motion_ids=words))
    return sample


@torch.no_grad()
def make_batch(groups, streams, model, read, args, latents=None) -> tuple[Pack, Targets]:
    """Groups of triples as the network reads them; group i draws from streams[i].

    latents   a LatentFolder, or None to encode every picture
    """
    samples, targets = [], []
    for group, stream in zip(groups, streams, strict=True):
        example = make_example(group, model, read, args, stream)
        context = [encode(image, model, latents, stream) for image in example.context]
        views = torch.cat([encode(image, model, latents, stream) for image in example.targets])
        warps = torch.cat([encode(image, model, latents) for image in example.warps])
        x0 = patchify(views, LATENT_PATCH)  # (T, n, C)
        warp = patchify(warps, LATENT_PATCH)
        eps = torch.randn(x0.shape, generator=stream)
        t = example.t[:, None, None]
        x_t = (
            1 - t
        ) * x0 + t * eps  # here and nowhere else: the network and the loss read it in the pack
        visible = torch.from_numpy(np.stack(example.visible)[:, None] / np.float32(255))
        visible = patchify(visible, LATENT_PATCH * model.autoencoder.cell).mean(-1)  # (T, n)
        samples.append(segments(example, context, x_t, token_grid(views), model))
        flat = (x.flatten(0, 1) for x in (x0, eps, warp, visible))
        targets.append(Targets(*flat))
    # Flex attention skips what sees nothing, so on a GPU all samples stand in one sequence, without padding.
    sequences = [samples] if model.device.type == "cuda" else [[sample] for sample in samples]
    packed = pack(sequences, model.network.markers, model.network.config)
    joined = (torch.cat(parts).to(model.device) for parts in zip(*targets, strict=True))
    return packed.to(model.device), Targets(*joined)


# ---- losses, each (N,): one number per latent token ----------------------------------------------------------------------


def flow_matching(output: Tensor, x0: Tensor, eps: Tensor, prediction: str) -> Tensor:
    """Squared error of the network's output, mean over the C numbers of a token. All tensors (N, C).

    "velocity": |v_hat - (eps - x0)|^2, as BAGEL;  "x0": |x0_hat - x0|^2, which weighs time t by t^2 beside the other.
    """
    return (output - (x0 if prediction == "x0" else eps - x0)).square().mean(-1)


def content(x0_hat: Tensor, warp: Tensor, visible: Tensor) -> Tensor:
    """View consistency: where some context view sees the target, draw what it sees. x0_hat, warp (N, C), visible (N,).

    The warp is compared in the latent space of the frozen autoencoder, which for pixel latents is the picture itself
    and for FLUX spares a decoder in every step.
    """
    return visible * (x0_hat - warp).square().mean(-1)


def losses(network, pack: Pack, targets: Targets, warp_weight: float) -> dict[str, Tensor]:
    """One forward pass -> {"loss_flow", ...}: the parts of the loss, weighted, summed over latent tokens."""
    prediction = network.config.settings.prediction
    output = network(pack)[pack.target]  # (N, C)
    parts = {"loss_flow": flow_matching(output, targets.x0, targets.eps, prediction).sum()}
    if warp_weight:
        x_t = pack.x_t[pack.target]  # (N, C)
        t = pack.t[pack.image[pack.target]]  # (N,)
        x0_hat = clean(output, x_t, t[:, None], prediction)
        parts["loss_content"] = warp_weight * content(x0_hat, targets.warp, targets.visible).sum()
    return parts


# ---- looking at held-out views -------------------------------------------------------------------------------------------


class HeldOutView(NamedTuple):
    """A line of views.png."""

    context: list
    motion: str  # in words
    imagined: np.ndarray
    true: np.ndarray


def imagine_held_out(model, groups, read) -> tuple[dict[str, float], list[HeldOutView]]:
    """Imagine all targets of held-out groups -> (metrics, views).

    nearest   share of views nearest to the true view of their own motion, among those of the same group
    mse       mean squared error to the true view, pictures in [-1, 1]
    """
    views, queries = [], []
    for group in groups:
        p = read_pictures(group, read)
        for row, motion, true in zip(group, p.motions, p.targets, strict=True):
            sentence = instruction(motion, p.reference)
            queries.append(Query(p.context, p.reference, sentence, seed=len(queries)))
            words = f"Image-{row['reference']}: {phrase(motion)}"
            true = resize(true, model.settings.vae_limits)
            views.append(HeldOutView(p.context, words, None, true))
    imagined = model.imagine(queries)
    views = [view._replace(imagined=x) for view, x in zip(views, imagined, strict=True)]
    hits, errors, first = [], [], 0
    for group in groups:
        alike = views[first : first + len(group)]
        first += len(group)
        for k, view in enumerate(alike):
            true = np.stack([other.true for other in alike]) / 127.5
            distance = np.square(view.imagined / 127.5 - true).mean((1, 2, 3))
            hits.append(distance.argmin() == k)
            errors.append(distance[k])
    return {"nearest": float(np.mean(hits)), "mse": float(np.mean(errors))}, views


def draw_views(path: Path, views: list[HeldOutView], side: int = 96) -> None:
    """A picture with one line per held-out view: context | motion in words | imagined | true."""
    step, columns = side + 4, max(len(view.context) for view in views)
    words_at = step * columns
    imagined_at = words_at + 200
    page = Image.new("RGB", (imagined_at + 2 * step, 16 + step * len(views)), "white")
    draw = ImageDraw.Draw(page)
    titles = ((4, "context"), (words_at + 8, "motion"))
    titles += ((imagined_at, "imagined"), (imagined_at + step, "true"))
    for x, title in titles:
        draw.text((x, 2), title, "black")
    for i, view in enumerate(views):
        y = 16 + i * step
        draw.text((words_at + 8, y + side // 2 - 6), view.motion, "black")
        columns = [k * step for k in range(len(view.context))]
        columns += [imagined_at, imagined_at + step]
        for x, image in zip(columns, [*view.context, view.imagined, view.true], strict=True):
            picture = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            page.paste(picture, (x, y))
    page.save(path)


# ---- the run -------------------------------------------------------------------------------------------------------------


def load_model(args: Namespace, world, groups: list) -> WorldModel:
    """--init, or random weights, ready to train on this rank."""
    prepare = functools.partial(prepare_network, args=args, world=world)
    if not args.init:
        most = max(len(group[0]["context"]) for group in groups)
        model = WorldModel.tiny(args.seed, args.size, max_context=min(MAX_IMAGES, most))
        prepare(model.network.to(world.device))
        return model
    half = args.lora and world.device.type == "cuda"  # what is frozen
    try:
        dtype = torch.bfloat16 if half else torch.float32
        return WorldModel.load(args.init, world.device, dtype, prepare)
    except (OSError, ValueError) as error:
        fail(f"--init {args.init}: {error}")


def prepare_network(network, args, world):
    """Adapters, recomputation, sharding: of --init before its tensors are read."""
    network.recompute = args.gradient_checkpointing
    adapters = []
    if args.lora:
        alpha = 2 * args.lora
        adapters = add_lora(network, args.lora, alpha, LANGUAGE_LAYERS, args.seed, world.device)
    shard(network, network.blocks, world, ignored=adapters)


@contextlib.contextmanager
def ema_weights(parameters: list, ema: list) -> Iterator[None]:
    """Inside, the model's weights are their EMA, and nothing has a gradient."""
    trained = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        try:
            for p, e in zip(parameters, ema, strict=True):
                p.copy_(e)
            yield
        finally:
            for p, own in zip(parameters, trained, strict=True):
                p.copy_(own)


def main(argv: list[str] | None = None) -> None:
    """The stage: batch, forward, loss, backward, step, EMA, a look now and then, log, save."""
    args = parse_args(argv)
    makes = "python data.py triples" + " --dataset NAME --root DIR" * (args.preset == "astra")
    files = itertools.product(args.data, ("train", "val"))
    needs = [(Path(at) / f"triples_{split}.jsonl", f"{makes} --out {at}") for at, split in files]
    begin("train_wm", args, FLAGS, needs)
    world = setup(args.threads)
    train = load_groups(args.data, "train", args.targets)
    held_out = load_groups(args.data, "val", args.targets)[: args.look_contexts]
    if args.contexts % world.size:
        fail(f"--contexts {args.contexts} cannot be shared evenly by {world.size} processes.")
    if args.contexts > len(train):
        fail(
            f"--contexts {args.contexts} are more than the {len(train)} of --data: make more rooms."
        )
    share = args.contexts // world.size
    mine = range(world.rank * share, (world.rank + 1) * share)  # of the contexts of an update
    read = functools.lru_cache(args.images_in_memory)(read_image)
    latents = LatentFolder(args.latents) if args.latents else None

    model = load_model(args, world, train)
    network = model.network
    names, parameters = [], []
    for name, p in network.named_parameters():
        if p.requires_grad:
            names.append(name)
            parameters.append(p)
    ema = [p.detach().clone() for p in parameters]
    adamw = {"betas": (0.9, 0.95), "eps": args.eps, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, **adamw, fused=True)

    out = Path(args.out)
    tensors = training_tensors(network, optimizer)
    tensors |= {f"ema.{name}": e for name, e in zip(names, ema, strict=True)}
    start, state = load_state(out / "training", tensors) or (0, {})
    clock = Clock(state.get("clock"))
    log = MetricLog(out / "log.jsonl", start)

    def save(done):
        save_state(out / "training", done, tensors, {"clock": clock.read()})

    with Interrupt() as stop:
        bar = progress(args.steps, start, "world model")
        for step in bar:
            lr = set_learning_rate(optimizer, step, args)
            order = rows_of_step(len(train), args.contexts, step, args.seed)
            batches = []
            for i in range(0, share, args.micro_contexts):
                micro = mine[i : i + args.micro_contexts]
                groups = [train[order[k]] for k in micro]
                streams = [torch_stream("batch", args.seed, step, k) for k in micro]
                batches.append(make_batch(groups, streams, model, read, args, latents))
            tokens = global_sum(sum(len(targets.x0) for _, targets in batches))  # all ranks

            means = Means(LOSSES)
            for pack, targets in batches:
                parts = losses(network, pack, targets, args.warp_weight)
                (sum(parts.values()) / tokens).backward()
                for key, total in parts.items():
                    means.add(key, total.detach(), len(targets.x0))
            sum_gradients(parameters)
            grad_norm = clip_gradients(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)

            metrics = means.read() | {"grad_norm": grad_norm, "lr": lr}
            done = step + 1
            if done % args.look_every == 0 or done == args.steps:
                with ema_weights(parameters, ema), unsharded(network):
                    scores, views = imagine_held_out(model, held_out, read)
                if is_main():
                    draw_views(out / "views.png", views[:: max(1, len(views) // 12)])
                metrics |= scores
                say(
                    f"step {done}: flow {metrics['loss_flow']:.4f}, held-out views: nearest "
                    f"{scores['nearest']:.2f}, mse {scores['mse']:.4f}, {clock.read()['cpu_seconds']:.0f} CPU-s"
                )
            log.write(step, **metrics)
            bar.set_postfix(flow=f"{metrics['loss_flow']:.4f}")
            stop.save_or_leave(done, args, functools.partial(save, done))

    with ema_weights(parameters, ema), whole_folder(out) as part:
        model.save(part, merged(network))
    finish(out, args.steps, clock)


if __name__ == "__main__":
    run_stage(main)
