"""Where the files that travel with the library are: in the checkout, or inside the installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def find(name: str) -> Path:
    """The path of `claims.toml`, `results/<file>` or a data file, named relative to `book/`.

    The checkout comes first, so that an edited file is the one that is read; it is recognised by its own files
    (`lib/scanrnn/` with `book/claims.toml` beside `lib/`). Then comes the copy that the wheel carries.

    **Raises** `FileNotFoundError` naming the file and both places, if it is in neither.
    """
    book, packaged = _PACKAGE.parents[1] / "book", _PACKAGE / "_data"
    is_checkout = _PACKAGE.parent.name == "lib" and (book / "claims.toml").is_file()
    for folder in [book, packaged] if is_checkout else [packaged]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{name!r} is neither in the checkout ({book / name}) nor in the installed package ({packaged / name}). "
        f"In a checkout, restore it with `git checkout -- book/{name}`; elsewhere, install scanrnn again."
    )
