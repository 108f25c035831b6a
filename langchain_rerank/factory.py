"""Where names, mappings and files become objects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from langchain_rerank.backends.base import Backend
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.reranker import Reranker

GROUP = "langchain_rerank.backends"
"""The entry-point group in which backends are found, ours and everybody's."""

ENVIRONMENT_VARIABLE = "LANGCHAIN_RERANK"
"""What `init_reranker()` reads: `backend:model`, or the path of a YAML file."""

DEFAULT_BACKEND = "embedded"

_VARIABLE = re.compile(r"\$\{(\w+)\}")


Spec: TypeAlias = "str | Path | Mapping[str, Any] | Backend | Reranker | Sequence[Any]"
"""What a reranker is made from."""


def init_reranker(spec: Spec | None = None, /, **options: Any) -> Reranker:
    """Build a reranker from a name, a mapping or a file. Nothing is loaded or called yet.

    Args:
        spec: `"backend"` or `"backend:model"`; a mapping with `backend` and options; a YAML file with the same, as a
            `Path` or a string that ends in .yaml or .yml; a `Backend` or `Reranker`; a list of these, which is a
            cascade: each ranks what the one before keeps; or nothing: then the environment variable LANGCHAIN_RERANK,
            else the embedded model.
        options: Options of `Reranker` (`top_n`, `score_threshold`, `retrieval_weight`) and of the backend, side by
            side. They come before those in `spec`; for a cascade they are the last stage's. `${VAR}` in a string is an
            environment variable.

    Returns:
        The reranker.

    Raises:
        ConfigurationError: A backend or an option is unknown, or a value is wrong; the message names the nearest.
        MissingDependencyError: The backend's libraries are not installed; the message holds the pip line.

    Example:
        >>> from langchain_rerank import init_reranker
        >>> init_reranker("embedded", top_n=5).top_n
        5
    """
    if spec is None:
        spec = os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_BACKEND
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith((".yaml", ".yml"))):
        spec = read_yaml(Path(spec))
    if isinstance(spec, Backend):
        return _reranker(spec, options)
    if isinstance(spec, Reranker):
        return _reranker(spec.backend, {**{name: getattr(spec, name) for name in _reranker_options()}, **options})
    if isinstance(spec, list | tuple):
        return _cascade(spec, options)
    given = {**_mapping(spec), **options}
    if "retriever" in given:
        raise ConfigurationError("This describes a pipeline, not a reranker: give it to create_rerank_retriever")
    merged = _with_model({key: expand(value) for key, value in given.items()})
    name = merged.pop("backend", None) or DEFAULT_BACKEND
    return _build(str(name), merged)


def installed_backends() -> dict[str, EntryPoint]:
    """The backends' entry points by name, ours and third parties', sorted; ours win over a namesake."""
    return installed(GROUP)


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, sorted; ours win over a namesake."""
    found = sorted(entry_points(group=group), key=lambda point: point.value.startswith("langchain_rerank."))
    return dict(sorted({point.name: point for point in found}.items()))


def backend_class(name: str) -> type[Backend]:
    """The class of a backend.

    Raises:
        ConfigurationError: There is no such backend, or what is registered under the name is none.
    """
    known = installed_backends()
    if name not in known:
        hint = f" Write 'bge:{name}' or 'cross-encoder:{name}'." if "/" in name else nearest(name.lower(), known)
        raise ConfigurationError(f"Unknown backend {name!r}.{hint} Installed backends: {', '.join(known)}.")
    kind = known[name].load()
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise ConfigurationError(
            f"Entry point {name!r} is {known[name].value!r}, which is no subclass of langchain_rerank.Backend"
        )
    return kind


def _cascade(stages: Sequence[Any], options: Mapping[str, Any]) -> Reranker:
    """Each reranker after the one before it; the options are the last one's."""
    if not stages:
        raise ConfigurationError("A cascade needs at least one reranker, and the list is empty")
    *first, last = stages
    earlier: Reranker | None = None
    for stage in first:
        earlier = _behind(init_reranker(stage), earlier)
    return _behind(init_reranker(last, **options), earlier)


def _behind(reranker: Reranker, earlier: Reranker | None) -> Reranker:
    """The reranker after an earlier one; if it is a cascade itself, its first stage."""
    if earlier is None:
        return reranker
    return reranker.model_copy(update={"after": _behind(reranker.after, earlier) if reranker.after else earlier})


def read_yaml(path: Path) -> dict[str, Any] | list[Any]:
    """A YAML file that holds a mapping, or a list of what makes a cascade.

    Raises:
        ConfigurationError: The file is not there, is no YAML, or holds something else.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path} must hold a mapping such as 'backend: embedded', not {type(content).__name__}"
        )
    return {str(key): value for key, value in content.items()}


def expand(value: Any) -> Any:
    """The value with each `${VAR}` in its strings replaced, at any depth, in keys too.

    Raises:
        ConfigurationError: The environment has no such variable.
    """
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _variable(match.group(1)), value)
    if isinstance(value, Mapping):
        return {expand(key): expand(item) for key, item in value.items()}
    return [expand(item) for item in value] if isinstance(value, list) else value


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigurationError(f"The environment variable {name} is not set, but the configuration uses it") from None


def _mapping(spec: Any) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        return dict(spec)
    if isinstance(spec, str):
        return {"backend": spec}
    raise ConfigurationError(
        f"A reranker is made from 'backend:model', a mapping, a YAML Path, a Backend or a list of these, "
        f"not {type(spec).__name__}"
    )


def _with_model(mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping with `backend: "name:model"` taken apart."""
    name, _, model = str(mapping.get("backend") or DEFAULT_BACKEND).partition(":")
    if model and mapping.get("model", model) != model:
        raise ConfigurationError(f"Two models: {model!r} in the backend's name and model={mapping['model']!r}")
    return {**mapping, "backend": name, **({"model": model} if model else {})}


def _build(name: str, options: dict[str, Any]) -> Reranker:
    kind = backend_class(name)
    ours = {key: options.pop(key) for key in list(options) if key in _reranker_options()}
    refuse_unknown(f"backend {name!r}", options, {*kind.model_fields, *_reranker_options(), "backend"})
    return _reranker(validated(name, kind, options), ours)


def _reranker(backend: Backend, options: Mapping[str, Any]) -> Reranker:
    refuse_unknown("Reranker", options, _reranker_options())
    reranker: Reranker = validated("Reranker", Reranker, {"backend": backend, **options})
    return reranker


def _reranker_options() -> list[str]:
    return [name for name in Reranker.model_fields if name != "backend"]


def validated(what: str, kind: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """What the options make.

    Raises:
        ConfigurationError: pydantic refuses a value; the message says which option of `what`, and shows no value.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        # pydantic's own text shows the input, which may be a secret.
        problems = "; ".join(_problem(item["loc"], item["msg"]) for item in error.errors(include_input=False))
        raise ConfigurationError(f"{what}: {problems}") from None


def _problem(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, location))}: {message}" if location else message


def refuse_unknown(
    what: str, options: Iterable[str], known: Iterable[str], error: type[ConfigurationError] = ConfigurationError
) -> None:
    """Refuse a name that `what` does not know.

    Raises:
        ConfigurationError: An option is unknown; the message names the nearest and all there are. Or the `error` given.
    """
    known = sorted(known)
    for name in options:
        if name not in known:
            raise error(f"Unknown option {name!r} for {what}.{nearest(name, known)} Options: {', '.join(known)}.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is nearest, to stand behind a sentence; empty if none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
