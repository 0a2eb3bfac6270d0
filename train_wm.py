"""
Train the world simulator: context views + a camera motion in words -> the view from there (paper §3.2).

  laptop       python train_wm.py                              # tiny preset: minutes on one core -> out/wm
  8 GPUs       torchrun --standalone --nproc_per_node 8 train_wm.py --preset astra --data data/scans --out out/wm-astra
  control      python train_wm.py --shuffle-instructions --out out/wm-untuned     # same data and compute, any motion
  resume       the same command: it goes on from the newest checkpoint in --out

In:  triples_{train,val}.jsonl in --data (data.py makes the rooms).
Out: the averaged model in BAGEL's layout, log.jsonl, args.json, done.json, views.png (context, motion, imagined, true).

With x_t = (1 - t) x0 + t eps, t = 1 pure noise, and x0_hat = x_t - t v_hat, the loss per latent token is
  flow matching       |v_hat - (eps - x0)|^2, or |x0_hat - x0|^2 where the model predicts x0 (Settings.prediction)
  view consistency    ours, on top: `content` and `pose` below (the paper's "view consistency tuning" is fine-tuning)
The loss falls long before the model looks at its context. Watch `pose`: the share of held-out views that lie nearest to
the true view of the commanded motion, among the true views of all motions commanded in that room (chance 1 in 8).
"""

import argparse
import contextlib
import functools
import math
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import data
from lib import common
from lib.bagel import LATENT_PATCH, token_grid
from lib.bagel_files import patchify, resize, to_pixels
from lib.geometry import Motion, Query, instruction, phrase
from world_model import WorldModel, clean

PRESETS = {
    # Many small updates: with 14,000 targets, 500 updates of 28 reached pose .7 to .8, 250 of 55 reached .3.
    "tiny": dict(data="out/data", out="out/wm", init=None, steps=2000, contexts=4, micro_contexts=4, lr=2e-3,
                 floor=0.03, warmup=60, weight_decay=0.01, shift=4.5, drop_text=0.0, drop_vit=0.0, drop_vae=0.0,
                 augment=True, images_in_memory=None, look_every=250, save_every=250),
    # The paper gives model and data; these are BAGEL's values for fine-tuning and editing.
    "astra": dict(data="data/scans", out="out/wm-astra", init="ByteDance-Seed/BAGEL-7B-MoT", steps=20_000, contexts=64,
                  micro_contexts=1, lr=2e-5, floor=1.0, warmup=500, weight_decay=0.0, shift=4.0, drop_text=0.1,
                  drop_vit=0.3, drop_vae=0.3, augment=False, images_in_memory=4_000, look_every=1_000, save_every=500),
}
NEUTRAL = ("threads", "micro_contexts", "images_in_memory", "save_every")       # flags that never change the numbers
MIRRORED = {"left": "right", "right": "left"}
COLOURS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


# ---------------------------------------------------------------- batches

def contexts_of(rows):
    """Rows of triples -> lists of rows with one context and one reference, which training reads once for all."""
    return [list(group) for _, group in groupby(rows, key=lambda row: (row["context"], row["reference"]))]


def drawn(contexts, step, count, seed):
    """The `count` contexts of one update; each epoch has its own order. Depends on nothing but the arguments."""
    places = range(step * count, (step + 1) * count)
    orders = {epoch: torch.randperm(len(contexts), generator=common.generator(seed, "order", epoch)).tolist()
              for epoch in {place // len(contexts) for place in places}}
    return [contexts[orders[place // len(contexts)][place % len(contexts)]] for place in places]


def read_image(path):
    """A picture as uint8 (H, W, 3), or (H, W, 4) where it has an alpha channel."""
    with Image.open(path) as image:
        return np.asarray(image if image.mode in ("RGB", "RGBA") else image.convert("RGB"))


def pictures(rows, read, augment, stream):
    """One context with its T targets -> (context, reference, motions, targets (T, H, W, 3), warps (T, H, W, 4)), uint8.

    augment   makes twelve rooms of one: a mirrored room (left and right change places in the words and along the ring)
              and permuted colour channels, drawn from `stream`
    """
    context, reference = [read(path) for path in rows[0]["context"]], rows[0]["reference"]
    motions = [Motion(**row["motion"]) for row in rows]
    targets, warps = (np.stack([read(row[key]) for row in rows]) for key in ("target", "warp"))
    if augment:
        mirror, colours = (int(torch.randint(n, (), generator=stream)) for n in (2, len(COLOURS)))
        if mirror:
            context, reference = [image[:, ::-1] for image in reversed(context)], len(context) + 1 - reference
            targets, warps = targets[:, :, ::-1], warps[:, :, ::-1]
            motions = [Motion(" ".join(MIRRORED.get(word, word) for word in m.kind.split()), m.amount) for m in motions]
        colours = list(COLOURS[colours])
        context, targets, warps = [c[..., colours] for c in context], targets[..., colours], warps[..., colours + [3]]
    return context, reference, motions, targets, warps


def example(rows, model, read, args, stream):
    """One context with its T targets as the model is shown them; every draw comes from `stream`."""
    context, reference, motions, targets, warps = pictures(rows, read, args.augment, stream)
    sentences = [instruction(motion, reference) for motion in motions]
    if args.shuffle_instructions:
        sentences = [sentences[j] for j in torch.randperm(len(rows), generator=stream).tolist()]
    fit = functools.partial(resize, limits=model.settings.vae_limits)
    seen = warps[..., 3:] > 127
    drop = torch.tensor([args.drop_vae, args.drop_vit] * len(context))
    return dict(
        context=[fit(image) for image in model.arranged(context, reference, "")[0]],
        sentences=[model.arranged(context, reference, sentence)[2] for sentence in sentences],
        targets=[fit(image) for image in targets],
        filled=[fit(image) for image in np.where(seen, warps[..., :3], targets)],
        seen=[fit(np.repeat(255 * alpha.astype(np.uint8), 3, -1))[..., 0] for alpha in seen],
        keep=torch.rand(len(drop), generator=stream) >= drop,
        said=torch.rand(len(rows), generator=stream) >= args.drop_text,
        t=torch.sigmoid(torch.randn(len(rows), generator=stream) + math.log(args.shift)),
        other=(torch.arange(len(rows)) + int(torch.randint(1, max(2, len(rows)), (), generator=stream))) % len(rows))


class Batch(NamedTuple):
    """R targets of B contexts: what the network is told (see `Bagel.forward`) and what it should say."""

    images: list            # (latent, ViT pixels) per context image
    keep: torch.Tensor      # (B, 2 I) bool, the segments that condition dropout leaves
    owner: torch.Tensor     # (R,) which context
    ids: torch.Tensor       # (R, L)
    lengths: torch.Tensor   # (R,)
    grid: tuple             # (h, w)
    t: torch.Tensor         # (R,)
    eps: torch.Tensor       # (R, n, C) noise
    x0: torch.Tensor        # (R, n, C) the target
    warp: torch.Tensor      # (R, n, C) the context warped into the target view; its holes show the target
    seen: torch.Tensor      # (R, n) share of a token's pixels that some context view sees
    other: torch.Tensor     # (R,) another row of the same context, or the row itself where there is no other


@torch.no_grad()
def collate(groups, model, read, args, step, first):
    """Contexts with their targets -> Batch; context i of `groups` draws from the stream (seed, step, first + i).

    Raises ValueError if pictures that stand in the same place differ in size: then --micro-contexts 1.
    """
    streams = [common.generator(args.seed, "batch", step, first + i) for i in range(len(groups))]
    parts = [example(rows, model, read, args, stream) for rows, stream in zip(groups, streams)]
    counts, device = [len(rows) for rows in groups], model.device
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(counts))

    def rows_of(key):
        return [row for part in parts for row in part[key]]

    images = [model.see(place, streams) for place in zip(*(part["context"] for part in parts))]
    ids, lengths = model.texts(rows_of("sentences"))
    latent = model.encode(np.stack(rows_of("targets")), [streams[i] for i in owner])
    x0 = patchify(latent, LATENT_PATCH)
    eps = torch.cat([torch.randn(count, *x0.shape[1:], generator=stream) for count, stream in zip(counts, streams)])
    warp = model.autoencoder.encode(to_pixels(np.stack(rows_of("filled"))).to(device), torch.zeros(()))
    seen = torch.from_numpy(np.stack(rows_of("seen"))[:, None] / np.float32(255))
    seen = patchify(seen, LATENT_PATCH * model.autoencoder.cell).mean(-1)
    start = torch.tensor([0, *counts[:-1]]).cumsum(0)
    return Batch(images, torch.stack([part["keep"] for part in parts]), owner, ids,
                 torch.where(torch.stack(rows_of("said")), lengths, 0), token_grid(latent),
                 torch.stack(rows_of("t")).to(device), eps.to(device), x0, patchify(warp, LATENT_PATCH),
                 seen.to(device), torch.cat([start[i] + part["other"] for i, part in enumerate(parts)]))


# ---------------------------------------------------------------- losses, each (R, n): rows and latent tokens

def flow_matching(output, x0, eps, prediction):
    """Squared error of the network's output, mean over the C numbers of a token. All tensors (R, n, C).

    "velocity": |v_hat - (eps - x0)|^2 (bagel.md);  "x0": |x0_hat - x0|^2, which weighs time t by t^2 beside the other.
    """
    return (output - (x0 if prediction == "x0" else eps - x0)).square().mean(-1)


def content(x0_hat, x0, warp, seen, seen_weight, warp_weight):
    """Where some context view sees the target, draw what it sees: more weight there, and agreement with the warp.

    The warp is compared in the latent space of the frozen autoencoder, which for pixel latents is the picture itself
    and for FLUX spares a decoder in every step.
    """
    return seen * (seen_weight * (x0_hat - x0).square().mean(-1) + warp_weight * (x0_hat - warp).square().mean(-1))


def pose(x0_hat, x0_other, x0, t, other, times, margin=0.5):
    """Under the true sentence the view must lie nearer to the target than under another sentence, by a margin.

    x0_other  the model's view under the sentence of row `other`, same context, same noise; no gradient flows into it
    times     (low, high): only low < t < high counts. Near 1 the views are still blurs; near 0 the noisy view itself
              gives the target away, whatever is said, and the margin could not be met
    returns   max(0, d(x0_hat, x0) - d(x0_other, x0) + margin d(x0[other], x0)), d = mean squared distance; 0 outside
              `times`, where a row has no other, and where the two sentences lead to the same view
    """
    def distance(a, b):
        return (a - b).square().mean((1, 2))

    apart = distance(x0[other], x0)
    term = torch.relu(distance(x0_hat, x0) - distance(x0_other, x0).detach() + margin * apart)
    return (term * ((t > times[0]) & (t < times[1]) & (apart > 1e-3)))[:, None].expand(x0.shape[:2])


def losses(network, batch, args, with_pose):
    """One forward pass -> {"loss_flow", ...}: the parts of the loss, weighted, summed over rows and latent tokens."""
    prediction, b = network.config.settings.prediction, batch
    x = (1 - b.t[:, None, None]) * b.x0 + b.t[:, None, None] * b.eps
    other = (b.ids[b.other], b.lengths[b.other]) if with_pose else None
    output = network(b.images, b.owner, b.ids, b.lengths, x, b.t, b.grid, keep=b.keep, other=other)
    output, output_other = output if with_pose else (output, None)
    x0_hat = clean(output, x, b.t, prediction)
    parts = {"loss_flow": flow_matching(output, b.x0, b.eps, prediction).sum()}
    if args.seen_weight or args.warp_weight:
        parts["loss_content"] = content(x0_hat, b.x0, b.warp, b.seen, args.seen_weight, args.warp_weight).sum()
    if with_pose:
        x0_other = clean(output_other, x, b.t, prediction)
        parts["loss_pose"] = args.pose_weight * pose(x0_hat, x0_other, b.x0, b.t, b.other, args.pose_times).sum()
    return parts


# ---------------------------------------------------------------- looking at it

def look(model, contexts, read):
    """Imagine all targets of held-out contexts -> (metrics, [(context, words, generated, true)]).

    pose   share of views nearest (squared error) to the true view of their own motion among those of the same context
    mse    mean squared error to the true view, pictures in [-1, 1]
    """
    rows = [row for group in contexts for row in group]
    queries = [Query([read(path) for path in row["context"]], row["reference"],
                     instruction(Motion(**row["motion"]), row["reference"]), seed) for seed, row in enumerate(rows)]
    views = iter(model.imagine(queries))
    hits, errors, sheet = [], [], []
    for group in contexts:
        true = [resize(read(row["target"]), model.settings.vae_limits) for row in group]
        made = [next(views) for _ in group]
        distance = np.array([[np.square((a / 127.5) - (b / 127.5)).mean() for b in true] for a in made])
        hits += (distance.argmin(1) == np.arange(len(group))).tolist()
        errors += np.diag(distance).tolist()
        sheet += [([read(path) for path in row["context"]],
                   f"Image-{row['reference']}: {phrase(Motion(**row['motion']))}", a, b)
                  for row, a, b in zip(group, made, true)]
    return {"pose": float(np.mean(hits)), "mse": float(np.mean(errors))}, sheet


def draw_sheet(path, sheet, side=96):
    """A picture with one line per imagined view: context | motion in words | imagined | true."""
    step, words_at, count = side + 4, (side + 4) * len(sheet[0][0]), len(sheet)
    page = Image.new("RGB", (words_at + 200 + 2 * step, 16 + step * count), "white")
    titles = {4: "context", words_at + 8: "motion", words_at + 200: "imagined", words_at + 200 + step: "true"}
    for x, title in titles.items():
        ImageDraw.Draw(page).text((x, 2), title, "black")
    for i, (context, words, made, true) in enumerate(sheet):
        ImageDraw.Draw(page).text((words_at + 8, 16 + i * step + side // 2 - 6), words, "black")
        places = [k * step for k in range(len(context))] + [words_at + 200, words_at + 200 + step]
        for x, image in zip(places, [*context, made, true]):
            page.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, 16 + i * step))
    page.save(path)


@contextlib.contextmanager
def averaged(parameters, average):
    """Inside, the model's weights are their moving average."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, mean in zip(parameters, average):
            p.copy_(mean)
        yield
        for p, own in zip(parameters, kept):
            p.copy_(own)


# ---------------------------------------------------------------- the run

def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder with triples_{train,val}.jsonl")
    p.add_argument("--out", help="folder of the run and of the finished model")
    p.add_argument("--init", help="model to start from, a folder or Hugging Face id; tiny: random weights")
    p.add_argument("--seed", type=int, default=0)
    # these change the numbers
    p.add_argument("--steps", type=int, help="updates")
    p.add_argument("--contexts", type=int, help="contexts per update, all ranks together; each brings all its targets")
    p.add_argument("--lr", type=float, help="AdamW peak learning rate")
    p.add_argument("--floor", type=float, help="where the cosine ends, as a share of --lr; 1 = constant")
    p.add_argument("--warmup", type=int, help="steps of linear rise")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    p.add_argument("--ema", type=float, default=0.995, help="decay of the average that is saved; rises from 0.1")
    p.add_argument("--shift", type=float, help="times t = sigmoid(N(0, 1) + ln shift): above 1 towards noise")
    p.add_argument("--drop-text", type=float, help="condition dropout: sentences (what guidance needs)")
    p.add_argument("--drop-vit", type=float, help="condition dropout: ViT segments of context images")
    p.add_argument("--drop-vae", type=float, help="condition dropout: VAE segments of context images")
    p.add_argument("--augment", action=argparse.BooleanOptionalAction, help="mirrored rooms and permuted colours")
    p.add_argument("--seen-weight", type=float, default=0.0, help="view consistency: more where context sees")
    p.add_argument("--warp-weight", type=float, default=0.5, help="view consistency: agreement with the warped context")
    p.add_argument("--pose-weight", type=float, default=0.0, help="view consistency: true sentence before another")
    p.add_argument("--pose-every", type=int, default=4, help="steps between those with the pose term")
    p.add_argument("--pose-times", type=float, nargs=2, default=[0.7, 0.95], help="t at which the pose term counts")
    p.add_argument("--shuffle-instructions", action="store_true", help="the untuned control: motions of other targets")
    # speed, memory and what is shown only
    p.add_argument("--micro-contexts", type=int, help="contexts per forward pass and rank")
    p.add_argument("--images-in-memory", type=int, help="pictures kept decoded; default for tiny: all")
    p.add_argument("--look-every", type=int, help="steps between views.png and pose on held-out rooms")
    p.add_argument("--save-every", type=int, help="steps between checkpoints")
    p.add_argument("--threads", type=int, default=1, help="CPU threads per process; small models gain little from more")
    return common.parse_with_preset(p, PRESETS, argv)


def load_data(args, world):
    """(training contexts, held-out contexts); rank 0 makes the rooms when the tiny preset misses them."""
    if args.preset == "tiny" and common.is_main():
        data.ensure(args.data)
    common.wait_for_all()
    train, val = (contexts_of(data.load_jsonl(Path(args.data) / f"triples_{split}.jsonl"))
                  for split in ("train", "val"))
    if args.contexts % world.size:
        common.fail(f"--contexts {args.contexts} cannot be shared evenly by {world.size} processes: take a multiple.")
    return train, val[:16]


def main(argv=None):
    """The stage: batches, losses, a step, the moving average, a look now and then."""
    args = parse_args(argv)
    common.begin("train_wm", args, neutral=NEUTRAL)
    world = common.setup(args.threads)
    out, training = Path(args.out), Path(args.out) / "training"
    train, val = load_data(args, world)
    read = functools.lru_cache(args.images_in_memory)(read_image)
    model = WorldModel.load(args.init, world.device) if args.init else WorldModel.tiny(args.seed)
    model.network.to(world.device)
    network = common.shard(model.network, model.network.blocks, world)
    names, parameters = zip(*network.named_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    average, start, clock = [p.detach().clone() for p in parameters], 0, common.Clock()
    if saved := common.load_state(training):
        start, tensors, state = saved
        common.restore_training(network, optimizer, tensors)
        average = [common.like(tensors[f"average.{name}"], p) for name, p in zip(names, parameters)]
        clock = common.Clock(state["clock"])
    log, share = common.MetricLog(out / "log.jsonl", start), args.contexts // world.size

    def save(step):
        tensors = common.training_tensors(network, optimizer)
        tensors |= common.whole((f"average.{name}", mean) for name, mean in zip(names, average))
        common.save_state(training, step, tensors, {"clock": clock.read()})

    with common.Interrupt() as stop:
        bar = common.progress(args.steps, start, "world model")
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * common.cosine(step, args.steps, args.warmup, args.floor)
            first, groups = world.rank * share, drawn(train, step, args.contexts, args.seed)
            batches = [collate(groups[i:min(i + args.micro_contexts, first + share)], model, read, args, step, i)
                       for i in range(first, first + share, args.micro_contexts)]
            tokens = common.global_sum(float(sum(b.seen.numel() for b in batches)))      # of this update, all ranks
            with_pose = args.pose_weight > 0 and step % args.pose_every == 0
            metrics = {}
            for batch in batches:
                parts = losses(network, batch, args, with_pose)
                (sum(parts.values()) / tokens).backward()
                metrics = {key: metrics.get(key, 0) + value.detach() for key, value in parts.items()}
            metrics = {key: common.global_sum(value).item() / tokens for key, value in metrics.items()}
            metrics["grad"] = common.clip_gradients(parameters, args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)

            done = step + 1
            if done % args.look_every == 0 or done == args.steps:
                with averaged(parameters, average), common.gathered(network):
                    seen, sheet = look(model, val, read)
                if common.is_main():
                    draw_sheet(out / "views.png", sheet[::max(1, len(sheet) // 12)])
                metrics |= seen
                common.say(f"step {done}: flow {metrics['loss_flow']:.4f}, held-out views: pose {seen['pose']:.2f}, "
                           f"mse {seen['mse']:.4f}, {clock.read()['cpu_seconds']:.0f} CPU-s")
            log.write(step, **metrics, lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix(flow=f"{metrics['loss_flow']:.4f}")
            leaving = stop.requested()
            if leaving or done % args.save_every == 0 or done == args.steps:
                save(done)
            if leaving:
                stop.leave(done)

    own = dict(zip(names, average))
    tensors = common.whole((name, own.get(name, value)) for name, value in network.state_dict().items())
    if common.is_main():
        with common.written_whole(out) as part:
            model.save(part, tensors)
    common.finish(out, args.steps, clock)


if __name__ == "__main__":
    common.run(main)
