"""The contract of every backend, and what is this one's own."""

import pytest
from langchain_rerank_overlap import OverlapBackend

from langchain_rerank import Backend, init_reranker
from langchain_rerank.testing import BackendTests


class TestOverlap(BackendTests):
    """Some twenty tests, inherited."""

    @pytest.fixture
    def backend(self) -> Backend:
        """What they test."""
        return OverlapBackend()


def test_it_is_found_by_its_name() -> None:
    assert isinstance(init_reranker("overlap").backend, OverlapBackend)


def test_its_options_are_configuration() -> None:
    reranker = init_reranker({"backend": "overlap", "lowercase": False, "ignore": ["the"], "top_n": 1})

    [best] = reranker.rerank("the planet Mars", ["the planet mars", "planet Mars"])

    assert (best.text, best.score) == ("planet Mars", 1.0)


def test_each_word_counts_once() -> None:
    assert OverlapBackend().score("red planet", ["red red red", "a red planet", "blue"]) == [0.5, 1.0, 0.0]


def test_a_query_without_words_gives_zero() -> None:
    assert OverlapBackend().score("?!", ["Mars"]) == [0.0]
