"""A collection asked before and after reranking, for the commands `demo` and `eval`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

from langchain_core.documents import Document
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from langchain_rerank._cli.states import EXTRAS
from langchain_rerank._cli.terminal import one_line, standard_error
from langchain_rerank._optional import require
from langchain_rerank.data import EMBEDDED_MODEL, Collection
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.evaluation import (
    DEPTH,
    Comparison,
    Ranked,
    compare,
    rerank,
    retrieve,
    spread_sample,
    to_json,
    to_plot,
    to_table,
    typical_gain,
    verdict,
)
from langchain_rerank.reranker import Reranker
from langchain_rerank.retrievers import create_qdrant_retriever

SHOWN = 5
"""How many answers are shown of one question."""


@dataclass(frozen=True)
class Experiment:
    """Some queries of a collection, before and after."""

    collection: Collection
    before: Mapping[str, Ranked]
    after: Mapping[str, Ranked]
    comparison: Comparison


def require_extras() -> None:
    """Say what is not installed before anybody waits."""
    for extra in ("qdrant", "eval"):
        require(*EXTRAS[extra], extra=extra)


def choose(collection: Collection, count: int | None) -> list[str]:
    """The ids of the queries to ask: those that somebody judged, at most `count` of them."""
    judged = [query_id for query_id in collection.queries if query_id in collection.qrels]
    if not judged:
        raise ConfigurationError("The qrels judge none of the queries; do the ids in both files belong together?")
    return judged if count is None else spread_sample(judged, count)


def run(collection: Collection, chosen: Sequence[str], reranker: Reranker) -> Experiment:
    """Ask every chosen query, with progress on standard error.

    Raises:
        RerankError: The first stage, the reranker or the scoring failed.
    """
    err, before, after = standard_error(), {}, {}
    with err.status("Loading the reranker"):
        reranker.backend.warmup()
    with create_qdrant_retriever(collection.documents, k=DEPTH) as retriever:
        for query_id in track(chosen, "Asking", console=err, transient=True, disable=not err.is_terminal):
            query = collection.queries[query_id]
            before[query_id] = retrieve(retriever, query)
            after[query_id] = rerank(reranker, query, before[query_id])
    comparison = compare(collection.qrels, before, after, count_tokens=_token_counter())
    return Experiment(collection, before, after, comparison)


def _token_counter() -> Callable[[str], int]:
    """Counts as the embedded model does, whichever reranker is used."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def print_setting(out: Console, what: str, experiment: Experiment, reranker: Reranker) -> None:
    """What was asked of whom."""
    asked, queries = len(experiment.before), len(experiment.collection.queries)
    backend = reranker.backend
    name = f"{backend.name}:{backend.model}" if backend.model else backend.name
    out.print(f"{what}; {asked} of {queries} questions.", markup=False)
    out.print(f"Before: the best {DEPTH} of BM25 in Qdrant. After: the same {DEPTH}, ordered by {name}.", markup=False)
    out.print()


def print_example(out: Console, experiment: Experiment, number: int | None) -> None:
    """One question's best documents side by side: the `number`-th, from 1, or else one with a typical gain."""
    query_id, why = _example(experiment.comparison, list(experiment.before), number)
    right = {id_ for id_, grade in experiment.collection.qrels[query_id].items() if grade > 0}
    mark = "\u2713" if out.encoding.startswith("utf") else "*"
    out.print(Text(one_line(experiment.collection.queries[query_id]), "bold"))
    out.print(_side_by_side(experiment.before[query_id], experiment.after[query_id], right, mark, width=out.width))
    out.print()
    stages = (experiment.comparison.before, experiment.comparison.after)
    before, after = (stage.scores["nDCG@10"][query_id] for stage in stages)
    out.print(f"{mark} marks a right answer. {why}: its nDCG@10 goes from {before:.2f} to {after:.2f}.")
    out.print()


def _example(comparison: Comparison, asked: Sequence[str], number: int | None) -> tuple[str, str]:
    """The query to show, and why that one: a typical gain, not the best."""
    if number is not None:
        return asked[number - 1], f"Question {number} of {len(asked)}"
    typical = typical_gain(comparison.gains)
    if typical is None:
        return asked[0], "No question gained; this is the first"
    improved = sum(gain > 0 for gain in comparison.gains.values())
    return typical, f"Of the {improved} questions that gained, this one has the median gain"


def _side_by_side(before: Ranked, after: Ranked, right: set[str], mark: str, *, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column("", width=1)
    for name in ("before", "after"):
        table.add_column("", width=1)
        table.add_column(name, ratio=1)
    room = (width - 12) // 2 * 5 // 2  # two and a half lines of one of the two columns
    columns = [[_cells(document, right, mark, room) for document in side.documents[:SHOWN]] for side in (before, after)]
    for place, (left, other) in enumerate(zip_longest(*columns, fillvalue=(Text(), Text())), 1):
        table.add_row(str(place), *left, *other)
    return table


def _cells(document: Document, right: set[str], mark: str, room: int) -> tuple[Text, Text]:
    """The mark of a right answer, and the beginning of its text."""
    sign, style = (mark, "green") if document.id in right else ("", "")
    return Text(sign, style), Text(shorten(one_line(document.page_content), room, placeholder=" ..."), style)


def print_comparison(out: Console, comparison: Comparison) -> None:
    """The table, and what it says."""
    out.print(to_table(comparison))
    out.print()
    out.print(verdict(comparison))
    out.print("Times are medians. Tokens are counted by the embedded model's tokenizer.")


def write_json(file: Path, reranker: Reranker, comparison: Comparison) -> None:
    """Write all numbers.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    backend = {"backend": reranker.backend.name, "model": reranker.backend.model}
    with _writing(file):
        file.write_text(json.dumps({**backend, **to_json(comparison)}, indent=2) + "\n", encoding="utf-8")


def check_plot(file: Path) -> None:
    """Refuse what cannot be drawn before anybody waits.

    Raises:
        ConfigurationError: Matplotlib writes no such kind of file.
        MissingDependencyError: Matplotlib is not installed.
    """
    require(*EXTRAS["plot"], extra="plot")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known:
        raise ConfigurationError(f"Cannot draw {file}: the name of a picture ends in .png, .svg or .pdf")


def write_plot(file: Path, comparison: Comparison) -> None:
    """Draw the comparison.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    figure = to_plot(comparison)
    with _writing(file):
        figure.savefig(file, dpi=150)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"Cannot write {file}: {error.strerror or error}") from error
