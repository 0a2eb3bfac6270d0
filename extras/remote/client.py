"""
Simulators and policies behind a URL, in the forms of OpenAI's API.

  RemoteSimulator   POST {url}/images/edits: the images as PNG files, the sentence as prompt. extras/remote/serve.py answers it
                    (`python world_model.py --serve 8000`), and so do servers such as vLLM-Omni.
  RemotePolicy      POST {url}/chat/completions with tools: any chat model that sees images. `converse` is to it what
                    `policy.rollout` is to a checkpoint.

What becomes of requests that fail: extras/remote/endpoint.py.
"""

import base64
import io
import json
import re
import uuid
from types import SimpleNamespace

import numpy as np
from PIL import Image

from extras.remote.endpoint import Endpoint, check, in_threads
from lib.dialogue import (
    NO_SIMULATOR,
    PAD,
    TOOL,
    UNREADABLE,
    Trajectory,
    numbered_image,
    prompt_text,
)
from lib.geometry import renumbered, select_context
from lib.images import load_image, on_white
from lib.simulators import NO_VIEW, SimulatorError, imagine_each
from lib.streams import stream_seed

MAX_PIXELS = 2**24  # of one picture, as sent or received
NEAREST = 8  # images sent: no simulator here is shown more (lib/bagel.MAX_IMAGES)


# ---- pictures -------------------------------------------------------------------------------------------------------


def png(image):
    """(H, W, 3) uint8 -> the bytes of a PNG file: lossless, so that a view is the same here and there."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=1)
    return file.getvalue()


def read_picture(data, max_pixels=MAX_PIXELS):
    """The bytes of a PNG, JPEG or WebP file -> (H, W, 3) uint8. Raises ValueError with a sentence."""
    try:
        picture = Image.open(
            io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")
        )  # no decoder that starts programs
        width, height = picture.size  # of the header: nothing is decoded
        pixels = None
        if width * height <= max_pixels:
            pixels = np.array(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    except Exception as error:  # every decoder has its own
        reason = (
            str(error)
            if isinstance(error, OSError) and "BytesIO" not in str(error)
            else "not PNG, JPEG or WebP"
        )
        raise ValueError(f"the file is no picture that can be read: {reason}") from None
    if pixels is None:
        raise ValueError(
            f"a picture of {width} x {height} pixels is too large: the limit is {max_pixels:,} pixels"
        )
    return on_white(pixels)


# ---- simulators -----------------------------------------------------------------------------------------------------


class RemoteSimulator:
    """A simulator behind a URL, with `imagine` as any other. Of many images it is sent the reference and its nearest
    neighbours in the list, as a world model would choose: a video has hundreds.

    at_once   requests on their way at a time: what extras/remote/serve.py can batch
    patience  the other arguments of Endpoint: timeout, tries, ...
    Commands give the URL alone: the rest is for tests of rate limits and failures. The key is SIMULATOR_API_KEY's.
    """

    def __init__(self, url, at_once=16, **patience):
        self.endpoint = Endpoint(url, "/images/edits", "SIMULATOR_API_KEY", **patience)
        self.at_once = at_once

    def imagine(self, queries):
        """list of Query -> list of (H, W, 3) uint8. SimulatorError comes when all others are done, and brings theirs."""
        views = in_threads(self._imagine, queries, self.at_once)
        check(self.endpoint, views)
        failed = [view for view in views if isinstance(view, SimulatorError)]
        if failed:
            raise SimulatorError(
                f"{len(failed)} of {len(views)} views failed: {failed[0]}", False, views
            )
        return views

    def _imagine(self, query):
        indices, number = select_context(query.images, query.reference, NEAREST)
        files, reference = (
            [png(query.images[i]) for i in indices],
            query.images[query.reference - 1],
        )
        fields = {
            "prompt": renumbered(query.instruction, number),
            "seed": query.seed,
            "n": 1,
            "response_format": "b64_json",
        }
        return self.endpoint.ask(
            fields,
            lambda sent: multipart(sent, files),
            lambda answer: read_view(answer, reference),
            optional=("seed", "response_format"),
        )


def multipart(fields, files):
    """Fields and PNG files as the body of a form -> (body, content type)."""
    boundary = uuid.uuid4().hex
    start, end = f"--{boundary}\r\nContent-Disposition: form-data; name=", "\r\n"
    parts = [f'{start}"{name}"\r\n\r\n{value}{end}'.encode() for name, value in fields.items()]
    for number, file in enumerate(files, 1):
        head = f'{start}"image[]"; filename="image_{number}.png"\r\nContent-Type: image/png\r\n\r\n'
        parts += [head.encode(), file, end.encode()]
    return b"".join(
        [*parts, f"--{boundary}--\r\n".encode()]
    ), f"multipart/form-data; boundary={boundary}"


def read_view(answer, reference):
    """{"data": [{"b64_json": …}]} -> the view. Its size is the server's, its shape must be near the reference's."""
    view = read_picture(base64.b64decode(answer["data"][0]["b64_json"], validate=True))
    (height, width), (rows, columns) = view.shape[:2], reference.shape[:2]
    if (
        not 2 / 3 < width / height * rows / columns < 3 / 2
    ):  # another shape is another camera; sizes are rounded
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

    temperature      None leaves it to the server
    max_new_tokens   per turn, hidden reasoning included; None: `turn_limit`, that of a published policy
    at_once          requests on their way at a time
    patience         the other arguments of Endpoint: timeout, tries, ...
    A Trajectory of it keeps words instead of tokens: each "token" is a piece of text, and an image has none.
    """

    pad_id, turn_limit = None, 4096
    tokenizer = SimpleNamespace(eos_token_id=END, decode="".join)

    def __init__(
        self,
        url,
        model,
        key_from_env="OPENAI_API_KEY",
        temperature=0.0,
        max_new_tokens=None,
        at_once=8,
        **patience,
    ):
        self.endpoint = Endpoint(url, "/chat/completions", key_from_env, **patience)
        self.model, self.temperature, self.at_once = model, temperature, at_once
        self.max_new_tokens = max_new_tokens or self.turn_limit

    def tokens(self, text):
        """Text -> its "tokens": itself, and its end."""
        return [text.removesuffix(END), END] if text.endswith(END) else [text]

    def grid(self, image):
        """Rows and columns of tokens of an image."""
        return 0, 0

    def ask(self, messages, tool_choice=None):
        """The next message of the model -> (message, True if it was cut off). tool_choice: None is without tools."""
        fields = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_new_tokens,
        }
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if tool_choice:
            fields |= {"tools": [TOOL], "tool_choice": tool_choice, "parallel_tool_calls": False}
        return self.endpoint.ask(
            fields,
            lambda sent: (json.dumps(sent).encode(), "application/json"),
            read_message,
            optional=("temperature", "max_completion_tokens", "parallel_tool_calls"),
        )


def read_message(answer):
    """{"choices": [{"message": …, "finish_reason": …}]} -> (message, True if it was cut off)."""
    choice = answer["choices"][0]
    message = choice["message"]
    if not all(isinstance(call["function"], dict) for call in message.get("tool_calls") or ()):
        raise ValueError("a tool call without a function")
    words(message)  # raises if the content is neither text nor parts
    return message, choice.get("finish_reason") == "length"


def words(message):
    """The text of a message, which comes as a string, as parts, or not at all."""
    content = message.get("content") or ""
    return (
        content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    )


def turn_text(message):
    """A message as a turn of lib/dialogue.py, so that one judge reads all policies.

    What the model says beside its call or its answer is its thought, with or without tags. The arguments of a call stay
    the text that they are: the judge says what is wrong with them.
    """
    text, calls = words(message), message.get("tool_calls") or ()
    answers = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    if calls:
        function = calls[0]["function"]
        arguments = function.get("arguments")
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        act = f'<tool_call>{{"name": {json.dumps(function.get("name"))}, "arguments": {arguments}}}</tool_call>'
    elif len(answers) == 1 and "<tool_call>" not in text:
        act, text = (
            f"<answer>{answers[0]}</answer>",
            text.replace(f"<answer>{answers[0]}</answer>", ""),
        )
    else:
        return text
    thought = re.sub("</?(think|tool_call|answer)>", "", text).strip()
    return f"<think>{thought}</think>\n{act}"


def shown(image):
    """An image as a part of a message."""
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text):
    """Words as a part of a message."""
    return {"type": "text", "text": text}


def prompt_messages(question, mode, images):
    """The prompt of lib/dialogue.py in the API's form: the tool is not told in words here but in its own field."""
    text = (
        prompt_text(question, mode, len(images)).split("<|im_start|>user\n", 1)[1].rsplit(END, 1)[0]
    )
    before, *after = text.split(f"<|vision_start|>{PAD}<|vision_end|>")
    parts = [said(before)] + [
        part for image, text in zip(images, after) for part in (shown(image), said(text))
    ]
    return [{"role": "user", "content": parts}]


def echo(message):
    """A model's own message as it is sent back: whole, since some sign their thoughts and want the signature again."""
    kept = {"role": "assistant"} | {name: value for name, value in message.items() if value}
    return kept if "content" in kept or "tool_calls" in kept else kept | {"content": "(nothing)"}


def reply_messages(message, text, number=None, view=None):
    """What the protocol answers to a message. A tool can only speak, so its view is shown by the user."""
    calls = message.get("tool_calls") or ()
    told = [
        {"role": "tool", "tool_call_id": call.get("id") or "", "content": ONE_CALL if k else text}
        for k, call in enumerate(calls)
    ]
    parts = [] if calls else [said(text)]
    if view is not None:
        parts += [said(numbered_image(number).split("<|")[0]), shown(view)]
    return told + ([{"role": "user", "content": parts}] if parts else [])


def converse(policy, questions, simulator=None, mode="agentic", seed=0, max_rounds=3, max_turns=10):
    """Let a RemotePolicy hold one dialogue per question -> [Trajectory], in order, with words for tokens.

    In the place of a dialogue that the server refuses (it may be too long for it) stands a SimulatorError. If a server is
    down, the dialogues that can go on do; then a SimulatorError is raised whose `results` are the list. All dialogues take
    their turns together: the views of a turn are imagined in one batch, from the same seeds as in `policy.rollout`.
    """
    dialogues = [
        Trajectory.start(
            policy, question, [load_image(image) for image in question["images"]], mode, max_rounds
        )
        for question in questions
    ]
    chats, failed = [prompt_messages(d.question, mode, d.images) for d in dialogues], {}

    def ask(k):
        must_call = mode == "forced" and not dialogues[k].valid_calls
        return policy.ask(
            chats[k], None if mode == "direct" else "required" if must_call else "auto"
        )

    for turn in range(max_turns):
        members = [
            k for k, dialogue in enumerate(dialogues) if not dialogue.done and k not in failed
        ]
        answers = dict(zip(members, in_threads(ask, members, policy.at_once)))
        failed |= {k: answer for k, answer in answers.items() if isinstance(answer, SimulatorError)}
        answers = {k: answer for k, answer in answers.items() if k not in failed}
        for k, (message, cut) in answers.items():
            text = turn_text(message)
            dialogues[k].say(policy, [text] if cut else text)  # without its end a turn is truncated
            dialogues[k].truncated |= turn + 1 == max_turns and dialogues[k].answer is None
        waiting = [k for k in answers if not dialogues[k].done]
        calling = [k for k in waiting if dialogues[k].call and simulator]
        seeds = [
            stream_seed("imagine", seed, questions[k].get("id", questions[k]["question"]), 0, turn)
            for k in calling
        ]
        try:
            views = imagine_each(
                simulator, [dialogues[k].query(own) for k, own in zip(calling, seeds)]
            )
        except SimulatorError as error:
            views = error.results or [error] * len(calling)
        views = dict(zip(calling, views))
        failed |= {
            k: view for k, view in views.items() if isinstance(view, SimulatorError) and view.down
        }
        for k in waiting:
            dialogue, message = dialogues[k], answers[k][0]
            view = None if isinstance(views.get(k), SimulatorError) else views.get(k)
            if dialogue.call and view is None:
                dialogue.reply = NO_VIEW if simulator else NO_SIMULATOR
            elif dialogue.reply == UNREADABLE:
                dialogue.reply = UNREADABLE_HERE
            dialogue.observe(policy, image=view)
            text, number = dialogue.replies[-1]
            chats[k] += [echo(message), *reply_messages(message, text.strip(), number, view)]
    results = [failed.get(k, dialogue) for k, dialogue in enumerate(dialogues)]
    check(policy.endpoint, results)
    return results
