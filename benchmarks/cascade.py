"""A cascade beside its last stage alone: the embedded model keeps 20 of 100, a BERT-base model ranks these.

    python benchmarks/cascade.py [--data DIR] [--runs 3] [--only TEXT] [--json FILE] [--markdown FILE]

The table is about time alone: the BERT-base model has random weights, so its rankings mean nothing. What the cascade
can cost in quality is measured with `--data DIR` on the embedded model's real weights: the nDCG@10 that a perfect last
stage would reach from BM25's best 100 documents, and from the 20 of them that the embedded model, or BM25, keeps; 100
queries of SciFact and of Cranfield, in another table.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

from _common import Case, Figures, main, peak_memory, table
from _shapes import place, task

from langchain_rerank import Reranker, init_reranker

MODELS = Path(__file__).parent / ".models"
DOCUMENTS, KEPT = 100, 20
TIMES = 2


def embedded(top_n: int | None = None) -> Reranker:
    return init_reranker("embedded", top_n=top_n)


def big() -> Reranker:
    """BERT-base with random weights, at the default settings."""
    return init_reranker("cross-encoder", model=str(place("bert-base", MODELS).resolve()))


def timed(stages: tuple[str, ...]) -> Figures:
    """Seconds for one query with its 100 documents."""
    made = {"embedded": embedded(KEPT if "big" in stages else None), "big": big() if "big" in stages else None}
    reranker = init_reranker([made[stage] for stage in stages]) if len(stages) > 1 else made[stages[0]]
    assert reranker is not None
    given = task(None, DOCUMENTS)
    reranker.rerank(given.query, given.passages[:25])
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        reranker.rerank(given.query, given.passages)
        seconds.append(time.perf_counter() - began)
    return {"s/query": median(seconds), "peak MiB": peak_memory()}


CASES: dict[str, Case] = {
    "BERT-base alone, 100 documents": partial(timed, ("big",)),
    "embedded keeps 20, then BERT-base": partial(timed, ("embedded", "big")),
    "embedded alone, 100 documents": partial(timed, ("embedded",)),
}


def bounds(data: Path, queries: int = 100) -> dict[str, Figures]:
    """The nDCG@10 that a perfect ranking of what is kept would reach, by collection."""
    from quality import bm25_run, load, ndcg
    from settings import ranked

    found: dict[str, Figures] = {}
    for name in ("scifact", "cranfield"):
        collection = load(data, name, queries)
        before = bm25_run(collection)
        runs = {
            f"BM25's best {DOCUMENTS}": {query: best(scores, DOCUMENTS) for query, scores in before.items()},
            f"{KEPT} kept by BM25": {query: best(scores, KEPT) for query, scores in before.items()},
            f"{KEPT} kept by the embedded model": ranked(collection, before, embedded(KEPT), DOCUMENTS)[0],
        }
        found[name] = {
            label: ndcg(
                collection,
                {query: {key: collection.qrels[query].get(key, 0) for key in kept} for query, kept in run.items()},
            )
            for label, run in runs.items()
        }
    return found


def best(scores: dict[str, float], count: int) -> list[str]:
    """The documents with the highest scores."""
    return sorted(scores, key=lambda name: -scores[name])[:count]


if __name__ == "__main__":
    os.environ.setdefault("LANGCHAIN_RERANK_CACHE", str(MODELS.resolve() / "converted"))
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--queries", type=int, default=100)
    given, rest = parser.parse_known_args()
    status = main(__doc__ or "", CASES, arguments=rest)
    if given.data and "--case" not in rest:
        print(f"\nnDCG@10 of a perfect last stage\n\n{table(bounds(given.data, given.queries))}")
    sys.exit(status)
