"""Throughput, latency and event-loop lag with 1, 8 and 32 concurrent queries, awaited and in threads.

    python benchmarks/concurrency.py [--runs 3] [--only TEXT] [--json FILE] [--markdown FILE]

The embedded model ranks 10 passages of the demo collection for each of 64 queries; so many are under way at a time as
the row says, a new one beginning when one ends. `one after another` is a loop in one thread, with several sizes of
batch; `rerank_many` takes all queries in one call. The lag is how much later than asked an event loop wakes from a
sleep of 5 ms.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from _common import Case, Figures, main, quantile

from langchain_rerank import Reranker, init_reranker
from langchain_rerank.data import load_stackfaq

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUERIES, PASSAGES = 64, 10
NAP = 0.005


def asked() -> Iterator[tuple[str, list[str]]]:
    """Queries, each with other passages."""
    collection = load_stackfaq()
    texts, queries = list(collection.corpus.values()), list(collection.queries.values())
    for place in range(QUERIES):
        yield queries[place], [texts[(place * PASSAGES + step) % len(texts)] for step in range(PASSAGES)]


def ready(batch_tokens: int | None = None) -> Reranker:
    """The embedded model, loaded."""
    reranker = init_reranker("embedded", batch_tokens=batch_tokens)
    reranker.warmup()
    return reranker


def figures(seconds: float, latencies: list[float]) -> Figures:
    found = {"queries/s": QUERIES / seconds, "pairs/s": QUERIES * PASSAGES / seconds}
    if latencies:
        found |= {"p50 ms": quantile(latencies, 0.5) * 1000, "p95 ms": quantile(latencies, 0.95) * 1000}
    return found


def one_after_another(batch_tokens: int | None) -> Figures:
    reranker, latencies = ready(batch_tokens), []
    began = time.perf_counter()
    for query, texts in asked():
        start = time.perf_counter()
        reranker.rerank(query, texts)
        latencies.append(time.perf_counter() - start)
    return figures(time.perf_counter() - began, latencies)


def in_one_call() -> Figures:
    reranker = ready()
    queries, texts = zip(*asked(), strict=True)
    began = time.perf_counter()
    reranker.rerank_many(queries, texts)
    return figures(time.perf_counter() - began, [])


def in_threads(count: int) -> Figures:
    reranker = ready()

    def ask(query: str, texts: list[str]) -> float:
        start = time.perf_counter()
        reranker.rerank(query, texts)
        return time.perf_counter() - start

    with ThreadPoolExecutor(count) as pool:
        began = time.perf_counter()
        latencies = list(pool.map(lambda pair: ask(*pair), list(asked())))
        return figures(time.perf_counter() - began, latencies)


def awaited(count: int) -> Figures:
    return asyncio.run(_awaited(count, ready()))


async def _awaited(count: int, reranker: Reranker) -> Figures:
    slots = asyncio.Semaphore(count)

    async def ask(query: str, texts: list[str]) -> float:
        async with slots:
            start = time.perf_counter()
            await reranker.arerank(query, texts)
            return time.perf_counter() - start

    calls = [ask(query, texts) for query, texts in asked()]
    async with lagging() as lags:
        began = time.perf_counter()
        latencies = await asyncio.gather(*calls)
        seconds = time.perf_counter() - began
    lag = {"lag p50 ms": quantile(lags, 0.5) * 1000, "lag p99 ms": quantile(lags, 0.99) * 1000}
    return figures(seconds, latencies) | lag


@asynccontextmanager
async def lagging() -> AsyncIterator[list[float]]:
    """Collects by how many seconds the loop wakes too late, meanwhile."""
    lags: list[float] = []

    async def nap() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(NAP)
            lags.append(time.perf_counter() - start - NAP)

    napping = asyncio.create_task(nap())
    try:
        yield lags
    finally:
        napping.cancel()
        with suppress(asyncio.CancelledError):
            await napping


CASES: dict[str, Case] = {
    "one after another": partial(one_after_another, None),
    "one after another, batch_tokens 256": partial(one_after_another, 256),
    "one after another, batch_tokens 1024": partial(one_after_another, 1024),
    "rerank_many": in_one_call,
    **{f"awaited, {count} at a time": partial(awaited, count) for count in (1, 8, 32)},
    **{f"{count} threads": partial(in_threads, count) for count in (1, 8, 32)},
}

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", CASES))
