"""The dense first stage of the search for hard negatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from langchain_core.embeddings import Embeddings

from langchain_rerank.backends._torch import pick_dtype
from langchain_rerank.errors import ModelLoadError

_BATCH = 16
"""Texts at once: few, sorted by length, are fastest on a CPU."""


class Encoder(Embeddings):
    """A sentence-transformers model as LangChain embeddings, in bfloat16 where the hardware has it.

    Args:
        model: A folder or a name on the hub.
        device: A torch device; `None` takes CUDA if it is there, else the CPU.

    Raises:
        ModelLoadError: There is no such model.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        from sentence_transformers import SentenceTransformer

        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            self._model = SentenceTransformer(
                model, device=str(chosen), model_kwargs={"dtype": pick_dtype("auto", chosen)}
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelLoadError(f"{model!r} cannot be loaded: {' '.join(str(error).split())}") from error
        self._foreseen: dict[str, list[float]] = {}

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Texts to vectors, one each."""
        return self._encode(texts)

    def foresee(self, queries: Iterable[str]) -> None:
        """Embed the queries that come next, together: one by one would take several times as long."""
        texts = list(dict.fromkeys(queries))
        self._foreseen = dict(zip(texts, self._encode(texts), strict=True))

    def embed_query(self, text: str) -> list[float]:
        """One query to its vector."""
        return self._foreseen[text] if text in self._foreseen else self._encode([text])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[float]]:
        vectors = self._model.encode(list(texts), batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True)
        return [[float(value) for value in vector] for vector in np.asarray(vectors, dtype=np.float32)]
