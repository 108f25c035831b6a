import asyncio
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from fakes import LengthBackend, ScriptedBackend
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from qdrant_client import QdrantClient, models
from qdrant_fake import PLACES, place_of

from langchain_rerank import Reranker, RerankRetriever, create_qdrant_retriever, create_rerank_retriever
from langchain_rerank.errors import (
    CollectionMismatchError,
    ConfigurationError,
    MissingDependencyError,
    RetrieverError,
    UnexpectedKeywordError,
)
from langchain_rerank.sparse import BM25SparseEmbeddings

PLANETS = [
    Document(id="m", page_content="Mars is the red planet", metadata={"moons": 2}),
    Document(id="j", page_content="Jupiter is the largest planet", metadata={"moons": 95}),
    Document(id="s", page_content="Saturn has rings", metadata={"moons": 146}),
]
FEW_MOONS = {"must": [{"key": "metadata.moons", "range": {"lt": 100}}]}


class Letters(Embeddings):
    """How often each letter occurs; counts its calls."""

    def __init__(self, alphabet="abcdefghijklmnopqrstuvwxyz"):
        self.alphabet = alphabet
        self.embedded = []

    def embed_query(self, text):
        return [float(text.lower().count(letter)) for letter in self.alphabet]

    def embed_documents(self, texts):
        self.embedded += texts
        return [self.embed_query(text) for text in texts]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    with place_of(request.param, tmp_path) as place:
        yield place


def ids(documents):
    return [document.id for document in documents]


def texts(documents):
    return [document.page_content for document in documents]


def reranker(**options):
    """Ranks the planets Saturn, Jupiter, Mars."""
    scores = {"Saturn has rings": 0.9, "Jupiter is the largest planet": 0.8, "Mars is the red planet": 0.7}
    return Reranker(backend=ScriptedBackend(scores=scores), **options)


# The same in memory, in a folder and on a server


def test_documents_come_back_as_they_went_in_with_score_and_rank(place):
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        found = retriever.invoke("the largest planets")

    assert [(document.id, document.page_content) for document in found] == [
        ("j", "Jupiter is the largest planet"),
        ("m", "Mars is the red planet"),
    ]
    scores = [document.metadata["retrieval_score"] for document in found]
    assert scores == sorted(scores, reverse=True)
    assert all(type(score) is float for score in scores)
    assert [document.metadata for document in found] == [
        {"moons": 95, "retrieval_score": scores[0], "retrieval_rank": 1},
        {"moons": 2, "retrieval_score": scores[1], "retrieval_rank": 2},
    ]


def test_dense_mode_searches_by_the_embedding(place):
    with create_qdrant_retriever(PLANETS, embedding=Letters(), **place) as retriever:
        found = retriever.invoke("sgnir sah nrutas")

    assert ids(found)[0] == "s"
    assert len(found) == 3
    assert found[0].metadata["retrieval_score"] == pytest.approx(1)


def test_hybrid_mode_fuses_both_by_reciprocal_rank(place):
    query, options = "sgnir sah nrutas planet red", {"embedding": Letters(), "mode": "hybrid", **place}
    with create_qdrant_retriever(PLANETS, **options) as retriever:
        found = retriever.invoke(query)
    with create_qdrant_retriever(PLANETS, embedding=Letters()) as retriever:
        dense = ids(retriever.invoke(query))
    with create_qdrant_retriever(PLANETS) as retriever:
        sparse = ids(retriever.invoke(query))

    assert (dense, sparse) == (["s", "m", "j"], ["m", "j"])
    scores = {
        name: 1 / (2 + dense.index(name)) + (1 / (2 + sparse.index(name)) if name in sparse else 0) for name in dense
    }
    assert {document.id: document.metadata["retrieval_score"] for document in found} == pytest.approx(scores)
    assert ids(found) == ["m", "j", "s"]


def test_writing_twice_changes_nothing(place):
    plain = ["a text without an id", Document(page_content="another", metadata={"n": [1, {"deep": None}]})]
    embedding = Letters()
    with create_qdrant_retriever([*PLANETS, *plain], embedding=embedding, **place) as retriever:
        first = retriever.invoke("an id")
    with create_qdrant_retriever([*PLANETS, *plain], embedding=embedding, **place) as retriever:
        again = retriever.invoke("an id")

    assert len(first) == 5
    assert [(doc.id, doc.page_content) for doc in again] == [(doc.id, doc.page_content) for doc in first]
    assert len(embedding.embedded) == 5


def test_a_document_with_a_known_id_takes_the_place_of_the_old_one(place):
    create_qdrant_retriever(PLANETS, **place).close()
    changed = [
        Document(id="m", page_content="Mars is a dusty planet", metadata={"moons": 2}),
        Document(id="j", page_content="Jupiter is the largest planet", metadata={"moons": 97}),
    ]

    with create_qdrant_retriever(changed, **place) as retriever:
        found = {document.id: document for document in retriever.invoke("planet")}

    assert found["m"].page_content == "Mars is a dusty planet"
    assert found["j"].metadata["moons"] == 97
    assert len(found) == 2


def test_k_and_filter_are_taken_by_the_call(place):
    with create_qdrant_retriever(PLANETS, embedding=Letters(), k=2, **place) as retriever:
        assert len(retriever.invoke("planet")) == 2
        assert len(retriever.invoke("planet", k=1)) == 1
        assert sorted(ids(retriever.invoke("planet", k=3, filter=FEW_MOONS))) == ["j", "m"]
        assert sorted(ids(retriever.invoke("planet", k=3, filter=models.Filter(**FEW_MOONS)))) == ["j", "m"]
        assert [len(found) for found in retriever.batch(["planet", "ring"], k=3)] == [3, 3]


def test_a_filter_of_the_retriever_holds_until_a_call_brings_its_own(place):
    many = {"must": [{"key": "metadata.moons", "range": {"gt": 100}}]}
    with create_qdrant_retriever(PLANETS, embedding=Letters(), filter=FEW_MOONS, **place) as retriever:
        assert sorted(ids(retriever.invoke("planet"))) == ["j", "m"]
        assert ids(retriever.invoke("planet", filter=many)) == ["s"]


async def test_async_callers_get_the_same(place):
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        expected = retriever.invoke("planet", k=1, filter=FEW_MOONS)

        assert await retriever.ainvoke("planet", k=1, filter=FEW_MOONS) == expected
        assert len(expected) == 1


async def test_many_callers_at_once_get_what_one_gets(place):
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        queries = ["planet", "rings", "red", "largest planet"] * 8
        expected = [retriever.invoke(query) for query in queries]

        writing = asyncio.gather(*(retriever.aadd_documents(PLANETS) for _ in range(5)))
        assert await retriever.abatch(queries) == expected
        await writing

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(retriever.invoke, queries)) == expected


def test_retrievers_over_one_embedded_client_take_turns():
    class Watched(QdrantClient):
        inside, most = 0, 0

        def query_points(self, *args, **options):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.02)
            self.inside -= 1
            return super().query_points(*args, **options)

    client = Watched(":memory:")
    retrievers = [create_qdrant_retriever(PLANETS, client=client) for _ in range(2)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: retrievers[n % 2].invoke("planet"), range(8)))

    client.close()
    assert client.most == 1
    assert [len(documents) for documents in found] == [2] * 8


def test_the_average_length_of_the_first_documents_stays(place):
    long = [Document(id="long", page_content="mars " * 50)]
    create_qdrant_retriever(PLANETS, **place).close()
    with create_qdrant_retriever(long, **place) as retriever:
        second = retriever.invoke("mars")
    with create_qdrant_retriever([*long, *PLANETS], **place) as retriever:
        assert retriever.invoke("mars") == second
        kept = retriever.collection.connection.get_collection("documents").config.metadata

    average = BM25SparseEmbeddings().fit(texts(PLANETS)).average_length
    assert kept == {"langchain_rerank": {"bm25": {"k1": 0.9, "b": 0.4, "average_length": average, "analyzer": 1}}}


def test_the_average_length_that_another_retriever_kept_meanwhile_is_taken():
    client = QdrantClient(":memory:")
    first, second = create_qdrant_retriever(client=client), create_qdrant_retriever(client=client)

    first.add_documents(PLANETS)
    second.add_documents(["mars " * 50])

    assert second.vectorstore.sparse_embeddings == first.vectorstore.sparse_embeddings
    assert first.vectorstore.sparse_embeddings.average_length == 3
    client.close()


def test_an_average_length_of_your_own_is_kept_too(place):
    create_qdrant_retriever(bm25=BM25SparseEmbeddings(average_length=7), **place).close()

    with create_qdrant_retriever(PLANETS, **place) as retriever:
        assert retriever.vectorstore.sparse_embeddings.average_length == 7


def test_vectors_may_have_names_of_their_own(place):
    options = {"mode": "hybrid", "embedding": Letters(), "vector_name": "letters", "sparse_vector_name": "words"}
    create_qdrant_retriever(PLANETS, **options, **place).close()

    with create_qdrant_retriever(**options, **place) as retriever:
        found = retriever.invoke("rings")
        config = retriever.collection.connection.get_collection("documents").config.params

    assert found[0].id == "s"
    assert (list(config.vectors), list(config.sparse_vectors)) == (["letters"], ["words"])


def test_documents_may_come_later(place):
    with create_qdrant_retriever(**place) as retriever:
        assert retriever.invoke("planet") == []
        assert len(retriever.add_documents(doc for doc in PLANETS)) == 3
        assert ids(retriever.invoke("rings")) == ["s"]
        assert retriever.add_documents([]) == []


def test_strange_characters_survive_and_lone_surrogates_are_replaced(place):
    strange = Document(
        id="\ud800", page_content="red \ud800 planet \0 🪐", metadata={"k\udfff": ["é\ud83d"], "n": 10**15}
    )

    with create_qdrant_retriever([strange], **place) as retriever:
        [found] = retriever.invoke("red \ud800")

    assert found.id == "\ufffd"
    assert found.page_content == "red \ufffd planet \0 🪐"
    assert found.metadata["k\ufffd"] == ["é\ufffd"]
    assert found.metadata["n"] == 10**15


def test_a_query_without_words_finds_nothing(place):
    with create_qdrant_retriever([*PLANETS, "", "the of"], **place) as retriever:
        assert retriever.invoke("") == []
        assert retriever.invoke("the of") == []


def test_metadata_keys_that_langchain_qdrant_writes_to_are_kept(place):
    own = {"_id": 7, "_collection_name": "mine", "_langchain_rerank": {"id": "x"}, "moons": 2}

    with create_qdrant_retriever([Document(id="m", page_content="Mars", metadata=own)], **place) as retriever:
        [found] = retriever.invoke("mars")

    assert found.id == "m"
    assert found.metadata == {**own, "retrieval_score": found.metadata["retrieval_score"], "retrieval_rank": 1}


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({"embedding": Letters()}, {"embedding": Letters("abc")}, "has vectors of size 26, the embedding's have 3"),
        ({"embedding": Letters()}, {"embedding": Letters(), "distance": "dot"}, "has the distance 'Cosine', not 'Dot'"),
        (
            {"embedding": Letters()},
            {"embedding": Letters(), "vector_name": "v"},
            "has dense vectors named '', not 'v'. Nothing was written. Give another vector_name or",
        ),
        (
            {"embedding": Letters(), "vector_name": "v"},
            {"embedding": Letters()},
            "has dense vectors named 'v', not ''",
        ),
        ({"embedding": Letters()}, {}, "has sparse vectors named nothing, not 'langchain-sparse'"),
        ({}, {"embedding": Letters()}, "has dense vectors named nothing, not ''"),
        ({}, {"sparse_vector_name": "s"}, "has sparse vectors named 'langchain-sparse', not 's'"),
        ({}, {"embedding": Letters(), "mode": "hybrid"}, "has dense vectors named nothing"),
        ({}, {"bm25": BM25SparseEmbeddings(b=0.5)}, "BM25 vectors made with .*'b': 0.4.* not .*'b': 0.5"),
        ({}, {"bm25": BM25SparseEmbeddings(average_length=9)}, "BM25 vectors made with .*not .*'average_length': 9"),
    ],
)
def test_a_collection_that_was_made_otherwise_is_refused_before_writing(place, made, asked, message):
    create_qdrant_retriever(PLANETS[:1], **made, **place).close()

    with pytest.raises(CollectionMismatchError, match=message):
        create_qdrant_retriever(PLANETS, **asked, **place)

    with create_qdrant_retriever(**made, **place) as retriever:
        assert retriever.collection.connection.count("documents").count == 1


def test_a_collection_without_the_idf_modifier_is_refused_before_writing():
    client = QdrantClient(":memory:")
    plain = {"langchain-sparse": models.SparseVectorParams()}
    client.create_collection("documents", vectors_config={}, sparse_vectors_config=plain)

    with pytest.raises(CollectionMismatchError, match="'langchain-sparse' without the IDF modifier"):
        create_qdrant_retriever(PLANETS, client=client)

    assert client.count("documents").count == 0
    client.close()


def test_a_collection_with_documents_of_unknown_average_length_can_be_searched_and_not_written():
    client = QdrantClient(":memory:")
    bm25 = BM25SparseEmbeddings(average_length=3)
    with create_qdrant_retriever(PLANETS, client=client, bm25=bm25) as retriever:
        expected = retriever.invoke("planet")
    client._client.collections["documents"].config.metadata = None  # as another program would have made it

    with create_qdrant_retriever(client=client) as retriever:
        assert retriever.invoke("planet") == expected
        with pytest.raises(RetrieverError, match=r"does not say which average length.* Nothing was written"):
            retriever.add_documents(["new"])
    assert client.count("documents").count == 3

    with create_qdrant_retriever(["new"], client=client, bm25=bm25) as retriever:
        assert texts(retriever.invoke("new")) == ["new"]
    client.close()


def test_without_qdrant_the_rest_works_and_the_pip_line_is_shown():
    code = """if True:
        import sys
        sys.modules["qdrant_client"] = sys.modules["langchain_qdrant"] = None
        from langchain_core.embeddings import DeterministicFakeEmbedding
        from langchain_core.vectorstores import InMemoryVectorStore
        from fakes import LengthBackend
        from langchain_rerank import create_qdrant_retriever, create_rerank_retriever
        store = InMemoryVectorStore.from_texts(["a", "bb"], DeterministicFakeEmbedding(size=3))
        print([found.page_content for found in create_rerank_retriever(store, LengthBackend()).invoke("a")])
        create_qdrant_retriever()
    """
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert process.stdout == "['bb', 'a']\n"
    assert "qdrant_client not found. Install with: pip install 'langchain-rerank[qdrant]'" in process.stderr


# Writing


def test_a_document_without_id_has_its_points():
    twice = ["Mars", Document(page_content="Mars"), Document(page_content="Mars", metadata={"n": 1})]

    with create_qdrant_retriever(twice) as retriever:
        found = retriever.invoke("mars")
        records, _ = retriever.collection.connection.scroll("documents")

    assert len(found) == 2
    assert sorted(ids(found)) == sorted(record.id for record in records)


def test_the_ids_of_points_never_change():
    """Else what is stored already would be stored twice."""
    with create_qdrant_retriever() as retriever:
        written = retriever.add_documents(
            [
                Document(id="doc-1", page_content="x"),
                Document(page_content="x", metadata={"b": 1, "a": ["é"]}),
                Document(page_content="x", metadata={"a": ["é"], "b": 1}),
                "x",
            ]
        )

    assert written == [
        "a67fca4a-eb70-52e2-8e06-a1e9b594a0c4",
        "9091f21e-3a12-5e8c-91e9-121959d35151",
        "e9a9e931-8d84-5c22-a1e4-ecaedf9b42b7",
    ]


def test_of_two_documents_with_one_id_the_last_is_kept():
    two = [Document(id="1", page_content="first"), Document(id="1", page_content="second")]

    with create_qdrant_retriever(two) as retriever:
        assert texts(retriever.invoke("first second")) == ["second"]


def test_none_among_texts_is_an_empty_text():
    with create_qdrant_retriever([None, "Mars"], embedding=Letters()) as retriever:
        assert sorted(texts(retriever.invoke("planet"))) == ["", "Mars"]


def test_the_documents_given_are_not_written_to():
    given = [Document(id="m", page_content="Mars", metadata={"deep": {"n": 1}})]

    with create_qdrant_retriever(given) as retriever:
        [found] = retriever.invoke("mars")
        found.metadata["deep"]["n"] = 2

        assert given == [Document(id="m", page_content="Mars", metadata={"deep": {"n": 1}})]
        assert retriever.invoke("mars")[0].metadata["deep"] == {"n": 1}


@pytest.mark.parametrize("value", [date(2026, 1, 1), {1, 2}, math.nan, [math.inf], {"deep": object()}, b"bytes"])
def test_metadata_that_is_no_json_is_refused_before_writing(value):
    client = QdrantClient(":memory:")
    documents = [*PLANETS, Document(id="d", page_content="x", metadata={"good": 1, "bad": value})]

    with pytest.raises(ConfigurationError, match=r"metadata\['bad'\] of documents\[3\] \(id 'd'\) is .* no JSON"):
        create_qdrant_retriever(documents, client=client)

    assert not client.collection_exists("documents")
    client.close()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("a text", "documents is one str; put it into a list"),
        (PLANETS[0], "documents is one Document; put it into a list"),
        ([PLANETS[0], 5], r"documents\[1\] is a int, not a Document or a text"),
    ],
)
def test_what_is_no_document_is_refused(documents, message):
    with pytest.raises(ConfigurationError, match=message):
        create_qdrant_retriever(documents)


def test_five_thousand_documents_from_a_generator():
    with create_qdrant_retriever((f"number{n} planet" for n in range(5000)), k=5) as retriever:
        assert texts(retriever.invoke("number4711")) == ["number4711 planet"]
        assert len(retriever.invoke("planet")) == 5


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "options", "shown"),
    [
        (Terminal(), {"batch_size": 1}, True),
        (Terminal(), {"batch_size": 1, "progress": False}, False),
        (Terminal(), {}, False),
        (io.StringIO(), {"batch_size": 1}, False),
    ],
)
def test_a_bar_is_shown_for_several_batches_on_a_terminal(monkeypatch, stream, options, shown):
    monkeypatch.setattr(sys, "stderr", stream)

    create_qdrant_retriever(PLANETS, **options).close()

    assert ("Writing 3 documents to documents" in stream.getvalue()) is shown


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "p", "url": "http://localhost"}, "Give one of location, path, url and client, not path and url"),
        ({"client": object()}, "client is a object; it must be a qdrant_client.QdrantClient"),
        ({"mode": "dense"}, "mode='dense' needs an embedding"),
        ({"mode": "hybrid"}, "mode='hybrid' needs an embedding"),
        ({"mode": "fuzzy"}, "Unknown mode 'fuzzy'; there are dense, sparse, hybrid"),
        ({"distance": "far"}, "Unknown distance 'far'; there are cosine, euclid, dot, manhattan"),
        ({"embedding": 5}, "embedding is a int, not a LangChain Embeddings or its name"),
        ({"embedding": "nobody:model"}, "embedding='nobody:model': Provider 'nobody' is not supported"),
        ({"k": 0}, "k is 0; it must be a whole number, 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"filter": {"nust": []}}, "is not a Qdrant filter. Write one like"),
        ({"filter": [1]}, "is not a Qdrant filter. Write one like"),
        ({"filter": {"topic": "space"}}, "'must': [{'key': 'metadata.topic', 'match': {'value': 'space'}}]"),
        ({"fusion": "sum"}, "Unknown fusion 'sum'; there are rrf, dbsf"),
        ({"bm25": {"average_lenght": 1}}, "Unknown option 'average_lenght' for bm25. Did you mean 'average_length'"),
        ({"bm25": {"b": 2}}, "cannot be: k1 is 0 or more"),
        ({"collection_name": 2024}, "collection_name is 2024; it must be a text, in YAML with quotes"),
        ({"payload_indexes": "metadata.moons"}, "payload_indexes is one text; put 'metadata.moons' into a list"),
        ({"payload_indexes": ["moons"]}, "names 'moons'; a field is named as in a filter, such as 'metadata.moons'"),
        ({"payload_indexes": {"metadata.moons": "int"}}, "Unknown kind of index 'int'; there are keyword, integer"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        create_qdrant_retriever(PLANETS, **options)


def test_an_embedding_may_be_named(tmp_path, monkeypatch):
    package = tmp_path / "langchain_mistralai"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from langchain_core.embeddings import DeterministicFakeEmbedding\n"
        "class MistralAIEmbeddings(DeterministicFakeEmbedding):\n"
        "    model: str\n"
        "    size: int = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    with create_qdrant_retriever(PLANETS, embedding="mistralai:tiny") as retriever:
        assert retriever.vectorstore.embeddings.model == "tiny"
        assert retriever.invoke(PLANETS[2].page_content)[0].id == "s"


def test_an_embedding_whose_package_is_missing_is_named():
    with pytest.raises(MissingDependencyError, match=r"ollama:m'.*pip install langchain-ollama"):
        create_qdrant_retriever(PLANETS, embedding="ollama:m")


def test_sparse_mode_leaves_a_given_embedding_alone():
    with create_qdrant_retriever(PLANETS, embedding="nobody:model", mode="sparse") as retriever:
        assert ids(retriever.invoke("rings")) == ["s"]


@pytest.mark.parametrize("keyword", ["top_n", "search_kwargs", "K"])
def test_a_keyword_that_a_retriever_does_not_know_is_refused(keyword):
    with create_qdrant_retriever(PLANETS) as retriever:
        for invoke in (retriever.invoke, lambda *args, **options: asyncio.run(retriever.ainvoke(*args, **options))):
            with pytest.raises(UnexpectedKeywordError, match=f"Unknown keyword '{keyword}'. A call takes k, filter."):
                invoke("planet", **{keyword: 3})


def test_an_impossible_k_for_one_call_is_refused():
    with create_qdrant_retriever(PLANETS) as retriever, pytest.raises(ConfigurationError, match="k is 0"):
        retriever.invoke("planet", k=0)


def test_a_closed_retriever_leaves_the_folder_to_others(tmp_path):
    retriever = create_qdrant_retriever(PLANETS, path=tmp_path)
    retriever.close()

    with create_qdrant_retriever(path=tmp_path) as other:
        assert len(other.invoke("planet")) == 2


async def test_a_search_does_not_block_the_event_loop():
    class Slow(Letters):
        def embed_query(self, text):
            time.sleep(0.2)
            threads.add(threading.get_ident())
            return super().embed_query(text)

    threads = set()
    retriever = create_qdrant_retriever(PLANETS, embedding=Slow())
    threads.clear()
    searching = asyncio.ensure_future(retriever.ainvoke("planet"))
    beats = 0
    while not searching.done():
        await asyncio.sleep(0.01)
        beats += 1

    retriever.close()
    assert beats >= 10
    assert threading.get_ident() not in threads


# The pipeline


class FixedRetriever(BaseRetriever):
    """Anybody's retriever."""

    def _get_relevant_documents(self, query, *, run_manager):
        return PLANETS


class Backwards(BaseDocumentCompressor):
    """Anybody's compressor."""

    top_n: int | None = None

    def compress_documents(self, documents, query, callbacks=None):
        return list(reversed(documents))[: self.top_n]


class TestRerankRetriever(RetrieversIntegrationTests):
    """LangChain's own tests, none of them changed."""

    @property
    def retriever_constructor(self):
        return RerankRetriever

    @property
    def retriever_constructor_params(self):
        recall = create_qdrant_retriever([f"planet number {n}" for n in range(10)])
        return {"base_retriever": recall, "base_compressor": Reranker(backend=LengthBackend())}

    @property
    def retriever_query_example(self):
        return "planet"

    @property
    def num_results_arg_name(self):
        return "top_n"


def test_the_best_of_many_come_back_with_both_scores():
    with create_qdrant_retriever(PLANETS) as recall:
        [best] = create_rerank_retriever(recall, reranker(), top_n=1).invoke("red planet")

    assert best.id == "j"
    assert best.metadata["relevance_score"] == 0.8
    assert best.metadata["retrieval_rank"] == 2
    assert best.metadata["retrieval_score"] > 0


@pytest.mark.parametrize(
    ("call", "factory", "own", "kept"),
    [
        ({"top_n": 1}, 2, 3, 1),
        ({}, 2, 3, 2),
        ({}, None, 3, 3),
        ({}, None, None, 5),
        ({"top_n": 7}, None, 2, 7),
        ({}, 8, 2, 8),
        ({"top_n": 0}, 2, 3, 0),
        ({"top_n": 99}, None, None, 9),
        ({"top_n": None}, 2, 3, 9),
    ],
)
def test_who_decides_how_many_are_kept(call, factory, own, kept):
    found = [Document(page_content="x" * n) for n in range(1, 10)]
    recall = RunnableLambda(lambda query: found)
    retriever = create_rerank_retriever(recall, Reranker(backend=LengthBackend(), top_n=own), top_n=factory)

    assert len(retriever.invoke("q", **call)) == kept
    assert len(asyncio.run(retriever.ainvoke("q", **call))) == kept


@pytest.mark.parametrize(
    ("call", "factory", "own", "kept"),
    [
        ({"top_n": 1}, 2, 3, 1),
        ({}, 2, 3, 2),
        ({}, None, 1, 1),
        ({"top_n": None}, 2, None, 3),
    ],
)
def test_any_compressor_reranks_and_its_answer_is_cut(call, factory, own, kept):
    retriever = create_rerank_retriever(FixedRetriever(), Backwards(top_n=own), top_n=factory)

    assert ids(retriever.invoke("q", **call)) == ["s", "j", "m"][:kept]
    assert ids(asyncio.run(retriever.ainvoke("q", **call))) == ["s", "j", "m"][:kept]


def test_k_and_filter_of_one_call_reach_our_retrievers():
    with create_qdrant_retriever(PLANETS, embedding=Letters()) as recall:
        retriever = create_rerank_retriever(recall, reranker(), k=2)

        assert len(retriever.invoke("planet")) == 2
        assert len(retriever.invoke("planet", k=1)) == 1
        assert ids(retriever.invoke("planet", k=3)) == ["s", "j", "m"]
        assert ids(retriever.invoke("planet", k=3, filter=FEW_MOONS, top_n=1)) == ["j"]
        assert ids(asyncio.run(retriever.ainvoke("planet", k=3, filter=FEW_MOONS, top_n=1))) == ["j"]
        assert [ids(found) for found in retriever.batch(["planet"] * 2, top_n=1, k=3)] == [["s"], ["s"]]


def test_fifty_candidates_are_ranked_unless_told_otherwise():
    store = InMemoryVectorStore(Letters())
    store.add_texts(["a" * n for n in range(1, 70)])
    compressor = Backwards()

    assert len(create_rerank_retriever(store, compressor).invoke("a", top_n=100)) == 50
    assert len(create_rerank_retriever(store, compressor, k=60).invoke("a", top_n=100)) == 60
    assert len(create_rerank_retriever(store, compressor).invoke("a", top_n=100, k=7)) == 7


def test_a_filter_for_all_calls_gives_way_to_that_of_one_call():
    documents = [Document(id=name, page_content="a planet", metadata={"name": name}) for name in ("mars", "venus")]

    def named(name):
        return {"must": [{"key": "metadata.name", "match": {"value": name}}]}

    retriever = create_rerank_retriever(create_qdrant_retriever(documents), "embedded", filter=named("mars"))
    assert [document.id for document in retriever.invoke("planet")] == ["mars"]
    assert [document.id for document in retriever.invoke("planet", filter=named("venus"))] == ["venus"]

    store = InMemoryVectorStore(Letters())
    store.add_documents(documents)
    recall = create_rerank_retriever(store, "embedded", filter=lambda document: document.id == "venus")
    assert [document.id for document in recall.invoke("planet")] == ["venus"]


def test_a_store_s_own_retriever_that_fetches_four_is_warned_of(caplog):
    store = InMemoryVectorStore(Letters())

    create_rerank_retriever(store.as_retriever(search_kwargs={"k": 50}), "embedded")
    create_rerank_retriever(store, "embedded")
    assert not caplog.records
    create_rerank_retriever(store.as_retriever(), "embedded")
    assert "LangChain's default is 4: there is little to rank" in caplog.text


def test_a_closed_database_says_so():
    with create_qdrant_retriever(["a planet"]) as retriever:
        pass

    with pytest.raises(RetrieverError, match="Qdrant at memory was closed before"):
        retriever.invoke("planet")


@pytest.mark.parametrize("options", [{"k": 3}, {"filter": {}}, {"k": 3, "filter": {}}])
@pytest.mark.parametrize("recall", [FixedRetriever(), RunnableLambda(lambda query: PLANETS)])
def test_k_and_filter_for_somebody_elses_retriever_are_refused(recall, options):
    retriever = create_rerank_retriever(recall, reranker())

    with pytest.raises(UnexpectedKeywordError, match=f"does not take {' and '.join(options)} for one call"):
        retriever.invoke("planet", **options)
    with pytest.raises(UnexpectedKeywordError, match=type(recall).__name__):
        asyncio.run(retriever.ainvoke("planet", **options))
    with pytest.raises(UnexpectedKeywordError, match="give create_rerank_retriever the vector store itself"):
        create_rerank_retriever(recall, reranker(), k=3)


def test_a_keyword_that_the_pipeline_does_not_know_is_refused():
    retriever = create_rerank_retriever(FixedRetriever(), reranker())

    with pytest.raises(TypeError, match=r"Unknown keyword 'topn'. A call takes k, top_n, filter\."):
        retriever.invoke("planet", topn=3)
    with pytest.raises(ConfigurationError, match="Unknown keyword"):
        asyncio.run(retriever.ainvoke("planet", topn=3))


@pytest.mark.parametrize("wrong", [{"top_n": -1}, {"k": 0}, {"top_n": 1.5}])
def test_impossible_numbers_are_refused(wrong):
    store = InMemoryVectorStore(Letters())
    [(name, value)] = wrong.items()

    with pytest.raises(ConfigurationError, match=f"{name} is {value}"):
        create_rerank_retriever(store, reranker(), **wrong)
    with pytest.raises(ConfigurationError, match=f"{name} is {value}"):
        create_rerank_retriever(store, reranker()).invoke("q", **wrong)


def test_what_is_no_retriever_is_refused():
    with pytest.raises(ConfigurationError, match="retriever is a list, not a LangChain retriever or vector store"):
        create_rerank_retriever(PLANETS, reranker())


def test_a_reranker_may_be_a_backend_or_a_mapping():
    assert ids(create_rerank_retriever(FixedRetriever(), reranker().backend).invoke("q")) == ["s", "j", "m"]
    with pytest.raises(ConfigurationError, match="Unknown backend 'nobody'"):
        create_rerank_retriever(FixedRetriever(), {"backend": "nobody"})


def test_nothing_found_is_nothing_ranked():
    class BestOfAll(BaseDocumentCompressor):
        def compress_documents(self, documents, query, callbacks=None):
            return [documents[0]]

    retriever = create_rerank_retriever(RunnableLambda(lambda query: []), BestOfAll())

    assert retriever.invoke("q") == []
    assert asyncio.run(retriever.ainvoke("q")) == []


def test_a_vector_store_keeps_its_scores():
    store = InMemoryVectorStore(Letters())
    store.add_documents(PLANETS)
    retriever = create_rerank_retriever(store, reranker())
    expected = {document.id: score for document, score in store.similarity_search_with_score("red", k=3)}

    for found in (retriever.invoke("red"), asyncio.run(retriever.ainvoke("red"))):
        assert ids(found) == ["s", "j", "m"]
        assert {document.id: document.metadata["retrieval_score"] for document in found} == expected
        assert sorted(document.metadata["retrieval_rank"] for document in found) == [1, 2, 3]
    assert ids(retriever.invoke("red", filter=lambda document: document.metadata["moons"] < 100)) == ["j", "m"]
    assert all("retrieval_rank" not in document.metadata for document in store.similarity_search("red"))


def test_a_numpy_score_becomes_a_float():
    class Numpy(InMemoryVectorStore):
        def similarity_search_with_score(self, query, k=4, **kwargs):
            return [(PLANETS[0], np.float32(0.5))]

    [found] = create_rerank_retriever(Numpy(Letters()), reranker()).invoke("q")

    assert type(found.metadata["retrieval_score"]) is float


def test_a_vector_store_without_scores_gives_the_rank():
    class Scoreless(VectorStore):
        @classmethod
        def from_texts(cls, texts, embedding, metadatas=None, **kwargs):
            return cls()

        def similarity_search(self, query, k=4, **kwargs):
            return PLANETS[:k]

    retriever = create_rerank_retriever(Scoreless(), reranker(), k=2)

    for found in (retriever.invoke("q"), asyncio.run(retriever.ainvoke("q"))):
        assert [(document.id, document.metadata["retrieval_rank"]) for document in found] == [("j", 2), ("m", 1)]
        assert all("retrieval_score" not in document.metadata for document in found)
    assert all(document.metadata.keys() == {"moons"} for document in PLANETS)


def test_a_vector_store_of_langchain_qdrant_keeps_its_ids():
    store = QdrantVectorStore.from_texts(["Saturn has rings"], Letters(), [{"moons": 146}], location=":memory:")
    [point], _ = store.client.scroll(store.collection_name)

    [found] = create_rerank_retriever(store, reranker()).invoke("rings")

    assert found.id == point.id
    assert set(found.metadata) == {"moons", "retrieval_score", "retrieval_rank", "relevance_score"}
    store.client.close()


def test_it_is_a_tool():
    tool = create_retriever_tool(create_rerank_retriever(FixedRetriever(), reranker(), top_n=2), "planets", "Planets.")

    assert tool.invoke({"query": "rings"}) == "Saturn has rings\n\nJupiter is the largest planet"
    assert asyncio.run(tool.ainvoke({"query": "rings"})).startswith("Saturn has rings")


def test_it_answers_in_a_rag_chain():
    retriever = create_rerank_retriever(FixedRetriever(), reranker(), top_n=1)
    prompt = ChatPromptTemplate.from_template("Answer {question} from {context}")
    seen = []
    chain = (
        {"context": retriever | (lambda found: texts(found)[0]), "question": RunnablePassthrough()}
        | prompt
        | RunnableLambda(lambda value: seen.append(value.to_string()) or value)
        | FakeListChatModel(responses=["Saturn"])
        | StrOutputParser()
    )

    assert chain.invoke("What has rings?") == "Saturn"
    assert seen == ["Human: Answer What has rings? from Saturn has rings"]


def test_it_takes_the_place_of_the_retriever_of_a_chain():
    prompt = ChatPromptTemplate.from_template("{input} {context}")
    answer = create_stuff_documents_chain(FakeListChatModel(responses=["Saturn"]), prompt)
    before = create_retrieval_chain(FixedRetriever(), answer).invoke({"input": "What has rings?"})

    after = create_retrieval_chain(create_rerank_retriever(FixedRetriever(), reranker()), answer).invoke(
        {"input": "What has rings?"}
    )

    assert ids(before["context"]) == ["m", "j", "s"]
    assert ids(after["context"]) == ["s", "j", "m"]
    assert after["answer"] == before["answer"] == "Saturn"


def test_both_stages_are_traced_below_it():
    class Runs(BaseCallbackHandler):
        def __init__(self):
            self.started = []

        def on_retriever_start(self, serialized, query, *, parent_run_id=None, **kwargs):
            self.started.append((kwargs["name"], parent_run_id is not None))

        def on_chain_start(self, serialized, inputs, *, parent_run_id=None, **kwargs):
            self.started.append((kwargs["name"], parent_run_id is not None))

    for call in (RerankRetriever.invoke, lambda *args: asyncio.run(RerankRetriever.ainvoke(*args))):
        runs = Runs()
        call(create_rerank_retriever(FixedRetriever(), reranker()), "q", {"callbacks": [runs]})

        assert runs.started == [("RerankRetriever", False), ("FixedRetriever", True), ("rerank", True)]


def test_the_trace_names_the_vector_store():
    class Metadata(BaseCallbackHandler):
        def on_retriever_start(self, serialized, query, *, metadata=None, **kwargs):
            seen.append(metadata["ls_vector_store_provider"])

    seen = []
    with create_qdrant_retriever(PLANETS) as retriever:
        retriever.invoke("planet", {"callbacks": [Metadata()]})

    assert seen == ["QdrantVectorStore"]


def test_the_metadata_can_be_sent_as_json():
    with create_qdrant_retriever(PLANETS) as recall:
        [best, *_] = create_rerank_retriever(recall, reranker()).invoke("planet")

    assert json.loads(json.dumps(best.metadata)) == best.metadata
