"""Where a training starts: a model of transformers, or one that was exported to ONNX before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_rerank.data import EMBEDDED_MODEL
from langchain_rerank.errors import ModelLoadError

EMBEDDED = "embedded"
"""The name of the model in the package."""


def place_base(base: str, folder: Path) -> str:
    """The base as transformers can load it.

    Args:
        base: A folder or a name of transformers, `embedded`, or a folder that `export_reranker` wrote.
        folder: Where the weights of an exported one are unpacked to, as float32.

    Raises:
        ModelLoadError: The folder holds `model.onnx`, but not what `export_reranker` leaves to train it further.
    """
    source = EMBEDDED_MODEL if base == EMBEDDED else Path(base)
    if not (source / "model.onnx").is_file() or (source / "model.safetensors").is_file():
        return base
    folder.mkdir(parents=True, exist_ok=True)
    _unpack(source, folder)
    return str(folder)


def _unpack(source: Path, folder: Path) -> None:
    """An exported model's weights as `model.safetensors`, with its config and tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{str(source)!r} has no config.json to train its model.onnx with") from error
    weights = _weights(source / "model.onnx")
    fresh: Any = AutoModelForSequenceClassification
    with torch.device("meta"):  # only the names are wanted
        wanted = fresh.from_config(config).state_dict()
    if absent := sorted(wanted.keys() - weights.keys()):
        raise ModelLoadError(
            f"{str(source)!r} lacks the weights {', '.join(absent[:3])} to train it with; "
            "export it in float32 or float16, or give the folder that it was exported from"
        )
    save_file({name: weights[name] for name in wanted}, folder / "model.safetensors", metadata={"format": "pt"})
    config.dtype = "float32"  # as the weights are now; whoever loads with dtype="auto" goes by this
    config.save_pretrained(folder)
    inputs = ["input_ids", "attention_mask"]
    if (getattr(config, "type_vocab_size", 0) or 0) > 1:  # else transformers would leave them out
        inputs.append("token_type_ids")
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_file=str(source / "tokenizer.json"), model_input_names=inputs, **_specials(source))
    tokenizer.save_pretrained(folder)


def _weights(path: Path) -> dict[str, Any]:
    """The parameters in an ONNX file by name, in float32; `_export` turned some over and marked those with `.T`."""
    import onnx
    import torch
    from onnx import numpy_helper

    weights = {}
    for tensor in onnx.load(path).graph.initializer:
        array = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        turned = tensor.name.endswith(".T")
        weights[tensor.name.removesuffix(".T")] = (array.T if turned else array).float().contiguous()
    return weights


def _specials(source: Path) -> dict[str, str]:
    """The special tokens, as tokenizers of BERT's and RoBERTa's kinds name them."""
    from tokenizers import Tokenizer

    known = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    kinds = {
        "unk_token": ("[UNK]", "<unk>"),
        "sep_token": ("[SEP]", "</s>"),
        "pad_token": ("[PAD]", "<pad>"),
        "cls_token": ("[CLS]", "<s>"),
        "mask_token": ("[MASK]", "<mask>"),
    }
    return {kind: token for kind, tokens in kinds.items() for token in tokens if token in known}
