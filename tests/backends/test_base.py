import logging
import math

import pytest
from pydantic import PrivateAttr, ValidationError

from langchain_rerank._optional import missing
from langchain_rerank.backends.base import Backend, Score, collect_usage, report_usage
from langchain_rerank.errors import BackendError, MissingDependencyError, RerankError, TransientError


class Answering(Backend):
    """Answers with what the test wrote down, whatever it is asked; raises what is an exception."""

    answers: tuple = ()
    retry_wait: float = 0.0
    _asked: list = PrivateAttr(default_factory=list)

    def _score(self, query, texts):
        self._asked.append((query, list(texts)))
        answer = self.answers[min(len(self._asked), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def both(backend, *arguments):
    """The answer of `score`, after checking that `ascore` gives the same."""
    scores = backend.score(*arguments)
    assert await backend.model_copy().ascore(*arguments) == scores
    return scores


async def test_scores_are_passed_on_in_order():
    assert await both(Answering(answers=([0.2, 0.1],)), "q", ["a", "b"]) == [0.2, 0.1]


async def test_empty_texts_are_not_asked_about():
    backend = Answering(answers=([0.7],))

    assert await both(backend, "q", ["", "a", "\n"]) == [0.0, 0.7, 0.0]
    assert backend._asked == [("q", ["a"])]


def test_a_short_answer_is_an_error_not_a_zero():
    with pytest.raises(BackendError, match=r"Answering\(.*\) returned 1 scores for 2 texts"):
        Answering(answers=([0.5],)).score("q", ["a", "b"])


async def test_a_short_awaited_answer_is_an_error_too():
    with pytest.raises(BackendError, match="returned 1 scores for 2 texts"):
        await Answering(answers=([0.5],)).ascore("q", ["a", "b"])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 1.01])
def test_a_number_that_is_no_score_is_an_error_that_names_the_text(wrong):
    with pytest.raises(BackendError, match=f"returned {wrong} for text 2"):
        Answering(answers=([0.5, wrong],)).score("q", ["a", "", "b"])


def test_a_busy_service_is_asked_again(caplog):
    backend = Answering(answers=(TransientError("busy"), TransientError("busy"), [0.5]))

    with caplog.at_level(logging.INFO):
        assert backend.score("q", ["a"]) == [0.5]

    assert len(backend._asked) == 3
    assert "attempt 1 failed (busy)" in caplog.text


async def test_a_busy_service_is_asked_again_when_awaited():
    assert await Answering(answers=(TransientError("busy"), [0.5])).ascore("q", ["a"]) == [0.5]


def test_a_service_that_stays_busy_is_given_up():
    backend = Answering(answers=(TransientError("busy"),), max_attempts=2)

    with pytest.raises(TransientError, match="busy"):
        backend.score("q", ["a"])

    assert len(backend._asked) == 2


def test_an_error_that_will_not_pass_is_not_tried_again():
    backend = Answering(answers=(BackendError("refused"), [0.5]))

    with pytest.raises(BackendError, match="refused"):
        backend.score("q", ["a"])

    assert len(backend._asked) == 1


@pytest.mark.parametrize(
    ("error", "attempt", "seconds"),
    [
        (TransientError("busy"), 1, 0.5),
        (TransientError("busy"), 3, 2.0),
        (TransientError("busy", retry_after=7), 1, 7.0),
        (TransientError("busy", retry_after=0), 1, 0.0),
        (TransientError("busy", retry_after=9999), 1, 60.0),
    ],
)
def test_it_waits_longer_each_time_or_as_long_as_the_service_asks(error, attempt, seconds):
    import tenacity

    state = tenacity.RetryCallState(None, None, (), {})
    state.attempt_number = attempt
    state.set_exception((TransientError, error, None))

    assert Answering(retry_wait=0.5)._wait(state) == seconds


def test_a_missing_library_is_said_at_construction():
    class Needy(Backend):
        requires = ("no_such_library", "json")
        extra = "needy"

        def _score(self, query, texts):
            return []

    with pytest.raises(MissingDependencyError) as caught:
        Needy()

    assert str(caught.value) == "no_such_library not found. Install with: pip install 'langchain-rerank[needy]'"
    assert caught.value.name == "no_such_library"
    assert isinstance(caught.value, ImportError)


def test_a_submodule_whose_parent_is_not_there_is_missing():
    assert missing("no_such_library.part", "json.decoder") == ["no_such_library.part"]


def test_options_are_frozen_and_typos_refused():
    with pytest.raises(ValidationError, match="frozen"):
        Answering().model = "x"
    with pytest.raises(ValidationError, match="max_attemts"):
        Answering(max_attemts=1)


def test_a_wrong_value_is_not_shown_since_it_may_be_a_secret():
    with pytest.raises(ValidationError) as caught:
        Answering(max_attempts="sk-123456")

    assert "sk-123456" not in str(caught.value)


def test_usage_adds_up_and_outside_a_trace_is_nothing():
    report_usage(tokens=1)
    with collect_usage() as usage:
        report_usage(tokens=1, warnings=["a"])
        report_usage(tokens=2, warnings=["b"])

    assert usage == {"tokens": 3, "warnings": ["a", "b"]}


async def test_usage_reaches_the_trace_from_threads():
    class Counting(Backend):
        def _score(self, query, texts):
            report_usage(texts=len(texts))
            return [0.5] * len(texts)

    with collect_usage() as usage:
        await Counting().ascore("q", ["a", "b"])

    assert usage == {"texts": 2}


def test_a_score_is_a_float_with_details():
    score = Score(0.5, {"truncated": True})

    assert score == 0.5
    assert score.details == {"truncated": True}
    assert Score(0.5).details == {}


def test_the_name_is_that_of_the_class():
    assert Answering().name == "answering"


def test_every_error_is_ours_and_a_built_in_kind():
    from langchain_rerank import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RerankError)]

    assert len(kinds) == 12
    for kind in kinds:
        assert kind.__name__ in errors.__doc__
        assert kind is RerankError or issubclass(kind, (ValueError, ImportError, RuntimeError))
