"""What the layer around a model costs: ranking, hand-over, cache; how cost grows with passages and tokens; memory.

    python benchmarks/overhead.py [--runs 3] [--only TEXT] [--json FILE] [--markdown FILE]

The first rows rank 100 documents of the demo collection by a model that costs nothing: what is left is the package's
own time, of which less than 1 ms is promised for `Reranker`. `local` has a free model behind the queue that callers
share, so that batching counts too. The others run a cross-encoder of two small layers and random weights, which reads
2,048 tokens: what grows there is what the package and the attention make grow.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from _common import Case, Figures, main, peak_memory, quantile, timed, tiny_cross_encoder
from langchain_core.documents import Document
from langchain_core.stores import InMemoryByteStore

from langchain_rerank import Backend, Reranker, init_reranker
from langchain_rerank.backends.local import Batch, Encoding, LocalBackend, Logits
from langchain_rerank.data import load_stackfaq

DOCUMENTS = 100
TIMES = 200
QUESTION = "How do I turn on the lights?"
POSITIONS = 2048
LONGEST = 600
"""Characters, which are fewer than 256 tokens."""


class Free(Backend):
    """Scores that cost nothing."""

    def _score(self, query: str, texts: Sequence[str]) -> list[float]:  # noqa: ARG002
        return [0.5] * len(texts)


class FreeLocal(LocalBackend):
    """A model and a tokenizer that cost nothing, behind everything that local models share."""

    def _load(self) -> None:
        pass

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:  # noqa: ARG002
        return [Encoding(_IDS) for _ in texts]

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:  # noqa: ARG002
        return []

    def _forward(self, batch: Batch) -> Logits:
        return np.zeros(len(batch))


_IDS = [1] * 128


def documents() -> list[Document]:
    """Such as are read whole."""
    return [document for document in load_stackfaq().documents if len(document.page_content) < LONGEST][:DOCUMENTS]


def per_call(function: Callable[[], object], times: int = TIMES) -> Figures:
    """The median and the 95th percentile of one call."""
    seconds = timed(function, times=times, before=10)
    return {"ms": median(seconds) * 1000, "p95 ms": quantile(seconds, 0.95) * 1000}


def ranked_by(reranker: Reranker) -> Figures:
    found = documents()
    return per_call(lambda: reranker.compress_documents(found, QUESTION))


def awaited(reranker: Reranker) -> Figures:
    found = documents()

    async def measured() -> Figures:
        seconds = []
        loop = asyncio.get_running_loop()
        for _ in range(TIMES + 10):
            began = loop.time()
            await reranker.acompress_documents(found, QUESTION)
            seconds.append(loop.time() - began)
        return {"ms": median(seconds[10:]) * 1000, "p95 ms": quantile(seconds[10:], 0.95) * 1000}

    return asyncio.run(measured())


def scored(backend: Backend) -> Figures:
    texts = [document.page_content for document in documents()]
    return per_call(lambda: backend.score(QUESTION, texts))


def cached() -> Figures:
    return ranked_by(init_reranker("embedded", cache=InMemoryByteStore()))


def growing(reranker: Reranker, query: str, texts: Sequence[str]) -> Figures:
    """The time of one query, and the memory of the process."""
    reranker.warmup()
    before = peak_memory()
    best = median(timed(lambda: reranker.rerank(query, texts), times=3, before=1)) * 1000
    return {"ms": best, "ms per passage": best / len(texts), "peak MiB": peak_memory(), "loaded MiB": before}


def of_the_model(passages: int, tokens: int) -> Figures:
    """Some passages, each longer than the tokens that it may have with the query."""
    words = " ".join(f"w{number % 1000}" for number in range(tokens))
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_cross_encoder(Path(folder), positions=POSITIONS)
        reranker = init_reranker(f"cross-encoder:{model}", max_length=tokens, device="cpu", dtype="float32")
        return growing(reranker, "w1 w2 w3", [f"w{place} {words}" for place in range(passages)])


def of_the_embedded_model(passages: int) -> Figures:
    corpus = list(load_stackfaq().corpus.values())
    texts = [f"{place} {corpus[place % len(corpus)]}" for place in range(passages)]
    return growing(init_reranker("embedded"), QUESTION, texts)


CASES: dict[str, Case] = {
    f"Reranker, {DOCUMENTS} documents": lambda: ranked_by(Reranker(backend=Free())),
    f"Reranker, {DOCUMENTS} documents, awaited": lambda: awaited(Reranker(backend=Free())),
    f"Reranker and local, {DOCUMENTS} documents": lambda: ranked_by(Reranker(backend=FreeLocal())),
    f"Reranker and local, {DOCUMENTS} documents, awaited": lambda: awaited(Reranker(backend=FreeLocal())),
    f"local alone, {DOCUMENTS} texts": lambda: scored(FreeLocal()),
    "local alone, batch_tokens 32768": lambda: scored(FreeLocal(batch_tokens=32768)),
    f"{DOCUMENTS} hits of a cache in memory": cached,
    **{f"embedded, {count} passages": partial(of_the_embedded_model, count) for count in (10, 100, 1000)},
    **{f"tiny, {count} passages of 128 tokens": partial(of_the_model, count, 128) for count in (10, 100, 1000)},
    **{f"tiny, 20 passages of {tokens} tokens": partial(of_the_model, 20, tokens) for tokens in (64, 256, 512, 1024)},
    f"tiny, 20 passages of {POSITIONS} tokens": partial(of_the_model, 20, POSITIONS),
}

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", CASES))
