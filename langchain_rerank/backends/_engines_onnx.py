"""ONNX Runtime: a module of PyTorch exported to ONNX, computed in float32."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_rerank.backends.local import Batch, Logits

if TYPE_CHECKING:
    import torch

    from langchain_rerank.backends._engines_convert import Convertible

FILE = "model.onnx"

_OPSET = 20
"""The first with GELU as one operator."""


class ONNXNetwork:
    """A session on the CPU.

    Args:
        folder: Holds `model.onnx`, and its weights beside it where they are too large for one file.
        threads: How many; 0 leaves it to ONNX Runtime.
    """

    def __init__(self, folder: Path, *, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised, and need not be on standard error as well
        # Threads that spin while they wait were 6 % faster on two idle cores, and took 1.7 times as long on busy ones.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
        self.inputs = frozenset(given.name for given in self._session.get_inputs())

    @property
    def longest(self) -> int | None:
        """How many tokens the model can read, if its file says so."""
        limit = self._session.get_modelmeta().custom_metadata_map.get("max_length")
        return int(limit) if limit else None

    def outputs(self, batch: Batch) -> list[Logits]:
        """All that the graph gives for a padded batch of b pairs, shape (b, t) token ids."""
        found: list[Logits] = self._session.run(None, batch.named(self.inputs))
        return found

    def __call__(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        [logits] = self.outputs(batch)
        return logits.reshape(len(batch))


def export(network: Convertible, folder: Path) -> None:
    """Write a module of PyTorch as `model.onnx`, its weights in a file beside it: one file holds 2 GB at most."""
    trace(network.model, network.example).save(folder / FILE, external_data=True)
    network.check(ONNXNetwork(folder, threads=1))


def trace(model: Any, example: Mapping[str, torch.Tensor]) -> Any:
    """A model of transformers with one label as an ONNX program, any number of pairs and tokens.

    Args:
        model: In float32, on the CPU.
        example: A batch to trace it with: its named inputs, shape (b, t).
    """
    import torch

    with warnings.catch_warnings(), quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            model,
            kwargs=dict(example),
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in example},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """No warnings of a library's logger meanwhile."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
