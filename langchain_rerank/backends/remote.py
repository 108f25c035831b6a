"""Any reranker that answers over HTTP: Cohere's and Jina's shape, or that of Text Embeddings Inference."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Literal, SupportsFloat
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, PrivateAttr, SecretStr, field_validator, model_validator
from typing_extensions import Self

from langchain_rerank.backends._requests import (
    Answer,
    ServiceBackend,
    by_index,
    header_value,
    http_url,
    joined,
    message_of,
    number,
    shown,
    split,
    tls,
    warn_of_plain_http,
)
from langchain_rerank.errors import BackendError, RequestError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

_TOO_MANY = re.compile(r"batch size \d+ > maximum allowed batch size (\d+)")
"""How TEI, and services built on it, refuse a request of too many texts: with status 413 or 422."""

_PAYLOAD_TOO_LARGE = 413


class RemoteBackend(ServiceBackend):
    """A reranker behind a URL: vLLM, TEI, Infinity, LocalAI, llama.cpp, Xinference, LiteLLM, Jina.

    Scores are what the server says they are, see `scores`, and are matched to texts by the `index` that it gives.
    """

    requires: ClassVar[tuple[str, ...]] = ("httpx",)
    extra: ClassVar[str] = "remote"

    url: str
    """Where: the endpoint, such as `"http://localhost:8000/v1/rerank"`; or the server, and `shape` says the rest."""

    shape: Literal["auto", "cohere", "tei"] = "auto"
    """`"cohere"`: `{"query", "documents"}` to `/v1/rerank`. `"tei"`: `{"query", "texts"}` to `/rerank`.
    A `url` that ends in `/rerank` is used as it is. `"auto"` is `"cohere"` for a `url` that ends in `/v1` or `/v2`,
    with or without `/rerank`, and an error for any other: servers of both shapes have `/rerank`."""

    scores: Literal["probability", "logit"] = "probability"
    """What the server answers: numbers in [0, 1]; or logits, of which the score is then the sigmoid. llama.cpp
    answers logits, for one; TEI answers what is asked for, by its `raw_scores`."""

    api_key: SecretStr | None = None
    """Sent as `Authorization: Bearer ...`."""

    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with every request."""

    truncate: bool | None = None
    """Whether TEI may cut texts that are too long, which it does not report; if not, it refuses them.
    `None` leaves it to the server's `--auto-truncate`."""

    extra_body: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request, such as Cohere's `max_tokens_per_doc` or vLLM's `truncate_prompt_tokens`."""

    _transport: Any = PrivateAttr(default=None)
    _most: int | None = PrivateAttr(default=None)
    _has_asked: bool = PrivateAttr(default=False)

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        return http_url(url, "url")

    @field_validator("api_key")
    @classmethod
    def _is_key(cls, key: SecretStr | None) -> SecretStr | None:
        return None if key is None else header_value(key, "api_key")

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name in headers:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"{name!r} is no name of a header")
        return {name: header_value(value, name) for name, value in headers.items()}

    @field_validator("extra_body")
    @classmethod
    def _has_no_null(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in ("query", "documents", "texts", "top_n", "raw_scores"):
            if name in body:
                raise ValueError(f"{name!r} is sent by the backend itself")
        if empty := [name for name, value in body.items() if value is None]:
            raise ValueError(f"{empty[0]!r} is null, which many servers refuse; leave it out")
        return body

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.shape == "auto" and not _is_versioned(self.url):
            raise ValueError(
                f"the shape of requests cannot be told from {shown(self.url)}: give shape='cohere' (vLLM, Infinity, "
                "LocalAI, llama.cpp, Xinference, LiteLLM, Jina) or shape='tei', or a url that ends in /v1/rerank"
            )
        if self.truncate is not None and not self._is_tei:
            raise ValueError("truncate is for shape='tei'; for another server see extra_body")
        if self.api_key and any(name.lower() == "authorization" for name in self.headers):
            raise ValueError("api_key and headers both hold an Authorization; give one")
        if self.api_key or self.headers:
            warn_of_plain_http(self.url)
        return self

    @property
    def _is_tei(self) -> bool:
        return self.shape == "tei"

    @property
    def _endpoint(self) -> str:
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        if not path.endswith("/rerank"):
            path += "/rerank" if self._is_tei or _is_versioned(self.url) else "/v1/rerank"
        return urlunsplit(parts._replace(path=path))

    @property
    def _place(self) -> str:
        return shown(self._endpoint)

    def warmup(self) -> None:
        """Open the connection pool, and ask TEI how much it takes in one request."""
        self._clients.shared(self._client_options)
        self._limit()

    def _client_options(self) -> dict[str, Any]:
        headers = {name: value.get_secret_value() for name, value in self.headers.items()}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key.get_secret_value()}"
        return {**super()._client_options(), **tls(self.url), "headers": headers, "transport": self._transport}

    def _limit(self) -> int | None:
        if self._asks_info:
            with suppress(BackendError), self._reaching(self._place):  # the requests will tell, and are tried again
                self._learn(self._clients.shared(self._client_options).get(self._info))
        return self._smallest

    async def _alimit(self) -> int | None:
        if self._asks_info:
            here = await self._clients.here(self._client_options)
            with suppress(BackendError), self._reaching(self._place):
                self._learn(await here.client.get(self._info))
        return self._smallest

    @property
    def _smallest(self) -> int | None:
        return min((limit for limit in (self.batch_size, self._most) if limit), default=None)

    @property
    def _asks_info(self) -> bool:
        """Whether TEI may know a limit that nobody has told us yet."""
        return self._is_tei and not self._has_asked and self._smallest is None

    @property
    def _info(self) -> str:
        parts = urlsplit(self._endpoint)
        return urlunsplit(parts._replace(path=parts.path.removesuffix("/rerank") + "/info"))

    def _learn(self, response: httpx.Response) -> None:
        """Take the limit from TEI's `/info`. A gateway may not have it: then the first refused request tells."""
        self._has_asked = True
        info = response.json() if response.is_success else None
        limit = info.get("max_client_batch_size") if isinstance(info, Mapping) else None
        if isinstance(limit, int) and limit > 0:
            self._most = limit

    def _answer(self, query: str, texts: Sequence[str]) -> Answer:
        try:
            return super()._answer(query, texts)
        except _TooManyTextsError as error:
            return joined([self._answer(query, part) for part in self._smaller(texts, error)])

    async def _aanswer(self, query: str, texts: Sequence[str]) -> Answer:
        try:
            return await super()._aanswer(query, texts)
        except _TooManyTextsError as error:
            return joined([await self._aanswer(query, part) for part in self._smaller(texts, error)])

    def _smaller(self, texts: Sequence[str], error: _TooManyTextsError) -> list[Sequence[str]]:
        """The texts in parts that may pass; a limit that the server names holds from now on."""
        if len(texts) == 1:
            raise error
        if error.limit:
            logger.info("%s takes at most %d texts in one request", self._place, error.limit)
            self._most = error.limit
        return split(texts, min(error.limit or len(texts), (len(texts) + 1) // 2))

    def _request(self, query: str, texts: Sequence[str]) -> Answer:
        client = self._clients.shared(self._client_options)
        with self._reaching(self._place):
            response = client.post(self._endpoint, json=self._body(query, texts))
        return self._read(response, len(texts))

    async def _arequest(self, client: httpx.AsyncClient, query: str, texts: Sequence[str]) -> Answer:
        with self._reaching(self._place):
            response = await client.post(self._endpoint, json=self._body(query, texts))
        return self._read(response, len(texts))

    def _body(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        """The request. What is not set is left out: many servers refuse a null."""
        if self._is_tei:
            cut = {} if self.truncate is None else {"truncate": self.truncate}
            own = {"query": query, "texts": list(texts), "raw_scores": self.scores == "logit", **cut}
        else:
            model = {"model": self.model} if self.model else {}
            own = {**model, "query": query, "documents": list(texts), "top_n": len(texts)}
        return {**self.extra_body, **own}

    def _read(self, response: httpx.Response, count: int) -> Answer:
        """The scores of `count` texts from an answer, in the order of the texts."""
        if not response.is_success:
            raise self._refused(response)
        with self._reaching(self._place):
            body = response.json()
        key = "score" if self._is_tei else "relevance_score"
        items = [(item.get("index"), item.get(key)) for item in self._items(body)]
        scores = [number(score, index, self._place) for index, score in enumerate(by_index(items, count, self._place))]
        return Answer([_sigmoid(score) for score in scores] if self.scores == "logit" else scores, _usage(body))

    def _items(self, body: Any) -> list[Mapping[str, Any]]:
        """The scored texts of an answer, whichever shape it should have."""
        items = body if self._is_tei else body.get("results") if isinstance(body, Mapping) else None
        if isinstance(items, list) and all(isinstance(item, Mapping) for item in items):
            return items
        wanted, other = ("array", "cohere") if self._is_tei else ("results", "tei")
        is_other = isinstance(body, Mapping if self._is_tei else list)
        hint = f". Is it a server of the other shape? See shape={other!r}" if is_other else ""
        raise BackendError(f"{self._place} returned no {wanted} but {self._said(body)}{hint}")

    def _refused(self, response: httpx.Response) -> BackendError:
        said = self._why(response)
        status, hint = response.status_code, self._hint(response.status_code, said)
        error = self._refusal(self._place, status, said, response.headers, hint)
        limit = _TOO_MANY.search(said)
        if limit and isinstance(error, RequestError):
            return _TooManyTextsError(str(error), int(limit[1]))
        if status == _PAYLOAD_TOO_LARGE and "token" not in said:  # one text too long is not too many texts
            return _TooManyTextsError(str(error))
        return error

    def _why(self, response: httpx.Response) -> str:
        if response.next_request:
            return f"it has moved to {shown(str(response.next_request.url))}"
        try:
            return message_of(response.json())
        except ValueError:
            return message_of(response.text)

    def _hint(self, status: int, said: str) -> str:
        """What to do about a refusal, where that is known."""
        if status in (401, 403) and not self._secrets():
            return ". None was sent: set api_key"
        if self._is_tei and not self.truncate and "must have less than" in said:
            return ". With truncate=True the server cuts what is too long"
        return ""

    def _checked(self, score: SupportsFloat, index: int) -> float:
        if self.scores == "probability" and not 0.0 <= float(score) <= 1.0:
            raise BackendError(
                f"{self._place} returned {float(score)} for text {index}, which is no probability. If the server "
                "answers logits, set scores='logit'"
            )
        return super()._checked(score, index)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The options; of the URL only what cannot be a secret."""
        for name, value in super().__repr_args__():
            yield name, shown(value) if name == "url" else value


class _TooManyTextsError(RequestError):
    """A service refused the number of texts, or the size of the request.

    Args:
        message: What happened.
        limit: How many texts it would have taken, where it says so.
    """

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


def _is_versioned(url: str) -> bool:
    """Whether the path is one that only servers of Cohere's shape have."""
    return re.search(r"/v[12](/rerank)?/?$", urlsplit(url).path) is not None


def _sigmoid(logit: float) -> float:
    """The probability, in float64, where only logits beyond 36 round to 1."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def _usage(body: Any) -> dict[str, Any]:
    """What the request cost, from Cohere's `meta` or everybody else's `usage`."""
    counted = {**_mapping(body, "usage"), **_mapping(_mapping(body, "meta"), "billed_units")}
    return {name: value for name, value in counted.items() if isinstance(value, (int, float))}


def _mapping(body: Any, key: str) -> Mapping[str, Any]:
    """What stands under a key, if that is a mapping."""
    value = body.get(key) if isinstance(body, Mapping) else None
    return value if isinstance(value, Mapping) else {}
