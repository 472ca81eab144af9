"""The command line: ``emovec`` or ``python -m emovec``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a failure explained in a line, 2 wrong usage, 3 a guard fired, 130 interrupted."""
    try:
        from emovec.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print("emovec: the command line needs typer and rich; they come with `pip install emovec[cli]`", file=sys.stderr)
        raise SystemExit(1) from None
    run()
