"""Pluggable rerankers for LangChain: one `Reranker`, backends swapped by config."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_rerank.backends.base import Backend
    from langchain_rerank.errors import RerankError
    from langchain_rerank.factory import init_reranker
    from langchain_rerank.reranker import Reranker, RerankResult
    from langchain_rerank.retrievers import RerankRetriever, create_qdrant_retriever, create_rerank_retriever

__all__ = [
    "Backend",
    "RerankError",
    "RerankResult",
    "RerankRetriever",
    "Reranker",
    "create_qdrant_retriever",
    "create_rerank_retriever",
    "init_reranker",
]

_HOMES = {
    "Backend": "backends.base",
    "RerankError": "errors",
    "RerankResult": "reranker",
    "RerankRetriever": "retrievers",
    "Reranker": "reranker",
    "create_qdrant_retriever": "retrievers",
    "create_rerank_retriever": "retrievers",
    "init_reranker": "factory",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("langchain-rerank")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
