"""What backends that ask a service share: an answer put together from several bounded requests."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import ssl
import sys
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, SupportsFloat, TypeVar
from urllib.parse import urlsplit

from langchain_core.rate_limiters import BaseRateLimiter, InMemoryRateLimiter
from pydantic import Field, PrivateAttr, SecretStr

from langchain_rerank.backends.base import Backend, report_usage
from langchain_rerank.errors import AuthenticationError, BackendError, RequestError, TransientError

if TYPE_CHECKING:
    import httpx
    import tenacity

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SHOWN = 300
"""Most characters of a server's own words in a message: some send a whole page."""

_LINGER = 0.1
"""Seconds until dropped connections are closed. Often a drop is the last thing before the event loop ends: that closes
them as well, but first it cancels all tasks, and must not interrupt one that is closing."""

_TRANSIENT = (408, 425, 429, 499)

_SAYS = ("message", "error", "detail", "msg")
"""Where a JSON error may say what went wrong: Cohere, TEI and OpenAI's likeness, FastAPI, FastAPI's items."""


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    scores: Sequence[SupportsFloat]
    """One for each text, in their order."""

    usage: Mapping[str, Any] = field(default_factory=dict)
    """What it cost, as `report_usage` takes it."""


class ServiceBackend(Backend):
    """Splits the texts into requests, sends a few at a time and puts the scores together in order.

    Write `_request` and `_arequest`, for as many texts as one request may have. Each request is tried again by
    itself when it fails with a `TransientError`.
    """

    without_effect: ClassVar[frozenset[str]] = Backend.without_effect | {
        "batch_size",
        "max_concurrency",
        "rate_limiter",
        "timeout",
    }

    batch_size: int | None = Field(default=None, ge=1)
    """Most texts in one request; more are split. `None` is as many as the service takes."""

    max_concurrency: int = Field(default=8, ge=1)
    """Most requests at a time, of all callers: one bound for threads, one for each event loop."""

    timeout: float = Field(default=30.0, gt=0)
    """Seconds to wait for a connection, and then for the next part of the answer."""

    rate_limiter: BaseRateLimiter | Annotated[float, Field(gt=0)] | None = None
    """Most requests per second; or a LangChain rate limiter, which other objects may share. Repeats of a failed
    request count, unless the service's own SDK repeats it."""

    _clients: Clients = PrivateAttr()
    _slots: threading.BoundedSemaphore = PrivateAttr()
    _limiter: BaseRateLimiter | None = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Prepare what a pickled backend leaves behind: clients, locks, tokens."""
        super().model_post_init(context)
        self._clients = Clients(self.max_concurrency)
        self._slots = threading.BoundedSemaphore(self.max_concurrency)
        self._limiter = _rate_limiter(self.rate_limiter)

    @abstractmethod
    def _request(self, query: str, texts: Sequence[str]) -> Answer:
        """Ask once, in this thread, through `self._clients.shared(...)`."""

    @abstractmethod
    async def _arequest(self, client: httpx.AsyncClient, query: str, texts: Sequence[str]) -> Answer:
        """Ask once, through the running loop's client."""

    def _limit(self) -> int | None:
        """Most texts in one request, where there is a limit; may ask the service for it."""
        return self.batch_size

    async def _alimit(self) -> int | None:
        return self.batch_size

    def _client_options(self) -> dict[str, Any]:
        """Arguments of the `httpx` clients. Called in a thread, never in an event loop: it may import and block."""
        import httpx

        # The slots bound the connections: who waits for one of the pool's own would run into the timeout.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.max_concurrency)
        return {"timeout": self.timeout, "limits": limits}

    def _score(self, query: str, texts: Sequence[str]) -> Sequence[SupportsFloat]:
        parts = split(texts, self._limit())
        if len(parts) == 1:
            return _reported(self._answer(query, texts))
        with ThreadPoolExecutor(min(len(parts), self.max_concurrency), "rerank") as pool:
            return _reported(joined(list(pool.map(lambda part: self._answer(query, part), parts))))

    async def _ascore(self, query: str, texts: Sequence[str]) -> Sequence[SupportsFloat]:
        parts = split(texts, await self._alimit())
        return _reported(joined(await together(self._aanswer(query, part) for part in parts)))

    def _retry(self, kind: type[tenacity.BaseRetrying]) -> Callable[..., Any]:  # noqa: ARG002 - the base's signature
        """Not here: that would repeat all requests of an answer because of one. See `_answer`."""
        return lambda hook, *arguments: hook(*arguments)

    def _answer(self, query: str, texts: Sequence[str]) -> Answer:
        import tenacity

        answer: Answer = super()._retry(tenacity.Retrying)(self._bounded, query, texts)
        return answer

    async def _aanswer(self, query: str, texts: Sequence[str]) -> Answer:
        import tenacity

        answer: Answer = await super()._retry(tenacity.AsyncRetrying)(self._abounded, query, texts)
        return answer

    def _bounded(self, query: str, texts: Sequence[str]) -> Answer:
        with self._slots:
            if self._limiter:
                self._limiter.acquire()
            return self._request(query, texts)

    async def _abounded(self, query: str, texts: Sequence[str]) -> Answer:
        here = await self._clients.here(self._client_options)
        async with here.slots:
            if self._limiter:
                await self._limiter.aacquire()
            return await self._arequest(here.client, query, texts)

    @contextlib.contextmanager
    def _reaching(self, place: str) -> Iterator[None]:
        """Turns what a connection can do wrong into our errors.

        Raises:
            TransientError: There was no connection, it broke, or the answer took longer than `timeout`.
            BackendError: The answer cannot be read.
        """
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise TransientError(f"{place} did not answer within {self.timeout:g} s") from error
        except httpx.TransportError as error:
            raise TransientError(f"Cannot reach {place}: {str(error) or type(error).__name__}") from error
        except (httpx.HTTPError, ValueError) as error:
            raise BackendError(f"{place} gave an answer that cannot be read ({type(error).__name__})") from error

    def _refusal(self, place: str, status: int, body: Any, headers: Mapping[str, str], hint: str = "") -> BackendError:
        """The error that a status other than success means."""
        said = f"HTTP {status}: {self._said(body) or _phrase(status)}"
        if status in (401, 403, 498):
            return AuthenticationError(f"{place} did not accept the key ({said}){hint}")
        if status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return TransientError(f"{place} cannot answer now ({said})", retry_after=retry_after(headers))
        return RequestError(f"{place} refused the request ({said}){hint}")

    def _said(self, body: Any) -> str:
        """What an answer says, as a message may show it."""
        words = self._without_secrets(message_of(body))
        return words if len(words) <= _SHOWN else words[:_SHOWN] + "..."

    def _secrets(self) -> list[str]:
        """What no message may show."""
        options = [option for _, option in self]
        nested = [value for option in options if isinstance(option, dict) for value in option.values()]
        secrets = [value.get_secret_value() for value in [*options, *nested] if isinstance(value, SecretStr)]
        return [secret for secret in secrets if secret]

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return text


@dataclass(frozen=True)
class LoopClient:
    """What belongs to one event loop."""

    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    unneeded: weakref.finalize[..., Clients]
    """Closes the client when nobody holds the `Clients` any more."""


class Clients:
    """The `httpx` clients of one backend: one for all threads, one for each event loop, opened at first use.

    A pooled connection belongs to the loop that opened it and is closed only there. The one thing that every loop
    closes before it ends is its async generators (`loop.shutdown_asyncgens()`, which `asyncio.run` calls), so each
    async client lives in one.

    Args:
        max_concurrency: Most requests at a time in one event loop.
    """

    def __init__(self, max_concurrency: int) -> None:
        self._max_concurrency = max_concurrency
        self._lock = threading.Lock()
        self._shared: httpx.Client | None = None
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[LoopClient]]
        self._by_loop = weakref.WeakKeyDictionary()

    def shared(self, options: Callable[[], Mapping[str, Any]]) -> httpx.Client:
        """The client for threads; closed with this object, or when the interpreter ends."""
        import httpx

        with self._lock:
            if self._shared is None:
                self._shared = httpx.Client(**options())
                weakref.finalize(self, self._shared.close)
            return self._shared

    async def here(self, options: Callable[[], Mapping[str, Any]]) -> LoopClient:
        """What belongs to the running loop; closed with this object, or when the loop ends."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            self._by_loop[loop] = loop.create_task(self._open(loop, options))
        return await asyncio.shield(self._by_loop[loop])  # who gives up waiting does not stop the others

    async def _open(self, loop: asyncio.AbstractEventLoop, options: Callable[[], Mapping[str, Any]]) -> LoopClient:
        try:
            client = await asyncio.to_thread(_async_client, options)
        except BaseException:
            self._by_loop.pop(loop, None)
            raise
        closer = _closer(client, weakref.ref(self))
        await anext(closer)
        unneeded = weakref.finalize(self, _let_go, loop, closer)
        unneeded.atexit = False
        return LoopClient(client, asyncio.Semaphore(self._max_concurrency), unneeded)

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hold nothing more of a loop that ends."""
        self._by_loop.pop(loop).result().unneeded.detach()


def _async_client(options: Callable[[], Mapping[str, Any]]) -> httpx.AsyncClient:
    import anyio
    import httpx

    anyio.run(anyio.sleep, 0)  # what httpx would otherwise import at the first request, in the caller's loop
    return httpx.AsyncClient(**options())


async def _closer(client: httpx.AsyncClient, owner: weakref.ref[Clients]) -> AsyncGenerator[None, None]:
    """Once started, it closes the client when it is closed itself, at the latest as the loop ends."""
    try:
        yield
    finally:
        clients = owner()
        if clients is not None:
            clients.forget(asyncio.get_running_loop())
        await client.aclose()


def _let_go(loop: asyncio.AbstractEventLoop, closer: AsyncGenerator[None, None]) -> None:
    """Nobody holds the `Clients` any more: have the loop close its client, if it goes on."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(loop.call_later, _LINGER, _close_in_task, loop, closer)


def _close_in_task(loop: asyncio.AbstractEventLoop, closer: AsyncGenerator[None, None]) -> None:
    async def close() -> None:
        await closer.aclose()

    loop.create_task(close())


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; when one fails, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def split(texts: Sequence[str], limit: int | None) -> list[Sequence[str]]:
    """The texts in parts that are full but for the last: services bill by the started hundred."""
    size = limit or len(texts)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def joined(answers: Sequence[Answer]) -> Answer:
    """Several answers as one: scores in order, numbers of usage added up, lists put together."""
    scores = [score for answer in answers for score in answer.scores]
    usage: dict[str, Any] = {}
    for answer in answers:
        for name, value in answer.usage.items():
            usage[name] = usage[name] + value if name in usage else value
    return Answer(scores, usage)


def _reported(answer: Answer) -> Sequence[SupportsFloat]:
    """The scores. Says what they cost here: the threads that asked belong to no trace."""
    report_usage(**answer.usage)
    return answer.scores


def by_index(items: Sequence[tuple[Any, T]], count: int, place: str) -> list[T]:
    """What a service said of each of `count` texts, in their order.

    Args:
        items: Index and answer, in any order: services send the best first.
        count: How many texts it was asked about.
        place: Who answered.

    Raises:
        BackendError: An index is missing, doubled or out of range.
    """
    if len(items) != count:
        raise BackendError(f"{place} returned {len(items)} scores for {count} texts")
    placed: dict[int, T] = {}
    for index, item in items:
        if isinstance(index, bool) or not isinstance(index, int):
            raise BackendError(f"{place} returned a score whose index is no number, but {type(index).__name__}")
        if not 0 <= index < count:
            raise BackendError(f"{place} returned a score for text {index}, but was asked about {count}")
        if index in placed:
            raise BackendError(f"{place} returned two scores for text {index}")
        placed[index] = item
    return [placed[index] for index in range(count)]


def number(value: Any, index: int, place: str) -> float:
    """The value as a score.

    Raises:
        BackendError: It is no number, or one that is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BackendError(f"{place} returned no number for text {index}, but {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:  # an integer may be larger than any float
        raise BackendError(f"{place} returned {str(value)[:20]} for text {index}")
    return float(value)


def message_of(body: Any) -> str:
    """What a server says went wrong, from any of the shapes in which servers say it, on one line."""
    if isinstance(body, list):
        return "; ".join(message_of(item) for item in body)
    said = next((body[key] for key in _SAYS if body.get(key)), None) if isinstance(body, Mapping) else None
    if said is not None:
        return message_of(said)
    return " ".join(str("" if body is None else body).split())


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason given"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a `Retry-After` header asks to wait; it may give them, or a date."""
    value = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
    return max(0.0, aware.timestamp() - time.time())


def header_value(secret: SecretStr, name: str) -> SecretStr:
    """The secret as a header can carry it, without the line break that a file or a variable may have left on it.

    Raises:
        ValueError: It is empty, or no header can carry it; without showing it, as the HTTP library would.
    """
    value = secret.get_secret_value().strip()
    if not value:
        raise ValueError(f"{name} is empty; leave it out if the service wants none")
    if not re.fullmatch(r"[\x20-\x7e]+", value):
        raise ValueError(f"{name} holds a line break or another character that no HTTP header can carry")
    return SecretStr(value)


def http_url(url: str, name: str) -> str:
    """The URL of a service, without a slash at its end.

    Raises:
        ValueError: It is none, or it holds a password, which would stand in logs.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} must be a URL such as 'http://localhost:8000'")
    if parts.username or parts.password:
        raise ValueError(f"{name} must not hold a user or a password: URLs are logged. Use api_key or headers")
    return url.rstrip("/")


def tls(url: str) -> dict[str, Any]:
    """For plain HTTP, a context that trusts nobody: to load the certificates takes longer than a request."""
    if urlsplit(url).scheme == "https":
        return {}
    return {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}


def shown(url: str) -> str:
    """The URL as messages may show it: what stands after the path may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def warn_of_plain_http(url: str) -> None:
    """Say that a secret would travel readable, unless it stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        logger.warning("The key for %s is sent unencrypted; use https", shown(url))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _rate_limiter(given: BaseRateLimiter | float | None) -> BaseRateLimiter | None:
    if given is None or isinstance(given, BaseRateLimiter):
        return given
    # It looks for a token only so often: at least twice as often as tokens come, or the rate would not be reached.
    return InMemoryRateLimiter(requests_per_second=given, check_every_n_seconds=min(0.1, 0.5 / given))
