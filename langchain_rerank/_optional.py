"""The one place that asks for optional libraries."""

from __future__ import annotations

from importlib.util import find_spec

from langchain_rerank.errors import MissingDependencyError


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed; nothing is imported but a submodule's parents."""
    return [name for name in modules if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a submodule: its parent is not there
        return False


def require(*modules: str, extra: str) -> None:
    """Check that libraries are installed, without importing them.

    Args:
        modules: Names of modules, such as `torch` or `google.protobuf`.
        extra: The extra of this package that brings them.

    Raises:
        MissingDependencyError: One is not there; the message says what to type.
    """
    if absent := missing(*modules):
        raise MissingDependencyError(
            f"{', '.join(absent)} not found. Install with: pip install 'langchain-rerank[{extra}]'", name=absent[0]
        )
