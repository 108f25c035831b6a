"""Query and passage as one pair of token ids, by a `tokenizers` tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    asked = tokenizer.encode(query, add_special_tokens=False)
    asked.truncate(len(cut_query(asked.ids)))
    room = limit - len(asked.ids) - tokenizer.num_special_tokens_to_add(is_pair=True)
    encodings = []
    for passage in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        length = len(passage.ids)
        passage.truncate(room)
        pair = tokenizer.post_process(asked, passage, add_special_tokens=True)
        encodings.append(Encoding(pair.ids, pair.type_ids, truncated=length > room, room=room))
    return encodings
