"""A server for tests of clients that is slow, fails and talks nonsense on demand."""

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUICK = {"timeout": 5.0, "tries": 3, "backoff": 0.01, "longest_wait": 0.05, "patience": 5.0}


class FakeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = {"path": self.path, "headers": dict(self.headers), "body": body}
        act = self.server.fake.next_act(request)
        answer = act(request, self) if callable(act) else act
        if answer is None:
            return
        status, content, headers = (*answer, {})[:3]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    do_GET = do_POST

    def log_message(self, *args):
        pass


class FakeServer(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, *args):
        pass  # clients that hang up


class Fake:
    """`with Fake(act, act, …) as fake`: each request meets the next act, and the last one again and again.

    act   (status, content) or (status, content, headers), or a function of the request and the handler that gives one
    """

    def __init__(self, *acts):
        self.acts = list(acts)
        self.requests = []
        self.times = []
        self.lock = threading.Lock()
        self.server = FakeServer(("127.0.0.1", 0), FakeHandler)
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def next_act(self, request):
        with self.lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            return self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


# ---- acts -----------------------------------------------------------------------------------------------------------


def title(act):
    """Of an act, as the name of a test."""
    return act.__name__ if callable(act) else str(act)[:50]


def slow(request, handler):
    time.sleep(0.8)


def dribble(request, handler):
    """A byte now and then, so that no single read ever times out."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def reset(request, handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def refuses(sentence, status=400):
    """A refusal in OpenAI's form."""
    return status, {"error": {"message": sentence}}


def says(content, *calls, finish="stop", **more):
    """An answer of a chat server; a call is the text of its arguments."""
    tool_calls = []
    for k, arguments in enumerate(calls):
        function = {"name": "world_simulator_tool", "arguments": arguments}
        tool_calls.append({"id": f"call_{k}", "type": "function", "function": function})
    message = {"role": "assistant", "content": content, "refusal": None, "tool_calls": tool_calls}
    choice = {"index": 0, "message": message | more, "finish_reason": finish}
    return 200, {"choices": [choice]}
