"""Telling passages that say the same from each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_SHINGLE = 3


def first_of_each(texts: Sequence[str], similarity: float, *, most: int | None = None) -> list[int]:
    """For each text the index of the first text that it nearly repeats; its own, if there is none.

    Args:
        texts: Passages, best first.
        similarity: Least Jaccard similarity of their shingles, in [0, 1], at which two are the same; 1 takes only texts
            with the same shingles, so those that are equal after normalising (Unicode NFKC, case, punctuation, space).
        most: Stop before the text after this many different ones: what comes then has no place anyway.

    Returns:
        An index for each text looked at. A text that stands for others stands for itself too.
    """
    firsts: list[int] = []
    kept: dict[int, frozenset[str]] = {}
    for index, text in enumerate(texts):
        own = _shingles(text)
        first = next((earlier for earlier, other in kept.items() if _jaccard(own, other) >= similarity), index)
        if first == index:
            if len(kept) == most:
                break
            kept[index] = own
        firsts.append(first)
    return firsts


def _shingles(text: str) -> frozenset[str]:
    """Runs of three words; of three characters where there are no spaces between words. Few words: all of them."""
    words: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        words += list(word) if _CJK.search(word) else [word]
    if len(words) <= _SHINGLE:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[start : start + _SHINGLE]) for start in range(len(words) - _SHINGLE + 1))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
