"""Several processes for a test: a function on gloo ranks, forked from pytest, so that nothing is imported anew."""

import os
import signal
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

from lib.distributed import leave

PATIENCE = 300  # seconds; then all ranks are killed


def on_ranks(ranks, function, *arguments):
    """Run `function(*arguments)` on that many ranks, the arguments as strings; it leaves what it found in files.

    If one rank fails the others are killed, and what it said is the assertion's. The ranks see what is patched here.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    # The store's thread asks the resolver who connects. A child that is forked meanwhile inherits the resolver's lock and
    # waits for it for ever: so the store has answered before the first fork, and no rank connects before the last.
    store.set("forked", "")
    store.get("forked")
    start, go = os.pipe()
    told = [tempfile.TemporaryFile("w+", buffering=1) for _ in range(ranks)]
    sys.stdout.flush()  # or each child would write it once more
    sys.stderr.flush()
    children, codes, end = [], {}, time.monotonic() + PATIENCE
    try:
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(start, 1)
                be_rank(rank, ranks, store.port, told[rank], function, map(str, arguments))
            children.append(child)
        os.write(go, b"." * ranks)
        while len(codes) < ranks and not any(codes.values()) and time.monotonic() < end:
            time.sleep(0.02)
            for rank in set(range(ranks)) - codes.keys():
                done, status = os.waitpid(children[rank], os.WNOHANG)
                codes |= {rank: os.waitstatus_to_exitcode(status)} if done else {}
    finally:
        os.close(start)
        os.close(go)
        for rank, child in enumerate(children):
            if rank not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    wrong = [rank for rank in range(ranks) if codes.get(rank) != 0]
    words = [
        f"rank {rank} ended with {codes[rank]}:\n{said(told[rank])}"
        for rank in wrong
        if rank in codes
    ]
    assert not wrong, "\n".join(words) or f"ranks {wrong} were not done after {PATIENCE} s"


def be_rank(rank, ranks, port, told, function, arguments):
    """What a child does, as torchrun would start it, without a GPU; pytest's own end never comes in it."""
    code = 1
    try:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        sys.stdout = sys.stderr = told
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # the store is ours
        torch.cuda.is_available = lambda: False
        function(*arguments)
        leave()  # with a process group, this is the end
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        told.flush()
        os._exit(code)


def said(told):
    """The end of what a rank wrote."""
    told.seek(0)
    return told.read()[-6000:]
