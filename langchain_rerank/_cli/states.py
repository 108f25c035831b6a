"""What is installed and where it would run, for the command `backends`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_rerank._cli.terminal import one_line
from langchain_rerank._optional import missing
from langchain_rerank._training import NEEDED
from langchain_rerank.backends._engines import QUANTISING, EncoderBackend, choose
from langchain_rerank.backends._torch import TorchBackend, pick_device, pick_dtype
from langchain_rerank.backends.base import Backend
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.backends.local import LocalBackend
from langchain_rerank.factory import backend_class, installed_backends

EXTRAS = {
    "qdrant": ("langchain_qdrant", "qdrant_client", "Stemmer"),
    "eval": ("ir_measures",),
    "train": NEEDED,
    "openvino": QUANTISING,
    "plot": ("ir_measures", "matplotlib"),
}
"""The extras that are no backend's, and the modules they bring."""


@dataclass(frozen=True)
class State:
    """What there is to say of a backend, or of another extra, on this machine."""

    kind: Literal["backend", "extra"]
    name: str
    status: Literal["ready", "missing", "broken"]

    runs_on: str = ""
    """Device, dtype and engine with default options; empty where that is for others to say."""

    why: str = ""
    """What decided on them."""

    note: str = ""
    """What to type, what went wrong, or which other package it comes from."""


_COLOURS = {"ready": "green", "missing": "yellow", "broken": "red"}


def states() -> list[State]:
    """Every backend that is registered, ours and third parties', and the other extras."""
    found = [_backend_state(name, point) for name, point in installed_backends().items()]
    return [*found, *(_extra_state(name, modules) for name, modules in EXTRAS.items())]


def _extra_state(name: str, modules: Sequence[str]) -> State:
    if missing(*modules):
        return State("extra", name, "missing", note=_pip_line(name))
    return State("extra", name, "ready")


def _backend_state(name: str, point: EntryPoint) -> State:
    origin = _origin(point)
    try:
        kind = backend_class(name)
        if absent := missing(*kind.requires):
            return State("backend", name, "missing", note=_remedy(kind, absent, origin))
        runs_on, why = _runs_on(kind)
        return State("backend", name, "ready", runs_on=runs_on, why=why, note=origin)
    except Exception as error:  # noqa: BLE001 - a stranger's package may fail in any way, and the others are listed
        what = f"{type(error).__name__}: {one_line(str(error))}"
        return State("backend", name, "broken", note=f"{what} ({origin})" if origin else what)


def _origin(point: EntryPoint) -> str:
    """Where a backend comes from, if not from us."""
    package = point.dist
    if package is None or package.name == "langchain-rerank":
        return ""
    return f"from {package.name} {package.version}"


def _remedy(kind: type[Backend], absent: Sequence[str], origin: str) -> str:
    """What to type; of a third party's extras we know nothing but what it lacks."""
    return f"needs {', '.join(absent)}; {origin}" if origin else _pip_line(kind.extra)


def _pip_line(extra: str) -> str:
    return f"pip install 'langchain-rerank[{extra}]'"


def _runs_on(kind: type[Backend]) -> tuple[str, str]:
    """Where a backend would compute with its defaults, and what decides on that; no model is loaded."""
    if not issubclass(kind, TorchBackend):
        if issubclass(kind, EmbeddedBackend):
            return "cpu, float32, onnxruntime", ""
        return "cpu" if issubclass(kind, LocalBackend) else "", ""
    device = pick_device(kind.model_fields["device"].default)
    if issubclass(kind, EncoderBackend):
        choice = choose("auto", "auto", device)
        return f"{device}, {choice.dtype}, {choice.engine}", choice.why
    dtype = pick_dtype(kind.model_fields["dtype"].default, device)
    return f"{device}, {str(dtype).removeprefix('torch.')}", ""


def print_states(out: Console, listed: Sequence[State]) -> None:
    """A line for each."""
    table = Table(box=None, show_header=False)
    for state in listed:
        name = f"{state.name} (extra)" if state.kind == "extra" else state.name
        runs_on = f"{state.runs_on} ({state.why})" if state.why else state.runs_on
        about = "; ".join(part for part in (runs_on, state.note) if part)
        table.add_row(name, Text(state.status, _COLOURS[state.status]), Text(about))
    out.print(table)
