"""The built site, which `make test` builds before it comes here."""

from pathlib import Path

import pytest

from tools.project import here

PROJECT = here()
PAGES = [f"{page}.html" for page in PROJECT.pages()]


@pytest.fixture(scope="session")
def html() -> Path:
    """The folder of the built site."""
    missing = [page for page in PAGES if not (PROJECT.html / page).exists()]
    if missing:
        pytest.fail(f"the site lacks {missing}: run `make book` first")
    return PROJECT.html
