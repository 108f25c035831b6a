"""Cohere through its real SDK, old or new, against a server on this machine that enforces the documented schema."""

import asyncio
import gc
import logging
import pickle
import subprocess
import sys
import time
import traceback
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from importlib.metadata import version

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.rate_limiters import BaseRateLimiter
from packaging.version import Version
from rerank_server import Reply, RerankServer, relevance

from langchain_rerank import Reranker, init_reranker
from langchain_rerank.backends import cohere as module
from langchain_rerank.backends.base import Backend
from langchain_rerank.backends.cohere import CohereBackend
from langchain_rerank.errors import (
    AuthenticationError,
    BackendError,
    ConfigurationError,
    MissingDependencyError,
    RequestError,
    TransientError,
)
from langchain_rerank.testing import BackendTests

SDK = Version(version("cohere"))

KEY = "co-Very-Secret-0123456789"

NO_WAIT = {"Retry-After": "0", "Retry-After-Ms": "1"}
"""The SDK's shortest wait: old ones take the first, new ones the second."""

QUERY = "red planet"
TEXTS = ["the blue sea", "the red planet", "a planet"]


@pytest.fixture
def server():
    with RerankServer(key=KEY) as server:
        yield server


@pytest.fixture(params=["score", "ascore"])
def ask(request):
    """Asks in this thread, or in an event loop of its own."""
    if request.param == "score":
        return lambda backend, *arguments: backend.score(*arguments)
    return lambda backend, *arguments: asyncio.run(backend.ascore(*arguments))


def cohere(server, **options):
    return CohereBackend(**{"model": "rerank-v4.0-fast", "api_key": KEY, "base_url": server.url, **options})


def expected(texts, query=QUERY):
    return pytest.approx([relevance(query, text) for text in texts])


class TestCohere(BackendTests):
    @pytest.fixture
    def backend(self, server) -> Backend:
        return cohere(server)


class TestCohereInManyRequests(BackendTests):
    @pytest.fixture
    def backend(self, server) -> Backend:
        return cohere(server, batch_size=2, max_concurrency=3)


def test_scores_come_in_the_order_of_the_texts_whatever_order_the_api_gives(server, ask):
    assert ask(cohere(server), QUERY, TEXTS) == expected(TEXTS)


def test_the_request_holds_what_is_set_and_no_null(server, ask):
    ask(cohere(server), QUERY, TEXTS)
    ask(cohere(server, max_tokens_per_doc=77, base_url=server.url + "/"), QUERY, TEXTS)

    body = {"model": "rerank-v4.0-fast", "query": QUERY, "documents": TEXTS}
    assert [request.body for request in server.posted] == [body, {**body, "max_tokens_per_doc": 77}]
    assert {request.path for request in server.posted} == {"/v2/rerank"}


def test_max_tokens_per_doc_is_reached_through_the_reranker(server):
    reranker = init_reranker("cohere:rerank-v3.5", api_key=KEY, base_url=server.url, max_tokens_per_doc=64, top_n=1)
    [best] = reranker.compress_documents([Document(page_content=text, id=text) for text in TEXTS], QUERY)

    assert best.id == "the red planet"
    assert server.posted[0].body["max_tokens_per_doc"] == 64


def test_priority_is_sent_or_refused_by_what_the_sdk_has(server):
    if Version("5.20") > SDK:
        with pytest.raises(ValueError, match=f"priority needs cohere 5.20, but {SDK} is installed"):
            cohere(server, priority=0)
    else:
        cohere(server, priority=0).score(QUERY, TEXTS)
        assert server.posted[0].body["priority"] == 0


def test_relevant_spans_reach_the_metadata_or_are_refused_by_what_the_sdk_has(server):
    options = {"model": "rerank-v5.0-pro", "relevant_spans": {"threshold": 0.2, "max_spans": 1}}
    if Version("7.3") > SDK:
        with pytest.raises(ValueError, match=f"relevant_spans needs cohere 7.3, but {SDK} is installed"):
            cohere(server, **options)
    else:
        documents = [Document(page_content=text) for text in TEXTS]
        ranked = Reranker(backend=cohere(server, **options)).compress_documents(documents, QUERY)
        spans = [document.metadata["relevant_spans"] for document in ranked]

        assert server.posted[0].body["relevant_spans"] == {"mode": "enabled", "threshold": 0.2, "max_spans": 1}
        assert spans == [[{"start": 4, "end": 7, "score": 0.9}], [{"start": 2, "end": 8, "score": 0.9}], []]

        cohere(server, model="rerank-v5.0-pro", relevant_spans=True).score(QUERY, TEXTS)
        assert server.posted[1].body["relevant_spans"] == {"mode": "enabled"}


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, RequestError, "refused the request"),
        (401, AuthenticationError, "did not accept the key"),
        (403, AuthenticationError, "did not accept the key"),
        (404, RequestError, "Present models: rerank-v"),
        (422, RequestError, "refused the request"),
        (429, TransientError, "cannot answer now"),
        (498, AuthenticationError, "did not accept the key"),
        (499, TransientError, "cannot answer now"),
        (500, TransientError, "cannot answer now"),
        (502, TransientError, "cannot answer now"),
        (503, TransientError, "cannot answer now"),
        (504, TransientError, "cannot answer now"),
    ],
)
def test_each_status_is_the_right_error_with_the_api_s_own_words(server, ask, status, kind, words):
    server.always = Reply(status, {"message": "it is like this"})

    with pytest.raises(BackendError, match=rf"{words}.*|HTTP {status}: it is like this") as caught:
        ask(cohere(server, max_retries=0), QUERY, TEXTS)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert f"(HTTP {status}: it is like this)" in str(caught.value)
    assert len(server.posted) == 1


def test_a_wrong_key_is_an_authentication_error(server, ask):
    with pytest.raises(AuthenticationError, match=r"did not accept the key \(HTTP 401: invalid api token\)"):
        ask(cohere(server, api_key="another"), QUERY, TEXTS)


def test_an_unknown_model_is_pointed_to_the_present_ones(server, ask):
    with pytest.raises(RequestError, match=r"model 'rerank-v9' not found.*Present models: rerank-v5.0-pro"):
        ask(cohere(server, model="rerank-v9"), QUERY, TEXTS)


@pytest.mark.parametrize("status", [429, 500, 503, 504])
@pytest.mark.parametrize("retries", [0, 1, 2])
def test_the_sdk_makes_as_many_retries_as_it_is_told(server, ask, status, retries):
    server.always = Reply(status, {"message": "busy"}, NO_WAIT)

    with pytest.raises(TransientError, match=f"HTTP {status}"):
        ask(cohere(server, max_retries=retries), QUERY, TEXTS)
    assert len(server.posted) == 1 + retries


def test_a_busy_api_is_asked_again_and_then_answers(server, ask):
    server.replies = [Reply(429, {"message": "slow down"}, NO_WAIT), Reply(503, {"message": "busy"}, NO_WAIT)]

    assert ask(cohere(server), QUERY, TEXTS) == expected(TEXTS)
    assert len(server.posted) == 3


def test_the_sdk_waits_without_being_told_how_long(server, ask):
    server.replies = [Reply(429, {"message": "slow down"})]

    assert ask(cohere(server, max_retries=1), QUERY, TEXTS) == expected(TEXTS)
    assert len(server.posted) == 2


def test_what_the_api_asks_to_wait_is_on_the_error(server, ask):
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=50), usegmt=True)
    server.replies = [
        Reply(429, {"message": "slow down"}, {"Retry-After": "7"}),
        Reply(503, {"message": "busy"}, {"Retry-After": later}),
        Reply(429, {"message": "slow down"}),
    ]
    asked = []
    for _ in range(3):
        with pytest.raises(TransientError) as caught:
            ask(cohere(server, max_retries=0), QUERY, TEXTS)
        asked.append(caught.value.retry_after)

    assert asked == [7.0, pytest.approx(50, abs=3), None]


def test_max_attempts_repeats_what_the_sdk_gave_up(server, ask):
    server.replies = [Reply(503, {"message": "busy"})]

    assert ask(cohere(server, max_retries=0, max_attempts=2, retry_wait=0), QUERY, TEXTS) == expected(TEXTS)


def test_an_api_that_is_too_slow_is_a_transient_error(server, ask):
    server.always = Reply(seconds=0.5)

    with pytest.raises(TransientError, match=r"127.0.0.1:\d+ did not answer within 0.1 s"):
        ask(cohere(server, timeout=0.1, max_retries=0), QUERY, TEXTS)


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_cut_connection_is_a_transient_error(server, ask, where):
    server.always = Reply(cut=where)

    with pytest.raises(TransientError, match=r"Cannot reach http://127.0.0.1:\d+: "):
        ask(cohere(server, max_retries=0), QUERY, TEXTS)


def test_a_place_where_nobody_listens_is_a_transient_error(ask):
    with RerankServer() as gone:
        pass
    with pytest.raises(TransientError, match="Cannot reach"):
        ask(cohere(gone, max_retries=0), QUERY, TEXTS)


def results(change):
    """A reply whose results are changed."""
    return Reply(spoil=lambda answer: {**answer, "results": change(answer["results"])})


def with_first(**fields):
    return results(lambda items: [{**items[0], **fields}, *items[1:]])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(body=b'{"results": [{"index": 0, "relev'), "gave an answer that cannot be read"),
        (Reply(body=b"<html>It works!</html>"), "gave an answer that cannot be read"),
        (Reply(body=b"\xff\xfe\x00"), "gave an answer that cannot be read"),
        (Reply(body={"id": "1"}), "returned no results"),
        (Reply(body=[1]), "returned no results|cannot be read"),
        (Reply(body={"results": "none"}), "returned no results"),
        (results(lambda items: []), "returned 0 scores for 3 texts"),
        (results(lambda items: items[:-1]), "returned 2 scores for 3 texts"),
        (results(lambda items: items + items), "returned 6 scores for 3 texts"),
        (with_first(index=3), "returned a score for text 3, but was asked about 3"),
        (with_first(index=-1), "returned a score for text -1"),
        (with_first(index=None), "index is no number, but NoneType"),
        (with_first(index="one"), "index is no number, but str"),
        (results(lambda items: [items[0], items[0], items[1]]), "returned two scores for text 1"),
        (with_first(relevance_score=float("nan")), "returned nan for text 1"),
        (with_first(relevance_score=float("inf")), "returned inf for text 1"),
        (with_first(relevance_score=None), "returned no number for text 1"),
        (with_first(relevance_score="high"), "returned no number for text 1"),
        (with_first(relevance_score=1.5), r"returned 1.5 for text 1; scores lie in \[0, 1\]"),
    ],
)
def test_a_wrong_answer_is_an_error_and_never_a_zero(server, ask, reply, message):
    server.always = reply

    with pytest.raises(BackendError, match=message) as caught:
        ask(cohere(server), QUERY, TEXTS)
    assert type(caught.value) is BackendError


class Trace(BaseCallbackHandler):
    """Remembers everything it is told."""

    def __init__(self):
        self.outputs, self.told = [], []

    def on_chain_start(self, serialized, inputs, **kwargs):
        self.told.append(repr((serialized, inputs, kwargs)))

    def on_chain_end(self, outputs, **kwargs):
        self.outputs.append(outputs)
        self.told.append(repr((outputs, kwargs)))

    def on_chain_error(self, error, **kwargs):
        self.told += [repr(error), str(error), "".join(traceback.format_exception(error))]


@pytest.mark.parametrize("status", [401, 422, 503, 200])
async def test_the_key_is_in_no_error_no_repr_and_no_trace(server, status, caplog):
    caplog.set_level(logging.DEBUG)
    said = f"the token {KEY} is not good"
    server.always = Reply(status, said.encode() if status == 200 else {"message": said}, {"X-Echo": KEY})
    reranker, trace = Reranker(backend=cohere(server, max_retries=0)), Trace()

    with pytest.raises(BackendError) as sync:
        reranker.rerank(QUERY, TEXTS, callbacks=[trace])
    with pytest.raises(BackendError) as awaited:
        await reranker.arerank(QUERY, TEXTS, callbacks=[trace])

    for error in (sync.value, awaited.value):
        assert KEY not in f"{error} {error!r} {''.join(traceback.format_exception(error))} {error.__cause__}"
    assert len(trace.told) == 8
    assert KEY not in "".join(trace.told)
    assert KEY not in f"{reranker!r} {reranker.backend!r} {reranker.backend.model_dump()}"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("langchain_rerank")]
    assert KEY not in "".join(ours)


async def test_billed_units_and_warnings_reach_the_trace(server):
    server.replies = [Reply(spoil=_with_warning), Reply(spoil=_with_warning), Reply(spoil=_with_warning)]
    texts = [f"planet number {i}" for i in range(250)]
    reranker, trace = Reranker(backend=cohere(server, batch_size=100)), Trace()
    reranker.rerank(QUERY, texts, callbacks=[trace])
    await reranker.arerank(QUERY, texts, callbacks=[trace])

    assert trace.outputs[0]["usage"] == {"search_units": 3, "warnings": ["old model"] * 3}
    assert trace.outputs[1]["usage"] == {"search_units": 3}


@pytest.mark.parametrize("meta", ["free", {"billed_units": "none", "warnings": "old"}, {"billed_units": {"x": None}}])
def test_a_meta_in_no_known_shape_is_left_out(server, ask, meta):
    server.always = Reply(spoil=lambda answer: {**answer, "meta": meta})

    assert ask(cohere(server), QUERY, TEXTS) == expected(TEXTS)


def _with_warning(answer):
    return {**answer, "meta": {**answer["meta"], "warnings": ["old model"]}}


def test_more_texts_than_one_request_takes_are_split_and_merged_in_order(server, ask):
    texts = [f"{'red ' * (i % 3)}planet{'s' * (i % 2)} {i}" for i in range(2345)]

    assert ask(cohere(server), QUERY, texts) == expected(texts)
    assert sorted(len(request.body["documents"]) for request in server.posted) == [345, 1000, 1000]


def test_one_failed_request_of_many_fails_the_answer(server, ask):
    server.replies = [Reply(), Reply(422, {"message": "not this one"})]

    with pytest.raises(RequestError, match="not this one"):
        ask(cohere(server, batch_size=1, max_concurrency=1), QUERY, TEXTS)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_at_a_time_than_max_concurrency(server, ask, most):
    server.always = Reply(seconds=0.02)

    assert ask(cohere(server, batch_size=1, max_concurrency=most), QUERY, TEXTS * 4) == expected(TEXTS * 4)
    assert server.busiest == most


async def test_the_event_loop_keeps_ticking_while_requests_overlap(server):
    backend = cohere(server, max_concurrency=4)
    await backend.ascore(QUERY, TEXTS)
    server.always = Reply(seconds=0.5)
    ticks, started = 0, time.perf_counter()

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.ensure_future(tick())
    await asyncio.gather(*(backend.ascore(QUERY, TEXTS) for _ in range(8)))
    ticking.cancel()

    assert server.busiest == 4
    assert 1 <= time.perf_counter() - started < 3  # two rounds of four, not eight of one
    assert ticks > 30


def test_one_backend_serves_several_event_loops(server):
    backend = cohere(server)

    assert asyncio.run(backend.ascore(QUERY, TEXTS)) == expected(TEXTS)
    assert server.wait_for(server.is_left_alone)
    assert asyncio.run(backend.ascore(QUERY, TEXTS)) == expected(TEXTS)
    assert server.wait_for(server.is_left_alone)


def test_connections_are_kept_and_closed_with_the_backend(server):
    backend = cohere(server)
    for _ in range(3):
        backend.score(QUERY, TEXTS)
    assert server.open_connections == 1

    del backend
    gc.collect()
    assert server.wait_for(server.is_left_alone)


class Counting(BaseRateLimiter):
    def __init__(self):
        self.asked = []

    def acquire(self, *, blocking=True):
        self.asked.append("sync")
        return True

    async def aacquire(self, *, blocking=True):
        self.asked.append("async")
        return True


async def test_each_request_asks_the_rate_limiter(server):
    limiter = Counting()
    backend = cohere(server, rate_limiter=limiter, batch_size=2)
    backend.score(QUERY, TEXTS)
    await backend.ascore(QUERY, TEXTS)

    assert limiter.asked == ["sync", "sync", "async", "async"]


def test_a_rate_may_be_a_number(server, ask):
    backend = pickle.loads(pickle.dumps(cohere(server, rate_limiter=20, batch_size=1)))
    started = time.perf_counter()
    ask(backend, QUERY, TEXTS * 2)

    assert 0.2 <= time.perf_counter() - started < 2  # six requests at twenty a second, the first without waiting long


@pytest.mark.parametrize("model", ["rerank-multilingual-v2.0", "rerank-english-v2.0"])
def test_a_model_of_older_articles_is_pointed_to_the_present_ones(model, monkeypatch):
    monkeypatch.delenv("CO_API_URL", raising=False)

    with pytest.raises(ConfigurationError, match=f"Cohere has no '{model}' any more. Present models: rerank-v5.0-pro"):
        init_reranker(f"cohere:{model}", api_key=KEY)


def test_a_model_must_be_named():
    with pytest.raises(ConfigurationError, match="cohere: model: Field required"):
        init_reranker("cohere", api_key=KEY)


def test_without_a_key_the_error_says_where_to_put_it(monkeypatch):
    monkeypatch.delenv("COHERE_API_KEY", raising=False)
    monkeypatch.delenv("CO_API_KEY", raising=False)

    with pytest.raises(ConfigurationError, match="there is no key: set the variable COHERE_API_KEY"):
        init_reranker("cohere:rerank-v3.5")


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("COHERE_API_KEY", KEY + "\n")
    monkeypatch.setenv("CO_API_URL", server.url)

    assert CohereBackend(model="rerank-v3.5").score(QUERY, TEXTS) == expected(TEXTS)


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it():
    with pytest.raises(ConfigurationError, match="no HTTP header can carry") as caught:
        init_reranker("cohere:rerank-v3.5", api_key=f"{KEY}\n{KEY}")
    assert KEY not in str(caught.value)


def test_a_key_over_plain_http_to_another_machine_is_warned_of_once(caplog):
    backend = CohereBackend(model="rerank-v3.5", api_key=KEY, base_url="http://proxy.example/cohere")
    pickle.loads(pickle.dumps(backend))

    assert caplog.messages == ["The key for http://proxy.example/cohere is sent unencrypted; use https"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10_001}, "batch_size"),
        ({"max_retries": -1}, "max_retries"),
        ({"relevant_spans": {"treshold": 0.1}}, "relevant_spans"),
        ({"base_url": "api.cohere.com"}, "base_url must be a URL"),
        ({"base_url": "https://me:pass@api.cohere.com"}, "base_url must not hold a user or a password"),
        ({"api_key": " "}, "api_key is empty"),
    ],
)
def test_an_option_that_cannot_be_right_is_refused_at_construction(options, message):
    with pytest.raises(ConfigurationError, match=message):
        init_reranker("cohere:rerank-v3.5", **{"api_key": KEY, **options})


def test_an_sdk_that_is_too_old_is_refused_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "5.13.0")

    with pytest.raises(
        MissingDependencyError, match=r"cohere 5.13.0 is too old.*pip install 'langchain-rerank\[cohere\]'"
    ):
        CohereBackend(model="rerank-v3.5", api_key=KEY)


def test_building_it_imports_neither_the_sdk_nor_the_http_library():
    code = (
        "import sys; from langchain_rerank.backends.cohere import CohereBackend as C;"
        "before = {'httpx', 'cohere'} & set(sys.modules);"
        "C(model='rerank-v3.5', api_key='k'); print(sorted(({'httpx', 'cohere'} & set(sys.modules)) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == "[]\n"


def test_the_sdk_and_the_http_library_are_imported_outside_the_event_loop(server):
    code = (
        "import asyncio, sys, threading; from langchain_rerank.backends.cohere import CohereBackend; by = {};"
        "note = lambda event, args: by.setdefault(args[0], threading.current_thread()) if event == 'import' else None;"
        "sys.addaudithook(note);"
        f"backend = CohereBackend(model='rerank-v3.5', api_key='{KEY}', base_url='{server.url}');"
        "asyncio.run(backend.ascore('q', ['a'])); main = threading.main_thread();"
        "print(*sorted(name for name, thread in by.items() if name.split('.')[0] in ('cohere', 'httpx', 'anyio')"
        " and thread is main), 'cohere' in by)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == "True\n"
