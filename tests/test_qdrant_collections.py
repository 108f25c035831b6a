"""What a Qdrant retriever does with a collection over time: hybrid searches, documents in and out, indexes."""

import warnings

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient, models
from qdrant_fake import PLACES, FakeQdrant, place_of

from langchain_rerank import create_qdrant_retriever
from langchain_rerank.errors import CollectionMismatchError, ConfigurationError, RetrieverError

PLANETS = [
    Document(id="m", page_content="Mars is the red planet", metadata={"moons": 2}),
    Document(id="j", page_content="Jupiter is the largest planet", metadata={"moons": 95}),
    Document(id="s", page_content="Saturn has rings", metadata={"moons": 146}),
]
QUERY = "sgnir sah nrutas planet red"


class Letters(Embeddings):
    """How often each letter occurs; remembers the documents that it embeds."""

    def __init__(self):
        self.embedded = []

    def embed_query(self, text):
        return [float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"]

    def embed_documents(self, texts):
        self.embedded += texts
        return [self.embed_query(text) for text in texts]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    with place_of(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def server():
    with FakeQdrant() as server:
        yield server


def ids(documents):
    return [document.id for document in documents]


def scores(documents):
    return {document.id: document.metadata["retrieval_score"] for document in documents}


def by_id(retriever, query="planet rings"):
    return {document.id: document for document in retriever.invoke(query)}


def hybrid(documents=(), **options):
    return create_qdrant_retriever(documents, **{"embedding": Letters(), "mode": "hybrid", **options})


# Hybrid searches, the same in memory, in a folder and on a server


def scaled(found):
    """Scores as DBSF takes them: 0 at three standard deviations below the mean, 1 at three above."""
    values = list(found.values())
    mean = sum(values) / len(values)
    spread = 3 * (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    return {name: (value - mean + spread) / (2 * spread) for name, value in found.items()}


def test_dbsf_fuses_the_scaled_scores_of_both(place):
    with hybrid(PLANETS, fusion="dbsf", **place) as retriever:
        found = retriever.invoke(QUERY)
    with create_qdrant_retriever(PLANETS, embedding=Letters()) as retriever:
        dense = scaled(scores(retriever.invoke(QUERY)))
    with create_qdrant_retriever(PLANETS) as retriever:
        sparse = scaled(scores(retriever.invoke(QUERY)))

    expected = {name: dense[name] + sparse.get(name, 0) for name in dense}
    assert scores(found) == pytest.approx(expected, rel=1e-4)
    assert ids(found) == sorted(expected, key=expected.get, reverse=True)


@pytest.mark.parametrize("fusion", ["rrf", "dbsf"])
async def test_the_scores_of_both_halves_are_kept_if_asked_for(place, fusion):
    with hybrid(PLANETS, fusion=fusion, prefetch_scores=True, **place) as retriever:
        found = retriever.invoke(QUERY)
        assert await retriever.ainvoke(QUERY) == found
    with hybrid(fusion=fusion, **place) as retriever:
        plain = retriever.invoke(QUERY)
    with create_qdrant_retriever(embedding=Letters(), **place) as retriever:
        dense = scores(retriever.invoke(QUERY))
    with create_qdrant_retriever(**place) as retriever:
        sparse = scores(retriever.invoke(QUERY))

    assert set(dense) > set(sparse)
    for document in found:
        halves = {name: of[document.id] for name, of in (("dense", dense), ("sparse", sparse)) if document.id in of}
        assert document.metadata.pop("prefetch_scores") == pytest.approx(halves)
    assert scores(found) == pytest.approx(scores(plain))
    for one, other in zip(found, plain, strict=True):
        assert one.model_copy(update={"metadata": {**one.metadata, "retrieval_score": 0}}) == other.model_copy(
            update={"metadata": {**other.metadata, "retrieval_score": 0}}
        )


def test_each_half_looks_at_what_the_filter_lets_through(place):
    few = {"must": [{"key": "metadata.moons", "range": {"lt": 100}}]}
    with hybrid(PLANETS, prefetch_scores=True, **place) as retriever:
        assert sorted(ids(retriever.invoke("saturn planet", filter=few))) == ["j", "m"]
        [found] = retriever.invoke("saturn has rings", k=1, filter=few)
        assert set(found.metadata["prefetch_scores"]) == {"dense"}


def test_both_scores_are_one_request(server):
    with hybrid(PLANETS, prefetch_scores=True, url=server.url) as retriever:
        server.requests.clear()
        retriever.invoke(QUERY)

    assert server.requests == [("POST", "/collections/documents/points/query/batch")]


def test_fusion_and_both_scores_are_for_hybrid_alone():
    options = {"fusion": "dbsf", "prefetch_scores": True}
    with create_qdrant_retriever(PLANETS, **options) as retriever:
        [found, *_] = retriever.invoke("planet")

    assert set(found.metadata) == {"moons", "retrieval_score", "retrieval_rank"}


def test_both_vectors_may_have_names_of_their_own(place):
    options = {"vector_name": "letters", "sparse_vector_name": "words", "prefetch_scores": True, **place}
    with hybrid(PLANETS, **options) as retriever:
        [best, *_] = retriever.invoke("saturn rings")

    assert best.id == "s"
    assert set(best.metadata["prefetch_scores"]) == {"dense", "sparse"}


def test_settings_of_bm25_may_be_a_mapping():
    with create_qdrant_retriever(PLANETS, bm25={"k1": 1.2, "b": 0.75}) as retriever:
        bm25 = retriever.vectorstore.sparse_embeddings

    assert (bm25.k1, bm25.b, bm25.average_length) == (1.2, 0.75, 3)


# Documents that change


def test_only_a_changed_text_is_embedded_again(place):
    embedding = Letters()
    with hybrid(PLANETS, embedding=embedding, **place) as retriever:
        embedding.embedded.clear()
        retriever.add_documents(
            [
                PLANETS[0],
                Document(id="j", page_content="Jupiter is the largest planet", metadata={"moons": 97, "gas": True}),
                Document(id="s", page_content="Saturn has many rings", metadata={"moons": 146}),
            ]
        )
        found = by_id(retriever)

    assert embedding.embedded == ["Saturn has many rings"]
    assert found["s"].page_content == "Saturn has many rings"
    assert {key: found["j"].metadata[key] for key in ("moons", "gas")} == {"moons": 97, "gas": True}


def test_metadata_that_are_gone_do_not_stay(place):
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        retriever.add_documents([Document(id="s", page_content="Saturn has rings", metadata={"size": 2})])
        [found] = retriever.invoke("rings")
        few = {"must": [{"key": "metadata.size", "match": {"value": 2}}]}
        assert ids(retriever.invoke("rings", filter=few)) == ["s"]

    assert set(found.metadata) == {"size", "retrieval_score", "retrieval_rank"}


def test_a_document_whose_metadata_changed_is_found_as_before(place):
    with hybrid(PLANETS, prefetch_scores=True, **place) as retriever:
        before = scores(retriever.invoke(QUERY))
        retriever.update_documents([PLANETS[0].model_copy(update={"metadata": {"moons": 3}})])

        assert scores(retriever.invoke(QUERY)) == before


async def test_update_writes_only_what_is_there(place):
    dusty = Document(id="m", page_content="Mars is a dusty planet")
    news = [Document(id=name, page_content="new planet") for name in ("v", "n", "u", "e")]
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        with pytest.raises(
            RetrieverError, match=r"'documents' has no documents with these ids: 'v', 'n', 'u', \.\.\.\. Nothing"
        ):
            retriever.update_documents([dusty, *news])
        assert by_id(retriever)["m"].page_content == PLANETS[0].page_content  # nothing was written

        assert retriever.update_documents([dusty]) == retriever.add_documents([PLANETS[0]])
        await retriever.aupdate_documents([dusty])
        assert by_id(retriever)["m"].page_content == "Mars is a dusty planet"
        assert len(retriever.invoke("planet rings")) == 3


def test_update_wants_ids():
    with create_qdrant_retriever(PLANETS) as retriever:
        for documents in ([Document(page_content="Mars")], ["Mars"]):
            with pytest.raises(ConfigurationError, match="The document 'Mars' has no id"):
                retriever.update_documents(documents)


async def test_delete_counts_what_was_there(place):
    with create_qdrant_retriever(PLANETS, **place) as retriever:
        assert retriever.delete_documents(["m", "nobody", "m"]) == 1
        assert sorted(by_id(retriever)) == ["j", "s"]
        assert retriever.delete_documents(["m"]) == 0
        assert retriever.delete_documents([]) == 0
        assert await retriever.adelete_documents(iter(["j", "s"]), batch_size=1) == 2
        assert retriever.invoke("planet rings") == []


def test_a_document_without_an_id_is_known_by_the_one_it_came_back_with(place):
    with create_qdrant_retriever(["Mars is red", "Venus is bright"], **place) as retriever:
        [mars] = retriever.invoke("mars")
        retriever.update_documents([Document(id=mars.id, page_content="Mars is dusty")])
        found = retriever.invoke("mars venus")
        assert {document.page_content for document in found} == {"Mars is dusty", "Venus is bright"}
        assert mars.id in ids(found)

        assert retriever.delete_documents([mars.id]) == 1
        assert [document.page_content for document in retriever.invoke("mars venus")] == ["Venus is bright"]


def test_the_ids_that_add_documents_returns_are_known_too(place):
    with create_qdrant_retriever(**place) as retriever:
        written = retriever.add_documents(PLANETS)
        retriever.update_documents([Document(id=written[0], page_content="Mars is a dusty planet")])
        assert by_id(retriever)["m"].page_content == "Mars is a dusty planet"

        assert retriever.delete_documents(written[:2]) == 2
        assert ids(retriever.invoke("planet rings")) == ["s"]


def test_a_collection_of_another_program_is_searched_and_changed(place):
    client = place.get("client") or QdrantClient(**place, check_compatibility=False)
    client.create_collection("theirs", vectors_config=models.VectorParams(size=26, distance=models.Distance.COSINE))
    theirs = QdrantVectorStore(client=client, collection_name="theirs", embedding=Letters())
    theirs.add_texts(["Mars is red", "Venus is bright", "Earth"], [{"n": 1}, {"n": 2}, {}], ids=[7, 8, 0])
    if "client" not in place:
        client.close()

    embedding = Letters()
    with create_qdrant_retriever(embedding=embedding, collection_name="theirs", **place) as retriever:
        assert sorted(by_id(retriever)) == ["0", "7", "8"]
        retriever.update_documents([Document(id="7", page_content="Mars is red", metadata={"n": 3})])
        assert embedding.embedded == []
        retriever.update_documents([Document(id="0", page_content="Earth is blue")])
        assert embedding.embedded == ["Earth is blue"]
        found = by_id(retriever)
        assert (found["7"].metadata["n"], found["0"].page_content) == (3, "Earth is blue")
        assert retriever.delete_documents(["7", "9", "0"]) == 2
        assert ids(retriever.invoke("planet")) == ["8"]


def test_a_callers_own_id_comes_before_that_of_a_point():
    client = QdrantClient(":memory:")
    with create_qdrant_retriever([Document(id="7", page_content="ours")], client=client) as retriever:
        retriever.vectorstore.add_texts(["theirs"], ids=[7])

        retriever.update_documents([Document(id="7", page_content="ours again")])
        assert sorted(document.page_content for document in retriever.invoke("ours theirs")) == ["ours again", "theirs"]

        assert retriever.delete_documents(["7"]) == 1
        assert [document.page_content for document in retriever.invoke("ours theirs")] == ["theirs"]
    client.close()


def test_a_field_beside_text_and_metadata_stays():
    client = QdrantClient(":memory:")
    with create_qdrant_retriever(PLANETS, client=client) as retriever:
        [saturn] = retriever.add_documents(PLANETS[2:])
        client.set_payload("documents", {"seen": 5}, [saturn])

        retriever.add_documents([Document(id="s", page_content="Saturn has rings", metadata={"moons": 147})])

    [record] = client.retrieve("documents", [saturn])
    assert (record.payload["seen"], record.payload["metadata"]["moons"]) == (5, 147)
    client.close()


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_point_with_half_of_its_vectors_is_not_written(place, mode):
    hybrid(PLANETS, **place).close()

    with create_qdrant_retriever(embedding=Letters(), mode=mode, **place) as retriever:
        assert ids(retriever.invoke("saturn rings"))[0] == "s"
        with pytest.raises(CollectionMismatchError, match=f"also has vectors named .* mode='{mode}' does not make"):
            retriever.add_documents([Document(id="m", page_content="Mars is dusty")])
        assert retriever.delete_documents(["m"]) == 1
    with hybrid(PLANETS, **place) as retriever:
        assert len(retriever.invoke("planet rings")) == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [("m", "ids is one text; put 'm' into a list"), (["m", 7], r"ids\[1\] is 7; a document's id is a text")],
)
def test_what_is_no_id_is_refused(ids, message):
    with create_qdrant_retriever(PLANETS) as retriever:
        with pytest.raises(ConfigurationError, match=message):
            retriever.delete_documents(ids)
        assert len(retriever.invoke("planet rings")) == 3


def test_changing_asks_for_a_batch_of_at_least_one():
    with create_qdrant_retriever(PLANETS) as retriever:
        for call in (retriever.add_documents, retriever.update_documents):
            with pytest.raises(ConfigurationError, match="batch_size is 0"):
                call(PLANETS, batch_size=0)
        with pytest.raises(ConfigurationError, match="batch_size is 0"):
            retriever.delete_documents(["m"], batch_size=0)


# Payload indexes


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2, 95], "integer"),
        ([2, 0.5], "float"),
        (["a", None], "keyword"),
        ([["a", "b"], []], "keyword"),
        ([True], "bool"),
    ],
)
def test_an_index_is_of_the_kind_of_the_values(server, values, kind):
    documents = [Document(page_content=f"text {n}", metadata={"deep": {"v": value}}) for n, value in enumerate(values)]

    create_qdrant_retriever(documents, url=server.url, payload_indexes=["metadata.deep.v"]).close()

    assert server.indexes == {("documents", "metadata.deep.v"): kind}


def test_an_index_is_made_once_and_before_the_documents(server):
    options = {"url": server.url, "payload_indexes": {"metadata.moons": "float", "page_content": "text"}}
    create_qdrant_retriever(PLANETS, **options).close()
    made = [path for method, path in server.requests if method == "PUT"]
    assert made == [
        "/collections/documents",
        "/collections/documents/index",
        "/collections/documents/index",
        "/collections/documents/points",
    ]
    assert server.indexes == {("documents", "metadata.moons"): "float", ("documents", "page_content"): "text"}

    server.requests.clear()
    create_qdrant_retriever(PLANETS, **options).close()
    assert ("PUT", "/collections/documents/index") not in server.requests


def test_the_kind_is_told_from_stored_documents_too(server):
    create_qdrant_retriever(PLANETS, url=server.url).close()

    create_qdrant_retriever(url=server.url, payload_indexes=["metadata.moons"]).close()

    assert server.indexes == {("documents", "metadata.moons"): "integer"}


def test_an_index_of_another_kind_is_refused(server):
    create_qdrant_retriever(PLANETS, url=server.url, payload_indexes=["metadata.moons"]).close()

    with pytest.raises(
        CollectionMismatchError, match=r"index of the kind 'integer' on 'metadata.moons', not 'keyword'"
    ):
        create_qdrant_retriever(url=server.url, payload_indexes={"metadata.moons": "keyword"})


@pytest.mark.parametrize(
    "documents", [[], [Document(page_content="x", metadata={"year": value}) for value in (1, "b")]]
)
def test_a_kind_that_cannot_be_told_is_asked_for(place, documents):
    with pytest.raises(ConfigurationError, match=r"'metadata.year' cannot be told.*\{'metadata.year': ...\}, one of"):
        create_qdrant_retriever(documents, payload_indexes=["metadata.year"], **place)


def test_an_embedded_database_filters_without_an_index_and_without_a_warning(tmp_path):
    few = {"must": [{"key": "metadata.moons", "range": {"lt": 100}}]}
    for place in ({}, {"path": tmp_path}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with create_qdrant_retriever(PLANETS, payload_indexes=["metadata.moons"], **place) as retriever:
                assert sorted(ids(retriever.invoke("planet rings", filter=few))) == ["j", "m"]
        assert not caught
