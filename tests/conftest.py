"""Settings that must be in place before NumPy or JAX is imported by any test."""

import os

from hypothesis import settings

# In CI the same cases every time: a change is judged by what it changes. Elsewhere the search goes on.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool fights XLA's inside QR: 7 to 20 times slower
