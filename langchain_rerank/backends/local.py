"""What models in this process share: loading once, batches that callers share, long documents."""

from __future__ import annotations

import logging
import math
import os
import threading
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, islice
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from langchain_rerank.backends._passages import split_passages
from langchain_rerank.backends._worker import Call, Job, Make, Scheduler
from langchain_rerank.backends.base import Backend, Score, clean, report_usage
from langchain_rerank.errors import BackendError, ModelLoadError

logger = logging.getLogger(__name__)

Logits: TypeAlias = NDArray[np.floating[Any]]
"""One batch's logits: shape (b,), or (b, k) where a backend reads k of them for each pair."""

Row: TypeAlias = NDArray[np.float64]
"""One pair's logits: shape (), or (k,)."""


Request: TypeAlias = tuple[str, Sequence[str]]
"""A query with its texts."""

_CHARACTERS = 4
"""So many are a token, about."""

_SMALL = 8
"""A call is small that so many of fit into `max_waiting`."""

_PARTS = 100
"""A call is tokenised in so many parts at most."""


@dataclass(frozen=True)
class Encoding:
    """One tokenised pair."""

    ids: Sequence[int]
    """Token ids of query and passage, specials included."""

    type_ids: Sequence[int] | None = None
    """Which of the two each token belongs to, for models that want to know."""

    truncated: bool = False
    """Whether the end of the passage did not fit."""

    room: int = 0
    """How many tokens of the passage fitted: what a passage of a long document may have."""


@dataclass(frozen=True)
class Batch:
    """Tokenised pairs of one forward pass, padded to the longest."""

    ids: NDArray[np.int64]
    """Shape (b, t)."""

    mask: NDArray[np.int64]
    """Shape (b, t); 1 for a token, 0 for padding."""

    type_ids: NDArray[np.int64]
    """Shape (b, t); zeros where the model wants none."""

    def __len__(self) -> int:
        return len(self.ids)

    def named(self, names: Iterable[str]) -> dict[str, NDArray[np.int64]]:
        """Some of the arrays, under the names that the models of transformers give their inputs."""
        arrays = {"input_ids": self.ids, "attention_mask": self.mask, "token_type_ids": self.type_ids}
        return {name: arrays[name] for name in names}

    def halves(self) -> tuple[Batch, Batch]:
        """The same pairs in two batches."""
        middle = len(self) // 2
        first, second = slice(None, middle), slice(middle, None)
        return (
            Batch(self.ids[first], self.mask[first], self.type_ids[first]),
            Batch(self.ids[second], self.mask[second], self.type_ids[second]),
        )


def input_names(*, type_ids: bool) -> list[str]:
    """The inputs of an encoder of transformers, for `Batch.named`; type ids where it wants to know them."""
    return ["input_ids", "attention_mask", *(["token_type_ids"] if type_ids else [])]


@dataclass(frozen=True)
class _Piece:
    """A text, or one passage of a long one."""

    text: int
    """Which of all texts of a call."""

    encoding: Encoding
    span: tuple[int, int] | None = None


class LocalBackend(Backend):
    """A model in this process: write `_load`, `_encode`, `_forward`, and `_offsets` for long documents.

    A score is the sigmoid of the model's one logit, in float64, and does not depend on its neighbours
    beyond rounding. Concurrent calls share batches, in turn, so that a long one does not hold up a short one; one
    batch runs at a time, and one call is tokenised at a time meanwhile.
    """

    without_effect: ClassVar[frozenset[str]] = Backend.without_effect | {"batch_size", "batch_tokens", "max_waiting"}

    max_length: int = Field(default=512, ge=32)
    """Most tokens of query and passage together, specials included. Only the passage is cut;
    a query over three quarters of this is cut to that first, and reported."""

    batch_size: int | None = Field(default=None, ge=1)
    """Most pairs in one batch. `None` leaves it to `batch_tokens`."""

    batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one batch, padding included. `None` takes what suits the device."""

    max_waiting: int = Field(default=4096, ge=1)
    """Most pairs that wait for the model, beside those of the largest call. Further calls wait until there is room, and
    are tokenised then. Calls of up to an eighth of it have as much room to themselves, and never wait behind others."""

    long_documents: Literal["truncate", "max_passage"] = "truncate"
    """What happens to a text that does not fit: cut its end, or score overlapping passages of it and take the best."""

    passage_overlap: int = Field(default=32, ge=0)
    """Tokens that two neighbouring passages of a long document share, at most half a passage."""

    return_logits: bool = False
    """Add the raw logit to the metadata, as `relevance_logit`."""

    _queues: dict[int, Scheduler[Encoding, Row]] = PrivateAttr(default_factory=dict)
    _loaded: bool = PrivateAttr(default=False)
    _budget: int | None = PrivateAttr(default=None)
    _longest: int | None = PrivateAttr(default=None)
    _reported: set[str] = PrivateAttr(default_factory=set)

    @property
    def _limit(self) -> int:
        """`max_length`, or less where the loaded model cannot read that much."""
        return min(self.max_length, self._longest or self.max_length)

    @property
    def _queue(self) -> Scheduler[Encoding, Row]:
        """Where callers meet; a forked child has its own, since the parent's threads and locks are not its."""
        process = os.getpid()
        return self._queues.get(process) or self._queues.setdefault(process, Scheduler())

    @property
    def _lock(self) -> threading.Lock:
        """For loading and tokenising."""
        return self._queue.door

    @abstractmethod
    def _load(self) -> None:
        """Load tokenizer and weights into private attributes; called once, under the lock.

        Raises:
            ModelLoadError: The model is not there, or would give wrong scores.
        """

    @abstractmethod
    def _encode(self, query: str, texts: Sequence[str]) -> list[Encoding]:
        """Tokenise the query, cut by `_cut_query`, with each text, cut so that both fit into `_limit`."""

    @abstractmethod
    def _forward(self, batch: Batch) -> Logits:
        """One padded batch of b pairs, shape (b, t) token ids, to b logits, shape (b,)."""

    @abstractmethod
    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """The character span of each token of a text, in order, without specials."""

    def _overlaps(self) -> bool:
        """Whether a large call is tokenised part by part while the model reads: where that leaves the CPU idle."""
        return False

    def _default_batch_tokens(self) -> int:
        """Most tokens in a batch, for the device that was loaded on; small batches suit a CPU's caches."""
        return 2048

    def _pad_id(self) -> int:
        """The id that fills a batch up."""
        return 0

    def _to_score(self, logits: NDArray[np.float64]) -> tuple[float, dict[str, Any]]:
        """One pair's logits, shape () or (k,), to its score and what there is to say about it."""
        logit = float(logits)
        # An infinite logit is an overflow, not a perfect score: as NaN it is refused, with a remedy.
        score = sigmoid(logit) if math.isfinite(logit) else math.nan
        return score, {"relevance_logit": logit} if self.return_logits else {}

    def _out_of_memory(self, error: BaseException) -> bool:
        """Whether the forward pass failed for want of memory, so that half the batch may pass."""
        return isinstance(error, MemoryError)

    def _free_memory(self) -> None:
        """Give back what the device's allocator keeps."""

    def warmup(self) -> None:
        """Load the model now, and run it once."""
        self.logits("warm", ["up"])

    def logits(self, query: str, texts: Sequence[str]) -> list[float]:
        """The raw logits that scores are the sigmoid of, n floats of any size; long texts are cut."""
        with self._lock:
            self._ensure_loaded()
            encodings = self._encode(clean(query), [clean(text) for text in texts])
        return [float(np.ravel(row)[-1]) for row in self._run(encodings)]

    def _score(self, query: str, texts: Sequence[str]) -> list[Score]:
        return self._score_many([(query, texts)])[0]

    def _score_many(self, requests: Sequence[Request]) -> list[list[Score]]:
        pieces: list[_Piece] = []
        rows = self._queue.run_all(self._makes(requests, pieces))
        return self._scored(requests, pieces, rows)

    async def _ascore(self, query: str, texts: Sequence[str]) -> list[Score]:
        return (await self._ascore_many([(query, texts)]))[0]

    async def _ascore_many(self, requests: Sequence[Request]) -> list[list[Score]]:
        pieces: list[_Piece] = []
        rows = await self._queue.arun(*self._makes(requests, pieces), small=self._is_small(requests))
        return self._scored(requests, pieces, rows)

    def _makes(self, requests: Sequence[Request], pieces: list[_Piece]) -> list[Make[Row, Encoding]]:
        """What tokenises the requests, part by part, adds their pieces to the list and gives jobs for the model."""
        parts, tokens = self._parts(requests)
        small = self._is_small(requests)
        call = Call(tokens, small=small) if len(parts) > 1 else None

        def tokenize(part: Sequence[Request], first: int, answer: Future[list[Row]]) -> Job[Encoding, Row]:
            with self._queue.entered(self.max_waiting, answer, small=small):
                found = self._tokenized(part, first)
            pieces.extend(found)
            encodings = [piece.encoding for piece in found]
            return self._job(encodings, answer, call or Call(_tokens(encodings), small=small))

        starts = accumulate((sum(len(texts) for _, texts in part) for part in parts), initial=0)
        return [partial(tokenize, part, first) for part, first in zip(parts, starts, strict=False)]

    def _parts(self, requests: Sequence[Request]) -> tuple[list[list[Request]], int]:
        """The requests in parts of a batch and more, to be tokenised while the model reads those before; or in one.

        Returns:
            The parts, and how many tokens they have together, about.
        """
        if not (self._loaded and self._overlaps()):
            return [list(requests)], 0
        lengths = [[self._estimated(query, text) for text in texts] for query, texts in requests]
        total = sum(map(sum, lengths))
        most = max(self._token_budget(), total // _PARTS)
        parts: list[list[Request]] = [[]]
        tokens = 0
        for (query, texts), counts in zip(requests, lengths, strict=True):
            start = 0
            for end, length in enumerate(counts, 1):
                tokens += length
                if tokens >= most:
                    parts[-1].append((query, texts[start:end]))
                    parts.append([])
                    start, tokens = end, 0
            if start < len(texts):
                parts[-1].append((query, texts[start:]))
        return parts if parts[-1] or len(parts) == 1 else parts[:-1], total

    def _estimated(self, query: str, text: str) -> int:
        """How many tokens a pair may have."""
        return min(self._limit, (len(query) + len(text)) // _CHARACTERS + 1)

    def _ensure_loaded(self) -> None:
        if not self._loaded:
            self._load()
            self._loaded = True

    def _set_longest(self, longest: int | None) -> None:
        """Take note of how many tokens the loaded model can read; refuse a `max_length` above that."""
        if longest is not None and "max_length" in self.model_fields_set and self.max_length > longest:
            raise ModelLoadError(
                f"max_length={self.max_length}, but {self.model or self.name!r} reads at most {longest} tokens"
            )
        self._longest = longest

    def _is_small(self, requests: Sequence[Request]) -> bool:
        return _SMALL * sum(len(texts) for _, texts in requests) <= self.max_waiting

    def _tokenized(self, requests: Sequence[Request], first: int) -> list[_Piece]:
        """The pieces of some requests, whose first text is the call's `first`."""
        self._ensure_loaded()
        pieces: list[_Piece] = []
        for query, texts in requests:
            pieces += self._pieces(query, texts, first)
            first += len(texts)
        return pieces

    def _pieces(self, query: str, texts: Sequence[str], first: int = 0) -> list[_Piece]:
        """Each text once, or where it is too long and `max_passage` asks for it, each of its passages."""
        pieces: list[_Piece] = []
        for index, (text, encoding) in enumerate(zip(texts, self._encode(query, texts), strict=True), first):
            if encoding.truncated and self.long_documents == "max_passage":
                pieces += self._passages(query, text, index, encoding.room)
            else:
                pieces.append(_Piece(index, encoding))
        return pieces

    def _passages(self, query: str, text: str, index: int, room: int, start: int = 0) -> list[_Piece]:
        """The passages of a text that stands at `start` in the document, each short enough to be read whole."""
        spans = split_passages(text, self._offsets(text), size=max(1, room), overlap=self.passage_overlap)
        encodings = self._encode(query, [text[first:last] for first, last in spans])
        pieces: list[_Piece] = []
        for (first, last), encoding in zip(spans, encodings, strict=True):
            # A passage that was cut out of a word may have more tokens by itself than it had within the text.
            if encoding.truncated and room > 1:
                pieces += self._passages(query, text[first:last], index, room // 2, start + first)
            else:
                pieces.append(_Piece(index, encoding, (start + first, start + last)))
        return pieces

    def _run(self, encodings: Sequence[Encoding]) -> list[Row]:
        """Every pair's logits, in order."""
        rows = self._queue.run(self._job(encodings))
        report_usage(tokens=_tokens(encodings))
        return rows

    def _job(
        self,
        encodings: Sequence[Encoding],
        answer: Future[list[Row]] | None = None,
        call: Call | None = None,
    ) -> Job[Encoding, Row]:
        lengths = [len(encoding.ids) for encoding in encodings]
        return Job(encodings, lengths, self._rows, self._fits, answer=answer, call=call)

    def _rows(self, encodings: Sequence[Encoding]) -> list[Row]:
        """Each pair's logits, of one batch."""
        return [np.asarray(row, dtype=np.float64) for row in self._forward_safely(self._collate(encodings))]

    def _fits(self, length: int) -> int:
        """How many pairs of a length a batch may have: as many as the budget allows, and at least one."""
        size = max(1, self._token_budget() // max(1, length))
        return min(size, self.batch_size or size)

    def _token_budget(self) -> int:
        return self._budget or self.batch_tokens or self._default_batch_tokens()

    def _collate(self, encodings: Sequence[Encoding]) -> Batch:
        """Pairs padded on the right to the longest of them."""
        shape = len(encodings), max(len(encoding.ids) for encoding in encodings)
        ids = np.full(shape, self._pad_id(), dtype=np.int64)
        mask, type_ids = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[row, :length], mask[row, :length] = encoding.ids, 1
            if encoding.type_ids is not None:
                type_ids[row, :length] = encoding.type_ids
        return Batch(ids, mask, type_ids)

    def _forward_safely(self, batch: Batch) -> Logits:
        """The forward pass, in halves where the whole batch does not fit into memory."""
        try:
            return self._forward(batch)
        except Exception as error:
            if not self._out_of_memory(error):
                raise
            if len(batch) == 1:
                raise BackendError(
                    f"{self!r} ran out of memory with one pair of {batch.ids.shape[1]} tokens; lower max_length"
                ) from error
        # Outside the handler, whose traceback would keep the failed pass's tensors alive.
        self._free_memory()
        self._budget = max(1, min(self._token_budget(), batch.ids.size) // 2)
        logger.warning("%s: out of memory; batches hold at most %d tokens from now on", self.name, self._budget)
        return np.concatenate([self._forward_safely(half) for half in batch.halves()])

    def _scored(self, requests: Sequence[Request], pieces: Sequence[_Piece], rows: Sequence[Row]) -> list[list[Score]]:
        """Each request's scores; says what it took."""
        report_usage(tokens=_tokens(piece.encoding for piece in pieces))
        self._report_truncated(pieces)
        best, index = self._best(pieces, rows), count()
        return [[best[text] for text in islice(index, len(texts)) if text in best] for _, texts in requests]

    def _best(self, pieces: Sequence[_Piece], rows: Sequence[Row]) -> dict[int, Score]:
        """Each text's score: its own, or that of its best passage."""
        best: dict[int, Score] = {}
        for piece, row in zip(pieces, rows, strict=True):
            value, details = self._to_score(row)
            found = best.get(piece.text)
            # Written so that a NaN wins and is refused above, not hidden by a neighbour.
            if found is None or not value <= found:
                best[piece.text] = Score(value, {**details, **_about(piece)})
        return best

    def _cut_query(self, ids: Sequence[int]) -> list[int]:
        """The query's tokens, at most three quarters of `max_length` of them."""
        most = self._limit * 3 // 4
        if len(ids) > most:
            self._warn_once("query", f"a query of {len(ids)} tokens was cut to {most} (max_length={self._limit})")
        return list(ids[:most])

    def _report_truncated(self, pieces: Sequence[_Piece]) -> None:
        cut = len({piece.text for piece in pieces if piece.encoding.truncated})
        if cut:
            report_usage(truncated=cut)
            self._warn_once(
                "documents",
                f"{cut} of {len(pieces)} documents did not fit into max_length={self._limit} and were cut; "
                "such documents carry truncated=True. long_documents='max_passage' reads all of them",
            )

    def _warn_once(self, key: str, message: str) -> None:
        """Log a warning the first time that this backend has reason to."""
        if key not in self._reported:
            self._reported.add(key)
            logger.warning("%s: %s", self.name, message)


def _tokens(encodings: Iterable[Encoding]) -> int:
    """How many tokens some pairs have together."""
    return sum(len(encoding.ids) for encoding in encodings)


def _about(piece: _Piece) -> dict[str, Any]:
    span = {} if piece.span is None else {"passage_span": list(piece.span)}
    return {**span, "truncated": True} if piece.encoding.truncated else span


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)) in float64; in float32 it would be exactly 1 from a logit of 17 on."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    small = math.exp(logit)
    return small / (1.0 + small)
