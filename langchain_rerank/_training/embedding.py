"""The dense first stage of the search for hard negatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

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
            raise ModelLoadError(f"The embedding {model!r} cannot be loaded: {' '.join(str(error).split())}") from error
        self._foreseen: dict[str, NDArray[np.float32]] = {}

    def foresee(self, queries: Iterable[str]) -> None:
        """Embed the queries that come next, together: one by one would take several times as long."""
        self._foreseen.clear()
        texts = list(dict.fromkeys(queries))
        self._foreseen.update(zip(texts, self._encode(texts), strict=True))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Texts to vectors, one each."""
        return [_floats(vector) for vector in self._encode(texts)]

    def embed_query(self, text: str) -> list[float]:
        """One query to its vector."""
        found = self._foreseen.get(text)
        return _floats(self._encode([text])[0] if found is None else found)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (n, d)."""
        vectors = self._model.encode(list(texts), batch_size=_BATCH, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)


def _floats(vector: NDArray[np.float32]) -> list[float]:
    return [float(value) for value in vector]
