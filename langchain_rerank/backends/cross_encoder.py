"""Cross-encoders from the Hugging Face hub, such as the BGE rerankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import PrivateAttr

from langchain_rerank.backends._pairs import encode_pairs
from langchain_rerank.backends._torch import TorchBackend
from langchain_rerank.backends.local import Batch, Encoding, Logits
from langchain_rerank.errors import ModelLoadError

_UNSET = 1_000_000
"""A tokenizer that knows no limit says 10**30."""


class CrossEncoderBackend(TorchBackend):
    """Reads query and text together; the score is the sigmoid of the model's one logit.

    Any sequence-classification model with one label. Logits are those of FlagEmbedding's `FlagReranker`: the query has
    at most three quarters of `max_length`, then only the passage is cut.
    https://huggingface.co/BAAI/bge-reranker-v2-m3
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "cross-encoder"

    model: str = "BAAI/bge-reranker-v2-m3"

    _wants_type_ids: bool = PrivateAttr(default=False)
    _pad: int = PrivateAttr(default=0)

    def _load(self) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        self._pick_device()
        with self._loading():
            config = AutoConfig.from_pretrained(self.model, **self._source())
            self._check(config)
            tokenizer = AutoTokenizer.from_pretrained(self.model, **self._source())
            model, report = AutoModelForSequenceClassification.from_pretrained(
                self.model,
                config=config,
                **self._source(),
                **{"dtype": self._dtype, **self.model_kwargs},
                output_loading_info=True,
            )
        self._check_loaded(report)
        self._set_longest(_longest(config, tokenizer))
        self._wants_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._tokenizer = self._backend_tokenizer(tokenizer)
        self._model = model.eval().to(self._device)

    def _check(self, config: Any) -> None:
        architectures = list(getattr(config, "architectures", None) or [])
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ModelLoadError(
                f"{self.model!r} is no cross-encoder but {', '.join(architectures) or 'of no named architecture'}: its "
                "scoring head would be random. Use a sequence-classification model, or bge: for BGE's LLM rerankers"
            )
        if config.num_labels != 1:
            raise ModelLoadError(
                f"{self.model!r} has {config.num_labels} labels; a reranker has one, whose logit is the relevance"
            )

    def _check_loaded(self, report: Any) -> None:
        missing = sorted(report["missing_keys"] if isinstance(report, dict) else report.missing_keys)
        if missing:
            raise ModelLoadError(
                f"{self.model!r} lacks trained weights ({', '.join(missing[:3])}): its scores would be random. "
                "Use a checkpoint that was trained as a reranker"
            )

    def _backend_tokenizer(self, tokenizer: Any) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(f"{self.model!r} has no fast tokenizer (tokenizer.json); convert it with transformers")
        backend.no_truncation()
        backend.no_padding()
        self._pad = tokenizer.pad_token_id or 0
        return backend

    def _pad_id(self) -> int:
        return self._pad

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        return encode_pairs(self._tokenizer, query, texts, limit=self._limit, cut_query=self._cut_query)

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _forward(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        import torch

        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._wants_type_ids:
            inputs["token_type_ids"] = batch.type_ids
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            logits: Logits = self._model(**tensors).logits.view(-1).float().cpu().numpy()
        return logits


def _longest(config: Any, tokenizer: Any) -> int | None:
    """How many tokens the model has positions for, specials included; `None` where nothing says so."""
    limits = [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin count positions from the padding id on: 514 of them hold 512 tokens.
        offset = (
            (config.pad_token_id or 0) + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
        )
        limits.append(positions - offset)
    known = [limit for limit in limits if limit < _UNSET]
    return min(known, default=None)
