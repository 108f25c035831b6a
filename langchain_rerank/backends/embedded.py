"""The small cross-encoder that ships in the package: no torch, no download."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import Self

from langchain_rerank._optional import require
from langchain_rerank.backends._cpus import allowed_cpus
from langchain_rerank.backends._engines_cache import open_converted
from langchain_rerank.backends._files import folder_digest
from langchain_rerank.backends._pairs import encode_pairs
from langchain_rerank.backends._torch import is_out_of_memory
from langchain_rerank.backends.local import Batch, Encoding, LocalBackend, Logits
from langchain_rerank.data import EMBEDDED_MODEL
from langchain_rerank.errors import ConfigurationError, ModelLoadError

_FILES = ("model.onnx", "tokenizer.json")

_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
"""What a batch can feed a model with."""

_CJK = re.compile(
    r"[\u1100-\u11ff\u3040-\u30ff\u3100-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff"
    r"\uff66-\uffdc\U00020000-\U000323af]"
)
"""Han, Kana, Bopomofo and Hangul, composed or not, of full or half width."""


class EmbeddedBackend(LocalBackend):
    """A small English cross-encoder, to start with at once; `bge` gives the best quality.

    The score is the sigmoid of the model's one logit. Another model can take its place: a folder with `model.onnx`,
    which gives one logit for each pair, and `tokenizer.json`.
    """

    without_effect: ClassVar[frozenset[str]] = LocalBackend.without_effect | {"threads"}

    model: str = ""
    """A folder with `model.onnx` and `tokenizer.json`; empty: the model in the package."""

    max_length: int = Field(default=256, ge=32)
    """Most tokens of query and passage together, specials included; only the passage is cut. The packaged model reads
    up to 512, but it was trained on 256 and ranks better so: its model card has the numbers."""

    threads: int | None = Field(default=None, ge=1)
    """Threads of one forward pass. `None` takes as many as there are cores for this process."""

    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    """What runs the model. `openvino` asks for the extra of that name; on a CPU that multiplies in bfloat16 it is the
    faster one, and changes scores a little."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """ONNX Runtime computes in float32. OpenVINO's `auto` is bfloat16 where the CPU multiplies in it."""

    _network: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)
    _pad: int = PrivateAttr(default=0)
    _digest: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.engine == "openvino":
            require("openvino", extra="openvino")
        elif self.dtype == "bfloat16":
            raise ConfigurationError("dtype='bfloat16' is for engine='openvino': ONNX Runtime computes in float32")
        self._check_files()
        return self

    @property
    def _folder(self) -> Path:
        return Path(self.model) if self.model else EMBEDDED_MODEL

    def fingerprint(self) -> dict[str, Any]:
        """As every backend's, with the dtype as it turns out here and the digest of the model's files."""
        return {**super().fingerprint(), "dtype": self._settled_dtype(), "files": self._files_digest()}

    def _files_digest(self) -> str:
        if self._digest is None:
            self._digest = folder_digest(self._folder)
        return self._digest

    def _settled_dtype(self) -> str:
        if self.dtype != "auto" or self.engine == "onnxruntime":
            return "float32" if self.dtype == "auto" else self.dtype
        from langchain_rerank.backends._engines_openvino import multiplies_bfloat16

        return "bfloat16" if multiplies_bfloat16() else "float32"

    def _check_files(self) -> None:
        if not self._folder.is_dir():
            raise ModelLoadError(
                f"{self.model!r} is no folder; this backend reads one with {' and '.join(_FILES)}. "
                "For a model of the Hugging Face hub use cross-encoder: or bge:"
            )
        absent = [name for name in _FILES if not (self._folder / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{str(self._folder)!r} has no {' and no '.join(absent)}; it must hold {' and '.join(_FILES)}"
            )

    def _load(self) -> None:
        self._check_files()  # again: a backend that travelled was checked elsewhere
        self._tokenizer = self._open_tokenizer(self._folder / "tokenizer.json")
        self._network = self._open_network()
        inputs = self._network.inputs
        if not {"input_ids"} <= inputs <= _INPUTS:
            raise ModelLoadError(
                f"{str(self._folder)!r} wants the inputs {', '.join(sorted(inputs))}; "
                f"a reranker wants input_ids and at most {', '.join(sorted(_INPUTS - {'input_ids'}))} beside it"
            )
        self._set_longest(self._network.longest)
        self._try_out()

    def _open_tokenizer(self, path: Path) -> Any:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelLoadError(f"{str(path)!r} cannot be loaded: {_reason(error)}") from error
        self._pad = (tokenizer.padding or {}).get("pad_id", 0)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _open_network(self) -> Any:
        open_it = self._in_openvino if self.engine == "openvino" else self._in_onnxruntime
        try:
            return open_it(self.threads or _default_threads())
        except Exception as error:  # the engines' errors have no common class of their own
            raise ModelLoadError(f"{str(self._folder / _FILES[0])!r} cannot be loaded: {_reason(error)}") from error

    def _in_onnxruntime(self, threads: int) -> Any:
        from langchain_rerank.backends._engines_onnx import ONNXNetwork

        return ONNXNetwork(self._folder, threads=threads)

    def _in_openvino(self, threads: int) -> Any:
        from langchain_rerank.backends._engines_openvino import OpenVINONetwork, convert_onnx

        dtype = self._settled_dtype()
        key = {"engine": "openvino", "onnx": self._files_digest(), "versions": {"openvino": version("openvino")}}
        return open_converted(
            key,
            lambda folder: convert_onnx(self._folder / _FILES[0], folder),
            lambda folder: OpenVINONetwork(folder, dtype=dtype, threads=threads),
        )

    def _try_out(self) -> None:
        """Run two pairs, as long as they may come where the file does not say how long they may be."""
        ids = np.full((2, 2 if self._longest else self.max_length), self._pad + 1, dtype=np.int64)
        try:
            outputs = self._run_session(Batch(ids, np.ones_like(ids), np.zeros_like(ids)))
        except Exception as error:
            raise ModelLoadError(
                f"{str(self._folder)!r} cannot read 2 pairs of {ids.shape[1]} tokens (max_length={self.max_length}): "
                f"{_reason(error)}"
            ) from error
        found = sum(output.size for output in outputs)
        if found != len(ids):
            raise ModelLoadError(
                f"{str(self._folder)!r} gives {found} numbers for {len(ids)} pairs; "
                "a reranker gives one logit for each, the relevance"
            )

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        if not self.model and _is_mostly_cjk(query):
            self._warn_once(
                "language",
                "the embedded model reads English only, and this query is mostly Chinese, Japanese or Korean; "
                "use bge:BAAI/bge-reranker-v2-m3",
            )
        return encode_pairs(self._tokenizer, query, texts, limit=self._limit, cut_query=self._cut_query)

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _pad_id(self) -> int:
        return self._pad

    def _default_batch_tokens(self) -> int:
        return 1024 if self.engine == "openvino" else 512

    def _forward(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        [logits] = self._run_session(batch)
        return logits.reshape(len(batch))

    def _run_session(self, batch: Batch) -> list[Logits]:
        outputs: list[Logits] = self._network.outputs(batch)
        return outputs

    def _out_of_memory(self, error: BaseException) -> bool:
        return super()._out_of_memory(error) or is_out_of_memory(error)


def _default_threads() -> int:
    """As many as this process may use cores; 0 leaves it to ONNX Runtime, which knows the machine's cores."""
    allowed = allowed_cpus()
    return allowed if allowed < (os.cpu_count() or 1) else 0


def _is_mostly_cjk(text: str) -> bool:
    letters = "".join(filter(str.isalpha, text))
    return 2 * len(_CJK.findall(letters)) > len(letters)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
