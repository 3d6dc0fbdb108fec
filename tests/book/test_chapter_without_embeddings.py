"""Chapter 6 without its data file: the surrogate stands in, the figures say so, no claim about the text is checked."""

import jax
import nbformat
import pytest

from scanrnn import claims, embeddings, figures
from tools.project import here

LAST = "fig-forward"  # the last figure that shows live measurements on the inputs of the chapter's start


def execute(sources: list[str], shown: dict[str, str]) -> None:
    """As a notebook does it: in single precision, with JAX's usual rules of promotion."""
    names: dict = {}
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for source in sources:
            exec(source, names)
            if LAST in shown:
                return


@pytest.mark.slow
def test_the_chapter_falls_back_and_says_so(monkeypatch):
    cells = nbformat.read(here().book / "06_deep_networks.ipynb", as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"][1:]
    shown, checked = {}, []

    def show(fig, *, name, caption, alt):
        titles = [axes.get_title() for axes in fig.axes]
        shown[name] = " ".join([caption, *titles])

    monkeypatch.setattr(embeddings, "_FILE", "data/no-such-file.npz")
    monkeypatch.setattr(figures, "show", show)
    monkeypatch.setattr(claims, "check", lambda name, *_: checked.append(name))
    with pytest.warns(RuntimeWarning, match="a surrogate stands in for the text embeddings"):
        execute(sources, shown)
    assert set(shown) == {"fig-text-correlation", LAST}
    assert all("surrogate (no embedding file)" in words for words in shown.values())
    assert not [name for name in checked if name.startswith("c6-text")]
