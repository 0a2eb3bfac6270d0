"""
Astra-WM, the world simulator: context views and a camera motion in words -> the view from there.

The network is BAGEL (lib/bagel.py). One sequence holds everything; each context image stands in it twice, as clean VAE
latents (what it looks like) and as ViT features (what it shows):

  [VAE 1][ViT 1][VAE 2][ViT 2] ... [Based on the last image, turn 30 degrees to the left.][noisy latents]

(A tiny model is told the motion in numbers; the sentence stands in none of its tokens: `rays`, `words` of Settings.)

It is trained by flow matching: x_t = (1 - t) x0 + t eps, v = eps - x0, t = 1 is pure noise (train_wm.py). It imagines
by Euler steps from t = 1 to t = 0, the context read once into a memory, guided away from "no sentence" and "no images".

  python world_model.py --images a.png b.png --motion "turn left 30" --out view.png     # two motions: the second from there
  python world_model.py --interactive       # look around in a room, key by key

`python -m extras.remote.serve` makes it an endpoint that many can share.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib import bagel_files
from lib.bagel import (
    GEN,
    LATENT_PATCH,
    Bagel,
    Branch,
    Config,
    ContextImage,
    ContextText,
    PixelLatents,
    PositionTable,
    Settings,
    resize,
    to_images,
    to_pixels,
    token_grid,
    unpatchify,
)
from lib.checkpoints import contents
from lib.distributed import default_device, fail, say
from lib.geometry import Array, Query, angles_of, camera_pose, decompose, delta_of, select_context
from lib.images import load_image, save_image
from lib.packing import table_ids
from lib.protocol import call_of
from lib.simulators import image_poses, instruction, read_instruction, read_phrase, renumbered
from lib.stage import bounded, newest, run_stage
from lib.streams import stream_seed

# over which numbers of (R, n, C) the lengths are taken that guidance keeps
RENORM_AXES = {"text_channel": -1, "channel": -1, "global": (-2, -1)}
MAX_TOKENS = 50_000  # of all contexts that are imagined at once: 2.9 GB of BAGEL's keys and values


# ---- the sampler ---------------------------------------------------------------------------------------------------------


def velocity_from_output(output: Tensor, x: Tensor, t: float, prediction: str) -> Tensor:
    """The network's output at (x_t, t) as a velocity. output, x (R, n, C); t above 0; prediction: see Settings."""
    return output if prediction == "velocity" else (x - output) / t


def x0_from_output(output: Tensor, x: Tensor, t: Tensor, prediction: str) -> Tensor:
    """The network's output at (x_t, t) as the clean latent it implies, x0 = x_t - t v; t broadcasts to x."""
    return output if prediction == "x0" else x - t * output


@torch.no_grad()
def euler_sample(
    network: Bagel, branches: list[Branch], noise: Tensor, grid: tuple, settings: Settings
) -> Tensor:
    """Imagine one view per row.

    branches   what the target sees: `guidance_branches`
    noise      (R, n, C) in token order, grid (h, w)
    returns    (R, n, C) clean latents after settings.steps Euler steps
    """
    s = settings
    if s.renorm not in RENORM_AXES:
        raise ValueError(f"renorm {s.renorm!r} is none of {', '.join(RENORM_AXES)}")
    tau = torch.linspace(1, 0, s.steps + 1)
    times = s.shift * tau / (1 + (s.shift - 1) * tau)
    low, high = s.interval
    is_guided = (low < times) & (times <= high)
    denoiser = Denoiser(network, branches, times, grid)
    if s.taylor:
        from extras.taylor import TaylorSeer

        denoiser = TaylorSeer(denoiser, len(branches))
    x = noise
    for step, (t, t_next) in enumerate(itertools.pairwise(times.tolist())):
        indices = list(range(len(branches) if is_guided[step] else 1))
        v = []
        for hidden in denoiser.last_layer(x, step, indices):
            output = network.output(hidden)
            v.append(velocity_from_output(output, x, t, network.config.settings.prediction))
        x = x - (t - t_next) * guided(v, s)
    return x


def guidance_branches(
    network: Bagel, images: list[ContextImage], text: ContextText, settings: Settings
) -> list[Branch]:
    """Read a context of R rows -> the branches of guidance: "everything", "no sentence", "no images".

    Without guidance by the sentence there is none at all, whatever the image scale, as in BAGEL.
    """
    memory = network.memory(len(text.ids))
    network.read_images(memory, images)
    before_text = memory.end
    if network.config.settings.words:
        network.read_text(memory, text)
    branches = [memory.branch(text.delta)]
    if settings.text_scale > 1:
        branches.append(memory.branch(None, before_text))
    if settings.text_scale > 1 and settings.image_scale > 1 and images:
        memory = network.memory(len(text.ids))
        if network.config.settings.words:
            network.read_text(memory, text)
        branches.append(memory.branch(text.delta))
    return branches


class Denoiser:
    """The network at the noisy latents of all rows, behind several branches in one pass."""

    def __init__(self, network: Bagel, branches: list[Branch], times: Tensor, grid: tuple):
        self.network = network
        self.branches = branches
        self.time_vectors = network.time_embedder(times.to(network.device))  # (steps + 1, H)
        ids = table_ids(grid, network.config.latent_grid).to(network.device)
        self.places = network.latent_pos_embed(ids).to(network.dtype)  # (n, H)
        self.ropes, self.ray_vectors = [], []
        for branch in branches:
            vectors, angles = network.rays(branch.delta[:, None], ids)
            positions = branch.next[:, None].expand(-1, 2 + len(ids))
            self.ropes.append(network.rope(positions, angles))
            self.ray_vectors.append(vectors)  # (R, n or 1, H)
        self.markers = network.embed_markers(len(branches[0].delta))  # (R, 2, H)

    def last_layer(self, x: Tensor, step: int, indices: list[int]) -> list[Tensor]:
        """The last layer's tokens (R, n, H) for x (R, n, C) at a step, in each of the branches with these indices."""
        count = len(indices)
        branches = [self.branches[k] for k in indices]
        cosines, sines = zip(*(self.ropes[k] for k in indices), strict=True)
        vectors = torch.cat([self.ray_vectors[k] for k in indices])  # (R * branches, n or 1, H)
        hidden = self.network.denoise(
            x.repeat(count, 1, 1),
            self.time_vectors[step] + self.places + vectors,
            self.markers.repeat(count, 1, 1),
            (torch.cat(cosines), torch.cat(sines)),
            branches,
        )
        return list(hidden.chunk(count))


def guided(v: list[Tensor], settings: Settings) -> Tensor:
    """Classifier-free guidance by the sentence and by the images.

    v   velocities (R, n, C) of the branches: everything; "no sentence"; "no images". With one alone there is none; with
        two, either the image scale is 1 or there is no image and the third equals the first.
    u = no_text + text_scale (full - no_text),  w = no_image + image_scale (u - no_image);  what is longer than `full` is
    shrunk to its length, though by no more than the factor renorm_min: u, token by token ("text_channel"), w, token by
    token ("channel"), or w as a whole ("global").
    """
    if len(v) == 1:
        return v[0]
    s = settings
    full, no_text = v[:2]
    no_image = v[2] if len(v) == 3 else full
    axes = RENORM_AXES[s.renorm]

    def shrunk(w):
        ratio = full.norm(dim=axes, keepdim=True) / (w.norm(dim=axes, keepdim=True) + 1e-8)
        return w * ratio.clamp(s.renorm_min, 1.0)

    u = no_text + s.text_scale * (full - no_text)
    if s.renorm == "text_channel":
        u = shrunk(u)
    w = no_image + s.image_scale * (u - no_image) if s.image_scale > 1 else u
    return w if s.renorm == "text_channel" else shrunk(w)


# ---- the simulator -------------------------------------------------------------------------------------------------------


class ArrangedQuery(NamedTuple):
    """A query as the network is shown it: its images selected, the reference last; the sentence renumbered."""

    index: int  # of the query
    seed: int
    images: list  # (H, W, 3) uint8
    deltas: Array  # (n, 5) how the images stand to the levelled reference (Settings.rays)
    sentence: str


class WorldModel:
    """A simulator: the network, its autoencoder and its tokenizer. To the other stages it is `imagine`, no more."""

    def __init__(self, network, autoencoder, tokenizer, files: dict, layout=None):
        """What is to be written back: files, the contents of {"llm_config", "vit_config", "config"}.json, and layout, a
        meta tensor of the shape and type of each one in ema.safetensors; None: as the network has them.
        """
        self.network = network
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.files = files
        state = network.state_dict()
        self.layout = layout or {name: tensor.to("meta") for name, tensor in state.items()}
        self.settings = network.config.settings
        self.warned = False  # that not all images are shown
        ids = tokenizer.convert_tokens_to_ids(bagel_files.MARKERS)
        self.bos, self.eos, *network.markers = ids

    @property
    def device(self):
        return self.network.device

    # ---- made, read, written

    @classmethod
    def tiny(cls, seed: int = 0, size: int = 32, **changes) -> "WorldModel":
        """About 2 M parameters for size x size pictures, random weights; `changes` are fields of Settings."""
        from lib.tiny import tiny_bagel_files, tiny_tokenizer

        tokenizer, autoencoder = tiny_tokenizer(), PixelLatents()
        files = tiny_bagel_files(size, len(tokenizer))
        settings = Settings(**files["config"]["astra"] | changes)
        files["config"] = {"astra": dataclasses.asdict(settings)}
        channels = LATENT_PATCH**2 * autoencoder.channels
        config = Config.read(files, len(tokenizer), size // 8, channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed("weights", seed, "simulator"))
            network = Bagel(config)
            initialise(network)
        return cls(network, autoencoder, tokenizer, files)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device="cpu",
        dtype: torch.dtype | None = None,
        prepare=None,
        int8: bool = False,
        **changes,
    ) -> "WorldModel":
        """From a folder in the public BAGEL layout, or a Hugging Face id. Raises ValueError or OSError, whose message says why it is none.

        dtype     None: to imagine, that is bf16 on a GPU, else fp32
        prepare   called with the network while it is still on the meta device (adapters, sharding): each rank then
                  reads its own rows only
        int8      weights of 8 bits (extras/int8.py), to imagine with;  changes: fields of Settings, as for `imagine`
        """
        folder = bagel_files.find_folder(path, "`python train_wm.py` makes one in out/wm.")
        files = bagel_files.read_files(folder)
        file = bagel_files.weights_file(folder, bagel_files.NETWORK)
        layout = contents(file)
        with torch.device("meta"):
            network = Bagel(Config.read(files, *bagel_files.table_sizes(file, layout)))
        tokenizer = bagel_files.load_tokenizer(folder, network.config.vocabulary)
        on_gpu = torch.device(device).type == "cuda"
        network.to(dtype or (torch.bfloat16 if on_gpu else torch.float32))
        if on_gpu and not int8:
            network.compile_blocks()
        if prepare:
            prepare(network)
        bagel_files.load_network(network, file, "cpu" if int8 else device)
        if int8:
            from extras.int8 import quantise_bagel

            quantise_bagel(network, device)
        if network.config.settings.latent == "pixels":
            autoencoder = PixelLatents()
        else:
            weights = bagel_files.weights_file(folder, bagel_files.AUTOENCODER)
            autoencoder = bagel_files.FluxLatents(weights).to(device)
        if LATENT_PATCH**2 * autoencoder.channels != network.config.token_channels:
            raise ValueError(f"The autoencoder in {folder} is not the one that {file} reads.")
        model = cls(network, autoencoder, tokenizer, files, layout)
        model.settings = dataclasses.replace(model.settings, **changes)
        return model

    def save(self, folder: str | Path, tensors=None) -> None:
        """Write the public layout, in the types it came in. Called on every rank; rank 0 writes.

        tensors   (name, tensor) pairs that stand in for the network's own, such as extras.lora.merged(network); maybe sharded
        """
        if tensors is None:
            tensors = self.network.state_dict().items()
        beside = (self.files, self.tokenizer, self.autoencoder)
        bagel_files.write_checkpoint(folder, tensors, self.layout, *beside)

    def check_tables(self) -> None:
        """Raise ValueError if a picture within the limits may have no place in a position table."""
        s, c = self.settings, self.network.config
        vae = ("vae_limits", s.vae_limits, LATENT_PATCH * self.autoencoder.cell, c.latent_grid)
        vit = ("vit_limits", s.vit_limits, c.vit_patch, c.vit_grid)
        for name, (longest, _, stride), side, grid in (vae, vit):
            if round(longest / stride) * stride > side * grid:
                raise ValueError(
                    f"The position table has {grid} places a side, for {side * grid} pixels, and pictures have up to "
                    f'{longest}: lower {name} under "astra" in config.json.'
                )

    # ---- a query as the network is shown it

    def token_ids(self, sentence: str) -> list[int]:
        """A sentence between <|im_start|> and <|im_end|>."""
        words = self.tokenizer(sentence, add_special_tokens=False)["input_ids"]
        return [self.bos, *words, self.eos]

    def texts(self, sentences: list[str], starts: Array | float = 0.0) -> ContextText:
        """Sentences of R rows. Raises ValueError where a model that is told motions in numbers cannot read one.

        starts   (R, 5) how the references stand, as `arrange` says; 0: level
        """
        rows = [self.token_ids(sentence) for sentence in sentences]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.eos] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        deltas = None
        if self.network.config.settings.rays:
            deltas = [delta_of(read_instruction(sentence)[1]) for sentence in sentences]
            deltas = np.stack(deltas) + starts
            deltas = torch.tensor(deltas, dtype=torch.float32, device=self.device)
        return ContextText(ids.to(self.device), lengths, deltas)

    def context_image(self, images: list, streams: list | None, deltas: Array) -> ContextImage:
        """R images of one size, as the VAE takes them -> what `Bagel.read_images` reads.

        streams   R generators, see `FluxLatents.encode`;  deltas: (R, 5) of `arrange`
        """
        deltas = torch.tensor(deltas, dtype=torch.float32, device=self.device)
        small = np.stack([resize(image, self.settings.vit_limits) for image in images])
        pixels = to_pixels(np.stack(images)).to(self.device)
        latent = self.autoencoder.encode(pixels, streams)
        return ContextImage(latent, to_pixels(small).to(self.device), deltas)

    def arrange(
        self, images: list, reference: int, provenance: Sequence = (), settings=None
    ) -> tuple[list, Array]:
        """The images of a query as the network is shown them, in the order of `select_context` and of the VAE's size.

        returns   these, and how each stands to the reference, but level as that is not if it looks up or down:
                  (n, 5) dx, dy, dz, dangle, dphi of `simulators.image_poses` (Settings.rays)
        """
        settings = settings or self.settings
        order = select_context(len(images), reference, settings.max_context)
        images = [resize(np.asarray(image), settings.vae_limits) for image in images]
        poses = image_poses(len(images), provenance)
        start = poses[reference - 1]
        level = camera_pose(*start[:3, 3], angles_of(start)[0])
        deltas = decompose(level, poses)[:, :5]
        return [images[i] for i in order], deltas[order]

    # ---- imagining

    @torch.no_grad()
    def imagine(self, queries: list[Query], batch: int = 64, **changes) -> list[np.ndarray]:
        """Imagine the view that each query commands: list of Query -> list of (H, W, 3) uint8.

        The view has the size of the reference image as the VAE sees it. A query draws its noise from its own seed, so
        it gives the same view alone or among others. `changes` are fields of Settings: steps, text_scale, ...
        Raises ValueError for a reference that does not exist.
        """
        settings = dataclasses.replace(self.settings, **changes)
        most = settings.max_context
        if not self.warned and any(len(query.images) > most for query in queries):
            say(
                f"Of more than {most} images the simulator sees the reference and the latest others."
            )
            self.warned = True
        alike = {}  # arranged queries by the shapes of their images
        for index, query in enumerate(queries):
            images, deltas = self.arrange(query.images, query.reference, query.provenance, settings)
            sentence = renumbered(query.instruction, len(images))
            shapes = tuple(image.shape for image in images)
            arranged = ArrangedQuery(index, query.seed, images, deltas, sentence)
            alike.setdefault(shapes, []).append(arranged)
        views = [None] * len(queries)
        for shapes, rows in alike.items():
            # a VAE token per 256 pixels and a ViT token per 196 are one per 111; 100 leaves room
            tokens = sum(height * width for height, width, _ in shapes) / 100
            count = max(1, min(batch, int(MAX_TOKENS / tokens)))
            for start in range(0, len(rows), count):
                chunk = rows[start : start + count]
                for row, view in zip(chunk, self._imagine(chunk, settings), strict=True):
                    views[row.index] = view
        return views

    def _imagine(self, rows, settings):
        """The views of arranged queries whose images have the same number and sizes: (R, H, W, 3) uint8."""
        streams = [torch.Generator().manual_seed(row.seed) for row in rows]
        images = []
        for k in range(len(rows[0].images)):
            deltas = np.stack([row.deltas[k] for row in rows])
            images.append(self.context_image([row.images[k] for row in rows], streams, deltas))
        starts = np.stack([row.deltas[-1] for row in rows])  # of the references
        text = self.texts([row.sentence for row in rows], starts)
        grid = token_grid(images[-1].latent)
        shape = (grid[0] * grid[1], self.network.config.token_channels)
        noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        branches = guidance_branches(self.network, images, text, settings)
        x = euler_sample(self.network, branches, noise.to(self.device), grid, settings)
        if not torch.isfinite(x).all():
            raise ValueError("The view is not made of numbers: the simulator's weights are broken.")
        return to_images(self.autoencoder.decode(unpatchify(x, LATENT_PATCH, *grid)))


def initialise(network: Bagel) -> None:
    """Random weights for a network that starts from nothing (BAGEL itself started from Qwen2.5 and SigLIP).

    Which picture, which place in it, and which motion must be told apart in the first few hundred steps, or the model
    learns average rooms only: learned places are drawn at scale 1, words and the ViT's places at 0.5 (a language
    model's usual 0.02 drowns), and what the pixels bring is scaled down. What is added to the residual stream starts
    smaller, llm2vae at zero, and each generation expert as a copy of the understanding expert, as in BAGEL.
    """
    into_stream = ("o_proj", "down_proj", "out_proj", "fc2")
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if name == "image_number" else 0.5)
        elif isinstance(module, PositionTable) and isinstance(module.pos_embed, nn.Parameter):
            nn.init.normal_(module.pos_embed)
        elif isinstance(module, nn.Linear):
            scale = 0.3 if name == "vae2llm" else 1.0
            if name.endswith(into_stream):
                scale = (2 * network.config.layers) ** -0.5
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.llm2vae.weight)
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if GEN in name:
                weight.copy_(weights[name.replace(GEN, "")])


# ---- command line --------------------------------------------------------------------------------------------------------

SAMPLER_FLAGS = {  # fields of Settings: how argparse reads them
    "steps": {"type": bounded(int, 1), "help": "network evaluations"},
    "shift": {"type": bounded(float, 0.01), "help": "above 1 spends more of them near noise"},
    "text_scale": {"type": bounded(float, 1), "help": "guidance away from no sentence; 1: none"},
    "image_scale": {"type": bounded(float, 1), "help": "guidance away from no images; 1: none"},
    "renorm": {"choices": tuple(RENORM_AXES), "help": "of guided velocities; blurred: global"},
    "renorm_min": {"type": bounded(float, 0, 1), "help": "shrink no more than to this"},
    "interval": {
        "type": bounded(float, 0, 1),
        "nargs": 2,
        "metavar": ("LOW", "HIGH"),
        "help": "guide while LOW < t <= HIGH; t = 1 is noise",
    },
    "taylor": {
        "action": argparse.BooleanOptionalAction,
        "help": "step caching: compute one step in three, about twice as fast, an approximation",
    },
}


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """BAGEL's knobs; in brackets its own values for editing."""
    group = parser.add_argument_group(
        "how a world model imagines", "What is not given stays as its config.json says."
    )
    for field, options in SAMPLER_FLAGS.items():
        text = f"{options['help']} (BAGEL: {getattr(Settings, field)})"
        group.add_argument(f"--{field.replace('_', '-')}", **options | {"help": text})
    group.add_argument(
        "--context",
        dest="max_context",
        type=bounded(int, 1),
        help=f"images shown at most, the reference last (ours: {Settings.max_context})",
    )
    group.add_argument(
        "--int8", action="store_true", help="weights of 8 bits: BAGEL in 15 GB (extras/int8.py)"
    )


def sampler_options(args: argparse.Namespace) -> dict:
    """The flags of `add_sampler_flags` that were given, for `WorldModel.load`."""
    options = {field: getattr(args, field) for field in (*SAMPLER_FLAGS, "max_context")}
    options = {field: value for field, value in options.items() if value is not None}
    if "interval" in options:
        low, high = options["interval"] = tuple(options["interval"])
        if low >= high:
            fail(f"--interval {low} {high} guides nothing: LOW must be below HIGH.")
    return options | ({"int8": True} if args.int8 else {})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line's flags."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--interactive", action="store_true", help="look around in a room, by keys")
    p.add_argument("--images", nargs="+", help="context views in order")
    p.add_argument(
        "--reference", type=bounded(int, 1), help="image that the motion starts from; default: last"
    )
    p.add_argument(
        "--motion",
        nargs="+",
        help='such as "turn left 30", "move forward 1 m" or "pitch up by 10 degrees"; the next starts from its view',
    )
    p.add_argument("--out", default="view.png", help="the picture to write")
    p.add_argument(
        "--model",
        help="folder or Hugging Face id; default: the newest of out/wm, out/wm-astra, out/demo/wm",
    )
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    add_sampler_flags(p)
    args = p.parse_args(argv)
    of_a_picture = [flag for flag in (args.images, args.motion) if flag]
    if len(of_a_picture) != (0 if args.interactive else 2):
        p.error("give --images and --motion, or --interactive alone")
    return args


def main(argv: list[str] | None = None) -> None:
    """Imagine one view and save it, or look around."""
    args = parse_args(argv)
    path = args.model or newest(("wm",))
    if not path:
        fail(
            "There is no world model yet. `python train_wm.py` trains one in out/wm; or give --model."
        )
    device = default_device()
    options = sampler_options(args)
    try:
        if args.interactive:
            from extras.report.look import look_around

            look_around(WorldModel.load(path, device, **options))
            return
        # the motions first: their errors should not wait for the weights
        motions = [read_phrase(words) for words in args.motion]
        images = [load_image(image) for image in args.images]
        model = WorldModel.load(path, device, **options)
        side = model.settings.vae_limits[0]
        if model.settings.latent == "pixels" and any(max(image.shape) > side for image in images):
            say(f"{path} is a tiny model: it knows rooms of {side} x {side} pixels only.")
        number = args.reference or len(images)
        provenance = [None] * len(images)
        for motion in motions:
            sentence = instruction(motion)
            query = Query(images, number, sentence, args.seed, provenance=provenance)
            images += model.imagine([query])
            provenance.append(call_of(number, motion))
            number = len(images)
            print(sentence)
        height, width, _ = images[-1].shape
        save_image(Path(args.out), images[-1])
    except (OSError, ValueError) as error:
        fail(str(error))
    print(f"-> {args.out} ({width} x {height}, {path})")


if __name__ == "__main__":
    run_stage(main)
