"""Headless Chromium for the tests of the page: one for all, a fresh profile for each."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.builders import FLAGS
from tests.server.conftest import folder

__all__ = ["folder"]

CHROMIUM = shutil.which("chromium")
PATIENCE = 20_000  # milliseconds until a test gives up on something of the page


@pytest.fixture(scope="package")  # playwright runs a loop in this thread: tests elsewhere need their own
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page without a past. What goes wrong in its scripts, or its policy refuses, fails the test."""
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None
    )
    yield page
    context.close()
    assert not faults
