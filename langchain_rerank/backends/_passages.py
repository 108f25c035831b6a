"""Splitting a long text into overlapping passages at sentence ends."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s)|[。！？；]+[」』”）]*|\n+")  # noqa: RUF001 - CJK


def split_passages(text: str, offsets: Sequence[tuple[int, int]], *, size: int, overlap: int) -> list[tuple[int, int]]:
    """Split a text into passages of at most `size` tokens that cover it and overlap.

    A passage ends with the last sentence that ends in its second half, else after `size` tokens. The next one
    starts `overlap` tokens before that end, or at the first sentence start within these.

    Args:
        text: Any text.
        offsets: The character span of each of its t tokens, in order.
        size: Most tokens in a passage, at least 1.
        overlap: Tokens shared by neighbours; at most half of `size` are.

    Returns:
        Character spans `(start, end)`, in order.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    overlap = min(overlap, size // 2)
    spans, first = [], 0
    while first < len(offsets):
        last = _last_token(ends, stops, first, min(first + size, len(offsets)))
        spans.append((starts[first], stops[last - 1]))
        if last == len(offsets):
            break
        first = max(first + 1, _next_token(ends, starts, last - overlap, last))
    return spans


def _last_token(ends: Sequence[int], stops: Sequence[int], first: int, limit: int) -> int:
    """The token after the passage's last: where the last sentence of its second half ends, else `limit`."""
    if limit == len(stops):
        return limit
    middle = first + (limit - first + 1) // 2
    end = bisect_right(ends, stops[limit - 1]) - 1
    if end >= 0 and ends[end] >= stops[middle - 1]:
        return max(middle, bisect_right(stops, ends[end]))
    return limit


def _next_token(ends: Sequence[int], starts: Sequence[int], earliest: int, latest: int) -> int:
    """The first token of a sentence between the two, else `earliest`."""
    index = bisect_left(ends, starts[earliest])
    if index < len(ends):
        token = bisect_left(starts, ends[index])
        if token <= latest:
            return token
    return earliest
