"""A cascade: a reranker that costs little sorts out, one that costs more decides.

python examples/cascade.py
python examples/cascade.py bge:BAAI/bge-reranker-v2-m3          (pip install 'langchain-rerank[bge]')
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from langchain_rerank import Backend, Reranker, create_qdrant_retriever, create_rerank_retriever, init_reranker

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"
QUESTION = "How far does it go on one charge?"


class OverlapBackend(Backend):
    """Stands for your small model: the share of the question's words that a text has."""

    def _score(self, query: str, texts: Sequence[str]) -> list[float]:
        asked = words(query)
        return [len(asked & words(text)) / max(1, len(asked)) for text in texts]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


small = Reranker(backend=OverlapBackend(), top_n=6)
large = sys.argv[1] if len(sys.argv) > 1 else "embedded"
cascade = init_reranker([small, large], top_n=3)

sections = HANDBOOK.read_text("utf-8").split("\n\n## ")
recall = create_qdrant_retriever(sections, k=20)
retriever = create_rerank_retriever(recall, cascade)

print(QUESTION)
for document in retriever.invoke(QUESTION):
    title, _, _ = document.page_content.partition("\n")
    first, second = (stage["score"] for stage in document.metadata["stage_scores"])
    print(f"recalled as number {document.metadata['retrieval_rank']:2}, small {first:.3f}, large {second:.3f}: {title}")
