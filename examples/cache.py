"""Scores on disk: what was asked before costs nothing, also for the next process.

python examples/cache.py
python examples/cache.py ./scores          (twice: the second time no model is asked)
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from langchain_classic.storage import LocalFileStore
from langchain_core.tracers.context import collect_runs

from langchain_rerank import Reranker, init_reranker

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"
SECTIONS = HANDBOOK.read_text("utf-8").split("\n\n## ")[1:]


def ask(what: str, reranker: Reranker, question: str, sections: list[str]) -> None:
    with collect_runs() as collected:
        best = reranker.rerank(question, sections)[0]
    usage = collected.traced_runs[0].outputs["usage"]
    title, _, _ = best.text.partition("\n")
    print(f"{what:20} {usage['cache_hits']:2} known, {usage['cache_misses']:2} new, best: {title}")


def main(folder: Path | str) -> None:
    store = LocalFileStore(folder)
    reranker = init_reranker("embedded", cache=store)
    question = "How do I turn on the lights?"

    ask("first", reranker, question, SECTIONS[:20])
    ask("again", reranker, question, SECTIONS[:20])
    ask("more documents", reranker, question, SECTIONS)
    ask("another question", reranker, "How heavy is the battery?", SECTIONS)
    # Everything that can change a score is part of the key, so that a score of other options is never taken.
    ask("another max_length", init_reranker("embedded", cache=store, max_length=192), question, SECTIONS)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with TemporaryDirectory() as folder:
            main(folder)
