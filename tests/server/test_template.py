"""A model's chat template may be anybody's: one that never ends, or wants too much, is refused in time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from engine.errors import BadRequest
from server import template
from server.template import ChatTemplate
from server.tokenizer import Tokenizer
from tests.server.builders import PATIENCE, FakeEngine, chat_body, http_server, save_tokenizer, say

MESSAGES = [{"role": "user", "content": "the fox"}]
WITHIN_A_SECOND = "more than 0.2 seconds"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
REFUSED = {
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops in a loop": (ENDLESS, WITHIN_A_SECOND),
    "a loop that takes nothing": (
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        WITHIN_A_SECOND,
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        WITHIN_A_SECOND,
    ),
    "a filter over many": (
        "{% set many = range(99999) | list %}{{ many | select('in', many | reverse | list) | list }}",
        WITHIN_A_SECOND,
    ),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a loop without end": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
    "a tower of powers": ("{{ 9 ** (9 ** 9) }}", "too large"),
    "a long text": ("{{ 'a' * 10 ** 12 }}", "too large"),
    "a long list": ("{{ 10 ** 12 * [1] }}", "too large"),
    "more memory than there is": ("{{ 'a' | center(10 ** 15) }}", "refuses these messages"),
    "no such attribute": ("{{ messages | dictsort }}", "no attribute"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_wants_too_much_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    source, words = REFUSED[case]
    tokenizer = Tokenizer(save_tokenizer(tmp_path, source))
    began = time.thread_time()
    with pytest.raises(BadRequest, match=words) as refusal:
        tokenizer.render_chat(MESSAGES)
    assert time.thread_time() - began < 1.5
    assert refusal.value.param == "messages"


def test_a_template_may_not_write_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_CHARACTERS", 1000)
    wide = ChatTemplate("{% for i in range(n) %}{{ '0123456789' }}{% endfor %}")
    assert len(wide.render(n=100)) == 1000
    with pytest.raises(template.FAILURES, match="more than 1000 characters"):
        wide.render(n=101)


def test_what_templates_do_with_numbers_and_loops_is_as_ever() -> None:
    source = "{% for i in [1, 2] %}{{ loop.index }}/{{ loop.length }} {% else %}none{% endfor %}{{ '-' * 3 }}"
    source += (
        "{{ 2 ** 10 }} {{ 1.5 * 2 }} {% for m in messages if m.role == 'x' %}{% else %}nobody{% endfor %}"
    )
    assert ChatTemplate(source).render(messages=MESSAGES) == "1/2 2/2 ---1024 3.0 nobody"


def test_the_time_of_one_chat_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was rendered before it nor what is rendered beside it counts."""
    monkeypatch.setattr(template, "SECONDS", 0.2)
    once = ChatTemplate("{% for i in range(n) %}{% for j in range(99) %}{% endfor %}{% endfor %}")
    slow = ChatTemplate(ENDLESS)
    began = time.thread_time()
    while time.thread_time() - began < 0.3:
        once.render(n=5)
    failed = threading.Event()

    def render() -> None:
        with pytest.raises(template.FAILURES):
            slow.render()
        failed.set()

    beside = threading.Thread(target=render)
    beside.start()
    while not failed.is_set():
        once.render(n=5)
    beside.join()


def test_the_server_goes_on_while_templates_do_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    folder = save_tokenizer(tmp_path, ENDLESS)
    with http_server(FakeEngine(say(5)), folder) as url, ThreadPoolExecutor(8) as clients:
        ask = f"{url}/v1/chat/completions"
        chats = [clients.submit(httpx.post, ask, json=chat_body(), timeout=PATIENCE) for _ in range(8)]
        assert httpx.get(f"{url}/livez", timeout=PATIENCE).status_code == 200
        for chat in chats:
            reply = chat.result()
            assert reply.status_code == 400 and reply.headers["x-should-retry"] == "false"
            assert WITHIN_A_SECOND in reply.json()["error"]["message"]
        text = {"model": "tiny", "prompt": "the fox"}
        assert httpx.post(f"{url}/v1/completions", json=text, timeout=PATIENCE).status_code == 200
