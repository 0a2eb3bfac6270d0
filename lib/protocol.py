"""
The protocol between the policy and its simulator, word by word: prompt, turns, and what is wrong with a turn.

A dialogue is a chat in Qwen's layout. The policy's turn is a thought and then exactly one of two things:

    <think>…</think>
    <tool_call>{"name": "world_simulator_tool", "arguments": {"reference_image": 2, "motion_type": "dx", "value": -1.5}}</tool_call>

    <think>…</think><answer>B</answer>                     (<thinking> is read as well)

A call names an image, a kind of motion (dx right, dy forward, dz up: metres; dangle right, dphi up: degrees) and how far,
below zero the other way (LIMITS, ours: 10 metres, 360 degrees); `img_indices` may choose what the simulator is shown, `seed` its noise (not in training). It is
answered by a user turn that shows the imagined view as the next image (Image-5), one that is malformed or impossible by
a sentence that says why. Modes: `direct` has no tool, `agentic` leaves the choice to the policy, `forced` refuses an
answer before the first valid call.
"""

import functools
import json
import re
from types import UnionType
from typing import NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from lib.geometry import KINDS, UNITS, Motion, move_camera

# ---- the prompt: one template for training and inference ----------------------------------------------------------

MAX_ROUNDS = 3  # of the tool in a dialogue (paper)
MAX_TURNS = 10  # of the policy in a dialogue (paper)
IMAGE_TOKEN = "<|image_pad|>"
TOOL_NAME = "world_simulator_tool"
CALL_KEYS = ("reference_image", "motion_type", "value")  # and img_indices and seed if need be
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Imagine the view after moving or turning the camera of one of the images.",
        "parameters": {
            "type": "object",
            "properties": {
                "reference_image": {"type": "integer", "description": "image to start from"},
                "motion_type": {"type": "string", "enum": list(KINDS)},
                "value": {
                    "type": "number",
                    "description": "meters or degrees; above 0: dx right, dy forward, dz up, dangle right, dphi up",
                },
                "img_indices": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "description": "images to imagine from, counted from 0; default: all",
                },
                "seed": {"type": "integer", "description": "of the simulator's noise"},
            },
            "required": list(CALL_KEYS),
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
    "agentic": "\nOne step a turn: first think in <think></think>, without repeating what you thought before, then either "
    "call world_simulator_tool or give the answer (an option, if there are any) in <answer></answer>, not both. Call it "
    "before you answer if the answer depends on a viewpoint or a region that no image shows, on a motion of the camera, "
    "or on a relation that you are not sure of. If the images settle it, answer at once.",
}
CALL_FIRST = " Call world_simulator_tool at least once before you answer."
NOTE["forced"] = NOTE["agentic"] + CALL_FIRST

# What a policy is told when a turn cannot be obeyed. Its words are never repeated: JSON can smuggle in <|image_pad|>.
LIMITS = {"meters": 10, "degrees": 360}
UNREADABLE = (
    "This turn cannot be read. Write <think>...</think> and then exactly one <tool_call>...</tool_call> or "
    "one <answer>...</answer>."
)
NOT_JSON = (
    'The tool call is not JSON of this form: {"name": "world_simulator_tool", "arguments": '
    '{"reference_image": 1, "motion_type": "dy", "value": 1.0}}'
)
NO_SUCH_TOOL = "There is no such tool. The only tool is world_simulator_tool."
ARGUMENTS = "world_simulator_tool takes reference_image, motion_type and value, and may take img_indices and seed."
IMAGE_NUMBER = "reference_image must be the number of an image, such as 1."
NO_SUCH_IMAGE = "There is no such image. The images so far are Image-1 to"
NO_SUCH_MOTION = f"There is no such motion. The motions are: {', '.join(KINDS)}."
AMOUNT = (
    f"value must be a number, not 0: from -{LIMITS['meters']} to {LIMITS['meters']} (meters) for dx, dy and dz, from "
    f"-{LIMITS['degrees']} to {LIMITS['degrees']} (degrees) for dangle and dphi."
)
INDICES = "img_indices must be a list of images counted from 0, such as [0, 1], and not be empty."
NO_SUCH_INDEX = "There is no such image in img_indices, which counts from 0 to"
SEED = "seed must be a whole number, from 0 to 2^63 - 1."
ENOUGH = "No more views can be imagined. Answer now."
NO_TOOL = "There is no tool here. Answer from the images."
NO_SIMULATOR = "No simulator is available. Answer from the images."
# Each is one token of the tiny tokenizer.
PHRASES = (TOOLS, NOTE["direct"], NOTE["agentic"], CALL_FIRST, CALL_FIRST.strip(), "Imagined from")
PHRASES += (UNREADABLE, NOT_JSON, NO_SUCH_TOOL, ARGUMENTS, IMAGE_NUMBER, NO_SUCH_IMAGE)
PHRASES += (NO_SUCH_MOTION, AMOUNT, INDICES, NO_SUCH_INDEX, SEED, ENOUGH, NO_TOOL, NO_SIMULATOR)


def numbered_image(number: int) -> str:
    """How an image appears in a prompt or an observation."""
    return f"Image-{number}: <|vision_start|>{IMAGE_TOKEN}<|vision_end|>"


FRAME_TOKEN = re.compile(r"<(?=\|\w+\|>|/?(?:think|tool_call|tool_response|answer)>)")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a letter: no tokenizer takes it
SEAM = "\ud800"  # a mark of ours, since no text of data brings one


def as_words(text: str) -> str:
    """Text of data as it goes into a prompt or a turn: a SEAM behind the "<" of what spells a token of the frame."""
    return FRAME_TOKEN.sub(f"<{SEAM}", SURROGATE.sub("\ufffd", text))


def prompt_text(question: dict, mode: str, n_images: int) -> str:
    """The prompt, up to where the policy begins to write; one <|image_pad|> stands for each image.

    question   {"question": str, "options": ["A. red box", ...] or absent}. With a "prompt", a bench's own words (the
               text before each image and after the last one), the user says these alone
    mode       direct, agentic or forced
    """
    system = "" if mode == "direct" else f"<|im_start|>system\n{TOOLS}<|im_end|>\n"
    texts = [as_words(text) for text in question.get("prompt") or ()]
    if not texts:
        words = "\n".join([question["question"], *(question.get("options") or ())])
        texts = [""] * n_images + [as_words(words) + NOTE[mode]]
    images = [numbered_image(i + 1) for i in range(n_images)]
    user = "".join(text + image for text, image in zip(texts, [*images, ""], strict=True))
    return f"{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


# ---- a turn ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One turn of the policy as `parse_turn` reads it: a call or an answer or an error, the other two None."""

    # {"reference_image": 2, "motion_type": "dangle", "value": -45.0}, and "img_indices" and "seed" where given
    call: dict | None = None
    answer: str | None = None
    error: str | None = None  # a sentence for the policy


TAG = re.compile("</?(?:think|thinking|tool_call|answer)>")
TURN = re.compile(r"<(think|thinking)></\1><(tool_call|answer)></\2>")  # its tags alone


def parse_turn(text: str) -> Turn:
    """Read a turn strictly; every way to be wrong has its own sentence in `error`, and nothing raises."""
    tags = TURN.fullmatch("".join(TAG.findall(text)))
    if not tags:
        return Turn(error=UNREADABLE)
    before, _, gap, inside, after = TAG.split(text)
    is_call = tags[2] == "tool_call"
    if (before + gap + after).strip() or not (is_call or inside.strip()):
        return Turn(error=UNREADABLE)
    return read_call(inside) if is_call else Turn(answer=inside.strip())


def parse_reply(text: str) -> Turn:
    """Read a turn of a policy that was asked in a bench's own words: a call if there is one, else all is the answer."""
    calls = between("tool_call", text)
    if len(calls) == 1:
        return read_call(calls[0])
    if calls or not text.strip():
        return Turn(error=UNREADABLE)
    return Turn(answer=text.strip())


def between(tag: str, text: str, flags: int = 0) -> list[str]:
    """All that stands between <tag> and the next </tag>, in linear time, which "<tag>(.*?)</tag>" does not take."""
    inside = []
    for piece in re.split(f"</{tag}>", text, flags=flags)[:-1]:
        inside += re.split(f"<{tag}>", piece, maxsplit=1, flags=flags)[1:]
    return inside


def read_call(text: str) -> Turn:
    """JSON of a call -> a Turn with the call, or with what is wrong. Which images exist is not known here."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return Turn(error=NOT_JSON)
    arguments = call.get("arguments") if isinstance(call, dict) else None
    if not isinstance(arguments, dict) or "name" not in call:
        return Turn(error=NOT_JSON)
    if call["name"] != TOOL_NAME:
        return Turn(error=NO_SUCH_TOOL)
    if not set(CALL_KEYS) <= set(arguments) <= {*CALL_KEYS, "img_indices", "seed"}:
        return Turn(error=ARGUMENTS)
    kind, amount = arguments["motion_type"], arguments["value"]
    if not is_whole(arguments["reference_image"]):
        return Turn(error=IMAGE_NUMBER)
    if kind not in KINDS:
        return Turn(error=NO_SUCH_MOTION)
    if type(amount) not in (int, float) or not 0 < abs(amount) <= LIMITS[UNITS[kind]]:  # NaN fails
        return Turn(error=AMOUNT)
    result = call_of(int(arguments["reference_image"]), Motion(kind, float(amount)))
    if "img_indices" in arguments:
        indices = arguments["img_indices"]
        if not isinstance(indices, list) or not indices or not all(map(is_whole, indices)):
            return Turn(error=INDICES)
        result["img_indices"] = [int(index) for index in indices]
    if "seed" in arguments:
        seed = arguments["seed"]
        if not is_whole(seed) or not 0 <= seed < 2**63:
            return Turn(error=SEED)
        result["seed"] = int(seed)
    return Turn(call=result)


def is_whole(value) -> bool:
    """Whether a JSON value is a whole number; 2.0 is one, true is none."""
    return type(value) is int or (type(value) is float and value.is_integer())


def call_of(image: int, motion: Motion) -> dict:
    """The arguments of a call, by the paper's names."""
    return {"reference_image": image, "motion_type": motion.kind, "value": motion.amount}


def motion_in(call: dict) -> Motion:
    """The Motion of a valid call."""
    return Motion(call["motion_type"], call["value"])


def call_poses(scene: dict, calls: list[dict]) -> np.ndarray:
    """The cameras (n, 4, 4) of all images, given and imagined, the latter where their calls lead if carried out."""
    poses = [np.array(pose) for pose in scene["poses"]]
    for call in calls:
        poses.append(move_camera(poses[call["reference_image"] - 1], motion_in(call)))
    return np.stack(poses)


def call_text(call: dict) -> str:
    """A call as the policy writes it, whole numbers without a point."""
    value = int(call["value"]) if is_whole(call["value"]) else call["value"]
    body = json.dumps({"name": TOOL_NAME, "arguments": call | {"value": value}})
    return f"<tool_call>{body}</tool_call>"


# ---- JSON that others wrote ------------------------------------------------------------------------------------------

hints_of = functools.cache(get_type_hints)


def parse_object(text: str, kind: type | None = None) -> dict:
    """The JSON object of a line, with values of a TypedDict's kinds. Raises ValueError, the rest of a sentence."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key comes twice among {', '.join(key for key, _ in pairs)}")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    if kind:
        check_kinds(value, kind)
    return value


def check_kinds(row: dict, row_kind: type) -> None:
    """Raises ValueError, the rest of a sentence, for a value that is not what a TypedDict says of its key."""
    for key, kind in hints_of(row_kind).items():
        if key in row and not fits(row[key], kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"has {key} {json.dumps(row[key])[:80]}, which should be {wanted}")


def fits(value, kind) -> bool:
    """Is a value of JSON of a kind: str, int, float, bool, dict, list[...] of one, or several with | between them?"""
    if isinstance(kind, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if kind is str:
        return isinstance(value, str) and not SURROGATE.search(value)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**63  # neither true nor NaN
    parts = get_args(kind)
    right = isinstance(value, get_origin(kind) or kind)
    return right and (not parts or all(fits(part, parts[0]) for part in value))
