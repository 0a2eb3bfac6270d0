"""
The protocol between the policy and its simulator, word by word: prompt, turns, and what is wrong with a turn.

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
from typing import NamedTuple

from lib.geometry import KINDS, Motion

# ---- the prompt: one template for training and inference ----------------------------------------------------------

IMAGE_TOKEN = "<|image_pad|>"
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

    call: dict | None = None  # {"image": 2, "motion": "turn left", "amount": 45.0}
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
    if call["name"] != "imagine":
        return Turn(error=NO_SUCH_TOOL)
    if set(arguments) != {"image", "motion", "amount"}:
        return Turn(error=ARGUMENTS)
    image, motion, amount = arguments["image"], arguments["motion"], arguments["amount"]
    if type(image) is not int:
        return Turn(error=IMAGE_NUMBER)
    if motion not in KINDS:
        return Turn(error=MOTIONS)
    largest = LIMITS[Motion(motion, 1.0).unit]
    if type(amount) not in (int, float) or not 0 < amount <= largest:  # NaN fails too
        return Turn(error=AMOUNT)
    return Turn(call={"image": image, "motion": motion, "amount": float(amount)})
