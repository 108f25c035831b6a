"""Small real backends for the tests of everything that is not a backend."""

import threading
import time

from pydantic import PrivateAttr

from langchain_rerank.backends.base import Backend, Score, report_usage
from langchain_rerank.errors import BackendError


class ScriptedBackend(Backend):
    """Gives each text the score that the test wrote down, and remembers what it was asked."""

    scores: dict[str, float]
    model: str = "script"

    _calls: list = PrivateAttr(default_factory=list)

    def _score(self, query, texts):
        self._calls.append((query, list(texts)))
        report_usage(units=len(texts))
        return [self.scores[text] for text in texts]


class LengthBackend(Backend):
    """Longer is better: a score for any text."""

    def _score(self, query, texts):
        return [len(text) / (1 + len(text)) for text in texts]


class TalkativeBackend(Backend):
    """Has something to say about each score."""

    def _score(self, query, texts):
        return [Score(0.5, {"truncated": True, "spans": [[0, len(text)]]}) for text in texts]


class BrokenBackend(Backend):
    """Fails."""

    def _score(self, query, texts):
        raise BackendError("the model broke")


class SlowBackend(Backend):
    """Blocks its thread, as a model does."""

    seconds: float = 0.3

    _threads: set = PrivateAttr(default_factory=set)

    def _score(self, query, texts):
        self._threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return [0.5] * len(texts)
