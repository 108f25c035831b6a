"""How good a ranking is before and after reranking."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from langchain_rerank._optional import require
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.reranker import Reranker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Qrels: TypeAlias = Mapping[str, Mapping[str, int]]
"""Query id to document id to grade; a grade above 0 is relevant."""

METRICS = ("nDCG@10", "MRR@10", "R@5", "R@10")
"""What is compared."""

DEPTH = 50
"""How many documents the first stage hands over. Its R@50 bounds what any reranker can reach."""

CONTEXT_BEFORE, CONTEXT_AFTER = 10, 5
"""How many of the best documents a reader (a language model, say) is given without and with reranking."""

RESAMPLES = 10_000

_BLUE, _ORANGE = "#0072b2", "#d55e00"
"""Colours that are told apart by everybody: Okabe and Ito, https://jfly.uni-koeln.de/color/"""


@dataclass(frozen=True)
class Ranked:
    """The documents found for one query."""

    documents: Sequence[Document]
    """Best first, each with its id."""

    seconds: float
    """How long this stage took."""


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences, and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f}, 95 % interval {self.low:+.3f} to {self.high:+.3f}"


@dataclass(frozen=True)
class Stage:
    """What one stage of the pipeline gives over all queries."""

    scores: Mapping[str, Mapping[str, float]]
    """Metric to query id to value, in [0, 1]."""

    milliseconds: float
    """Median time of one query in this stage alone."""

    context_tokens: float | None
    """Mean tokens of the documents that a reader is given; `None` if nobody counted."""

    def mean(self, metric: str) -> float:
        """A metric's mean over the queries."""
        return statistics.fmean(self.scores[metric].values())


@dataclass(frozen=True)
class Comparison:
    """The same queries before and after reranking."""

    before: Stage
    after: Stage

    @property
    def gains(self) -> dict[str, float]:
        """How much nDCG@10 rose, by query id."""
        before, after = self.before.scores["nDCG@10"], self.after.scores["nDCG@10"]
        return {query_id: after[query_id] - before[query_id] for query_id in before}

    @cached_property
    def difference(self) -> Interval:
        """The paired difference of nDCG@10."""
        return bootstrap(list(self.gains.values()))


def retrieve(retriever: BaseRetriever, query: str) -> Ranked:
    """Ask the first stage, and take the time."""
    start = time.perf_counter()
    documents = retriever.invoke(query)
    return Ranked(documents, time.perf_counter() - start)


def rerank(reranker: Reranker, query: str, found: Ranked) -> Ranked:
    """Rank all that the first stage found, and take the time; the reranker's `top_n` and threshold are put aside."""
    start = time.perf_counter()
    documents = reranker.compress_documents(found.documents, query, top_n=None, score_threshold=None)
    return Ranked(documents, time.perf_counter() - start)


def compare(
    qrels: Qrels,
    before: Mapping[str, Ranked],
    after: Mapping[str, Ranked],
    *,
    count_tokens: Callable[[str], int] | None = None,
) -> Comparison:
    """Score the rankings of the same queries before and after reranking.

    Args:
        qrels: What is relevant. Its other queries are left out.
        before: The first stage's ranking by query id.
        after: The reranked ones.
        count_tokens: Counts the tokens of a text, for the length of the context.

    Returns:
        Both stages, with their scores for each query.

    Raises:
        ConfigurationError: The two have different queries, or none, or the qrels lack one of them.
        MissingDependencyError: ir-measures is not installed.
    """
    if not before or before.keys() != after.keys():
        raise ConfigurationError(f"before has {len(before)} queries, after {len(after)}; they must be the same ones")
    first = _stage(qrels, before, (*METRICS, f"R@{DEPTH}"), CONTEXT_BEFORE, count_tokens)
    return Comparison(first, _stage(qrels, after, METRICS, CONTEXT_AFTER, count_tokens))


def score_run(
    qrels: Qrels, run: Mapping[str, Sequence[str]], metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, float]]:
    """Score the order of documents with ir_measures.

    Args:
        qrels: What is relevant. Queries that are not in `run` are left out.
        run: Query id to document ids, best first. A query that found nothing has an empty list, and scores 0.
        metrics: Names such as nDCG@10, MRR@10 and R@5.

    Returns:
        Metric to query id to value, in [0, 1].

    Raises:
        ConfigurationError: A metric is unknown, or the qrels lack a query.
        MissingDependencyError: ir-measures is not installed.
    """
    if unjudged := [query_id for query_id in run if query_id not in qrels]:
        raise ConfigurationError(f"The qrels say nothing of {len(unjudged)} queries, such as {unjudged[0]!r}")
    names = {_measure(metric): metric for metric in metrics}
    judged = {query_id: dict(qrels[query_id]) for query_id in run}
    # The libraries below sort by score and break ties by id: a score that falls with the rank keeps our order.
    scored = {
        query_id: {document_id: -float(rank) for rank, document_id in enumerate(ids)} for query_id, ids in run.items()
    }
    scores: dict[str, dict[str, float]] = {metric: {} for metric in metrics}
    for found in _ir_measures().iter_calc(list(names), judged, scored):
        scores[names[found.measure]][found.query_id] = float(found.value)
    return scores


def bootstrap(differences: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of paired differences with its 95 % percentile bootstrap interval.

    Queries are drawn with replacement, 10,000 times. Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13.

    Args:
        differences: One for each query, at least one.
        seed: Of the draws: the same differences give the same interval.

    Returns:
        Mean, 2.5th and 97.5th percentile of the resampled means.
    """
    values, draw = np.asarray(differences, dtype=np.float64), np.random.default_rng(seed)
    means = [float(draw.choice(values, len(values)).mean()) for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def spread_sample(items: Sequence[str], count: int) -> list[str]:
    """At most `count` of the items at equal distances: the same ones each time, from the whole range."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def typical_gain(gains: Mapping[str, float]) -> str | None:
    """The query whose gain is the median among those that gained (the lower of two middles); `None` if none did."""
    improved = sorted((gain, query_id) for query_id, gain in gains.items() if gain > 0)
    return improved[(len(improved) - 1) // 2][1] if improved else None


def rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The table's cells: what, before, after."""
    before, after = comparison.before, comparison.after
    cells = [(metric, f"{before.mean(metric):.3f}", f"{after.mean(metric):.3f}") for metric in METRICS]
    deep = f"R@{DEPTH}"
    cells.append((deep, f"{before.mean(deep):.3f}", "same"))
    cells.append(("ms per query", f"{before.milliseconds:.0f}", f"+ {after.milliseconds:.0f}"))
    if before.context_tokens is not None and after.context_tokens is not None:
        cells.append(
            (
                "context tokens",
                f"{before.context_tokens:.0f} (best {CONTEXT_BEFORE})",
                f"{after.context_tokens:.0f} (best {CONTEXT_AFTER})",
            )
        )
    return cells


def to_table(comparison: Comparison) -> Table:
    """The table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("", "before", "after", box=SIMPLE_HEAD, show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows(comparison):
        table.add_row(*row)
    return table


def to_markdown(comparison: Comparison) -> str:
    """The table for a document, with the paired difference below."""
    lines = [f"| {what} | {before} | {after} |" for what, before, after in rows(comparison)]
    return "\n".join(["| | before | after |", "|---|---:|---:|", *lines, "", verdict(comparison)])


def verdict(comparison: Comparison) -> str:
    """The paired difference in one sentence."""
    return (
        f"nDCG@10 {comparison.difference} (paired bootstrap over {len(comparison.gains)} queries, "
        f"{RESAMPLES:,} resamples)."
    )


def to_plot(comparison: Comparison) -> Figure:
    """The metrics before and after, and beside them how much each query gained, as a figure of Matplotlib.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    means, gains = figure.subplots(1, 2)
    _plot_means(means, comparison)
    _plot_gains(gains, comparison)
    return figure


def _plot_means(axes: Axes, comparison: Comparison) -> None:
    """Two bars for each metric, with their values."""
    for name, stage, shift, colour in (
        ("before", comparison.before, -0.2, "0.7"),
        ("after", comparison.after, 0.2, _BLUE),
    ):
        places = [place + shift for place in range(len(METRICS))]
        bars = axes.bar(places, [stage.mean(metric) for metric in METRICS], 0.4, label=name, color=colour)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(METRICS)), METRICS)
    axes.set_ylim(0, 1.2)  # room for the legend
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_title(f"Mean over {len(comparison.gains)} queries")
    axes.legend(frameon=False, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_gains(axes: Axes, comparison: Comparison) -> None:
    """A bar for each query, largest gain first; their mean, and where that lies with 95 % confidence."""
    gains = sorted(comparison.gains.values(), reverse=True)
    better, worse, difference = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), comparison.difference
    axes.bar(range(len(gains)), gains, 1.0, color=[_BLUE if gain > 0 else _ORANGE for gain in gains])
    axes.axhspan(difference.low, difference.high, color="black", alpha=0.15, lw=0)
    axes.axhline(difference.mean, color="black", lw=1)
    axes.axhline(0, color="0.7", lw=0.5)
    axes.set_xticks([])
    axes.set_xlabel(f"{better} queries better, {len(gains) - better - worse} as before, {worse} worse")
    axes.set_title(f"Gain in nDCG@10: {difference}", fontsize=10)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, for machines: means, the difference, and each query's scores."""
    stages = {"before": comparison.before, "after": comparison.after}
    difference = comparison.difference
    return {
        "queries": len(comparison.gains),
        **{name: _numbers(stage) for name, stage in stages.items()},
        "difference": {"metric": "nDCG@10", **vars(difference)},
        "scores": {name: stage.scores for name, stage in stages.items()},
    }


def _stage(
    qrels: Qrels,
    rankings: Mapping[str, Ranked],
    metrics: Sequence[str],
    context: int,
    count_tokens: Callable[[str], int] | None,
) -> Stage:
    run = {query_id: [_id(document) for document in ranking.documents] for query_id, ranking in rankings.items()}
    tokens = None
    if count_tokens is not None:
        tokens = statistics.fmean(
            sum(count_tokens(document.page_content) for document in ranking.documents[:context])
            for ranking in rankings.values()
        )
    median = statistics.median(ranking.seconds for ranking in rankings.values())
    return Stage(score_run(qrels, run, metrics), median * 1000, tokens)


def _id(document: Document) -> str:
    if document.id is None:
        raise ConfigurationError(
            f"A document without id cannot be judged: {document.page_content[:60]!r}. Give each Document its id"
        )
    return document.id


def _measure(metric: str) -> Any:
    ir_measures = _ir_measures()
    known = {"nDCG": ir_measures.nDCG, "MRR": ir_measures.RR, "R": ir_measures.R}
    name, _, cutoff = metric.partition("@")
    if name not in known or not cutoff.isdecimal():
        raise ConfigurationError(f"Unknown metric {metric!r}; metrics look like nDCG@10, MRR@10 and R@5")
    return known[name] @ int(cutoff)


def _ir_measures() -> Any:
    require("ir_measures", extra="eval")
    import ir_measures

    return ir_measures


def _numbers(stage: Stage) -> dict[str, float | None]:
    means = {metric: stage.mean(metric) for metric in stage.scores}
    return {**means, "milliseconds": stage.milliseconds, "context_tokens": stage.context_tokens}
