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
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib import distributed, stage
from lib.bagel import LATENT_PATCH, MAX_IMAGES, patchify, token_grid
from lib.bagel_files import resize, to_pixels
from lib.checkpoints import load_state, save_state, training_tensors
from lib.distributed import fail, is_main
from lib.geometry import Motion, Query, instruction, phrase
from lib.images import PictureError, contact_sheet, decode, on_white
from lib.packing import Latent, Pack, Text, View, pack
from lib.records import MetricLog, load_jsonl, whole_folder
from lib.stage import Flag
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
REQUIRED = {"context", "reference", "motion", "target", "warp"}  # of a triple (lib.records.Triple)
MIRRORED = {"left": "right", "right": "left"}
COLOURS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The command line's flags."""
    args = stage.parse_flags(__doc__, FLAGS, argv)
    if args.size % 16:
        args.parser.error(f"--size {args.size} is not a multiple of 16, the ViT's patch")
    if args.lora and not args.init:
        args.parser.error(
            "--lora trains adapters beside a model's weights: give --init. A random model has none worth keeping"
        )
    return args


# ---- data: triples that share a context ----------------------------------------------------------------------------------


def load_groups(folders: list[str], split: str, most: int) -> list[list]:
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
    lacking = REQUIRED - set.intersection(*map(set, rows))
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
class TriplePictures:
    """One context with its T targets, as the files hold them: uint8."""

    context: list  # (H, W, 3) each
    reference: int  # 1-based number of the context view that the motions start from
    motions: list[Motion]
    targets: np.ndarray  # (T, H, W, 3)
    warps: np.ndarray  # (T, H, W, 4) the context warped into each target view; alpha 255 where some context view sees it


def read_pictures(rows: list[dict], read: Callable) -> TriplePictures:
    """The pictures of a group of triples."""
    targets = [read(row["target"]) for row in rows]
    warps = [read(row["warp"]) for row in rows]
    sizes = {image.shape[:2] for image in targets + warps}
    if len(sizes) > 1 or any(warp.shape[-1] != 4 for warp in warps):
        fail(
            f"The targets of one context and their warps must have one size, and the warps an alpha channel: "
            f"look at {rows[0]['target']} and the pictures beside it."
        )
    return TriplePictures(
        context=[on_white(read(path)) for path in rows[0]["context"]],
        reference=rows[0]["reference"],
        motions=[Motion(**row["motion"]) for row in rows],
        targets=np.stack([on_white(target) for target in targets]),
        warps=np.stack(warps),
    )


def augment(p: TriplePictures, stream) -> None:
    """Make one of a room's twelve rooms of its pictures, in place: mirrored or not, with permuted colours.

    In the mirror, left and right change places in the words and along the ring.
    """
    mirror = int(torch.randint(2, (), generator=stream))
    colours = list(COLOURS[int(torch.randint(len(COLOURS), (), generator=stream))])
    if mirror:
        p.context = [image[:, ::-1] for image in reversed(p.context)]
        p.reference = len(p.context) + 1 - p.reference
        p.targets, p.warps = p.targets[:, :, ::-1], p.warps[:, :, ::-1]
        for k, motion in enumerate(p.motions):
            words = [MIRRORED.get(word, word) for word in motion.kind.split()]
            p.motions[k] = Motion(" ".join(words), motion.amount)
    p.context = [image[..., colours] for image in p.context]
    p.targets = p.targets[..., colours]
    p.warps = p.warps[..., [*colours, 3]]


# ---- batches -------------------------------------------------------------------------------------------------------------


class Encoder:
    """The frozen autoencoder, picture by picture.

    folder   keeps its moments of each picture (posterior mean and log-variance) on disk as fp16; None: no folder.
    Without it every epoch would encode every picture again; the draw from the posterior stays fresh. A picture is known
    by its contents, so one that was made anew or mirrored is another.
    """

    def __init__(self, model: WorldModel, folder: str | None = None):
        self.autoencoder, self.device, self.folder = model.autoencoder, model.device, folder

    def latent(self, image: np.ndarray, stream=None) -> Tensor:
        """(H, W, 3) uint8 -> (1, c, 2 h, 2 w) on the CPU, drawn from the posterior by `stream`; without one, its mean."""
        if not self.autoencoder.random:
            return self.autoencoder.encode(to_pixels(image[None]))
        mean, log_variance = self.stored_moments(image) if self.folder else self.moments(image)
        noise = torch.zeros_like(mean)
        if stream is not None:
            noise = torch.randn(mean.shape, generator=stream)
        return self.autoencoder.draw(mean, log_variance, noise)

    def moments(self, image):
        """Mean and log-variance (1, c, 2 h, 2 w), on the CPU."""
        mean, log_variance = self.autoencoder.moments(to_pixels(image[None]).to(self.device))
        return mean.cpu(), log_variance.cpu()

    def stored_moments(self, image):
        """The same from the folder, computed where it is not there yet."""
        name = hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()[:24]
        path = Path(self.folder, name[:2], f"{name}.safetensors")
        if not path.exists():
            mean, log_variance = self.moments(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{uuid.uuid4().hex}")  # two ranks may meet here
            save_file({"mean": mean.half(), "log_variance": log_variance.half()}, beside)
            os.replace(beside, path)
        tensors = load_file(path)
        return tensors["mean"].float(), tensors["log_variance"].float()


class Targets(NamedTuple):
    """What the loss compares with: the N latent tokens of all targets of a Pack, in its order."""

    x0: Tensor  # (N, C)
    eps: Tensor  # (N, C)
    warp: Tensor  # (N, C) the context warped into the target view; its holes show the target
    visible: Tensor  # (N,) share of a token's pixels that some context view sees


def context_segments(image, latent, number, keep, model) -> list:
    """A context image as it stands in a sequence: its VAE segment and its ViT segment, or what dropout leaves of them.

    image (H, W, 3) uint8, latent (1, c, 2 h, 2 w), keep (keep_vae, keep_vit)
    """
    patch = model.network.config.vit_patch
    pixels = to_pixels(resize(image, model.settings.vit_limits)[None])
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    tokens, patches = patchify(latent, LATENT_PATCH)[0], patchify(pixels, patch)[0]
    return [
        Latent(tokens, token_grid(latent), number=number, keep=keep[0]),
        View(patches, grid, number=number, keep=keep[1]),
    ]


def make_sample(rows, model, encoder, read, args, stream) -> tuple[list, Targets]:
    """One context with its T targets -> (segments of a pack, what the loss compares with).

    Every draw comes from `stream`. Each target is a branch of its own, with its sentence (lib/packing.py).
    """
    p = read_pictures(rows, read)
    if args.augment:
        augment(p, stream)
    sentences = [instruction(motion, p.reference) for motion in p.motions]
    if args.shuffle_instructions:
        order = torch.randperm(len(rows), generator=stream).tolist()
        sentences = [sentences[k] for k in order]
    context = model.arranged(p.context, p.reference, "")[0]

    # condition dropout, and the targets' times
    dropout = torch.tensor([args.drop_vae, args.drop_vit])
    keep = (torch.rand(len(context), 2, generator=stream) >= dropout).tolist()
    keep_text = (torch.rand(len(rows), generator=stream) >= args.drop_text).tolist()
    t = torch.sigmoid(torch.randn(len(rows), generator=stream) + math.log(args.shift))  # (T,)
    torch.randint(2, (), generator=stream)  # unused: recorded runs have a draw here

    # pictures as latents; x_t is computed here and nowhere else: network and loss find it in the pack
    fit = functools.partial(resize, limits=model.settings.vae_limits)
    alpha = np.where(p.warps[..., 3] > 127, np.uint8(255), np.uint8(0))  # (T, H, W)
    warps = p.targets  # without its loss nobody reads the warp: it is not another picture to encode
    if args.warp_weight:
        warps = np.where(alpha[..., None], p.warps[..., :3], p.targets)
    context = [fit(image) for image in context]
    latents = [encoder.latent(image, stream) for image in context]
    views = torch.cat([encoder.latent(fit(image), stream) for image in p.targets])
    warps = torch.cat([encoder.latent(fit(image)) for image in warps])
    x0, warp = patchify(views, LATENT_PATCH), patchify(warps, LATENT_PATCH)  # (T, n, C)
    eps = torch.randn(x0.shape, generator=stream)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * eps
    alpha = np.stack([fit(mask) for mask in alpha])[:, None] / np.float32(255)
    side = LATENT_PATCH * model.autoencoder.cell  # of a token, pixels
    visible = patchify(torch.from_numpy(alpha), side).mean(-1)  # (T, n)

    segments = []
    for i, image in enumerate(context):
        segments += context_segments(image, latents[i], i, keep[i], model)
    for k, sentence in enumerate(sentences):
        ids = model.token_ids(model.arranged(p.context, p.reference, sentence)[2])
        words = ids[1:-1] if keep_text[k] else []
        target = Latent(x_t[k], token_grid(views), group=k + 1, t=float(t[k]), motion_ids=words)
        segments += [Text(ids, group=k + 1, keep=keep_text[k]), target]
    return segments, Targets(*(x.flatten(0, 1) for x in (x0, eps, warp, visible)))


@torch.no_grad()
def make_batch(groups, streams, model, encoder, read, args) -> tuple[Pack, Targets]:
    """Groups of triples as the network reads them; group i draws from streams[i]."""
    samples, targets = [], []
    for group, stream in zip(groups, streams, strict=True):
        segments, compared = make_sample(group, model, encoder, read, args, stream)
        samples.append(segments)
        targets.append(compared)
    # Flex attention skips what sees nothing, so on a GPU all samples stand in one sequence, without padding.
    sequences = [samples] if model.device.type == "cuda" else [[sample] for sample in samples]
    inputs = pack(sequences, model.network.markers, model.network.config)
    joined = (torch.cat(parts).to(model.device) for parts in zip(*targets, strict=True))
    return inputs.to(model.device), Targets(*joined)


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


def imagine_held_out(model, groups, read) -> tuple[dict, list]:
    """Imagine all targets of held-out groups -> (metrics, rows of views.png: context, words, imagined, true).

    nearest   share of views nearest to the true view of their own motion, among those of the same group
    mse       mean squared error to the true view, pictures in [-1, 1]
    """
    queries, pictures = [], [read_pictures(group, read) for group in groups]
    for p in pictures:
        for motion in p.motions:
            sentence = instruction(motion, p.reference)
            queries.append(Query(p.context, p.reference, sentence, seed=len(queries)))
    views = iter(model.imagine(queries))
    hits, errors, rows = [], [], []
    for p in pictures:
        true = np.stack([resize(target, model.settings.vae_limits) for target in p.targets])
        for k, motion in enumerate(p.motions):
            view = next(views)
            distance = np.square(view / 127.5 - true / 127.5).mean((1, 2, 3))  # (T,)
            hits.append(distance.argmin() == k)
            errors.append(distance[k])
            rows.append([*p.context, f"Image-{p.reference}:\n{phrase(motion)}", view, true[k]])
    return {"nearest": float(np.mean(hits)), "mse": float(np.mean(errors))}, rows


def draw_views(rows: list, path: Path) -> None:
    """A picture with one line per held-out view, on rank 0."""
    most = max(map(len, rows))
    blank = np.full((1, 1, 3), 255, np.uint8)  # where another context has one view more
    head = ["context", *[""] * (most - 4), "motion", "imagined", "true"]
    if is_main():
        contact_sheet(head, [[blank] * (most - len(row)) + row for row in rows]).save(path)


# ---- the run -------------------------------------------------------------------------------------------------------------


def load_model(args: Namespace, world: distributed.World, most: int) -> WorldModel:
    """--init, or random weights for at most `most` context views, ready to train on this rank."""

    def prepare(network):
        """Adapters, recomputation, sharding: of --init before its tensors are read."""
        network.recompute = args.gradient_checkpointing
        adapters = []
        if args.lora:
            from extras.lora import LANGUAGE_LAYERS, add_lora

            adapters = add_lora(
                network,
                rank=args.lora,
                alpha=2 * args.lora,
                names=LANGUAGE_LAYERS,
                seed=args.seed,
                device=world.device,
            )
        distributed.shard(network, network.blocks, world, ignored=adapters)

    if not args.init:
        model = WorldModel.tiny(args.seed, args.size, max_context=min(MAX_IMAGES, most))
        prepare(model.network.to(world.device))
        return model
    frozen_in_bf16 = args.lora and world.device.type == "cuda"
    dtype = torch.bfloat16 if frozen_in_bf16 else torch.float32
    try:
        return WorldModel.load(args.init, world.device, dtype, prepare)
    except (OSError, ValueError) as error:
        fail(f"--init {args.init}: {error}")


@contextlib.contextmanager
def ema_weights(parameters: list, ema: list) -> Iterator[None]:
    """Inside, the model's weights are their EMA, and nothing has a gradient."""
    trained = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, e in zip(parameters, ema, strict=True):
            p.copy_(e)
        try:
            yield
        finally:
            for p, own in zip(parameters, trained, strict=True):
                p.copy_(own)


def save_model(model: WorldModel, folder: Path, args: Namespace) -> None:
    """Write the finished model, adapters added to the weights they stand beside."""
    if not args.lora:
        model.save(folder)
        return
    from extras.lora import merged

    model.save(folder, merged(model.network))


def main(argv: list[str] | None = None) -> None:
    """The stage: batch, forward, loss, backward, step, EMA, a look now and then, log, save."""
    args = parse_args(argv)
    stage.begin("train_wm", args, FLAGS)
    world = distributed.setup(args.threads)
    train = load_groups(args.data, "train", args.targets)
    held_out = load_groups(args.data, "val", args.targets)[: args.look_contexts]
    if args.contexts % world.size:
        fail(
            f"--contexts {args.contexts} cannot be shared evenly by {world.size} processes: take a multiple."
        )
    if args.contexts > len(train):
        fail(f"--contexts {args.contexts} are more than the {len(train)} in --data.")
    share = args.contexts // world.size
    mine = range(world.rank * share, (world.rank + 1) * share)  # of the contexts of an update

    model = load_model(args, world, most=max(len(group[0]["context"]) for group in train))
    network = model.network
    encoder = Encoder(model, args.latents)
    read = functools.lru_cache(args.images_in_memory)(read_image)
    parameters = [p for p in network.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in parameters]
    adamw = {"betas": (0.9, 0.95), "eps": args.eps, "weight_decay": args.weight_decay}
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, **adamw, fused=True)

    out = Path(args.out)
    tensors = training_tensors(network, optimizer)
    tensors |= {f"ema.{i}": e for i, e in enumerate(ema)}
    start, state = load_state(out / "training", tensors) or (0, {})
    clock = stage.Clock(state.get("clock"))
    log = MetricLog(out / "log.jsonl", start)

    def save(done):
        save_state(out / "training", done, tensors, {"clock": clock.read()})

    with stage.Interrupt() as stop:
        bar = distributed.progress(args.steps, start, "world model")
        for step in bar:
            lr = stage.set_learning_rate(optimizer, step, args)
            order = rows_of_step(len(train), args.contexts, step, args.seed)
            batches = []
            for i in range(0, share, args.micro_contexts):
                micro = mine[i : i + args.micro_contexts]
                groups = [train[order[k]] for k in micro]
                streams = [torch_stream("batch", args.seed, step, k) for k in micro]
                batches.append(make_batch(groups, streams, model, encoder, read, args))
            tokens = distributed.global_sum(sum(len(targets.x0) for _, targets in batches))

            means = distributed.Means(LOSSES)
            for inputs, targets in batches:
                parts = losses(network, inputs, targets, args.warp_weight)
                (sum(parts.values()) / tokens).backward()
                for key, total in parts.items():
                    means.add(key, total.detach(), len(targets.x0))
            distributed.sum_gradients(parameters)
            grad_norm = distributed.clip_gradients(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)

            metrics = means.read() | {"grad_norm": grad_norm, "lr": lr}
            done = step + 1
            if done % args.look_every == 0 or done == args.steps:
                with ema_weights(parameters, ema), distributed.unsharded(network):
                    scores, rows = imagine_held_out(model, held_out, read)
                draw_views(rows[:: max(1, len(rows) // 12)], out / "views.png")
                metrics |= scores
                distributed.say(
                    f"step {done}: flow {metrics['loss_flow']:.4f}, held-out views: nearest "
                    f"{scores['nearest']:.2f}, mse {scores['mse']:.4f}, {clock.read()['cpu_seconds']:.0f} CPU-s"
                )
            log.write(step, **metrics)
            bar.set_postfix(flow=f"{metrics['loss_flow']:.4f}")
            stop.save_or_leave(done, args, save)

    with ema_weights(parameters, ema), whole_folder(out) as part:
        save_model(model, part, args)
    stage.finish(out, args.steps, clock)


if __name__ == "__main__":
    stage.run_stage(main)
