"""
Astra-WM, the world simulator: context views and a camera motion in words -> the view from there.

The network is BAGEL (lib/bagel.py). One sequence holds everything; each context image stands in it twice, as clean VAE
latents (what it looks like) and as ViT features (what it shows):

  [VAE 1][ViT 1][VAE 2][ViT 2] ... [Base on the viewpoint of Image-2, turn left 30 degrees.][noisy latents]

It is trained by flow matching: x_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is pure noise (train_wm.py). It imagines
by Euler steps from t = 1 to t = 0, the context read once into a cache, guided away from "no sentence" and "no images".

  python world_model.py --images a.png b.png --reference 2 --motion "turn left 30 degrees" --out view.png
  python world_model.py --serve 8000          an endpoint that many can share (extras/remote/serve.py)
"""

import argparse
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lib import bagel_files
from lib.bagel import GEN, LATENT_PATCH, Bagel, Config, PositionTable, Settings, token_grid
from lib.bagel_files import resize, to_images, to_pixels, unpatchify
from lib.checkpoints import contents
from lib.common import at_least, fail, newest, run, say
from lib.geometry import Query, instruction, read_phrase, renumbered, select_context
from lib.images import load_image
from lib.packing import table_ids
from lib.streams import stream_seed

TINY = Settings(
    prediction="x0",
    motion_to_target=True,
    reference_first=True,
    learned_places=True,
    latent="pixels",
    steps=4,
    shift=1.0,
    text_scale=1.0,
    image_scale=1.0,
)
RENORMS = {
    "text_channel": -1,
    "channel": -1,
    "global": (-2, -1),
}  # lengths that guidance keeps: over which axes
MAX_TOKENS = 50_000  # of all contexts that are imagined at once: 2.9 GB of BAGEL's keys and values


# ---------------------------------------------------------------- the sampler


def velocity(output, x, t, prediction):
    """The network's output at (x_t, t) as a velocity. output, x (R, n, C); t above 0; prediction: see Settings."""
    return output if prediction == "velocity" else (x - output) / t


def clean(output, x, t, prediction):
    """The network's output at (x_t, t) as the clean latent it implies, x0 = x_t - t v; t broadcasts to x."""
    return output if prediction == "x0" else x - t * output


class Words(NamedTuple):
    """A text for R rows, as it stands in a context: ids (R, L), right-padded, and lengths (R,) on the CPU."""

    ids: torch.Tensor
    lengths: torch.Tensor


@torch.no_grad()
def sample(network, inputs, noise, grid, settings):
    """Imagine one view per row.

    inputs   what stands before the target, in order: images (latent, ViT pixels) as in `Bagel.read_images`, and Words
    noise    (R, n, C) in token order, grid (h, w)
    returns  (R, n, C) clean latents after settings.steps Euler steps
    """
    s, rows = settings, len(noise)
    if s.renorm not in RENORMS:
        raise ValueError(f"renorm {s.renorm!r} is none of {', '.join(RENORMS)}")
    branches, motions = guidance_branches(network, inputs, noise, s)
    ropes = [network.rope(branch.next[:, None]) for branch in branches]
    markers = network.embed_markers(rows)
    tau = torch.linspace(1, 0, s.steps + 1)
    times, x = (s.shift * tau / (1 + (s.shift - 1) * tau)).tolist(), noise
    low, high = torch.tensor(s.interval, dtype=torch.float32).tolist()  # rounded like `times`
    places = network.latent_pos_embed(table_ids(grid, network.config.latent_grid).to(x.device)).to(
        network.dtype
    )
    each_time = network.time_embedder(torch.tensor(times, device=x.device))  # (steps + 1, H)
    series = [Taylor() for _ in branches]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        guide = low < t <= high
        used = range(len(branches) if guide else 1)
        due = [k for k in used if not s.taylor or series[k].due()]
        if due:  # every branch of every row in one pass
            pick = lambda parts: torch.cat([parts[k] for k in due])  # noqa: E731
            hidden = network.denoise(
                x.repeat(len(due), 1, 1),
                each_time[i] + places + pick(motions),
                markers.repeat(len(due), 1, 1),
                list(map(pick, zip(*ropes))),
                [branches[k] for k in due],
            ).chunk(len(due))
            hidden = dict(zip(due, hidden))
        if s.taylor:
            hidden = {k: series[k].next(hidden.get(k) if k in due else None) for k in used}
        v = [
            velocity(network.output(hidden[k]), x, t, network.config.settings.prediction)
            for k in used
        ]
        x = x - (t - t_next) * guided(v, s)
    return x


def guidance_branches(network, inputs, noise, settings):
    """Read the inputs into memories -> what the target sees in each branch, and its motion vectors (R, 1, H).

    The first branch sees everything. "No sentence" sees the same memory up to the last text, and "no images" the texts
    alone, from position 0. Without guidance by the sentence there is none at all, whatever the image scale, as in
    BAGEL.
    """
    rows, room = len(noise), noise.shape[1] + 2
    texts = [part for part in inputs if isinstance(part, Words)]
    silence = network.no_motion().expand(rows, -1, -1)
    motion = [network.embed_motion(*part)[:, None].expand(rows, -1, -1) for part in texts[-1:]] or [
        silence
    ]
    memory = network.memory(rows, sum(map(network.length_of, inputs)), room)
    length, next = read(network, memory, inputs)
    if settings.text_scale <= 1:
        return [memory.whole()], motion
    branches, motions = [memory.whole(), memory.first(length, next)], [*motion, silence]
    if settings.image_scale > 1 and len(texts) < len(inputs):
        memory = network.memory(rows, sum(map(network.length_of, texts)), room)
        read(network, memory, texts)
        branches, motions = [*branches, memory.whole()], [*motions, *motion]
    return branches, motions


def read(network, memory, inputs):
    """Inputs into a memory, neighbouring images in one pass -> (length, next) of the memory before the last text.

    Of all of it, if an image comes last: guidance by the sentence then does nothing, as in BAGEL.
    """
    before = memory.length, memory.next
    for is_text, parts in itertools.groupby(inputs, key=lambda part: isinstance(part, Words)):
        parts = list(parts)
        if not is_text:
            network.read_images(memory, parts)
            before = memory.length, memory.next
        for part in parts if is_text else ():
            before = memory.length, memory.next
            network.read_text(memory, *part)
    return before


def guided(v, settings):
    """Classifier-free guidance by the sentence and by the images.

    v   velocities (B, n, C) of the branches: everything; "no sentence"; "no images". With one alone there is none; with
        two, either the image scale is 1 or there is no image and the third equals the first.
    u = v_T + a (v - v_T),  w = v_I + b (u - v_I);  what is longer than v is shrunk to its length, though by no more
    than the factor renorm_min: u, token by token ("text_channel"), w, token by token ("channel"), or w as a whole
    ("global").
    """
    if len(v) == 1:
        return v[0]
    (full, no_text), no_image, s = v[:2], v[2] if len(v) == 3 else v[0], settings
    a, b = s.text_scale, s.image_scale

    def shrunk(w, axes):
        ratio = full.norm(dim=axes, keepdim=True) / (w.norm(dim=axes, keepdim=True) + 1e-8)
        return w * ratio.clamp(s.renorm_min, 1.0)

    u = no_text + a * (full - no_text)
    if s.renorm == "text_channel":
        u = shrunk(u, RENORMS[s.renorm])
    w = no_image + b * (u - no_image) if b > 1 else u
    return w if s.renorm == "text_channel" else shrunk(w, RENORMS[s.renorm])


class Taylor:
    """TaylorSeer, an approximation (off by default): of a branch's last layer one step in three is computed.

    The first five steps are; after them, the steps between are extrapolated by a Taylor series whose derivatives are
    finite differences of the computed ones. Counts the steps in which the branch is used.
    """

    first, every, orders = 5, 3, 6

    def __init__(self):
        self.step, self.computed, self.terms = -1, None, []

    def due(self):
        """Whether the next step must be computed."""
        return self.step + 1 < self.first or (self.step + 1 - (self.first - 1)) % self.every == 0

    def next(self, y=None):
        """Take one step: y (R, n, H) as it was computed, or None to extrapolate; returns the step's y."""
        self.step += 1
        if y is None:
            k = self.step - self.computed
            return sum(term * k**i / math.factorial(i) for i, term in enumerate(self.terms))
        terms = [y]
        if self.step >= self.first - 1:
            for before in self.terms[: self.orders]:
                terms.append((terms[-1] - before) / (self.step - self.computed))
        self.terms, self.computed = terms, self.step
        return y


# ---------------------------------------------------------------- the simulator


class WorldModel:
    """A simulator: the network, its autoencoder and its tokenizer. To the other stages it is `imagine`, no more."""

    def __init__(self, network, autoencoder, tokenizer, files, layout=None):
        """What is to be written back: files, the contents of {"llm_config", "vit_config", "config"}.json, and layout, a
        meta tensor of the shape and type of each one in ema.safetensors; None: as the network has them.
        """
        self.network, self.autoencoder, self.tokenizer, self.files = (
            network,
            autoencoder,
            tokenizer,
            files,
        )
        self.layout = layout or {
            name: value.to("meta") for name, value in network.state_dict().items()
        }
        self.settings, self.told = network.config.settings, False
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        self.bos, self.eos, *network.markers = tokenizer.convert_tokens_to_ids(names)
        self.words = functools.lru_cache(10_000)(
            lambda text: [
                self.bos,
                *tokenizer(text, add_special_tokens=False)["input_ids"],
                self.eos,
            ]
        )

    @property
    def device(self):
        return self.network.device

    @classmethod
    def tiny(cls, seed=0, size=32, **changes):
        """About 2 M parameters for size x size pictures, random weights; `changes` are fields of Settings."""
        from lib.tiny import tiny_tokenizer

        tokenizer, settings = (
            tiny_tokenizer(),
            dataclasses.replace(
                TINY, vae_limits=(size, size, 8), vit_limits=(size, size, 16), **changes
            ),
        )
        llm = {
            "model_type": "qwen2",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 352,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "vocab_size": len(tokenizer),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        vit = {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 16,
            "image_size": size,
        }
        config = Config.read(
            llm, vit, dataclasses.asdict(settings), len(tokenizer), size // 8, latent_numbers=192
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("weights", seed, "simulator"))
            network = Bagel(config)
            initialise(network)
        files = {
            "llm_config": llm,
            "vit_config": vit,
            "config": {"astra": dataclasses.asdict(settings)},
        }
        return cls(network, bagel_files.PixelLatents(), tokenizer, files)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, prepare=None):
        """From a folder in the public BAGEL layout, or a Hugging Face id. Raises with a sentence if it is not one.

        prepare   called with the network while it is still on the meta device (adapters, sharding): each rank then
                  reads its own rows only
        """
        folder = bagel_files.find(path)
        llm, vit = (
            bagel_files.read_json(folder / f"{name}_config.json") for name in ("llm", "vit")
        )
        ours = bagel_files.read_json(folder / "config.json", missing={})
        file = folder / bagel_files.NETWORK
        layout, sizes = (
            contents(file),
            (
                "language_model.model.embed_tokens.weight",
                "latent_pos_embed.pos_embed",
                "vae2llm.weight",
            ),
        )
        bagel_files.complain(
            f"{file} is not a BAGEL", [f"{key} (missing)" for key in sizes if key not in layout]
        )
        words, places, latents = (layout[key].shape for key in sizes)
        config = Config.read(
            llm,
            vit,
            ours.get("astra", {}),
            vocabulary=words[0],
            latent_grid=round(places[0] ** 0.5),
            latent_numbers=latents[1],
        )
        with torch.device("meta"):
            network = Bagel(config)
        if prepare:
            prepare(network)
        bagel_files.load_network(network, file, device, dtype)
        autoencoder = (
            bagel_files.PixelLatents()
            if config.settings.latent == "pixels"
            else bagel_files.FluxLatents(load_file(folder / bagel_files.AUTOENCODER)).to(device)
        )
        return cls(
            network,
            autoencoder,
            bagel_files.load_tokenizer(folder),
            {"llm_config": llm, "vit_config": vit, "config": ours},
            layout,
        )

    def save(self, folder, named=None):
        """Write the public layout, in the types it came in. Called on every rank; rank 0 writes.

        named   (name, tensor) pairs that stand in for the network's own, such as lora.merged(network); maybe sharded
        """
        bagel_files.write_folder(
            folder,
            self.network.state_dict().items() if named is None else named,
            self.layout,
            self.files,
            self.tokenizer,
            self.autoencoder,
        )

    def texts(self, sentences):
        """Sentences between <|im_start|> and <|im_end|> -> Words of R rows."""
        rows = [self.words(sentence) for sentence in sentences]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([row + [self.eos] * (max(map(len, rows)) - len(row)) for row in rows])
        return Words(ids.to(self.device), lengths)

    def encode(self, images, streams):
        """Pictures of one size (R, H, W, 3) uint8 -> latents (R, c, 2 h, 2 w); R generators draw the posterior."""
        pixels, noise = to_pixels(images).to(self.device), None
        if self.autoencoder.random:
            shape = (
                self.autoencoder.channels,
                *(side // self.autoencoder.cell for side in pixels.shape[-2:]),
            )
            noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(
                self.device
            )
        return self.autoencoder.encode(pixels, noise)

    def see(self, images, streams):
        """R images of one size, as the VAE takes them -> (latents, ViT pixels), as `Bagel.read_images` reads them."""
        vit = to_pixels(np.stack([resize(image, self.settings.vit_limits) for image in images]))
        return self.encode(np.stack(images), streams), vit.to(self.device)

    def arranged(self, images, reference, sentence, settings=None):
        """A query as the network is shown it -> (images, reference, sentence): selected, in its order, renumbered."""
        settings = settings or self.settings
        indices, reference = select_context(images, reference, settings.max_context)
        images = [images[i] for i in indices]
        if settings.reference_first:
            images, reference = images[reference - 1 :] + images[: reference - 1], 1
        return images, reference, renumbered(sentence, reference)

    @torch.no_grad()
    def imagine(self, queries, batch=64, **changes):
        """Imagine the view that each query commands (lib/geometry.Query): list -> list of (H, W, 3) uint8.

        The view has the size of the reference image as the VAE sees it. A query draws its noise from its own seed, so
        it gives the same view alone or among others. `changes` are fields of Settings: steps, text_scale, ...
        Raises ValueError for a reference that does not exist.
        """
        settings, groups = dataclasses.replace(self.settings, **changes), {}
        if not self.told and any(len(query.images) > settings.max_context for query in queries):
            say(
                f"Of more than {settings.max_context} images the simulator sees the reference and its neighbours."
            )
            self.told = True  # once
        for place, query in enumerate(queries):
            images, reference, sentence = self.arranged(
                query.images, query.reference, query.instruction, settings
            )
            images = [resize(np.asarray(image), settings.vae_limits) for image in images]
            shape = (reference, *(image.shape for image in images))
            groups.setdefault(shape, []).append((place, query.seed, images, sentence))
        views = [None] * len(queries)
        for (reference, *shapes), group in groups.items():
            # a VAE token per 256 pixels and a ViT token per 196 are one per 111; 100 leaves room
            tokens = sum(height * width for height, width, _ in shapes) / 100
            count = max(1, min(batch, int(MAX_TOKENS / tokens)))
            for start in range(0, len(group), count):
                places, *rows = zip(*group[start : start + count])
                for place, view in zip(places, self._imagine_alike(reference, *rows, settings)):
                    views[place] = view
        return views

    def _imagine_alike(self, reference, seeds, images, sentences, settings):
        """`imagine` for rows whose images have the same number and sizes."""
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        context = [
            self.see(place, streams) for place in zip(*images)
        ]  # image 1 of all rows, image 2 ...
        grid = token_grid(context[reference - 1][0])
        noise = torch.stack(
            [
                torch.randn(grid[0] * grid[1], self.network.config.latent_numbers, generator=stream)
                for stream in streams
            ]
        ).to(self.device)
        x = sample(self.network, [*context, self.texts(sentences)], noise, grid, settings)
        if not torch.isfinite(x).all():
            raise ValueError("The view is not made of numbers: the simulator's weights are broken.")
        return to_images(self.autoencoder.decode(unpatchify(x, LATENT_PATCH, *grid)))


def initialise(network):
    """Random weights for a network that starts from nothing (BAGEL itself started from Qwen2.5 and SigLIP).

    Which picture, which place in it, and which motion must be told apart in the first few hundred steps, or the model
    learns average rooms only: learned places are drawn at scale 1, words and the ViT's places at 0.5 (a language
    model's usual 0.02 drowns), and what the pixels bring is scaled down. What is added to the residual stream starts
    smaller, llm2vae at zero, and each generation expert as a copy of the understanding expert, as in BAGEL.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if name == "image_number" else 0.5)
        elif isinstance(module, PositionTable) and isinstance(module.pos_embed, nn.Parameter):
            nn.init.normal_(module.pos_embed)
        elif isinstance(module, nn.Linear):
            into_stream = name.endswith(("o_proj", "down_proj", "out_proj", "fc2"))
            scale = (
                (2 * network.config.layers) ** -0.5
                if into_stream
                else 0.3
                if name == "vae2llm"
                else 1.0
            )
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.llm2vae.weight)
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if GEN in name:
                weight.copy_(weights[name.replace(GEN, "")])


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    """The command line's flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--images", nargs="+", help="context views in order (tiny: a ring of left turns)"
    )
    p.add_argument(
        "--reference", type=int, default=1, help="number of the image that the motion starts from"
    )
    p.add_argument("--motion", help='such as "turn left 30 degrees" or "move 1.5 meters forward"')
    p.add_argument("--out", default="view.png")
    p.add_argument(
        "--model", help="folder or Hugging Face id; default: the newer of out/wm and out/demo/wm"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, help="network evaluations; default: the checkpoint's")
    p.add_argument(
        "--serve",
        type=int,
        metavar="PORT",
        help="answer requests until Ctrl-C instead (extras/remote/serve.py)",
    )
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="--serve: the address to listen on; 0.0.0.0 lets everyone in",
    )
    args = at_least(p, p.parse_args(argv), [("steps", 1)])
    if args.serve is None and not (args.images and args.motion):
        p.error("give --images and --motion, or --serve PORT")
    return args


def main(argv=None):
    """Imagine one view and save it, or serve."""
    args = parse_args(argv)
    path = (
        args.model
        or newest(("wm",))
        or fail(
            "There is no world model yet. `python train_wm.py` trains one in out/wm; or give --model."
        )
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if args.serve is None:  # what is wrong with a motion is said before weights are read
            sentence = instruction(read_phrase(args.motion), args.reference)
            images = [load_image(image) for image in args.images]
        model = WorldModel.load(path, device, torch.bfloat16 if device == "cuda" else torch.float32)
        if args.steps is not None:
            model.settings = dataclasses.replace(model.settings, steps=args.steps)
        if args.serve is not None:
            from extras.remote.serve import serve

            return serve(model, args.serve, args.host)
        view = model.imagine([Query(images, args.reference, sentence, args.seed)])[0]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view).save(args.out)
    except (OSError, ValueError) as error:
        fail(str(error))
    print(f"{sentence} -> {args.out} ({view.shape[1]} x {view.shape[0]}, {path})")


if __name__ == "__main__":
    run(main)
