"""Questions that a chat model makes up for passages."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableConfig

from langchain_rerank._folders import refuse_loss
from langchain_rerank._optional import missing
from langchain_rerank.backends.base import clean
from langchain_rerank.errors import BackendError, ConfigurationError, MissingDependencyError

logger = logging.getLogger(__name__)

_PROMPT = """\
Write one question that the passage below answers and that somebody could ask who has not read it. Use the language of \
the passage. Do not mention the passage. Answer with the question alone.

Passage:
{passage}"""

_AT_ONCE = 8
"""Passages that are asked about at a time; their questions are kept before the next ones are asked for."""


class Asker:
    """Asks a chat model for one question that each passage answers, and keeps what it said.

    Args:
        make: Gives the chat model, when the first question is needed.
        kept: A file of JSON lines. A passage that is in it is not asked about again.
        name: What the model is called. Another one is asked anew.
    """

    def __init__(self, make: Callable[[], BaseChatModel], kept: Path, name: str = "") -> None:
        self._make = make
        self._kept = kept
        self._name = name

    def __call__(self, passages: Sequence[str]) -> list[str]:
        """One question for each passage; empty where the model gave none.

        Raises:
            ConfigurationError: There is no such model.
            BackendError: The model failed. What it said before is kept.
        """
        known = dict(self._read())
        unknown = [passage for passage in dict.fromkeys(passages) if self._key(passage) not in known]
        if unknown:
            logger.info("Asking the LLM about %s of %s passages", len(unknown), len(passages))
            llm = self._make()
            self._end_line()
            for start in range(0, len(unknown), _AT_ONCE):
                known.update(self._asked(llm, unknown[start : start + _AT_ONCE]))
        return [known[self._key(passage)] for passage in passages]

    def _read(self) -> Iterator[tuple[str, str]]:
        if self._kept.is_file():
            for line in self._kept.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                except ValueError:  # the last one, where the machine stopped; its passage is asked about again
                    continue
                if not (isinstance(row, dict) and row.keys() >= {"passage", "query"}):
                    refuse_loss(self._kept.parent, [self._kept.name], "training")
                yield row["passage"], row["query"]

    def _end_line(self) -> None:
        """End a line that was half written, so that what is said next gets lines of its own."""
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        if self._kept.is_file() and not self._kept.read_bytes().endswith(b"\n"):
            with self._kept.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _asked(self, llm: BaseChatModel, passages: Sequence[str]) -> dict[str, str]:
        prompts: list[Any] = [_PROMPT.format(passage=passage) for passage in passages]
        try:
            answers = llm.batch(prompts, config=RunnableConfig(max_concurrency=_AT_ONCE))
        except Exception as error:  # a provider's package raises what it likes
            raise BackendError(f"The LLM failed: {error}. What it said so far is kept in {self._kept}") from error
        found = {self._key(passage): _question(answer) for passage, answer in zip(passages, answers, strict=True)}
        with self._kept.open("a", encoding="utf-8") as file:
            for key, query in found.items():
                file.write(json.dumps({"passage": key, "query": query}, ensure_ascii=False) + "\n")
        return found

    def _key(self, passage: str) -> str:
        return hashlib.sha256(f"{self._name}\n{_PROMPT}\n{passage}".encode()).hexdigest()


def _question(answer: Any) -> str:
    """The last line that is not empty: a model that explains itself does so first."""
    lines = [line.strip() for line in clean(str(answer.text)).splitlines() if line.strip()]
    return lines[-1].strip('"').strip() if lines else ""


def make_llm(name: str) -> BaseChatModel:
    """The chat model that LangChain's `init_chat_model` makes of a name.

    Raises:
        ConfigurationError: The name, or an option such as the key, is wrong.
        MissingDependencyError: The provider's package is not installed.
    """
    home = "langchain_classic.chat_models" if missing("langchain") else "langchain.chat_models"
    try:
        made: BaseChatModel = import_module(home).init_chat_model(name)
    except ImportError as error:
        raise MissingDependencyError(f"llm={name!r}: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"llm={name!r}: {error}") from error
    return made
