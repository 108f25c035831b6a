"""A real HTTP server on this machine that reranks by shared words, checks what it is sent, and misbehaves on demand."""

import json
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = ("rerank-v5.0-pro", "rerank-v4.0-fast", "rerank-v3.5")


@dataclass(frozen=True)
class Reply:
    """What to answer in place of scores."""

    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""

    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """How long to think first."""

    spoil: Callable[[Any], Any] | None = None
    """Answers rightly, but for what this does to it."""

    cut: str = ""
    """Where the connection breaks: "before" the answer or "within" it."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Refused(Exception):  # noqa: N818 - it is no error of the server's
    def __init__(self, status, **body):
        super().__init__(status)
        self.status, self.body = status, body


def relevance(query, text):
    """The share of the query's words that are in the text, in (0, 1), and a little for the text itself."""
    asked, said = (set(re.findall(r"\w+", words.lower())) for words in (query, text))
    return 0.01 + 0.9 * len(asked & said) / max(1, len(asked)) + 0.05 / (1 + len(text))


class RerankServer:
    """Speaks Cohere's v2 API at /v2/rerank, its likeness at /v1/rerank and TEI's at /rerank and /info.

    `replies` are given first, one for each request; then it behaves. `always` is given to the rest.
    """

    def __init__(self, *, key=None, cap=32, cap_status=413, info=True, logits=False):
        self.key, self.cap, self.cap_status, self.info, self.logits = key, cap, cap_status, info, logits
        self.replies: list[Reply] = []
        self.always = Reply()
        self.requests: list[Request] = []
        self.open_connections = 0
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.rerank = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def posted(self):
        return [request for request in self.requests if request.method == "POST"]

    def is_left_alone(self):
        return self.open_connections == 0

    def wait_for(self, condition):
        """Whether the condition comes true, in five seconds at most."""
        deadline = time.monotonic() + 5
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        return bool(condition())

    def connected(self, change):
        with self._lock:
            self.open_connections += change

    def working(self, change):
        with self._lock:
            self.busy += change
            self.busiest = max(self.busiest, self.busy)

    def next_reply(self, request):
        with self._lock:
            self.requests.append(request)
            return self.replies.pop(0) if self.replies and request.method == "POST" else self.always

    def answer(self, request):
        """The right answer, or the refusal, to a request."""
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refused(401, message="invalid api token")
        answers = {
            ("POST", "/v2/rerank"): self._cohere,
            ("POST", "/v1/rerank"): self._likeness,
            ("POST", "/rerank"): self._tei,
            ("GET", "/info"): self._info,
        }
        if (request.method, request.path) not in answers:
            raise Refused(404, detail="Not Found")
        return answers[request.method, request.path](request.body)

    def _scored(self, query, texts, key):
        """Best first, as services do it, so never in the order of the texts but by luck."""
        scores = [(index, relevance(query, text)) for index, text in enumerate(texts)]
        scores.sort(key=lambda pair: -pair[1])
        return [{"index": index, key: math.log(p / (1 - p)) if self.logits else p} for index, p in scores]

    def _cohere(self, body):
        """Documented at https://docs.cohere.com/reference/rerank."""
        known = {"model", "query", "documents", "top_n", "max_tokens_per_doc", "priority", "relevant_spans"}
        for name, value in body.items():
            if name not in known or value is None:
                raise Refused(422, message=f"invalid field {name}: {value}")
        if body.get("model") not in MODELS:
            raise Refused(404, message=f"model '{body.get('model')}' not found")
        documents = body.get("documents")
        if not isinstance(body.get("query"), str) or not _texts(documents) or len(documents) > 10_000:
            raise Refused(422, message="query must be a text, documents 1 to 10000 texts")
        if not all(isinstance(body.get(name, 1), int) for name in ("top_n", "max_tokens_per_doc", "priority")):
            raise Refused(422, message="top_n, max_tokens_per_doc and priority are integers")
        results = self._scored(body["query"], documents, "relevance_score")
        spans = body.get("relevant_spans")
        if spans:
            if body["model"] != "rerank-v5.0-pro" or spans.get("mode") != "enabled":
                raise Refused(422, message="relevant_spans needs a v5 model and a mode")
            for result in results:
                _add_spans(result, body["query"], documents[result["index"]], spans)
        units = -(-len(documents) // 100)
        meta = {"api_version": {"version": "2"}, "billed_units": {"search_units": units}}
        return {"id": "1", "results": results[: body.get("top_n")], "meta": meta}

    def _likeness(self, body):
        if any(value is None for value in body.values()):
            raise Refused(422, detail=[{"loc": ["body"], "msg": "Input should be a valid value"}])
        if not isinstance(body.get("query"), str) or not _texts(body.get("documents")):
            raise Refused(422, detail=[{"loc": ["body", "documents"], "msg": "Field required"}])
        results = self._scored(body["query"], body["documents"], "relevance_score")
        words = sum(len(text.split()) for text in body["documents"])
        return {"model": "local", "usage": {"total_tokens": words}, "results": results[: body.get("top_n")]}

    def _tei(self, body):
        if not isinstance(body.get("query"), str) or not _texts(body.get("texts")):
            raise Refused(422, error="missing field `texts`", error_type="Validation")
        texts = body["texts"]
        if len(texts) > self.cap:
            error = f"batch size {len(texts)} > maximum allowed batch size {self.cap}"
            raise Refused(self.cap_status, error=error, error_type="Validation")
        longest = max(len(f"{body['query']} {text}".split()) for text in texts)
        if longest > 512 and not body.get("truncate"):
            error = f"`inputs` must have less than 512 tokens. Given: {longest}"
            raise Refused(self.cap_status, error=error, error_type="Validation")
        raw, self.logits = self.logits, bool(body.get("raw_scores"))
        try:
            return self._scored(body["query"], texts, "score")
        finally:
            self.logits = raw

    def _info(self, _):
        if not self.info:
            raise Refused(404, detail="Not Found")
        return {"model_id": "local", "model_type": {"reranker": {}}, "max_client_batch_size": self.cap}


def _texts(value):
    return isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)


def _add_spans(result, query, text, spans):
    words = [match for match in re.finditer(r"\w+", text) if match[0].lower() in query.lower().split()]
    found = [{"start": match.start(), "end": match.end(), "score": 0.9} for match in words]
    if found:
        result["relevant_spans"] = found[: spans.get("max_spans")]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    @property
    def rerank(self):
        return self.server.rerank

    def setup(self):
        super().setup()
        self.rerank.connected(1)

    def finish(self):
        try:
            super().finish()
        finally:
            self.rerank.connected(-1)

    def log_message(self, *_):
        """Tests want no log."""

    def do_GET(self):
        self._serve(None)

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body):
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path.partition("?")[0], headers, body)
        reply = self.rerank.next_reply(request)
        self.rerank.working(1)
        time.sleep(reply.seconds)
        self.rerank.working(-1)
        self._send(request, reply)

    def _send(self, request, reply):
        status, body = reply.status, reply.body
        if status == 200 and body is None:
            try:
                body = self.rerank.answer(request)
                body = reply.spoil(body) if reply.spoil else body
            except Refused as refused:
                status, body = refused.status, refused.body
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        if reply.cut == "before":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if reply.cut else data)
        self.close_connection = self.close_connection or bool(reply.cut)
