"""What tests and screenshots of the page share: a real server, a dropped file, the keyboard."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page

ROOT = Path(__file__).parent.parent.parent
FLAGS = [  # of chromium: nothing of its own on the network, and no sandbox, for CI runs as root
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TEXT = ROOT / "examples" / "texts" / "pride-and-prejudice.txt"  # 6,000 tokens of the packaged model


@contextmanager
def real_server() -> Iterator[str]:
    """`farspan serve` with the packaged model and its default plans; its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--kv-cache-memory-bytes", "1GiB"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout as output:
        try:
            match = re.match(r"farspan ready: (\S+)/v1", output.readline())
            assert match, "the server did not start"
            yield match[1]
        finally:
            process.kill()


def drop(page: Page, name: str, content: str) -> None:
    """A file dropped on the page."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name));
            return transfer;
        }""",
        [name, content],
    )
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})


def tab_to(page: Page, name: str, key: str = "Tab") -> None:
    """Press Tab until the element with this id has the focus."""
    for _ in range(40):
        page.keyboard.press(key)
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"{key} never comes to {name}")
