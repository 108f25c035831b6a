"""Pipelines from a mapping, a file or the environment."""

import re
from importlib.metadata import EntryPoint, entry_points

import pytest
import yaml
from fakes import LengthBackend
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from qdrant_fake import FakeQdrant
from third_party_retrievers import Closable, Shelf

from langchain_rerank import Reranker, RerankRetriever, create_qdrant_retriever, create_rerank_retriever
from langchain_rerank._pipeline import GROUP
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.errors import ConfigurationError, MissingDependencyError, UnexpectedKeywordError
from langchain_rerank.factory import init_reranker, installed

PLANETS = ["Mars is the red planet", "Jupiter is the largest planet", "Saturn has rings"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def database(tmp_path):
    """A folder with the planets in its collection `planets`."""
    create_qdrant_retriever(PLANETS, path=tmp_path / "qdrant", collection_name="planets").close()
    return tmp_path / "qdrant"


def write(folder, content):
    path = folder / "pipeline.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def texts(documents):
    return [document.page_content for document in documents]


# Where a pipeline comes from


@pytest.mark.parametrize("source", [lambda path: path, str, lambda path: yaml.safe_load(path.read_text())])
def test_a_pipeline_is_built_from_a_file_or_a_mapping(tmp_path, database, source):
    path = write(
        tmp_path,
        {
            "retriever": {"path": str(database), "collection_name": "planets", "k": 2},
            "reranker": {"backend": "embedded", "top_n": 1},
        },
    )

    with create_rerank_retriever(source(path)) as retriever:
        assert isinstance(retriever, RerankRetriever)
        assert isinstance(retriever.base_compressor.backend, EmbeddedBackend)
        assert len(retriever.base_retriever.invoke("planet rings")) == 2
        assert texts(retriever.invoke("Which planet is called red?")) == PLANETS[:1]


def test_a_pipeline_is_found_through_the_environment(tmp_path, database, monkeypatch):
    path = tmp_path / "settings"  # any name: the variable always names a file
    path.write_text("retriever: {path: '${DATABASE}', collection_name: planets}\ntop_n: 2\n")
    monkeypatch.setenv("DATABASE", str(database))
    monkeypatch.setenv("LANGCHAIN_RERANK_PIPELINE", str(path))

    with create_rerank_retriever() as retriever:
        assert len(retriever.invoke("planet rings")) == 2


def test_without_a_reranker_the_pipeline_takes_the_usual_one(monkeypatch):
    monkeypatch.setenv("LANGCHAIN_RERANK", "cross-encoder:a/b")

    assert create_rerank_retriever({"retriever": "qdrant"}).base_compressor.backend.model == "a/b"


def test_nothing_at_all_says_what_to_give():
    with pytest.raises(
        ConfigurationError, match=r"There is no retriever: .* set the variable LANGCHAIN_RERANK_PIPELINE"
    ):
        create_rerank_retriever()


def test_arguments_come_before_the_pipeline():
    spec = {"retriever": {"type": "qdrant", "k": 9}, "reranker": "nobody", "top_n": 7, "k": 8}
    with create_rerank_retriever(spec, Reranker(backend=LengthBackend()), top_n=3, k=2) as retriever:
        assert (retriever.top_n, retriever.k) == (3, 2)
    with create_rerank_retriever({**spec, "reranker": "embedded"}) as retriever:
        assert (retriever.top_n, retriever.k) == (7, 8)
    assert spec["retriever"] == {"type": "qdrant", "k": 9}  # not written to


def test_a_list_of_rerankers_is_a_cascade(tmp_path, monkeypatch):
    path = write(
        tmp_path,
        """
        retriever: qdrant
        reranker:
          - {backend: embedded, top_n: 20}
          - {backend: "cross-encoder:${SECOND}", top_n: 2}
        """,
    )
    with pytest.raises(ConfigurationError, match="variable SECOND is not set"):
        create_rerank_retriever(path)

    monkeypatch.setenv("SECOND", "a/second")
    with create_rerank_retriever(path) as retriever:
        last = retriever.base_compressor

    assert (last.backend.model, last.top_n, last.after.top_n) == ("a/second", 2, 20)


def test_a_pipeline_may_hold_objects_in_python():
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=3))
    store.add_texts(["a", "aaa"])
    backend = LengthBackend()

    assert texts(create_rerank_retriever({"retriever": store, "reranker": backend}).invoke("q")) == ["aaa", "a"]
    recall = {"embedding": DeterministicFakeEmbedding(size=3), "documents": PLANETS}
    with create_rerank_retriever({"retriever": recall, "reranker": backend}) as retriever:
        assert retriever.invoke("q")[0].page_content == PLANETS[1]


def test_a_server_is_found_by_its_url():
    with FakeQdrant() as server:
        create_qdrant_retriever(PLANETS, url=server.url).close()
        with create_rerank_retriever({"retriever": {"url": server.url}, "reranker": "embedded"}) as retriever:
            assert len(retriever.invoke("planet rings")) == 3


def test_documents_can_be_added_to_a_pipeline_in_memory():
    with create_rerank_retriever({"retriever": {"location": ":memory:"}, "reranker": "embedded"}) as retriever:
        retriever.base_retriever.add_documents(PLANETS)
        assert len(retriever.invoke("planet rings")) == 3


# Retrievers by name


def register(monkeypatch, *points):
    """As if packages had been installed with these entry points."""
    theirs = [EntryPoint(name, value, GROUP) for name, value in points]
    monkeypatch.setattr(
        "langchain_rerank.factory.entry_points",
        lambda group: [*entry_points(group=group), *(theirs if group == GROUP else [])],
    )


def test_ours_are_entry_points():
    assert set(installed(GROUP)) >= {"bm25", "qdrant"}


def test_a_third_partys_retriever_is_found_by_its_entry_point(monkeypatch):
    register(monkeypatch, ("shelf", "third_party_retrievers:Shelf"), ("shelves", "third_party_retrievers:shelves"))
    backend = Reranker(backend=LengthBackend())

    found = create_rerank_retriever({"retriever": {"type": "shelf", "shelf": ["a", "aaa"]}}, backend).invoke("q")
    assert texts(found) == ["aaa", "a"]
    found = create_rerank_retriever({"retriever": {"type": "shelves", "one": "a", "two": "aaa"}}, backend).invoke("q")
    assert texts(found) == ["aaa", "a"]
    assert {"retrieval_score", "retrieval_rank"} <= set(found[0].metadata)


def test_nobody_takes_the_name_of_one_of_ours(monkeypatch):
    register(monkeypatch, ("qdrant", "third_party_retrievers:Shelf"))

    with create_rerank_retriever({"retriever": "qdrant", "reranker": "embedded"}) as retriever:
        assert type(retriever.base_retriever).__name__ == "QdrantRetriever"


def test_bm25_searches_a_file(tmp_path):
    file = tmp_path / "planets.jsonl"
    file.write_text(
        '{"id": 4, "text": "Mars is the red planet", "metadata": {"moons": 2}}\n\n{"page_content": "Saturn has rings"}'
    )
    recall = {"type": "bm25", "documents": str(file), "k": 1, "b": 0.75}

    with create_rerank_retriever({"retriever": recall, "reranker": "embedded"}) as retriever:
        [mars] = retriever.invoke("the red planet")
        assert texts(retriever.invoke("rings")) == ["Saturn has rings"]

    assert (mars.id, mars.metadata["moons"], mars.metadata["retrieval_rank"]) == ("4", 2, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "planets.jsonl, line 1 is not JSON"),
        ('{"text": "a"}\n{"txt": "b"}', "planets.jsonl, line 2 must be an object like"),
        ("[]", "planets.jsonl, line 1 must be an object like"),
        (None, r"Cannot read .*planets.jsonl: No such file"),
    ],
)
def test_a_file_that_bm25_cannot_read_is_named(tmp_path, content, message):
    file = tmp_path / "planets.jsonl"
    if content is not None:
        file.write_text(content)

    with pytest.raises(ConfigurationError, match=message):
        create_rerank_retriever({"retriever": {"type": "bm25", "documents": str(file)}})


# Mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("docs", "docs is no pipeline, which is a mapping with 'retriever' and 'reranker'"),
        (
            {"backend": "embedded"},
            "This describes a reranker, not a pipeline: in a pipeline it stands below 'reranker:'",
        ),
        ({"backends": "embedded"}, "Unknown option 'backends' for a pipeline. Options: k, reranker, retriever, top_n."),
        ({"retriver": "qdrant"}, "Unknown option 'retriver' for a pipeline. Did you mean 'retriever'?"),
        ({"reranker": "embedded"}, "The pipeline has no retriever; give at least 'retriever: qdrant'"),
        (
            {"retriever": "qdrnt"},
            "Unknown retriever 'qdrnt'. Did you mean 'qdrant'? Installed retrievers: bm25,",
        ),
        (
            {"retriever": {"colection_name": "a"}},
            "Unknown option 'colection_name' for retriever 'qdrant'. Did you mean 'collection_name'?",
        ),
        ({"retriever": "bm25"}, "retriever 'bm25' needs the option 'documents'"),
        ({"retriever": {"type": "shelf", "shelff": []}}, "Unknown option 'shelff' for retriever 'shelf'. Did you mean"),
        ({"retriever": {"type": "shelf"}}, "retriever 'shelf' needs the option 'shelf'"),
        ({"retriever": {"type": "shelf", "shelf": 5}}, "retriever 'shelf': shelf: Input should be a valid list"),
        (
            {"retriever": {"type": "odd"}},
            "Entry point 'odd' is 'third_party_retrievers:NO_RETRIEVER', which is no class or",
        ),
        ({"retriever": {"type": "cwd"}}, "retriever is a str, not a LangChain retriever or vector store"),
        ({"retriever": ["qdrant"]}, "retriever is a list, not a LangChain retriever"),
        ({"retriever": {"path": "${NOWHERE}"}}, "variable NOWHERE is not set"),
        ({"retriever": {"path": "p", "url": "http://localhost"}}, "Give one of location, path, url and client"),
        ({"retriever": "qdrant", "reranker": "bgee"}, "Unknown backend 'bgee'"),
        ({"retriever": "qdrant", "k": 0}, "k is 0"),
        ({"retriever": {"embedding": "nobody:m"}}, "embedding='nobody:m': Provider 'nobody' is not supported"),
        ({"retriever": {"timeout": "long", "url": "http://localhost"}}, "timeout is 'long'; it must be a number"),
    ],
)
def test_a_mistake_is_named(tmp_path, monkeypatch, spec, message):
    register(
        monkeypatch,
        ("shelf", "third_party_retrievers:Shelf"),
        ("odd", "third_party_retrievers:NO_RETRIEVER"),
        ("cwd", "os:getcwd"),
    )

    with pytest.raises(ConfigurationError, match=re.escape(message)):
        create_rerank_retriever(spec)


def test_a_file_with_a_list_is_no_pipeline(tmp_path):
    with pytest.raises(ConfigurationError, match=r"pipeline.yaml is no pipeline"):
        create_rerank_retriever(write(tmp_path, ["qdrant"]))


def test_a_missing_package_of_an_embedding_says_what_to_install():
    with pytest.raises(MissingDependencyError, match=r"embedding='ollama:m'.*pip install langchain-ollama"):
        create_rerank_retriever({"retriever": {"embedding": "ollama:m"}, "reranker": "embedded"})


def test_a_secret_in_a_wrong_place_is_not_shown(monkeypatch):
    register(monkeypatch, ("shelf", "third_party_retrievers:Shelf"))

    with pytest.raises(ConfigurationError) as caught:
        create_rerank_retriever({"retriever": {"type": "shelf", "shelf": "sk-secret"}, "reranker": "embedded"})

    assert "sk-secret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_pipeline_that_cannot_be_leaves_the_folder_to_others(tmp_path, database, monkeypatch):
    recall = {"path": str(database), "collection_name": "planets"}
    with pytest.raises(ConfigurationError, match="Unknown backend"):
        create_rerank_retriever({"retriever": recall, "reranker": "nobody"})
    with pytest.raises(ConfigurationError, match="top_n is -1"):
        create_rerank_retriever({"retriever": recall, "reranker": "embedded", "top_n": -1})

    with create_rerank_retriever({"retriever": recall, "reranker": "embedded"}) as retriever:
        assert len(retriever.invoke("planet rings")) == 3
    with create_qdrant_retriever(path=database, collection_name="planets") as other:  # it was closed again
        assert len(other.invoke("planet rings")) == 3


def test_what_was_opened_for_a_pipeline_that_cannot_be_is_closed(monkeypatch):
    register(monkeypatch, ("closable", "third_party_retrievers:Closable"))
    monkeypatch.setattr(Closable, "closed", [])

    with pytest.raises(UnexpectedKeywordError, match="Closable does not take k"):
        create_rerank_retriever({"retriever": "closable", "reranker": "embedded", "k": 3})

    assert Closable.closed == [True]


def test_a_retriever_that_cannot_be_closed_is_left_alone():
    recall = EnsembleRetriever(retrievers=[Shelf(shelf=["a"])], weights=[1])

    with create_rerank_retriever(recall, LengthBackend()) as retriever:
        assert texts(retriever.invoke("q")) == ["a"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            create_rerank_retriever,
            {"topn": 3},
            "Unknown option 'topn' for create_rerank_retriever. Did you mean 'top_n'?",
        ),
        (
            create_qdrant_retriever,
            {"embeding": "a"},
            "for create_qdrant_retriever. Did you mean 'embedding'? Options: api",
        ),
    ],
)
def test_a_mistyped_argument_is_named_with_the_nearest(make, options, message):
    with pytest.raises(UnexpectedKeywordError, match=re.escape(message)) as caught:
        make(PLANETS, **options)

    assert isinstance(caught.value, TypeError)


def test_the_two_kinds_of_file_are_told_apart():
    with pytest.raises(ConfigurationError, match="describes a pipeline, not a reranker: give it to create_rerank"):
        init_reranker({"retriever": {"k": 50}, "reranker": {"backend": "embedded"}})
    with pytest.raises(ConfigurationError, match="describes a reranker, not a pipeline"):
        create_rerank_retriever({"backend": "embedded", "top_n": 5})
