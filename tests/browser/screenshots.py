"""Pictures of the page for docs/images, of a real server: `python -m tests.browser.screenshots`."""

import shutil

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.builders import FLAGS, ROOT, TEXT, drop, real_server

FOLDER = ROOT / "docs" / "images"
QUESTION = "What is the name of Mr. Bingley's friend, and what is he like?"
PATIENCE = 600_000  # milliseconds


def main() -> None:
    """Ask one question under two plans, and take its picture in both colours."""
    FOLDER.mkdir(exist_ok=True)
    with real_server() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(url)
        answer(page)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=FOLDER / f"page-{scheme}.png", full_page=True)
        browser.close()


def answer(page: Page) -> None:
    expect(page.locator("#state")).to_have_text("Ready")
    drop(page, TEXT.name, TEXT.read_text())
    page.get_by_label("Compare with").check()
    page.locator("summary").click()
    page.locator("#max-tokens").fill("64")
    page.locator("summary").click()
    page.get_by_role("textbox", name="Question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator("#heat .map-row")).to_have_count(2, timeout=PATIENCE)
    expect(page.locator("#state")).to_have_text("Ready")


if __name__ == "__main__":
    main()
