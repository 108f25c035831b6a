"""BM25 as Qdrant sparse vectors: no model, no download."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from langchain_rerank._optional import require
from langchain_rerank.errors import ConfigurationError

require("langchain_qdrant", "Stemmer", extra="qdrant")

from langchain_qdrant import SparseEmbeddings, SparseVector  # noqa: E402  # the check above comes first

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from Stemmer import Stemmer

STOP_WORDS = frozenset(
    [
        *("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not"),
        *("of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was"),
        *("will", "with"),
    ]
)
"""The 33 English words of Lucene's `EnglishAnalyzer`, which bm25s takes too."""

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
_HANGUL = "\uac00-\ud7a3"
_CJK = _HAN + _KANA + _HANGUL
_TOKENS = re.compile(rf"(?P<cjk>[{_CJK}]+)|(?P<word>[^\W{_CJK}]+(?:'[^\W{_CJK}]+)*)")


ANALYZER = 1
"""Goes up when texts become other tokens or numbers than before: vectors of both kinds must not meet."""


@dataclass(frozen=True)
class BM25SparseEmbeddings(SparseEmbeddings):
    """BM25 split between this class, which knows one text, and Qdrant, which knows the collection.

    A document's vector holds the term frequency part of each token t,

        tf(t) * (k1 + 1) / (tf(t) + k1 * (1 - b + b * length / average_length)),

    a query's vector how often it names each token. Qdrant multiplies with the token's inverse document frequency at
    query time, so the collection's sparse vector needs `Modifier.IDF`; `create_qdrant_retriever` sets and checks it.
    Robertson and Zaragoza, 2009, https://doi.org/10.1561/1500000019; defaults as in Anserini.

    Texts become tokens like this: Unicode NFKC and case folding; words, without 33 English stop words, cut to their
    stem by the English Snowball stemmer; every two neighbouring characters of Chinese, Japanese and Korean (a
    character that stands alone is its own token, so a query of one character finds only those).

    A token's number is the 32-bit blake2b of its UTF-8 bytes: the same on every machine, with no vocabulary to keep.
    Two of V distinct tokens share a number about V**2 / 2**33 times (once for 93,000 tokens); such a pair counts as
    one token.

    `average_length` is part of every document vector, so all documents of a collection need the same.
    `create_qdrant_retriever` measures it over the first documents of a collection and keeps it in the collection's own
    metadata, where later calls find it. Elsewhere `fit` measures it, and keeping it is up to you.
    """

    k1: float = 0.9
    """How slowly repeated tokens stop to count, 0 or more. At 0 a token counts once."""

    b: float = 0.4
    """How much long documents are held back, from 0 (not at all) to 1 (in full)."""

    average_length: float | None = None
    """Tokens in an average document, stop words not counted. Queries do not need it."""

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1 and (self.average_length is None or self.average_length > 0)):
            raise ConfigurationError(f"{self} cannot be: k1 is 0 or more, b lies in [0, 1], average_length is over 0")

    def fit(self, texts: Iterable[str]) -> BM25SparseEmbeddings:
        """Measure the average length.

        Args:
            texts: The documents that the collection will start with, or a fair sample of them.

        Returns:
            The same settings with `average_length` set; 1.0 where no text holds a token.
        """
        lengths = [len(tokens) for tokens in _tokenize(texts)]
        return replace(self, average_length=sum(lengths) / len(lengths) if any(lengths) else 1.0)

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Weigh the tokens of documents.

        Args:
            texts: n documents.

        Returns:
            n vectors with one value in (0, k1 + 1) for each distinct token. A text without tokens has an empty one.

        Raises:
            ConfigurationError: `average_length` is not known.
        """
        if self.average_length is None:
            raise ConfigurationError(
                f"{self} cannot weigh documents: their average length is not known. "
                "Take fit(texts), or give average_length."
            )
        return [self._weigh(tokens, self.average_length) for tokens in _tokenize(texts)]

    def embed_query(self, text: str) -> SparseVector:
        """Count the tokens of a query.

        Args:
            text: What the user asked.

        Returns:
            A vector with the count of each distinct token, empty where there is none.
        """
        [tokens] = _tokenize([text])
        counts = Counter(map(token_id, tokens))
        return SparseVector(indices=list(counts), values=[float(count) for count in counts.values()])

    def settings(self) -> dict[str, float | None]:
        """What two sets of document vectors must have in common to be searched together."""
        return {**asdict(self), "analyzer": ANALYZER}

    def _weigh(self, tokens: list[str], average_length: float) -> SparseVector:
        norm = self.k1 * (1 - self.b + self.b * len(tokens) / average_length)
        counts = Counter(map(token_id, tokens))  # by number, not by token: numbers in a vector must be unique
        values = [tf * (self.k1 + 1) / (tf + norm) for tf in counts.values()]
        return SparseVector(indices=list(counts), values=values)


def token_id(token: str) -> int:
    """Number a token: the 32-bit blake2b of its UTF-8 bytes, in [0, 2**32)."""
    return int.from_bytes(blake2b(token.encode(), digest_size=4).digest(), "big")


def _tokenize(texts: Iterable[str]) -> Iterator[list[str]]:
    """The tokens of each text, with repetitions."""
    from Stemmer import Stemmer

    stemmer = Stemmer("english")  # one a call: it keeps a cache and must not be shared between threads
    for text in texts:
        yield _tokens(text, stemmer)


def _tokens(text: str, stemmer: Stemmer) -> list[str]:
    normal = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    words: list[str] = []
    bigrams: list[str] = []
    for match in _TOKENS.finditer(normal):
        run = match.group()
        if match.lastgroup == "cjk":
            bigrams += [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        elif run not in STOP_WORDS:
            words.append(run)
    return [*stemmer.stemWords(words), *bigrams]
