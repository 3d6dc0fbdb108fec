"""Settings that must be in place before NumPy or JAX is imported by any test."""

import os
import sys

import pytest
from hypothesis import settings

# In CI the same cases every time: a change is judged by what it changes. Elsewhere the search goes on.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool fights XLA's inside QR: 7 to 20 times slower


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Forget, after each module, what JAX compiled for it.

    Every program keeps a few of the 65,530 memory maps that Linux allows a process; 137 tests of flossing alone left
    16,700 of them in one. Before this fixture a worker that had run a thousand tests died in native code, in a test
    that passes by itself.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
