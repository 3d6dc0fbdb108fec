from pathlib import Path

import pytest

from scanrnn import _resources


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty tree in which the library seems to lie at `lib/scanrnn`."""
    package = tmp_path / "lib" / "scanrnn"
    package.mkdir(parents=True)
    monkeypatch.setattr(_resources, "_PACKAGE", package)
    return tmp_path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_this_checkout_is_found():
    assert _resources.find("claims.toml") == Path(__file__).parents[2] / "book" / "claims.toml"


def test_the_checkout_comes_before_the_package(root):
    packaged = write(root / "lib/scanrnn/_data/claims.toml")
    assert _resources.find("claims.toml") == packaged
    checkout = write(root / "book/claims.toml")
    assert _resources.find("claims.toml") == checkout


def test_what_the_checkout_lacks_comes_from_the_package(root):
    write(root / "book/claims.toml")
    packaged = write(root / "lib/scanrnn/_data/results/zo24-fig5.csv")
    assert _resources.find("results/zo24-fig5.csv") == packaged
    checkout = write(root / "book/results/zo24-fig5.csv")
    assert _resources.find("results/zo24-fig5.csv") == checkout


def test_a_folder_that_happens_to_be_called_book_is_not_the_checkout(root):
    write(root / "book/results/a.csv")  # without claims.toml
    packaged = write(root / "lib/scanrnn/_data/results/a.csv")
    assert _resources.find("results/a.csv") == packaged


def test_installed_beside_a_book_is_not_a_checkout(root, monkeypatch):
    write(root / "book/claims.toml")
    packaged = write(root / "site-packages/scanrnn/_data/claims.toml")
    monkeypatch.setattr(_resources, "_PACKAGE", root / "site-packages/scanrnn")
    assert _resources.find("claims.toml") == packaged


def test_a_missing_file_is_named_with_both_places_and_the_remedy(root):
    write(root / "book/claims.toml")
    with pytest.raises(FileNotFoundError) as error:
        _resources.find("results/none.csv")
    places = [root / "book/results/none.csv", root / "lib/scanrnn/_data/results/none.csv"]
    for part in ["'results/none.csv'", *map(str, places), "git checkout", "install scanrnn again"]:
        assert part in str(error.value)


def test_a_folder_is_not_a_file(root):
    write(root / "book/claims.toml")
    (root / "book/results").mkdir()
    with pytest.raises(FileNotFoundError):
        _resources.find("results")
