"""The tests run offline, on one thread: quick, and with the same numbers everywhere. Markers stand in pyproject.toml."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
