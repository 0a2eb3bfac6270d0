"""
A simulator behind a URL: POST /v1/images/edits, in the form of OpenAI's image edits, and GET /health.

    python world_model.py --serve 8000
    curl http://127.0.0.1:8000/v1/images/edits -F "image[]=@a.png" -F "image[]=@b.png" -F seed=0 \\
         -F "prompt=Base on the viewpoint of Image-2, turn left 30 degrees."

In: a form (multipart/form-data) of PNG, JPEG or WebP files, image or image[], in the order of their numbers; a prompt
that is an instruction of lib/geometry.py; and maybe a seed. Out: {"created", "data": [{"b64_json": a PNG}]}, the view
as `imagine` gives it, so its size is the model's choice for the reference image. What cannot be granted (n above 1, a
size, a mask, an answer by url) is refused with a sentence; what would change nothing (model, user, ...) is ignored.

Requests that wait are imagined together, by one thread. It listens on the loopback address unless told otherwise.
"""

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

from extras.remote.client import png, read_picture
from extras.remote.endpoint import LOOPBACK
from lib.common import fail, say
from lib.geometry import Query, read_instruction

PATH = "/v1/images/edits"
NOTHING_ELSE = f"There are POST {PATH} and GET /health, no more."
MAX_PARTS, MAX_PROMPT = 64, 1000  # of a form; letters: the error repeats them


class Refusal(Exception):
    """A request that gets no view: the status and the sentence of its answer."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


# ---- a request ------------------------------------------------------------------------------------------------------


def read_form(body, content_type):
    """multipart/form-data -> [(name, bytes)], in order."""
    boundary = re.fullmatch(
        r'multipart/form-data\s*;.*?boundary="?([^";]{1,70})"?.*', content_type, re.I | re.S
    )
    if not boundary:
        raise Refusal(415, "The request must be a form: multipart/form-data with a boundary.")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode(), MAX_PARTS)
    if not parts or not parts[-1].startswith(b"--"):
        raise Refusal(
            400, f"The form has no end: it is cut off, or has more than {MAX_PARTS - 1} parts."
        )
    form = []
    for part in parts[:-1]:
        head, found, value = part.partition(b"\r\n\r\n")
        name = message_from_bytes(head.lstrip()).get_param("name", header="content-disposition")
        if not found or not isinstance(name, str):
            raise Refusal(400, "A part of the form has no name.")
        form.append((name, value))
    return form


def read_query(form, max_images, max_pixels):
    """The parts of a form -> Query. Raises Refusal for everything that `imagine` could not obey."""
    files = [value for name, value in form if name in ("image", "image[]")]
    fields = {
        name: value.decode(errors="replace").strip()
        for name, value in form
        if name not in ("image", "image[]")
    }
    granted = {
        "n": "1",
        "size": "auto",
        "response_format": "b64_json",
        "output_format": "png",
        "stream": "false",
    }
    for name, value in granted.items():
        if fields.get(name, value).lower() != value:
            raise Refusal(400, f"{name} can only be {value}.")
    if "mask" in fields:
        raise Refusal(400, "There are no masks here: the whole view is imagined.")
    if not 1 <= len(files) <= max_images:
        raise Refusal(
            400, f"The form has {len(files)} images (image[]); 1 to {max_images} are needed."
        )
    seed = fields.get("seed", str(uuid.uuid4().int >> 65))  # without a seed: another view each time
    if not re.fullmatch(r"\d{1,19}", seed) or int(seed) >= 2**63:
        raise Refusal(400, "seed must be a whole number from 0 to 2^63 - 1.")
    try:
        reference, _ = read_instruction(fields.get("prompt", "")[:MAX_PROMPT])
    except ValueError as error:
        raise Refusal(400, f"prompt: {error}") from None
    if not 1 <= reference <= len(files):
        raise Refusal(
            400, f"prompt: there is no Image-{reference}; the form has {len(files)} images."
        )
    images = []
    for number, file in enumerate(files, 1):
        try:
            images.append(read_picture(file, max_pixels))
        except ValueError as error:
            raise Refusal(400, f"Image-{number}: {error}.") from None
        max_pixels -= images[-1].size // 3  # the limit is for all of them together
    return Query(images, reference, fields["prompt"], int(seed))


class Handler(BaseHTTPRequestHandler):
    """One connection, one request, one answer."""

    protocol_version = "HTTP/1.1"  # curl waits for "100 Continue"
    timeout = 60  # seconds without a byte

    def log_message(self, *args):
        """Silent: a line per view would drown what the server itself says."""

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses (no HTTP, another method) is told in the same form."""
        self.answer(405 if code == 501 else code, problem(f"{message}. {NOTHING_ELSE}"))

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {"status": "ok", "waiting": self.server.waiting.qsize()})
        else:
            self.answer(404, problem(NOTHING_ELSE))

    def do_POST(self):
        """A view, or a refusal once the client has been heard out."""
        self.unread = 0  # bytes of the request
        try:
            data = base64.b64encode(png(self.view())).decode()
            self.answer(200, {"created": int(time.time()), "data": [{"b64_json": data}]})
        except Refusal as refusal:
            left = min(
                self.unread, 4 * self.server.max_bytes
            )  # a client that is still sending would not hear us
            while left > 0 and (part := self.rfile.read(min(left, 2**16))):
                left -= len(part)
            self.answer(refusal.status, problem(str(refusal)))

    def view(self):
        """Read the request and wait for its view. Raises Refusal."""
        server, length = self.server, self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,15}", length):
            raise Refusal(411, "The request needs a Content-Length.")
        self.unread = int(length)
        if self.path != PATH:
            raise Refusal(404, NOTHING_ELSE)
        if self.unread > server.max_bytes:
            raise Refusal(
                413, f"The request has {self.unread:,} bytes; the limit is {server.max_bytes:,}."
            )
        if not server.places.acquire(blocking=False):
            raise Refusal(429, "Too many requests wait already. Ask again later.")
        try:
            body, self.unread = self.rfile.read(self.unread), 0
            form = read_form(body, self.headers.get("Content-Type", ""))
            return server.imagine(read_query(form, server.max_images, server.max_pixels))
        finally:
            server.places.release()

    def answer(self, status, content):
        """Send JSON and close: a connection has one request."""
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", len(body)),
            ("Connection", "close"),
            *([("Retry-After", 1)] if status == 429 else []),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


def problem(sentence):
    """An error in OpenAI's form."""
    return {"error": {"message": sentence}}


# ---- the server -----------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A thread per connection reads and answers; one more thread imagines for all of them."""

    request_queue_size = 128  # connections that the system holds until a thread takes them

    def __init__(
        self,
        model,
        port,
        host="127.0.0.1",
        max_bytes=2**26,
        max_images=16,
        max_pixels=2**25,
        max_batch=64,
        max_waiting=128,
        wait_ms=10,
    ):
        """model and host as in `serve`; port 0 takes a free one, which server_port then tells.

        Limits of a request: max_bytes, max_images, max_pixels of all its images together; max_waiting requests (more
        are told 429); max_batch of one call of `imagine`, wait_ms for it to fill.
        """
        super().__init__((host, port), Handler)
        self.model, self.max_bytes, self.max_images, self.max_pixels = (
            model,
            max_bytes,
            max_images,
            max_pixels,
        )
        self.max_batch, self.wait = max_batch, wait_ms / 1000
        self.places, self.waiting = threading.BoundedSemaphore(max_waiting), queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    def imagine(self, query):
        """Wait in the queue for the view of one query."""
        future = Future()
        self.waiting.put((query, future))
        return future.result()

    def work(self):
        """Imagine whatever waits, together, for ever."""
        while True:
            batch, deadline = [self.waiting.get()], time.monotonic() + self.wait
            while len(batch) < self.max_batch:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            self.fulfil(batch)

    def fulfil(self, batch):
        """Imagine a batch of (query, future). If it fails, each query alone: one must not cost the others theirs."""
        try:
            views = self.model.imagine([query for query, _ in batch])
        except Exception as error:
            for one in batch if len(batch) > 1 else ():
                self.fulfil([one])
            if len(batch) == 1:
                traceback.print_exc()
                batch[0][1].set_exception(
                    Refusal(500, f"The simulator failed: {type(error).__name__}: {error}")
                )
            return
        for (_, future), view in zip(batch, views):
            future.set_result(view)

    def handle_error(self, request, client_address):
        """Clients that hang up, or fall silent for a minute, are no news; anything else is a slip, told as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def serve(model, port, host="127.0.0.1"):
    """Serve a simulator until Ctrl-C.

    model   anything with imagine(list of Query), such as a WorldModel
    host    the loopback address is this machine alone; "0.0.0.0" is everyone who can reach it: there is no password
    """
    try:
        server = Server(model, port, host)
    except (OSError, OverflowError) as error:
        fail(
            f"{host}:{port} cannot be listened on ({error}). Give another port to --serve, or another --host."
        )
    say(f"The simulator answers at http://{host}:{server.server_port}{PATH} (Ctrl-C ends it).")
    if host not in LOOPBACK:
        say("Everyone who can reach this machine can use it: there is no password.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("Stopped. Requests that were waiting got no answer.")
    finally:
        server.server_close()
