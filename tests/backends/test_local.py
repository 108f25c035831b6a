import asyncio
import copy
import logging
import math
import threading
import time

import numpy as np
import pytest
from pydantic import PrivateAttr

from langchain_rerank import Reranker
from langchain_rerank.backends._passages import split_passages
from langchain_rerank.backends.local import Batch, Encoding, LocalBackend, sigmoid
from langchain_rerank.errors import BackendError, ModelLoadError


class Words(LocalBackend):
    """Counts, in a text of words, those that are "gold"; a token is a word."""

    max_length: int = 40
    fits: int = 10**9
    seconds: float = 0.0

    _batches_seen: list = PrivateAttr(default_factory=list)
    _loads: list = PrivateAttr(default_factory=list)
    _running: list = PrivateAttr(default_factory=list)

    def _load(self):
        self._loads.append(threading.get_ident())

    def _encode(self, query, texts):
        asked = self._cut_query([9] * len(query.split()))
        room = self._limit - len(asked)
        encodings = []
        for text in texts:
            ids = [2 if word.strip(".") == "gold" else 1 for word in text.split()]
            encodings.append(Encoding([*asked, *ids[:room]], truncated=len(ids) > room, room=room))
        return encodings

    def _offsets(self, text):
        offsets, position = [], 0
        for word in text.split():
            start = text.index(word, position)
            position = start + len(word)
            offsets.append((start, position))
        return offsets

    def _forward(self, batch: Batch):
        if batch.ids.size > self.fits:
            raise MemoryError
        self._running.append(1)
        assert len(self._running) == 1, "two callers in the model at once"
        time.sleep(self.seconds)
        self._running.pop()
        self._batches_seen.append(batch)
        return ((batch.ids == 2) * batch.mask).sum(axis=1).astype(np.float32)


def seen(backend):
    return [batch.ids.shape for batch in backend._batches_seen]


def test_the_score_is_the_sigmoid_of_the_logit():
    assert Words().score("q", ["gold gold", "lead"]) == [sigmoid(2), 0.5]
    assert Words().logits("q", ["gold gold", "lead"]) == [2.0, 0.0]


def test_large_logits_do_not_collapse_into_ties():
    assert 0.5 < sigmoid(17) < sigmoid(18) < sigmoid(30) < 1
    assert 0 < sigmoid(-700) < sigmoid(-18) < 0.5
    assert math.isnan(sigmoid(math.nan))


def test_the_raw_logit_is_added_when_asked_for():
    [result] = Reranker(backend=Words(return_logits=True)).compress_documents([_document("gold")], "q")

    assert result.metadata["relevance_logit"] == 1.0


def test_it_loads_once_and_not_before_it_is_asked():
    backend = Words()
    assert backend._loads == []

    backend.warmup()
    backend.score("q", ["gold"])

    assert len(backend._loads) == 1


def test_batches_are_longest_first_and_within_the_token_budget():
    backend = Words(batch_tokens=12)
    backend.score("q", ["a", "a a a a a", "a a", "a a a a a", "a a a"])

    assert seen(backend) == [(2, 6), (3, 4)]


def test_a_pair_over_the_budget_still_runs_alone():
    backend = Words(batch_tokens=2)
    backend.score("q", ["a a a", "a a"])

    assert seen(backend) == [(1, 4), (1, 3)]


def test_batch_size_bounds_the_pairs_of_a_batch():
    backend = Words(batch_size=2)
    backend.score("q", ["a"] * 2 + ["a a"] * 3)

    assert [len(batch) for batch in backend._batches_seen] == [2, 2, 1]


def test_padding_is_masked():
    backend = Words()
    backend.score("q", ["gold gold gold", "gold"])
    [batch] = backend._batches_seen

    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.ids.tolist() == [[9, 2, 2, 2], [9, 2, 0, 0]]


def test_out_of_memory_halves_the_batch_and_loses_nothing(caplog):
    backend = Words(fits=8)
    texts = ["gold " * count for count in (3, 1, 2, 3, 0, 1)]

    assert backend.logits("q", [text or "lead" for text in texts]) == [3, 1, 2, 3, 0, 1]
    assert max(batch.ids.size for batch in backend._batches_seen) <= 8
    assert "out of memory" in caplog.text


def test_after_running_out_of_memory_batches_stay_small(caplog):
    backend = Words(fits=8)
    backend.score("q", ["gold gold gold"] * 8)
    before = len(caplog.records)
    backend.score("q", ["gold gold gold"] * 8)

    assert len(caplog.records) == before


def test_one_pair_that_does_not_fit_is_an_error_with_a_remedy():
    with pytest.raises(BackendError, match="ran out of memory with one pair of 4 tokens; lower max_length"):
        Words(fits=2).score("q", ["a a a"])


def test_a_long_query_keeps_three_quarters_and_says_so(caplog):
    backend = Words()
    [encoding] = backend._encode("why " * 99, ["gold " * 99])

    assert list(encoding.ids).count(9) == 30
    assert list(encoding.ids).count(2) == 10
    assert "query of 99 tokens was cut to 30" in caplog.text


def test_a_cut_document_says_so_in_metadata_and_once_in_the_log(caplog):
    reranker = Reranker(backend=Words())
    for _ in range(2):
        ranked = reranker.compress_documents([_document("lead " * 60), _document("gold")], "q")

    assert [document.metadata.get("truncated") for document in ranked] == [None, True]
    assert len([record for record in caplog.records if "were cut" in record.message]) == 1


HIDDEN = "The mine is old. " * 30 + "Here is the gold."


def test_an_answer_at_the_end_of_a_long_document_is_found_by_max_passage_only():
    truncating, reading = Words(), Words(long_documents="max_passage")

    assert truncating.logits("q", [HIDDEN]) == [0.0]
    assert truncating.score("q", [HIDDEN]) == [0.5]
    assert reading.score("q", [HIDDEN]) == [sigmoid(1)]


def test_max_passage_says_which_passage_it_was():
    [ranked] = Reranker(backend=Words(long_documents="max_passage")).compress_documents([_document(HIDDEN)], "q")
    start, end = ranked.metadata["passage_span"]

    assert "gold" in HIDDEN[start:end]
    assert HIDDEN[start:end].startswith("The mine")
    assert "truncated" not in ranked.metadata
    assert ranked.page_content == HIDDEN


def test_max_passage_leaves_short_documents_alone():
    [ranked] = Reranker(backend=Words(long_documents="max_passage")).compress_documents([_document("gold")], "q")

    assert "passage_span" not in ranked.metadata


def test_passages_are_scored_in_the_same_batches():
    backend = Words(long_documents="max_passage", batch_tokens=4096)
    backend.score("q", [HIDDEN, "gold", HIDDEN + " The end."])

    assert len(backend._batches_seen) == 1


def test_a_max_length_above_what_the_model_reads_is_refused():
    backend = Words(max_length=40)
    with pytest.raises(ModelLoadError, match="max_length=40, but 'words' reads at most 32 tokens"):
        backend._set_longest(32)


def test_the_default_max_length_gives_way_to_the_model():
    backend = Words()
    backend._set_longest(32)

    assert backend._limit == 32
    assert len(backend._encode("q", ["gold " * 99])[0].ids) == 32


async def test_the_event_loop_ticks_while_it_scores():
    backend, ticks = Words(seconds=0.3), []

    async def tick():
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    await backend.ascore("q", ["gold"])
    ticking.cancel()

    assert len(ticks) > 8


async def test_awaiting_does_not_wait_for_a_caller_in_another_thread_on_the_loop():
    backend, started = Words(seconds=0.4), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), backend.score("q", ["gold"])))
    thread.start()
    started.wait()
    await asyncio.sleep(0.05)
    task = asyncio.create_task(backend.ascore("q", ["gold"]))
    before = time.perf_counter()
    await asyncio.sleep(0.01)

    assert time.perf_counter() - before < 0.2
    assert await task == [sigmoid(1)]
    thread.join()


async def test_callers_take_turns_in_the_model():
    backend = Words(seconds=0.01)
    scores = await asyncio.gather(*(backend.ascore("q", ["gold " * (i % 3 + 1)]) for i in range(12)))

    assert scores == [[sigmoid(i % 3 + 1)] for i in range(12)]
    assert len(backend._loads) == 1


class Overlapping(Words):
    """Computes elsewhere, as on a GPU: a large call is tokenised in parts."""

    batch_tokens: int | None = 20
    _encoded: list = PrivateAttr(default_factory=list)

    def _overlaps(self):
        return True

    def _encode(self, query, texts):
        self._encoded.append((len(texts), len(self._batches_seen)))
        return super()._encode(query, texts)


REQUESTS = [("q", ["gold " * (i % 4) + "lead " * (9 + i) for i in range(12)]), ("r", []), ("a b", ["gold"])]


def test_a_large_call_in_parts_gives_the_same():
    parts, whole = Overlapping(), Words()
    parts.warmup()

    assert parts.score_many(REQUESTS) == whole.score_many(REQUESTS)
    assert len(parts._encoded) > 4
    assert sum(count for count, _ in parts._encoded) == 1 + 13


async def test_an_awaited_large_call_in_parts_gives_the_same():
    parts, whole = Overlapping(), Words()
    parts.warmup()

    assert await parts.ascore_many(REQUESTS) == whole.score_many(REQUESTS)
    assert len(parts._encoded) > 4


def test_the_model_reads_the_first_part_while_the_last_is_tokenised():
    class Slow(Overlapping):
        def _encode(self, query, texts):
            time.sleep(0.05)
            return super()._encode(query, texts)

    backend = Slow()
    backend.warmup()
    backend.score("q", ["lead " * 10] * 20)

    assert backend._encoded[1][1] == 1
    assert backend._encoded[-1][1] > 1


def test_parts_keep_usage_and_passages_of_long_documents():
    from langchain_rerank.backends.base import collect_usage

    texts = ["lead " * 60, "lead " * 50 + "gold", "gold", "lead " * 99]
    found = []
    for backend in (Overlapping(long_documents="max_passage"), Words(long_documents="max_passage")):
        backend.warmup()
        with collect_usage() as usage:
            scores = backend.score("q", texts)
        found.append((scores, [score.details for score in scores], usage))

    assert found[0] == found[1]


def test_a_large_call_has_a_hundred_parts_at_most():
    backend = Overlapping(batch_tokens=1)
    backend.warmup()
    backend.score("q", ["lead " * 4] * 5000)

    assert 50 < len(backend._encoded) - 1 <= 101


def test_a_call_that_loads_the_model_is_tokenised_at_once():
    backend = Overlapping()
    backend.score("q", ["lead " * 10] * 20)

    assert [count for count, _ in backend._encoded] == [20]


def test_a_copy_has_its_own_lock_and_nothing_loaded():
    backend = Words()
    backend.score("q", ["gold"])
    twin = copy.deepcopy(backend)

    assert twin._loads == []
    assert twin._lock is not backend._lock


def test_a_failed_load_is_tried_again():
    class Flaky(Words):
        def _load(self):
            super()._load()
            if len(self._loads) == 1:
                raise ModelLoadError("the disk was full")

    backend = Flaky()
    with pytest.raises(ModelLoadError):
        backend.score("q", ["gold"])

    assert backend.score("q", ["gold"]) == [sigmoid(1)]


def test_tokens_are_counted_in_the_usage():
    from langchain_rerank.backends.base import collect_usage

    with collect_usage() as usage:
        Words().score("q", ["gold gold", "lead " * 99])

    assert usage == {"tokens": 3 + 40, "truncated": 1}


def test_a_passage_that_has_more_tokens_by_itself_is_split_again():
    class Bare(Words):
        """A word is one token within a text, and three at a passage's start."""

        def _encode(self, query, texts):
            grown = [f"{text.split()[0]} {text.split()[0]} {text}" for text in texts]
            return super()._encode(query, grown)

    scores = Bare(long_documents="max_passage", passage_overlap=0).score("q", ["lead " * 38 + "gold " + "lead " * 60])

    assert scores[0] > 0.5
    assert "truncated" not in scores[0].details


def test_a_passage_that_cannot_be_read_whole_says_so():
    class Growing(Words):
        """Every passage has more tokens than fit."""

        def _encode(self, query, texts):
            return [Encoding([9, 1], truncated=True, room=1) for _ in texts]

    [score] = Growing(long_documents="max_passage").score("q", ["one two"])

    assert score.details["truncated"] is True


@pytest.mark.parametrize("logit", [math.inf, -math.inf, math.nan])
def test_an_overflow_is_no_perfect_score(logit):
    class Overflowing(Words):
        def _forward(self, batch):
            return np.full(len(batch), logit)

    with pytest.raises(BackendError, match="returned nan for text 0"):
        Overflowing().score("q", ["gold"])


class TestPassages:
    """Splitting at sentence ends."""

    text = "One two three four. Five six seven. Eight nine ten eleven twelve. Thirteen fourteen."

    def split(self, text, size, overlap):
        return [text[a:b] for a, b in split_passages(text, Words()._offsets(text), size=size, overlap=overlap)]

    def test_a_passage_ends_with_a_sentence(self):
        assert self.split(self.text, 8, 0) == [
            "One two three four. Five six seven.",
            "Eight nine ten eleven twelve. Thirteen fourteen.",
        ]

    def test_neighbours_overlap_at_a_sentence_start(self):
        assert self.split(self.text, 8, 4)[1].startswith("Five six seven. Eight")

    def test_without_sentences_it_cuts_at_the_size(self):
        assert self.split("a b c d e f g", 3, 0) == ["a b c", "d e f", "g"]

    def test_without_sentences_neighbours_share_the_overlap(self):
        assert self.split("a b c d e f", 4, 2) == ["a b c d", "c d e f"]

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 50])
    @pytest.mark.parametrize("overlap", [0, 1, 3, 40])
    def test_passages_cover_everything_within_the_size(self, size, overlap):
        offsets = Words()._offsets(self.text)
        spans = split_passages(self.text, offsets, size=size, overlap=overlap)
        covered = {token for token in offsets if any(start <= token[0] and token[1] <= end for start, end in spans)}

        assert covered == set(offsets)
        for start, end in spans:
            assert sum(start <= a and b <= end for a, b in offsets) <= size

    def test_chinese_sentences_end_without_a_space(self):
        text = "火星是红色的。木星很大。金星很热。"
        spans = split_passages(text, [(i, i + 1) for i in range(len(text))], size=8, overlap=0)

        assert [text[a:b] for a, b in spans] == ["火星是红色的。", "木星很大。", "金星很热。"]


def _document(text):
    from langchain_core.documents import Document

    return Document(page_content=text)


def test_warnings_are_logged_by_this_package_and_not_printed(capsys, caplog):
    with caplog.at_level(logging.WARNING, logger="langchain_rerank"):
        Words().score("q " * 99, ["gold"])

    assert capsys.readouterr().out == ""
    assert caplog.records[0].name.startswith("langchain_rerank")
