"""HTTP rerankers of both shapes: in front of a script, and of a real server on this machine."""

import asyncio
import gc
import json
import logging
import pickle
import ssl
import subprocess
import sys
import threading
import time
import traceback
import weakref
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import httpx
import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.rate_limiters import BaseRateLimiter
from rerank_server import Reply, RerankServer, relevance

from langchain_rerank import Reranker, init_reranker
from langchain_rerank.backends._requests import Clients, retry_after
from langchain_rerank.backends.base import Backend
from langchain_rerank.backends.remote import RemoteBackend
from langchain_rerank.errors import (
    AuthenticationError,
    BackendError,
    ConfigurationError,
    RequestError,
    TransientError,
)
from langchain_rerank.testing import BackendTests

KEY = "sk-Very-Secret-0123456789"

URL = "http://localhost:8000"

QUERY = "red planet"
TEXTS = ["the blue sea", "the red planet", "a planet"]


def remote(answer, **options):
    """A backend whose requests are answered by a function."""
    backend = RemoteBackend(**{"url": URL, "shape": "cohere", "retry_wait": 0, **options})
    backend._transport = httpx.MockTransport(answer)
    return backend


def right(request):
    """Scores by relevance, best first, in the shape of the request."""
    body = json.loads(request.content)
    texts, key = (body["texts"], "score") if "texts" in body else (body["documents"], "relevance_score")
    results = [{"index": index, key: relevance(body["query"], text)} for index, text in enumerate(texts)]
    results.sort(key=lambda result: -result[key])
    return httpx.Response(200, json=results if key == "score" else {"results": results})


def replying(*responses):
    """Gives these responses first, and right answers from then on."""
    left = iter(responses)
    return lambda request: next(left, None) or right(request)


def remembering(requests, answer=right):
    def remember(request):
        requests.append(request)
        return answer(request)

    return remember


def bodies(requests):
    return [json.loads(request.content) for request in requests if request.method == "POST"]


def expected(texts, query=QUERY):
    return pytest.approx([relevance(query, text) for text in texts])


@pytest.fixture(params=["score", "ascore"])
def ask(request):
    """Asks in this thread, or in an event loop of its own."""
    if request.param == "score":
        return lambda backend, *arguments: backend.score(*arguments)
    return lambda backend, *arguments: asyncio.run(backend.ascore(*arguments))


@pytest.fixture
def server():
    with RerankServer() as server:
        yield server


class TestCohereShape(BackendTests):
    @pytest.fixture
    def backend(self, server) -> Backend:
        return RemoteBackend(url=f"{server.url}/v1/rerank", api_key=KEY, batch_size=3)


class TestTeiShape(BackendTests):
    @pytest.fixture
    def backend(self, server) -> Backend:
        return RemoteBackend(url=server.url, shape="tei", truncate=True)


class TestTeiLogits(BackendTests):
    @pytest.fixture
    def backend(self, server) -> Backend:
        return RemoteBackend(url=server.url, shape="tei", truncate=True, scores="logit")


# The request


def test_the_request_is_in_cohere_s_shape_and_holds_no_null(ask):
    requests = []
    ask(remote(remembering(requests)), QUERY, TEXTS)
    ask(remote(remembering(requests), model="bge", extra_body={"max_tokens_per_doc": 64}), QUERY, TEXTS)

    body = {"query": QUERY, "documents": TEXTS, "top_n": 3}
    assert bodies(requests) == [body, {**body, "model": "bge", "max_tokens_per_doc": 64}]


def test_the_request_is_in_tei_s_shape_and_holds_no_null(ask):
    requests = []
    ask(remote(remembering(requests), shape="tei"), QUERY, TEXTS)
    ask(remote(remembering(requests), shape="tei", truncate=True, scores="logit"), QUERY, TEXTS)

    body = {"query": QUERY, "texts": TEXTS, "raw_scores": False}
    assert bodies(requests) == [body, {**body, "raw_scores": True, "truncate": True}]


@pytest.mark.parametrize(
    ("url", "shape", "endpoint"),
    [
        ("http://localhost:8000/v1/rerank", "auto", "http://localhost:8000/v1/rerank"),
        ("http://localhost:8000/v2/rerank/", "auto", "http://localhost:8000/v2/rerank"),
        ("http://localhost:8000/v1", "auto", "http://localhost:8000/v1/rerank"),
        ("http://localhost:8000", "cohere", "http://localhost:8000/v1/rerank"),
        ("http://localhost:7997/rerank", "cohere", "http://localhost:7997/rerank"),
        ("http://localhost:8080", "tei", "http://localhost:8080/rerank"),
        ("https://gate.example/tei/?version=2", "tei", "https://gate.example/tei/rerank?version=2"),
    ],
)
def test_the_endpoint_follows_from_url_and_shape(url, shape, endpoint, ask):
    requests = []
    ask(remote(remembering(requests), url=url, shape=shape), QUERY, TEXTS)

    assert str(requests[-1].url) == endpoint


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://localhost:8000/rerank", "http://localhost/v1/rank"])
def test_a_url_that_does_not_tell_the_shape_is_refused_not_guessed(url):
    with pytest.raises(
        ConfigurationError, match=r"cannot be told from http://localhost.*give shape='cohere'.*shape='tei'"
    ):
        init_reranker("remote", url=url)


def test_key_and_headers_are_sent_and_shown_nowhere(ask):
    requests = []
    backend = remote(remembering(requests), api_key=KEY, headers={"X-Tenant": "secret-tenant"})
    ask(backend, QUERY, TEXTS)

    assert requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert requests[0].headers["x-tenant"] == "secret-tenant"
    assert not {KEY, "secret-tenant"} & set(f"{backend!r} {backend.model_dump()}".replace("'", " ").split())
    assert KEY not in repr(backend)
    assert "secret-tenant" not in repr(backend)


# The answer


def test_results_are_matched_by_index_never_by_position(ask):
    """llama_index#20597: TEI sends the best first, and the scores went to the wrong texts."""
    best_first = [{"index": 2, "score": 0.9}, {"index": 0, "score": 0.5}, {"index": 1, "score": 0.1}]

    assert ask(remote(lambda request: httpx.Response(200, json=best_first), shape="tei"), "q", ["a", "b", "c"]) == [
        0.5,
        0.1,
        0.9,
    ]


def test_logits_become_probabilities(ask):
    results = [{"index": i, "relevance_score": logit} for i, logit in enumerate([-1000, -2, 0, 3, 20, 1000])]
    backend = remote(lambda request: httpx.Response(200, json={"results": results}), scores="logit")

    assert ask(backend, "q", list("abcdef")) == pytest.approx([0, 0.1192029, 0.5, 0.9525741, 1 - 2.06e-9, 1], abs=1e-7)


def test_large_logits_do_not_collapse_into_ties():
    results = [{"index": i, "relevance_score": 17.0 + i / 10} for i in range(3)]
    backend = remote(lambda request: httpx.Response(200, json={"results": results}), scores="logit")
    scores = backend.score("q", ["a", "b", "c"])

    assert scores == sorted(set(scores))


@pytest.mark.parametrize("score", [3.2, -0.1])
def test_a_logit_where_a_probability_is_expected_is_an_error_that_names_the_option(ask, score):
    results = [{"index": 1, "relevance_score": score}, {"index": 0, "relevance_score": 0.5}]
    backend = remote(lambda request: httpx.Response(200, json={"results": results}))

    with pytest.raises(BackendError, match=rf"returned {score} for text 2, which is no probability.*scores='logit'"):
        ask(backend, "q", ["a", "", "b"])


def test_a_short_answer_is_an_error_not_a_zero(ask):
    backend = remote(lambda request: httpx.Response(200, json={"results": []}))

    with pytest.raises(BackendError, match=r"http://localhost:8000/v1/rerank returned 0 scores for 1 texts"):
        ask(backend, "q", ["t"])


A, B = {"index": 0, "relevance_score": 0.1}, {"index": 1, "relevance_score": 0.2}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([A], "returned 1 scores for 2 texts"),
        ([A, B, A], "returned 3 scores for 2 texts"),
        ([A, A], "returned two scores for text 0"),
        ([A, {**B, "index": 2}], "returned a score for text 2, but was asked about 2"),
        ([A, {**B, "index": -1}], "returned a score for text -1"),
        ([A, {**B, "index": "1"}], "index is no number, but str"),
        ([A, {**B, "index": True}], "index is no number, but bool"),
        ([A, {"relevance_score": 1}], "index is no number, but NoneType"),
        ([A, {**B, "relevance_score": None}], "returned no number for text 1, but NoneType"),
        ([A, {**B, "relevance_score": "0.5"}], "returned no number for text 1, but str"),
        ([A, {**B, "relevance_score": float("nan")}], "returned nan for text 1"),
        ([A, {**B, "relevance_score": float("inf")}], "returned inf for text 1"),
        ([A, {**B, "relevance_score": 10**400}], "returned 10000000000000000000 for text 1"),
        ([A, 0.3], "returned no results"),
        (None, "returned no results"),
    ],
)
@pytest.mark.parametrize("scores", ["probability", "logit"])
def test_a_wrong_answer_is_an_error_and_never_a_zero(ask, results, message, scores):
    content = json.dumps({"results": results}).encode()
    backend = remote(lambda request: httpx.Response(200, content=content), scores=scores)

    with pytest.raises(BackendError, match=message) as caught:
        ask(backend, "q", ["a", "b"])
    assert type(caught.value) is BackendError


@pytest.mark.parametrize("content", [b"", b'{"results": [{"ind', b"<html>It works!</html>", b"\xff\xfe\x00", b"1e999"])
@pytest.mark.parametrize("shape", ["cohere", "tei"])
def test_what_is_no_json_of_the_shape_is_an_error(ask, content, shape):
    backend = remote(lambda request: httpx.Response(200, content=content), shape=shape, batch_size=9)

    with pytest.raises(
        BackendError, match=r"gave an answer that cannot be read|returned no (results|array) but"
    ) as caught:
        ask(backend, "q", ["a", "b"])
    assert type(caught.value) is BackendError


def test_an_answer_in_the_other_shape_says_which_option_to_change(ask):
    array, mapping = [{"index": 0, "score": 0.5}], {"results": [{"index": 0, "relevance_score": 0.5}]}

    with pytest.raises(BackendError, match=r"other shape.*shape='tei'"):
        ask(remote(lambda request: httpx.Response(200, json=array)), "q", ["a"])
    with pytest.raises(BackendError, match=r"other shape.*shape='cohere'"):
        ask(remote(lambda request: httpx.Response(200, json=mapping), shape="tei"), "q", ["a"])


# Errors


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, RequestError, "refused the request"),
        (401, AuthenticationError, "did not accept the key"),
        (403, AuthenticationError, "did not accept the key"),
        (404, RequestError, "refused the request"),
        (408, TransientError, "cannot answer now"),
        (413, RequestError, "refused the request"),
        (422, RequestError, "refused the request"),
        (424, RequestError, "refused the request"),
        (425, TransientError, "cannot answer now"),
        (429, TransientError, "cannot answer now"),
        (500, TransientError, "cannot answer now"),
        (502, TransientError, "cannot answer now"),
        (503, TransientError, "cannot answer now"),
        (504, TransientError, "cannot answer now"),
        (529, TransientError, "cannot answer now"),
    ],
)
def test_each_status_is_the_right_error_with_the_server_s_own_words(ask, status, kind, words):
    backend = remote(lambda request: httpx.Response(status, json={"error": "it is like this"}), max_attempts=1)

    with pytest.raises(BackendError) as caught:
        ask(backend, "q", ["a"])
    assert isinstance(caught.value, kind)
    assert f"http://localhost:8000/v1/rerank {words} (HTTP {status}: it is like this)" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"error": "input must have less than 512 tokens", "error_type": "Validation"},
            "input must have less than 512 tokens",
        ),
        ({"message": "invalid model"}, "invalid model"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body", "query"], "msg": "Field required"}]}, "Field required"),
        ({"error": {"message": "no such model", "code": 400}}, "no such model"),
        ({"status": "bad"}, "{'status': 'bad'}"),
        ("just text", "just text"),
        (b"<html>\n<b>Bad</b>\n</html>", "<html> <b>Bad</b> </html>"),
        (b"", "Unprocessable"),
        (b"x" * 9999, "x" * 300 + "..."),
    ],
)
def test_the_server_s_words_are_found_wherever_it_puts_them(ask, body, words):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    with pytest.raises(RequestError) as caught:
        ask(remote(lambda request: httpx.Response(422, content=content)), "q", ["a"])
    assert f"refused the request (HTTP 422: {words}" in str(caught.value)


def test_where_no_key_was_sent_the_error_says_so(ask):
    backend = remote(lambda request: httpx.Response(401, json={"error": "unauthorized"}))

    with pytest.raises(AuthenticationError, match="None was sent: set api_key"):
        ask(backend, "q", ["a"])


def test_a_server_that_has_moved_is_not_followed_with_the_key(ask):
    requests = []
    moved = httpx.Response(307, headers={"Location": "https://elsewhere.example/v1/rerank?token=x"})

    with pytest.raises(RequestError, match=r"HTTP 307: it has moved to https://elsewhere.example/v1/rerank\)"):
        ask(remote(remembering(requests, lambda request: moved), api_key=KEY), "q", ["a"])
    assert len(requests) == 1


def test_a_busy_server_is_asked_again(ask):
    backend = remote(replying(httpx.Response(429), httpx.Response(503)))

    assert ask(backend, QUERY, TEXTS) == expected(TEXTS)


def test_a_server_that_stays_busy_is_asked_max_attempts_times(ask):
    requests = []
    backend = remote(remembering(requests, lambda request: httpx.Response(503)), max_attempts=4)

    with pytest.raises(TransientError, match="HTTP 503: Service Unavailable"):
        ask(backend, QUERY, TEXTS)
    assert len(requests) == 4


def test_only_the_failed_request_of_many_is_asked_again(ask):
    requests = []
    backend = remote(
        remembering(requests, replying(httpx.Response(503), httpx.Response(503))), batch_size=1, max_concurrency=1
    )

    assert ask(backend, QUERY, TEXTS) == expected(TEXTS)
    asked = [body["documents"] for body in bodies(requests)]
    assert len(asked) == 5
    assert all([text] in asked for text in TEXTS)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 1999 23:59:59 -0000", 0.0),
        (None, None),
        ("soon", None),
        ("-3", None),
        ("nan", None),
        ("", None),
    ],
)
def test_what_the_server_asks_to_wait_is_on_the_error(ask, header, seconds):
    headers = {} if header is None else {"Retry-After": header}
    backend = remote(lambda request: httpx.Response(503, headers=headers), max_attempts=1)

    with pytest.raises(TransientError) as caught:
        ask(backend, "q", ["a"])
    assert caught.value.retry_after == seconds


def test_a_date_to_come_back_at_is_in_seconds_from_now(ask):
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=50), usegmt=True)
    backend = remote(lambda request: httpx.Response(429, headers={"Retry-After": later}), max_attempts=1)

    with pytest.raises(TransientError) as caught:
        ask(backend, "q", ["a"])
    assert caught.value.retry_after == pytest.approx(50, abs=3)


def test_a_date_without_a_zone_is_in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    later = format_datetime(datetime.now(timezone.utc).replace(tzinfo=None) + timedelta(seconds=50))
    waits = retry_after({"retry-after": later})
    monkeypatch.undo()
    time.tzset()

    assert later.endswith("-0000")
    assert waits == pytest.approx(50, abs=3)


def test_the_wait_that_a_server_asks_for_is_honoured(ask):
    backend = remote(replying(httpx.Response(429, headers={"Retry-After": "0.3"})))
    started = time.perf_counter()
    ask(backend, "q", ["a"])

    assert time.perf_counter() - started >= 0.3


def test_a_slow_server_is_a_transient_error_that_names_it(server, ask):
    server.always = Reply(seconds=0.5)
    backend = RemoteBackend(url=f"{server.url}/v1/rerank?key={KEY}", timeout=0.1, max_attempts=1)

    with pytest.raises(TransientError, match=rf"{server.url}/v1/rerank did not answer within 0.1 s") as caught:
        ask(backend, "q", ["a"])
    assert KEY not in f"{caught.value} {backend!r}"


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_cut_connection_is_tried_again_and_then_a_transient_error(server, ask, where):
    backend = RemoteBackend(url=server.url, shape="cohere", retry_wait=0)
    server.replies = [Reply(cut=where)]
    assert ask(backend, QUERY, TEXTS) == expected(TEXTS)

    server.always = Reply(cut=where)
    with pytest.raises(TransientError, match=f"Cannot reach {server.url}/v1/rerank: "):
        ask(backend, QUERY, TEXTS)


def test_a_place_where_nobody_listens_is_a_transient_error(ask):
    with RerankServer() as gone:
        pass
    with pytest.raises(TransientError, match=f"Cannot reach {gone.url}/v1/rerank"):
        ask(RemoteBackend(url=f"{gone.url}/v1", max_attempts=1), "q", ["a"])


class Trace(BaseCallbackHandler):
    """Remembers everything it is told."""

    def __init__(self):
        self.outputs, self.told = [], []

    def on_chain_start(self, serialized, inputs, **kwargs):
        self.told.append(repr((serialized, inputs, kwargs)))

    def on_chain_end(self, outputs, **kwargs):
        self.outputs.append(outputs)

    def on_chain_error(self, error, **kwargs):
        self.told += [repr(error), str(error), "".join(traceback.format_exception(error))]


@pytest.mark.parametrize("status", [401, 422, 503, 200])
async def test_the_key_is_in_no_error_and_no_trace(status, caplog):
    caplog.set_level(logging.DEBUG)
    said = {"error": f"the token {KEY} and the tenant s3cr3t-tenant are not good"}
    backend = remote(
        lambda request: httpx.Response(status, json=said), api_key=KEY, headers={"X-Tenant": "s3cr3t-tenant"}
    )
    reranker, trace = Reranker(backend=backend), Trace()

    with pytest.raises(BackendError):
        reranker.rerank(QUERY, TEXTS, callbacks=[trace])
    with pytest.raises(BackendError):
        await reranker.arerank(QUERY, TEXTS, callbacks=[trace])
    told = "".join([*trace.told, *caplog.messages])
    assert len(trace.told) == 8
    assert KEY not in told
    assert "s3cr3t-tenant" not in told


# Splitting


def test_the_cap_of_tei_s_info_is_honoured_from_the_first_request(server, ask):
    backend = RemoteBackend(url=server.url, shape="tei")
    texts = [f"{'red ' * (i % 3)}planet {i}" for i in range(100)]

    assert ask(backend, QUERY, texts) == expected(texts)
    assert ask(backend, QUERY, texts) == expected(texts)
    assert sorted(len(request.body["texts"]) for request in server.posted) == [4, 4, 32, 32, 32, 32, 32, 32]
    assert len(server.requests) - len(server.posted) == 1  # /info is asked once


@pytest.mark.parametrize("status", [413, 422])
@pytest.mark.parametrize("batch_size", [None, 64])
def test_the_cap_of_a_refusal_is_learned_and_honoured(ask, status, batch_size):
    with RerankServer(cap=32, cap_status=status, info=False) as server:
        backend = RemoteBackend(url=server.url, shape="tei", batch_size=batch_size)
        texts = [f"{'red ' * (i % 3)}planet {i}" for i in range(60)]

        assert ask(backend, QUERY, texts) == expected(texts)
        assert [len(request.body["texts"]) for request in server.posted] == [60, 30, 30]
        assert ask(backend, QUERY, texts) == expected(texts)
        assert sorted(len(request.body["texts"]) for request in server.posted[3:]) == [28, 32]


def test_a_batch_size_of_our_own_is_not_asked_about(server, ask):
    ask(RemoteBackend(url=server.url, shape="tei", batch_size=2), QUERY, TEXTS)

    assert sorted(len(request.body["texts"]) for request in server.requests) == [1, 2]


@pytest.mark.parametrize("info", [{"max_client_batch_size": None}, {}, ["?"], "?", {"max_client_batch_size": 0}])
def test_an_info_that_says_nothing_is_no_hindrance(ask, info):
    def answer(request):
        return httpx.Response(200, json=info) if request.method == "GET" else right(request)

    assert ask(remote(answer, shape="tei"), QUERY, TEXTS) == expected(TEXTS)


def test_an_info_that_cannot_be_reached_is_no_hindrance(ask):
    def answer(request):
        if request.method == "GET":
            raise httpx.ConnectError("not now")
        return right(request)

    assert ask(remote(answer, shape="tei"), QUERY, TEXTS) == expected(TEXTS)


def test_a_payload_that_is_too_large_is_halved_until_it_passes(ask):
    """A gateway that says 413 and no number: what is too large depends on the texts, so nothing is learned."""
    requests = []

    def answer(request):
        return right(request) if len(request.content) < 200 else httpx.Response(413, text="Request Entity Too Large")

    texts = [f"planet {i} {'x' * 50}" for i in range(8)]
    backend = remote(remembering(requests, answer))

    assert ask(backend, QUERY, texts) == expected(texts)
    assert [len(body["documents"]) for body in bodies(requests)] == [8, 4, 2, 2, 4, 2, 2]
    with pytest.raises(RequestError, match="HTTP 413: Request Entity Too Large"):
        ask(backend, QUERY, ["x" * 300])


@pytest.mark.parametrize("status", [413, 422])
def test_one_text_too_long_is_not_too_many_texts(ask, status):
    with RerankServer(cap_status=status) as server:
        backend = RemoteBackend(url=server.url, shape="tei")
        with pytest.raises(
            RequestError, match=r"less than 512 tokens. Given: 602\). With truncate=True the server cuts"
        ):
            ask(backend, QUERY, [*TEXTS, "word " * 600])
        assert len(server.posted) == 1


def test_more_texts_than_batch_size_are_split_and_merged_in_order(ask):
    requests = []
    texts = [f"{'red ' * (i % 3)}planet {i}" for i in range(25)]

    assert ask(remote(remembering(requests), batch_size=10), QUERY, texts) == expected(texts)
    assert sorted(len(body["documents"]) for body in bodies(requests)) == [5, 10, 10]
    assert all(body["top_n"] == len(body["documents"]) for body in bodies(requests))


async def test_usage_reaches_the_trace(server):
    reranker, trace = Reranker(backend=RemoteBackend(url=f"{server.url}/v1", batch_size=2)), Trace()
    reranker.rerank(QUERY, TEXTS, callbacks=[trace])
    await reranker.arerank(QUERY, TEXTS, callbacks=[trace])

    assert [outputs["usage"] for outputs in trace.outputs] == [{"total_tokens": 8}, {"total_tokens": 8}]


@pytest.mark.parametrize("usage", [None, "free", [], {"total_tokens": None, "by": {"a": 1}}])
def test_a_usage_in_no_known_shape_is_left_out(ask, usage):
    body = {"results": [A, B], "usage": usage, "meta": usage}

    assert ask(remote(lambda request: httpx.Response(200, json=body)), "q", ["a", "b"]) == [0.1, 0.2]


# Concurrency, pools, event loops


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_at_a_time_than_max_concurrency(server, ask, most):
    server.always = Reply(seconds=0.02)
    backend = RemoteBackend(url=f"{server.url}/v1", batch_size=1, max_concurrency=most)

    assert ask(backend, QUERY, TEXTS * 4) == expected(TEXTS * 4)
    assert server.busiest == most


def test_waiting_for_a_turn_is_not_waiting_for_an_answer(server, ask):
    server.always = Reply(seconds=0.1)
    backend = RemoteBackend(url=f"{server.url}/v1", batch_size=1, max_concurrency=1, timeout=0.4, max_attempts=1)

    assert ask(backend, QUERY, TEXTS * 2) == expected(TEXTS * 2)


def test_callers_in_threads_share_the_bound(server):
    server.always = Reply(seconds=0.02)
    backend = RemoteBackend(url=f"{server.url}/v1", batch_size=1, max_concurrency=2)
    threads = [threading.Thread(target=backend.score, args=(QUERY, TEXTS)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert server.busiest == 2
    assert len(server.posted) == 12


async def test_the_event_loop_keeps_ticking_while_slow_requests_overlap(server):
    server.always = Reply(seconds=0.5)
    backend = RemoteBackend(url=f"{server.url}/v1", max_concurrency=4)
    longest, last = 0.0, time.perf_counter()

    async def tick():
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()

    ticking = asyncio.ensure_future(tick())
    started = time.perf_counter()
    await asyncio.gather(*(backend.ascore(QUERY, TEXTS) for _ in range(8)))
    ticking.cancel()

    assert server.busiest == 4
    assert 1 <= time.perf_counter() - started < 3  # two rounds of four, not eight of one
    assert longest < 0.4  # less than one request: none of them held the loop


async def test_a_cancelled_call_takes_its_requests_along(server):
    backend = RemoteBackend(url=f"{server.url}/v1", batch_size=1, max_concurrency=1)
    server.always = Reply(seconds=0.2)
    call = asyncio.ensure_future(backend.ascore(QUERY, TEXTS))
    assert await asyncio.to_thread(server.wait_for, lambda: server.posted)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0.5)

    assert len(server.posted) == 1
    server.always = Reply()
    assert await backend.ascore(QUERY, TEXTS) == expected(TEXTS)


async def test_a_failed_request_cancels_the_others(server):
    server.replies = [Reply(422)]
    server.always = Reply(seconds=0.05)
    backend = RemoteBackend(url=f"{server.url}/v1", batch_size=1, max_concurrency=1)

    with pytest.raises(RequestError):
        await backend.ascore(QUERY, TEXTS)
    assert len(server.posted) <= 2


def test_one_backend_serves_several_event_loops_and_leaves_nothing_open(server):
    backend = RemoteBackend(url=f"{server.url}/v1")

    for _ in range(2):
        assert asyncio.run(_twice(backend)) == expected(TEXTS)
        assert server.wait_for(server.is_left_alone)
    assert not backend._clients._by_loop


async def _twice(backend):
    await backend.ascore(QUERY, TEXTS)
    return await backend.ascore(QUERY, TEXTS)


def test_event_loops_in_threads_have_clients_of_their_own(server):
    backend = RemoteBackend(url=f"{server.url}/v1")
    found = []

    def run():
        found.append(asyncio.run(_twice(backend)))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [expected(TEXTS)] * 4
    assert server.wait_for(server.is_left_alone)


def test_connections_are_kept_between_calls_and_closed_with_the_backend(server):
    backend = RemoteBackend(url=f"{server.url}/v1")
    for _ in range(3):
        backend.score(QUERY, TEXTS)
    assert server.open_connections == 1

    del backend
    gc.collect()
    assert server.wait_for(server.is_left_alone)


async def test_a_backend_that_is_dropped_closes_its_connections_while_the_loop_goes_on(server):
    backend = RemoteBackend(url=f"{server.url}/v1")
    await _twice(backend)
    assert server.open_connections == 1

    del backend
    gc.collect()
    assert await asyncio.to_thread(server.wait_for, server.is_left_alone)


def run_and_cancel(main):
    """As `asyncio.run`, but with nothing to wait for at the end."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
        for task in asyncio.all_tasks(loop):
            task.cancel()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("run", [asyncio.run, run_and_cancel])
@pytest.mark.parametrize("steps", range(6))
def test_clients_that_are_dropped_as_the_loop_ends_are_closed_too(server, run, steps):
    """At the very end the loop cancels every task, also one that is about to close the client."""
    server.always = Reply(seconds=0.05)

    async def main():
        clients = Clients(3)
        client = (await clients.here(dict)).client
        await asyncio.gather(*(client.get(f"{server.url}/info") for _ in range(3)))
        assert server.open_connections == 3
        del clients, client
        for _ in range(steps):
            await asyncio.sleep(0)

    run(main())
    gc.collect()
    assert server.wait_for(server.is_left_alone)


async def test_who_stops_waiting_for_a_client_does_not_stop_the_others(server):
    clients = Clients(3)

    def slow():
        time.sleep(0.1)
        return {}

    first, second = (asyncio.ensure_future(clients.here(slow)) for _ in range(2))
    await asyncio.sleep(0.02)
    first.cancel()

    assert (await (await second).client.get(f"{server.url}/info")).status_code == 200


async def test_a_client_that_could_not_be_opened_is_opened_the_next_time(server):
    clients = Clients(3)
    with pytest.raises(TypeError, match="no_such_option"):
        await clients.here(lambda: {"no_such_option": 1})

    assert (await (await clients.here(dict)).client.get(f"{server.url}/info")).status_code == 200


async def test_dropped_clients_leave_nothing_behind_in_a_loop_that_goes_on(server):
    clients = Clients(3)
    opened = await clients.here(dict)
    await opened.client.get(f"{server.url}/info")
    gone = weakref.ref(opened)
    del clients, opened

    assert await asyncio.to_thread(server.wait_for, server.is_left_alone)
    await asyncio.sleep(0.05)
    gc.collect()
    assert gone() is None
    assert len(asyncio.all_tasks()) == 1


def test_loops_that_have_ended_are_not_held():
    clients = Clients(3)

    async def main():
        await clients.here(dict)
        return weakref.ref(asyncio.get_running_loop())

    ended = asyncio.run(main())
    gc.collect()
    assert ended() is None


def test_a_loop_that_was_closed_without_a_word_is_no_hindrance():
    clients, loop = Clients(3), asyncio.new_event_loop()
    loop.run_until_complete(clients.here(dict))
    loop.close()
    del clients
    gc.collect()  # an error in a finalizer would fail this test


def test_an_interpreter_that_ends_complains_of_nothing(server):
    code = (
        "import asyncio; from langchain_rerank.backends.remote import RemoteBackend;"
        f"backend = RemoteBackend(url='{server.url}/v1');"
        "print(backend.score('q', ['a']) == asyncio.run(backend.ascore('q', ['a'])))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("True\n", "")


class Counting(BaseRateLimiter):
    def __init__(self):
        self.asked = []

    def acquire(self, *, blocking=True):
        self.asked.append("sync")
        return True

    async def aacquire(self, *, blocking=True):
        self.asked.append("async")
        return True


async def test_each_request_asks_the_rate_limiter_repeats_too():
    limiter = Counting()
    backend = remote(replying(httpx.Response(503)), rate_limiter=limiter, batch_size=2)
    backend.score(QUERY, TEXTS)
    await backend.ascore(QUERY, TEXTS)

    assert limiter.asked == ["sync"] * 3 + ["async"] * 2


@pytest.mark.parametrize("url", ["https://localhost:8000/v1", "http://localhost:8000/v1"])
def test_a_certificate_is_always_asked_for(url):
    """Plain HTTP loads no certificates, and then trusts none: nothing can talk it into a connection unverified."""
    options = RemoteBackend(url=url)._client_options()
    context = options.get("verify", httpx.create_ssl_context())

    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert bool(context.get_ca_certs()) == url.startswith("https")


# Configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url must be a URL such as"),
        ({"url": "http://me:s3cr3t@localhost:8000/v1"}, "url must not hold a user or a password"),
        ({"api_key": ""}, "api_key is empty"),
        ({"api_key": "s3cr3t\nx"}, "api_key holds a line break"),
        ({"headers": {"X-Key": "s3cr3t\u2026"}}, "X-Key holds a line break or another character"),
        ({"headers": {"X Key": "x"}}, "'X Key' is no name of a header"),
        ({"api_key": "s3cr3t", "headers": {"authorization": "s3cr3t"}}, "both hold an Authorization"),
        ({"truncate": True}, "truncate is for shape='tei'"),
        ({"extra_body": {"max_tokens_per_doc": None}}, "'max_tokens_per_doc' is null"),
        ({"extra_body": {"documents": []}}, "'documents' is sent by the backend itself"),
        ({"scores": "logits"}, "scores: "),
        ({"timeout": 0}, "timeout: "),
        ({"rate_limiter": -1}, "rate_limiter"),
        ({"max_concurrency": 0}, "max_concurrency: "),
    ],
)
def test_an_option_that_cannot_be_right_is_refused_without_showing_a_secret(options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        init_reranker("remote", **{"url": f"{URL}/v1", **options})
    assert "s3cr3t" not in str(caught.value)


def test_a_line_break_that_a_file_left_on_the_key_is_dropped(ask):
    requests = []
    ask(remote(remembering(requests), api_key=f"{KEY}\n"), QUERY, TEXTS)

    assert requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("secret", [{"api_key": KEY}, {"headers": {"X-Key": KEY}}])
def test_a_key_over_plain_http_to_another_machine_is_warned_of_once(caplog, secret):
    backend = RemoteBackend(url="http://tei.internal:80/v1", **secret)
    pickle.loads(pickle.dumps(backend))

    assert caplog.messages == ["The key for http://tei.internal:80/v1 is sent unencrypted; use https"]


@pytest.mark.parametrize("url", ["https://api.example", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"])
def test_a_key_that_stays_here_or_is_encrypted_is_not_warned_of(caplog, url):
    RemoteBackend(url=f"{url}/v1", api_key=KEY)
    RemoteBackend(url="http://tei.internal/v1")

    assert caplog.messages == []


def test_plain_strings_become_secrets():
    backend = init_reranker("remote", url=f"{URL}/v1", api_key=KEY, headers={"X-Tenant": KEY}).backend

    assert KEY not in f"{backend!r} {backend} {backend.model_dump()} {backend.model_dump_json()}"


def test_warmup_asks_for_the_cap_ahead_of_time(server):
    backend = RemoteBackend(url=server.url, shape="tei")
    backend.warmup()

    assert [request.path for request in server.requests] == ["/info"]


def test_building_it_imports_no_http_library():
    code = (
        "import sys; from langchain_rerank.backends.remote import RemoteBackend as R; before = set(sys.modules);"
        "R(url='http://localhost/v1', api_key='k'); print('httpx' in set(sys.modules) - before)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == "False\n"
