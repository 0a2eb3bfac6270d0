"""
Simulators and policies behind a URL, in the forms of OpenAI's API.

  RemoteSimulator   POST {url}/images/edits: the images as PNG files, the sentence as prompt. extras/remote/serve.py answers it
                    (`python -m extras.remote.serve`), and so do servers such as vLLM-Omni.
  RemotePolicy      POST {url}/chat/completions with tools: any chat model that sees images. `converse` is to it what
                    `policy.rollout` is to a checkpoint.

What becomes of requests that fail: extras/remote/endpoint.py.
"""

import base64
import io
import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from PIL import Image

from extras.remote.endpoint import Endpoint, in_threads, raise_if_down
from lib.dialogue import Trajectory
from lib.geometry import Query, select_context
from lib.images import load_image, read
from lib.protocol import (
    IMAGE_TOKEN,
    MAX_TURNS,
    NO_SIMULATOR,
    SEAM,
    TOOL,
    UNREADABLE,
    between,
    numbered_image,
    prompt_text,
)
from lib.simulators import NO_VIEW, SimulatorError, imagine_each, renumbered
from lib.streams import stream_seed

MAX_PIXELS = 2**24  # of one picture, as sent or received


def png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a PNG file: lossless, so that a view is the same here and there."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()


# ---- simulators -----------------------------------------------------------------------------------------------------


class RemoteSimulator:
    """A simulator behind a URL, with `imagine` as any other. It is sent what a world model would be shown: the reference
    last, and before it the latest others.

    context    images sent at most
    at_once    requests on their way at a time: what extras/remote/serve.py can batch
    patience   the other arguments of Endpoint: timeout, tries, ...
    Commands give the URL alone: the rest is for tests of rate limits and failures. The key is SIMULATOR_API_KEY's.
    """

    def __init__(self, url: str, at_once: int = 16, context: int = 4, **patience):
        self.endpoint = Endpoint(url, "/images/edits", "SIMULATOR_API_KEY", **patience)
        self.at_once = at_once
        self.context = context

    def imagine(self, queries: list[Query]) -> list[np.ndarray]:
        """-> (H, W, 3) uint8 each. SimulatorError comes when all others are done, and brings theirs."""
        views = in_threads(self._imagine, queries, self.at_once)
        raise_if_down(self.endpoint, views)
        failures = [view for view in views if isinstance(view, SimulatorError)]
        if failures:
            sentence = f"{len(failures)} of {len(views)} views failed: {failures[0]}"
            raise SimulatorError(sentence, False, views)
        return views

    def _imagine(self, query: Query) -> np.ndarray:
        indices = select_context(len(query.images), query.reference, self.context)
        files = [png(query.images[i]) for i in indices]
        reference = query.images[query.reference - 1]
        fields = {
            "prompt": renumbered(query.instruction, len(indices)),
            "seed": query.seed,
            "n": 1,
            "response_format": "b64_json",
        }
        return self.endpoint.ask(
            fields,
            lambda answer: read_view(answer, reference),
            optional=("seed", "response_format"),
            files=files,
        )


def read_view(answer: dict, reference: np.ndarray) -> np.ndarray:
    """{"data": [{"b64_json": …}]} -> the view. Its size is the server's, its shape must be near the reference's."""
    data = answer["data"][0]["b64_json"]
    if data.startswith("data:"):  # a data URI; some servers send it so
        data = data.partition(",")[2]
    data = "".join(data.split())  # others break it into lines
    view = read(base64.b64decode(data, validate=True), MAX_PIXELS)
    height, width, _ = view.shape
    rows, columns, _ = reference.shape
    if not 2 / 3 < width / height * rows / columns < 3 / 2:  # another shape is another camera
        raise ValueError(f"a view of {width} x {height} pixels from an image of {columns} x {rows}")
    return view


# ---- policies -------------------------------------------------------------------------------------------------------

END = "<|im_end|>"
ONE_CALL = "Only the first call of a turn is obeyed."
UNREADABLE_HERE = (
    "This turn cannot be read. Write <think>...</think> and then either call the tool, if there is one, "
    "or write <answer>...</answer>."
)


class RemotePolicy:
    """A chat model behind a URL.

    max_new_tokens   per turn, hidden reasoning included; None: `turn_limit`, that of a published policy
    at_once          requests on their way at a time
    patience         the other arguments of Endpoint: timeout, tries, ...
    It answers greedily (`temperature`), with the key of OPENAI_API_KEY.
    A Trajectory of it keeps words instead of tokens: each "token" is a piece of text, and an image has none.
    """

    image_token_id = None
    turn_limit = 4096
    tokenizer = SimpleNamespace(eos_token_id=END, decode="".join)

    def __init__(
        self,
        url: str,
        model: str,
        max_new_tokens: int | None = None,
        at_once: int = 8,
        **patience,
    ):
        self.endpoint = Endpoint(url, "/chat/completions", "OPENAI_API_KEY", **patience)
        self.model = model
        self.temperature = 0.0
        self.max_new_tokens = max_new_tokens or self.turn_limit
        self.at_once = at_once

    def encode_text(self, text: str) -> list[str]:
        """Text -> its "tokens": itself, and its end."""
        text = text.replace(SEAM, "")
        return [text.removesuffix(END), END] if text.endswith(END) else [text]

    def grid(self, image: np.ndarray) -> tuple[int, int]:
        """Rows and columns of tokens of an image."""
        return 0, 0

    def ask(self, messages: list[dict], tool_choice: str | None = None) -> tuple[dict, bool]:
        """The next message of the model -> (message, True if it was cut off). tool_choice: None is without tools."""
        fields = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }
        if tool_choice:
            fields |= {"tools": [TOOL], "tool_choice": tool_choice, "parallel_tool_calls": False}
        return self.endpoint.ask(
            fields,
            read_message,
            optional=("temperature", "max_completion_tokens", "parallel_tool_calls"),
        )


def read_message(answer: dict) -> tuple[dict, bool]:
    """{"choices": [{"message": …, "finish_reason": …}]} -> (message, True if it was cut off)."""
    choice = answer["choices"][0]
    message = choice["message"]
    if not all(isinstance(call["function"], dict) for call in message.get("tool_calls") or ()):
        raise ValueError("a tool call without a function")
    message_text(message)  # raises if the content is neither text nor parts
    return message, choice.get("finish_reason") == "length"


def message_text(message: dict) -> str:
    """The text of a message, which comes as a string, as parts, or not at all."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def turn_text(message: dict) -> str:
    """A message as a turn of lib/dialogue.py, so that one judge reads all policies.

    What the model says beside its call or its answer is its thought, with or without tags. The arguments of a call stay
    the text that they are: the judge says what is wrong with them.
    """
    text = message_text(message)
    calls = message.get("tool_calls") or ()
    answers = between("answer", text)
    if calls:
        function = calls[0]["function"]
        name, arguments = json.dumps(function.get("name")), function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        act = f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'
    elif len(answers) == 1 and "<tool_call>" not in text:
        act = f"<answer>{answers[0]}</answer>"
        text = text.replace(act, "")
    else:
        return text
    thought = re.sub("</?(think|thinking|tool_call|answer)>", "", text).strip()
    return f"<think>{thought}</think>\n{act}"


# ---- messages -------------------------------------------------------------------------------------------------------


def image_part(image: np.ndarray) -> dict:
    """An image as a part of a message."""
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict:
    """Words as a part of a message."""
    return {"type": "text", "text": text.replace(SEAM, "")}


def prompt_messages(question: dict, mode: str, images: list[np.ndarray]) -> list[dict]:
    """The prompt of lib/dialogue.py in the API's form: the tool is not told in words here but in its own field."""
    prompt = prompt_text(question, mode, len(images))
    prompt = prompt.split("<|im_start|>user\n", 1)[1].rsplit(END, 1)[0]
    before, *after = prompt.split(f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>")
    parts = [text_part(before)]
    for image, text in zip(images, after, strict=True):
        parts += [image_part(image), text_part(text)]
    return [{"role": "user", "content": parts}]


def own_message(message: dict) -> dict:
    """A model's message as it is sent back: whole, since some sign their thoughts and want the signature again."""
    message = {"role": "assistant"} | {name: value for name, value in message.items() if value}
    if "content" not in message and "tool_calls" not in message:
        message["content"] = "(nothing)"
    return message


# ---- dialogues ------------------------------------------------------------------------------------------------------


@dataclass
class Chat:
    """A dialogue and the messages that the server has seen of it."""

    trajectory: Trajectory
    messages: list[dict]
    message: dict | None = None  # the model's last one
    view: np.ndarray | None = None  # what was imagined for it
    failure: SimulatorError | None = None  # why it cannot go on

    @property
    def goes_on(self) -> bool:
        return self.failure is None and not self.trajectory.done

    def tool_choice(self) -> str | None:
        """The API's word for what the mode allows in this turn; None is without tools."""
        if self.trajectory.mode == "direct":
            return None
        must_call = self.trajectory.mode == "forced" and not self.trajectory.valid_calls
        return "required" if must_call else "auto"

    def reply(self, policy: RemotePolicy, no_view: str) -> None:
        """Answer the model's message by what the protocol says, and by the view; `no_view` if there is none.

        A tool can only speak, so its view is shown by the user.
        """
        if self.trajectory.call and self.view is None:
            self.trajectory.reply = no_view
        elif self.trajectory.reply == UNREADABLE:
            self.trajectory.reply = UNREADABLE_HERE
        self.trajectory.observe(policy, self.view)
        text, number = self.trajectory.replies[-1]
        self.messages.append(own_message(self.message))
        calls = self.message.get("tool_calls") or ()
        for k, call in enumerate(calls):
            content = ONE_CALL if k else text.strip()
            tool = {"role": "tool", "tool_call_id": call.get("id") or "", "content": content}
            self.messages.append(tool)
        parts = [] if calls else [text_part(text.strip())]
        if number:
            parts += [text_part(numbered_image(number).split("<|")[0]), image_part(self.view)]
        if parts:
            self.messages.append({"role": "user", "content": parts})


def converse(
    policy: RemotePolicy,
    questions: list[dict],
    simulator=None,
    mode: str = "agentic",
    seed: int = 0,
) -> list[Trajectory | SimulatorError]:
    """Let a RemotePolicy hold one dialogue per question -> [Trajectory], in order, with words for tokens.

    In the place of a dialogue that the server refuses (it may be too long for it) stands a SimulatorError. If a server
    is down, the dialogues that can go on do; then a SimulatorError is raised whose `results` are the list. All
    dialogues take their turns together: the views of a turn are imagined in one batch, from the same seeds as in
    `policy.rollout`.
    """
    chats = []
    for question in questions:
        images = [load_image(image) for image in question["images"]]
        trajectory = Trajectory.start(policy, question, images, mode)
        chats.append(Chat(trajectory, prompt_messages(question, mode, images)))
    for turn in range(MAX_TURNS):
        take_turns(policy, [chat for chat in chats if chat.goes_on], turn + 1 == MAX_TURNS)
        waiting = [chat for chat in chats if chat.goes_on]
        if simulator is not None:
            imagine_views(simulator, [c for c in waiting if c.trajectory.call], seed, turn)
        for chat in waiting:
            chat.reply(policy, NO_SIMULATOR if simulator is None else NO_VIEW)
    results = [chat.failure or chat.trajectory for chat in chats]
    raise_if_down(policy.endpoint, results)
    return results


def take_turns(policy: RemotePolicy, chats: list[Chat], last: bool) -> None:
    """Let the model take a turn in every chat; `last`: without an answer by then, the dialogue is truncated."""
    answers = in_threads(
        lambda chat: policy.ask(chat.messages, chat.tool_choice()), chats, policy.at_once
    )
    for chat, answer in zip(chats, answers, strict=True):
        if isinstance(answer, SimulatorError):
            chat.failure = answer
            continue
        chat.message, cut_off = answer
        chat.view = None
        text = turn_text(chat.message)
        # a turn without end is truncated
        chat.trajectory.add_turn(policy, [text] if cut_off else text)
        chat.trajectory.truncated |= last and chat.trajectory.answer is None


def imagine_views(simulator, chats: list[Chat], seed: int, turn: int) -> None:
    """The views that chats wait for, in one batch; what is refused stays None."""
    queries = []
    for chat in chats:
        question = chat.trajectory.question
        key = question.get("id", question["question"])
        queries.append(chat.trajectory.query(stream_seed("imagine", seed, key, 0, turn)))
    try:
        views = imagine_each(simulator, queries)
    except SimulatorError as error:
        views = error.results or [error] * len(queries)
    for chat, view in zip(chats, views, strict=True):
        if not isinstance(view, SimulatorError):
            chat.view = view
        elif view.down:
            chat.failure = view
