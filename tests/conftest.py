"""Settings that must be in place before NumPy or JAX is imported by any test."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its pool fights XLA's inside QR: 7 to 20 times slower
