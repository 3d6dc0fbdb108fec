"""The built pages as files: pictures, hosts, links, math, buttons."""

import pkgutil
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup, Tag

import scanrnn
from tools.address import current
from tools.project import here

PROJECT = here()
PAGES = [f"{page}.html" for page in PROJECT.pages()]
CHAPTERS = [f"book/{notebook.stem}.html" for notebook in PROJECT.notebooks()]
ADDRESS = current(PROJECT.root)
each_page = pytest.mark.parametrize("page", PAGES)
each_chapter = pytest.mark.parametrize("page", CHAPTERS)

# Attributes by which a browser fetches something unasked; <a href> is for the reader to follow.
FETCHED = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "track": ["src"],
    "input": ["src"],
    "image": ["href", "xlink:href"],
    "use": ["href", "xlink:href"],
}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def attribute(tag: Tag, name: str) -> str:
    value = tag.get(name)
    return " ".join(value) if isinstance(value, list) else value or ""


def is_outside(reference: str) -> bool:
    return reference.startswith("//") or urlsplit(reference).scheme in ("http", "https", "ftp", "ws", "wss")


def fetched_by_styles(text: str) -> list[str]:
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)", text)
    return found + re.findall(r"@import\s+['\"]([^'\"]+)", text)


def fetched(page: BeautifulSoup) -> list[str]:
    tags = page.find_all(True)
    references = [attribute(tag, name) for tag in tags for name in FETCHED.get(tag.name, []) if tag.has_attr(name)]
    for link in page.find_all("link", href=True):
        if FETCHED_LINKS & set(attribute(link, "rel").split()):
            references.append(attribute(link, "href"))
    for style in page.find_all("style"):
        references += fetched_by_styles(style.get_text())
    for tag in page.find_all(style=True):
        references += fetched_by_styles(attribute(tag, "style"))
    return [part.split()[0] for reference in references for part in reference.split(", ") if part.strip()]


def test_no_page_fetches_from_another_host(html):
    outside = {
        str(path.relative_to(html)): found
        for path in sorted(html.rglob("*.html"))
        if (found := [reference for reference in fetched(soup(path)) if is_outside(reference)])
    }
    assert not outside


def test_no_style_sheet_fetches_from_another_host(html):
    for path in html.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not [reference for reference in fetched_by_styles(text) if is_outside(reference)], path


@each_page
def test_every_picture_has_an_alt_text(html, page):
    for image in soup(html / page).find_all("img"):
        alt = attribute(image, "alt").strip()
        assert alt, f"no alt text: {image}"
        assert not alt.endswith((".png", ".svg", ".jpeg", ".gif")), f"Sphinx made up an alt text: {image}"


@each_chapter
def test_computed_figures_say_their_finding_and_are_numbered(html, page):
    figures = soup(html / page).select(".cell_output figure")
    assert figures
    for figure in figures:
        (image,) = figure.find_all("img")
        alt = attribute(image, "alt")
        assert len(alt) >= 40, alt
        assert re.search(r"\d", alt), alt
        caption = figure.find("figcaption")
        assert caption is not None, alt
        assert re.match(r"Fig\. \d+\.\d+", caption.get_text(strip=True, separator=" ")), caption
    loose = [image for image in soup(html / page).select(".cell_output img") if image.find_parent("figure") is None]
    assert not loose, "pictures without caption: show them with figures.show"


@each_page
def test_links_and_their_anchors_resolve(html, page):
    broken = []
    for link in soup(html / page).find_all("a", href=True):
        reference = attribute(link, "href")
        target = urlsplit(urljoin(page, reference))
        if target.scheme or target.netloc or not reference.strip("#"):
            continue
        path = html / unquote(target.path)
        if not path.is_file() or (target.fragment and not has_anchor(path, unquote(target.fragment))):
            broken.append(reference)
    assert not broken


def has_anchor(path: Path, name: str) -> bool:
    page = soup(path)
    return page.find(id=name) is not None or page.find("a", attrs={"name": name}) is not None


@each_page
def test_no_markup_is_left_over(html, page):
    content = BeautifulSoup(str(soup(html / page).find("article")), "html.parser")
    for tag in content.select("pre, code, .math, script, style"):
        tag.decompose()
    text = content.get_text()
    assert "$" not in text
    assert ":::" not in text
    assert "{numref}" not in text
    assert "{eq}" not in text


@each_page
def test_no_cell_failed(html, page):
    text = soup(html / page).get_text()
    assert "CellExecutionError" not in text
    assert "Traceback (most recent call last)" not in text


@each_chapter
def test_chapters_have_math_and_executed_outputs(html, page):
    assert soup(html / page).select(".math")
    assert "✓ c" in soup(html / page).get_text()


@each_chapter
def test_launch_buttons_open_this_chapter(html, page):
    slug = ADDRESS.removeprefix("https://github.com/")
    notebook = page.removesuffix(".html") + ".ipynb"
    links = {attribute(link, "href") for link in soup(html / page).find_all("a", href=True)}
    assert f"https://colab.research.google.com/github/{slug}/blob/main/{notebook}" in links
    assert f"https://mybinder.org/v2/gh/{slug}/main?urlpath=lab/tree/{notebook}" in links


def test_the_front_page_leads_to_the_book(html):
    refresh = soup(html / "index.html").find("meta", attrs={"http-equiv": re.compile("refresh", re.IGNORECASE)})
    assert refresh is not None
    root = yaml.safe_load((PROJECT.root / "_toc.yml").read_text())["root"]
    assert f"{root}.html" in str(refresh["content"])


def test_every_claim_has_its_card(html):
    ids = {tag.get_text() for tag in soup(html / "book/reproduced.html").select(".claim code")}
    assert set(re.findall(r"^\[(.+)\]$", (PROJECT.book / "claims.toml").read_text(), re.MULTILINE)) <= ids


def test_every_module_of_the_library_is_documented(html):
    modules = {module.name for module in pkgutil.iter_modules(scanrnn.__path__) if not module.name.startswith("_")}
    listed = set(re.findall(r"automodule:: scanrnn\.(\w+)", (PROJECT.book / "api.md").read_text()))
    assert listed == modules
    assert soup(html / "book/api.html").select("dt.sig")
