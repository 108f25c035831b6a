"""A reranker as LangChain's own `BaseCrossEncoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_core.cross_encoders import BaseCrossEncoder

if TYPE_CHECKING:
    from langchain_rerank.reranker import Reranker


class CrossEncoderAdapter(BaseCrossEncoder):
    """Scores pairs with a reranker's backend, for what takes a `BaseCrossEncoder`.

    Args:
        reranker: Whose backend scores.
    """

    def __init__(self, reranker: Reranker) -> None:
        self._reranker = reranker

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score pairs of query and text; those with the same query go to the backend together.

        Args:
            text_pairs: n pairs.

        Returns:
            n floats in [0, 1], in their order.
        """
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(text_pairs):
            places.setdefault(query, []).append(place)
        asked = [(query, [text_pairs[place][1] for place in several]) for query, several in places.items()]
        answers = self._reranker.backend.score_many(asked)
        scores = {
            place: float(score)
            for several, answer in zip(places.values(), answers, strict=True)
            for place, score in zip(several, answer, strict=True)
        }
        return [scores[place] for place in range(len(text_pairs))]
