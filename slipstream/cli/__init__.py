"""The `slipstream` command: one file per verb, each importing what it needs only when it runs."""

import sys

import typer

from slipstream.cli.bench import bench
from slipstream.cli.coverage import coverage
from slipstream.cli.doctor import doctor
from slipstream.cli.finetune import finetune
from slipstream.cli.launch import launch
from slipstream.cli.merge import merge
from slipstream.cli.plan import plan
from slipstream.cli.preview import preview
from slipstream.cli.quantize import quantize
from slipstream.cli.report import report
from slipstream.cli.upcycle import upcycle

# What a user can cause and mend. Anything else is our bug and deserves its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)

app = typer.Typer(
    name="slipstream",
    help="Fine-tune Mixture-of-Experts Transformers models several times faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(finetune)
app.command()(preview)
app.command()(plan)
app.command()(launch)
app.command()(report)
app.command()(merge)
app.command()(quantize)
app.command()(upcycle)
app.add_typer(bench, name="bench")
app.command()(coverage)
app.command()(doctor)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error (anywhere on the line)."),
) -> None:
    """`main` handles --debug before the verbs see it; it is declared here for --help."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line on stderr and exit code 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments)
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
