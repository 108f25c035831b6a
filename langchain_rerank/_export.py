"""A cross-encoder's safetensors folder as `model.onnx` and `tokenizer.json`, which the embedded backend reads.

The graph has standard operators only and dynamic axes, and these things beside the model's own operators:

- With `float16` the weights are stored in half the bytes. They compute in float32: ONNX Runtime casts them at load.
- With `int8` the matrices are stored in a quarter of the bytes, one scale for each column, and compute in float32
  too. So a score does not depend on what else is in the batch, as it would with activations in int8; it is no faster.
- Embedding tables stay float16 in memory; only a batch's rows are cast.
- The last layer computes the first token alone, since the head reads no other.

The same source and the same versions of torch and onnxscript give the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from langchain_rerank._folders import refuse_loss
from langchain_rerank._optional import require
from langchain_rerank.backends._engines_onnx import trace
from langchain_rerank.backends._torch import longest
from langchain_rerank.errors import ConfigurationError, ModelLoadError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

Stored: TypeAlias = Literal["float32", "float16", "int8"]
"""How weights are stored; they compute in float32."""

TOLERANCE = 1e-3
"""Most that a logit of the graph may differ from torch's, with the same weights."""

_SMALL = 4096
"""Tensors of fewer elements stay float32: there is nothing to save, and norms and biases fuse as they are."""

_MATRIX = 2
"""Dimensions of a matrix."""

_ABOUT_EXPORT = """

## This export

`model.onnx` here is the model above, with its weights stored in {dtype}. It needs no torch:

```python
from langchain_rerank import init_reranker

reranker = {load}  # the path of this folder
```
"""
"""What stands at the end of the source's card."""

_EXPORTED = ("config.json", "tokenizer.json", "README.md")
"""What an export writes beside `model.onnx`."""

_NEVER_EXPORTED = ("model.safetensors", "pytorch_model.bin", "recipe.json")
"""What says that a folder is another model's, or a training's."""

_SHAPES = ((2, 24), (1, 5), (3, 61))
"""Pairs and tokens of the batches on which graph and model are compared; the first is traced."""


def export(source: Path | str, target: Path | str, *, dtype: Stored = "float16") -> None:
    """Write `model.onnx`, `tokenizer.json` and `config.json`, once the graph has given the logits that torch gives.

    The source's card, `README.md`, goes along if it has one: data, licences and figures belong to what is shipped.

    Args:
        source: A folder with `config.json`, `model.safetensors` and `tokenizer.json`; a sequence-classification model
            with one label.
        target: The folder to write to; made if it is not there.
        dtype: How weights are stored. `float16` and `int8` round them, if they are not yet; the logits are compared
            with those of torch with the same rounded weights.

    Raises:
        ConfigurationError: The dtype is unknown, or the target is a file or holds what is of no export.
        MissingDependencyError: torch, transformers or onnxscript is not installed.
        ModelLoadError: There is no such model, it has more than one label, or the graph computes something else.
    """
    require("torch", "transformers", "onnxscript", extra="train")
    import onnx_ir as ir

    if dtype not in ("float32", "float16", "int8"):
        raise ConfigurationError(f"dtype {dtype!r} cannot be stored; there are float32, float16 and int8")
    source, target = Path(source), Path(target)
    exported_before = (target / "model.onnx").is_file()
    refuse_loss(target, _NEVER_EXPORTED if exported_before else (*_NEVER_EXPORTED, *_EXPORTED), "export")
    card = (source / "README.md").read_bytes() if (source / "README.md").is_file() else None
    model = _load(source, dtype)
    batches = [_example(model, pairs, tokens) for pairs, tokens in _SHAPES]
    expected = [model(**batch).logits.numpy() for batch in batches]
    exported = _trace(model, batches[0])
    _name_transposed(exported.graph, model.state_dict())
    if dtype == "int8":
        _store_as_int8(exported.graph)
    if dtype != "float32":
        _store_as_float16(exported.graph)
    if (most := longest(model.config, _allowed(source / "tokenizer_config.json"))) is not None:
        exported.metadata_props["max_length"] = str(most)
    proto = ir.to_proto(exported)
    del proto.graph.value_info[:]  # shapes inside the graph: readers infer them, and some of torch's are wrong
    content = proto.SerializeToString(deterministic=True)
    _compare(content, batches, expected)
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.onnx").write_bytes(content)
    shutil.copyfile(source / "config.json", target / "config.json")
    _export_tokenizer(source / "tokenizer.json", target / "tokenizer.json", model.config.pad_token_id)
    if card is not None:
        (target / "README.md").write_bytes(_card_of_export(card, dtype, target.resolve().name))


def _card_of_export(card: bytes, dtype: Stored, name: str) -> bytes:
    """The source's card, in whatever encoding it is, with how to load the export."""
    load = f'init_reranker("embedded:{name}")'.encode()
    card = re.sub(rb'init_reranker\("cross-encoder:[^"]*"\)', lambda _: load, card)
    return card.rstrip() + _ABOUT_EXPORT.format(dtype=dtype, load=load.decode()).encode()


def _load(source: Path, dtype: Stored) -> Any:
    """The model in float32, with the attention that exports to a few plain operators."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from langchain_rerank.backends._torch import no_bars

    try:
        with no_bars():
            model = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{str(source)!r} cannot be exported: {' '.join(str(error).split())}") from error
    if model.config.num_labels != 1:
        raise ModelLoadError(f"{str(source)!r} has {model.config.num_labels} labels; a reranker has one, the relevance")
    if not (source / "tokenizer.json").is_file():
        raise ModelLoadError(f"{str(source)!r} cannot be exported: it has no tokenizer.json")
    tables = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.requires_grad_(requires_grad=False).parameters():
        if parameter.numel() >= _SMALL:
            parameter.copy_(_rounded(parameter, "float16" if dtype == "int8" and parameter in tables else dtype))
    return model.eval()


def _rounded(parameter: torch.Tensor, dtype: Stored) -> torch.Tensor:
    """A weight as it will be stored."""
    if dtype == "float16":
        return parameter.half().float()
    if dtype == "int8" and parameter.ndim == _MATRIX:
        scale = parameter.new_tensor(_scales(parameter.numpy(), axis=1))
        return (parameter / scale).round() * scale
    return parameter


def _scales(matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """What one step of int8 means in each row or column, so that the largest weight is 127; never 0."""
    largest = np.abs(matrix).max(axis=axis, keepdims=True)
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


def _example(model: Any, pairs: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens, the last pair shorter than the others."""
    import torch

    random, length = np.random.RandomState(tokens), tokens * 2 // 3
    ids = torch.from_numpy(random.randint(model.config.vocab_size, size=(pairs, tokens)))
    mask = torch.ones_like(ids)
    ids[-1, length:], mask[-1, length:] = model.config.pad_token_id, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        batch["token_type_ids"] = mask * (torch.arange(tokens) > tokens // 3)
    return batch


def _trace(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model's graph, without the source lines and paths that torch notes in it."""
    layers = getattr(getattr(model.base_model, "encoder", None), "layer", None)
    if layers is not None and hasattr(getattr(getattr(layers[-1], "attention", None), "self", None), "scaling"):
        layers[-1].forward = types.MethodType(_first_token, layers[-1])
    program = trace(model, batch)
    for part in (program.model, program.model.graph, *program.model.graph):
        part.metadata_props.clear()
    return program.model


def _first_token(layer: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, *_: Any, **__: Any) -> Any:
    """An encoder layer for the first token alone, shape (b, t, h) to (b, 1, h): a head reads no more of the last."""
    attention = layer.attention.self
    first = hidden[:, :1]

    def heads(states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:2], -1, attention.attention_head_size).transpose(1, 2)

    weights = heads(attention.query(first)) @ heads(attention.key(hidden)).transpose(2, 3) * attention.scaling
    if mask is not None:
        weights = weights + mask[:, :, :1]
    context = (weights.softmax(-1) @ heads(attention.value(hidden))).transpose(1, 2).reshape(first.shape)
    context = layer.attention.output(context, first)
    return layer.output(layer.intermediate(context), context)


def _name_transposed(graph: Any, state: dict[str, torch.Tensor]) -> None:
    """Give the matrices that torch transposed and numbered their parameter's name back, with a `.T`."""
    names = {tensor.T.numpy().tobytes(): name for name, tensor in state.items() if tensor.ndim == _MATRIX}
    for value in list(graph.initializers.values()):
        name = names.get(value.const_value.numpy().tobytes())
        if name is not None and value.name not in state:
            value.name = f"{name}.T"


def _store_as_float16(graph: Any) -> None:
    """Store each tensor that float16 holds exactly as such, and cast it, or the rows looked up in it, to float32."""
    import onnx_ir as ir

    for name, value in graph.initializers.items():
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.size < _SMALL or (array.astype(np.float16) != array).any():
            continue
        value.const_value = ir.tensor(array.astype(np.float16), name=name)
        value.dtype = ir.DataType.FLOAT16
        users = [node for node, _ in value.uses()]
        rows = [node.outputs[0] for node in users if node.op_type == "Gather"]
        for half in rows if len(rows) == len(users) else [value]:
            _cast(graph, half)


def _store_as_int8(graph: Any) -> None:
    """Store each matrix that is multiplied with as int8, with a scale for each column."""
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        users = [node for node, _ in value.uses()]
        if array.ndim != _MATRIX or array.size < _SMALL or {node.op_type for node in users} != {"MatMul"}:
            continue
        scales = _scales(array, axis=0)
        graph.initializers.pop(name)
        small = _initializer(graph, f"{name}.int8", np.rint(array / scales).astype(np.int8))
        scale = _initializer(graph, f"{name}.scale", scales)
        # No DequantizeLinear: ONNX Runtime makes one operator of it and MatMul, which rounds activations too.
        cast = ir.node("Cast", [small], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        node = ir.node("Mul", [cast.outputs[0], scale], name=f"{name}.float32")
        for each in (cast, node):
            each.outputs[0].name = each.name
        graph.insert_before(min(users, key=list(graph).index), [cast, node])
        for user, index in list(value.uses()):
            user.replace_input_with(index, node.outputs[0])


def _initializer(graph: Any, name: str, array: NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _cast(graph: Any, half: ir.Value) -> None:
    """Let whatever reads a value read it in float32."""
    import onnx_ir as ir

    uses = list(half.uses())
    cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{half.name}.float32")
    cast.outputs[0].name = cast.name
    half.dtype = ir.DataType.FLOAT16
    graph.insert_before(min((node for node, _ in uses), key=list(graph).index), cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def _allowed(file: Path) -> int | None:
    """How many tokens a tokenizer's file allows, if it says so."""
    limit: int | None = json.loads(file.read_text("utf-8")).get("model_max_length") if file.is_file() else None
    return limit


def _compare(content: bytes, batches: list[dict[str, torch.Tensor]], expected: list[NDArray[np.float32]]) -> None:
    """Run the graph, and refuse it where its logits are not torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for batch, logits in zip(batches, expected, strict=True):
        [found] = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        difference = np.abs(found - logits).max() if found.shape == logits.shape else np.nan
        if not difference <= TOLERANCE:
            raise ModelLoadError(f"The graph's logits differ from torch's by {difference}: {found} and {logits}")


def _export_tokenizer(source: Path, target: Path, pad_token_id: int) -> None:
    """The tokenizer without a limit of its own, and with the padding that the model knows."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_truncation()
    tokenizer.enable_padding(pad_id=pad_token_id, pad_token=tokenizer.id_to_token(pad_token_id))
    tokenizer.save(str(target))
