"""What the tests register as retrievers of another package."""

from typing import ClassVar

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import SecretStr

NO_RETRIEVER = "text"


class Shelf(BaseRetriever):
    """A class, with an option that must be given."""

    shelf: list[str]
    key: SecretStr = SecretStr("")

    def _get_relevant_documents(self, query, *, run_manager):
        return [Document(page_content=text) for text in self.shelf]


def shelves(size: int = 2, **texts):
    """A function that takes any name, and gives a vector store."""
    return InMemoryVectorStore.from_texts(list(texts.values()), DeterministicFakeEmbedding(size=size))


class Closable(BaseRetriever):
    """Remembers that it was closed."""

    closed: ClassVar[list[bool]] = []

    def _get_relevant_documents(self, query, *, run_manager):
        return []

    def close(self):
        self.closed.append(True)
