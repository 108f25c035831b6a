"""The layer-wise MiniCPM of bge-reranker-v2-minicpm-layerwise, without the remote code that it is published with.

A decoder such as Llama (RMSNorm, rotary positions, grouped query heads, SwiGLU) with two differences: embeddings are
multiplied by `scale_emb`, and what a block adds to the residual stream by `scale_depth / sqrt(num_hidden_layers)`
(Hu et al., 2024, section 3, https://arxiv.org/abs/2404.06395). Each layer from `start_layer` on has a head of its own,
so that a score can be read there and all layers above be left out. The heads take the normed state as it is: the
division by `hidden_size / dim_model_base` belongs to MiniCPM's vocabulary head, which is not there.
https://huggingface.co/BAAI/bge-reranker-v2-minicpm-layerwise

This module imports torch; import it where it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.errors import ModelLoadError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")

_FIXED: Mapping[str, Any] = {
    "head_type": "simple",
    "head_multi": True,
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_bias": False,
}
"""What the published model has and this module takes for granted."""


@dataclasses.dataclass(frozen=True)
class MiniCPMConfig:
    """The numbers of config.json that shape the model, under their names there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    scale_emb: float
    scale_depth: float
    start_layer: int
    max_position_embeddings: int
    rope_theta: float = 10000.0

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MiniCPMConfig:
        """Read a config.json, already parsed.

        Raises:
            ModelLoadError: It lacks a number, or describes another variant of the architecture.
        """
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise ModelLoadError(
                    f"a layer-wise MiniCPM with {name}={config[name]!r} is not supported, only {value!r}"
                )
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in config.items() if name in names and value is not None}
        try:
            return cls(**{"num_key_value_heads": given["num_attention_heads"], **given})
        except (TypeError, KeyError) as error:
            raise ModelLoadError(f"config.json of a layer-wise MiniCPM is incomplete: {error}") from error

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse a layer that has no head.

        Raises:
            ModelLoadError: One lies outside `start_layer` to `num_hidden_layers`.
        """
        wrong = [layer for layer in layers if not self.start_layer <= layer <= self.num_hidden_layers]
        if wrong:
            raise ModelLoadError(
                f"cutoff_layers={list(layers)}: the model has no head on layer {wrong[0]}; "
                f"choose from {self.start_layer} to {self.num_hidden_layers}"
            )


class LayerwiseMiniCPM(nn.Module):
    """The first layers of the model and the heads that read them.

    Args:
        config: Sizes of the whole model.
        layers: After which layers a score is read, in rising order; what lies above the last is not built.
    """

    def __init__(self, config: MiniCPMConfig, layers: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.cutoff_layers = tuple(layers)
        self.model = _Decoder(config, depth=max(layers))
        self.lm_head = nn.ModuleDict({str(layer - config.start_layer): _Head(config) for layer in layers})

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        config: MiniCPMConfig,
        layers: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerwiseMiniCPM:
        """Load a published checkpoint; tensors of higher layers are not read, nor their shards downloaded.

        Raises:
            ModelLoadError: There are no weights, or one is missing or of another shape.
        """
        with torch.device("meta"):
            model = cls(config, layers)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tensors = {name: tensor.to(device, dtype) for name, tensor in _read(files, wanted)}
        _check(files, wanted, tensors)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logit of each chosen layer at the last token of each row.

        Args:
            ids: Token ids, shape (b, t), padded on either side.
            mask: 1 for a token, 0 for padding; shape (b, t).

        Returns:
            Logits in float32, shape (b, k), for the k layers in rising order.
        """
        # The last position that is a token, wherever the padding lies.
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * positions).argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        start = self.config.start_layer
        states = self.model(ids, mask, self.cutoff_layers)
        logits = [
            self.lm_head[str(layer - start)](self.model.norm(state[rows, last]))
            for layer, state in zip(self.cutoff_layers, states, strict=True)
        ]
        return torch.cat(logits, dim=1).float()


class _Decoder(nn.Module):
    def __init__(self, config: MiniCPMConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(depth))
        self.norm = _RMSNorm(config)

    def forward(self, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> Iterator[Tensor]:
        """The residual stream after each of `layers`, shape (b, t, hidden)."""
        rotation = self._rotation(mask)
        allowed = _allowed(mask)
        states = self.embed_tokens(ids) * self.config.scale_emb
        for number, layer in enumerate(self.layers, start=1):
            states = layer(states, rotation, allowed)
            if number in layers:
                yield states

    def _rotation(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles in float32, shape (b, 1, t, head); the first token is position 0.

        Su et al., 2021, https://arxiv.org/abs/2104.09864
        """
        size = self.config.hidden_size // self.config.num_attention_heads
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0).float()
        exponents = torch.arange(0, size, 2, device=mask.device).float() / size
        angles = positions[:, None, :, None] * self.config.rope_theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class _Layer(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)
        self.input_layernorm = _RMSNorm(config)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _RMSNorm(config)
        self.mlp = _FeedForward(config)

    def forward(self, states: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor | None) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), rotation, allowed) * self.scale
        changed: Tensor = states + self.mlp(self.post_attention_layernorm(states)) * self.scale
        return changed


class _Attention(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        self.repeats = config.num_attention_heads // config.num_key_value_heads
        keys = config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor, rotation: tuple[Tensor, Tensor], allowed: Tensor | None) -> Tensor:
        queries = _rotate(self._heads(self.q_proj(states)), rotation)
        keys = _rotate(self._heads(self.k_proj(states)), rotation)
        values = self._heads(self.v_proj(states))
        if self.repeats > 1:
            keys = keys.repeat_interleave(self.repeats, dim=1)
            values = values.repeat_interleave(self.repeats, dim=1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, is_causal=allowed is None)
        joined: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return joined

    def _heads(self, states: Tensor) -> Tensor:
        """Shape (b, t, heads * size) to (b, heads, t, size)."""
        return states.view(*states.shape[:2], -1, self.head_size).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        changed: Tensor = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        return changed


class _RMSNorm(nn.Module):
    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.rms_norm_eps

    def forward(self, states: Tensor) -> Tensor:
        wide = states.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return normed.to(states.dtype) * self.weight


class _Head(nn.Module):
    """`head_type` "simple": one logit, no bias."""

    def __init__(self, config: MiniCPMConfig) -> None:
        super().__init__()
        self.linear_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.linear_head(states)
        return logits


def _rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of features, half a head apart, by its position's angle; in float32, as it was trained."""
    cos, sin = rotation
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat((first, second), dim=-1) * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(states.dtype)


def _allowed(mask: Tensor) -> Tensor | None:
    """Which keys each query may see, shape (b, 1, t, t); `None` where looking back is the only rule.

    Padding on the right comes after every token, so no token sees it. A padded query may see itself: with nothing
    to see, its state would be NaN before torch 2.5, and spread.
    """
    if bool(mask[:, 0].all()):
        return None
    size = mask.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    return (causal & mask[:, None, None, :].bool()) | itself


def _read(files: ModelFiles, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of the first kind of checkpoint that is there: safetensors before pickles."""
    for index_name, single in zip(_INDEXES, _SINGLES, strict=True):
        names = _shards(files, index_name, wanted) or [single]
        paths = [path for name in names if (path := files.find(name))]
        if len(paths) == len(names):
            for path in paths:
                yield from _tensors(path, wanted)
            return
    raise ModelLoadError(f"{files.model!r} has no whole checkpoint: looked for {', '.join((*_INDEXES, *_SINGLES))}")


def _shards(files: ModelFiles, index_name: str, wanted: Mapping[str, Any]) -> list[str]:
    """The shards that hold a wanted tensor; none where the checkpoint is one file."""
    index = files.find(index_name)
    if index is None:
        return []
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted({shard for name, shard in places.items() if name in wanted})


def _tensors(path: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    with _opened(path) as (names, get):
        for name in names:
            if name in wanted:
                yield name, get(name)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Sequence[str], Any]]:
    """The names in a checkpoint file and what gets one tensor; nothing else is read."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                yield opened.keys(), opened.get_tensor
        except SafetensorError as error:
            raise ModelLoadError(f"{path} is no whole safetensors file ({error}); download it again") from error
    else:
        # A pickle can run code; weights_only refuses everything but tensors.
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ModelLoadError(
                f"{path} holds more than tensors, and could run code; convert it to safetensors"
            ) from error
        yield list(tensors), tensors.__getitem__


def _check(files: ModelFiles, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ModelLoadError(
            f"{files.model!r} lacks {len(missing)} of {len(wanted)} weights, {missing[0]!r} among them: "
            "its scores would be random. Use the published checkpoint, or one fine-tuned from it"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelLoadError(
                f"{files.model!r}: {name} has shape {tuple(tensors[name].shape)}, config.json says {shape}"
            )
