"""An encoder of transformers, made ready to be converted for another engine."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_rerank.backends.local import Batch, Logits, input_names

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Most that a converted model's logit may differ from PyTorch's, both in float32."""

_SHAPES = ((2, 24), (1, 5), (3, 240))
"""Pairs and tokens of the batches on which both are compared; the first is traced. In the last, padding is further
from the text than ModernBERT's window reaches: there OpenVINO gives NaN, where PyTorch gives 0."""


_OFFSET = 2
"""Positions that RoBERTa and its kin have and do not use."""

_FIRST_TOKEN = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})
"""Values of `model_type` whose layers are BERT's and whose head reads the first token."""


class Convertible:
    """A network in float32 with what a conversion of it is made from and held against."""

    def __init__(self, model: Any, *, wants_type_ids: bool) -> None:
        self.model = model.float().eval()
        self._inputs = input_names(type_ids=wants_type_ids)
        longest = getattr(model.config, "max_position_embeddings", 0) or max(tokens for _, tokens in _SHAPES)
        self._batches = [self._batch(pairs, min(tokens, longest - _OFFSET)) for pairs, tokens in _SHAPES]
        self._expected = [self._logits(batch) for batch in self._batches]
        _read_first_token_only(self.model)

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """A batch to trace the model with: its named inputs, shape (b, t)."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self._batches[0].named(self._inputs).items()}

    def check(self, network: Any) -> None:
        """Hold a converted network against PyTorch, on batches of other shapes than the traced one.

        Raises:
            ValueError: Its logits are others.
        """
        for batch, logits in zip(self._batches, self._expected, strict=True):
            found = network(batch)
            difference = np.abs(found - logits).max() if found.shape == logits.shape else np.nan
            if not difference <= TOLERANCE * max(1.0, np.abs(logits).max()):
                raise ValueError(f"the converted model gives the logits {found}, and PyTorch {logits}")

    def _batch(self, pairs: int, tokens: int) -> Batch:
        """Random tokens, the last pair shorter than the others."""
        random, length = np.random.RandomState(tokens), max(1, tokens * 2 // 3)
        ids = random.randint(self.model.config.vocab_size, size=(pairs, tokens))
        mask = np.ones_like(ids)
        ids[-1, length:], mask[-1, length:] = self.model.config.pad_token_id or 0, 0
        types_ = mask * (np.arange(tokens) > tokens // 3) if self._type_count() > 1 else np.zeros_like(ids)
        return Batch(ids.astype(np.int64), mask.astype(np.int64), types_.astype(np.int64))

    def _type_count(self) -> int:
        return getattr(self.model.config, "type_vocab_size", 0) or 0

    def _logits(self, batch: Batch) -> Logits:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in batch.named(self._inputs).items()}
            logits: Logits = self.model(**tensors).logits.reshape(-1).numpy()
            return logits


def _read_first_token_only(model: Any) -> None:
    """Let the last layer compute the first token alone, where that is all that the head reads."""
    import transformers

    returns_tensors = int(transformers.__version__.split(".")[0]) >= 5  # noqa: PLR2004 - before it layers gave tuples
    if returns_tensors and model.config.model_type in _FIRST_TOKEN:
        layer = model.base_model.encoder.layer[-1]
        layer.forward = types.MethodType(_first_token, layer)


def _first_token(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: Any, **__: Any) -> Any:
    """A layer of BERT's kind for the first token, shape (b, t, h) to (b, 1, h)."""
    import torch

    attention, first = layer.attention.self, hidden[:, :1]

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], -1, attention.attention_head_size).transpose(1, 2)

    context = torch.nn.functional.scaled_dot_product_attention(
        heads(attention.query(first)),
        heads(attention.key(hidden)),
        heads(attention.value(hidden)),
        attn_mask=None if mask is None else mask[:, :, :1],
        scale=attention.scaling,
    )
    context = layer.attention.output(context.transpose(1, 2).reshape(first.shape), first)
    return layer.output(layer.intermediate(context), context)
