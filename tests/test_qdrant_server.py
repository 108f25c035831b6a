import logging
import socket
import subprocess
import sys
import time
import traceback

import pytest
from qdrant_client import QdrantClient
from qdrant_fake import FakeQdrant

from langchain_rerank import create_qdrant_retriever
from langchain_rerank.errors import ConfigurationError, RetrieverError, RetrieverUnavailableError
from langchain_rerank.sparse import BM25SparseEmbeddings

KEY = "s3cr3t-k3y"
PLANETS = ["Mars is the red planet.", "Jupiter is the largest planet."]


@pytest.fixture(autouse=True)
def _no_key_and_no_proxy(monkeypatch):
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with FakeQdrant() as server:
        yield server


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_server_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{closed_port()}"

    with pytest.raises(RetrieverUnavailableError, match=f"Qdrant at {url} cannot be reached .*refused"):
        create_qdrant_retriever(PLANETS, url=url, api_key=KEY)


def test_a_server_that_is_not_there_over_grpc_is_named():
    url = f"http://127.0.0.1:{closed_port()}"
    client = QdrantClient(
        url=url,
        grpc_port=closed_port(),
        prefer_grpc=True,
        timeout=1,
        check_compatibility=False,
        headers={"api-key": KEY},
    )

    with pytest.raises(RetrieverUnavailableError, match=f"Qdrant at {url} cannot be reached over gRPC") as caught:
        create_qdrant_retriever(PLANETS, client=client)
    client.close()

    assert KEY not in str(caught.value)


def test_a_server_that_does_not_answer_in_time_is_named(server):
    server.silent = True
    started = time.monotonic()

    with pytest.raises(RetrieverUnavailableError, match=f"Qdrant at {server.url} did not answer in time"):
        create_qdrant_retriever(PLANETS, url=server.url, timeout=0.5)

    assert time.monotonic() - started < 5


@pytest.mark.parametrize("given", [None, "wrong-" + KEY])
def test_a_server_that_wants_a_key_is_named_and_the_key_is_not(server, given):
    server.key = KEY

    with pytest.raises(RetrieverError) as caught:
        create_qdrant_retriever(PLANETS, url=server.url, api_key=given)

    message = str(caught.value)
    assert server.url in message
    assert "Must provide an API key" in message
    assert "Give api_key, or set QDRANT_API_KEY" in message
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_the_server_repeats_is_not_shown(server):
    server.reply = 403, {}, f'{{"status": {{"error": "Invalid API key {KEY}"}}}}'

    with pytest.raises(RetrieverError, match=r"HTTP 403: Invalid API key \*\*\*\)") as caught:
        create_qdrant_retriever(PLANETS, url=server.url, api_key=KEY)

    assert KEY not in str(caught.value)


def test_user_and_password_in_the_url_are_not_shown():
    port = closed_port()

    with pytest.raises(RetrieverUnavailableError, match=f"Qdrant at http://127.0.0.1:{port} cannot") as caught:
        create_qdrant_retriever(PLANETS, url=f"http://me:{KEY}@127.0.0.1:{port}?key={KEY}")

    assert KEY not in str(caught.value)


def test_the_right_key_opens(server):
    server.key = KEY

    with create_qdrant_retriever(PLANETS, url=server.url, api_key=KEY + "\n") as retriever:
        assert [document.page_content for document in retriever.invoke("red")] == PLANETS[:1]
        assert KEY not in repr(retriever)


def test_the_key_is_found_in_the_environment(server, monkeypatch):
    server.key = KEY
    monkeypatch.setenv("QDRANT_API_KEY", KEY)

    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        assert len(retriever.invoke("planet")) == 2


def test_a_key_over_the_open_network_is_warned_of_by_us_alone(caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(RetrieverUnavailableError):
        create_qdrant_retriever(url="http://qdrant.invalid:6333", api_key=KEY, timeout=1)

    [record] = caplog.records
    assert record.getMessage() == (
        "The API key for http://qdrant.invalid:6333 goes over the network unencrypted; use https"
    )


def test_a_key_to_this_machine_is_not_warned_of(server, caplog):
    with caplog.at_level(logging.WARNING), create_qdrant_retriever(url=server.url, api_key=KEY):
        assert not caplog.records


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ((500, {}, "<h1>oops</h1>"), RetrieverUnavailableError, r"failed \(HTTP 500: <h1>oops</h1>\)"),
        ((503, {}, ""), RetrieverUnavailableError, r"failed \(HTTP 503: Service Unavailable\)"),
        ((429, {"Retry-After": "7"}, "{}"), RetrieverUnavailableError, "is busy and asks to wait 7 seconds"),
        ((429, {}, "{}"), RetrieverUnavailableError, "HTTP 429"),
        ((404, {}, "not here"), RetrieverError, r"refused the request \(HTTP 404: not here\)"),
        ((200, {}, "<html>hello</html>"), RetrieverError, "not Qdrant's"),
        ((200, {}, '{"result": [1]}'), RetrieverError, "not Qdrant's"),
    ],
)
def test_an_answer_that_does_not_help_is_explained(server, reply, kind, message):
    server.reply = reply

    with pytest.raises(RetrieverError, match=message) as caught:
        create_qdrant_retriever(PLANETS, url=server.url)

    assert type(caught.value) is kind
    assert f"Qdrant at {server.url} " in str(caught.value)


def test_a_server_that_goes_away_later_is_named(server):
    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        server.reply = 502, {}, "bad gateway"

        with pytest.raises(RetrieverUnavailableError, match=server.url):
            retriever.invoke("planet")


async def test_a_server_that_goes_away_later_is_named_to_async_callers_too(server):
    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        server.reply = 502, {}, "bad gateway"

        with pytest.raises(RetrieverUnavailableError, match=server.url):
            await retriever.ainvoke("planet")


def test_a_server_that_refuses_a_filter_is_quoted(server):
    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        server.reply = 400, {}, '{"status": {"error": "Bad request: Index required but not found"}}'

        with pytest.raises(RetrieverError, match=r"refused the request \(HTTP 400: Bad request: Index required"):
            retriever.invoke("planet", filter={"must": []})


def test_a_server_that_does_not_keep_the_average_length_is_found_out_before_writing(server):
    server.keeps_metadata = False

    with pytest.raises(RetrieverError, match=f"{server.url} does not keep the metadata of collections"):
        create_qdrant_retriever(PLANETS, url=server.url)

    assert ("PUT", "/collections/documents/points") not in server.requests


def test_such_a_server_works_with_an_average_length_of_your_own(server):
    server.keeps_metadata = False
    bm25 = BM25SparseEmbeddings(average_length=5)

    for _ in range(2):
        with create_qdrant_retriever(PLANETS, url=server.url, bm25=bm25) as retriever:
            assert len(retriever.invoke("planet")) == 2


def test_when_two_make_the_collection_at_once_both_get_it(server):
    create_qdrant_retriever(PLANETS, url=server.url).close()
    server.denials = 1

    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        assert len(retriever.invoke("planet")) == 2

    assert server.requests.count(("PUT", "/collections/documents")) == 2


def test_a_search_is_one_request(server):
    with create_qdrant_retriever(PLANETS, url=server.url) as retriever:
        server.requests.clear()
        retriever.invoke("planet")

    assert server.requests == [("POST", "/collections/documents/points/query")]


@pytest.mark.parametrize("url", ["localhost:6333", "ftp://localhost", "http://", "qdrant"])
def test_an_impossible_url_is_refused(url):
    with pytest.raises(ConfigurationError, match="must look like http://localhost:6333"):
        create_qdrant_retriever(PLANETS, url=url)


def test_a_url_may_be_given_as_location(server):
    with create_qdrant_retriever(PLANETS, location=server.url) as retriever:
        assert len(retriever.invoke("planet")) == 2


def test_a_given_client_stays_open(server):
    client = QdrantClient(url=server.url, check_compatibility=False)

    with create_qdrant_retriever(PLANETS, client=client):
        pass

    assert client.collection_exists("documents")
    client.close()


def test_a_folder_in_use_by_another_process_is_named(tmp_path):
    create_qdrant_retriever(PLANETS, path=tmp_path).close()
    hold = (
        f"from qdrant_client import QdrantClient; client = QdrantClient(path={str(tmp_path)!r}); print('open'); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"open\n"

        with pytest.raises(RetrieverUnavailableError, match=f"{tmp_path} is in use by another process"):
            create_qdrant_retriever(path=tmp_path)
        holder.communicate(b"\n")

    with create_qdrant_retriever(path=tmp_path) as retriever:
        assert len(retriever.invoke("planet")) == 2


def test_a_folder_in_use_in_this_process_is_named(tmp_path):
    with create_qdrant_retriever(path=tmp_path), pytest.raises(RetrieverUnavailableError, match="another client"):
        create_qdrant_retriever(path=tmp_path)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(RetrieverError, match=f"Cannot open a Qdrant database in {tmp_path / 'file'}"):
        create_qdrant_retriever(path=tmp_path / "file")


def test_a_failure_while_opening_frees_the_folder(tmp_path):
    create_qdrant_retriever(PLANETS, path=tmp_path).close()
    with pytest.raises(RetrieverError) as caught:
        create_qdrant_retriever(path=tmp_path, sparse_vector_name="other")

    create_qdrant_retriever(path=tmp_path).close()
    del caught  # which held the client of the failed call
