"""A bar on the terminal while the engine loads, for people who start a server by hand."""

import asyncio

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from engine.client import Engine

SECONDS = 0.2  # between two looks


async def show_loading(engine: Engine, console: Console) -> None:
    """Follow the start until cancelled; nothing of it stays."""
    columns = (TextColumn("loading"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        while True:
            loading = engine.loading
            bar.update(task, description=loading.phase, completed=loading.fraction)
            await asyncio.sleep(SECONDS)
