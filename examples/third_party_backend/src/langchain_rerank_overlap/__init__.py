"""A reranker that counts common words."""

import re
from collections.abc import Sequence

from langchain_rerank import Backend

__all__ = ["OverlapBackend"]


class OverlapBackend(Backend):
    """Share of the query's words that a text has, each counted once: no model, no sense, but every right of a backend.

    A query without a single word gives each text 0.
    """

    lowercase: bool = True
    """Whether `Mars` and `mars` are the same word."""

    ignore: frozenset[str] = frozenset()
    """Words of the query that do not count, such as `{"the", "is"}`; in lower case where `lowercase` holds."""

    def _score(self, query: str, texts: Sequence[str]) -> list[float]:
        asked = self._words(query) - self.ignore
        return [len(asked & self._words(text)) / max(1, len(asked)) for text in texts]

    def _words(self, text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower() if self.lowercase else text))
