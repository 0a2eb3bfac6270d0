"""
Train the world simulator: context views + a camera motion in words -> the view from there (the paper's Astra-WM).

  laptop       python data.py triples && python train_wm.py     # tiny preset: minutes on one core -> out/wm
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_wm.py --preset astra    # out/scannet, ... -> out/wm-astra
  control      python train_wm.py --shuffle-instructions --out out/wm-untuned     # same data and compute, motions exchanged
  resume       the same command: it goes on from the newest checkpoint in --out

In:  triples_{train,val}.jsonl in --data (data.py makes them).
Out: the EMA of the model in BAGEL's layout, log.jsonl, args.json, done.json, views.png (context, motion, imagined, true).

With x_t = (1 - t) x0 + t eps, t = 1 pure noise, and x0_hat = x_t - t v_hat, the loss per latent token is, as a mean
over its channels,
  flow matching       |v_hat - (eps - x0)|^2, or |x0_hat - x0|^2 where the model predicts x0 (Settings.prediction)
  view consistency    ours, on top: `content` below (the paper's "view consistency tuning" is fine-tuning)
The loss falls long before the model looks at its context. Watch `nearest`: the share of held-out views that lie nearest
to the true view of their own motion, among the true views of their group (the targets that share context and reference).
`nearest_chance` is what guessing reaches: 1 in 16 where all groups are full.
"""

import contextlib
import functools
import itertools
import math
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib import distributed, stage
from lib.bagel import LATENT_PATCH, MAX_IMAGES, patchify, resize, to_pixels, token_grid
from lib.checkpoints import TrainingState, training_tensors
from lib.distributed import fail, is_main
from lib.geometry import Motion, Query, delta_of
from lib.images import PictureError, contact_sheet, decode, on_white, save_image
from lib.packing import Pack, Text, VaeImage, VitImage, pack
from lib.protocol import call_of, motion_in
from lib.records import TRIPLE_KEYS, Triple, check_triple, load_jsonl, whole_folder
from lib.simulators import instruction, phrase, random_instruction
from lib.stage import Flag
from lib.streams import (
    numpy_stream,
    prefetched,
    rows_of_step,
    set_learning_rate,
    torch_stream,
)
from world_model import WorldModel, x0_from_output

SCANS = [f"out/{name}" for name in ("scannet", "scannetpp", "matterport", "arkitscenes", "dl3dv")]
# The paper gives model and data. Of astra, --lr is BAGEL's example for fine-tuning, --eps and the dropout are BAGEL's own;
# --warmup, --train-shift and EMA are what others fine-tune it with. The rest is ours: 64 targets an update, eight of
# each context of a scan, so that 17,000 updates are two epochs of the paper's 544,197 triples.
# View consistency is on in both: in rooms it brings .03 of pose at 64 pixels and nothing at 32 (docs/view-consistency.md).
# A scan's warp is rougher than a room's, so astra's weight is small: it draws x0_hat to the warp by 0.1 t^2 / (1 + 0.1 t^2),
# 9 % of the way in pure noise, 2 % at t = 0.5. Its price, counted at 1024 x 768, four context views and full groups: one
# more picture encoded per target, 3.6 TFLOP of the 580 that it costs, and 0.8 MB of latents on the GPU.
# tiny takes many small updates: at equal targets seen, 500 updates of 28 reach `nearest` .7 to .8, 250 of 55 only .3; and
# the targets of one context together, since reading it is a third of the work; and Muon, from which it learns a view
# in half the updates (docs/simulator.md).
FLAGS = [
    Flag("--data", ["out/data"], SCANS, "folders with triples_{train,val}.jsonl, one per dataset"),
    Flag("--out", "out/wm", "out/wm-astra", "folder of the run and of the finished model"),
    Flag(
        "--init", None, "ByteDance-Seed/BAGEL-7B-MoT", "model to start from; tiny: random weights"
    ),
    Flag("--size", 32, 32, "side of the views without --init, pixels; a multiple of 16", 1),
    Flag("--seed", 0, 0, "of every draw"),
    Flag("--steps", 5000, 17_000, "updates", 1),
    Flag("--contexts", 2, 8, "contexts per update, all ranks together", 1),
    Flag("--lr", 2e-3, 2e-5, "peak learning rate", 0),
    Flag("--lr-floor", 0.03, 1.0, "share of the peak where the cosine ends", 0, 1),
    Flag("--warmup", 100, 500, "steps of linear rise", 0),
    Flag("--muon", True, False, "Muon for the matrices inside the layers, AdamW for all else"),
    Flag("--weight-decay", 0.01, 0.0, "of AdamW and Muon", 0),
    Flag("--eps", 1e-8, 1e-15, "of AdamW; a gradient of norm 1 has entries of 1e-5 at 14 B", 0),
    Flag("--train-shift", 4.5, 4.0, "t = sigmoid(N(0, 1) + ln shift): above 1 to noise", 1e-3),
    Flag("--drop-text", 0.0, 0.1, "condition dropout: sentences, for guidance", 0, 1),
    Flag("--drop-vit", 0.0, 0.3, "condition dropout: ViT segments of context", 0, 1),
    Flag("--drop-vae", 0.0, 0.3, "condition dropout: VAE segments of context", 0, 1),
    Flag("--paraphrase", False, True, "draw among the printed wordings of a motion"),
    Flag("--augment", True, False, "mirrored rooms and permuted colours"),
    Flag("--warp-weight", 0.5, 0.1, "view consistency: agreement with the warped context", 0),
    Flag(
        "--shuffle-instructions",
        False,
        False,
        "the untuned control: in each group motions change places",
    ),
    Flag("--lora", 0, 0, "train adapters of this rank (alpha twice that) beside --init", 0),
    Flag("--micro-contexts", 4, 1, "contexts per forward pass and rank", 1, neutral=True),
    Flag(
        "--gradient-checkpointing", False, True, "recompute activations in backward", neutral=True
    ),
    Flag("--images-in-memory", None, 200, "decoded pictures; default: all", 0, neutral=True),
    Flag("--eval-every", 1_000, 1_000, "steps between looks at held-out views", 1, neutral=True),
    Flag("--eval-contexts", 16, 2, "held-out contexts to look at", 1, neutral=True),
    # astra: every rank writes 28 GB while its GPU waits, half a minute or more
    Flag("--save-every", 250, 1_000, "steps between checkpoints", 1, neutral=True),
    Flag("--threads", 1, 1, "CPU threads; small models gain little", 1, neutral=True),
]
TARGETS = 16  # that share one reading of their context, at most
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to it
EMA_DECAY = 0.995  # of the weights that are saved; rises from 0.1
# keys of the log, weighted, beside grad_norm, lr, mse, nearest and nearest_chance
LOSSES = ("loss_flow", "loss_content")
RING = 4  # views of a ring come first in a context
SIDEWAYS = ("dx", "dangle")  # what a mirror reverses
CHANNEL_ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


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


def triple_files(folders: list[str]) -> list[tuple[Path, str]]:
    """(path, the command that makes it) of every input."""
    files = []
    for folder in folders:
        scans = f" --dataset {Path(folder).name} --root DIR" if folder in SCANS else ""
        for split in ("train", "val"):
            file = Path(folder, f"triples_{split}.jsonl")
            files.append((file, f"python data.py triples{scans} --out {folder}"))
    return files


# ---- the stage -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """The stage: batch, forward, loss, backward, step, EMA, a look now and then, log, save."""
    args = parse_args(argv)
    world = distributed.setup(args.threads)
    args.data = present_folders(args.data)
    stage.begin("train_wm", args, FLAGS, triple_files(args.data))
    train = load_groups(args.data, "train")
    if args.shuffle_instructions:  # a lone motion has none to change places with
        train = [group for group in train if len(group) > 1]
    held_out = load_groups(args.data, "val")
    # spread over all of them: neighbours share a room, folders a dataset
    apart = max(1, len(held_out) // args.eval_contexts)
    held_out = held_out[::apart][: args.eval_contexts]
    if args.contexts % world.size:
        fail(
            f"--contexts {args.contexts} cannot be shared evenly by {world.size} processes: take a multiple."
        )
    if args.contexts > len(train):
        fail(f"--contexts {args.contexts} are more than the {len(train)} in --data.")
    distributed.say(
        f"{sum(map(len, train)):,} triples in {len(train):,} contexts: {args.steps:,} updates are "
        f"{args.steps * args.contexts / len(train):,.1f} passes over them."
    )
    if not args.init:
        pixels = max(read_image(train[0][0]["target"]).shape)
        if pixels != args.size:
            distributed.say(f"Pictures of {pixels} pixels are seen at --size {args.size}.")
    per_rank = args.contexts // world.size
    mine = range(world.rank * per_rank, (world.rank + 1) * per_rank)  # of the contexts of an update

    model = load_model(args, world, most=max(len(group[0]["context"]) for group in train))
    network = model.network
    read = functools.lru_cache(args.images_in_memory)(read_image)
    parameters = [p for p in network.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(network, parameters, args)

    out = Path(args.out)
    tensors = training_tensors(network, optimizer)
    tensors |= {f"ema.{i}": e for i, e in enumerate(ema)}
    training = TrainingState(out, tensors)

    def make_batches(step):
        """This rank's batches of one update, which depend on seed and step alone."""
        order = rows_of_step(len(train), args.contexts, step, args.seed)
        batches = []
        for i in range(0, per_rank, args.micro_contexts):
            micro = mine[i : i + args.micro_contexts]
            groups = [train[order[k]] for k in micro]
            keys = [(args.seed, step, k) for k in micro]
            batches.append(make_batch(groups, keys, model, read, args))
        return batches

    with stage.Interrupt() as stop:
        bar = distributed.progress(args.steps, training.start, "world model")
        batches_of_steps = prefetched(make_batches, range(training.start, args.steps))
        for step, batches in zip(bar, batches_of_steps, strict=True):
            lr = set_learning_rate(optimizer, step, args)
            tokens = distributed.global_sum(sum(len(targets.x0) for _, targets in batches))

            means = distributed.Means(LOSSES)
            for inputs, targets in batches:
                parts = losses(network, inputs, targets, args.warp_weight)
                (sum(parts.values()) / tokens).backward()
                for key, total in parts.items():
                    means.add(key, total.detach(), len(targets.x0))
            distributed.sum_gradients(parameters)
            grad_norm = distributed.clip_gradients(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)

            metrics = means.read() | {"grad_norm": grad_norm, "lr": lr}
            done = step + 1
            if done % args.eval_every == 0 or done == args.steps:
                with ema_weights(parameters, ema), distributed.unsharded(network):
                    scores, rows = imagine_held_out(model, held_out, read)
                draw_views(rows[:: max(1, len(rows) // 12)], out / "views.png")
                metrics |= scores
                seconds = training.clock.read()["cpu_seconds"]  # a collective
                distributed.say(
                    f"step {done}: flow {metrics['loss_flow']:.4f}, held-out views: nearest "
                    f"{scores.get('nearest', math.nan):.2f}, mse {scores['mse']:.4f}, {seconds:.0f} CPU-s"
                )
            training.log.write(step, **metrics)
            bar.set_postfix(flow=f"{metrics['loss_flow']:.4f}")
            stop.save_or_leave(done, args, training.save)

    with ema_weights(parameters, ema), whole_folder(out) as part:
        tensors = None
        if args.lora:
            from extras.lora import merged

            tensors = merged(network)
        model.save(part, tensors)
    stage.finish(out, args.steps, training.clock)


# ---- data: triples that share a context ----------------------------------------------------------------------------------


def present_folders(folders: list[str]) -> list[str]:
    """Those of the paper's five datasets that are there, the others named in a line; other folders pass as they are."""
    missing = [folder for folder in folders if not Path(folder, "triples_train.jsonl").exists()]
    if folders != SCANS or len(missing) in (0, len(SCANS)):
        return folders
    distributed.say(f"Without {', '.join(missing)}: not made yet (docs/data.md).")
    return [folder for folder in folders if folder not in missing]


def load_groups(folders: list[str], split: str, most: int = TARGETS) -> list[list]:
    """The triples of some folders in groups that share a context and a reference, at most `most` in a group.

    A group's context is read once for all of its targets. Exits where rows are missing or lack something.
    """
    rows = []
    for folder in folders:
        rows += load_jsonl(
            Path(folder) / f"triples_{split}.jsonl", Triple, check_triple, TRIPLE_KEYS
        )
    if not rows:
        files = f"triples_{split}.jsonl in {', '.join(folders)}"
        remedy = "Read more scans."
        if split == "val":
            remedy = (
                "List scans for it: `python data.py triples --dataset NAME --root DIR --val FILE`."
            )
        fail(f"{files}: no triples. Of a few scans none may fall to {split}. {remedy}")
    groups = []
    for _, group in itertools.groupby(rows, lambda row: (row["context"], row["reference"])):
        group = list(group)
        groups += [group[i : i + most] for i in range(0, len(group), most)]
    return groups


def read_image(path: str) -> np.ndarray:
    """A picture as uint8 (H, W, 3), or (H, W, 4) where it has an alpha channel; exits if it cannot be read."""
    try:
        return np.asarray(decode(path))
    except PictureError as error:
        fail(
            f"{error} Make the triples again, or take their rows out of triples_*.jsonl; the same command goes on from "
            f"the last checkpoint."
        )


class TriplePictures(NamedTuple):
    """One context with its T targets, as the files hold them: uint8."""

    context: list  # (H, W, 3) each
    provenance: list  # of `Query`: which context image was imagined, and how
    reference: int  # 1-based number of the context view that the motions start from
    motions: list[Motion]
    targets: np.ndarray  # (T, H, W, 3)
    warps: np.ndarray  # (T, H, W, 4) the context warped into each target view; alpha 255 where some context view sees it


def read_pictures(rows: list[dict], read: Callable, with_warps: bool) -> TriplePictures:
    """The pictures of a group of triples; without warps as if no context view saw anything of the targets."""
    targets = [read(row["target"]) for row in rows]
    warps = [np.zeros((*targets[0].shape[:2], 4), np.uint8)] * len(rows)
    if with_warps:
        warps = [read(row["warp"]) for row in rows]
    sizes = {image.shape[:2] for image in targets + warps}
    if len(sizes) > 1 or any(warp.shape[-1] != 4 for warp in warps):
        fail(
            f"The targets of one context and their warps must have one size, and the warps an alpha channel: "
            f"look at {rows[0]['target']} and the pictures beside it."
        )
    return TriplePictures(
        context=[on_white(read(path)) for path in rows[0]["context"]],
        provenance=rows[0]["provenance"],
        reference=rows[0]["reference"],
        motions=[Motion(**row["motion"]) for row in rows],
        targets=np.stack([on_white(target) for target in targets]),
        warps=np.stack(warps),
    )


def augmented(p: TriplePictures, stream: torch.Generator) -> TriplePictures:
    """One of a room's twelve rooms: mirrored or not, with permuted colours."""
    mirror = int(torch.randint(2, (), generator=stream))
    order = list(CHANNEL_ORDERS[int(torch.randint(len(CHANNEL_ORDERS), (), generator=stream))])
    if mirror:
        p = mirrored(p)
    return p._replace(
        context=[image[..., order] for image in p.context],
        targets=p.targets[..., order],
        warps=p.warps[..., [*order, 3]],
    )


def mirrored(p: TriplePictures) -> TriplePictures:
    """The room in a mirror: left and right change places in the words, and the ring of views, the first four, is read
    backwards."""
    ring, others = p.context[:RING], p.context[RING:]

    def mirror_number(number):
        return number if number > len(ring) else len(ring) + 1 - number

    def mirror_motion(motion):
        sign = -1 if motion.kind in SIDEWAYS else 1
        return Motion(motion.kind, sign * motion.amount)

    def mirror_call(call):
        return call_of(mirror_number(call["reference_image"]), mirror_motion(motion_in(call)))

    return TriplePictures(
        context=[image[:, ::-1] for image in ring[::-1] + others],
        provenance=[call and mirror_call(call) for call in p.provenance],
        reference=mirror_number(p.reference),
        motions=[mirror_motion(motion) for motion in p.motions],
        targets=p.targets[:, :, ::-1],
        warps=p.warps[:, :, ::-1],
    )


# ---- batches -------------------------------------------------------------------------------------------------------------


def latent_of(model: WorldModel, image: np.ndarray, stream=None) -> Tensor:
    """(H, W, 3) uint8 -> (1, c, 2 h, 2 w) on the CPU, drawn from the posterior by `stream`; without one, its mean."""
    pixels = to_pixels(image[None]).to(model.device)
    return model.autoencoder.encode(pixels, stream and [stream]).cpu()


class LossTargets(NamedTuple):
    """What the loss compares with: the N latent tokens of all targets of a Pack, in its order."""

    x0: Tensor  # (N, C)
    noise: Tensor  # (N, C)
    warp: Tensor  # (N, C) the context warped into the target view; its holes show the target
    seen_share: Tensor  # (N,) share of a token's pixels that some context view sees


def make_sample(rows, model, read, args, key) -> tuple[list, LossTargets]:
    """One context with its T targets -> (segments of a pack, what the loss compares with).

    Every draw depends on `key` alone: (seed, step, number of the context). Each target is a branch of its own, with its sentence (lib/packing.py).
    """
    stream = torch_stream("batch", *key)
    p = read_pictures(rows, read, with_warps=args.warp_weight > 0)
    if args.augment:
        p = augmented(p, stream)
    context, deltas = model.arrange(p.context, p.reference, p.provenance)
    motions = p.motions
    if args.shuffle_instructions:
        shift = 1 + int(torch.randint(len(rows) - 1, (), generator=stream))  # none keeps its own
        motions = motions[shift:] + motions[:shift]
    sentences = [instruction(motion) for motion in motions]
    if args.paraphrase:
        rng = numpy_stream("wording", *key)
        sentences = [random_instruction(motion, len(context), rng) for motion in motions]

    # condition dropout, and the targets' times
    dropout = torch.tensor([args.drop_vae, args.drop_vit])
    keep = torch.rand(len(context), 2, generator=stream) >= dropout
    keep_vae, keep_vit = keep.T.tolist()
    keep_text = (torch.rand(len(rows), generator=stream) >= args.drop_text).tolist()
    t = torch.randn(len(rows), generator=stream) + math.log(args.train_shift)
    t = torch.sigmoid(t)  # (T,)

    segments = []
    for i, image in enumerate(context):
        image_index = len(context) - 1 - i  # counted from the reference, which is the last one
        vae_image, vit_image = context_segments(image, image_index, model, stream)
        segments.append(vae_image._replace(keep=keep_vae[i], delta=deltas[i]))
        segments.append(vit_image._replace(keep=keep_vit[i]))
    x0, warp, seen_share, grid = encode_targets(p, model, stream)
    noise = torch.randn(x0.shape, generator=stream)
    # x_t is computed here and nowhere else: network and loss find it in the pack
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    for k, sentence in enumerate(sentences):
        if model.network.config.settings.words:
            segments.append(Text(model.token_ids(sentence), branch=k + 1, keep=keep_text[k]))
        command = keep_text[k] * (delta_of(motions[k]) + deltas[-1])
        segments.append(VaeImage(x_t[k], grid, branch=k + 1, t=float(t[k]), delta=command))
    return segments, LossTargets(*(x.flatten(0, 1) for x in (x0, noise, warp, seen_share)))


def context_segments(image, image_index, model, stream) -> tuple[VaeImage, VitImage]:
    """A context image (H, W, 3) uint8 as it stands in a sequence: once for the VAE, once for the ViT."""
    latent = latent_of(model, image, stream)
    patch = model.network.config.vit_patch
    pixels = to_pixels(resize(image, model.settings.vit_limits)[None])
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    return (
        VaeImage(patchify(latent, LATENT_PATCH)[0], token_grid(latent), image_index),
        VitImage(patchify(pixels, patch)[0], grid, image_index),
    )


def encode_targets(p, model, stream) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """The T targets as latent tokens -> (x0 (T, n, C), warp (T, n, C), seen_share (T, n), grid (h, w))."""
    fit = functools.partial(resize, limits=model.settings.vae_limits)
    latents = torch.cat([latent_of(model, fit(image), stream) for image in p.targets])
    x0 = warp = patchify(latents, LATENT_PATCH)
    is_seen = p.warps[..., 3] > 127  # (T, H, W)
    if is_seen.any():
        pictures = np.where(is_seen[..., None], p.warps[..., :3], p.targets)
        warps = torch.cat([latent_of(model, fit(image)) for image in pictures])
        warp = patchify(warps, LATENT_PATCH)
    masks = np.stack([fit(np.uint8(255) * mask) for mask in is_seen])
    masks = torch.from_numpy(masks[:, None] / np.float32(255))  # (T, 1, H', W')
    side = LATENT_PATCH * model.autoencoder.cell  # of a token, pixels
    return x0, warp, patchify(masks, side).mean(-1), token_grid(latents)


@torch.no_grad()
def make_batch(groups, keys, model, read, args) -> tuple[Pack, LossTargets]:
    """Groups of triples as the network reads them; group i draws by keys[i]."""
    samples, targets = [], []
    for group, key in zip(groups, keys, strict=True):
        segments, loss_targets = make_sample(group, model, read, args, key)
        samples.append(segments)
        targets.append(loss_targets)
    # Flex attention skips what sees nothing, so on a GPU all samples stand in one sequence, without padding.
    sequences = [samples] if model.device.type == "cuda" else [[sample] for sample in samples]
    inputs = pack(sequences, model.network.markers, model.network.config)
    joined = (torch.cat(parts).to(model.device) for parts in zip(*targets, strict=True))
    return inputs.to(model.device), LossTargets(*joined)


# ---- losses, each (N,): one number per latent token ----------------------------------------------------------------------


def flow_matching(output: Tensor, x0: Tensor, noise: Tensor, prediction: str) -> Tensor:
    """Squared error of the network's output, mean over the C channels of a token. All tensors (N, C).

    "velocity": |v_hat - (noise - x0)|^2, as BAGEL;  "x0": |x0_hat - x0|^2, that is the velocity's error times t^2.
    """
    return (output - (x0 if prediction == "x0" else noise - x0)).square().mean(-1)


def content(x0_hat: Tensor, warp: Tensor, seen_share: Tensor) -> Tensor:
    """View consistency: where some context view sees the target, draw what it sees. x0_hat, warp (N, C), seen_share (N,).

    The warp is compared in the latent space of the frozen autoencoder, which for pixel latents is the picture itself
    and for FLUX spares a decoder in every step. Where it is seen the warp is nearly the target, so with "x0" this only
    weighs seen tokens more; docs/view-consistency.md says what it brings.
    """
    return seen_share * (x0_hat - warp).square().mean(-1)


def losses(network, pack: Pack, targets: LossTargets, warp_weight: float) -> dict[str, Tensor]:
    """One forward pass -> {"loss_flow", ...}: the parts of the loss, weighted, summed over latent tokens."""
    prediction = network.config.settings.prediction
    output = network(pack)[pack.target_mask]  # (N, C)
    parts = {"loss_flow": flow_matching(output, targets.x0, targets.noise, prediction).sum()}
    if warp_weight:
        x_t = pack.x_t[pack.target_mask]  # (N, C)
        t = pack.t[pack.picture[pack.target_mask]]  # (N,)
        x0_hat = x0_from_output(output, x_t, t[:, None], prediction)
        term = content(x0_hat, targets.warp, targets.seen_share)
        parts["loss_content"] = warp_weight * term.sum()
    return parts


# ---- optimiser -----------------------------------------------------------------------------------------------------------


def make_optimizer(network, parameters: list, args: Namespace) -> torch.optim.AdamW:
    """AdamW of `parameters`, those of the network that are trained; with --muon its subclass."""
    adamw = {"betas": (0.9, 0.95), "eps": args.eps, "weight_decay": args.weight_decay}
    adamw |= {"lr": args.lr, "fused": True}
    if not args.muon:
        return torch.optim.AdamW(parameters, **adamw)
    inside = {p for block in network.blocks for p in block.parameters() if p.dim() == 2}
    matrices = [p for p in parameters if p in inside]
    others = [p for p in parameters if p not in inside]
    return Muon(matrices, others, **adamw)


class Muon(torch.optim.AdamW):
    """AdamW, but matrices move by Muon (Jordan et al., 2024): along their momentum with its singular values made equal.

    Adam's steps lie in the few directions of a matrix in which gradients are large; these go equally far in all.
    matrices   2-D parameters; their momentum is AdamW's `exp_avg`, and `exp_avg_sq` stays unused
    """

    MOMENTUM = 0.95
    # times lr, the root mean square of a step's entries; 0.2 is AdamW's own (Liu et al., 2025)
    STEP = 0.4

    def __init__(self, matrices: list, others: list, **adamw):
        super().__init__([{"params": matrices}, {"params": others}], **adamw)

    @torch.no_grad()
    def step(self) -> None:
        """Move the matrices and drop their gradients; AdamW passes over what has none."""
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is None:
                continue
            momentum = self.state[p]["exp_avg"].lerp_(p.grad, 1 - self.MOMENTUM)
            direction = orthogonal(p.grad.lerp(momentum, self.MOMENTUM))  # Nesterov's
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(direction, alpha=group["lr"] * self.STEP * math.sqrt(max(p.shape)))
            p.grad = None
        super().step()


def orthogonal(x: Tensor) -> Tensor:
    """U V^T of x = U S V^T, x (m, n), roughly: four Newton-Schulz steps bring .01 to 1 between .68 and 1.2."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)
    for _ in range(4):
        gram = x @ x.mT  # (m, m), m <= n
        # s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 of every singular value: steepest at 0
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x


# ---- looking at held-out views -------------------------------------------------------------------------------------------


def imagine_held_out(model, groups, read) -> tuple[dict, list]:
    """Imagine all targets of held-out groups -> (metrics, rows of views.png: context, words, imagined, true).

    nearest          share of views nearest to the true view of their own motion, among those of the same group; of groups
                     with two targets or more, absent where there is none
    nearest_chance   the same of a guess
    mse              mean squared error to the true view, pictures in [-1, 1]
    """
    queries, pictures = [], [read_pictures(group, read, with_warps=False) for group in groups]
    for p in pictures:
        for motion in p.motions:
            sentence = instruction(motion)
            query = Query(
                p.context, p.reference, sentence, seed=len(queries), provenance=p.provenance
            )
            queries.append(query)
    views = iter(distributed.split_work(model.imagine, queries))
    hits, chances, errors, rows = [], [], [], []
    for p in pictures:
        true = np.stack([resize(target, model.settings.vae_limits) for target in p.targets])
        for k, motion in enumerate(p.motions):
            view = next(views)
            distance = np.square(view / 127.5 - true / 127.5).mean((1, 2, 3))  # (T,)
            if len(p.motions) > 1:
                hits.append(distance.argmin() == k)
                chances.append(1 / len(p.motions))
            errors.append(distance[k])
            words = textwrap.fill(phrase(motion), 24)
            rows.append([*p.context, f"Image-{p.reference}:\n{words}", view, true[k]])
    scores = {"mse": float(np.mean(errors))}
    if hits:
        scores |= {"nearest": float(np.mean(hits)), "nearest_chance": float(np.mean(chances))}
    return scores, rows


def draw_views(rows: list, path: Path) -> None:
    """A picture with one line per held-out view, on rank 0."""
    most = max(map(len, rows))
    blank = np.full((1, 1, 3), 255, np.uint8)  # where another context has one view more
    head = ["context", *[""] * (most - 4), "motion", "imagined", "true"]
    if is_main():
        save_image(path, contact_sheet(head, [[blank] * (most - len(row)) + row for row in rows]))


# ---- model, EMA, files -----------------------------------------------------------------------------------------------


def load_model(args: Namespace, world: distributed.World, most: int) -> WorldModel:
    """--init, or random weights for at most `most` context views, ready to train on this rank."""

    def prepare(network):
        """Freezing, adapters, recomputation, sharding: of --init before its tensors are read."""
        network.freeze_unused()
        network.recompute = args.gradient_checkpointing
        adapters = []
        if args.lora:
            from extras.lora import LANGUAGE_LAYERS, add_lora

            adapters = add_lora(network, LANGUAGE_LAYERS, args.lora, args.seed, world.device)
        # the head that nothing calls is a block too: it is never gathered
        blocks = [*network.blocks, network.language_model["lm_head"]]
        distributed.shard(network, blocks, world, ignored=adapters)

    if not args.init:
        model = WorldModel.tiny(args.seed, args.size, max_context=min(MAX_IMAGES, most))
        prepare(model.network.to(world.device))
        return model
    frozen_in_bf16 = args.lora and world.device.type == "cuda"
    dtype = torch.bfloat16 if frozen_in_bf16 else torch.float32
    try:
        model = WorldModel.load(args.init, world.device, dtype, prepare)
        model.check_tables()
        return model
    except (OSError, ValueError) as error:
        fail(f"--init {args.init}: {error}")


@contextlib.contextmanager
def ema_weights(parameters: list, ema: list) -> Iterator[None]:
    """Inside, weights and EMA have changed places, without a third copy of all, and nothing has a gradient."""
    with torch.no_grad():
        exchange(parameters, ema)
        try:
            yield
        finally:
            exchange(parameters, ema)


def exchange(a: list, b: list) -> None:
    """Let the tensors of two lists change their contents, pair by pair."""
    for x, y in zip(a, b, strict=True):
        before = x.clone()
        x.copy_(y)
        y.copy_(before)


if __name__ == "__main__":
    stage.run_stage(main)
