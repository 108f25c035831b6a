"""Standard output, standard error and exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from langchain_rerank.errors import RerankError

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes, as a shell gives them to programs ended by SIGINT and SIGPIPE."""


class _Console(Console):
    """Leaves a closed pipe to `reported`; rich would end the process with our code for an error."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Turn what is raised within into one line on standard error and an exit code."""
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:  # which older versions of Typer report, with status 1
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read us has enough. Python would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, RerankError)
        what = str(error) if known else f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
        typer.echo(f"langchain-rerank: {one_line(what)}", err=True)
        raise typer.Exit(1) from None


def standard_output() -> Console:
    """Standard output; colours and tables only where it is a terminal."""
    return _Console(highlight=False)


def standard_error() -> Console:
    """Standard error, for progress and hints."""
    return _Console(stderr=True, highlight=False)


def one_line(text: str) -> str:
    """The text on one line and without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))


def print_json(content: Any, *, indent: int | None = None) -> None:
    """JSON, with other letters than ASCII as they are where the output's encoding has them."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(content, ensure_ascii=not unicode, indent=indent))
