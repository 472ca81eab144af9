"""The commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys

import typer

from emovec.cli import bank, calibrate, compare, demo, evaluate, extract, generate, info, read, serve, stories
from emovec.cli.common import fail

app = typer.Typer(
    name="emovec",
    help="Read and steer emotion concepts inside language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a failure explained in a line, 2 wrong usage, 3 a guard fired.",
)
app.command("demo")(demo.demo)
app.command("read")(read.read)
app.command("generate")(generate.generate)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command("extract")(extract.extract)
app.command("calibrate")(calibrate.calibrate)
app.command("compare")(compare.compare)
app.command("stories")(stories.stories)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(bank.app, name="bank")
app.command("info")(info.info)


def run() -> None:
    """Run the command line; what a user can have caused is explained in one line, without a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (OSError, ValueError, KeyError, ModuleNotFoundError, TypeError) as error:
        if os.environ.get("EMOVEC_TRACEBACK"):
            raise
        fail(str(error) or type(error).__name__)
