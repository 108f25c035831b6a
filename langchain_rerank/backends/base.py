"""What every backend is: a query and n texts in, n scores in [0, 1] out."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, SupportsFloat, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from typing_extensions import Self

from langchain_rerank._optional import require
from langchain_rerank.errors import BackendError, TransientError

if TYPE_CHECKING:
    import tenacity

logger = logging.getLogger(__name__)

MAX_WAIT = 60.0
"""Most seconds between two attempts, whatever the service asks for."""

MAX_QUERIES = 8
"""Most queries that `ascore_many` asks a service at a time."""

_usage: ContextVar[dict[str, Any] | None] = ContextVar("langchain_rerank_usage", default=None)


class Score(float):
    """A score that has something to say about itself.

    A plain float everywhere; `Reranker` adds `details` to the document's metadata. A backend with
    nothing to say returns floats.

    Args:
        value: The score, in [0, 1].
        details: JSON-safe metadata, such as `{"truncated": True}`.
    """

    __slots__ = ("details",)

    details: Mapping[str, Any]

    def __new__(cls, value: SupportsFloat, details: Mapping[str, Any] | None = None) -> Self:  # noqa: D102
        score = super().__new__(cls, value)
        score.details = details or {}
        return score

    def __getnewargs__(self) -> tuple[float, Mapping[str, Any]]:  # type: ignore[override]
        return float(self), self.details


def report_usage(**numbers: float | list[str]) -> None:
    """Tell the trace what a call cost: numbers add up, lists are joined; outside a trace it is a no-op.

    For `_score` hooks: `report_usage(search_units=1)`.
    """
    usage = _usage.get()
    if usage is not None:
        for name, number in numbers.items():
            usage[name] = usage[name] + number if name in usage else number


@contextmanager
def collect_usage() -> Iterator[dict[str, Any]]:
    """Collect what backends report within, in this thread, its tasks and the threads they wait for."""
    usage: dict[str, Any] = {}
    token = _usage.set(usage)
    try:
        yield usage
    finally:
        _usage.reset(token)


class Backend(BaseModel, ABC):
    """Turns a query and n texts into n scores. Write typed options and `_score`, nothing else.

    Options are frozen; what is loaded lives in private attributes, so a backend copies and pickles as its
    configuration and loads again on the other side. Building one loads no weights.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # an input may be a secret
    )

    requires: ClassVar[tuple[str, ...]] = ()
    """Top-level modules without which the backend cannot run; checked at construction."""

    extra: ClassVar[str] = ""
    """The extra of this package that brings them."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"max_attempts", "retry_wait"})
    """Options that change no score, and so stay out of `fingerprint`."""

    model: str = ""
    """The model's name, in the backend's own words."""

    max_attempts: int = Field(default=3, ge=1)
    """Most calls of the hook for one answer: only a `TransientError` is tried again."""

    retry_wait: float = Field(default=0.5, ge=0)
    """Seconds before the second attempt; doubles with each further one. What a service asks for comes first."""

    @model_validator(mode="before")
    @classmethod
    def _has_libraries(cls, options: Any) -> Any:
        """Refuse to exist without the libraries that scoring will need, before anything else is looked at."""
        if cls.requires:
            require(*cls.requires, extra=cls.extra)
        return options

    @property
    def name(self) -> str:
        """The backend's name in traces: its class's, `CrossEncoderBackend` giving `cross-encoder`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self).__name__.removesuffix("Backend")).lower()

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """Score how relevant each text is to the query.

        Args:
            query: What the user asked.
            texts: n candidate passages, any length; backends truncate on their own terms. An empty text is
                not sent anywhere and scores 0.0.

        Returns:
            n floats in [0, 1], in the order of `texts`. Higher is more relevant.
            Comparable between texts of one backend and model, not across models.

        Raises:
            BackendError: The model returned a wrong number of scores, or one that is no number in [0, 1].
            TransientError: The service stayed unavailable for `max_attempts` calls.
        """
        query, known = clean(query), _scorable(texts)
        if not known:
            return [0.0] * len(texts)
        scores = self._retry(_tenacity().Retrying)(self._score, query, list(known.values()))
        return self._spread(scores, known, len(texts))

    async def ascore(self, query: str, texts: Sequence[str]) -> list[float]:
        """As `score`, without blocking the event loop."""
        query, known = clean(query), _scorable(texts)
        if not known:
            return [0.0] * len(texts)
        scores = await self._retry(_tenacity().AsyncRetrying)(self._ascore, query, list(known.values()))
        return self._spread(scores, known, len(texts))

    def score_many(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Score several queries, each with texts of its own; a local model takes them all in one pass.

        Args:
            requests: Pairs of a query and its texts.

        Returns:
            For each pair what `score` returns.

        Raises:
            BackendError: As `score` raises it; no query's scores are returned then.
        """
        known = [_scorable(texts) for _, texts in requests]
        asked = [(clean(query), list(k.values())) for (query, _), k in zip(requests, known, strict=True) if k]
        answers = iter(self._retry(_tenacity().Retrying)(self._score_many, asked) if asked else [])
        return self._spread_many(answers, known, requests)

    async def ascore_many(self, requests: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """As `score_many`, without blocking the event loop."""
        known = [_scorable(texts) for _, texts in requests]
        asked = [(clean(query), list(k.values())) for (query, _), k in zip(requests, known, strict=True) if k]
        answers = iter(await self._retry(_tenacity().AsyncRetrying)(self._ascore_many, asked) if asked else [])
        return self._spread_many(answers, known, requests)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that can change a score, resolved and JSON-safe, without secrets: what a cache's key holds.

        May read the model's files once, but loads no weights.
        """
        options = self.model_dump(mode="json", exclude=set(self.without_effect), fallback=repr)
        secrets = {name for name, value in self if isinstance(value, SecretStr)}
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"backend": kind, **{name: value for name, value in options.items() if name not in secrets}}

    async def afingerprint(self) -> dict[str, Any]:
        """As `fingerprint`, without blocking the event loop."""
        return await asyncio.to_thread(self.fingerprint)

    def warmup(self) -> None:
        """Load ahead of time what the first call would load."""

    @abstractmethod
    def _score(self, query: str, texts: Sequence[str]) -> Sequence[SupportsFloat]:
        """The hook: one score in [0, 1] for each text, in their order.

        Args:
            query: Valid Unicode.
            texts: At least one; none is empty, each is valid Unicode.

        Returns:
            As many numbers as texts; a `Score` where there are details to keep.

        Raises:
            TransientError: Worth trying again.
            BackendError: Not worth it.
        """

    async def _ascore(self, query: str, texts: Sequence[str]) -> Sequence[SupportsFloat]:
        """The hook of those who can await: by default `_score` in a thread."""
        return await asyncio.to_thread(self._score, query, texts)

    def _score_many(self, requests: Sequence[tuple[str, Sequence[str]]]) -> Sequence[Sequence[SupportsFloat]]:
        """The hook of those who score several queries better together: by default one after the other."""
        return [self._score(query, texts) for query, texts in requests]

    async def _ascore_many(self, requests: Sequence[tuple[str, Sequence[str]]]) -> Sequence[Sequence[SupportsFloat]]:
        """By default up to `MAX_QUERIES` at a time, each awaited."""
        slots = asyncio.Semaphore(MAX_QUERIES)

        async def one(query: str, texts: Sequence[str]) -> Sequence[SupportsFloat]:
            async with slots:
                return await self._ascore(query, texts)

        return await asyncio.gather(*(one(query, texts) for query, texts in requests))

    def _retry(self, kind: type[tenacity.BaseRetrying]) -> Callable[..., Any]:
        tenacity = _tenacity()
        return kind(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(self.max_attempts),
            wait=self._wait,
            before_sleep=lambda state: logger.info(
                "%s: attempt %d failed (%s), trying again", self.name, state.attempt_number, _failure(state)
            ),
            reraise=True,
        )

    def _wait(self, retry_state: tenacity.RetryCallState) -> float:
        asked = getattr(_failure(retry_state), "retry_after", None)
        doubled = self.retry_wait * 2 ** (retry_state.attempt_number - 1)
        return float(min(MAX_WAIT, doubled if asked is None else asked))

    def _spread(self, scores: Sequence[SupportsFloat], known: Mapping[int, str], count: int) -> list[float]:
        """Check an answer, and set it among the texts that were not asked about."""
        if len(scores) != len(known):
            raise BackendError(f"{self!r} returned {len(scores)} scores for {len(known)} texts")
        spread = [0.0] * count
        for index, score in zip(known, scores, strict=True):
            spread[index] = self._checked(score, index)
        return spread

    def _spread_many(
        self,
        answers: Iterator[Sequence[SupportsFloat]],
        known: Sequence[Mapping[int, str]],
        requests: Sequence[tuple[str, Sequence[str]]],
    ) -> list[list[float]]:
        return [
            self._spread(next(answers, ()) if texts else (), texts, len(request[1]))
            for texts, request in zip(known, requests, strict=True)
        ]

    def _checked(self, score: SupportsFloat, index: int) -> float:
        number = score if isinstance(score, Score) else float(score)
        if math.isnan(number):
            raise BackendError(f"{self!r} returned nan for text {index}{self._on_nan()}")
        if not 0.0 <= number <= 1.0:
            raise BackendError(f"{self!r} returned {float(number)} for text {index}; scores lie in [0, 1]")
        return number

    def _on_nan(self) -> str:
        """What to say after "returned nan": a remedy, where the backend knows one."""
        return ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__), set(self.model_fields_set))

    def __copy__(self) -> Self:
        return cast("Self", _rebuild(type(self), dict(self.__dict__), set(self.model_fields_set)))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()


def _rebuild(kind: type[Backend], options: dict[str, Any], given: set[str]) -> Backend:
    """The same backend with nothing loaded: its options were checked when it was first made."""
    return kind.model_construct(_fields_set=given, **options)


def _tenacity() -> Any:
    import tenacity  # 30 ms that only scoring has to pay

    return tenacity


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def clean(text: str | None) -> str:
    """The text with each lone surrogate as U+FFFD: no tokenizer and no wire takes one."""
    text = text or ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _scorable(texts: Sequence[str]) -> dict[int, str]:
    """The texts that can be scored, by their index."""
    return {index: clean(text) for index, text in enumerate(texts) if text and not text.isspace()}
