"""The built pages in a browser: wide and narrow, light and dark."""

import functools
import http.server
import os
import shutil
import threading

import pytest

from tools.project import here

sync_api = pytest.importorskip("playwright.sync_api")

PAGES = [f"{page}.html" for page in here().pages()]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Elements that stick out to the right without being inside something that scrolls: what an overflow is made of.
STICKING_OUT = """() => {
  const width = document.documentElement.clientWidth, scrolls = e =>
    e && e !== document.body && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
  return [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement) && !scrolls(e))
    .map(e => e.outerHTML.slice(0, 120));
}"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves without a line of log per request."""

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address(html):
    """The site on a port of the loopback interface."""
    handler = functools.partial(QuietHandler, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = "no Chromium on the PATH: `make browser` installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


def visit(browser, url: str, width: int, theme: str):
    """The page once it is still, all it requested, and all it complained about."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda response: complaints.append(response.url) if response.status >= 400 else None)
    page.goto(url)
    page.wait_for_load_state("networkidle")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("() => MathJax.startup.promise")
    return page, requests, complaints


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page(browser, address, page, width, theme):
    tab, requests, complaints = visit(browser, f"{address}/{page}", width, theme)
    try:
        assert not [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        assert not complaints
        assert tab.locator("html").get_attribute("data-theme") == theme
        assert tab.locator("mjx-merror").count() == 0
        assert tab.locator(".math").count() == tab.locator(".math mjx-container").count()
        assert tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)") == []
        overflow = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, tab.evaluate(STICKING_OUT)
        if width == 1280:
            search = tab.locator("input[type=search], .search-button-field, .search-button__button")
            assert sum(search.nth(i).is_visible() for i in range(search.count())) == 1
    finally:
        tab.context.close()


def test_the_search_finds_a_word_of_a_chapter(browser, address):
    tab, _, complaints = visit(browser, f"{address}/search.html?q=gradient", 1280, "light")
    tab.wait_for_selector("#search-results li a")
    assert not complaints
    tab.context.close()


def test_figures_keep_within_a_phone_and_turn_dark_with_the_theme(browser, address):
    chapter = f"{address}/book/{here().notebooks()[0].stem}.html"
    for theme, inverted in (("light", False), ("dark", True)):
        tab, _, _ = visit(browser, chapter, 390, theme)
        image = tab.locator(".cell_output figure img").first
        assert ("invert" in image.evaluate("e => getComputedStyle(e).filter")) == inverted
        assert image.evaluate("e => e.getBoundingClientRect().width") <= 390
        tab.context.close()
