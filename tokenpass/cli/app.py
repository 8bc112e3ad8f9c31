"""All commands, and how they end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import tokenpass
from tokenpass.cli import bench, doctor, explain, fuzz, image, tune, video
from tokenpass.cli.screen import fail
from tokenpass.errors import TokenpassError, TokenpassWarning

PROGRAM = "tokenpass"

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (explain, image, video, tune, bench, fuzz, doctor):
    app.command(command.__name__.rpartition(".")[2])(command.command)


HELP = (
    "Fewer tokens for vision transformers: see it, measure it, choose a budget.\n\n"
    "MODEL is timm:NAME, torchvision:NAME, transformers:CLASS[:CONFIG.json], a program saved by "
    "torch.export (FILE.pt2), or FILE.py:FUNCTION, which returns a model and its inputs."
)


@app.callback(invoke_without_command=True, help=HELP)
def overview(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """What happens without a command."""
    if version:
        typer.echo(f"{PROGRAM} {tokenpass.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors of the user are one line on stderr."""
    given = None if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TokenpassWarning)
            code = app(given, prog_name=PROGRAM, standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        return fail(f"{message} (tokenpass COMMAND --help lists what there is)")
    except typer.Abort:
        return fail("stopped")
    except TokenpassError as error:
        return fail(str(error))
    return code if isinstance(code, int) else 0
