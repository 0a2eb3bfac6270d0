"""A simulator behind a URL: the same views as in the process, batches, bounds, and refusals in sentences."""

import base64
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import pytest
import torch
from fake_server import QUICK
from mirror import Mirror
from PIL import Image

from extras.remote.client import RemoteSimulator, png
from extras.remote.endpoint import multipart
from extras.remote.serve import PATH, Server, read_form, serve
from extras.remote.serve import main as command
from lib.geometry import Motion, Query
from lib.images import read
from lib.simulators import SimulatorError, instruction
from world_model import WorldModel

SENTENCE = "Base on the viewpoint of Image-1, turn left 30 degrees."


def picture(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class SlowMirror(Mirror):
    """A Mirror that takes `seconds` and waits until it `may`; it fails where the seed is 13."""

    def __init__(self, seconds=0.0, may=None):
        super().__init__()
        self.seconds = seconds
        self.may = may

    def imagine(self, queries):
        views = super().imagine(queries)
        time.sleep(self.seconds)
        if self.may:
            self.may.wait(60)
        if any(query.seed == 13 for query in queries):
            raise RuntimeError("a bad day")
        return views


class running:
    """`with running(model, **limits) as server`: a server on a free port, in a thread."""

    def __init__(self, model, **limits):
        self.server = Server(model, 0, **limits)
        self.server.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self.server

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def send(
    server,
    body=b"",
    content_type="multipart/form-data; boundary=x",
    method="POST",
    path=PATH,
    **headers,
):
    """-> (status, what the answer's JSON says, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body, {"Content-Type": content_type, **headers})
    response = connection.getresponse()
    content = json.loads(response.read())
    return response.status, content.get("error", {}).get("message", content), response.headers


def order(files=None, **fields):
    """The form of a good request, with changes; a field that is None is left out."""
    fields = {
        name: value
        for name, value in ({"prompt": SENTENCE, "seed": 7} | fields).items()
        if value is not None
    }
    return multipart(fields, [png(picture(1))] if files is None else files)


def test_a_remote_view_is_the_local_view():
    """Bit for bit: several sizes and numbers of images, asked for at once, so that they meet in batches."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = WorldModel.tiny()
    queries = [
        Query(
            [picture(10 * k + i, *((32, 32) if k % 3 else (24, 40))) for i in range(1 + k % 4)],
            1 + k % 4,
            instruction(Motion("dangle", -15.0 * (k + 1))),
            1000 + k,
        )
        for k in range(5)
    ]
    local = model.imagine(queries)
    with running(model) as server:
        remote = RemoteSimulator(server.url).imagine(queries)
    torch.set_num_threads(before)
    assert all((here == there).all() for here, there in zip(local, remote, strict=True))


def test_a_video_gives_the_view_that_it_gives_here():
    """Of 40 images only some are sent; the model is shown the same ones."""
    model, images = WorldModel.tiny(), [picture(k) for k in range(40)]
    queries = [Query(images, n, instruction(Motion("dangle", -45.0)), n) for n in (1, 20, 40)]
    with running(model) as server:
        remote = RemoteSimulator(server.url).imagine(queries)
    for here, there, query in zip(model.imagine(queries), remote, queries, strict=True):
        assert np.abs(here.astype(int) - there).max() <= 1, query.reference  # batches may differ


def test_requests_that_wait_are_imagined_together():
    model = SlowMirror(seconds=0.1)
    queries = [Query([picture(k)], 1, SENTENCE, k + 100) for k in range(9)]
    with running(model, max_batch=4) as server:
        views = RemoteSimulator(server.url, **QUICK).imagine(queries)
    assert all(
        (view == query.images[0][:, ::-1]).all() for view, query in zip(views, queries, strict=True)
    )
    assert max(map(len, model.batches)) == 4 and len(model.batches) <= 6


def test_one_bad_query_costs_the_others_of_its_batch_nothing_and_the_server_lives(capfd):
    model = SlowMirror(seconds=0.02)
    with running(model, wait_ms=100) as server:
        simulator = RemoteSimulator(server.url, **QUICK | {"tries": 1})
        with pytest.raises(
            SimulatorError, match="500: The simulator failed: RuntimeError: a bad day"
        ) as error:
            simulator.imagine([Query([picture(k)], 1, SENTENCE, 10 + k) for k in range(6)])
        assert [isinstance(view, SimulatorError) for view in error.value.results] == [
            k == 3 for k in range(6)
        ]
        assert max(map(len, model.batches)) > 1
        assert simulator.imagine([Query([picture(0)], 1, SENTENCE, 5)])[0].shape == (32, 32, 3)
    assert "a bad day" in capfd.readouterr().err  # whoever runs the server sees where


BOMB = bytearray(png(np.zeros((1, 1, 3), np.uint8)))
BOMB[16:24] = (60_000).to_bytes(4, "big") * 2


@pytest.mark.parametrize(
    "status, sentence, request_",
    [
        (400, "cannot read the instruction ''", order(prompt=None)),
        (400, "cannot read the instruction 'make it nice'", order(prompt="make it nice")),
        (
            400,
            "cannot read the motion",
            order(prompt="Base on the viewpoint of Image-1, fly 3 meters."),
        ),
        (400, "there is no Image-2", order(prompt=SENTENCE.replace("-1", "-2"))),
        (400, "there is no Image-0", order(prompt=SENTENCE.replace("-1", "-0"))),
        (400, "0 images", order(files=[])),
        (400, "4 images", order(files=[png(picture(1))] * 4)),
        (400, "seed", order(seed="-1")),
        (400, "seed", order(seed=2**63)),
        (400, "seed", order(seed="seven")),
        (400, "n can only be 1", order(n=2)),
        (400, "size can only be auto", order(size="1024x1024")),
        (400, "response_format can only be b64_json", order(response_format="url")),
        (400, "masks", order(mask="x")),
        (
            400,
            "Image-1: The picture cannot be read (it is no picture).",
            order(files=[b"%!PS-Adobe-3.0 EPSF-3.0\n"]),
        ),
        (
            400,
            "Image-2: The picture cannot be read",
            order(files=[png(picture(1)), png(picture(2))[:200]]),
        ),
        (
            400,
            "Image-1: The picture cannot be read (64 x 65 pixels are more than 4,096)",
            order(files=[png(picture(1, 65, 64))]),
        ),
        (
            400,
            "Image-2: The picture cannot be read (48 x 48 pixels are more than 1,792)",
            order(files=[png(picture(1, 48, 48))] * 2),
        ),
        (400, "cannot read the instruction 'aaa", order(prompt="a" * 30_000)),
        (400, "picture", order(files=[bytes(BOMB)])),
        (415, "must be a form", (b"{}", "application/json")),
        (415, "must be a form", (b"", "")),
        (400, "has no end", (order()[0][:-20], order()[1])),
        (400, "has no end", (b"", "multipart/form-data; boundary=x")),
        (400, "has no name", (b"--x\r\n\r\nvalue\r\n--x--", "multipart/form-data; boundary=x")),
        (400, "has no end", (b"--x" + b"\r\n--x" * 100, "multipart/form-data; boundary=x")),
        (413, "the limit is 40,000", (b"0" * 40_001, "multipart/form-data; boundary=x")),
    ],
)
def test_a_bad_request_gets_a_sentence(status, sentence, request_):
    model = Mirror()
    with running(model, max_bytes=40_000, max_images=3, max_pixels=64 * 64) as server:
        found, words, _ = send(server, *request_)
    assert found == status and sentence in words and len(words) < 2000 and not model.batches


def test_other_paths_methods_and_missing_lengths():
    with running(Mirror()) as server:
        assert send(server, method="GET", path="/health")[:2] == (
            200,
            {"status": "ok", "waiting": 0},
        )
        assert (
            send(server, method="GET", path="/")[0]
            == send(server, *order(), path="/v1/chat/completions")[0]
            == 404
        )
        assert send(server, *order(), method="PUT")[:2] == (
            405,
            "Unsupported method ('PUT'). There are POST /v1/images/edits and GET /health, no more.",
        )
        with socket.create_connection(("127.0.0.1", server.server_port), 5) as raw:
            raw.sendall(
                f"POST {PATH} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
            )
            assert b" 411 " in raw.recv(1000)
        with socket.create_connection(("127.0.0.1", server.server_port), 5) as raw:
            raw.sendall(f"POST {PATH} HTTP/1.1\r\nContent-Length: 50\r\n\r\nhung up".encode())
        assert send(server, *order())[0] == 200


def test_a_request_that_is_much_too_long_is_answered_and_not_kept():
    with running(Mirror(), max_bytes=100_000) as server:
        assert send(server, b"0" * 390_000)[0] == 413


def test_too_many_waiting_requests_are_told_to_come_back():
    may = threading.Event()
    with running(SlowMirror(may=may), max_waiting=1) as server:
        first = threading.Thread(target=send, args=(server, *order()))
        first.start()
        while not server.model.batches:
            time.sleep(0.01)
        status, words, headers = send(server, *order())
        may.set()
        first.join()
        assert status == 429 and headers["Retry-After"] == "1" and "Too many" in words
        queries = [Query([picture(k)], 1, SENTENCE, k) for k in range(3)]
        views = RemoteSimulator(server.url, **QUICK | {"tries": 1}).imagine(
            queries
        )  # the client knows how to wait
    assert len(views) == 3


def test_a_body_that_comes_slowly_holds_no_place():
    body, content_type = order()
    head = f"POST {PATH} HTTP/1.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    with running(Mirror(), max_waiting=1) as server:
        with socket.create_connection(("127.0.0.1", server.server_port), 5) as slow:
            slow.sendall(f"{head}\r\n\r\n".encode() + body[:50])
            time.sleep(0.1)  # it is being read
            assert send(server, *order())[0] == 200
            slow.sendall(body[50:])
            assert b" 200 " in slow.recv(1000)


def test_errors_have_the_form_of_openai():
    with running(Mirror()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        body, content_type = order(seed="seven")
        connection.request("POST", PATH, body, {"Content-Type": content_type})
        error = json.loads(connection.getresponse().read())["error"]
    sentence = error.pop("message")
    assert error == {"type": "invalid_request_error", "param": "seed", "code": None}
    assert sentence.startswith("seed must be")


def test_forms_of_other_clients_are_understood():
    """`image` as well as `image[]`, JPEG, fields that would change nothing, a quoted boundary, no seed."""
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(file, "jpeg")
    body, content_type = order(
        [file.getvalue()], seed=None, model="bagel", user="me", n=1, size="auto"
    )
    body = body.replace(b'name="image[]"', b"name=image")
    content_type = content_type.replace("boundary=", 'charset=utf-8; boundary="') + '"'
    with running(Mirror()) as server:
        status, content, _ = send(server, body, content_type)
        seeds = {
            query.seed
            for _ in range(2)
            if send(server, body, content_type)
            for query in server.model.batches[-1]
        }
    assert status == 200 and len(seeds) == 2  # another view each time
    assert (read(base64.b64decode(content["data"][0]["b64_json"])) == 90).all()


def test_a_form_is_read_exactly():
    values = [b"", b"\r\n", b"--", b"\r\n--", bytes(range(256)) * 3]
    body, content_type = multipart({"prompt": "Größe"}, values)
    assert read_form(body, content_type) == [
        ("prompt", "Größe".encode()),
        *(("image[]", value) for value in values),
    ]


def test_a_port_that_is_taken_is_a_sentence():
    with running(Mirror()) as server, pytest.raises(SystemExit, match="cannot be listened on"):
        serve(Mirror(), server.server_port)


def test_it_listens_to_this_machine_alone_and_ctrl_c_ends_it_in_a_sentence(monkeypatch, capsys):
    addresses = []

    def interrupted(server):
        addresses.append(server.server_address[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    serve(Mirror(), 0)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("The simulator answers at http://127.0.0.1:") and last.startswith(
        "Stopped."
    )
    serve(Mirror(), 0, host="0.0.0.0")
    assert "there is no password" in capsys.readouterr().out and addresses == [
        "127.0.0.1",
        "0.0.0.0",
    ]


def test_the_command_serves_a_saved_model_and_says_what_is_missing(monkeypatch, capsys, tmp_path):
    def interrupted(server):
        assert isinstance(server.model, WorldModel)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    WorldModel.tiny().save(tmp_path / "wm")
    command(["--model", str(tmp_path / "wm"), "--port", "0"])
    assert "The simulator answers at http://127.0.0.1:" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="`python train_wm.py` makes it"):
        command(["--port", "0"])
