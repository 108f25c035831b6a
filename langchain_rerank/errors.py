"""The errors that this package raises.

Each is a `RerankError` and also the built-in kind that a caller expects:

    RerankError
    ├── ConfigurationError (ValueError)         a name, option, file or value that cannot be right
    │   └── UnexpectedKeywordError (TypeError)  a call got a keyword that nothing there takes
    ├── MissingDependencyError (ImportError)    an optional library is not installed; says the pip line
    ├── ModelLoadError (ValueError)             a model is not there, or would give wrong scores
    ├── BackendError (RuntimeError)             scoring failed, or gave an answer that cannot be right
    │   ├── TransientError (ConnectionError)    it may work when asked again; the base class does
    │   ├── AuthenticationError                 the service did not accept the key
    │   └── RequestError                        the service refused this request
    └── RetrieverError (RuntimeError)           the first stage failed
        ├── CollectionMismatchError             an existing collection does not fit what was asked for
        └── RetrieverUnavailableError (ConnectionError)   no vector store can be reached there
"""

from __future__ import annotations


class RerankError(Exception):
    """Base of every error of this package."""


class ConfigurationError(RerankError, ValueError):
    """A name, an option, a file or a value cannot be right."""


class UnexpectedKeywordError(ConfigurationError, TypeError):
    """A call got a keyword that nothing there takes."""


class MissingDependencyError(RerankError, ImportError):
    """An optional library is not installed; the message holds the pip line."""


class ModelLoadError(RerankError, ValueError):
    """A model is not there, or is of a kind that would give wrong scores."""


class BackendError(RerankError, RuntimeError):
    """A backend failed, or gave an answer that cannot be right."""


class TransientError(BackendError, ConnectionError):
    """A service did not answer, or asked to wait: the same call may succeed later.

    Args:
        message: What happened.
        retry_after: Seconds that the service asked to wait, if it did.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AuthenticationError(BackendError):
    """A service did not accept the key, or wants one."""


class RequestError(BackendError):
    """A service refused the request as it stands; asking again would not help."""


class RetrieverError(RerankError, RuntimeError):
    """The first stage failed."""


class CollectionMismatchError(RetrieverError, ValueError):
    """An existing collection does not fit what was asked for; nothing was written."""


class RetrieverUnavailableError(RetrieverError, ConnectionError):
    """No vector store can be reached at the given place."""
