"""Quality and speed at each setting of engine and dtype, so that no speed is bought with quality unseen.

    python benchmarks/settings.py [--data DIR] [-o OPTIONS] [--queries 100] [--depth 50] [--json FILE] [--markdown FILE]

The embedded model's weights, through `cross-encoder:` unless `backend=embedded` is among the options, rank BM25's best
50 documents of 100 queries of SciFact and of Cranfield; the sample is the same every time. nDCG@10, seconds for a query
(the median), and how much scores change against the first setting. `-o engine=openvino,dtype=int8` measures that
setting and may be given again; the first one is what the others are held against. `dtype=int8` is calibrated on pairs
of the demo collection. Each setting is one fresh process, once: for speed beside others there is `latency.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from _common import Figures, machine, table, versions
from _shapes import calibration, place
from langchain_core.documents import Document
from quality import Collection, Run, bm25_run, load, ndcg

from langchain_rerank import Reranker, init_reranker

HERE = Path(__file__).parent
SETTINGS = (
    "engine=torch,dtype=float32",
    "engine=torch,dtype=bfloat16",
    "engine=onnxruntime,dtype=float32",
    "engine=openvino,dtype=float32",
    "engine=openvino,dtype=bfloat16",
    "engine=openvino,dtype=int8",
    "backend=embedded",
    "backend=embedded,engine=openvino",
)
COLLECTIONS = ("scifact", "cranfield")
MAX_LENGTH = 256
"""What the model was trained on, at every setting."""


def reranker(setting: str, models: Path) -> Reranker:
    """The embedded model's weights at one setting."""
    options: dict[str, Any] = {
        name.strip(): yaml.safe_load(value) for name, _, value in (o.partition("=") for o in setting.split(","))
    }
    backend = options.pop("backend", "cross-encoder")
    if backend != "embedded":
        options = {"model": str(place("minilm", models)), **options}
    if options.get("dtype") == "int8":
        options = {"calibration": calibration(models), **options}
    return init_reranker(backend, **{"max_length": MAX_LENGTH, **options})


def measure(setting: str, options: argparse.Namespace) -> dict[str, Any]:
    """One setting on all collections: figures and scores by collection."""
    chosen = reranker(setting, options.models)
    chosen.warmup()
    found: dict[str, Any] = {}
    for name in options.collection or COLLECTIONS:
        collection = load(options.data, name, options.queries)
        scores, seconds = ranked(collection, bm25_run(collection), chosen, options.depth)
        figures = {"nDCG@10": ndcg(collection, scores), "s/query": statistics.median(seconds)}
        found[name] = {"figures": figures, "scores": scores}
    return found


def ranked(collection: Collection, before: Run, chosen: Reranker, depth: int) -> tuple[Run, list[float]]:
    """The scores of the best documents of each query, and the seconds that each query took."""
    scores: Run = {}
    seconds = []
    for query, text in collection.queries.items():
        best = sorted(before[query], key=lambda name: -before[query][name])[:depth]
        documents = [Document(id=name, page_content=collection.documents[name]) for name in best]
        began = time.perf_counter()
        kept = chosen.compress_documents(documents, text)
        seconds.append(time.perf_counter() - began)
        scores[query] = {str(document.id): document.metadata["relevance_score"] for document in kept}
    return scores, seconds


def in_fresh_process(setting: str, arguments: Sequence[str]) -> dict[str, Any]:
    """One setting measured by another interpreter; `{"trouble": ...}` where it cannot be."""
    print(f"measuring {setting}", file=sys.stderr)
    command = [sys.executable, __file__, *arguments, "--one", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"trouble": (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(found: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Figures]:
    """One collection's table; changes are held against the first setting that could be measured."""
    measured = {setting: result[name] for setting, result in found.items() if name in result}
    first: Run = next(iter(measured.values()), {"scores": {}})["scores"]
    return {setting: {**each["figures"], **changes(first, each["scores"])} for setting, each in measured.items()}


def changes(first: Run, other: Run) -> Figures:
    """The largest and the mean difference of scores."""
    differences = [abs(score - other[query][name]) for query in first for name, score in first[query].items()]
    return {"max score change": max(differences), "mean score change": statistics.fmean(differences)}


def bm25(options: argparse.Namespace, name: str) -> float:
    """What the rankings start from."""
    collection = load(options.data, name, options.queries)
    return ndcg(collection, bm25_run(collection))


def report(found: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Machine, one table for each collection, and what could not run."""
    about = machine()
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [(__doc__ or "").partition("\n")[0], f"{about['cpu']}, {about['cores']} cores; {packages}."]
    for name in options.collection or COLLECTIONS:
        head = f"{options.queries} queries, BM25's best {options.depth}, nDCG@10 of BM25 {bm25(options, name):.4f}"
        parts += [f"## {name}: {head}", table(rows(found, name))]
    parts += [f"- {setting} could not run: {each['trouble']}" for setting, each in found.items() if "trouble" in each]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every setting and print the tables.

    Returns:
        0 if any could be measured, else 1.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    os.environ.setdefault("LANGCHAIN_RERANK_CACHE", str(options.models.resolve() / "converted"))
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return 0
    place("minilm", options.models)
    found = {setting: in_fresh_process(setting, given) for setting in options.setting or SETTINGS}
    shown = report(found, options)
    print(shown)
    if options.markdown:
        options.markdown.write_text(shown + "\n", encoding="utf-8")
    if options.json:
        tables = {name: rows(found, name) for name in options.collection or COLLECTIONS}
        content = {"machine": machine(), "versions": versions(), "queries": options.queries, "tables": tables}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if any("trouble" not in each for each in found.values()) else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE.parent / "../shared/data/eval"
    made.add_argument("--data", type=Path, default=default, help="collections in BEIR layout")
    made.add_argument("--collection", action="append", help="instead of scifact and cranfield; may be given again")
    made.add_argument("-o", "--setting", action="append", metavar="OPTIONS", help="such as engine=torch,dtype=float32")
    made.add_argument("--queries", type=int, default=100, help="queries of each collection (100)")
    made.add_argument("--depth", type=int, default=50, help="documents for each query (50)")
    made.add_argument("--models", type=Path, default=HERE / ".models", help="where models are kept")
    made.add_argument("--one", metavar="OPTIONS", help="measure one setting, here, and print JSON")
    made.add_argument("--json", type=Path, help="write the tables there")
    made.add_argument("--markdown", type=Path, help="write what is printed there as well")
    return made


if __name__ == "__main__":
    sys.exit(main())
