"""`farspan prebuild`: the kernels of a GPU that is not here, compiled for a server that will be."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.exits import REFUSED, fail
from server.commands.flags import Panels, settings_of, takes
from server.commands.serve import FLAGS as SERVE_FLAGS
from server.commands.serve import with_plans

CHANGE_KERNELS = (
    *("engine.revision", "engine.dtype", "engine.max_model_len", "engine.rope_scaling"),
    "cache.dtype",
)
FLAGS: Panels = {
    "As for farspan serve": tuple(
        flag for flags in SERVE_FLAGS.values() for flag in flags if flag.setting in CHANGE_KERNELS
    )
}


@takes(FLAGS)
def prebuild(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or GGUF file.", show_default="smollm2, packaged"),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            help="Ten times a GPU's compute capability; repeat it for several.",
            show_default="80, 90, 100: A100, H100, B200",
        ),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Folder for the kernels.", show_default="where Triton keeps its own")
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan file or shipped plan; repeat it for several.",
            show_default="minference-snapkv and dense",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file as for farspan serve.")] = None,
    **given: Any,
) -> None:
    """Compile a server's Triton kernels on a machine without a GPU, such as one that builds images.

    Weights are not loaded: a small random model of the same attention is served instead. A server that starts
    with the same model, plans and versions finds the kernels if TRITON_CACHE_DIR is that folder, or, with
    TRITON_CACHE_MANAGER=configs.triton_cache:PrebuiltCache, FARSPAN_PREBUILT.

    [bold]Example[/bold]

      farspan prebuild smollm2 --arch 90 --into kernels
    """
    from rich.console import Console

    from configs.errors import ConfigError

    if into is not None:
        os.environ["TRITON_CACHE_DIR"] = str(into.absolute())
    os.environ.setdefault("TRITON_STORE_BINARY_ONLY", "1")  # what is only read by people is a third of it
    try:
        flags = settings_of(FLAGS, given) | {"engine.model": model, "plans": plan}
        settings = with_plans(config, flags)
        with Console(stderr=True).status("compiling"):
            from engine.prebuild import ARCHITECTURES, prebuild_all

            for built in prebuild_all(settings, arch or ARCHITECTURES):
                print(
                    f"sm_{built.architecture}: {built.kernels} kernels in {built.seconds:.0f} s", flush=True
                )
    except ConfigError as error:
        fail(str(error), REFUSED)
