"""`farspan chat` and `farspan complete`: what goes to the server, what is shown, failures in words."""

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from engine.errors import EngineDead, StepFailed
from engine.messages import Loading, Submit, TokenOutput
from server.cli import app
from server.loading_bar import SECONDS, show_loading
from server.shadowing import ROOT
from tests.server.builders import CONTEXT, MODEL, PATIENCE, FakeEngine, http_server, say, then, until

KEY = "a-secret"
TOKENS = (70, 71, 72)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(say(*TOKENS))


@pytest.fixture(scope="module")
def url(engine: FakeEngine, folder: Path) -> Iterator[str]:
    with http_server(engine, folder, api_keys=(KEY,), sse_keep_alive_interval=0.05) as address:
        yield address


@pytest.fixture(autouse=True)
def begin(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.script = say(*TOKENS)
    engine.submitted.clear()
    for name in ("FARSPAN_URL", "FARSPAN_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def farspan(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="farspan", input=input)


def test_complete_prints_the_answer_and_nothing_else(url: str, engine: FakeEngine) -> None:
    ended = farspan(
        "complete", "the fox", "--url", url, "--api-key", KEY, "--plan", "dense", "--max-tokens", "9"
    )
    assert ended.exit_code == 0 and ended.stderr == "" and ended.stdout.endswith("\n")
    whole = json.loads(farspan("complete", "the fox", "--url", url, "--api-key", KEY, "--json").stdout)
    assert whole["choices"][0]["text"] == ended.stdout[:-1] != ""
    first, second = engine.submitted
    assert first.plan == "dense" and first.sampling.max_tokens == 9 and first.sampling.temperature == 0
    assert second.plan == "sparse" and first.tokens == second.tokens


def test_complete_reads_a_pipe_and_asks_as_a_chat(
    url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARSPAN_URL", url)
    monkeypatch.setenv("FARSPAN_API_KEY", f"{KEY} another")
    assert farspan("complete", input="the fox").exit_code == 0
    assert farspan("complete", "--chat", input="the fox").exit_code == 0
    text, chat = engine.submitted
    assert len(chat.tokens) > len(text.tokens)
    nothing = farspan("complete", input=" \n")
    assert nothing.exit_code == 2 and "nothing to complete" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--api-key", "wrong"), 1, "Incorrect API key provided"),
        ((), 1, "give the server's key with --api-key or in FARSPAN_API_KEY"),
        (("--api-key", KEY, "--max-tokens", "9999"), 1, "shorten the text or the answer"),
        (("--api-key", KEY, "--plan", "dens"), 1, "loaded are: sparse, dense"),
        (("--url", "nowhere"), 2, "'nowhere' is no URL such as"),
    ],
)
def test_what_the_server_refuses_is_said_with_what_to_do(
    url: str, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ended = farspan("complete", "the fox", "--url", url, *arguments)
    assert ended.exit_code == code and words in ended.stderr, ended.output
    assert ended.stdout == "" and "Traceback" not in ended.output


def test_a_stopped_server_is_said_with_exit_code_3() -> None:
    with socket.socket() as taken:  # bound, not listening: nobody answers
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        for command in (("complete", "the fox"), ("chat",)):
            ended = farspan(*command, "--url", address)
            assert ended.exit_code == 3 and "start one with `farspan serve`" in ended.stderr


def test_an_answer_that_breaks_off_is_an_error_behind_what_had_come(url: str, engine: FakeEngine) -> None:
    for error, code, words in (
        (StepFailed("no luck"), 1, "other requests go on"),
        (EngineDead("it has gone"), 3, "look at the server's log"),
    ):
        engine.script = then(say(*TOKENS), error)
        ended = farspan("complete", "the fox", "--url", url, "--api-key", KEY)
        assert ended.exit_code == code and words in ended.stderr and ended.stdout != ""


def read_request(connection: socket.socket) -> bytes:
    """One request's body, of the length that its head says."""
    with connection.makefile("rb") as received:
        head = b"".join(iter(received.readline, b"\r\n")).lower()
        return received.read(int(head.partition(b"content-length:")[2].split()[0]))


def test_a_stream_without_its_end_was_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = (
            "import socket, sys\n"
            "from server.commands.answers import TEXT, ask\n"
            "from server.commands.remote import Remote, Trouble\n"
            "try:\n"
            f"    with Remote('http://127.0.0.1:{port}', None) as remote: ask(remote, TEXT, {{}})\n"
            "except Trouble as trouble: print(trouble)\n"
        )
        asking = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        listener.settimeout(PATIENCE)
        connection, _ = listener.accept()
        with connection:
            read_request(connection)  # whole: closing on unread bytes would reset the connection
            connection.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
                b'data: {"choices": [{"text": "half"}]}\n\n'
            )
        output, _ = asking.communicate(timeout=PATIENCE)
    assert "the answer broke off" in output


def test_a_chat_carries_documents_history_and_plans(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    document = tmp_path / "report.txt"
    document.write_text("the lazy dog")
    lines = [
        "the fox?",
        "/plan",
        "/plan dense",
        "and now?",
        "/clear",
        f"/file {document}",
        "the fox?",
        "/quit",
    ]
    ended = farspan(
        "chat", "--file", str(document), "--url", url, "--api-key", KEY, input="\n".join(lines) + "\n"
    )
    assert ended.exit_code == 0, ended.output
    first, second, third = engine.submitted
    assert (first.plan, second.plan, third.plan) == ("sparse", "dense", "dense")
    assert second.tokens[: first.prompt_length] == first.tokens  # the document is in the history
    assert third.tokens == first.tokens, "all was forgotten, and the document attached again"
    assert "report.txt: " in ended.stdout and "* sparse" in ended.stdout
    assert "read 25% · kept 10 (50%) · first token" in ended.stdout


def test_a_chat_goes_on_after_a_mistake(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    lines = [
        *("/plan dens", "/fiel x", "/file", f"/file {tmp_path / 'binary'}", "/file missing.txt"),
        *("a" * 10 * CONTEXT, "the fox", "/help"),
    ]
    ended = farspan(
        "chat", "--url", url, "--api-key", KEY, "--max-tokens", "16", input="\n".join(lines) + "\n"
    )
    assert ended.exit_code == 0
    for words in (
        "no plan 'dens' is loaded there; loaded are: sparse, dense",
        "no command /fiel; /help lists them",
        "/file needs the path",
        "not a text in UTF-8",
        "missing.txt: No such file",
        "maximum context length",
    ):
        assert words in ended.stderr, words
    assert len(engine.submitted) == 1 and "/clear" in ended.stdout
    refused = farspan("chat", "--url", url, "--api-key", KEY, "--plan", "dens")
    assert refused.exit_code == 2 and "loaded are" in refused.stderr


class Terminal:
    """A command in a pseudo-terminal: what it printed so far, and what is typed."""

    def __init__(self, *arguments: str) -> None:
        self._end, child = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "server.cli", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
            # Shells have what they start in the background ignore it, which is inherited.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)
        os.set_blocking(self._end, False)
        self.printed = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait until this is printed; what stood before it."""

        def found() -> re.Match[str] | None:
            with suppress(OSError):  # nothing new; or, behind its end, nothing more
                self.printed += os.read(self._end, 65536).decode(errors="replace")
            return re.search(pattern, self.printed)

        try:
            until(found)
        except AssertionError as error:
            raise AssertionError(f"{pattern!r} never came behind {self.printed!r}") from error
        match = re.search(pattern, self.printed)
        assert match
        before, self.printed = self.printed[: match.start()], self.printed[match.end() :]
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def test_ctrl_c_stops_an_answer_and_not_the_chat(url: str, engine: FakeEngine) -> None:
    terminal = Terminal("chat", "--url", url, "--api-key", KEY)
    try:
        terminal.expect("> ")
        engine.script = then(say(*TOKENS), None)  # silence behind the third token
        engine.abort_heard.clear()
        terminal.type("the fox\r")
        until(lambda: engine.submitted)
        terminal.expect("the fox")
        terminal.expect("[a-z]")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.expect("stopped")
        assert engine.abort_heard.wait(PATIENCE), "the server must hear of it"
        terminal.expect("> ")
        engine.script = say(*TOKENS)
        terminal.type("again\r")
        terminal.expect("cut at its longest")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()


@pytest.mark.model
@pytest.mark.timeout(600)
def test_chat_answers_about_a_real_text_in_a_terminal(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "texts" / "pride-and-prejudice.txt").read_text()
    start = text.index("It is a truth universally acknowledged")
    (tmp_path / "chapter.txt").write_text(text[start : start + 2400])
    server = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--kv-cache-memory-bytes", "512MiB"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    with server, server.stdout as output:
        try:
            match = re.match(r"farspan ready: (\S+)/v1", output.readline())
            assert match
            arguments = ("--file", str(tmp_path / "chapter.txt"), "--temperature", "0", "--max-tokens", "24")
            terminal = Terminal("chat", "--url", match[1], *arguments)
            try:
                counted = terminal.expect("tokens of 8,192")
                assert 500 < int(re.sub(r"\D", "", counted.rpartition(":")[2])) < 700
                terminal.expect("> ")
                terminal.type("Who is the wife of Mr. Bennet?\r")
                answer = terminal.expect("minference-snapkv · prompt")
                assert "Bennet" in answer.rpartition("\x1b[2K")[2], answer  # behind the spinner
                terminal.expect(r"read 100% · kept \d+ \(100%\) · first token [\d.]+ s · [\d.]+ tokens/s")
                terminal.type("/quit\r")
                assert terminal.process.wait(PATIENCE) == 0
            finally:
                terminal.close()
        finally:
            server.kill()


def test_the_model_is_named_as_the_server_names_it(url: str, engine: FakeEngine) -> None:
    ended = farspan("chat", "--url", url, "--api-key", KEY, input="/quit\n")
    assert f"{MODEL} under sparse" in ended.stdout


def test_a_chat_shows_how_much_of_the_prompt_is_read(url: str, engine: FakeEngine) -> None:
    def reading(submit: Submit) -> list[TokenOutput | None]:
        return [TokenOutput(submit.request_id, computed=16), None]  # and then silence

    terminal = Terminal("chat", "--url", url, "--api-key", KEY)
    try:
        terminal.expect("> ")
        engine.script = reading
        terminal.type("the fox\r")
        terminal.expect(r"reading 16 of \d+ tokens")
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.expect("stopped")
    finally:
        terminal.close()


def test_a_start_is_a_bar_on_a_terminal(engine: FakeEngine) -> None:
    written = StringIO()
    console = Console(file=written, force_terminal=True, width=80)

    async def follow() -> None:
        showing = asyncio.create_task(show_loading(engine, console))
        engine.loading = Loading("kernels", 0.4)
        await asyncio.wait([showing], timeout=2 * SECONDS)
        showing.cancel()
        await asyncio.wait([showing])

    asyncio.run(follow())
    assert "loading" in written.getvalue() and "kernels" in written.getvalue()
