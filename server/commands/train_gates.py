"""`farspan train-gates`: gates of SeerAttention for a model, made from any text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from server.commands.exits import REFUSED, fail

if TYPE_CHECKING:
    from rich.progress import TaskID


def train_gates(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    text: Annotated[list[Path], typer.Option(help="Text file to learn from; repeat it for several.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the gates, and for what a later start takes up again.")
    ],
    method: Annotated[
        str, typer.Option(help="What reads by them: seerattention, or at decode seerattention_r.")
    ] = "seerattention",
    pieces: Annotated[int, typer.Option(help="Pieces of text to learn from. More may follow later.")] = 96,
    length: Annotated[
        str, typer.Option(help="Tokens of a piece, whole pages of 64: 2048, or 8K on a GPU.")
    ] = "2048",
    steps: Annotated[int, typer.Option(help="Steps for each layer, of 4 pieces each.")] = 600,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after the first steps.")] = 3e-3,
    target: Annotated[
        str, typer.Option(help="What of a page's attention to predict: max, as published, or sum.")
    ] = "max",
    seed: Annotated[int, typer.Option(help="Draws pieces, tasks and batches.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model: auto, float32, bfloat16 or float16.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
) -> None:
    """Train the gates that seerattention reads a prompt by, or seerattention_r while it generates.

    The model reads pieces of the text, and tasks made of them (copying, lists, needles), once; its attention
    is what gates learn to predict. Ctrl-C at any time: the same command goes on from there.

    [bold]Example[/bold]

      farspan train-gates smollm2 --text book.txt --out gates
    """
    from configs.errors import ConfigError
    from configs.loading import load_config
    from configs.schema import parse_count
    from engine.gate_training import Recipe
    from engine.train_gates import Task
    from engine.train_gates import train_gates as train

    flags = {
        "engine.model": model,
        "engine.revision": revision,
        "engine.dtype": dtype,
        "engine.device": device,
        "engine.threads": threads,
    }
    try:
        settings = load_config(None, flags).engine
        recipe = Recipe(steps, learning_rate, target, seed)
        task = Task(settings, tuple(text), out, pieces, parse_count(length), recipe, method)
        with _Bars() as bars:
            found = train(task, bars.show)
    except ConfigError as error:
        fail(str(error), REFUSED)
    except ValueError as error:
        fail(f"--length: {error}", REFUSED)
    print(
        f"{out / 'gates.safetensors'}: {found['kl']:.3f} nats from the attention of unseen pieces;"
        f" mean queries times mean keys: {found['kl_as_mean_pool']:.3f}"
    )


class _Bars:
    """A progress bar for each stage of the work."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, of: int) -> None:
        """`done` of `of` are done in this stage; a stage that is new gets a bar."""
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=of)
        self._progress.update(self._bars[stage], completed=done, total=of)
