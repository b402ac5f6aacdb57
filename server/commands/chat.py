"""`farspan chat`: a conversation in the terminal, with documents, under any loaded plan."""

import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.answers import CHAT, ask, summary
from server.commands.exits import REFUSED, fail
from server.commands.remote import DEFAULT_URL, ApiKey, Remote, Trouble, Url

HELP = """/file PATH   attach a document to the next question
/plan NAME   answer under another plan; without a name: list them
/clear       forget the conversation and its documents
/help        this list
/quit        leave, as Ctrl-D does
Ctrl-C stops an answer."""


def chat(
    file: Annotated[
        list[Path] | None, typer.Option(help="Document to talk about; repeat it for several.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan to answer under.", show_default="the server's")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer.", show_default="what the context leaves")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")
    ] = 0.7,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Talk to a running server. Each answer is followed by what it cost.

    [bold]Examples[/bold]

      farspan chat
      farspan chat --file report.txt --plan minference-snapkv
      farspan chat --url http://gpu-box:8000 --max-tokens 200
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    try:
        with Remote(url, api_key) as remote:
            talk = Conversation(remote, options, plan=plan, system=system)
            for path in file or ():
                talk.attach(path)
            talk.run()
    except Trouble as trouble:
        fail(str(trouble), trouble.code)


@dataclass
class Conversation:
    """What was said so far, and what the next question carries. Raises Trouble where it cannot begin."""

    remote: Remote
    options: dict[str, Any]
    plan: str | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)  # for the next question

    def __post_init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False)
        self._model = self.remote.model()
        self._plans = [plan["name"] for plan in self._model.get("plans", ())]
        self.plan = self._known_plan(self.plan) if self.plan else None
        self.clear()

    def run(self) -> None:
        """Ask and answer until the end of input."""
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        self._say(f"{self._model['id']} under {self.plan or self._default} · /help lists the commands")
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return
            if line == "/quit":
                return
            try:
                self._obey(line)
            except Trouble as trouble:  # said, and the conversation goes on
                print(f"farspan: {trouble}", file=sys.stderr, flush=True)

    def attach(self, path: Path) -> None:
        """Read a document that goes before the next question."""
        try:
            text = path.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "not a text in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise Trouble(f"{path}: {reason}; attach a text file", REFUSED) from error
        counted = self.remote.post("/tokenize", {"prompt": text})
        self.documents.append(text)
        room = f" of {counted['max_model_len']:,}" if counted.get("max_model_len") else ""
        self._say(f"{path.name}: {counted['count']:,} tokens{room}")

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.documents = []

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        match command, rest.strip():
            case "", _:
                pass
            case "/help", _:
                self._say(HELP)
            case "/clear", _:
                self.clear()
                self._say("forgotten")
            case "/file", "":
                raise Trouble("/file needs the path of a text")
            case "/file", name:
                self.attach(Path(name))
            case "/plan", "":
                current = self.plan or self._default
                self._say("\n".join(f"{'*' if name == current else ' '} {name}" for name in self._plans))
            case "/plan", name:
                self.plan = self._known_plan(name)
                self._say(f"answers come under {name}")
            case word, _ if word.startswith("/"):
                raise Trouble(f"no command {word}; /help lists them")
            case _:
                self._answer(line)

    def _answer(self, question: str) -> None:
        asked = {"role": "user", "content": "\n\n".join([*self.documents, question])}
        body = {"model": self._model["id"], "messages": [*self.messages, asked], **self.options}
        if self.plan is not None:
            body["plan"] = self.plan
        if self._plans:  # a server of ours
            body["farspan"] = {"progress": True}
        waiting = self._console.status("reading", spinner="dots")

        def report(progress: dict[str, Any]) -> None:
            done, total = progress["prompt_tokens_computed"], progress["prompt_tokens"]
            waiting.update(f"reading {done:,} of {total:,} tokens")

        def show(text: str) -> None:
            waiting.stop()
            print(text, end="", flush=True)

        with waiting:
            answer = ask(self.remote, CHAT, body, show, report)
        print()
        self._say(summary(answer))
        if answer.text:  # what was stopped before its first word was never said
            self.messages += [asked, {"role": "assistant", "content": answer.text}]
            self.documents = []

    @property
    def _default(self) -> str:
        return self._plans[0] if self._plans else "its own plan"

    def _known_plan(self, name: str) -> str:
        if self._plans and name not in self._plans:
            raise Trouble(f"no plan {name!r} is loaded there; loaded are: {', '.join(self._plans)}", REFUSED)
        return name

    def _say(self, words: str) -> None:
        """Words of ours, not the model's."""
        self._console.print(words, style="dim", soft_wrap=True)
