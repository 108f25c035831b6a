"""Telling passages that say the same from each other."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
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
    sizes: dict[int, int] = {}
    holders: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        own = _shingles(text)
        shared = Counter(earlier for shingle in own for earlier in holders.get(shingle, ()))
        close = (i for i, common in shared.items() if common / (len(own) + sizes[i] - common) >= similarity)
        first = min(close, default=index)
        if first == index:
            if len(sizes) == most:
                break
            sizes[index] = len(own)
            for shingle in own:
                holders.setdefault(shingle, []).append(index)
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
