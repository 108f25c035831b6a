"""A training and an export in words, for the commands `train` and `export`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from langchain_rerank.errors import ConfigurationError
from langchain_rerank.training import Recipe, TrainingReport, read_recipe

_MEBIBYTE = 2**20


def settle(
    recipe: Path | None,
    data: Sequence[Path],
    teachers: Sequence[str],
    synthetic: str | None,
    options: Mapping[str, Any],
) -> Recipe:
    """The recipe that the arguments describe, with or without a file.

    Raises:
        ConfigurationError: There is neither a file nor data, or an option is wrong.
    """
    given: dict[str, Any] = dict(options)
    if data:
        given["sets"] = [{"path": path, **({"synthetic": synthetic} if synthetic else {})} for path in data]
    if teachers:
        given["teacher"] = dict(map(_teacher, teachers))
    if recipe is not None:
        return read_recipe(recipe, **given)
    if not data:
        raise ConfigurationError("Nothing to learn from: give DATA, or a recipe with --recipe")
    return read_recipe(given)


@contextmanager
def logged(*, bars: bool) -> Iterator[None]:
    """What the training has to say, on standard error, line by line; beside bars only how it ended."""
    names = ["langchain_rerank.training"] if bars else ["langchain_rerank.training", "langchain_rerank._training"]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = [(each, each.level, each.propagate) for each in map(logging.getLogger, names)]
    for logger, *_ in before:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _teacher(text: str) -> tuple[str, float]:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise ConfigurationError(f"--teacher {text!r}: {weight!r} is no number; write NAME or NAME=WEIGHT") from None


def print_report(out: Console, report: TrainingReport, recipe: Recipe) -> None:
    """The figures of the held-out queries, and what comes next."""
    from langchain_rerank._training.report import held_out, lasted

    out.print(f"Learned from {report.groups} queries in {lasted(report.seconds)}.")
    if report.trained is not None:
        out.print(f"{held_out(report, recipe)}, {report.pairs} passages that BM25 found for them,")
        out.print(f"of which base and trained read up to {recipe.max_length} tokens, with the query:")
        out.print(_table(report))
        for name, before in (("BM25", report.first_stage), ("the base", report.base)):
            if (difference := report.difference(before)) is not None:
                worse = " It ranks worse." if difference.high < 0 else ""
                out.print(f"nDCG@10 against {name}: {difference}.{worse}")
    folder = str(report.folder)
    out.print(f"\nModel and card: {folder}", soft_wrap=True, markup=False)
    out.print(f"Use it:         --backend cross-encoder:{folder}", soft_wrap=True, markup=False)
    out.print(f"Without torch:  langchain-rerank export {folder} {folder}-onnx", soft_wrap=True, markup=False)


def _table(report: TrainingReport) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for name in ("BM25", "base", "trained"):
        table.add_column(name, justify="right")
    for row in report.rows():
        table.add_row(*row)
    return table


def print_export(out: Console, target: Path) -> None:
    """What was written, and how to use it."""
    size = (target / "model.onnx").stat().st_size / _MEBIBYTE
    out.print(f"{target / 'model.onnx'}: {size:.1f} MiB", soft_wrap=True, markup=False)
    out.print(f"Use it: --backend embedded:{target}", soft_wrap=True, markup=False)
