"""The command `farspan`. Imports the rest when a command runs: help is instant, shadowing is found first."""

import typer

from server.commands import plan
from server.commands.bench import bench
from server.commands.chat import chat
from server.commands.complete import complete
from server.commands.env import env
from server.commands.exits import FAILED, fail
from server.commands.prebuild import prebuild
from server.commands.serve import serve
from server.commands.train_gates import train_gates
from server.shadowing import ShadowedPackage, protect_children, refuse_shadowed_packages
from server.version import farspan_version

app = typer.Typer(
    name="farspan",
    help="Long-context LLM inference server: sparse prefill and a compressed KV cache behind the OpenAI API.",
    epilog="Exit codes: 0 done, 1 it did not work, 2 something given is wrong, 3 no server answers or it is"
    " not ready, 130 Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.command()(serve)
app.command()(chat)
app.command()(complete)
app.command()(bench)
app.command()(env)
app.add_typer(plan.app, name="plan")
app.command()(train_gates)
app.command()(prebuild)


@app.command()
def version() -> None:
    """Print the version."""
    print(farspan_version())


def main() -> None:
    """The entry point of the command."""
    try:
        refuse_shadowed_packages()
    except ShadowedPackage as error:
        fail(str(error), FAILED)
    protect_children()
    app(prog_name="farspan")


if __name__ == "__main__":
    main()
