"""The tests run offline, on one thread: quick, and with the same numbers everywhere. Markers stand in pyproject.toml."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402
from flux import NARROW  # noqa: E402

from lib.bagel_files import FluxLatents  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def narrow_autoencoder():
    """FLUX's own takes 335 MB."""
    whole = FluxLatents.sizes
    FluxLatents.sizes = NARROW
    yield
    FluxLatents.sizes = whole
