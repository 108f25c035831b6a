"""What BGE's two language-model rerankers share: the prompt, its limits, and what of it a long passage may fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PrivateAttr

from langchain_rerank.backends._torch import TorchBackend
from langchain_rerank.backends.local import Encoding
from langchain_rerank.errors import ModelLoadError

PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
"""The question after query and passage, as the models were trained with it."""

_QUERY, _PASSAGE, _SEPARATOR = "A: ", "B: ", "\n"

_MARGIN = 8
"""Tokens by which a passage cut out of a text may be longer than it was inside it: a character of four byte tokens
counts as a whole at either end, and the words there may split otherwise."""


class PromptBackend(TorchBackend):
    r"""A decoder that reads `A: query`, `B: passage` and the question whether B answers A.

    Token ids and limits are those of FlagEmbedding 1.4, `inference/reranker/decoder_only`:
    `<bos>A: query`, `\nB: passage`, `\n`, prompt; no end token. The first two together may have as many tokens more
    than `max_length` as the rest has, and the rest is never cut.
    https://huggingface.co/BAAI/bge-reranker-v2-gemma
    """

    max_length: int = Field(default=512, ge=32)
    """Most tokens of a passage; query and passage together may have as many more as the prompt has. Only the
    passage is cut; a query over three quarters of this is cut to that first, and reported."""

    _start: list[int] = PrivateAttr(default_factory=list)
    _separator: list[int] = PrivateAttr(default_factory=list)
    _end: list[int] = PrivateAttr(default_factory=list)
    _pad: int = PrivateAttr(default=0)

    def _set_tokenizer(self, tokenizer: Any, *, begin: int | None, positions: int | None) -> None:
        """Take over the tokenizer of transformers.

        Args:
            tokenizer: As `AutoTokenizer` gives it.
            begin: The token before the query, if the model wants one.
            positions: Most tokens that the model reads, the prompt included; `None` if nothing says so.

        Raises:
            ModelLoadError: The tokenizer is a slow one, or `max_length` is more than the model can read.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelLoadError(f"{self.model!r} has no fast tokenizer (tokenizer.json); convert it with transformers")
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = backend
        self._pad = tokenizer.pad_token_id or 0
        self._start = [] if begin is None else [begin]
        self._separator = self._ids(_SEPARATOR)
        self._end = self._separator + self._ids(PROMPT)
        self._set_longest(positions and positions - 2 * len(self._end))

    def _pad_id(self) -> int:
        return self._pad

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        """Tokenise the query once and each text once, and join them with the prompt's tokens."""
        asked = self._start + self._cut_query(self._ids(_QUERY + query))
        room = min(self._limit, self._limit + len(self._end) - len(self._separator) - len(asked))
        passages = self._tokenizer.encode_batch([_PASSAGE + text for text in texts], add_special_tokens=False)
        free = room - len(self._ids(_PASSAGE)) - _MARGIN
        return [
            Encoding(
                [*asked, *self._separator, *passage.ids[:room], *self._end],
                truncated=len(passage.ids) > room,
                room=free,
            )
            for passage in passages
        ]

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Spans in the text alone, of the tokens that it has behind its `B: `."""
        before = len(_PASSAGE)
        offsets = self._tokenizer.encode(_PASSAGE + text, add_special_tokens=False).offsets
        return [(max(start - before, 0), end - before) for start, end in offsets if end > before]
