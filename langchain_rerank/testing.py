"""The contract of a backend, as tests to inherit."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
from langchain_core.documents import Document
from pydantic import SecretStr, ValidationError

from langchain_rerank.backends.base import Backend
from langchain_rerank.reranker import Reranker

QUERY = "Which planet is called the red planet?"

TEXTS = (
    "Mars is often called the red planet, because of the iron oxide on its surface.",
    "Jupiter is the largest planet.",
    "The recipe asks for two eggs, a cup of flour and a little milk; stir it until it is smooth, then let it rest.",
    "Venus is the hottest planet in the solar system.",
    "red",
    "On a clear night one sees about two and a half thousand stars without a telescope, and some of the planets too.",
    "The planet Mars is the fourth from the Sun.",
)


class BackendTests:
    """What every backend must do. Inherit it and give the fixture `backend`; pytest and pytest-asyncio run it.

    ```python
    class TestMine(BackendTests):
        @pytest.fixture
        def backend(self):
            return MyBackend(...)
    ```
    """

    trained: ClassVar[bool] = True
    """Whether the model has learned anything: False for random weights, of which no order is expected."""

    tolerance: ClassVar[float] = 1e-4
    """Most that a score may move with its neighbours; batches of another shape round otherwise."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.trained:  # not collected, rather than passed unseen
            cls.test_the_answer_comes_first = None  # type: ignore[assignment,method-assign]

    @pytest.fixture
    def backend(self) -> Backend:
        """The backend under test."""
        raise NotImplementedError("give BackendTests a fixture 'backend' that returns the backend under test")

    def same(self, scores: list[float], expected: list[float]) -> bool:
        """Whether two lists of scores are equal within `tolerance`."""
        return scores == pytest.approx(expected, abs=self.tolerance)

    def test_each_text_gets_one_score_between_0_and_1(self, backend: Backend) -> None:
        scores = backend.score(QUERY, TEXTS)

        assert len(scores) == len(TEXTS)
        assert all(isinstance(score, float) and 0.0 <= score <= 1.0 for score in scores)

    def test_scores_come_in_the_order_of_the_texts(self, backend: Backend) -> None:
        scores = dict(zip(TEXTS, backend.score(QUERY, TEXTS), strict=True))
        shuffled = random.Random(0).sample(TEXTS, len(TEXTS))  # noqa: S311 - an order, no secret

        assert self.same(backend.score(QUERY, shuffled), [scores[text] for text in shuffled])
        assert self.same(backend.score(QUERY, TEXTS[::-1]), [scores[text] for text in TEXTS[::-1]])

    def test_a_score_does_not_depend_on_its_neighbours(self, backend: Backend) -> None:
        together = backend.score(QUERY, TEXTS)

        assert self.same([backend.score(QUERY, [text])[0] for text in TEXTS], together)
        assert self.same(backend.score(QUERY, TEXTS * 5), together * 5)

    def test_different_texts_get_different_scores(self, backend: Backend) -> None:
        assert len(set(backend.score(QUERY, TEXTS))) > 1

    def test_the_query_counts(self, backend: Backend) -> None:
        assert not self.same(backend.score("How do I cook pancakes?", TEXTS), backend.score(QUERY, TEXTS))

    def test_the_answer_comes_first(self, backend: Backend) -> None:
        scores = backend.score(QUERY, TEXTS)

        assert scores[0] == max(scores)
        assert scores[0] > scores[2]

    def test_no_texts_give_no_scores(self, backend: Backend) -> None:
        assert backend.score(QUERY, []) == []

    def test_an_empty_text_scores_zero(self, backend: Backend) -> None:
        assert backend.score(QUERY, ["", " \n"]) == [0.0, 0.0]
        assert backend.score(QUERY, ["", TEXTS[0]])[0] == 0.0

    def test_any_unicode_is_scored(self, backend: Backend) -> None:
        texts = ["emoji 🪐🚀", "火星は赤い惑星です。", "lone surrogate \ud800.", "zero\x00byte", "كوكب أحمر"]
        scores = backend.score("🪐 \udfff 红色行星", texts)

        assert len(scores) == len(texts)
        assert all(math.isfinite(score) for score in scores)

    def test_a_long_text_is_scored(self, backend: Backend) -> None:
        [score] = backend.score(QUERY, ["Mars is a planet. " * 3000])

        assert 0.0 <= score <= 1.0

    def test_a_long_query_is_scored(self, backend: Backend) -> None:
        scores = backend.score(QUERY * 300, TEXTS)

        assert len(scores) == len(TEXTS)

    async def test_awaited_scores_are_the_same(self, backend: Backend) -> None:
        assert self.same(await backend.ascore(QUERY, TEXTS), backend.score(QUERY, TEXTS))
        assert await backend.ascore(QUERY, []) == []

    async def test_concurrent_awaits_do_not_mix(self, backend: Backend) -> None:
        queries = [QUERY, "How do I cook pancakes?", "How many stars are there?"]
        expected = [backend.score(query, TEXTS) for query in queries]
        found = await asyncio.gather(*(backend.ascore(query, TEXTS) for query in queries * 3))

        assert all(self.same(scores, want) for scores, want in zip(found, expected * 3, strict=True))

    def test_threads_do_not_mix(self, backend: Backend) -> None:
        queries = [QUERY, "How do I cook pancakes?", "How many stars are there?"]
        expected = [backend.score(query, TEXTS) for query in queries]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda query: backend.score(query, TEXTS), queries * 3))

        assert all(self.same(scores, want) for scores, want in zip(found, expected * 3, strict=True))

    def test_it_travels_as_its_configuration(self, backend: Backend) -> None:
        expected = backend.score(QUERY, TEXTS)

        for copied in (pickle.loads(pickle.dumps(backend)), copy.deepcopy(backend)):  # noqa: S301 - our own bytes
            assert copied.model_dump() == backend.model_dump()
            assert self.same(copied.score(QUERY, TEXTS), expected)

    def test_options_are_checked_and_frozen(self, backend: Backend) -> None:
        with pytest.raises(ValidationError):
            type(backend)(**{**dict(backend), "no_such_option": 1})
        with pytest.raises(ValidationError):
            backend.max_attempts = 2  # type: ignore[misc]

    def test_no_secret_is_printed(self, backend: Backend) -> None:
        secrets = [value.get_secret_value() for _, value in backend if isinstance(value, SecretStr)]

        assert not any(secret in f"{backend!r} {backend} {backend.model_dump()}" for secret in secrets if secret)

    def test_it_ranks_documents(self, backend: Backend) -> None:
        documents = [Document(id=str(i), page_content=text, metadata={"n": i}) for i, text in enumerate(TEXTS)]
        ranked = Reranker(backend=backend).compress_documents(documents, QUERY)
        scores = [document.metadata["relevance_score"] for document in ranked]

        assert scores == sorted(scores, reverse=True)
        assert sorted(str(document.id) for document in ranked) == [str(i) for i in range(len(TEXTS))]
        assert json.dumps([document.metadata for document in ranked])
