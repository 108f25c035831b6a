"""All of BGE's rerankers under one name: `bge:BAAI/bge-reranker-v2-m3` and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import PrivateAttr

from langchain_rerank.backends._engines import EncoderBackend, given_to
from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._torch import TorchBackend
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.layerwise import CutoffLayers, LayerwiseBackend
from langchain_rerank.backends.llm import LLMBackend
from langchain_rerank.backends.local import Batch, Encoding, Logits
from langchain_rerank.errors import ConfigurationError, ModelLoadError


class BGEBackend(EncoderBackend):
    """Whichever of the three kinds of BGE reranker the model's own config.json says it is.

    bge-reranker-base, -large and -v2-m3 are encoders, -v2-gemma is a language model, -v2-minicpm-layerwise a
    layer-wise one; fine-tuned copies of each load the same way. No remote code is needed for any of them.
    https://huggingface.co/BAAI/bge-reranker-v2-m3
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "bge"

    model: str = "BAAI/bge-reranker-v2-m3"

    cutoff_layers: CutoffLayers | None = None
    """For layer-wise models: after which layers to read a score. With several, the highest gives the score, and the
    metadata gets each of them as `layer_scores`. `None` is layer 28."""

    _chosen: Any = PrivateAttr(default=None)
    """The backend of the model's kind."""

    def _load(self) -> None:
        with self._loading():
            kind = kind_of(self.model, self._config())
        self._chosen = kind(**self._options(kind))
        self._chosen._load()  # noqa: SLF001 - it stands in for this one
        self._device, self._longest = self._chosen._device, self._chosen._longest  # noqa: SLF001
        self._choice = getattr(self._chosen, "_choice", None)
        self._settled = None

    def _config(self) -> Mapping[str, Any]:
        """The model's config.json, read as data: nothing that it points to is run."""
        files = ModelFiles(self.model, self.revision or "main", self.local_files_only)
        config = files.read_json("config.json")
        if config is not None:
            return config
        adapter = files.read_json("adapter_config.json")
        if adapter is not None:
            raise ModelLoadError(
                f"{self.model!r} is an adapter, not a whole model: merge it into its base "
                f"{adapter.get('base_model_name_or_path')!r} with peft's merge_and_unload and save that"
            )
        raise ModelLoadError(
            f"{self.model!r} has no config.json; give the folder of a model, or a name on the hub that is reachable"
        )

    def _options(self, kind: type[TorchBackend]) -> dict[str, Any]:
        """What was set here, for the backend that was found."""
        given = given_to(kind, self)
        foreign = [name for name in given if name not in kind.model_fields and given[name] is not None]
        if foreign:
            raise ConfigurationError(
                f"{foreign[0]}={given[foreign[0]]!r} is for layer-wise models, and {self.model!r} is none "
                f"({kind.__name__.removesuffix('Backend')}); leave it out"
            )
        return {name: value for name, value in given.items() if name in kind.model_fields and value is not None}

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        encodings: list[Encoding] = self._chosen._encode(query, texts)  # noqa: SLF001
        return encodings

    def _forward(self, batch: Batch) -> Logits:
        logits: Logits = self._chosen._forward(batch)  # noqa: SLF001
        return logits

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        offsets: Sequence[tuple[int, int]] = self._chosen._offsets(text)  # noqa: SLF001
        return offsets

    def _pad_id(self) -> int:
        pad: int = self._chosen._pad_id()  # noqa: SLF001
        return pad

    def _to_score(self, logits: NDArray[np.float64]) -> tuple[float, dict[str, Any]]:
        score: tuple[float, dict[str, Any]] = self._chosen._to_score(logits)  # noqa: SLF001
        return score


def kind_of(model: str, config: Mapping[str, Any]) -> type[TorchBackend]:
    """The backend that runs a model, by its config.json alone.

    Args:
        model: Its name, for the message.
        config: The parsed file.

    Raises:
        ModelLoadError: It is no reranker, or of a kind that is not supported.
    """
    architectures = list(config.get("architectures") or [])
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return CrossEncoderBackend
    if config.get("model_type") == "minicpm" and "start_layer" in config:
        return LayerwiseBackend
    if "compress_ratio" in config or config.get("model_type") == "cost_wise_gemma":
        raise ModelLoadError(
            f"{model!r} is a token-compressing reranker, which is not supported; "
            "use BAAI/bge-reranker-v2-gemma or BAAI/bge-reranker-v2-minicpm-layerwise"
        )
    if any(name.endswith("ForCausalLM") for name in architectures):
        return LLMBackend
    raise ModelLoadError(
        f"{model!r} is no reranker but {', '.join(architectures) or 'of no named architecture'}, such as an embedding "
        "model: a scoring head on it would be random. Use a model such as BAAI/bge-reranker-v2-m3"
    )
