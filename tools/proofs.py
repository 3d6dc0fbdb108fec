"""Sphinx extension: a proof of class `dropdown` folds without JavaScript.

sphinx-proof gives its proofs no title bar, and the theme's toggle script, which looks for one, stops there: no box
after the first such proof would fold.
"""

from docutils import nodes
from sphinx.application import Sphinx

PREFIX = "Proof. "


def _fold(app: Sphinx, doctree: nodes.document) -> None:
    for proof in doctree.findall(nodes.admonition):
        if {"proof", "dropdown"} <= set(proof["classes"]):
            proof["classes"].remove("dropdown")
            _remove_prefix(proof)
            proof.insert(0, nodes.raw("", "<details><summary>Proof</summary>", format="html"))
            proof.append(nodes.raw("", "</details>", format="html"))


def _remove_prefix(proof: nodes.admonition) -> None:
    """The summary says it already."""
    first = next(proof.findall(nodes.Text))
    first.parent.replace(first, nodes.Text(first.astext().removeprefix(PREFIX)))


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", _fold)
    return {"version": "1", "parallel_read_safe": True}
