"""Where a mapping, a YAML file or the environment becomes the two halves of a pipeline."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from langchain_core.documents import Document

from langchain_rerank.errors import ConfigurationError
from langchain_rerank.factory import expand, installed, nearest, read_yaml, refuse_unknown, validated

GROUP = "langchain_rerank.retrievers"
"""The entry-point group in which retrievers are found, ours and everybody's. Each is a callable or a class that takes
its options by keyword, and gives a LangChain retriever or vector store."""

ENVIRONMENT_VARIABLE = "LANGCHAIN_RERANK_PIPELINE"
"""What `create_rerank_retriever()` reads: the path of a YAML file."""

DEFAULT_RETRIEVER = "qdrant"

_NAMES = ("retriever", "reranker", "k", "top_n")
"""What a pipeline is made from: the arguments of `create_rerank_retriever`."""


def read_pipeline(spec: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of `create_rerank_retriever` that stand in a mapping or file. Nothing is opened yet.

    Args:
        spec: A mapping, a YAML file as a `Path` or a string that ends in .yaml or .yml, or nothing: then the file
            that the environment variable LANGCHAIN_RERANK_PIPELINE names.

    Returns:
        What stands there, `retriever` among it.

    Raises:
        ConfigurationError: There is no pipeline, or it has no retriever or an option that is unknown.
    """
    if spec is None:
        spec = _from_environment()
    content: Any = spec
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        content = read_yaml(Path(spec))
    if not isinstance(content, Mapping):
        raise ConfigurationError(
            f"{spec!s} is no pipeline, which is a mapping with 'retriever' and 'reranker', or a YAML file with these"
        )
    if "backend" in content:
        raise ConfigurationError("This describes a reranker, not a pipeline: in a pipeline it stands below 'reranker:'")
    refuse_unknown("a pipeline", content, _NAMES)
    if content.get("retriever") is None:
        raise ConfigurationError("The pipeline has no retriever; give at least 'retriever: qdrant'")
    return {name: expand(value) if name != "reranker" else value for name, value in content.items()}


def make_retriever(spec: Any) -> Any:
    """Make the first half of a pipeline.

    Args:
        spec: A name in the entry-point group, or a mapping with the name as `type` (Qdrant if there is none) and its
            options; anything else is handed back.

    Raises:
        ConfigurationError: The name or an option is unknown, one is missing, or a value is wrong.
    """
    if not isinstance(spec, str | Mapping):
        return spec
    options = {"type": spec} if isinstance(spec, str) else {str(name): value for name, value in spec.items()}
    name = str(options.pop("type", None) or DEFAULT_RETRIEVER)
    make = _registered(name)
    _check_options(name, make, options)
    return validated(f"retriever {name!r}", make, options)


def read_json_lines(path: Path) -> Iterator[Document]:
    """The documents of a file with one JSON object a line: `text`, and `id` and `metadata` if there are any.

    Raises:
        ConfigurationError: The file cannot be read, or a line holds something else.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_document(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _from_environment() -> Path:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        raise ConfigurationError(
            "There is no retriever: give one, or a pipeline as a mapping or YAML file, or set the variable "
            f"{ENVIRONMENT_VARIABLE} to the path of such a file"
        )
    return Path(path)


def _registered(name: str) -> Callable[..., Any]:
    known = installed(GROUP)
    if name not in known:
        raise ConfigurationError(
            f"Unknown retriever {name!r}.{nearest(name.lower(), known)} Installed retrievers: {', '.join(known)}."
        )
    make = known[name].load()
    if not callable(make):
        raise ConfigurationError(
            f"Entry point {name!r} is {known[name].value!r}, which is no class or function that makes a retriever"
        )
    return make  # type: ignore[no-any-return]


def _check_options(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that the callable does not take, and ask for those that it needs."""
    what, parameters = f"retriever {name!r}", _parameters(make)
    named = {key: value for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD}
    if named == parameters:
        refuse_unknown(what, options, named)
    missing = [key for key, value in named.items() if value.default is value.empty and key not in options]
    if missing:
        raise ConfigurationError(f"{what} needs the option {' and '.join(map(repr, missing))}")


def _parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What can be given by keyword; of a pydantic class its fields."""
    unfit = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(make).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in unfit}


def parse_document(line: str, where: str) -> Document:
    """The document in one line of JSON.

    Raises:
        ConfigurationError: The line, which stands at `where`, holds something else.
    """
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not JSON: {error}") from error
    content = content if isinstance(content, dict) else {}
    text, metadata = content.get("text", content.get("page_content")), content.get("metadata") or {}
    if not isinstance(text, str) or not isinstance(metadata, dict):
        raise ConfigurationError(f'{where} must be an object like {{"text": "...", "id": "...", "metadata": {{}}}}')
    number = content.get("id")
    return Document(page_content=text, id=None if number is None else str(number), metadata=metadata)
