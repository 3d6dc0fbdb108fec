# Makes this notebook run anywhere: in the checkout, on Binder, or alone on Colab.
import importlib.metadata as metadata
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: its threads would fight those of JAX
ADDRESS = "https://github.com/SET_ME/the-curse-of-memory"


def install_scanrnn():
    """Install the book's library beside the jax and numpy that are here, which must not move."""
    source = os.environ.get("SCANRNN_INSTALL") or f"git+{ADDRESS}"
    if "SET_ME" in source:
        raise RuntimeError("This copy of the book does not know its repository's address yet: get the book itself.")
    print(f"Installing scanrnn from {source} (about a minute) ...")
    with tempfile.TemporaryDirectory() as folder:
        constraints = os.path.join(folder, "constraints.txt")
        with open(constraints, "w") as file:
            for dist in metadata.distributions():
                if dist.name in ("jax", "jaxlib", "numpy"):
                    file.write(f"{dist.name}=={dist.version}\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints, source]
        if subprocess.run(command).returncode != 0:
            raise RuntimeError("pip could not install scanrnn (it says why above). Restart the runtime and try again.")


try:
    import scanrnn  # noqa: F401
except ModuleNotFoundError:
    install_scanrnn()

import jax

versions = f"Python {sys.version.split()[0]}, jax {jax.__version__} on {jax.devices()[0].platform}"
print(f"{versions}, scanrnn {metadata.version('scanrnn')}")
