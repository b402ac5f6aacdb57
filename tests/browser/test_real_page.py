"""The page with the real server and the packaged model: a text of 6,000 tokens, two plans, by keyboard."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.builders import TEXT, drop, real_server, tab_to

PATIENCE = 360_000  # milliseconds for a prompt, on a busy machine

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


def figures(lane: Locator) -> dict[str, float]:
    """The numbers of a lane by name: 38 for "38 %"."""
    names = lane.locator(".figures > div").evaluate_all("items => items.map(item => item.dataset.name)")
    values = lane.locator(".figures dd").all_inner_texts()
    numbers = (re.match(r"[\d.,]+", value) for value in values)
    return {name: float(n[0].replace(",", "")) for name, n in zip(names, numbers, strict=True) if n}


def test_a_long_text_is_answered_under_two_plans_by_keyboard_alone(page: Page) -> None:
    with real_server() as url:
        page.goto(url)
        expect(page.locator("#state")).to_have_text("Ready")
        drop(page, TEXT.name, TEXT.read_text())
        expect(page.locator("#count")).to_have_text(re.compile(r"^[56],\d{3} of 8,192 tokens$"))

        tab_to(page, "compare")
        page.keyboard.press("Space")
        page.keyboard.press("Tab")
        expect(page.locator("#other-plan")).to_have_value("dense")
        page.locator("summary").focus()
        page.keyboard.press("Enter")
        tab_to(page, "max-tokens")
        page.keyboard.type("24")  # what was there is selected
        tab_to(page, "question", "Shift+Tab")
        page.keyboard.type("What is the name of Mr. Bingley's friend, and what is he like?")
        page.keyboard.press("Enter")

        lanes = page.locator(".lane")
        for number, plan in enumerate(("minference-snapkv", "dense")):
            lane = lanes.nth(number)
            expect(lane.get_by_role("heading")).to_have_text(plan)
            reading = re.compile(r"^\d,\d{3} of [56],\d{3} tokens$")
            expect(lane.locator(".reading")).to_have_text(reading, timeout=PATIENCE)
            expect(lane.locator(".answer")).to_contain_text("Darcy", timeout=PATIENCE)
            expect(lane).to_have_class("lane", timeout=PATIENCE)  # and no longer running
        sparse, dense = figures(lanes.nth(0)), figures(lanes.nth(1))
        assert sparse["Read"] < 90 and dense["Read"] == 100
        assert sparse["KV kept"] < 20 and dense["KV kept"] == 100
        assert 90 < sparse["Recall"] <= 100 and "Recall" not in dense
        assert sparse["Memory"] < dense["Memory"] / 4
        for numbers in (sparse, dense):
            assert 0 < numbers["First token"] < numbers["Whole answer"] and numbers["Speed"] > 0
        expect(page.locator("#heat .cell")).to_have_count(4 * 30 * 3)  # layers x KV heads, read and kept

        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("radio", name="Auto").focus()
        for _ in range(2):
            page.keyboard.press("ArrowRight")
        expect(page.get_by_role("radio", name="Dark")).to_be_checked()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
