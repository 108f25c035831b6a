"""Rerankers whose prompt stands in their own files, such as Qwen3-Reranker, through sentence-transformers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import PrivateAttr

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._torch import UNSET, TorchBackend
from langchain_rerank.backends.local import Batch, Encoding, Logits
from langchain_rerank.errors import ModelLoadError

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids")
"""What sentence-transformers gives for each token; all else that it gives is the same for every pair."""

_AS_THEY_ARE = {
    "common": {"return_tensors": None},
    "text": {"padding": False, "truncation": False, "verbose": False},
}
"""Lists of any length, without a warning of it, instead of one padded and cut tensor: both is done here."""

_MARGIN = 2
"""Tokens by which a passage cut out of a text may be longer than it was inside it."""

_LEAST = 32
"""Tokens that query and passage need at least beside the prompt, as `max_length` does at least."""


class CausalRerankerBackend(TorchBackend):
    """Scores a pair as sentence-transformers' `CrossEncoder` does: token ids, prompt and logit are its own.

    `max_length` counts the prompt too, which is never cut: the query has at most three quarters of what the prompt
    leaves, then only the passage is cut. The logit is what `predict` gives with `activation_fn=Identity()`, for most
    models that of "yes" minus that of "no" at the last token; the score is its sigmoid, whatever activation the
    model's files name. https://sbert.net/docs/cross_encoder/usage/custom_models.html
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers", "sentence_transformers")
    extra: ClassVar[str] = "cross-encoder"

    prompt: str | None = None
    """What the model is asked to do, where its prompt has a place for it. `None` takes the model's own."""

    _constants: dict[str, Any] = PrivateAttr(default_factory=dict)
    """What the model's forward pass wants beside tokens, the same for every pair."""

    _frame: int = PrivateAttr(default=0)
    """How many tokens the prompt has without query and passage."""

    _wants_type_ids: bool = PrivateAttr(default=False)
    _wants_positions: bool = PrivateAttr(default=False)

    @property
    def name(self) -> str:
        """The name of the backend that it stands in for."""
        return "cross-encoder"

    def _load(self) -> None:
        from sentence_transformers import CrossEncoder

        self._pick_device()
        with self._loading():
            self._model = CrossEncoder(
                self.model,
                device=str(self._device),
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                # A folder is all there: without this its name would be looked up on the hub.
                local_files_only=self.local_files_only or Path(self.model).is_dir(),
                model_kwargs={"dtype": self._dtype, **self.model_kwargs},
            ).eval()
            self._check_loaded()
            self._set_tokenizer()
            self._measure_prompt()

    def _check_loaded(self) -> None:
        if self._model.num_labels != 1:
            raise ModelLoadError(
                f"{self.model!r} has {self._model.num_labels} labels; a reranker has one, whose logit is the relevance"
            )
        # CrossEncoder keeps transformers' report of missing weights to itself, but each one that was found is marked.
        found = {name: hasattr(weight, "_is_hf_initialized") for name, weight in self._network.named_parameters()}
        missing = sorted(name for name in found if not found[name])
        if missing and any(found.values()):
            raise ModelLoadError(
                f"{self.model!r} lacks trained weights ({', '.join(missing[:3])}): its scores would be random. "
                "Use a whole checkpoint"
            )

    @property
    def _network(self) -> Any:
        """The model of transformers inside the one of sentence-transformers."""
        return self._model.transformers_model

    def _set_tokenizer(self) -> None:
        tokenizer = self._model.tokenizer
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        if self._tokenizer is None:
            raise ModelLoadError(f"{self.model!r} has no fast tokenizer (tokenizer.json); convert it with transformers")
        if tokenizer.pad_token_id is None:  # any will do, since padding is masked; some code wants one to be named
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if self._network.config.pad_token_id is None:
            self._network.config.pad_token_id = tokenizer.pad_token_id
        longest = self._model.max_seq_length
        self._set_longest(longest if longest and longest < UNSET else None)

    def _measure_prompt(self) -> None:
        """Render a pair of nothing: it shows the prompt, or fails where the template has no place for a pair."""
        features = self._features("", [""])
        self._constants = {name: value for name, value in features.items() if name not in _PER_TOKEN}
        self._frame = len(features["input_ids"][0])
        self._wants_type_ids = "token_type_ids" in features
        self._wants_positions = "position_ids" in inspect.signature(self._network.forward).parameters
        if self._limit < self._frame + _LEAST:
            raise ModelLoadError(
                f"max_length={self._limit} leaves no room for query and passage: the prompt of {self.model!r} has "
                f"{self._frame} tokens, which count too; give at least {self._frame + _LEAST}"
            )

    def _features(self, query: str, texts: Sequence[str]) -> dict[str, Any]:
        """What sentence-transformers makes of n pairs, whole: n lists of token ids, and so on."""
        prompt = self._model.prompts.get(self._model.default_prompt_name) if self.prompt is None else self.prompt
        features: dict[str, Any] = self._model.preprocess(
            [(query, text) for text in texts], prompt=prompt, processing_kwargs=_AS_THEY_ARE
        )
        return features

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        query = self._cut(query)
        whole = self._encode_whole(query, texts)
        return [self._fit(query, text, encoding) for text, encoding in zip(texts, whole, strict=True)]

    def _encode_whole(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        features = self._features(query, texts)
        type_ids = features.get("token_type_ids") or [None] * len(texts)
        return [Encoding(ids, types) for ids, types in zip(features["input_ids"], type_ids, strict=True)]

    def _cut(self, query: str) -> str:
        """The query, at most three quarters of what the prompt leaves of `max_length`."""
        spans = self._offsets(query)
        most = (self._limit - self._frame) * 3 // 4
        if len(spans) <= most:
            return query
        self._warn_once(
            "query",
            f"a query of {len(spans)} tokens was cut to {most} (max_length={self._limit}, prompt {self._frame})",
        )
        return query[: spans[most][0]]

    def _fit(self, query: str, text: str, encoding: Encoding) -> Encoding:
        """The pair with as much of the passage as fits.

        The text is cut, not its ids: the template may put anything behind it, and what it puts there stays.
        """
        if len(encoding.ids) <= self._limit:
            return encoding
        spans = self._offsets(text)
        kept = len(spans)
        while len(encoding.ids) > self._limit and kept:
            kept = max(kept - (len(encoding.ids) - self._limit), 0)
            [encoding] = self._encode_whole(query, [text[: spans[kept][0]]])
        return replace(encoding, truncated=True, room=max(kept - _MARGIN, 1))

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _forward(self, batch: Batch) -> Logits:
        """One batch of b pairs, shape (b, t) token ids padded on either side, to b logits."""
        import torch

        # Padding to the left: the score is read at the last position, the only one whose logits are computed.
        order = np.argsort(batch.mask, axis=1, kind="stable")
        arrays = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._wants_type_ids:
            arrays["token_type_ids"] = batch.type_ids
        arrays = {name: np.take_along_axis(array, order, axis=1) for name, array in arrays.items()}
        if self._wants_positions:  # left to itself, a model may count the padding
            arrays["position_ids"] = np.maximum(arrays["attention_mask"].cumsum(axis=1) - 1, 0)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            logits: Logits = self._model({**tensors, **self._constants})["scores"].view(-1).float().cpu().numpy()
        return logits


def is_described(files: ModelFiles) -> bool:
    """Whether a model's own files tell sentence-transformers how it scores a pair.

    An embedding model has a `modules.json` too; as a reranker it would get a default head and no prompt.
    """
    config = files.read_json("config_sentence_transformers.json") or {}
    return config.get("model_type") == "CrossEncoder" and files.find("modules.json") is not None


def renders_chat(files: ModelFiles) -> bool:
    """Whether a model's own files tell sentence-transformers to render a pair by the chat template."""
    transformer = files.read_json("sentence_bert_config.json") or {}
    return is_described(files) and "message" in transformer.get("modality_config", {})
