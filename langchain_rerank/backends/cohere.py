"""Cohere Rerank, through Cohere's own SDK."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from typing_extensions import Self

from langchain_rerank.backends._requests import (
    Answer,
    ServiceBackend,
    by_index,
    header_value,
    http_url,
    number,
    shown,
    tls,
    warn_of_plain_http,
)
from langchain_rerank.backends.base import Score
from langchain_rerank.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    import httpx

_OLDEST = Version("5.18")

_SINCE = {"priority": Version("5.20"), "relevant_spans": Version("7.3")}
"""The SDK's first version with an option."""

_COUNTS_RETRIES = Version("5.20.5")
"""Before this, the SDK began to count its retries at two: asked for two, it made none."""

_MODELS = "rerank-v5.0-pro, rerank-v5.0-fast, rerank-v4.0-pro, rerank-v4.0-fast or rerank-v3.5"

_LIST = "https://docs.cohere.com/docs/rerank"

_KEYS = ("COHERE_API_KEY", "CO_API_KEY")
"""LangChain's variable, and the SDK's own."""

_SPAN = ("start", "end", "score")


class RelevantSpans(BaseModel):
    """Which spans of a document to return."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["enabled"] = "enabled"

    threshold: float | None = Field(default=None, ge=0, le=1)
    """Least score of a span. `None` leaves it to the API."""

    max_spans: int | None = Field(default=None, ge=1)
    """Most spans of one document. `None` returns all."""


class CohereBackend(ServiceBackend):
    """Relevance as Cohere's Rerank v2 API gives it, a number in [0, 1].

    Long documents are cut by the API to `max_tokens_per_doc`, which it does not report.
    https://docs.cohere.com/reference/rerank
    """

    requires: ClassVar[tuple[str, ...]] = ("cohere",)
    extra: ClassVar[str] = "cohere"

    without_effect: ClassVar[frozenset[str]] = ServiceBackend.without_effect | {"max_retries", "priority"}

    model: str = Field(min_length=1)
    """Such as `"rerank-v4.0-fast"`. No default: models retire."""

    api_key: SecretStr = Field(default_factory=lambda: SecretStr(_variable(*_KEYS)), validate_default=True)
    """Read from the variable COHERE_API_KEY where it is not given."""

    base_url: str | None = Field(default_factory=lambda: _variable("CO_API_URL") or None, validate_default=True)
    """Another place that speaks Cohere's API, read from the variable CO_API_URL where it is not given. `None` is
    Cohere itself."""

    batch_size: int | None = Field(default=1000, ge=1, le=10_000)
    """Most texts in one request; more are split. Cohere advises at most 1,000 and takes at most 10,000; it bills by
    the started hundred."""

    max_retries: int = Field(default=2, ge=0)
    """How often the SDK repeats a failed request."""

    max_attempts: int = Field(default=1, ge=1)
    """How often a request is made, each with its `max_retries`: one is enough."""

    max_tokens_per_doc: int | None = Field(default=None, ge=1)
    """Most tokens of a document; the API cuts the rest. `None` leaves it to the API (4,096)."""

    priority: int | None = Field(default=None, ge=0)
    """Lower is served first when the API is busy. Needs cohere 5.20."""

    relevant_spans: bool | RelevantSpans = False
    """Add to each document's metadata the spans that matter, as `relevant_spans`: `start` and `end` in its text, and
    `score`, best first. Needs a v5 model and cohere 7.3."""

    @field_validator("api_key")
    @classmethod
    def _is_key(cls, key: SecretStr) -> SecretStr:
        if not key.get_secret_value():
            raise ValueError("there is no key: set the variable COHERE_API_KEY, or give api_key")
        return header_value(key, "api_key")

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        return url and http_url(url, "base_url")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.base_url is None and re.fullmatch(r"rerank-(english|multilingual)-v2\.0", self.model):
            raise ValueError(f"Cohere has no {self.model!r} any more. Present models: {_MODELS}; see {_LIST}")
        installed = Version(version("cohere"))
        for option, since in _SINCE.items():
            asked = getattr(self, option)
            if asked is not None and asked is not False and installed < since:  # a priority of 0 is asked for
                raise ValueError(f"{option} needs cohere {since}, but {installed} is installed: pip install -U cohere")
        if self.base_url:
            warn_of_plain_http(self.base_url)
        return self

    def model_post_init(self, context: Any, /) -> None:
        """Refuse an SDK that is too old."""
        super().model_post_init(context)
        if Version(version("cohere")) < _OLDEST:
            raise MissingDependencyError(
                f"cohere {version('cohere')} is too old. Install with: pip install 'langchain-rerank[cohere]'",
                name="cohere",
            )

    @property
    def _place(self) -> str:
        return shown(self.base_url) if self.base_url else "Cohere"

    def warmup(self) -> None:
        """Import the SDK and open the connection pool; Cohere is not called."""
        self._clients.shared(self._client_options)

    def _client_options(self) -> dict[str, Any]:
        from cohere import AsyncClientV2, ClientV2  # noqa: F401 - a second, which no event loop should wait for

        return {**super()._client_options(), **tls(self.base_url or "https:")}

    def _sdk_options(self) -> dict[str, Any]:
        place = {"base_url": self.base_url} if self.base_url else {}
        key = self.api_key.get_secret_value()
        return {**place, "api_key": key, "timeout": self.timeout, "client_name": "langchain-rerank"}

    def _request(self, query: str, texts: Sequence[str]) -> Answer:
        from cohere import ClientV2

        client = ClientV2(httpx_client=self._clients.shared(self._client_options), **self._sdk_options())
        with self._asking():
            response = client.rerank(**self._body(query, texts))
        return self._read(response, len(texts))

    async def _arequest(self, client: httpx.AsyncClient, query: str, texts: Sequence[str]) -> Answer:
        from cohere import AsyncClientV2

        sdk = AsyncClientV2(httpx_client=client, **self._sdk_options())
        with self._asking():
            response = await sdk.rerank(**self._body(query, texts))
        return self._read(response, len(texts))

    def _body(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the SDK's `rerank`. What is not set is left out: the SDK would send a null."""
        options: dict[str, Any] = {"max_tokens_per_doc": self.max_tokens_per_doc, "priority": self.priority}
        if self.relevant_spans:
            spans = RelevantSpans() if self.relevant_spans is True else self.relevant_spans
            options["relevant_spans"] = spans.model_dump(exclude_none=True)
        retries = self.max_retries + (2 if Version(version("cohere")) < _COUNTS_RETRIES else 0)
        return {
            "model": self.model,
            "query": query,
            "documents": list(texts),
            "request_options": {"max_retries": retries, "retry_remote_protocol_errors": True},
            **{name: value for name, value in options.items() if value is not None},
        }

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns the SDK's errors into ours; the cause is dropped where a server repeats the key in it."""
        from cohere import core

        try:
            with self._reaching(self._place):
                yield
        except (core.ApiError, getattr(core, "ParsingError", core.ApiError)) as error:
            text = str(error)
            raise self._failure(error) from (error if text == self._without_secrets(text) else None)
        except (AttributeError, TypeError) as error:  # the SDK reads any JSON as if it were what it should be
            raise BackendError(f"{self._place} gave an answer that cannot be read ({error})") from error

    def _failure(self, error: Any) -> BackendError:
        status = error.status_code
        if status is None or status < HTTPStatus.MULTIPLE_CHOICES:
            return BackendError(f"{self._place} gave an answer that cannot be read ({type(error).__name__})")
        hint = f". Present models: {_MODELS}; see {_LIST}" if status == HTTPStatus.NOT_FOUND else ""
        return self._refusal(self._place, status, error.body, error.headers or {}, hint)

    def _read(self, response: Any, count: int) -> Answer:
        """The scores of `count` texts from an answer, in the order of the texts. The SDK does not check it."""
        results = getattr(response, "results", None)
        if not isinstance(results, list):
            raise BackendError(f"{self._place} returned no results")
        items = by_index([(getattr(item, "index", None), item) for item in results], count, self._place)
        meta = getattr(response, "meta", None)
        return Answer([self._score_of(item, index) for index, item in enumerate(items)], _usage(meta))

    def _score_of(self, item: Any, index: int) -> float:
        score = number(getattr(item, "relevance_score", None), index, self._place)
        if not self.relevant_spans:
            return score
        spans = getattr(item, "relevant_spans", None) or []
        return Score(score, {"relevant_spans": [{name: getattr(span, name, None) for name in _SPAN} for span in spans]})


def _variable(*names: str) -> str:
    """The first of the environment variables that is set to something."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _usage(meta: Any) -> dict[str, Any]:
    """Billed units and warnings, as the trace takes them."""
    billed, warnings = (getattr(meta, name, None) for name in ("billed_units", "warnings"))
    units = dict(billed) if isinstance(billed, BaseModel) else {}
    usage = {name: value for name, value in units.items() if isinstance(value, (int, float))}
    return {**usage, **({"warnings": warnings} if warnings and isinstance(warnings, list) else {})}
