"""Layer-wise language-model rerankers, such as bge-reranker-v2-minicpm-layerwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._prompt import PromptBackend
from langchain_rerank.backends.local import Batch, Logits, sigmoid
from langchain_rerank.errors import ConfigurationError, ModelLoadError

CutoffLayers: TypeAlias = Annotated[
    tuple[int, ...],
    Field(min_length=1),
    BeforeValidator(lambda layers: (layers,) if isinstance(layers, int) else layers),
    AfterValidator(lambda layers: tuple(sorted(set(layers)))),
]
"""One layer or several; kept in rising order."""


class LayerwiseBackend(PromptBackend):
    """Reads its score after a chosen layer and leaves out all above; the score is the sigmoid of that layer's logit.

    Runs on this package's own module: the code that is published with the model does not run under transformers 5,
    and is never executed, whatever `trust_remote_code` says. Logits are those of FlagEmbedding's
    `LayerWiseFlagLLMReranker`. https://huggingface.co/BAAI/bge-reranker-v2-minicpm-layerwise
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "bge"

    model: str = "BAAI/bge-reranker-v2-minicpm-layerwise"

    cutoff_layers: CutoffLayers = (28,)
    """After which layers to read a score; the published model has heads on 8 to 40. With several, the highest gives
    the score, and the metadata gets each of them as `layer_scores`."""

    def _load(self) -> None:
        from langchain_rerank.backends._minicpm import LayerwiseMiniCPM, MiniCPMConfig

        if self.model_kwargs:
            raise ConfigurationError(
                f"model_kwargs={self.model_kwargs!r} are for transformers' from_pretrained, which does not load a "
                "layer-wise model; leave them out"
            )
        self._pick_device()
        files = ModelFiles(self.model, self.revision or "main", self.local_files_only)
        with self._loading():
            config = MiniCPMConfig.from_json(self._check(files.read_json("config.json")))
            config.check_layers(self.cutoff_layers)
            tokenizer = self._load_tokenizer()
            self._set_tokenizer(tokenizer, begin=tokenizer.bos_token_id, positions=config.max_position_embeddings)
            self._model = LayerwiseMiniCPM.load(
                files, config, self.cutoff_layers, dtype=self._dtype, device=self._device
            )

    def _check(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        if config is None:
            raise ModelLoadError(f"{self.model!r} has no config.json; give a model on the hub or a model's folder")
        if config.get("model_type") != "minicpm" or "start_layer" not in config:
            raise ModelLoadError(
                f"{self.model!r} is no layer-wise MiniCPM (model_type={config.get('model_type')!r}, "
                f"start_layer={config.get('start_layer')!r}); bge: takes all of BGE's rerankers"
            )
        return config

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer, PretrainedConfig

        # Without a config of its own it would read the model's, which points to remote code.
        return AutoTokenizer.from_pretrained(
            self.model, config=PretrainedConfig(), **{**self._source(), "trust_remote_code": False}
        )

    def _forward(self, batch: Batch) -> Logits:
        """One batch of b prompts, shape (b, t) token ids padded on either side, to (b, k) logits of k layers."""
        import torch

        with torch.inference_mode():
            ids = torch.from_numpy(batch.ids).to(self._device)
            mask = torch.from_numpy(batch.mask).to(self._device)
            logits: Logits = self._model(ids, mask).cpu().numpy()
        return logits

    def _to_score(self, logits: NDArray[np.float64]) -> tuple[float, dict[str, Any]]:
        score, details = super()._to_score(logits[-1])
        if len(self.cutoff_layers) > 1:
            layers = zip(self.cutoff_layers, logits, strict=True)
            details["layer_scores"] = {str(layer): sigmoid(float(logit)) for layer, logit in layers}
        return score, details
