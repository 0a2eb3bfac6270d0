"""
A dialogue between the policy and its simulator as tokens: what was said, by whom, what was seen, and where it stands.

The words of the protocol, and how a turn is read, stand in lib/protocol.py.
"""

import copy
import json
import textwrap
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.geometry import Query
from lib.images import contact_sheet, save_image
from lib.protocol import (
    CALL_FIRST,
    ENOUGH,
    IMAGE_TOKEN,
    MAX_ROUNDS,
    NO_SUCH_IMAGE,
    NO_SUCH_INDEX,
    NO_TOOL,
    call_poses,
    motion_in,
    numbered_image,
    parse_reply,
    parse_turn,
    prompt_text,
)
from lib.records import write_text
from lib.simulators import instruction, phrase


@dataclass
class Trajectory:
    """One rollout, that is one dialogue, as tokens: `start`, `add_turn` and `observe` build it.

    Sampled, scripted and replayed dialogues are alike.
    """

    question: dict
    mode: str
    max_rounds: int = MAX_ROUNDS
    stream: tuple = ()  # keys of its random streams: (seed, question id, number in the group)
    # per token
    ids: list = field(default_factory=list)  # exactly as sampled
    # 1 on what the policy wrote, its closing <|im_end|> included, else 0
    loss_mask: list = field(default_factory=list)
    # of the rollout; 0 on what the policy did not write
    logprobs: list = field(default_factory=list)
    # weight of the token in a supervised loss, 0 on what the policy did not write (RL does not use it)
    loss_weights: list = field(default_factory=list)
    # (time, row, column) of M-RoPE
    positions: list = field(default_factory=list)
    # per image
    images: list = field(default_factory=list)  # (H, W, 3) uint8
    # None of an image of the question, the call of an imagined one
    provenance: list = field(default_factory=list)
    # what the frozen tower made of it (policy.encode_images)
    features: list = field(default_factory=list)
    # per turn
    turns: list = field(default_factory=list)  # the policy's turns as text
    replies: list = field(default_factory=list)  # (observation, number of its image or None)
    # so far
    valid_calls: int = 0
    invalid_calls: int = 0
    unreadable: int = 0  # turns that were neither a call nor an answer
    answer: str | None = None
    truncated: bool = False  # out of tokens or turns before an answer
    # after `add_turn`
    call: dict | None = None  # the valid call that waits for its view
    reply: str | None = None  # what the protocol answers to this turn

    @property
    def well_formed(self) -> bool:
        """True if every turn could be read, every call be obeyed, and the last turn is an answer."""
        return self.answer is not None and not self.invalid_calls and not self.unreadable

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the policy's first turn."""
        return self.loss_mask.index(1)

    @property
    def prompt_key(self) -> tuple:
        """What dialogues of one prompt have in common: its tokens, and the very same images."""
        images = self.images[: self.provenance.count(None)]
        return *self.ids[: self.prompt_length], *map(id, images)

    @property
    def done(self) -> bool:
        """True once there is an answer, or no room for one."""
        return self.answer is not None or self.truncated

    @classmethod
    def start(
        cls,
        policy,
        question: dict,
        images: list[np.ndarray],
        mode: str,
    ) -> "Trajectory":
        """The prompt of a question with its images, (H, W, 3) uint8 arrays."""
        pieces = prompt_text(question, mode, len(images)).split(IMAGE_TOKEN)
        trajectory = cls(question, mode)
        for piece, image in zip(pieces, [*images, None], strict=True):
            trajectory._text(policy.encode_text(piece))
            if image is not None:
                trajectory._image(policy, image, None)
        return trajectory

    def add_turn(
        self,
        policy,
        turn: str | list[int],
        logprobs: list | None = None,
        loss_weights: list | None = None,
    ) -> None:
        """Add a turn of the policy (token ids as sampled, or text, which gets its <|im_end|>) and judge it.

        logprobs, loss_weights   per token of the turn; by default 0.0 and 1.0 each
        """
        ids = policy.encode_text(turn + "<|im_end|>") if isinstance(turn, str) else turn
        self._text(ids, 1, logprobs, loss_weights)
        closed = ids[-1] == policy.tokenizer.eos_token_id
        text = policy.tokenizer.decode(ids[:-1] if closed else ids)
        self.turns.append(text)
        self.call = self.reply = None
        if closed:
            self._judge(text)
        else:
            self.truncated = True

    def _judge(self, text: str) -> None:
        """Take a whole turn as the answer, as a call, or as neither; `reply` says so to the policy."""
        turn = parse_reply(text) if self.question.get("prompt") else parse_turn(text)
        if turn.answer is not None:
            if self.mode == "forced" and not self.valid_calls:
                self.reply = CALL_FIRST.strip()
            else:
                self.answer = turn.answer
            return
        self.reply = turn.error or self._refusal(turn.call)
        if self.reply is None:
            self.valid_calls += 1
            self.call = turn.call
            self.reply = f"Imagined from Image-{turn.call['reference_image']}, {phrase(motion_in(turn.call))}. "
        elif "<tool_call>" in text:
            self.invalid_calls += 1
        else:
            self.unreadable += 1

    def _refusal(self, call: dict) -> str | None:
        """Why a well-formed call is impossible here, or None."""
        if self.mode == "direct":
            return NO_TOOL
        if self.valid_calls >= self.max_rounds:
            return ENOUGH
        if not 1 <= call["reference_image"] <= len(self.images):
            return f"{NO_SUCH_IMAGE} Image-{len(self.images)}."
        indices = call.get("img_indices", [0])
        if min(indices) < 0 or max(indices) >= len(self.images):
            return f"{NO_SUCH_INDEX} {len(self.images) - 1}."
        return None

    def observe(self, policy, image: np.ndarray | None = None) -> None:
        """Answer the last turn: with `reply` and, after a valid call, the imagined view."""
        number = None if image is None else len(self.images) + 1
        view = "" if image is None else numbered_image(number)
        self.replies.append((self.reply, number))
        text = (
            f"\n<|im_start|>user\n<tool_response>\n{self.reply}{view}\n</tool_response><|im_end|>\n"
            f"<|im_start|>assistant\n"
        )
        before, _, after = text.partition(IMAGE_TOKEN)  # without a view all is before
        self._text(policy.encode_text(before))
        if image is not None:
            self._image(policy, image, self.call)
            self._text(policy.encode_text(after))
        self.call = self.reply = None

    def query(self, seed: int, obey_seed: bool = True) -> Query:
        """The waiting call as an order to a simulator; rooms learn where every image was taken, as commanded.

        seed   of the noise, where the call names none or is not obeyed in it (training: its streams rule)
        """
        call = self.call
        own = call["reference_image"] - 1
        indices = call.get("img_indices", range(len(self.images)))
        indices = list(dict.fromkeys([*indices, own]))
        scene = self.question.get("scene")
        if scene:
            poses = call_poses(scene, self.provenance[len(scene["poses"]) :])
            scene = {"room": scene["room"], "poses": poses[indices].tolist()}
        images = [self.images[index] for index in indices]
        # of some of the images, or in another order, the numbers in earlier calls would not hold
        in_order = indices == list(range(len(self.images)))
        provenance = list(self.provenance) if in_order else ()
        noise = call.get("seed", seed) if obey_seed else seed
        sentence = instruction(motion_in(call))
        return Query(images, indices.index(own) + 1, sentence, noise, scene, provenance)

    def fork(self) -> "Trajectory":
        """An independent copy that shares the images."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(twin, name, list(value))
        return twin

    def _next(self) -> int:
        """The next text position: one more than the largest so far (an image of h x w tokens takes max(h, w))."""
        return max(self.positions[-1]) + 1 if self.positions else 0

    def _text(self, ids, mask=0, logprobs=None, loss_weights=None):
        start = self._next()
        positions = [(p, p, p) for p in range(start, start + len(ids))]
        self._tokens(ids, positions, mask, logprobs, loss_weights)

    def _image(self, policy, image, call):
        start = self._next()
        rows, columns = policy.grid(image)
        positions = [(start, start + r, start + c) for r in range(rows) for c in range(columns)]
        self._tokens([policy.image_token_id] * len(positions), positions)
        self.images.append(image)
        self.provenance.append(call)

    def _tokens(self, ids, positions, mask=0, logprobs=None, loss_weights=None):
        self.ids += ids
        self.positions += positions
        self.loss_mask += [mask] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)
        self.loss_weights += loss_weights or [float(mask)] * len(ids)

    def save(self, folder: str | Path) -> None:
        """Write dialogue.json and image_1.png, image_2.png, ... (docs/one_step.py reads them back)."""
        record = {k: v for k, v in vars(self).items() if k not in ("images", "features")}
        record["question"] = {k: v for k, v in self.question.items() if k != "images"}
        for number, image in enumerate(self.images, 1):
            save_image(Path(folder) / f"image_{number}.png", image)
        write_text(Path(folder) / "dialogue.json", json.dumps(record) + "\n")

    def transcript(self) -> str:
        """The dialogue for people."""
        observed = [f"[Image-{n}]" for n, call in enumerate(self.provenance, 1) if call is None]
        lines = [
            " ".join(observed),
            self.question["question"],
            *(self.question.get("options") or ()),
        ]
        for turn, (reply, number) in zip_longest(self.turns, self.replies, fillvalue=(None, None)):
            lines.append(f"Policy: {turn}")
            if reply:
                lines.append(f"Reply: {reply}")
            if number:
                lines.append(f"[Image-{number}]")
        if self.question.get("answer"):
            lines.append(f"True answer: {self.question['answer']}")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Save the dialogue as one picture, as wide and high as it takes: its images in a row, then its words."""
        lines = []
        for line in self.transcript().splitlines():
            lines += textwrap.wrap(line, 100) or [""]
        titles = [f"Image-{n}" for n in range(1, len(self.images) + 1)]
        images = contact_sheet(titles, [self.images], side=128)
        size = (max(720, images.width), images.height + 17 * len(lines))
        page = Image.new("RGB", size, "white")
        page.paste(images)
        pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
        for n, line in enumerate(lines):
            pen.text((4, images.height + 17 * n), line, "black", font)
        save_image(path, page)
