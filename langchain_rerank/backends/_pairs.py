"""Query and passage as one pair of token ids, by a `tokenizers` tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_rerank.backends.local import Encoding

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def encode_pairs(
    tokenizer: Tokenizer,
    query: str,
    texts: Sequence[str],
    *,
    limit: int,
    cut_query: Callable[[Sequence[int]], list[int]],
) -> list[Encoding]:
    """Tokenise the query once and each text once, and join them with the tokenizer's own specials.

    Equal to tokenising each pair with `truncation="only_second"`, but for the query, which `cut_query` cuts first.

    Args:
        tokenizer: Truncation and padding switched off.
        query: What the user asked.
        texts: n passages, any length.
        limit: Most tokens of a pair, specials included; only the passage is cut.
        cut_query: Cuts the query's ids to what it may have.

    Returns:
        n encodings.
    """
    frame = _Frame.of(tokenizer)
    asked = cut_query(tokenizer.encode(query, add_special_tokens=False).ids)
    room = max(0, limit - len(asked) - frame.size)
    # Plain lists are cut, not Encodings: these keep what is cut off, and combine all of it when they are joined.
    passages = [passage.ids for passage in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    return [frame.encoding(asked, ids[:room], truncated=len(ids) > room, room=room) for ids in passages]


@dataclass(frozen=True)
class _Frame:
    """The specials around a pair, and every token's type, as a tokenizer sets them."""

    ids: tuple[tuple[int, ...], ...]
    """Before the query, between the two, after the passage."""

    type_ids: tuple[tuple[int, ...], ...]

    pair_types: tuple[int, int]
    """The type of the query's tokens, and of the passage's."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Frame:
        """Read from a pair of two short texts."""
        one, other = (tokenizer.encode(text, add_special_tokens=False) for text in ("1", "2"))
        pair = tokenizer.post_process(one, other, add_special_tokens=True)
        texts = [place for place, special in enumerate(pair.special_tokens_mask) if not special]
        first, second = texts[: len(one.ids)], texts[len(one.ids) :]
        cuts = (slice(None, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, None))
        return cls(
            tuple(tuple(pair.ids[cut]) for cut in cuts),
            tuple(tuple(pair.type_ids[cut]) for cut in cuts),
            (pair.type_ids[first[0]], pair.type_ids[second[0]]),
        )

    @property
    def size(self) -> int:
        """How many specials there are."""
        return sum(map(len, self.ids))

    def encoding(self, query: Sequence[int], passage: Sequence[int], *, truncated: bool, room: int) -> Encoding:
        """The pair of two lists of ids."""
        before, between, after = self.ids
        types, (of_query, of_passage) = self.type_ids, self.pair_types
        return Encoding(
            [*before, *query, *between, *passage, *after],
            [*types[0], *[of_query] * len(query), *types[1], *[of_passage] * len(passage), *types[2]],
            truncated=truncated,
            room=room,
        )
