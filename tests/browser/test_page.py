"""The page in a browser, before an engine that says what it is told: figures, stops, failures, keyboard."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Locator, Page, Route, ViewportSize, expect

from engine.errors import StepFailed
from engine.messages import Cost, FinishReason, HeadCosts, Submit, TokenOutput
from server.tokenizer import Tokenizer
from tests.browser.builders import drop
from tests.server.builders import FakeEngine, Script, Step, cost, http_server, then, until

ANSWER = "the quick brown fox jumps over the lazy dog"
HEADS = HeadCosts(((0.5, 1.0), (0.25, 0.75), (0.1, 0.2)), ((20, 8), (8, 4), (2, 1)))
PHONE: ViewportSize = {"width": 360, "height": 740}
Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def costs(plan: str) -> Cost:
    return cost(plan=plan, heads=HEADS, prefill_read_fraction=0.25 if plan == "sparse" else 1.0)


@pytest.fixture(scope="module")
def speak(tokenizer: Tokenizer) -> Callable[[str], Script]:
    """An engine that answers with these words after one chunk of the prompt."""

    def words(text: str) -> Script:
        first, *middle, last = tokenizer.encode(text, add_special_tokens=False)

        def script(submit: Submit) -> Sequence[Step]:
            name = submit.request_id
            return [
                TokenOutput(name, computed=64),
                TokenOutput(name, (first,), cost=costs(submit.plan)),
                *(TokenOutput(name, (token,)) for token in middle),
                TokenOutput(name, (last,), finish_reason=FinishReason.LENGTH),
            ]

        return script

    return words


@pytest.fixture(scope="module")
def served(speak: Callable[[str], Script], folder: Path) -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine(speak(ANSWER))
    engine.card = msgspec.structs.replace(engine.card, max_model_len=2048)
    with http_server(engine, folder) as url:
        yield engine, url


@pytest.fixture
def engine(served: tuple[FakeEngine, str], speak: Callable[[str], Script]) -> FakeEngine:
    """The engine as it was at first."""
    engine, _ = served
    engine.script, engine.is_ready, engine.death = speak(ANSWER), True, None
    engine.submitted.clear()
    engine.abort_heard.clear()
    return engine


@pytest.fixture
def url(served: tuple[FakeEngine, str], engine: FakeEngine) -> str:
    return served[1]


def opened(page: Page, url: str) -> Page:
    page.goto(url)
    expect(page.locator("#state")).to_have_attribute("data-kind", "good")
    return page


def ask(page: Page, question: str) -> Locator:
    """Ask, and the lanes that answer."""
    page.get_by_role("textbox", name="Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    return page.locator(".turn").last.locator(".lane")


def text_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Text", exact=True)


def figure(lane: Locator, name: str) -> Locator:
    return lane.locator(f'[data-name="{name}"] dd')


def test_two_plans_answer_beside_each_other_with_their_costs(page: Page, url: str) -> None:
    opened(page, url)
    page.get_by_label("Compare with").check()
    lanes = ask(page, "what does it do?")
    expect(lanes).to_have_count(2)
    for index, (plan, read) in enumerate({"sparse": "25 %", "dense": "100 %"}.items()):
        lane = lanes.nth(index)
        expect(lane.get_by_role("heading")).to_have_text(plan)
        expect(lane.locator(".answer")).to_have_text(ANSWER)
        expect(figure(lane, "Read")).to_have_text(read)
        expect(figure(lane, "KV kept")).to_have_text("50 %")
        expect(figure(lane, "Recall")).to_have_text("97 %")
        expect(figure(lane, "Cached")).to_have_text("4")
        expect(figure(lane, "First token")).to_have_text(re.compile(r"^\d+\.\d+ s$"))
        expect(figure(lane, "Speed")).to_have_text(re.compile("tok/s$"))
        expect(lane.locator(".lane-state")).to_have_text("Cut at the limit of the answer")
    left, right = lanes.nth(0).bounding_box(), lanes.nth(1).bounding_box()
    assert left and right and left["y"] == right["y"] and left["x"] + left["width"] < right["x"]


def test_the_heat_maps_show_each_layer_and_head(page: Page, url: str) -> None:
    opened(page, url)
    page.get_by_label("Compare with").check()
    ask(page, "what does it do?")
    expect(page.locator("#heat .map-row")).to_have_count(2)
    read = page.get_by_role("img", name="Read in prefill").first
    expect(read.locator(".cell")).to_have_count(6)
    shades = read.locator(".cell").evaluate_all("cells => cells.map(cell => getComputedStyle(cell).fill)")
    assert len(set(shades)) == 6, "different values have different colours"
    read.focus()
    for key, words in {
        "ArrowRight": "layer 2, head 1: 25 %",
        "ArrowDown": "layer 2, head 2: 75 %",
        "ArrowLeft": "layer 1, head 2: 100 %",
        "ArrowUp": "layer 1, head 1: 50 %",
    }.items():
        page.keyboard.press(key)
        expect(page.locator("#heat output").first).to_have_text(words)


def test_turns_carry_the_text_once_and_each_plans_own_answers(
    page: Page, url: str, engine: FakeEngine, tokenizer: Tokenizer, speak: Callable[[str], Script]
) -> None:
    opened(page, url)
    text_of(page).fill("A long text.")
    page.get_by_label("Compare with").check()
    engine.script = lambda submit: speak(f"by the {submit.plan} one")(submit)
    ask(page, "first question")
    expect(page.locator("body")).not_to_have_class(re.compile("asking"))
    ask(page, "second question")
    expect(page.locator(".turn")).to_have_count(2)
    until(lambda: len(engine.submitted) == 4)
    for submit in engine.submitted[2:]:
        prompt = tokenizer.decode(submit.tokens)
        assert prompt.count("A long text.\n\nfirst question") == 1
        assert prompt.index(f"by the {submit.plan} one") < prompt.index("second question")
    salts = [submit.cache_salt for submit in engine.submitted]
    assert salts[0] == salts[2] != salts[1] == salts[3], "the second plan shares nothing with the first"
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(text_of(page)).to_have_value("A long text.")


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_keeps_what_came_and_the_engine_hears_of_it(
    page: Page, url: str, engine: FakeEngine, speak: Callable[[str], Script], by: str
) -> None:
    opened(page, url)
    engine.script = then(speak("the fox"), None)
    lane = ask(page, "and?")
    expect(lane.locator(".answer")).to_have_text("the fox")
    expect(lane.locator(".answer")).to_have_attribute("aria-busy", "true")
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(lane.locator(".lane-state")).to_have_text("Stopped")
    expect(lane.locator(".answer")).to_have_text("the fox")
    assert engine.abort_heard.wait(20)
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_progress_of_the_prompt_is_shown(page: Page, url: str, engine: FakeEngine) -> None:
    opened(page, url)
    engine.script = lambda submit: [TokenOutput(submit.request_id, computed=16), None]
    lane = ask(page, "how far is it?")
    expect(lane.locator(".lane-state")).to_have_text("Reading the prompt")
    length = engine.submitted[-1].prompt_length
    expect(lane.locator(".reading")).to_have_text(f"16 of {length} tokens")
    bar = lane.get_by_role("progressbar", name="Prompt tokens computed")
    assert bar.evaluate("bar => bar.value / bar.max") == 16 / length
    page.keyboard.press("Escape")
    expect(bar).to_be_hidden()


def stream(route: Route, *deltas: dict[str, str], end: bytes = b"") -> None:
    """Answer with a stream of these deltas."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    body = b"".join(b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks) + end
    route.fulfill(status=200, body=body, content_type="text/event-stream")


def dropped_connection(route: Route) -> None:
    """A stream that ends in the middle, as when the server is killed behind a proxy."""
    stream(route, {"content": "the fox"})


def test_reasoning_stands_before_the_answer_and_is_not_sent_back(page: Page, url: str) -> None:
    opened(page, url)
    sent: list[Any] = []

    def think(route: Route) -> None:
        sent.append(route.request.post_data_json)
        stream(route, {"reasoning_content": "hm"}, {"content": "the fox"}, end=b"data: [DONE]\n\n")

    page.route("**/v1/chat/completions", think)
    lane = ask(page, "who?")
    expect(lane.locator(".thoughts")).to_have_text("hm")
    expect(lane.locator(".answer")).to_have_text("the fox")
    expect(page.locator("body")).not_to_have_class(re.compile("asking"))
    ask(page, "and who else?")
    expect(page.locator("body")).not_to_have_class(re.compile("asking"))
    assert [message["content"] for message in sent[1]["messages"]] == ["who?", "the fox", "and who else?"]


FAILURES: dict[str, tuple[Callable[[Page, FakeEngine], Any], str, str]] = {
    "overflow": (
        lambda page, engine: text_of(page).fill("word " * 1000),
        "Too long for the model",
        "Shorten the text",
    ),
    "a step fails": (
        lambda page, engine: setattr(engine, "script", lambda submit: [StepFailed("it is broken")]),
        "The server failed on this request",
        "Ask again",
    ),
    "the engine is dead": (
        lambda page, engine: setattr(engine, "is_ready", False),
        "The engine is not running",
        "The server's log says why",
    ),
    "the server is full": (
        lambda page, engine: page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=503, json={"error": {"message": "m", "code": "overloaded"}}),
        ),
        "The server is full at the moment",
        "Wait a moment",
    ),
    "the stream is cut": (
        lambda page, engine: page.route("**/v1/chat/completions", dropped_connection),
        "The answer broke off",
        "What had come is kept",
    ),
    "nobody is there": (
        lambda page, engine: page.route("**/v1/chat/completions", lambda route: route.abort()),
        "The server cannot be reached",
        "farspan serve",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_told_in_words_with_what_to_do_next(
    page: Page, url: str, engine: FakeEngine, speak: Callable[[str], Script], case: str
) -> None:
    fail, title, advice = FAILURES[case]
    opened(page, url)
    fail(page, engine)
    lane = ask(page, "will it?")
    alert = lane.get_by_role("alert")
    expect(alert).to_contain_text(title)
    expect(alert.locator(".next")).to_contain_text(advice)
    if case == "the stream is cut":
        expect(lane.locator(".answer")).to_have_text("the fox")
    if case != "overflow":
        page.unroute_all()
        engine.is_ready, engine.script = True, speak(ANSWER)
        alert.get_by_role("button", name="Ask again").click()
        expect(lane.locator(".answer")).to_have_text(ANSWER)
        expect(alert).to_be_hidden()


def test_an_engine_that_died_is_told_at_the_top(page: Page, url: str, engine: FakeEngine) -> None:
    opened(page, url)
    engine.is_ready, engine.death = False, "the engine process ended with code -9"
    expect(page.locator("#state")).to_have_text("the engine process ended with code -9")
    expect(page.locator("#state")).to_have_attribute("data-kind", "bad")


def test_a_key_is_asked_for_checked_and_forgotten_with_the_tab(
    page: Page, engine: FakeEngine, folder: Path
) -> None:
    with http_server(engine, folder, api_keys=("right",)) as url:
        page.goto(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server wants an API key.")
        for given, words in {"wrong": "The key was not accepted", "two words": "without spaces"}.items():
            dialog.get_by_label("Key").fill(given)
            dialog.get_by_role("button", name="Use it").click()
            expect(dialog).to_contain_text(words)
        dialog.get_by_label("Key").fill("right")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#state")).to_have_text("Working")
        expect(ask(page, "and now?").locator(".answer")).to_have_text(ANSWER)
        page.reload()
        expect(page.locator("#state")).to_have_text("Working")
        stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "right" in stored.partition("}")[2] and "right" not in stored.partition("}")[0]
        other = page.context.browser.new_context().new_page()  # type: ignore[union-attr]
        other.goto(url)
        expect(other.get_by_role("dialog")).to_be_visible()
        other.context.close()


def test_a_key_that_is_no_longer_good_is_asked_for_once(page: Page, engine: FakeEngine, folder: Path) -> None:
    with http_server(engine, folder, api_keys=("right",)) as url:
        page.goto(url)
        dialog, state = page.get_by_role("dialog"), page.locator("#state")
        dialog.get_by_label("Key").fill("right")
        page.keyboard.press("Enter")
        expect(state).to_have_text("Working")
        asked: list[str] = []
        page.route("**/stats", lambda route: (asked.append("stats"), route.fulfill(status=401)))
        expect(dialog).to_contain_text("The key was not accepted")
        dialog.get_by_role("button", name="Cancel").click()
        expect(state).to_have_text("The key was not accepted")
        assert len(asked) == 1
        page.unroute_all()
        page.get_by_role("button", name="API key").click()
        dialog.get_by_label("Key").fill("right")
        page.keyboard.press("Enter")
        expect(state).to_have_text("Working")


def test_tokens_are_counted_as_one_types(page: Page, url: str, tokenizer: Tokenizer) -> None:
    opened(page, url)
    count = page.locator("#count")
    text_of(page).press_sequentially("the fox")
    expect(count).to_have_text(re.compile(r"^[1-9]\d* of 2,048 tokens$"))
    (few,) = re.findall(r"^\d+", count.inner_text())
    page.get_by_role("textbox", name="Question").press_sequentially("who jumps?")
    added = len(tokenizer.encode("\n\nwho jumps?", add_special_tokens=False))
    expect(count).not_to_have_text(re.compile(f"^{few} "))
    (more,) = re.findall(r"^\d+", count.inner_text())
    assert 0 < int(more) - int(few) <= added
    text_of(page).fill("word " * 1000)
    expect(count).to_have_text(re.compile("too many$"))


def test_files_are_dropped_or_chosen_and_must_be_text(page: Page, url: str, tmp_path: Path) -> None:
    opened(page, url)
    drop(page, "fox.txt", "the quick brown fox")
    expect(text_of(page)).to_have_value("the quick brown fox")
    expect(page.locator(".note")).to_have_text("From fox.txt")
    drop(page, "fox.bin", "PK\x03\x00\x00")
    expect(page.locator(".note")).to_contain_text("fox.bin is not a text file")
    expect(text_of(page)).to_have_value("the quick brown fox")
    (tmp_path / "dog.txt").write_text("the lazy dog")
    page.locator("input[type=file]").set_input_files(tmp_path / "dog.txt")
    expect(text_of(page)).to_have_value("the lazy dog")
    page.get_by_role("button", name="Clear").click()
    expect(text_of(page)).to_have_value("")


def test_light_and_dark_by_system_and_by_a_switch_that_lasts(page: Page, url: str) -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    opened(page, url)
    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert light != dark
    page.get_by_role("radio", name="Light").check(force=True)
    assert paper() == light
    page.reload()
    expect(page.get_by_role("radio", name="Light")).to_be_checked()
    assert paper() == light
    page.get_by_role("radio", name="Dark").check(force=True)
    page.emulate_media(color_scheme="light")
    assert paper() == dark


def test_the_keyboard_alone_is_enough_and_always_shows_where_it_is(page: Page, url: str) -> None:
    opened(page, url)
    seen = []
    for _ in range(16):
        page.keyboard.press("Tab")
        focus = page.locator(":focus")
        mark = focus.evaluate(
            """element => {
                const box = element.matches('.theme input, .file input') ? element.parentElement : element;
                const outline = one => getComputedStyle(one).outline; // colour, style, width
                const marked = one => / solid [2-9]px$/.test(outline(one));
                const name = element.id || element.name || element.type || element.textContent.trim();
                return [name, [box, ...box.children].some(marked)];
            }"""
        )
        assert mark[1], f"{mark[0]} does not show that it has the focus"
        seen.append(mark[0])
        if mark[0] == "text":
            page.keyboard.type("A short text.")
        elif mark[0] == "compare":
            page.keyboard.press("Space")
        elif mark[0] == "question":
            page.keyboard.type("what does it do?")
        elif mark[0] == "other-plan":
            break
    assert seen.index("text") < seen.index("question") < seen.index("plan") < seen.index("other-plan")
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".lane .answer")).to_have_text([ANSWER, ANSWER])
    expect(page.get_by_role("textbox", name="Question")).to_be_focused()


def test_everything_has_a_name_for_those_who_do_not_see_it(page: Page, url: str) -> None:
    opened(page, url)
    page.get_by_label("Compare with").check()
    ask(page, "what does it do?")
    expect(page.locator("#heat .map-row")).to_have_count(2)
    controls = page.locator("button, input, select, textarea, meter, svg[role=img]")
    nameless = controls.evaluate_all(
        """elements => elements
            .filter(one => one.checkVisibility() && !one.labels?.length && !one.textContent.trim())
            .filter(one => !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby'))
            .map(one => one.outerHTML)"""
    )
    assert nameless == []
    assert page.locator(".answer[aria-live=polite]").count() == 2


def test_it_fits_a_phone(page: Page, url: str) -> None:
    def with_long_names(route: Route) -> None:
        plans = route.fetch().json()
        for plan in plans["data"]:
            plan["id"] = f"a-plan-with-a-name-that-a-phone-cannot-hold-in-one-line-{plan['id']}"
        route.fulfill(json=plans)

    page.set_viewport_size(PHONE)
    page.route("**/v1/plans", with_long_names)
    opened(page, url)
    page.get_by_label("Compare with").check()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.unroute_all()
    page.reload()
    page.get_by_label("Compare with").check()
    ask(page, "what does it do? " * 8)
    expect(page.locator("#heat .map-row")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    beyond = page.locator("main *, header *").evaluate_all(
        """(elements, width) => elements.filter(one => one.checkVisibility() && !one.closest('.unseen, .file')
            && one.getBoundingClientRect().right > width + 0.5).map(one => one.outerHTML.slice(0, 80))""",
        PHONE["width"],
    )
    assert beyond == []
