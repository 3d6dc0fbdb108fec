"""Sphinx extension: the library's docstrings are Markdown with $math$, and its types are named in short."""

import re

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class MarkdownDirective(SphinxDirective):
    """Parses its content as Markdown, whatever the page around it is written in."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def _wrap(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = [".. markdown-docstring::", "", *(f"   {line}" for line in lines), ""] if any(lines) else []


def _shorten(app, what, name, obj, options, signature: str | None, returns: str | None):
    return tuple(text and re.sub(r"\b(jaxlib\._jax|jaxtyping|numpy)\.", "", text) for text in (signature, returns))


def setup(app: Sphinx) -> dict:
    app.add_directive("markdown-docstring", MarkdownDirective)
    app.connect("autodoc-process-docstring", _wrap)
    app.connect("autodoc-process-signature", _shorten)
    return {"version": "1", "parallel_read_safe": True}
