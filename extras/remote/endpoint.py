"""
Requests to a server that may be slow, busy, broken or gone: time-outs, retries, rate limits, and one kind of error.

Tried again, after waits that double: time-outs, lost connections, 429, 5xx, and answers that cannot be read. What else
a server refuses is final and reported in its own words. One failure never costs what the rest of a batch has given:
see SimulatorError. A key is read from the environment for each request, kept nowhere, and cut out of what a server says.
"""

import collections
import http.client
import json
import math
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from lib.common import say
from lib.simulators import SimulatorError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_ANSWER = 2**26  # bytes of one answer
RETRIED = (408, 409, 425, 429)  # and 5xx
SERVER_WIDE = (
    401,
    402,
    403,
    404,
    405,
    429,
)  # refusals that every request would meet: a wrong key, no money


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host: it is an answer like any other, and final."""

    def redirect_request(self, *args):
        return None


class Endpoint:
    """One address, its key, and the patience that all its requests share.

    url, path       such as http://127.0.0.1:8000 or https://host/v1, and /images/edits
    key_from_env    name of the environment variable that holds the key, if there is one
    timeout         seconds for one whole answer; tries: how often a request may fail
    backoff         seconds before the second try, doubled for each further one, up to longest_wait, which also caps
                    what a server asks for by Retry-After
    patience        seconds for which a request bears with a rate limit (429), which is no failure and pauses all
    """

    def __init__(
        self,
        url,
        path,
        key_from_env=None,
        timeout=600.0,
        tries=6,
        backoff=1.0,
        longest_wait=60.0,
        patience=1800.0,
    ):
        parts = urlsplit(url)
        place = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?", parts.netloc)
        if parts.scheme not in ("http", "https") or not place or parts.query:
            raise ValueError(
                "A URL reads http://host:port or https://host/v1, without a password or a query: those "
                "would be written to logs. A key belongs in the environment."
            )
        base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
        self.url = base if base.endswith(path) else base + path
        self.key_from_env, self.timeout, self.tries = key_from_env, timeout, tries
        self.backoff, self.longest_wait, self.patience = backoff, longest_wait, patience
        near = parts.hostname in LOOPBACK
        self.opener = urllib.request.build_opener(
            NoRedirect, *([urllib.request.ProxyHandler({})] if near else [])
        )
        self.private = near or parts.scheme == "https"
        if self._key() and not self.private:
            say(
                f"The key in {key_from_env} is not sent to {self.url}: it would travel unencrypted."
            )
        self.served = False  # has it ever given an answer?
        self.dropped, self.resume_at, self.lock = set(), 0.0, threading.Lock()
        self.jitter = random.Random()  # not the global one, which an experiment may have seeded

    def ask(self, fields, encode, read, optional=()):
        """Send fields, as encode(fields) -> (body, content type), until read(the answer's JSON) returns; that result.

        optional   fields that some servers do not know: left out from now on if a refusal names one
        Raises SimulatorError.
        """
        failures, waits, start = 0, 0, time.monotonic()
        while True:
            while (left := self.resume_at - time.monotonic()) > 0:
                time.sleep(left * self.jitter.uniform(1, 1.1))
            sent = {name: value for name, value in fields.items() if name not in self.dropped}
            status, wait, final, down = None, None, False, True
            try:
                status, headers, body = self._send(*encode(sent))
            except (OSError, http.client.HTTPException) as error:
                problem = f"could not be reached ({getattr(error, 'reason', None) or error or type(error).__name__})"
            else:
                if 200 <= status < 300:
                    try:
                        result = read(json.loads(body))
                        self.served = True
                        return result
                    except (
                        ValueError,
                        LookupError,
                        TypeError,
                        AttributeError,
                        RecursionError,
                    ) as error:
                        problem, down = (
                            f"gave an answer that cannot be read ({type(error).__name__}: {error})",
                            False,
                        )
                else:
                    problem, wait = (
                        f"answered {status}: {sentence_of(body)}",
                        seconds_of(headers.get("Retry-After")),
                    )
                    # an empty purse is told as a rate limit too, but no wait will fill it
                    final = status < 500 and status not in RETRIED or b"insufficient_quota" in body
                    down = not final or status in SERVER_WIDE or status < 400
            problem = self._without_key(problem)
            named = [
                name for name in optional if name in sent and re.search(rf"\b{name}\b", problem)
            ]
            if status in (400, 422) and named:
                self.dropped.update(named)
                say(f"{self.url} takes no {' and no '.join(named)}: left out from now on.")
                continue
            limited = status == 429 and time.monotonic() - start < self.patience
            failures += not limited
            if final or failures >= self.tries:
                raise SimulatorError(
                    f"{self.url} {problem}" + (f" (tries: {failures})" if failures > 1 else ""),
                    down,
                )
            doubled = min(
                self.longest_wait, self.backoff * 2 ** min(waits, 30)
            ) * self.jitter.uniform(0.5, 1)
            waits, wait = waits + 1, doubled if wait is None else min(self.longest_wait, wait)
            if limited:
                self._pause_all(wait)
            else:
                time.sleep(wait)

    def _pause_all(self, seconds):
        """A rate limit is the limit of all: nobody asks until it is over."""
        with self.lock:
            now = time.monotonic()
            if self.resume_at <= now:
                say(f"{self.url} limits the rate: waiting for {seconds:.0f} s.")
            self.resume_at = max(self.resume_at, now + seconds)

    def _send(self, body, content_type):
        """-> (status, headers, body), whatever the status; OSError if there is no whole answer in time."""
        deadline, key = time.monotonic() + self.timeout, self._key() if self.private else ""
        if not re.fullmatch(r"[!-~]*", key):  # http.client's own error would print it
            raise SimulatorError(
                f"The key in {self.key_from_env} holds characters that no key has.", down=True
            )
        headers = {"Content-Type": content_type, "User-Agent": "astra"}
        request = urllib.request.Request(
            self.url, body, headers | ({"Authorization": f"Bearer {key}"} if key else {})
        )
        try:
            response = self.opener.open(request, timeout=self.timeout)
        except (
            urllib.error.HTTPError
        ) as error:  # Python's word for any status but 2xx: an answer too
            response = error
        with response:
            answer = bytearray()
            while part := response.read1(2**16):
                answer += part
                if len(answer) > MAX_ANSWER:
                    raise OSError(f"its answer is longer than {MAX_ANSWER:,} bytes")
                if time.monotonic() > deadline:  # urllib's own time-out starts anew with every byte
                    raise TimeoutError("timed out")
        return response.status, response.headers, bytes(answer)

    def _key(self):
        return os.environ.get(self.key_from_env or "", "").strip()

    def _without_key(self, text):
        """What a server said, on one line, cut short, and without our key if it repeats it."""
        text = " ".join((text.replace(key, "[key]") if (key := self._key()) else text).split())
        return text if len(text) <= 500 else text[:500] + " ..."


def sentence_of(body):
    """What an error's body says, in OpenAI's form (error.message), FastAPI's (detail), Google's (a list) or as text."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        answer = answer[0] if isinstance(answer, list) else answer
        found = answer.get("error") or answer.get("detail") or answer.get("message") or text
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, AttributeError, RecursionError):
        return text or "nothing"


def seconds_of(retry_after):
    """The header Retry-After, a number of seconds or a date -> seconds from now; None if there is none to read."""
    try:
        seconds = float(retry_after)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def in_threads(function, items, threads):
    """[function(item)], in order, several at a time; a SimulatorError stands in the place of what it failed to give.

    Once a server is down, what has not begun is not begun. The threads are daemons: Ctrl-C waits for none of them.
    """
    results, waiting, errors = [None] * len(items), collections.deque(enumerate(items)), []

    def work():
        """Take one item after the other until none waits."""
        while True:
            try:
                place, item = waiting.popleft()
            except IndexError:
                return
            try:
                results[place] = function(item)
            except SimulatorError as error:
                results[place] = error
                if error.down:
                    waiting.clear()
            except Exception as error:  # a slip of ours: the caller shall see it
                errors.append(error)
                waiting.clear()

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    down = next(
        (result for result in results if isinstance(result, SimulatorError) and result.down), None
    )
    return [down if result is None else result for result in results]


def check(endpoint, results):
    """Raise the first SimulatorError among results that is more than one request's own: the server is down.

    A server that has refused all that it was ever asked counts as down too: a wrong model name, most likely.
    """
    failed = [result for result in results if isinstance(result, SimulatorError)]
    for error in failed:
        error.down |= not endpoint.served
    if down := [error for error in failed if error.down]:
        raise SimulatorError(str(down[0]), True, results)
