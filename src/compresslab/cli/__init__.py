"""The command line: a thin skin over the Python calls. Faults a user can mend are one line and exit code 2."""

from __future__ import annotations

import os
import sys

from compresslab.cli import (  # noqa: F401  (they add their commands)
    asking,
    compressing,
    course,
    deploying,
    distilling,
    measuring,
    peers,
    reporting,
    shelves,
    specialising,
    staging,
)
from compresslab.cli.console import app, error_console, escape
from compresslab.errors import CompressLabError, of_disk


def main() -> None:
    """Entry point of the `compresslab` command."""
    try:
        app()
    except Exception as error:
        told = error if isinstance(error, CompressLabError) else of_disk(error)
        if told is None:
            raise
        rank = os.environ.get("RANK", "")  # of several processes, which one speaks
        error_console.print(
            f"[bold red]{f'rank {rank}: ' if rank else ''}error:[/] {escape(str(told))}",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(2)
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what the library makes of Ctrl-C
            raise
        error_console.print("stopped. Run the same command again to go on where it stopped.", highlight=False)
        sys.exit(130)
