"""
A simulator behind a URL: POST /v1/images/edits, in the form of OpenAI's image edits, and GET /health.

    python -m extras.remote.serve --model out/wm --port 8000
    curl http://127.0.0.1:8000/v1/images/edits -F "image[]=@a.png" -F "image[]=@b.png" -F seed=0 \\
         -F "prompt=Based on the last image, turn 30 degrees to the left."

In: a form (multipart/form-data) of pictures, image or image[], in the order of their numbers; a prompt, any
sentence that lib/simulators.py reads; and maybe a seed. Out: {"created", "data": [{"b64_json": a PNG}]}, the view as `imagine`
gives it, so its size is the model's choice for the reference image. What cannot be granted (n above 1, a size, a mask,
an answer by url) is refused with a sentence; what would change nothing (model, user, ...) is ignored.

Requests that wait are imagined together, by one thread. It listens on the loopback address unless told otherwise.
"""

import argparse
import base64
import json
import queue
import re
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import Future
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np

from extras.remote.client import png
from extras.remote.endpoint import LOOPBACK
from lib.distributed import default_device, fail, say
from lib.geometry import Query
from lib.images import PictureError, read
from lib.simulators import load_simulator, read_instruction
from lib.stage import run_stage
from world_model import add_sampler_flags, sampler_options

PATH = "/v1/images/edits"
NOTHING_ELSE = f"There are POST {PATH} and GET /health, no more."
MAX_PARTS = 64  # of a form
MAX_PROMPT = 1000  # letters: the error repeats them
GRANTED = {  # the one value that a field may have
    "n": "1",
    "size": "auto",
    "response_format": "b64_json",
    "output_format": "png",
    "stream": "false",
}


class Limits(NamedTuple):
    """What a server bears."""

    max_bytes: int = 2**26  # of a request
    max_images: int = 16  # of a request
    max_pixels: int = 2**25  # of all its images together
    max_waiting: int = 128  # requests; more are told 429
    max_batch: int = 64  # queries of one call of `imagine`
    wait_ms: float = 10  # for a batch to fill


class Refusal(Exception):
    """A request that gets no view: the status and the sentence of its answer, and which field was wrong."""

    def __init__(self, status: int, sentence: str, field: str | None = None):
        super().__init__(sentence)
        self.status = status
        self.field = field


def refuse_if(condition: bool, sentence: str, status: int = 400, field: str | None = None) -> None:
    """Raise Refusal for what cannot be granted."""
    if condition:
        raise Refusal(status, sentence, field)


# ---- a request ------------------------------------------------------------------------------------------------------


def read_form(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """multipart/form-data -> [(name, value)], in order."""
    boundary = re.fullmatch(
        r'multipart/form-data\s*;.*?boundary="?([^";]{1,70})"?.*', content_type, re.I | re.S
    )
    if not boundary:
        raise Refusal(415, "The request must be a form: multipart/form-data with a boundary.")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode(), MAX_PARTS)
    refuse_if(
        not parts or not parts[-1].startswith(b"--"),
        f"The form has no end: it is cut off, or has more than {MAX_PARTS - 1} parts.",
    )
    form = []
    for part in parts[:-1]:
        head, blank_line, value = part.partition(b"\r\n\r\n")
        name = message_from_bytes(head.lstrip()).get_param("name", header="content-disposition")
        refuse_if(not blank_line or not isinstance(name, str), "A part of the form has no name.")
        form.append((name, value))
    return form


def read_query(form: list[tuple[str, bytes]], limits: Limits) -> Query:
    """The parts of a form -> Query. Raises Refusal for everything that `imagine` could not obey."""
    files, fields = [], {}
    for name, value in form:
        if name in ("image", "image[]"):
            files.append(value)
        else:
            fields[name] = value.decode(errors="replace").strip()
    for name, value in GRANTED.items():
        wrong = fields.get(name, value).lower() != value
        refuse_if(wrong, f"{name} can only be {value}.", field=name)
    no_masks = "There are no masks here: the whole view is imagined."
    refuse_if("mask" in fields, no_masks, field="mask")
    count, most = len(files), limits.max_images
    refuse_if(
        not 1 <= count <= most,
        f"The form has {count} images (image[]); 1 to {most} are needed.",
        field="image",
    )
    seed = fields.get("seed", str(uuid.uuid4().int >> 65))  # without a seed: another view each time
    refuse_if(
        not re.fullmatch(r"\d{1,19}", seed) or int(seed) >= 2**63,
        "seed must be a whole number from 0 to 2^63 - 1.",
        field="seed",
    )
    prompt = fields.get("prompt", "")
    try:
        number, _ = read_instruction(prompt[:MAX_PROMPT])
    except ValueError as error:
        raise Refusal(400, f"prompt: {error}", "prompt") from None
    reference = count if number is None else number
    refuse_if(
        not 1 <= reference <= count,
        f"prompt: there is no Image-{reference}; the form has {count} images.",
        field="prompt",
    )
    return Query(read_images(files, limits.max_pixels), reference, prompt, int(seed))


def read_images(files: list[bytes], max_pixels: int) -> list[np.ndarray]:
    """The pictures of a form, (H, W, 3) uint8 each; the limit is for all of them together."""
    images = []
    for number, file in enumerate(files, 1):
        try:
            image = read(file, max_pixels)
        except PictureError as error:
            raise Refusal(400, f"Image-{number}: {error}", "image") from None
        max_pixels -= image.size // 3
        images.append(image)
    return images


class Handler(BaseHTTPRequestHandler):
    """One connection, one request, one answer."""

    protocol_version = "HTTP/1.1"  # curl waits for "100 Continue"
    timeout = 60  # seconds without a byte

    def log_message(self, *args):
        """Silent: a line per view would drown what the server itself says."""

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses (no HTTP, another method) is told in the same form."""
        self.answer_problem(405 if code == 501 else code, f"{message}. {NOTHING_ELSE}")

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {"status": "ok", "waiting": self.server.waiting.qsize()})
        else:
            self.answer_problem(404, NOTHING_ELSE)

    def do_POST(self):
        """A view, or a refusal once the client has been heard out."""
        self.unread = 0  # bytes of the request
        try:
            data = base64.b64encode(png(self.view())).decode()
            self.answer(200, {"created": int(time.time()), "data": [{"b64_json": data}]})
        except Refusal as refusal:
            self.read_the_rest()
            self.answer_problem(refusal.status, str(refusal), refusal.field)

    def view(self) -> np.ndarray:
        """Read the request and wait for its view. Raises Refusal."""
        limits, length = self.server.limits, self.headers.get("Content-Length", "")
        refuse_if(not re.fullmatch(r"\d{1,15}", length), "The request needs a Content-Length.", 411)
        self.unread = int(length)
        refuse_if(self.path != PATH, NOTHING_ELSE, 404)
        refuse_if(
            self.unread > limits.max_bytes,
            f"The request has {self.unread:,} bytes; the limit is {limits.max_bytes:,}.",
            413,
        )
        body = self.rfile.read(self.unread)  # before it takes a place: this may be slow
        self.unread = 0
        free = self.server.places.acquire(blocking=False)
        refuse_if(not free, "Too many requests wait already. Ask again later.", 429)
        try:
            form = read_form(body, self.headers.get("Content-Type", ""))
            return self.server.imagine(read_query(form, limits))
        finally:
            self.server.places.release()

    def read_the_rest(self) -> None:
        """A client that is still sending would not hear us."""
        left = min(self.unread, 4 * self.server.limits.max_bytes)
        while left > 0 and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def answer_problem(self, status: int, sentence: str, field: str | None = None) -> None:
        """An error in OpenAI's form."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        code = "rate_limit_exceeded" if status == 429 else None
        error = {"message": sentence, "type": kind, "param": field, "code": code}
        self.answer(status, {"error": error})

    def answer(self, status: int, content: dict) -> None:
        """Send JSON and close: a connection has one request."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)


# ---- the server -----------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A thread per connection reads and answers; one more thread imagines for all of them."""

    request_queue_size = 128  # connections that the system holds until a thread takes them

    def __init__(self, model, port: int, host: str = "127.0.0.1", **limits):
        """model and host as in `serve`, **limits of Limits; port 0 takes a free one, which server_port then tells."""
        super().__init__((host, port), Handler)
        self.model = model
        self.limits = Limits(**limits)
        self.places = threading.BoundedSemaphore(self.limits.max_waiting)
        self.waiting = queue.Queue()  # of (query, future)
        self.thread = ThreadPool(1)
        threading.Thread(target=self.work, daemon=True).start()

    def imagine(self, query: Query) -> np.ndarray:
        """Wait in the queue for the view of one query."""
        future = Future()
        self.waiting.put((query, future))
        return future.result()

    def work(self) -> None:
        """Imagine whatever waits, together, for ever."""
        while True:
            batch = [self.waiting.get()]
            deadline = time.monotonic() + self.limits.wait_ms / 1000
            while len(batch) < self.limits.max_batch:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            self.fulfil(batch)

    def fulfil(self, batch: list[tuple[Query, Future]]) -> None:
        """Imagine a batch. If it fails, each query alone: one must not cost the others theirs."""
        queries = [query for query, _ in batch]
        errors = []  # whatever a model may raise
        views = self.thread.apply_async(
            self.model.imagine, (queries,), error_callback=errors.append
        )
        views.wait()
        if not errors:
            for (_, future), view in zip(batch, views.get(), strict=True):
                future.set_result(view)
        elif len(batch) > 1:
            for pair in batch:
                self.fulfil([pair])
        else:
            traceback.print_exception(errors[0])
            sentence = f"The simulator failed: {type(errors[0]).__name__}: {errors[0]}"
            batch[0][1].set_exception(Refusal(500, sentence))

    def handle_error(self, request, client_address):
        """Clients that hang up, or fall silent for a minute, are no news; anything else is a slip, told as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def serve(model, port: int, host: str = "127.0.0.1") -> None:
    """Serve a simulator until Ctrl-C.

    model   anything with imagine(list of Query), such as a WorldModel
    host    the loopback address is this machine alone; "0.0.0.0" is everyone who can reach it: there is no password
    """
    try:
        server = Server(model, port, host)
    except (OSError, OverflowError) as error:
        fail(f"{host}:{port} cannot be listened on ({error}). Give another --port or --host.")
    say(f"The simulator answers at http://{host}:{server.server_port}{PATH} (Ctrl-C ends it).")
    if host not in LOOPBACK:
        say("Everyone who can reach this machine can use it: there is no password.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("Stopped. Requests that were waiting got no answer.")
    finally:
        server.server_close()


def main(argv: list[str] | None = None) -> None:
    """Serve a world model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="tuned",
        help="folder or Hugging Face id; default: the newer of out/wm and out/demo/wm",
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets everyone in who can reach this machine"
    )
    add_sampler_flags(parser)
    args = parser.parse_args(argv)
    simulator = load_simulator(args.model, default_device(), **sampler_options(args))
    serve(simulator, args.port, args.host)


if __name__ == "__main__":
    run_stage(main)
