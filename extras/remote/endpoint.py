"""
Requests to a server that may be slow, busy, broken or gone: time-outs, retries, rate limits, and one kind of error.

A deadline is that of a whole answer, headers included: a Watchdog cuts the connection, since the time-out of every
HTTP library starts anew with each byte. Proxies and redirects are not followed.

Tried again, after waits that double: time-outs, lost connections, 429, 5xx, and answers that cannot be read. What else
a server refuses is final and reported in its own words. One failure never costs what the rest of a batch has given:
see SimulatorError. A key is read from the environment for each request, kept nowhere, and cut out of what a server
says.
"""

import contextlib
import http.client
import json
import math
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any
from urllib.parse import urlsplit

from lib.distributed import say, without_keys
from lib.simulators import SimulatorError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_ANSWER = 2**26  # bytes of one answer
RETRIED = (408, 409, 425, 429)  # and 5xx
SERVER_WIDE = (401, 402, 403, 404, 405, 429)  # every request would meet them: a wrong key, no money
OLDER_NAMES = {"max_completion_tokens": "max_tokens"}  # of fields; older servers know these alone


@dataclass(eq=False)
class Failure(Exception):
    """A try that brought no answer."""

    problem: str  # such as "answered 503: busy"
    status: int | None = None
    retry_after: float | None = None  # seconds that the server asks for
    final: bool = False  # another try would fail alike
    down: bool = True  # other requests would fail alike


# ---- one request, and its deadline --------------------------------------------------------------------------------


class Watchdog:
    """`with Watchdog(seconds) as watchdog`: cuts its connections when the time is over, and raises TimeoutError."""

    def __init__(self, seconds: float):
        self.sockets = []
        self.barked = False
        self.timer = threading.Timer(seconds, self.bark)
        self.timer.daemon = True

    def watch(self, connection: socket.socket) -> None:
        """Watch a connection: by a second handle, since TLS and http.client each take the first one over."""
        self.sockets.append(connection.dup())
        if self.barked:
            self.bark()

    def bark(self) -> None:
        """Cut what is connected: whoever reads there sees its end."""
        self.barked = True
        for connection in self.sockets:
            with contextlib.suppress(OSError):  # it is over already
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *error):
        self.timer.cancel()
        for connection in self.sockets:
            connection.close()
        if self.barked:
            raise TimeoutError("timed out") from None


class WatchedConnection(http.client.HTTPConnection):
    """A connection that its `watchdog` knows."""

    def connect(self):
        super().connect()
        self.watchdog.watch(self.sock)


class WatchedTLS(http.client.HTTPSConnection, WatchedConnection):
    """The same with TLS, whose handshake comes after `WatchedConnection.connect`."""


# ---- one server ---------------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """One address, its key, and the patience that all its requests share."""

    url: str  # such as http://127.0.0.1:8000 or https://host/v1
    path: str  # such as /images/edits
    key_from_env: str = ""  # name of the environment variable that holds the key, if there is one
    timeout: float = 600.0  # seconds for one whole answer
    tries: int = 6  # how often a request may fail
    backoff: float = 1.0  # seconds before the second try, doubled for each further one
    longest_wait: float = 60.0  # seconds; caps what a server asks for by Retry-After too
    patience: float = 1800.0  # seconds of rate limit (429), which is no failure and pauses all

    def __post_init__(self):
        parts = urlsplit(self.url)
        host = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?", parts.netloc)
        if parts.scheme not in ("http", "https") or not host or parts.query:
            raise ValueError(
                "A URL reads http://host:port or https://host/v1, without a password or a query: those "
                "would be written to logs. A key belongs in the environment."
            )
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self.url = base.removesuffix(self.path) + self.path
        self.kind = WatchedTLS if parts.scheme == "https" else WatchedConnection
        self.private = parts.hostname in LOOPBACK or parts.scheme == "https"
        if self._key() and not self.private:
            say(
                f"The key in {self.key_from_env} is not sent to {self.url}: it would travel unencrypted."
            )
        self.served = False  # has it ever given an answer?
        self.dropped = set()  # fields that it does not know
        self.resume_at = 0.0  # when a rate limit is over
        self.lock = threading.Lock()
        self.jitter = random.Random()  # not the global one, which an experiment may have seeded

    def ask(
        self,
        fields: dict,
        read: Callable[[Any], Any],
        optional: Iterable[str] = (),
        files: list[bytes] | None = None,
    ) -> Any:
        """Send fields until read(the answer's JSON) returns; that result.

        optional   fields that some servers do not know: once a refusal has named one, it is sent by its older name,
                   or left out
        files      PNG files: a form is sent, not JSON
        Raises SimulatorError.
        """
        failures, waits, start = 0, 0, time.monotonic()
        while True:
            self._wait_for_rate_limit()
            sent = self._known(fields)
            try:
                if files is None:
                    return self._try(json.dumps(sent).encode(), "application/json", read)
                return self._try(*multipart(sent, files), read)
            except Failure as error:
                failure = error
            problem = self._without_key(failure.problem)
            unknown = [name for name in optional if name in sent and mentions(problem, name)]
            if failure.status in (400, 422) and unknown:
                self.dropped.update(unknown)
                for name in unknown:
                    older = OLDER_NAMES.get(name)
                    then = f"sent as {older}" if older else "left out"
                    say(f"{self.url} takes no {name}: {then} from now on.")
                continue
            limited = failure.status == 429 and time.monotonic() - start < self.patience
            failures += not limited
            if failure.final or failures >= self.tries:
                tries = f" (tries: {failures})" if failures > 1 else ""
                sentence = f"{self.url} {problem}{tries}".rstrip(".")
                raise SimulatorError(f"{sentence}.", failure.down)
            wait = self._seconds_to_wait(failure, waits)
            waits += 1
            if limited:
                self._pause_all(wait)
            else:
                time.sleep(wait)

    def _known(self, fields):
        """The fields that this server knows, by the names that it knows."""
        sent = {}
        for name, value in fields.items():
            name = OLDER_NAMES.get(name) if name in self.dropped else name
            if name:
                sent[name] = value
        return sent

    def _try(self, body, content_type, read):
        """One request -> what `read` makes of its answer. Raises Failure."""
        try:
            status, headers, answer = self._send(body, content_type)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise Failure(f"could not be reached ({reason})") from None
        if not 200 <= status < 300:
            # an empty purse is told as a rate limit too, but no wait will fill it
            final = (status < 500 and status not in RETRIED) or b"insufficient_quota" in answer
            raise Failure(
                f"answered {status}: {sentence_of(answer)}",
                status,
                seconds_of(headers.get("Retry-After")),
                final,
                down=not final or status in SERVER_WIDE or status < 400,
            )
        try:
            result = read(json.loads(without_keys(answer.decode("utf-8-sig"))))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"gave an answer that cannot be read ({type(error).__name__}: {error})"
            raise Failure(problem, down=False) from None
        self.served = True
        return result

    def _send(self, body, content_type):
        """-> (status, headers, body), whatever the status; OSError if there is no whole answer in time.

        A redirect, which would carry the key to another host, is an answer like any other.
        """
        headers = {"Content-Type": content_type, "User-Agent": "astra"}
        key = self._key() if self.private else ""
        if not re.fullmatch(r"[!-~]*", key):  # http.client's own error would print it
            raise SimulatorError(
                f"The key in {self.key_from_env} holds characters that no key has.", down=True
            )
        if key:
            headers["Authorization"] = f"Bearer {key}"
        parts = urlsplit(self.url)
        connection = self.kind(parts.netloc, timeout=self.timeout)
        with Watchdog(self.timeout) as connection.watchdog, contextlib.closing(connection):
            connection.request("POST", parts.path, body, headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER + 1)
        if len(answer) > MAX_ANSWER:
            raise OSError(f"its answer is longer than {MAX_ANSWER:,} bytes")
        return response.status, response.headers, answer

    def _seconds_to_wait(self, failure, waits):
        """As long as the server asks for, else doubled with every wait so far and varied."""
        if failure.retry_after is not None:
            return min(self.longest_wait, failure.retry_after)
        doubled = self.backoff * 2 ** min(waits, 30)
        return min(self.longest_wait, doubled) * self.jitter.uniform(0.5, 1)

    def _wait_for_rate_limit(self):
        while (left := self.resume_at - time.monotonic()) > 0:
            time.sleep(left * self.jitter.uniform(1, 1.1))

    def _pause_all(self, seconds):
        """A rate limit is the limit of all: nobody asks until it is over."""
        with self.lock:
            now = time.monotonic()
            if self.resume_at <= now:
                say(f"{self.url} limits the rate: waiting for {seconds:.0f} s.")
            self.resume_at = max(self.resume_at, now + seconds)

    def _key(self):
        return os.environ.get(self.key_from_env, "").strip()

    def _without_key(self, text):
        """What a server said, on one line, cut short, and without our key if it repeats it."""
        text = " ".join(without_keys(text).split())
        return text if len(text) <= 500 else text[:500] + " ..."


def multipart(fields: dict, files: list[bytes]) -> tuple[bytes, str]:
    """Fields and PNG files as the body of a form -> (body, content type)."""
    boundary = uuid.uuid4().hex
    start = f"--{boundary}\r\nContent-Disposition: form-data; name="
    chunks = []
    for name, value in fields.items():
        chunks.append(f'{start}"{name}"\r\n\r\n{value}\r\n'.encode())
    for number, file in enumerate(files, 1):
        head = f'{start}"image[]"; filename="image_{number}.png"\r\nContent-Type: image/png\r\n\r\n'
        chunks += [head.encode(), file, b"\r\n"]
    chunks.append(f"--{boundary}--\r\n".encode())
    return b"".join(chunks), f"multipart/form-data; boundary={boundary}"


def mentions(text: str, name: str) -> bool:
    """Is the name one of the text's words?"""
    return re.search(rf"\b{name}\b", text) is not None


def sentence_of(body: bytes) -> str:
    """What an error's body says, in OpenAI's form (error.message), FastAPI's (detail), Google's (a list) or as text."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        answer = answer[0] if isinstance(answer, list) else answer
        error = answer.get("error") or answer.get("detail") or answer.get("message") or text
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError, RecursionError):
        return text or "nothing"


def seconds_of(retry_after: str | None) -> float | None:
    """The header Retry-After as a number of seconds; None if there is none to read."""
    try:
        seconds = float(retry_after)
    except (TypeError, ValueError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# ---- many requests --------------------------------------------------------------------------------------------------


def in_threads(function: Callable, items: list, threads: int) -> list:
    """[function(item)], in order, several at a time; a SimulatorError stands in the place of what it failed to give.

    Once a server is down, what has not begun is not begun. The threads are daemons: Ctrl-C waits for none of them.
    """
    down = []

    def attempt(item):
        """function(item), or the error that it ended with."""
        if down:
            return down[0]
        try:
            return function(item)
        except SimulatorError as error:
            if error.down:
                down.append(error)
            return error

    with ThreadPool(max(1, min(threads, len(items)))) as pool:
        return pool.map(attempt, items, chunksize=1)


def raise_if_down(endpoint: Endpoint, results: list) -> None:
    """Raise the first SimulatorError among results that is more than one request's own: the server is down.

    A server that has refused all that it was ever asked counts as down too: a wrong model name, most likely.
    """
    failures = [result for result in results if isinstance(result, SimulatorError)]
    for error in failures:
        error.down |= not endpoint.served
    for error in failures:
        if error.down:
            raise SimulatorError(str(error), True, results)
