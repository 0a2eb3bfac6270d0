"""
The protocol of a dialogue between the policy and its simulator: prompt, turns, observations, and their tokens.

A dialogue is a chat in Qwen's layout. The policy's turn is a thought and then exactly one of two things:

    <think>…</think>
    <tool_call>{"name": "imagine", "arguments": {"image": 2, "motion": "move left", "amount": 1.5}}</tool_call>

    <think>…</think><answer>B</answer>

A call is answered by a user turn that shows the imagined view as the next image (Image-5); a call that is malformed or
impossible is answered by a sentence that says what is wrong: it costs a turn and never crashes. Modes: `direct` has no
tool, `agentic` leaves the choice to the policy, `forced` refuses an answer before the first valid call.
"""

import json
import re
import textwrap
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.geometry import KINDS, Motion, Query, instruction, move_camera, phrase
from lib.images import load_image

# ---- the prompt: one template for training and inference ----------------------------------------------------------

PAD = "<|image_pad|>"
TOOL = {
    "type": "function",
    "function": {
        "name": "imagine",
        "description": "Imagine the view after moving or turning the camera of one of the images.",
        "parameters": {
            "type": "object",
            "properties": {
                "image": {"type": "integer", "description": "number of the image to start from"},
                "motion": {"type": "string", "enum": list(KINDS)},
                "amount": {
                    "type": "number",
                    "description": "meters for move, degrees for turn and look",
                },
            },
            "required": ["image", "motion", "amount"],
        },
    },
}
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"  # Qwen's own words
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TOOL)
    + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
NOTE = {
    "direct": "\nThink in <think></think>, then give the answer (an option, if there are any) in "
    "<answer></answer>.",
    "agentic": "\nIn every turn think in <think></think>, then either call imagine to see a view that is missing, "
    "or give the answer (an option, if there are any) in <answer></answer>.",
}
CALL_FIRST = " Call imagine at least once before you answer."
NOTE["forced"] = NOTE["agentic"] + CALL_FIRST

# What a policy is told when a turn cannot be obeyed. Its words are never repeated: JSON can smuggle in <|image_pad|>.
LIMITS = {"meters": 10, "degrees": 360}
UNREADABLE = (
    "This turn cannot be read. Write <think>...</think> and then exactly one <tool_call>...</tool_call> or "
    "one <answer>...</answer>."
)
NOT_JSON = (
    'The tool call is not JSON of this form: {"name": "imagine", "arguments": {"image": 1, "motion": '
    '"turn left", "amount": 45}}'
)
NO_SUCH_TOOL = "There is no such tool. The only tool is imagine."
ARGUMENTS = "imagine takes exactly these arguments: image, motion and amount."
IMAGE_NUMBER = "image must be the number of an image, such as 1."
NO_SUCH_IMAGE = "There is no such image. The images so far are Image-1 to"
MOTIONS = f"There is no such motion. The motions are: {', '.join(KINDS)}."
AMOUNT = (
    f"The amount must be a number, more than 0 and at most {LIMITS['meters']} (meters) for a move or "
    f"{LIMITS['degrees']} (degrees) for a turn or look."
)
ENOUGH = "No more views can be imagined. Answer now."
NO_TOOL = "There is no tool here. Answer from the images."
NO_SIMULATOR = "No simulator is available. Answer from the images."
# Each is one token of the tiny tokenizer.
PHRASES = (
    TOOLS,
    NOTE["direct"],
    NOTE["agentic"],
    CALL_FIRST,
    CALL_FIRST.strip(),
    "Imagined from",
    UNREADABLE,
    NOT_JSON,
    NO_SUCH_TOOL,
    ARGUMENTS,
    IMAGE_NUMBER,
    NO_SUCH_IMAGE,
    MOTIONS,
    AMOUNT,
    ENOUGH,
    NO_TOOL,
    NO_SIMULATOR,
)


def numbered_image(number):
    return f"Image-{number}: <|vision_start|>{PAD}<|vision_end|>"


def prompt_text(question, mode, n_images):
    """The prompt, up to where the policy begins to write; one <|image_pad|> stands for each image.

    question   {"question": str, "options": ["A. red box", ...] or absent}; mode: direct, agentic or forced. With a
               "prompt", a bench's own words (the text before each image and after the last one), these alone are said
    """
    if mode not in NOTE:
        raise ValueError(f"unknown mode {mode!r}; the modes are: {', '.join(NOTE)}")
    system = "" if mode == "direct" else f"<|im_start|>system\n{TOOLS}<|im_end|>\n"
    images = [numbered_image(i + 1) for i in range(n_images)]
    options = "".join(f"\n{option}" for option in question.get("options") or ())
    texts = question.get("prompt") or [""] * n_images + [
        f"{question['question']}{options}{NOTE[mode]}"
    ]
    said = "".join(text + image for text, image in zip(texts, [*images, ""], strict=True))
    return f"{system}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"


class Turn(NamedTuple):
    """One turn of the policy as read by `parse_turn`: a call or an answer or an error, the other two None."""

    think: str
    call: dict | None  # {"image": 2, "motion": "turn left", "amount": 45.0}
    answer: str | None
    error: str | None  # a sentence for the policy


TURN = re.compile(
    r"\s*<think>(.*?)</think>\s*(?:<tool_call>(.*?)</tool_call>|<answer>(.*?)</answer>)\s*",
    re.DOTALL,
)


def parse_turn(text):
    """Read a turn strictly; every way to be wrong has its own sentence in `error`, and nothing raises."""
    match = TURN.fullmatch(text)
    if not match or any(
        re.search("</?(think|tool_call|answer)>", part or "") for part in match.groups()
    ):
        return Turn("", None, None, UNREADABLE)
    think, call, answer = match.groups()
    if call is None:
        return (
            Turn(think, None, answer.strip(), None)
            if answer.strip()
            else Turn(think, None, None, UNREADABLE)
        )
    call, error = read_call(call)
    return Turn(think, call, None, error)


def parse_reply(text):
    """Read a turn of a policy that was asked in a bench's own words: a call if there is one, else all is the answer."""
    calls = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if len(calls) == 1:
        call, error = read_call(calls[0])
        return Turn("", call, None, error)
    return (
        Turn("", None, None, UNREADABLE)
        if calls or not text.strip()
        else Turn("", None, text.strip(), None)
    )


def read_call(text):
    """JSON of a call -> (call, None) or (None, what is wrong). Which images exist is not known here."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None, NOT_JSON
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("arguments"), dict)
        or "name" not in call
    ):
        return None, NOT_JSON
    if call["name"] != "imagine":
        return None, NO_SUCH_TOOL
    arguments = call["arguments"]
    if set(arguments) != {"image", "motion", "amount"}:
        return None, ARGUMENTS
    image, motion, amount = arguments["image"], arguments["motion"], arguments["amount"]
    if type(image) is not int:
        return None, IMAGE_NUMBER
    if motion not in KINDS:
        return None, MOTIONS
    if (
        type(amount) not in (int, float) or not 0 < amount <= LIMITS[Motion(motion, 1.0).unit]
    ):  # NaN fails too
        return None, AMOUNT
    return {"image": image, "motion": motion, "amount": float(amount)}, None


def motion_in(call):
    """The Motion of a valid call."""
    return Motion(call["motion"], call["amount"])


def call_poses(scene, calls):
    """The cameras (n, 4, 4) of all images, given and imagined, the latter where their calls lead if carried out."""
    poses = [np.array(pose) for pose in scene["poses"]]
    for call in calls:
        poses.append(move_camera(poses[call["image"] - 1], motion_in(call)))
    return np.stack(poses)


# ---- a dialogue -----------------------------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """A dialogue as tokens. `start`, `say` and `observe` build it, sampled, scripted or replayed alike.

    Per token: `ids` exactly as sampled, `loss_mask` 1 on what the policy wrote (its closing <|im_end|> included) and 0
    on everything else, `logprobs` of the rollout (0 elsewhere), `loss_weights`, what a supervised loss counts the token
    (1.0 on what the policy wrote unless a script says otherwise, 0 elsewhere), `positions` (time, row, column) of M-RoPE.
    Per image: the array in `images`, its `provenance` (None if given, the call if imagined) and `features`:
    what the frozen tower made of it, once `policy.encode_images` has been there.
    After `say`, `call` is the valid call that waits for its view, `reply` what the protocol answers to this turn.
    """

    question: dict
    mode: str
    max_rounds: int = 3
    ids: list = field(default_factory=list)
    loss_mask: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    loss_weights: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    images: list = field(default_factory=list)
    provenance: list = field(default_factory=list)
    features: list = field(default_factory=list)
    turns: list = field(default_factory=list)  # the policy's turns as text
    replies: list = field(
        default_factory=list
    )  # what it was told: (text, number of the image shown or None)
    valid_calls: int = 0
    invalid_calls: int = 0
    unreadable: int = 0  # turns that were neither a call nor an answer
    answer: str | None = None
    truncated: bool = False  # out of tokens or turns before an answer
    call: dict | None = None
    reply: str | None = None

    @property
    def well_formed(self):
        """True if every turn could be read, every call be obeyed, and the last turn is an answer."""
        return self.answer is not None and not self.invalid_calls and not self.unreadable

    @property
    def done(self):
        return self.answer is not None or self.truncated

    @classmethod
    def start(cls, policy, question, images, mode, max_rounds=3):
        """The prompt of a question with its images, (H, W, 3) uint8 arrays."""
        pieces = prompt_text(question, mode, len(images)).split(PAD)
        if len(pieces) != len(images) + 1:
            raise ValueError(f"the question must not contain {PAD}: {question['question']!r}")
        trajectory = cls(question, mode, max_rounds)
        for piece, image in zip(pieces, [*images, None]):
            trajectory._text(policy.tokens(piece))
            if image is not None:
                trajectory._image(policy, image, None)
        return trajectory

    def say(self, policy, turn, logprobs=None, loss_weights=None):
        """Add a turn of the policy (token ids as sampled, or text, which gets its <|im_end|>) and judge it.

        logprobs, loss_weights   per token of the turn; by default 0.0 and 1.0 each
        """
        ids = policy.tokens(turn + "<|im_end|>") if isinstance(turn, str) else turn
        self._text(ids, wrote=True, logprobs=logprobs, loss_weights=loss_weights)
        closed = ids[-1] == policy.tokenizer.eos_token_id
        text = policy.tokenizer.decode(ids[:-1] if closed else ids)
        self.turns.append(text)
        self.call = self.reply = None
        if not closed:
            self.truncated = True
            return
        turn = parse_reply(text) if self.question.get("prompt") else parse_turn(text)
        if turn.answer is not None:
            if self.mode == "forced" and not self.valid_calls:
                self.reply = CALL_FIRST.strip()
            else:
                self.answer = turn.answer
            return
        error = turn.error or self._impossible(turn.call)
        if error is None:
            self.valid_calls += 1
            self.call = turn.call
            self.reply = (
                f"Imagined from Image-{self.call['image']}, {phrase(motion_in(self.call))}. "
            )
        else:
            self.invalid_calls += "<tool_call>" in text
            self.unreadable += "<tool_call>" not in text
            self.reply = error

    def observe(self, policy, image=None):
        """Answer the last turn: with `reply` and, after a valid call, the imagined view."""
        number = len(self.images) + 1 if image is not None else None
        shown = numbered_image(number) if number else ""
        self.replies.append((self.reply, number))
        before, *after = (
            f"\n<|im_start|>user\n<tool_response>\n{self.reply}{shown}\n</tool_response><|im_end|>\n"
            f"<|im_start|>assistant\n"
        ).split(PAD)
        self._text(policy.tokens(before))
        if image is not None:
            self._image(policy, image, self.call)
            self._text(policy.tokens(*after))
        self.call = self.reply = None

    def query(self, seed):
        """The waiting call as an order to a simulator; rooms are told where every image was taken, as commanded."""
        scene = self.question.get("scene")
        if scene:
            poses = call_poses(scene, self.provenance[len(scene["poses"]) :])
            scene = {"room": scene["room"], "poses": poses.tolist()}
        sentence = instruction(motion_in(self.call), self.call["image"])
        return Query(list(self.images), self.call["image"], sentence, seed, scene)

    def fork(self):
        """An independent copy that shares the images."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: list(value) for name, value in values.items() if isinstance(value, list)}
        )

    def _impossible(self, call):
        if self.mode == "direct":
            return NO_TOOL
        if self.valid_calls >= self.max_rounds:
            return ENOUGH
        if not 1 <= call["image"] <= len(self.images):
            return f"{NO_SUCH_IMAGE} Image-{len(self.images)}."

    def _next(self):
        """The next text position: one more than the largest so far (an image of h x w tokens takes max(h, w))."""
        return max(self.positions[-1]) + 1 if self.positions else 0

    def _text(self, ids, wrote=False, logprobs=None, loss_weights=None):
        start = self._next()
        self.ids += ids
        self.positions += [(p, p, p) for p in range(start, start + len(ids))]
        self.loss_mask += [int(wrote)] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)
        self.loss_weights += loss_weights or [float(wrote)] * len(ids)

    def _image(self, policy, image, call):
        start, (rows, columns) = self._next(), policy.grid(image)
        self.ids += [policy.pad_id] * (rows * columns)
        self.positions += [
            (start, start + r, start + c) for r in range(rows) for c in range(columns)
        ]
        self.loss_mask += [0] * (rows * columns)
        self.logprobs += [0.0] * (rows * columns)
        self.loss_weights += [0.0] * (rows * columns)
        self.images.append(image)
        self.provenance.append(call)

    def save(self, folder):
        """Write dialogue.json and image_1.png, image_2.png, ... `load` gives the dialogue back, ready for `collate`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("images", "features")
        }
        record["question"] = {key: value for key, value in self.question.items() if key != "images"}
        for number, image in enumerate(self.images, 1):
            Image.fromarray(image).save(folder / f"image_{number}.png")
        (folder / "dialogue.json").write_text(json.dumps(record) + "\n")

    @classmethod
    def load(cls, folder):
        record = json.loads((Path(folder) / "dialogue.json").read_text())
        record["positions"] = [tuple(position) for position in record["positions"]]
        count = len(record["provenance"])
        return cls(
            **record,
            images=[load_image(Path(folder) / f"image_{n}.png") for n in range(1, count + 1)],
        )

    def lines(self):
        """The dialogue for people, in order: ("text", words) and ("images", [numbers])."""
        yield "images", [number for number, call in enumerate(self.provenance, 1) if call is None]
        yield "text", "\n".join([self.question["question"], *(self.question.get("options") or ())])
        for turn, (reply, image) in zip(self.turns, [*self.replies, (None, None)]):
            yield "text", f"Policy: {turn}"
            if reply:
                yield "text", f"Reply: {reply}"
            if image:
                yield "images", [image]
        if self.question.get("answer"):
            yield "text", f"True answer: {self.question['answer']}"

    def draw(self, path):
        """Save the dialogue as one picture, as high as it takes."""
        side, font, top, rows = 128, ImageFont.load_default(13), 10, []
        for kind, content in self.lines():  # rows: (height, up to five images or a line, colour)
            if kind == "images":
                rows += [(side + 24, content[i : i + 5], "gray") for i in range(0, len(content), 5)]
                continue
            colour = "black" if content.startswith("Policy") else "gray"
            rows += [
                (17, line, colour)
                for text in content.splitlines()
                for line in textwrap.wrap(text, 100) or [""]
            ]
            rows.append((6, "", colour))
        page = Image.new("RGB", (720, top + sum(height for height, *_ in rows) + 4), "white")
        pen = ImageDraw.Draw(page)
        for height, content, colour in rows:
            if isinstance(content, str):
                pen.text((10, top), content, colour, font)
            else:
                for left, number in zip(range(10, 720, side + 10), content):
                    view = Image.fromarray(self.images[number - 1]).resize(
                        (side, side), Image.NEAREST
                    )
                    page.paste(view, (left, top))
                    pen.text((left, top + side + 2), f"Image-{number}", colour, font)
            top += height
        page.save(path)
