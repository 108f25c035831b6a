"""The contract finds what it is there to find: four broken backends each fail it, and say why."""

import asyncio
import inspect
import math

import pytest

from langchain_rerank.backends.base import Backend
from langchain_rerank.errors import BackendError
from langchain_rerank.testing import QUERY, TEXTS, BackendTests


class Lexical(Backend):
    """Share of the query's words that are in the text, and a little for other text."""

    def _score(self, query, texts):
        asked = set(query.lower().strip("?").split())
        return [0.9 * len(asked & set(text.lower().split())) / len(asked) + 0.05 / len(text) for text in texts]


class TooFew(Lexical):
    def _score(self, query, texts):
        return super()._score(query, texts)[:-1] if len(texts) > 1 else super()._score(query, texts)


class Nan(Lexical):
    def _score(self, query, texts):
        return [math.nan, *super()._score(query, texts)[1:]]


class DependsOnItsBatch(Lexical):
    def _score(self, query, texts):
        return [score / len(texts) for score in super()._score(query, texts)]


class Sorted(Lexical):
    def _score(self, query, texts):
        return sorted(super()._score(query, texts), reverse=True)


class TestLexical(BackendTests):
    @pytest.fixture
    def backend(self):
        return Lexical()


class Unwise(Lexical):
    """Consistent, and always wrong: what random weights may do."""

    def _score(self, query, texts):
        return [1 - score for score in super()._score(query, texts)]


class TestUntrained(BackendTests):
    trained = False

    @pytest.fixture
    def backend(self):
        return Unwise()


def failures(backend):
    """The names of the contract's tests that fail for a backend."""
    suite, failed = BackendTests(), []
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            try:
                outcome = test(backend)
                if inspect.iscoroutine(outcome):
                    asyncio.run(outcome)
            except (AssertionError, BackendError):
                failed.append(name)
    return failed


def test_a_good_backend_fails_nothing():
    assert failures(Lexical()) == []


@pytest.mark.parametrize(
    ("broken", "found_by"),
    [
        (TooFew(), "test_each_text_gets_one_score_between_0_and_1"),
        (Nan(), "test_each_text_gets_one_score_between_0_and_1"),
        (DependsOnItsBatch(), "test_a_score_does_not_depend_on_its_neighbours"),
        (Sorted(), "test_scores_come_in_the_order_of_the_texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_backend_fails(broken, found_by):
    assert found_by in failures(broken)


def test_the_broken_ones_are_refused_with_the_reason():
    with pytest.raises(BackendError, match=f"returned {len(TEXTS) - 1} scores for {len(TEXTS)} texts"):
        TooFew().score(QUERY, TEXTS)
    with pytest.raises(BackendError, match="returned nan for text 0"):
        Nan().score(QUERY, TEXTS)


def test_a_trained_model_that_ranks_the_answer_low_fails():
    assert failures(Unwise()) == ["test_the_answer_comes_first"]


def test_an_untrained_model_is_not_asked_for_an_order():
    assert TestUntrained.test_the_answer_comes_first is None
    assert callable(TestLexical.test_the_answer_comes_first)
