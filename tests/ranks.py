"""Several processes for a test: a function of its module on gloo ranks, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def on_ranks(ranks, function, *arguments):
    """Run `function(*arguments)` on that many ranks, the arguments as strings; it leaves what it found in files."""
    code = f"import sys\nfrom {function.__module__} import {function.__name__}\n{function.__name__}(*sys.argv[1:])\n" \
           "from lib.common import leave\nleave()\n"
    script = Path(arguments[0]).parent / f"{function.__name__}_on_{ranks}_ranks.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run([*torchrun, str(script), *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:6000]
