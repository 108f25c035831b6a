"""Cross-encoders from the Hugging Face hub, such as the BGE rerankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import PrivateAttr

from langchain_rerank.backends._causal import CausalRerankerBackend, is_described, renders_chat
from langchain_rerank.backends._engines import EncoderBackend, Network, given_to
from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._pairs import encode_pairs
from langchain_rerank.backends._torch import longest
from langchain_rerank.backends.local import Batch, Encoding, Logits
from langchain_rerank.errors import ConfigurationError, ModelLoadError


class CrossEncoderBackend(EncoderBackend):
    """Reads query and text together; the score is the sigmoid of the model's one logit.

    Any sequence-classification model with one label. Logits are those of FlagEmbedding's `FlagReranker`: the query has
    at most three quarters of `max_length`, then only the passage is cut.
    https://huggingface.co/BAAI/bge-reranker-v2-m3

    Also language models, such as Qwen3-Reranker, whose own files tell sentence-transformers their prompt. Logits are
    those of its `CrossEncoder`; `max_length` counts the prompt, which is never cut, and the query has at most three
    quarters of the rest. https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
    """

    requires: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    extra: ClassVar[str] = "cross-encoder"

    model: str = "BAAI/bge-reranker-v2-m3"

    prompt: str | None = None
    """What a language model is asked to do, where its prompt has a place for it. `None` takes the model's own;
    a model without a prompt refuses any."""

    _chosen: CausalRerankerBackend | None = PrivateAttr(default=None)
    """Stands in for this one where a model has a prompt."""

    _network: Network | None = PrivateAttr(default=None)
    """Runs the model, by whichever engine."""

    _pad: int = PrivateAttr(default=0)

    def _load(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._pick_device()
        files = ModelFiles(self.model, self.revision or "main", self.local_files_only)
        with self._loading():
            config = AutoConfig.from_pretrained(self.model, **self._source())
            causal = any(name.endswith("ForCausalLM") for name in _architectures(config))
            if causal:
                self._check_described(config, files)
            else:
                self._check(config)
            tokenizer = AutoTokenizer.from_pretrained(self.model, **self._source())
            # Encoders have no chat template: they are spared the look-up.
            has_prompt = causal or (getattr(tokenizer, "chat_template", None) is not None and renders_chat(files))
        if has_prompt:
            self._choose()
        elif self.prompt is None:
            self._load_encoder(config, tokenizer)
        else:
            raise ConfigurationError(
                f"prompt={self.prompt!r} is for language models, and {self.model!r} reads none; leave it out"
            )

    def _choose(self) -> None:
        """Leave loading and reading to sentence-transformers."""
        given = given_to(CausalRerankerBackend, self)
        self._chosen = CausalRerankerBackend(**{**given, "model": self.model})
        self._chosen._load()  # noqa: SLF001 - it stands in for this one
        self._longest = self._chosen._longest  # noqa: SLF001

    def _load_encoder(self, config: Any, tokenizer: Any) -> None:
        from transformers import AutoModelForSequenceClassification

        def load() -> Any:
            with self._loading():
                return self._pretrained(AutoModelForSequenceClassification, config)

        self._set_longest(longest(config, tokenizer.model_max_length))
        self._wants_type_ids = "token_type_ids" in tokenizer.model_input_names
        self._tokenizer = self._backend_tokenizer(tokenizer)
        self._network = self._open_network(load)

    def _check_described(self, config: Any, files: ModelFiles) -> None:
        if not is_described(files):
            raise ModelLoadError(
                f"{self.model!r} is {', '.join(_architectures(config))} without the files of a sentence-transformers "
                "CrossEncoder (modules.json, config_sentence_transformers.json), which hold its prompt: its scores "
                "would be wrong. Use a repository or revision with these files, or bge: for BGE's LLM rerankers"
            )

    def _check(self, config: Any) -> None:
        architectures = _architectures(config)
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise ModelLoadError(
                f"{self.model!r} is no cross-encoder but {', '.join(architectures) or 'of no named architecture'}: its "
                "scoring head would be random. Use a sequence-classification model, or bge: for BGE's LLM rerankers"
            )
        if config.num_labels != 1:
            raise ModelLoadError(
                f"{self.model!r} has {config.num_labels} labels; a reranker has one, whose logit is the relevance"
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
        if self._chosen is not None:
            return self._chosen._encode(query, texts)  # noqa: SLF001
        return encode_pairs(self._tokenizer, query, texts, limit=self._limit, cut_query=self._cut_query)

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        if self._chosen is not None:
            return self._chosen._offsets(text)  # noqa: SLF001
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def _forward(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits."""
        if self._chosen is not None:
            return self._chosen._forward(batch)  # noqa: SLF001
        assert self._network is not None  # noqa: S101 - loaded
        return self._network(batch)


def _architectures(config: Any) -> list[str]:
    return list(getattr(config, "architectures", None) or [])
