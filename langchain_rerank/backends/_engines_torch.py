"""PyTorch: a model of transformers as it is, on any device, with padded batches or packed ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_rerank._optional import missing
from langchain_rerank.backends.local import Batch, Logits, input_names
from langchain_rerank.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

ATTENTION = "langchain_rerank_segments"
"""The name in transformers' attention interface of attention within segments."""

PACKABLE = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "camembert": 1}
"""Values of `model_type` that packed batches are for, with what their first position is beyond the padding id."""


class TorchNetwork:
    """A sequence-classification model with padded batches.

    Args:
        model: Of transformers, with one label.
        device: Where to run it.
        wants_type_ids: Whether it reads which text a token belongs to.
    """

    def __init__(self, model: Any, device: torch.device, *, wants_type_ids: bool) -> None:
        self.model = model.eval().to(device)
        self._device = device
        self._wants_type_ids = wants_type_ids

    def __call__(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        import torch

        names = input_names(type_ids=self._wants_type_ids)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in batch.named(names).items()}
            logits: Logits = self.model(**tensors).logits.view(-1).float().cpu().numpy()
        return logits


class PackedNetwork(TorchNetwork):
    """The same with all pairs of a batch in one row, without padding.

    Positions begin anew with each pair and attention stays within it, so that no token is spent on padding. The head
    reads the hidden state of each pair's first token.

    Raises:
        ConfigurationError: The model is not of a type that can be packed.
    """

    def __init__(self, model: Any, device: torch.device, *, wants_type_ids: bool) -> None:
        kind = model.config.model_type
        if kind not in PACKABLE:
            raise ConfigurationError(
                f"padding_free is for models of type {', '.join(PACKABLE)}, not for {kind!r}; leave it out"
            )
        super().__init__(model, device, wants_type_ids=wants_type_ids)
        self._first_position = PACKABLE[kind] and (model.config.pad_token_id or 0) + 1
        self._one_kernel = has_varlen(device)
        _register()
        self.model.set_attn_implementation(ATTENTION)

    def __call__(self, batch: Batch) -> Logits:
        """As padded batches are read, and the padding left out."""
        import torch

        real = batch.mask.astype(bool)
        lengths = real.sum(axis=1)
        positions = np.broadcast_to(np.arange(real.shape[1]) + self._first_position, real.shape)
        inputs = {"input_ids": batch.ids[real], "position_ids": positions[real]}
        if self._wants_type_ids:
            inputs["token_type_ids"] = batch.type_ids[real]
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array)[None].to(self._device) for name, array in inputs.items()}
            segments = Segments.of([int(length) for length in lengths], self._device, one_kernel=self._one_kernel)
            states = self.model.base_model(**tensors, segments=segments).last_hidden_state
            logits: Logits = self._head(states[0, segments.offsets[:-1].long()]).view(-1).float().cpu().numpy()
        return logits

    def _head(self, first: torch.Tensor) -> Any:
        """The hidden states of the first tokens, shape (b, h), to logits."""
        first = first[:, None]
        if self.model.config.model_type == "bert":
            return self.model.classifier(self.model.bert.pooler(first))
        return self.model.classifier(first)


@dataclass(frozen=True)
class Segments:
    """Where the pairs of a packed row begin and end."""

    spans: tuple[tuple[int, int], ...]
    """The first token of each, and the one after its last."""

    offsets: torch.Tensor
    """Shape (b + 1,), int32, on the device: the beginnings, and the end of the last."""

    one_kernel: bool = False
    """Whether the device has one kernel for all of them, in half precision."""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, *, one_kernel: bool = False) -> Segments:
        """For pairs of these lengths, one after the other."""
        import torch

        ends = [0, *np.cumsum(lengths).tolist()]
        return cls(tuple(pairwise(ends)), torch.tensor(ends, dtype=torch.int32, device=device), one_kernel)

    @property
    def longest(self) -> int:
        """The length of the longest pair."""
        return max(end - start for start, end in self.spans)


def attend(
    module: Any,  # noqa: ARG001 - transformers' attention interface
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    *,
    segments: Segments,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within segments, queries of shape (1, heads, t, d) to (1, t, heads, d)."""
    import torch

    if (
        segments.one_kernel
        and query.dtype in (torch.float16, torch.bfloat16)
        and scaling in (None, query.shape[-1] ** -0.5)
    ):
        return _in_one_kernel(query, key, value, segments), None
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scale=scaling
        )
        for start, end in segments.spans
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def has_varlen(device: torch.device) -> bool:
    """Whether torch has attention over sequences of various lengths, and the device runs it.

    Its kernels are flash attention's, for Ampere and later: https://github.com/Dao-AILab/flash-attention
    """
    import torch

    if device.type != "cuda" or missing("torch.nn.attention.varlen"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_one_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The same by flash attention over sequences of various lengths, with the usual scale.

    The first versions of torch that have it take no other scale.
    """
    from torch.nn.attention import varlen

    attention: Any = varlen.varlen_attn  # its annotations hide behind a decorator
    packed = (states[0].transpose(0, 1) for states in (query, key, value))
    out: torch.Tensor = attention(*packed, segments.offsets, segments.offsets, segments.longest, segments.longest)
    return out[None]


def _register() -> None:
    """Make attention within segments known to transformers, which finds it by name; no mask is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
