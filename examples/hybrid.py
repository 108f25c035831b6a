"""Hybrid recall in Qdrant: what an embedding finds, what BM25 finds, both fused in two ways, and reranked."""

from pathlib import Path
from typing import Any
from zlib import crc32

from langchain_core.embeddings import Embeddings
from qdrant_client import QdrantClient

from langchain_rerank import create_qdrant_retriever, create_rerank_retriever

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"
QUESTION = "Can I clean it with a preasure washer?"  # as people type


class LetterEmbeddings(Embeddings):
    """Stands for your embedding, so that this runs anywhere: it counts runs of three letters.

    You write `embedding="huggingface:sentence-transformers/all-MiniLM-L6-v2"` below, or another name that
    `init_embeddings` takes.
    """

    def embed_query(self, text: str) -> list[float]:  # noqa: D102
        letters = text.lower()
        numbers = [crc32(letters[i : i + 3].encode()) % 512 for i in range(len(letters) - 2)]
        return [float(numbers.count(place)) for place in range(512)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:  # noqa: D102
        return [self.embed_query(text) for text in texts]


def said_by_halves(metadata: dict[str, Any]) -> str:
    """The scores of both halves of a hybrid search, where they were asked for."""
    return "".join(f", {half} {score:.2f}" for half, score in metadata.get("prefetch_scores", {}).items())


embedding = LetterEmbeddings()
client = QdrantClient(":memory:")  # one database for all; your own program needs only one hybrid retriever
sections = HANDBOOK.read_text("utf-8").split("\n\n## ")

hybrid = create_qdrant_retriever(sections, embedding=embedding, mode="hybrid", client=client, k=10)
stages = {
    "Embedding": create_qdrant_retriever(embedding=embedding, mode="dense", client=client),
    "BM25": create_qdrant_retriever(mode="sparse", client=client),
    "Both, fused by rank": hybrid,
    "Both, fused by score": create_qdrant_retriever(
        embedding=embedding, mode="hybrid", fusion="dbsf", client=client, k=10, prefetch_scores=True
    ),
    "Fused and reranked": create_rerank_retriever(hybrid, "embedded"),
}

print(QUESTION)
for name, stage in stages.items():
    print(f"\n{name}")
    for place, document in enumerate(stage.invoke(QUESTION)[:3], start=1):
        title, _, _ = document.page_content.partition("\n")
        print(f"  {place}. {title}{said_by_halves(document.metadata)}")
