"""How good the rankings are, measured: `python benchmarks/quality.py --data DIR [--short] [--only NAME] [--json FILE]`.

Prints a Markdown table and ends with status 1 if a measurement is below the least that is promised. DIR holds
collections in BEIR layout: NAME/corpus.jsonl.gz, NAME/queries.jsonl, NAME/qrels.tsv.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ir_measures
import numpy as np
from langchain_core.documents import Document

from langchain_rerank import Reranker, create_qdrant_retriever, init_reranker
from langchain_rerank.sparse import BM25SparseEmbeddings

SEED = 0
QUERIES = 200
NDCG = ir_measures.nDCG @ 10

Run: TypeAlias = dict[str, dict[str, float]]
"""Scores by query id and document id."""


@dataclass(frozen=True)
class Collection:
    """Documents, a fixed sample of the queries that have judgements, and the judgements of those."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measurement: str
    collection: str
    queries: int
    measure: str
    reference: float
    value: float
    least: float

    @property
    def good(self) -> bool:
        """Whether the promise holds."""
        return self.value >= self.least


def load(data: Path, name: str, queries: int = QUERIES) -> Collection:
    """Read a collection; of its queries a sample that depends on nothing but the data and `SEED`."""
    folder = data / name
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    documents = {record["_id"]: f"{record.get('title') or ''} {record['text']}".strip() for record in records}
    asked = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    qrels: dict[str, dict[str, int]] = defaultdict(dict)
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels[query][document] = int(grade)
    judged = sorted(record["_id"] for record in asked if record["_id"] in qrels)
    sample = set(random.Random(SEED).sample(judged, min(queries, len(judged))))
    texts = {record["_id"]: record["text"] for record in asked if record["_id"] in sample}
    return Collection(name, documents, texts, {query: qrels[query] for query in texts})


def bm25_against_bm25s(data: Path, *, short: bool) -> Iterator[Row]:
    """BM25 in Qdrant, beside bm25s with the same k1 and b on the same queries.

    Embedded Qdrant takes a fifth of a second a query and more, so the ranking is computed from the same vectors with
    Qdrant's formula; on the first queries embedded Qdrant itself must give the same.
    """
    for name, tokenize, margin in (("scifact", english, 0.02), ("cmrc2018-dev-sent", bigrams, 0.03)):
        collection = load(data, name)
        run = bm25_run(collection)
        check_in_qdrant(collection, run, queries=5 if short else 20)
        reference = ndcg(collection, bm25s_run(collection, tokenize))
        yield Row(
            "BM25 in Qdrant, bm25s beside it",
            name,
            len(collection.queries),
            str(NDCG),
            reference,
            ndcg(collection, run),
            least=reference - margin,
        )


def embedded_over_bm25(data: Path, *, short: bool) -> Iterator[Row]:
    """The embedded reranker over BM25's best 50, alone where questions meet answers, mixed in elsewhere."""
    for name, weight, margin in (("stackfaq", 0.0, -0.03), ("scifact", 0.5, 0.0), ("cranfield", 0.5, 0.0)):
        collection = load(data, name, 25 if short else QUERIES)
        before = bm25_run(collection)
        after = reranked(collection, before, init_reranker("embedded", retrieval_weight=weight))
        reference = ndcg(collection, before)
        what = f"embedded over BM25's top 50, retrieval_weight {weight}"
        value = ndcg(collection, after)
        yield Row(what, name, len(collection.queries), str(NDCG), reference, value, least=reference - margin)


def passages_against_truncation(data: Path, *, short: bool) -> Iterator[Row]:
    """Long documents read whole, beside long documents cut, by a model that is shown 64 tokens at a time."""
    collection = load(data, "cranfield", 10 if short else 100)
    before = bm25_run(collection)
    cut, whole = (
        ndcg(collection, reranked(collection, before, init_reranker("embedded", max_length=64, long_documents=how)))
        for how in ("truncate", "max_passage")
    )
    what = "max_passage, truncate beside it, max_length 64"
    yield Row(what, collection.name, len(collection.queries), str(NDCG), cut, whole, least=cut)


def reranked(collection: Collection, run: Run, reranker: Reranker, depth: int = 50) -> Run:
    """The best `depth` documents of each query in the reranker's order, the rank as the score."""
    found = {}
    for query, text in collection.queries.items():
        best = sorted(run[query].items(), key=lambda item: -item[1])[:depth]
        documents = [
            Document(id=name, page_content=collection.documents[name], metadata={"retrieval_score": score})
            for name, score in best
        ]
        ranked = reranker.compress_documents(documents, text)
        found[query] = {str(document.id): -float(rank) for rank, document in enumerate(ranked)}
    return found


def bm25_run(collection: Collection) -> Run:
    """Our vectors, multiplied as Qdrant does it: ln((N - n + 0.5) / (n + 0.5) + 1) times the dot product."""
    texts = list(collection.documents.values())
    bm25 = BM25SparseEmbeddings().fit(texts)
    postings: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for row, vector in enumerate(bm25.embed_documents(texts)):
        for index, value in zip(vector.indices, vector.values, strict=True):
            postings[index].append((row, value))
    ids = np.array(list(collection.documents))
    run = {}
    for query, text in collection.queries.items():
        scores = np.zeros(len(ids))
        vector = bm25.embed_query(text)
        for index, weight in zip(vector.indices, vector.values, strict=True):
            if found := postings.get(index):
                rows, values = map(np.array, zip(*found, strict=True))
                idf = math.log((len(ids) - len(found) + 0.5) / (len(found) + 0.5) + 1)
                scores[rows.astype(int)] += weight * idf * values
        run[query] = {str(ids[row]): float(scores[row]) for row in np.nonzero(scores)[0]}
    return run


def check_in_qdrant(collection: Collection, run: Run, queries: int) -> None:
    """Stop if embedded Qdrant gives other scores, or another tenth score, than `run`."""
    documents = [Document(id=name, page_content=text) for name, text in collection.documents.items()]
    with create_qdrant_retriever(documents, k=10) as retriever:
        for query, text in list(collection.queries.items())[:queries]:
            found = {document.id or "": document.metadata["retrieval_score"] for document in retriever.invoke(text)}
            best = sorted(run[query].values(), reverse=True)[:10]
            np.testing.assert_allclose(list(found.values()), best, rtol=1e-4)
            np.testing.assert_allclose(list(found.values()), [run[query][name] for name in found], rtol=1e-4)


def bm25s_run(collection: Collection, tokenize: Callable[[list[str]], list[list[str]]]) -> Run:
    """The best 100 documents of bm25s."""
    import bm25s

    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(tokenize(list(collection.documents.values())), show_progress=False)
    ids = list(collection.documents)
    rows, scores = index.retrieve(tokenize(list(collection.queries.values())), k=100, show_progress=False)
    return {
        query: {ids[row]: float(score) for row, score in zip(*best, strict=True)}
        for query, *best in zip(collection.queries, rows, scores, strict=True)
    }


def english(texts: list[str]) -> list[list[str]]:
    """As bm25s does it: words of two characters and more, English stop words, Snowball stems."""
    import bm25s
    from Stemmer import Stemmer

    stemmer = Stemmer("english")
    tokens: list[list[str]] = bm25s.tokenize(
        texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
    )
    return tokens


def bigrams(texts: list[str]) -> list[list[str]]:
    """Every two neighbours among the letters and digits."""
    kept = ["".join(filter(str.isalnum, text)) for text in texts]
    return [[text[start : start + 2] for start in range(len(text) - 1)] for text in kept]


def ndcg(collection: Collection, run: Mapping[str, Mapping[str, float]]) -> float:
    """Mean nDCG@10 over the collection's queries, by ir_measures."""
    return float(ir_measures.calc_aggregate([NDCG], collection.qrels, run)[NDCG])


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| measurement | collection | queries | measure | reference | value | least | |", "|---" * 8 + "|"]
    lines += [
        f"| {row.measurement} | {row.collection} | {row.queries} | {row.measure} | {row.reference:.4f} "
        f"| {row.value:.4f} | {row.least:.4f} | {'good' if row.good else 'TOO LOW'} |"
        for row in rows
    ]
    return "\n".join(lines)


MEASUREMENTS: dict[str, Callable[..., Iterator[Row]]] = {
    "bm25": bm25_against_bm25s,
    "embedded": embedded_over_bm25,
    "long-documents": passages_against_truncation,
}
"""By the name that `--only` takes; each is called with the data's folder and `short`, and yields rows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements and print the table.

    Returns:
        0 if every promise holds, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "../shared/data/eval"
    parser.add_argument("--data", type=Path, default=default, help="collections in BEIR layout")
    parser.add_argument("--short", action="store_true", help="fewer queries where that is allowed")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="run this one; may be given again")
    parser.add_argument("--json", type=Path, help="write the rows there")
    options: Any = parser.parse_args(arguments)
    rows = [
        row for name in options.only or MEASUREMENTS for row in MEASUREMENTS[name](options.data, short=options.short)
    ]
    print(table(rows))
    if options.json:
        content = [{**asdict(row), "good": row.good} for row in rows]
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
