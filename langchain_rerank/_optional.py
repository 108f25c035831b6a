"""The one place that asks for optional libraries."""

from __future__ import annotations

from importlib.util import find_spec

from langchain_rerank.errors import MissingDependencyError


def missing(*modules: str) -> list[str]:
    """Those of the top-level `modules` that cannot be imported; nothing is imported."""
    return [name for name in modules if find_spec(name) is None]


def require(*modules: str, extra: str) -> None:
    """Check that libraries are installed, without importing them.

    Args:
        modules: Names of top-level modules.
        extra: The extra of this package that brings them.

    Raises:
        MissingDependencyError: One is not there; the message says what to type.
    """
    if absent := missing(*modules):
        raise MissingDependencyError(
            f"{', '.join(absent)} not found. Install with: pip install 'langchain-rerank[{extra}]'", name=absent[0]
        )
