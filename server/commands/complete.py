"""`farspan complete`: one answer on standard output, for pipes and scripts."""

import json
import sys
from typing import Annotated, Any

import typer

from server.commands.answers import CHAT, TEXT, ask
from server.commands.exits import INTERRUPTED, REFUSED, fail
from server.commands.remote import DEFAULT_URL, ApiKey, Remote, Trouble, Url


def complete(
    prompt: Annotated[
        str | None, typer.Argument(help="What goes before the answer.", show_default="standard input")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a question, in the model's own form.")
    ] = False,
    plan: Annotated[
        str | None, typer.Option(help="Plan to answer under.", show_default="the server's")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeat it for several.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The server's whole reply, as JSON.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Complete a text, or answer one question, on standard output.

    [bold]Examples[/bold]

      farspan complete "Once upon a time" --max-tokens 40
      farspan complete --chat < question.txt
      cat report.txt question.txt | farspan complete --chat --plan dense --json
    """
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        fail("there is nothing to complete: give a text, or pipe one in", REFUSED)
    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body |= {
        name: value for name, value in {"plan": plan, "seed": seed, "stop": stop}.items() if value is not None
    }
    path = CHAT if chat else TEXT
    try:
        with Remote(url, api_key) as remote:
            body["model"] = remote.model()["id"]
            if as_json:
                print(json.dumps(remote.post(path, body), indent=2, ensure_ascii=False))
                return
            answer = ask(remote, path, body, lambda new: print(new, end="", flush=True))
    except Trouble as trouble:
        fail(str(trouble), trouble.code)
    print()
    if answer.finish_reason is None:
        raise SystemExit(INTERRUPTED)
