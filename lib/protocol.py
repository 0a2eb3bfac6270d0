"""
The protocol between the policy and its simulator, word by word: prompt, turns, and what is wrong with a turn.

A dialogue is a chat in Qwen's layout. The policy's turn is a thought and then exactly one of two things:

    <think>…</think>
    <tool_call>{"name": "world_simulator_tool", "arguments": {"reference_image": 2, "motion_type": "dx", "value": -1.5}}</tool_call>

    <think>…</think><answer>B</answer>

A call is answered by a user turn that shows the imagined view as the next image (Image-5); a call that is malformed or
impossible is answered by a sentence that says what is wrong: it costs a turn and never crashes. Modes: `direct` has no
tool, `agentic` leaves the choice to the policy, `forced` refuses an answer before the first valid call.
"""

import functools
import json
import re
from types import UnionType
from typing import NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from lib.geometry import KINDS, UNITS, Motion

# ---- the prompt: one template for training and inference ----------------------------------------------------------

IMAGE_TOKEN = "<|image_pad|>"
TOOL_NAME = "world_simulator_tool"
TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Imagine the view after moving or turning the camera of one of the images.",
        "parameters": {
            "type": "object",
            "properties": {
                "reference_image": {
                    "type": "integer",
                    "description": "number of the image to start from",
                },
                "motion_type": {"type": "string", "enum": list(KINDS)},
                "value": {
                    "type": "number",
                    "description": "meters (dx right, dy forward, dz up) or degrees (dangle right, dphi up); below "
                    "zero the other way",
                },
            },
            "required": ["reference_image", "motion_type", "value"],
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
    "agentic": "\nIn every turn think in <think></think>, then either call world_simulator_tool to see a view that is missing, "
    "or give the answer (an option, if there are any) in <answer></answer>.",
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
ARGUMENTS = (
    "world_simulator_tool takes exactly these arguments: reference_image, motion_type and value."
)
IMAGE_NUMBER = "reference_image must be the number of an image, such as 1."
NO_SUCH_IMAGE = "There is no such image. The images so far are Image-1 to"
MOTIONS = f"There is no such motion. The motions are: {', '.join(KINDS)}."
AMOUNT = (
    f"value must be a number, not 0: from -{LIMITS['meters']} to {LIMITS['meters']} (meters) for dx, dy and dz, from "
    f"-{LIMITS['degrees']} to {LIMITS['degrees']} (degrees) for dangle and dphi."
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


# `prompt_text`'s layout for servers, which write prompts from messages
CHAT_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.text is defined %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def numbered_image(number: int) -> str:
    """How an image appears in a prompt or an observation."""
    return f"Image-{number}: <|vision_start|>{IMAGE_TOKEN}<|vision_end|>"


def prompt_text(question: dict, mode: str, n_images: int) -> str:
    """The prompt, up to where the policy begins to write; one <|image_pad|> stands for each image.

    question   {"question": str, "options": ["A. red box", ...] or absent}. With a "prompt", a bench's own words (the
               text before each image and after the last one), the user says these alone
    mode       direct, agentic or forced. Raises ValueError for any other
    """
    if mode not in NOTE:
        raise ValueError(f"unknown mode {mode!r}; the modes are: {', '.join(NOTE)}")
    system = "" if mode == "direct" else f"<|im_start|>system\n{TOOLS}<|im_end|>\n"
    texts = question.get("prompt")
    if not texts:
        options = "".join(f"\n{option}" for option in question.get("options") or ())
        texts = [""] * n_images + [f"{question['question']}{options}{NOTE[mode]}"]
    images = [numbered_image(i + 1) for i in range(n_images)]
    user = "".join(text + image for text, image in zip(texts, [*images, ""], strict=True))
    return f"{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


# ---- a turn ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One turn of the policy as `parse_turn` reads it: a call or an answer or an error, the other two None."""

    call: dict | None = None  # {"reference_image": 2, "motion_type": "dangle", "value": -45.0}
    answer: str | None = None
    error: str | None = None  # a sentence for the policy


TURN = re.compile(
    r"\s*<think>.*?</think>\s*(?:<tool_call>(.*?)</tool_call>|<answer>(.*?)</answer>)\s*",
    re.DOTALL,
)
TAG = re.compile("</?(?:think|tool_call|answer)>")


def parse_turn(text: str) -> Turn:
    """Read a turn strictly; every way to be wrong has its own sentence in `error`, and nothing raises."""
    match = TURN.fullmatch(text)
    if not match or len(TAG.findall(text)) != 4:  # a thought, and one call or answer
        return Turn(error=UNREADABLE)
    call, answer = match.groups()
    if call is not None:
        return read_call(call)
    if not answer.strip():
        return Turn(error=UNREADABLE)
    return Turn(answer=answer.strip())


def parse_reply(text: str) -> Turn:
    """Read a turn of a policy that was asked in a bench's own words: a call if there is one, else all is the answer."""
    calls = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    if len(calls) == 1:
        return read_call(calls[0])
    if calls or not text.strip():
        return Turn(error=UNREADABLE)
    return Turn(answer=text.strip())


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
    if set(arguments) != {"reference_image", "motion_type", "value"}:
        return Turn(error=ARGUMENTS)
    image, kind = arguments["reference_image"], arguments["motion_type"]
    amount = arguments["value"]
    if type(image) is not int:
        return Turn(error=IMAGE_NUMBER)
    if kind not in KINDS:
        return Turn(error=MOTIONS)
    if type(amount) not in (int, float) or not 0 < abs(amount) <= LIMITS[UNITS[kind]]:  # NaN fails
        return Turn(error=AMOUNT)
    return Turn(call=call_of(image, Motion(kind, float(amount))))


def call_of(image: int, motion: Motion) -> dict:
    """The arguments of a call, by the paper's names."""
    return {"reference_image": image, "motion_type": motion.kind, "value": motion.amount}


def motion_in(call: dict) -> Motion:
    """The Motion of a valid call."""
    return Motion(call["motion_type"], call["value"])


def call_text(call: dict) -> str:
    """A call as the policy writes it."""
    arguments = (
        '"reference_image": {reference_image}, "motion_type": "{motion_type}", "value": {value:g}'
    )
    body = f'{{"name": "{TOOL_NAME}", "arguments": {{{arguments.format(**call)}}}}}'
    return f"<tool_call>{body}</tool_call>"


# ---- JSON that others wrote ------------------------------------------------------------------------------------------

SURROGATE = re.compile("[\ud800-\udfff]")  # half a letter: no tokenizer takes it


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


hints_of = functools.cache(get_type_hints)


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


def check_triple(row: dict) -> None:
    """Raises ValueError, the rest of a sentence, where the parts of a `records.Triple` do not go together."""
    context, reference = row.get("context", [""]), row.get("reference", 1)
    if not 1 <= reference <= len(context):
        raise ValueError(f"has the reference {reference} of {len(context)} context views")
    for key, shape in (("context_c2w", (len(context), 4, 4)), ("target_c2w", (4, 4))):
        if key in row and np.shape(row[key]) != shape:
            raise ValueError(f"has {key} of another shape than {shape}")
    try:
        Motion(**row.get("motion", {"kind": "dx", "amount": 1}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"has the motion {row['motion']} ({error})") from None
