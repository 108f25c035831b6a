"""How Qdrant is reached: in memory, in a folder or on a server, with one clear error where it is not."""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit, urlunsplit

import httpx
from grpc import RpcError, StatusCode
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from langchain_rerank.errors import ConfigurationError, RetrieverError, RetrieverUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import SecretStr

logger = logging.getLogger(__name__)

_SERVER_ERROR = 5
"""The first digit of the HTTP statuses that are the server's fault."""

_FAILURES = (
    UnexpectedResponse,
    ResponseHandlingException,
    ResourceExhaustedResponse,
    RpcError,
    json.JSONDecodeError,
)
"""What qdrant-client raises when a server does not do what it was asked."""


class Connection:
    """A Qdrant client that serves any thread and explains its errors.

    It has the client's methods. Those of an embedded database take turns, as qdrant-client does not lock it itself.
    """

    def __init__(self, client: QdrantClient, place: str, *, embedded: bool, secret: str | None = None) -> None:
        self.place = place
        """Where the database is, for messages: a URL without secrets, a path, or "memory"."""
        self.embedded = embedded
        """Whether the database is in this process, in memory or in a folder."""
        self._client = client
        # On the client, so that all retrievers over one client take turns.
        self._lock = vars(client).setdefault("_langchain_rerank_lock", RLock()) if embedded else None
        self._secret = secret

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._client, name)
        if not callable(method):
            return method

        @wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._turn(), self._explained():
                return method(*args, **kwargs)

        return guarded

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._lock is None:
            yield
        else:
            with self._lock:
                yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            kind, message = _explanation(error)
            # A cause that shows the key, as a server may echo it, is left out of the traceback.
            cause = None if self._secret and self._secret in f"{error} {error!r}" else error
            raise kind(f"Qdrant at {self.place} {self._without_secret(message)}") from cause
        except RuntimeError as error:
            if "is closed" not in str(error):
                raise
            raise RetrieverError(
                f"Qdrant at {self.place} was closed before. Make a new retriever, or use it inside the with block"
            ) from error

    def _without_secret(self, message: str) -> str:
        return message.replace(self._secret, "***") if self._secret else message


def connect(
    *,
    location: str | None,
    path: str | os.PathLike[str] | None,
    url: str | None,
    client: QdrantClient | None,
    api_key: SecretStr | str | None,
    prefer_grpc: bool,
    timeout: float,
) -> Connection:
    """Make a client, or take the one given. Nothing is asked of a server yet.

    Raises:
        ConfigurationError: Two places at once, or one that cannot be.
        RetrieverUnavailableError: Another process or client has the path open.
    """
    places = {"location": location, "path": path, "url": url, "client": client}
    given = [name for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise ConfigurationError(f"Give one of location, path, url and client, not {' and '.join(given)}")
    if client is not None:
        return _given(client)
    if path is not None:
        return _on_disk(Path(path))
    if location in (None, ":memory:") and url is None:
        return Connection(QdrantClient(":memory:"), "memory", embedded=True)
    return _on_server(str(url or location), _secret(api_key), prefer_grpc=prefer_grpc, timeout=timeout)


def _given(client: QdrantClient) -> Connection:
    if not isinstance(client, QdrantClient):
        raise ConfigurationError(f"client is a {type(client).__name__}; it must be a qdrant_client.QdrantClient")
    options = client.init_options
    if options["path"] is not None:
        return Connection(client, str(options["path"]), embedded=True)
    if options["location"] == ":memory:":
        return Connection(client, "memory", embedded=True)
    url = options["url"] or options["location"] or options["host"] or "localhost"
    return Connection(client, _public(url), embedded=False, secret=options["api_key"])


def _on_disk(path: Path) -> Connection:
    in_use = (
        f"{path} is in use by another process, or by another client in this one: embedded Qdrant takes one at a time. "
        "Close it there, or run a Qdrant server and give its url."
    )
    if _locked(path):
        raise RetrieverUnavailableError(in_use)
    try:
        # Its own check of the thread is off: our lock lets one thread in at a time.
        return Connection(QdrantClient(path=str(path), force_disable_check_same_thread=True), str(path), embedded=True)
    except RuntimeError as error:  # somebody was faster
        raise RetrieverUnavailableError(in_use) from error
    except OSError as error:
        raise RetrieverError(f"Cannot open a Qdrant database in {path}: {error.strerror or error}") from error


def _locked(path: Path) -> bool:
    """Whether another client holds the folder.

    qdrant-client asks too, but only after it has read everything, and leaks files when the answer is yes.
    """
    import portalocker

    try:
        with (path / ".lock").open("r+") as file:
            portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
            portalocker.unlock(file)
    except portalocker.exceptions.LockException:
        return True
    except OSError:
        return False  # no such folder yet
    return False


def _on_server(url: str, key: str | None, *, prefer_grpc: bool, timeout: float) -> Connection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"The url {_public(url)!r} must look like http://localhost:6333")
    if key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        logger.warning("The API key for %s goes over the network unencrypted; use https", _public(url))
    client = QdrantClient(
        url=url,
        prefer_grpc=prefer_grpc,
        timeout=math.ceil(timeout),
        check_compatibility=False,  # it asks in a thread, and warns where the first real call says more
        headers={"api-key": key} if key else None,  # as api_key= it would warn about http, localhost too
    )
    return Connection(client, _public(url), embedded=False, secret=key)


def _secret(key: SecretStr | str | None) -> str | None:
    if key is None:
        key = os.environ.get("QDRANT_API_KEY", "")
    value = (key if isinstance(key, str) else key.get_secret_value()).strip()
    if not value.isascii() or not value.isprintable():
        raise ConfigurationError("api_key holds a line break or another character that no HTTP header can carry")
    return value or None


def _public(url: str) -> str:
    """The URL without user, password and query."""
    parts = urlsplit(url)
    if not parts.netloc:  # without a scheme it cannot be told apart, but what stands before an @ may be a password
        return url.rpartition("@")[2].partition("?")[0]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _explanation(error: Exception) -> tuple[type[RetrieverError], str]:
    """What to raise, and how the sentence that starts with the place goes on."""
    if isinstance(error, UnexpectedResponse):
        return _explained_status(error.status_code or 0, _detail(error))
    if isinstance(error, ResourceExhaustedResponse):
        return RetrieverUnavailableError, f"is busy and asks to wait {error.retry_after_s} seconds"
    if isinstance(error, RpcError):
        return _explained_rpc(cast("Any", error))
    source = error.source if isinstance(error, ResponseHandlingException) else error
    if isinstance(source, httpx.TimeoutException):
        return RetrieverUnavailableError, "did not answer in time. Is it overloaded? Raise timeout."
    if isinstance(source, httpx.HTTPError):
        return RetrieverUnavailableError, f"cannot be reached ({source}). Is the server running, and the port right?"
    return RetrieverError, f"gave an answer that is not Qdrant's ({type(source).__name__}). Is the url right?"


def _explained_status(status: int, detail: str) -> tuple[type[RetrieverError], str]:
    if status in (401, 403):
        return RetrieverError, (
            f"does not accept the API key, or wants one (HTTP {status}: {detail}). Give api_key, or set QDRANT_API_KEY."
        )
    if status in (408, 429) or status // 100 == _SERVER_ERROR:
        return RetrieverUnavailableError, f"failed (HTTP {status}: {detail})"
    return RetrieverError, f"refused the request (HTTP {status}: {detail})"


def _explained_rpc(error: Any) -> tuple[type[RetrieverError], str]:
    code, detail = error.code(), error.details()
    if code in (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED):
        return _explained_status(401, detail)
    if code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED):
        return RetrieverUnavailableError, f"cannot be reached over gRPC ({code.name}: {detail})"
    return RetrieverError, f"refused the request ({code.name}: {detail})"


def _detail(error: UnexpectedResponse) -> str:
    """The server's own words."""
    try:
        detail = json.loads(error.content)["status"]["error"]
    except (ValueError, TypeError, KeyError):
        detail = error.content.decode("utf-8", "replace")[:200]
    return str(detail).strip() or str(error.reason_phrase)
