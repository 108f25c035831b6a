import asyncio
import copy
import itertools
import json
import math
import time
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from fakes import BrokenBackend, LengthBackend, ScriptedBackend, SlowBackend, TalkativeBackend
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer

from langchain_rerank import Reranker, RerankResult
from langchain_rerank.errors import BackendError, ConfigurationError

SCORES = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.5}


def documents(*texts, **metadata):
    return [Document(id=f"id-{index}", page_content=text, metadata=dict(metadata)) for index, text in enumerate(texts)]


def reranker(scores=SCORES, **options):
    return Reranker(backend=ScriptedBackend(scores=scores), **options)


def texts(ranked):
    return [document.page_content for document in ranked]


def test_the_best_documents_come_first():
    assert texts(reranker().compress_documents(documents("a", "b", "c"), "q")) == ["b", "c", "a"]


def test_it_is_a_document_compressor():
    assert isinstance(reranker(), BaseDocumentCompressor)


def test_ids_and_metadata_are_kept_and_the_score_is_added():
    [ranked] = reranker().compress_documents([Document(id="x", page_content="b", metadata={"page": 3})], "q")

    assert ranked.id == "x"
    assert ranked.metadata == {"page": 3, "retrieval_rank": 1, "relevance_score": 0.9}
    assert type(ranked) is Document


def test_the_score_is_a_plain_python_float():
    [ranked] = Reranker(backend=TalkativeBackend()).compress_documents(documents("a"), "q")

    assert type(ranked.metadata["relevance_score"]) is float
    assert json.loads(json.dumps(ranked.metadata))["relevance_score"] == 0.5


def test_what_a_backend_says_about_a_score_is_kept():
    [ranked] = Reranker(backend=TalkativeBackend()).compress_documents(documents("abc"), "q")

    assert ranked.metadata["truncated"] is True
    assert ranked.metadata["spans"] == [[0, 3]]


def test_the_documents_given_are_not_written_to():
    given_documents = documents("a", "b", tags=["x"])
    before = copy.deepcopy(given_documents)

    ranked = reranker().compress_documents(given_documents, "q")
    ranked[0].metadata["tags"].append("y")

    assert given_documents == before


def test_metadata_that_cannot_be_copied_is_shared_not_lost():
    with Path(__file__).open() as uncopyable:
        [ranked] = reranker().compress_documents([Document("b", metadata={"file": uncopyable})], "q")

        assert ranked.metadata["file"] is uncopyable


def test_equal_scores_keep_the_incoming_order():
    assert texts(reranker().compress_documents(documents("d", "c"), "q")) == ["d", "c"]
    assert texts(reranker().compress_documents(documents("c", "d"), "q")) == ["c", "d"]


def test_the_same_text_is_scored_once_and_returned_twice():
    rerank = reranker()
    ranked = rerank.compress_documents(documents("a", "b", "a"), "q")

    assert [document.id for document in ranked] == ["id-1", "id-0", "id-2"]
    assert rerank.backend._calls == [("q", ["a", "b"])]


def test_no_documents_ask_nobody():
    rerank = reranker()

    assert rerank.compress_documents([], "q") == []
    assert rerank.backend._calls == []


async def test_no_documents_ask_nobody_when_awaited():
    assert await reranker().acompress_documents([], "q") == []


def test_top_n_none_keeps_all():
    assert len(reranker().compress_documents(documents("a", "b", "c", "d"), "q")) == 4
    assert len(reranker(top_n=2).compress_documents(documents("a", "b", "c", "d"), "q", top_n=None)) == 4


def test_top_n_per_call_comes_first_and_zero_means_zero():
    rerank = reranker(top_n=2)

    assert texts(rerank.compress_documents(documents("a", "b", "c"), "q")) == ["b", "c"]
    assert texts(rerank.compress_documents(documents("a", "b", "c"), "q", top_n=1)) == ["b"]
    assert rerank.compress_documents(documents("a", "b", "c"), "q", top_n=0) == []


def test_the_threshold_is_looked_at_before_top_n():
    rerank = reranker(score_threshold=0.6, top_n=2)

    assert texts(rerank.compress_documents(documents("a", "b", "c"), "q")) == ["b"]


def test_a_threshold_per_call_of_zero_or_none_keeps_all():
    rerank = reranker(score_threshold=0.6)

    assert len(rerank.compress_documents(documents("a", "b"), "q", score_threshold=0.0)) == 2
    assert len(rerank.compress_documents(documents("a", "b"), "q", score_threshold=None)) == 2
    assert len(rerank.compress_documents(documents("a", "b"), "q", score_threshold=0.95)) == 0


@pytest.mark.parametrize(
    "wrong", [{"top_n": -1}, {"top_n": 2.5}, {"top_n": "3"}, {"score_threshold": 1.5}, {"score_threshold": math.nan}]
)
def test_a_wrong_override_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        reranker().compress_documents(documents("a"), "q", **wrong)


def test_swapped_arguments_are_noticed():
    with pytest.raises(TypeError, match="query is list and documents is str"):
        reranker().rerank(["a"], "q")
    with pytest.raises(TypeError, match="query is list and documents is str"):
        reranker().compress_documents("q", documents("a"))


def test_what_is_no_document_is_refused_not_dropped():
    with pytest.raises(TypeError, match=r"documents\[1\] is str, not a Document; for texts use rerank"):
        reranker().compress_documents([Document("a"), "b"], "q")
    with pytest.raises(TypeError, match=r"documents\[0\] is dict, neither a Document nor a text"):
        reranker().rerank("q", [{"text": "a"}])
    with pytest.raises(TypeError, match="documents is Document"):
        reranker().rerank("q", Document("a"))


async def test_what_is_no_document_is_refused_when_awaited():
    with pytest.raises(TypeError, match="not a Document"):
        await reranker().acompress_documents(["a"], "q")


def test_a_numpy_retrieval_score_counts():
    given_documents = [Document("a", metadata={"retrieval_score": np.float32(3)}), Document("b")]
    ranked = reranker(retrieval_weight=1.0).compress_documents(given_documents, "q")

    assert all("blended_score" in document.metadata for document in ranked)


def test_somebody_elses_metadata_of_the_same_name_stays():
    document = Document("b", metadata={"relevance_score": 0.9, "truncated": "by hand"})
    [ranked] = reranker().compress_documents([document], "q")

    assert ranked.metadata["truncated"] == "by hand"


def test_a_stage_whose_score_was_changed_since_is_of_unknown_origin():
    [first] = reranker().compress_documents([Document("b")], "q")
    first.metadata["relevance_score"] = 0.1
    [second] = reranker().compress_documents([first], "q")

    assert second.metadata["stage_scores"][0] == {"backend": None, "model": None, "score": 0.1}


def test_warmup_reaches_every_stage():
    class Loading(LengthBackend):
        def warmup(self):
            loaded.append(self.model)

    loaded = []
    Reranker(backend=Loading(model="large"), after=Reranker(backend=Loading(model="small"))).warmup()

    assert loaded == ["small", "large"]


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="topn"):
        reranker(topn=3)


def test_a_second_pass_replaces_the_score_and_keeps_the_first_rank():
    first = reranker().compress_documents(documents("a", "b"), "q")
    second = reranker({"a": 0.8, "b": 0.2}).compress_documents(first, "q")

    assert texts(second) == ["a", "b"]
    assert [document.metadata["relevance_score"] for document in second] == [0.8, 0.2]
    assert [document.metadata["retrieval_rank"] for document in second] == [1, 2]


def test_a_cascade_keeps_every_stages_score():
    first = Reranker(backend=LengthBackend(model="long")).compress_documents(documents("b"), "q")
    [second] = reranker().compress_documents(first, "q")
    [third] = reranker({"b": 0.3}).compress_documents([second], "q")

    assert "stage_scores" not in first[0].metadata
    assert second.metadata["stage_scores"] == [
        {"backend": "length", "model": "long", "score": 0.5},
        {"backend": "scripted", "model": "script", "score": 0.9},
    ]
    assert [stage["score"] for stage in third.metadata["stage_scores"]] == [0.5, 0.9, 0.3]


def test_a_score_of_somebody_else_is_a_stage_of_unknown_origin():
    [ranked] = reranker().compress_documents([Document("b", metadata={"relevance_score": 0.7})], "q")

    assert ranked.metadata["stage_scores"][0] == {"backend": None, "model": None, "score": 0.7}


def test_what_an_earlier_pass_said_about_its_score_does_not_stay():
    first = Reranker(backend=TalkativeBackend()).compress_documents(documents("b"), "q")
    [second] = reranker().compress_documents(first, "q")

    assert "truncated" not in second.metadata


def test_a_ranked_document_equals_one_with_the_same_fields():
    [ranked] = reranker().compress_documents(documents("b"), "q")

    assert ranked == Document(id="id-0", page_content="b", metadata=ranked.metadata)
    assert ranked.model_dump() == Document(id="id-0", page_content="b", metadata=ranked.metadata).model_dump()


def test_retrieval_rank_and_score_of_the_retriever_are_kept():
    given_documents = [Document("b", metadata={"retrieval_rank": 17, "retrieval_score": 4.2}), Document("a")]
    ranked = reranker().compress_documents(given_documents, "q")

    assert ranked[0].metadata["retrieval_rank"] == 17
    assert ranked[0].metadata["retrieval_score"] == 4.2
    assert ranked[1].metadata["retrieval_rank"] == 2


def test_plain_texts_give_results_with_their_index():
    results = reranker().rerank("q", ["a", "b", "c"], top_n=2)

    assert results == [RerankResult(1, 0.9, "b"), RerankResult(2, 0.5, "c")]
    assert results[0].text == "b"


def test_documents_give_results_with_copies():
    [result] = reranker().rerank("q", documents("b"))

    assert result.document.metadata["relevance_score"] == 0.9
    assert result.text == "b"


async def test_awaited_results_are_the_same():
    assert await reranker().arerank("q", ["a", "b"]) == reranker().rerank("q", ["a", "b"])
    assert await reranker().acompress_documents(documents("a", "b"), "q") == reranker().compress_documents(
        documents("a", "b"), "q"
    )


def test_none_and_empty_texts_are_sent_nowhere_and_score_zero():
    rerank = reranker()

    assert rerank.rerank("q", [None, "a", "", " "]) == [
        RerankResult(1, 0.1, "a"),
        RerankResult(0, 0.0, ""),
        RerankResult(2, 0.0, ""),
        RerankResult(3, 0.0, " "),
    ]
    assert rerank.backend._calls == [("q", ["a"])]


def test_a_lone_surrogate_is_replaced_in_the_scored_copy_only():
    rerank = reranker({"x\ufffdy": 0.5})
    [ranked] = rerank.compress_documents([Document("x\ud800y")], "q\udc00")

    assert ranked.page_content == "x\ud800y"
    assert rerank.backend._calls == [("q\ufffd", ["x\ufffdy"])]


def test_emoji_and_chinese_come_back_as_they_were():
    given_documents = documents("🪐 red", "火星是红色的", "e\u0301")
    ranked = Reranker(backend=LengthBackend()).compress_documents(given_documents, "q")

    assert sorted(texts(ranked)) == sorted(texts(given_documents))


def test_five_thousand_documents_and_a_long_one():
    given_documents = [*documents(*(f"text {index}" for index in range(5000))), Document("x" * 1_000_000)]
    ranked = Reranker(backend=LengthBackend()).compress_documents(given_documents, "q")

    assert len(ranked) == 5001
    assert len(ranked[0].page_content) == 1_000_000


async def test_the_event_loop_keeps_ticking_while_a_backend_blocks():
    ticks = []

    async def tick():
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    await Reranker(backend=SlowBackend(seconds=0.4)).acompress_documents(documents("a"), "q")
    ticking.cancel()

    assert len(ticks) > 10
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.3


def test_a_failing_backend_is_not_hidden():
    with pytest.raises(BackendError, match="the model broke"):
        Reranker(backend=BrokenBackend()).compress_documents(documents("a"), "q")


class TestBlend:
    """Ordering by the mix of model and first stage."""

    given: ClassVar = [
        Document("a", metadata={"retrieval_score": 30.0}),
        Document("b", metadata={"retrieval_score": 10.0}),
        Document("c", metadata={"retrieval_score": 20.0}),
    ]

    def test_without_weight_the_model_decides(self):
        ranked = reranker().compress_documents(self.given, "q")

        assert texts(ranked) == ["b", "c", "a"]
        assert all("blended_score" not in document.metadata for document in ranked)

    def test_with_full_weight_the_first_stage_decides(self):
        assert texts(reranker(retrieval_weight=1.0).compress_documents(self.given, "q")) == ["a", "c", "b"]

    def test_the_mix_is_of_z_scores_of_logit_and_retrieval_score(self):
        ranked = reranker(retrieval_weight=0.25).compress_documents(self.given, "q")
        # logits of 0.1, 0.9, 0.5 are -ln 9, ln 9, 0: z-scores -1.2247, 1.2247, 0; of 30, 10, 20: 1.2247, -1.2247, 0
        expected = {"a": -0.5 * 1.224745, "b": 0.5 * 1.224745, "c": 0.0}

        for document in ranked:
            assert document.metadata["blended_score"] == pytest.approx(expected[document.page_content], abs=1e-6)
            assert document.metadata["relevance_score"] == SCORES[document.page_content]

    def test_the_threshold_stays_the_models_own(self):
        assert texts(reranker(retrieval_weight=1.0, score_threshold=0.5).compress_documents(self.given, "q")) == [
            "c",
            "b",
        ]

    def test_a_document_without_retrieval_score_counts_as_average(self):
        ranked = reranker(retrieval_weight=1.0).compress_documents([*self.given, Document("d")], "q")
        [unknown] = [document for document in ranked if document.page_content == "d"]

        assert unknown.metadata["blended_score"] == 0.0

    def test_where_no_document_has_one_the_model_decides_and_says_so(self, caplog):
        ranked = reranker(retrieval_weight=0.5).compress_documents(documents("a", "b"), "q")

        assert texts(ranked) == ["b", "a"]
        assert "blended_score" not in ranked[0].metadata
        assert "retrieval_weight has no effect" in caplog.text

    def test_an_empty_text_does_not_upset_the_others(self):
        empty = Document("", metadata={"retrieval_score": 0.0})
        ranked = reranker(retrieval_weight=0.25).compress_documents([*self.given, empty], "q")

        assert texts(ranked)[0] == "b"
        assert texts(ranked)[-1] == ""


class Recorder(BaseTracer):
    """A tracer that keeps its runs."""

    def __init__(self):
        super().__init__()
        self.roots = []

    def _persist_run(self, run):
        self.roots.append(run)


class AsyncRecorder(AsyncBaseTracer):
    def __init__(self):
        super().__init__()
        self.roots = []

    async def _persist_run(self, run):
        self.roots.append(run)


class TestTrace:
    """One chain run named `rerank`, below whatever run is active."""

    def test_a_run_says_what_was_asked_and_what_came_out(self):
        recorder = Recorder()
        reranker(top_n=1).compress_documents(documents("a", "b"), "red", callbacks=[recorder])
        [run] = recorder.roots

        assert (run.name, run.run_type, run.error) == ("rerank", "chain", None)
        assert run.inputs == {"query": "red", "documents": 2, "backend": "scripted", "model": "script", "top_n": 1}
        assert run.outputs["ids"] == ["id-1"]
        assert run.outputs["scores"] == [0.9]
        assert run.outputs["usage"] == {"units": 2}
        assert run.outputs["latency_ms"] > 0

    async def test_an_awaited_run_is_traced_alike(self):
        recorder = AsyncRecorder()
        await reranker().acompress_documents(documents("a", "b"), "red", callbacks=[recorder])
        [run] = recorder.roots

        assert run.outputs["ids"] == ["id-1", "id-0"]
        assert run.outputs["usage"] == {"units": 2}

    def test_a_failing_backend_marks_the_run_failed(self):
        recorder = Recorder()
        with pytest.raises(BackendError):
            Reranker(backend=BrokenBackend()).compress_documents(documents("a"), "q", callbacks=[recorder])

        assert "the model broke" in recorder.roots[0].error

    async def test_a_failing_awaited_backend_marks_the_run_failed(self):
        recorder = Recorder()
        with pytest.raises(BackendError):
            await Reranker(backend=BrokenBackend()).acompress_documents(documents("a"), "q", callbacks=[recorder])

        assert "the model broke" in recorder.roots[0].error

    def test_passage_texts_are_not_in_the_inputs(self):
        recorder = Recorder()
        reranker({"secret passage": 0.5}).compress_documents(documents("secret passage"), "q", callbacks=[recorder])

        assert "secret passage" not in str(recorder.roots[0].inputs)

    def test_in_a_chain_it_is_a_child_though_nobody_passes_callbacks(self):
        recorder = Recorder()
        chain = RunnableLambda(lambda query: reranker().compress_documents(documents("a", "b"), query), name="outer")
        chain.invoke("q", config={"callbacks": [recorder]})
        [root] = recorder.roots

        assert root.name == "outer"
        assert [child.name for child in root.child_runs] == ["rerank"]

    async def test_in_an_awaited_chain_it_is_a_child_too(self):
        recorder = Recorder()

        async def rank(query):
            return await reranker().acompress_documents(documents("a", "b"), query)

        await RunnableLambda(rank, name="outer").ainvoke("q", config={"callbacks": [recorder]})

        assert [child.name for child in recorder.roots[0].child_runs] == ["rerank"]


TEXT = st.text(max_size=12)
METADATA = st.dictionaries(
    st.text(max_size=5).filter(lambda key: key not in {"relevance_score", "retrieval_rank", "retrieval_score"}),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)),
    max_size=3,
)
DOCUMENTS = st.lists(
    st.builds(
        lambda text, id_, metadata: Document(id=id_, page_content=text, metadata=metadata),
        TEXT,
        st.none() | TEXT,
        METADATA,
    ),
    max_size=8,
)


@given(given_documents=DOCUMENTS, top_n=st.none() | st.integers(0, 9), threshold=st.none() | st.floats(0, 1))
def test_the_output_is_a_sorted_part_of_the_input(given_documents, top_n, threshold):
    before = copy.deepcopy(given_documents)
    rerank = Reranker(backend=LengthBackend(), top_n=top_n, score_threshold=threshold)
    results = rerank.rerank("q", given_documents)
    scores = [result.score for result in results]

    assert scores == sorted(scores, reverse=True)
    assert len({result.index for result in results}) == len(results)
    assert top_n is None or len(results) <= top_n
    assert threshold is None or all(score >= threshold for score in scores)
    assert given_documents == before
    for result in results:
        original = before[result.index]
        assert (result.document.id, result.document.page_content) == (original.id, original.page_content)
        assert original.metadata.items() <= result.document.metadata.items()


@given(given_documents=DOCUMENTS)
def test_with_top_n_none_nothing_is_lost(given_documents):
    results = Reranker(backend=LengthBackend()).rerank("q", given_documents)

    assert sorted(result.index for result in results) == list(range(len(given_documents)))


def test_no_warning_is_raised_by_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reranker().compress_documents(documents("a", "b"), "q")
