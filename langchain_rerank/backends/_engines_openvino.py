"""OpenVINO: a module of PyTorch converted in memory, or an ONNX file, computed in float32, bfloat16 or int8."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from langchain_rerank.backends._engines_onnx import quiet
from langchain_rerank.backends.local import Batch, Logits, sigmoid

if TYPE_CHECKING:
    from langchain_rerank.backends._engines_convert import Convertible

logger = logging.getLogger(__name__)

FILE = "model.xml"

NOTICEABLE = 0.1
"""A change of a score by int8 from which on it is worth a warning."""

_KEPT = frozenset({"MVN", "Add", "Multiply"})
"""Layer norms and residual sums: float32 halves what bfloat16 changes in random models, and costs a tenth of the time
in the largest, nothing in others (docs/performance.md)."""

_SILENT = {"NNCF_CI": "1", "CI": "true"}
"""Environment variables with which OpenVINO and NNCF, when they are imported, tell their makers nothing."""

_IMPORTING = threading.Lock()
"""Held while the environment says that this is a CI job."""

_HINTS = {"bfloat16": "bf16", "float32": "f32"}


class OpenVINONetwork:
    """A compiled graph on the CPU.

    Args:
        folder: Holds `model.xml`.
        dtype: In which to multiply: `float32`, `bfloat16` or, for a quantised graph, whatever the CPU prefers beside
            int8.
        threads: How many; `None` and 0 leave it to OpenVINO.
    """

    def __init__(self, folder: Path, *, dtype: str, threads: int | None = None) -> None:
        self._compiled, self.longest = _compile(folder / FILE, dtype, threads)
        self.inputs = frozenset(given.any_name for given in self._compiled.inputs)
        self._request = self._compiled.create_infer_request()

    def outputs(self, batch: Batch) -> list[Logits]:
        """All that the graph gives for a padded batch of b pairs, shape (b, t) token ids."""
        return list(self._request.infer(batch.named(self.inputs), share_inputs=True).values())

    def __call__(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        [logits] = self.outputs(batch)
        return logits.reshape(len(batch))


def convert(
    network: Convertible, folder: Path, *, calibration: Sequence[Batch] | None = None, half_range: bool = False
) -> None:
    """Write a module of PyTorch as OpenVINO's `model.xml` and `model.bin`, weights in float32 or int8.

    Args:
        network: What to convert.
        folder: Where to write.
        calibration: Batches of pairs to quantise to int8 with; `None`: float32.
        half_range: Whether weights in int8 use half of its range, for a CPU whose sums could overflow.
    """
    _openvino()  # before anything imports parts of it
    if calibration is None:
        _save(_graph(network), folder)
        network.check(OpenVINONetwork(folder, dtype="float32"))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as exact:
        _save(_graph(network), Path(exact))
        before = OpenVINONetwork(Path(exact), dtype="float32")
        network.check(before)
        _save(_quantised(_core().read_model(Path(exact, FILE)), calibration, half_range=half_range), folder)
        after = OpenVINONetwork(folder, dtype="int8")
        _report_change([before(batch) for batch in calibration], [after(batch) for batch in calibration])


def convert_onnx(file: Path, folder: Path) -> None:
    """Write an ONNX file as OpenVINO's `model.xml` and `model.bin`."""
    _save(_core().read_model(file), folder)


def _report_change(before: Sequence[Logits], after: Sequence[Logits]) -> None:
    """Say in the log how much int8 changes the scores of the calibration pairs."""
    old, new = ([sigmoid(float(logit)) for logit in np.concatenate(logits)] for logits in (before, after))
    change = np.abs(np.subtract(new, old))
    logger.info(
        "int8 changes the scores of %d pairs by %.4f at most, by %.4f on average",
        len(change),
        change.max(),
        change.mean(),
    )
    if change.max() > NOTICEABLE:
        logger.warning(
            "int8 changes scores by up to %s; calibrate on more pairs such as yours, or use dtype='auto'",
            round(float(change.max()), 2),
        )


def _graph(network: Convertible) -> Any:
    """The graph of a module. `openvino.convert_model` would do the same, and report it to its makers."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings(), quiet("transformers"):  # of attributes that only tracing asks for
        warnings.simplefilter("ignore")  # tracing warns of branches; the result is checked on other shapes
        decoder = TorchScriptPythonDecoder(network.model, example_input=network.example)
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(decoder))


def _save(graph: Any, folder: Path) -> None:
    openvino = _openvino()
    openvino.save_model(graph, folder / FILE, compress_to_fp16=False)
    _keep_in_float32(folder / FILE)


def _keep_in_float32(file: Path) -> None:
    """Mark some layers of a saved graph, so that they stay float32 whatever the rest computes in."""
    tree = ET.parse(file)  # noqa: S314 - OpenVINO has just written it
    for layer in tree.iter("layer"):
        if layer.get("type") in _KEPT:
            info = layer.find("rt_info")
            if info is None:
                info = ET.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            if info.find("attribute[@name='DisablePrecisionConversion']") is None:
                # The CPU plugin takes it for "not to a smaller float", though it names one.
                mark = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
                ET.SubElement(info, "attribute", mark)
    tree.write(file, encoding="utf-8", xml_declaration=True)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether OpenVINO would take bfloat16 on this CPU by itself."""
    openvino = _openvino()
    return bool(_core().get_property("CPU", "INFERENCE_PRECISION_HINT") == openvino.Type.bf16)


def dtype_beside_int8() -> str:
    """In which a quantised graph computes what is not quantised."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def _compile(file: Path, dtype: str, threads: int | None) -> tuple[Any, int | None]:
    """The compiled graph, and how many tokens it can read, if its file says so."""
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[dtype_beside_int8() if dtype == "int8" else dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # several processes on one machine would be pinned to the same cores
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    core = _core()
    graph = core.read_model(file)
    path = ["framework", "max_length"]
    longest = int(graph.get_rt_info(path).astype(str)) if graph.has_rt_info(path) else None
    return core.compile_model(graph, "CPU", config), longest


def _quantised(graph: Any, calibration: Sequence[Batch], *, half_range: bool) -> Any:
    """The graph with int8 matrices and activations, SmoothQuant among the steps.

    Xiao et al., 2022, https://arxiv.org/abs/2211.10438
    """
    names = [given.any_name for given in graph.inputs]
    with _quiet_nncf() as nncf:
        batches = [batch.named(names) for batch in calibration]
        overflow = nncf.OverflowFix.ENABLE if half_range else nncf.OverflowFix.FIRST_LAYER
        return nncf.quantize(
            graph,
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
        )


def _openvino() -> Any:
    """The library."""
    return _unreported("openvino")


@functools.cache
def _core() -> Any:
    """The one core of this process, which stays.

    Its CPU plugin gives the thread that loads it a stack for signals, and unmaps that when the last core goes: if this
    happens in another thread, the next signal, a Ctrl-C say, ends the process (seen with 2026.4.1).
    """
    return _openvino().Core()


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF without its bars and its log on standard output, and without its class for all loggers."""
    kind = logging.getLoggerClass()
    try:
        nncf = _unreported("nncf")
    finally:
        logging.setLoggerClass(kind)
    import rich  # draws the bars, on its own console

    console, log = rich.get_console(), logging.getLogger("nncf")
    shown, level = console.quiet, log.level
    console.quiet = True
    log.setLevel(logging.ERROR)
    try:
        yield nncf
    finally:
        console.quiet = shown
        log.setLevel(level)


def _unreported(name: str) -> Any:
    """Import a library whose makers are told of it, except in CI jobs, as if this were one."""
    if name in sys.modules:
        return importlib.import_module(name)  # waits for another thread that has only begun
    with _IMPORTING:
        given = {variable: os.environ.get(variable) for variable in _SILENT}
        os.environ.update(_SILENT)
        try:
            return importlib.import_module(name)
        finally:
            for variable, value in given.items():
                os.environ.pop(variable, None)
                if value is not None:
                    os.environ[variable] = value
