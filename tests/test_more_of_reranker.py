"""Metadata that is read, many queries, the cache, cascades, near-duplicates, and where else a Reranker fits."""

import json
import math

import pytest
from fakes import LengthBackend, ScriptedBackend
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_classic.storage import LocalFileStore
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_core.stores import InMemoryByteStore
from pydantic import PrivateAttr
from test_reranker import Recorder

from langchain_rerank import Reranker, init_reranker
from langchain_rerank._duplicates import first_of_each
from langchain_rerank.backends.base import Backend, Score
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.backends.local import LocalBackend
from langchain_rerank.errors import BackendError, ConfigurationError

SCORES = {"a": 0.1, "b": 0.9, "c": 0.5}


def reranker(scores=SCORES, **options):
    return Reranker(backend=ScriptedBackend(scores=scores), **options)


def texts(results):
    return [result.page_content if isinstance(result, Document) else result.text for result in results]


class TestMetadataFields:
    def test_the_model_reads_them_before_the_text_and_the_text_stays(self):
        rerank = reranker({"Mars\nred, iron\nIt is red.": 0.7}, metadata_fields=("title", "tags"))
        document = Document("It is red.", metadata={"title": "Mars", "tags": ["red", "iron"]})
        [ranked] = rerank.compress_documents([document], "q")

        assert ranked.page_content == "It is red."
        assert ranked.metadata["relevance_score"] == 0.7

    def test_a_field_that_is_not_there_is_left_out(self):
        rerank = reranker({"Mars\nx": 0.7, "y": 0.6}, metadata_fields=("title", "none"))
        documents = [Document("x", metadata={"title": "Mars", "none": None}), Document("y")]

        assert texts(rerank.compress_documents(documents, "q")) == ["x", "y"]

    def test_the_same_text_under_two_titles_is_two_texts(self):
        rerank = reranker({"A\nx": 0.1, "B\nx": 0.9}, metadata_fields=("title",))
        documents = [Document("x", metadata={"title": "A"}), Document("x", metadata={"title": "B"})]

        assert [d.metadata["title"] for d in rerank.compress_documents(documents, "q")] == ["B", "A"]

    def test_a_passage_is_counted_in_the_documents_own_text(self):
        class Spanning(Backend):
            def _score(self, query, texts):
                return [Score(0.5, {"passage_span": [text.index("gold"), len(text)]}) for text in texts]

        document = Document("some gold", metadata={"title": "Mine"})
        [ranked] = Reranker(backend=Spanning(), metadata_fields=("title",)).compress_documents([document], "q")

        assert ranked.metadata["passage_span"] == [5, 9]

    def test_config_takes_a_list(self):
        assert init_reranker({"backend": "embedded", "metadata_fields": ["title"]}).metadata_fields == ("title",)


class TestMany:
    def test_each_query_gets_its_own_results(self):
        rerank = reranker()
        found = rerank.rerank_many(["one", "two", "three"], [["a", "b"], [], ["c", "a", "b"]], top_n=2)

        assert [texts(results) for results in found] == [["b", "a"], [], ["b", "c"]]
        assert [result.index for result in found[2]] == [2, 0]

    async def test_awaited_it_is_the_same(self):
        arguments = (["one", "two"], [["a", "b"], ["c", "a", "b"]])

        assert await reranker().arerank_many(*arguments) == reranker().rerank_many(*arguments)

    def test_a_local_model_takes_all_queries_in_one_pass(self):
        class Counting(LocalBackend):
            _sizes: list = PrivateAttr(default_factory=list)

            def _load(self):
                pass

            def _encode(self, query, texts):
                from langchain_rerank.backends.local import Encoding

                return [Encoding([len(query), len(text)]) for text in texts]

            def _forward(self, batch):
                self._sizes.append(len(batch))
                return batch.ids[:, 1] / 10

            def _offsets(self, text):
                return []

        backend = Counting()
        queries, documents = ["q"] * 5, [["x" * n, "y"] for n in range(1, 6)]
        many = Reranker(backend=backend).rerank_many(queries, documents)

        assert backend._sizes == [10]
        assert many == [Reranker(backend=Counting()).rerank("q", several) for several in documents]

    def test_more_queries_than_fit_at_once_are_all_answered(self):
        found = reranker().rerank_many(["q"] * 70, [["a", "b"]] * 70)

        assert [texts(results) for results in found] == [["b", "a"]] * 70

    def test_unequal_lists_are_refused(self):
        with pytest.raises(ConfigurationError, match="2 queries, but 1 lists of documents"):
            reranker().rerank_many(["one", "two"], [["a"]])

    def test_one_failing_query_fails_the_call(self):
        class Failing(LengthBackend):
            def _score(self, query, texts):
                if query == "bad":
                    raise BackendError("the model broke")
                return super()._score(query, texts)

        with pytest.raises(BackendError, match="the model broke"):
            Reranker(backend=Failing()).rerank_many(["good", "bad"], [["a"], ["b"]])

    def test_it_is_traced_as_one_run(self):
        recorder = Recorder()
        reranker().rerank_many(["one", "two"], [["a"], ["b", "c"]], callbacks=[recorder])
        [run] = recorder.roots

        assert run.name == "rerank_many"
        assert run.inputs["documents"] == [1, 2]
        assert [query["scores"] for query in run.outputs["queries"]] == [[0.1], [0.9, 0.5]]

    def test_progress_goes_to_standard_error(self, capsys):
        reranker().rerank_many(["one"], [["a"]], progress=True)
        out, err = capsys.readouterr()

        assert out == ""
        assert "Reranking" in err


@pytest.fixture(params=["memory", "files"])
def store(request, tmp_path):
    return InMemoryByteStore() if request.param == "memory" else LocalFileStore(tmp_path)


class Cutting(Backend):
    """Says the same of every text."""

    _details: dict = PrivateAttr()
    _calls: list = PrivateAttr(default_factory=list)

    def __init__(self, details, **options):
        super().__init__(**options)
        self._details = details

    def _score(self, query, texts):
        self._calls.append(texts)
        return [Score(0.5, self._details) for _ in texts]


class TestCache:
    def test_a_score_is_asked_for_once(self, store):
        rerank = reranker(cache=store)
        first = rerank.rerank("q", ["a", "b"])
        second = rerank.rerank("q", ["b", "c", "a"])

        assert rerank.backend._calls == [("q", ["a", "b"]), ("q", ["c"])]
        assert texts(first) == ["b", "a"]
        assert texts(second) == ["b", "c", "a"]
        assert [result.score for result in second] == [0.9, 0.5, 0.1]

    async def test_awaited_it_is_the_same(self, store):
        rerank = reranker(cache=store)
        await rerank.arerank("q", ["a", "b"])
        found = await rerank.arerank("q", ["a", "b", "c"])

        assert rerank.backend._calls == [("q", ["a", "b"]), ("q", ["c"])]
        assert texts(found) == ["b", "c", "a"]

    def test_it_outlives_the_reranker(self, store):
        reranker(cache=store).rerank("q", ["a"])
        another = reranker(cache=store)
        another.rerank("q", ["a"])

        assert another.backend._calls == []

    def test_another_query_text_model_or_option_is_another_entry(self, store):
        reranker(cache=store).rerank("q", ["a"])
        for other in (
            Reranker(backend=ScriptedBackend(scores=SCORES, model="other"), cache=store),
            Reranker(backend=ScriptedBackend(scores={**SCORES, "a": 0.2}), cache=store),
        ):
            other.rerank("q", ["a"])
            assert len(other.backend._calls) == 1
        same = reranker(cache=store)
        same.rerank("q2", ["a"])
        same.rerank("q", ["b"])
        assert len(same.backend._calls) == 2

    def test_a_text_and_a_query_do_not_run_together(self, store):
        rerank = reranker({"bc": 0.1, "c": 0.9}, cache=store)
        rerank.rerank("a", ["bc"])

        assert rerank.rerank("ab", ["c"])[0].score == 0.9

    def test_options_that_change_no_score_share_entries(self, store):
        reranker(cache=store).rerank("q", ["a"])
        patient = Reranker(backend=ScriptedBackend(scores=SCORES, max_attempts=9), cache=store)
        patient.rerank("q", ["a"])

        assert patient.backend._calls == []

    @pytest.mark.parametrize(
        "corrupt", [b"", b"1234567", b"\xff" * 8, b"\x00" * 9, b"\x00\x00\x00\x00\x00\x00\x24\x40"]
    )
    def test_a_corrupt_entry_is_a_miss(self, corrupt):
        store = InMemoryByteStore()
        rerank = reranker(cache=store)
        rerank.rerank("q", ["a"])
        [key] = store.store
        store.store[key] = corrupt

        assert rerank.rerank("q", ["a"])[0].score == 0.1
        assert len(rerank.backend._calls) == 2

    async def test_a_store_that_is_down_costs_a_warning_and_not_the_ranking(self, caplog):
        class Down(InMemoryByteStore):
            def mget(self, keys):
                raise ConnectionError("redis://localhost:6379 refused")

            def mset(self, key_value_pairs):
                raise ConnectionError("redis://localhost:6379 refused")

        rerank = reranker(cache=Down())

        assert texts(rerank.rerank("q", ["a", "b"])) == ["b", "a"]
        assert texts(await rerank.arerank("q", ["a", "b"])) == ["b", "a"]
        refused = "ConnectionError: redis://localhost:6379 refused"
        for what in ("read", "write"):
            said = f"Down cannot {what} scores, and the ranking goes on without it: {refused}"
            assert [record.message for record in caplog.records].count(said) == 2

    def test_values_are_eight_bytes_under_hexadecimal_keys(self):
        store = InMemoryByteStore()
        reranker(cache=store).rerank("q", ["a"])
        [(key, value)] = store.store.items()

        assert len(value) == 8
        assert len(key) == 64
        assert int(key, 16)

    def test_a_score_is_kept_with_its_details(self, store):
        rerank = Reranker(backend=Cutting({"truncated": True, "passage_span": [3, 9]}), cache=store)
        first, second = rerank.compress_documents([Document("a")], "q"), rerank.compress_documents([Document("a")], "q")

        assert first == second
        assert second[0].metadata["truncated"] is True
        assert second[0].metadata["passage_span"] == [3, 9]
        assert len(rerank.backend._calls) == 1

    @pytest.mark.parametrize("where", [{1, 2}, (1, 2), {1: 2}, math.nan])
    def test_a_score_whose_details_json_would_change_is_not_kept(self, store, where):
        rerank = Reranker(backend=Cutting({"where": where}), cache=store)
        for _ in range(2):
            [ranked] = rerank.compress_documents([Document("a")], "q")
            assert repr(ranked.metadata["where"]) == repr(where)
        assert len(rerank.backend._calls) == 2

    def test_details_do_not_say_another_score(self, store):
        rerank = Reranker(backend=Cutting({"relevance_score": 0.9}), cache=store)
        for _ in range(2):
            [ranked] = rerank.compress_documents([Document("a")], "q")
            assert ranked.metadata["relevance_score"] == 0.5

    @pytest.mark.parametrize("tail", [b"{", b"[1]", b"\xff", b"{} {}", b"[" * 100_000])
    def test_details_that_cannot_be_read_are_a_miss(self, store, tail):
        rerank = Reranker(backend=Cutting({"truncated": True}), cache=store)
        rerank.rerank("q", ["a"])
        store.mset([(key, store.mget([key])[0][:8] + tail) for key in store.yield_keys()])
        rerank.rerank("q", ["a"])

        assert len(rerank.backend._calls) == 2

    def test_hits_are_counted_in_the_trace(self, store):
        rerank, recorder = reranker(cache=store), Recorder()
        rerank.rerank("q", ["a"])
        rerank.rerank("q", ["a", "b"], callbacks=[recorder])

        assert recorder.roots[0].outputs["usage"] == {"cache_hits": 1, "cache_misses": 1, "units": 1}

    def test_a_torch_model_is_known_by_its_files_dtype_and_device(self, tiny_bert, tmp_path):
        import shutil

        def key(**options):
            return CrossEncoderBackend(
                **{"model": tiny_bert, "device": "cpu", "dtype": "float32", **options}
            ).fingerprint()

        copied = shutil.copytree(tiny_bert, tmp_path / "model")
        before = key(model=str(copied))
        assert before["files"] == key()["files"]
        assert key()["device"] == "cpu"
        assert key()["dtype"] == "float32"
        assert key(dtype="auto")["dtype"] in ("float32", "bfloat16")
        assert key(dtype="bfloat16") != key()
        assert key(batch_size=3) == key()
        (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
        assert key(model=str(copied))["files"] != before["files"]

    def test_the_embedded_model_is_known_by_its_files(self):
        assert len(EmbeddedBackend().fingerprint()["files"]) == 64
        assert EmbeddedBackend(threads=1).fingerprint() == EmbeddedBackend().fingerprint()

    def test_patience_and_limits_of_a_service_share_entries(self):
        from langchain_core.rate_limiters import InMemoryRateLimiter

        from langchain_rerank.backends.remote import RemoteBackend

        plain = RemoteBackend(url="http://localhost/v1/rerank")
        patient = RemoteBackend(
            url="http://localhost/v1/rerank", timeout=99, max_concurrency=2, rate_limiter=InMemoryRateLimiter()
        )

        assert patient.fingerprint() == plain.fingerprint()

    def test_no_secret_is_in_a_fingerprint(self):
        from pydantic import SecretStr

        class Keyed(LengthBackend):
            api_key: SecretStr = SecretStr("sk-1")
            headers: dict[str, SecretStr] = {}  # noqa: RUF012

        backend = Keyed(api_key="sk-2", headers={"x": "sk-3"})

        assert "sk-" not in json.dumps(backend.fingerprint())


class TestCascade:
    def test_a_list_is_a_cascade(self):
        first = ScriptedBackend(scores={"a": 0.8, "b": 0.7, "c": 0.1}, model="small")
        rerank = init_reranker(
            [Reranker(backend=first, top_n=2), ScriptedBackend(scores={"a": 0.3, "b": 0.6}, model="large")], top_n=1
        )
        [ranked] = rerank.compress_documents([Document(text, id=text) for text in "cab"], "q")

        assert rerank.backend._calls == [("q", ["a", "b"])]
        assert ranked.id == "b"
        assert ranked.metadata["relevance_score"] == 0.6
        assert ranked.metadata["retrieval_rank"] == 3
        assert ranked.metadata["stage_scores"] == [
            {"backend": "scripted", "model": "small", "score": 0.7},
            {"backend": "scripted", "model": "large", "score": 0.6},
        ]

    async def test_indices_point_into_the_first_input(self):
        rerank = init_reranker([Reranker(backend=LengthBackend(), top_n=2), LengthBackend()])
        expected = [(3, "eeee"), (1, "ccc")]

        assert [(r.index, r.text) for r in rerank.rerank("q", ["a", "ccc", "", "eeee"])] == expected
        assert [(r.index, r.text) for r in await rerank.arerank("q", ["a", "ccc", "", "eeee"])] == expected
        [many] = rerank.rerank_many(["q"], [["a", "ccc", "", "eeee"]])
        assert [(r.index, r.text) for r in many] == expected
        [many] = await rerank.arerank_many(["q"], [["a", "ccc", "", "eeee"]])
        assert [(r.index, r.text) for r in many] == expected

    def test_mappings_names_and_files_make_stages(self, tmp_path):
        path = tmp_path / "cascade.yaml"
        path.write_text("- backend: embedded\n  top_n: 20\n- backend: bge:BAAI/bge-reranker-v2-m3\n  top_n: 5\n")
        rerank = init_reranker(path)

        assert (rerank.backend.name, rerank.top_n) == ("bge", 5)
        assert (rerank.after.backend.name, rerank.after.top_n) == ("embedded", 20)

    def test_a_cascade_within_a_cascade_keeps_every_stage(self):
        one, two, three = (LengthBackend(model=name) for name in "abc")
        for nested in (init_reranker([[one, two], three]), init_reranker([one, init_reranker([two, three])])):
            assert [nested.after.after.backend.model, nested.after.backend.model, nested.backend.model] == [
                "a",
                "b",
                "c",
            ]

    def test_an_empty_list_is_refused(self):
        with pytest.raises(ConfigurationError, match="the list is empty"):
            init_reranker([])

    def test_a_typo_in_a_stage_is_named(self):
        with pytest.raises(ConfigurationError, match="Did you mean 'top_n'"):
            init_reranker([{"backend": "embedded", "topn": 20}, "embedded"])

    def test_two_in_a_document_compressor_pipeline_are_a_cascade(self):
        first = reranker({"a": 0.8, "b": 0.7, "c": 0.1}, top_n=2)
        pipeline = DocumentCompressorPipeline(transformers=[first, reranker()])
        ranked = pipeline.compress_documents([Document(text) for text in "abc"], "q")

        assert texts(ranked) == ["b", "a"]
        assert [stage["score"] for stage in ranked[0].metadata["stage_scores"]] == [0.7, 0.9]


SAME = [
    "The red planet is Mars, they say.",
    "the RED planet is mars -- they say",
    "Jupiter is the largest planet of all.",
]


class TestDuplicates:
    def test_the_same_text_takes_one_place_and_says_for_whom(self):
        rerank = Reranker(backend=LengthBackend(), duplicate_similarity=1.0, top_n=2)
        ranked = rerank.compress_documents([Document(text, id=str(i)) for i, text in enumerate(SAME)], "q")

        assert [document.id for document in ranked] == ["2", "1"]
        assert ranked[1].metadata["near_duplicates"] == [{"id": "0", "retrieval_rank": 1}]
        assert "near_duplicates" not in ranked[0].metadata

    def test_off_by_default(self):
        assert len(Reranker(backend=LengthBackend()).compress_documents([Document(text) for text in SAME], "q")) == 3

    def test_the_freed_place_goes_to_the_next(self):
        documents = [Document(text) for text in [*SAME, "Venus."]]
        rerank = Reranker(backend=LengthBackend(), duplicate_similarity=1.0, top_n=3)

        assert texts(rerank.compress_documents(documents, "q"))[2] == "Venus."

    def test_nearly_the_same_is_a_matter_of_degree(self):
        almost = "one two three four five six seven eight nine ten"
        changed = almost.replace("ten", "eleven")  # 7 of 9 different runs of three are shared

        assert first_of_each([almost, changed], 7 / 9) == [0, 0]
        assert first_of_each([almost, changed], 7 / 9 + 0.01) == [0, 1]

    def test_short_and_chinese_texts_too(self):
        assert first_of_each(["Yes.", "yes", "no"], 1.0) == [0, 0, 2]
        assert first_of_each(["火星是红色的行星。", "火星是红色的行星", "木星是最大的行星"], 0.9) == [0, 0, 2]

    def test_thousands_are_compared_in_reasonable_time(self):
        import time

        texts = [" ".join(f"w{(7 * i + j) % 9973}" for j in range(60)) for i in range(3000)]
        start = time.perf_counter()
        first_of_each(texts, 0.9)

        assert time.perf_counter() - start < 10  # pair by pair it took 20 s for texts like these

    def test_it_stops_when_the_places_are_taken(self):
        assert first_of_each(["a", "b", "c", "a"], 1.0, most=2) == [0, 1]


class TestElsewhere:
    def test_as_a_step_of_a_chain(self):
        chain = RunnableLambda(lambda query: {"query": query, "documents": [Document(t) for t in "abc"]}) | (
            reranker(top_n=2).as_runnable()
        )

        assert texts(chain.invoke("q")) == ["b", "c"]

    async def test_as_an_awaited_step_with_its_own_top_n(self):
        step = reranker(top_n=2).as_runnable()
        asked = {"query": "q", "documents": [Document(t) for t in "abc"], "top_n": 1}

        assert texts(await step.ainvoke(asked)) == ["b"]

    def test_a_step_refuses_what_it_does_not_know(self):
        with pytest.raises(ConfigurationError, match="not docs, query"):
            reranker().as_runnable().invoke({"query": "q", "docs": []})

    def test_as_langchains_cross_encoder(self):
        encoder = reranker().as_cross_encoder()
        pairs = [("q", "a"), ("p", "b"), ("q", "c")]

        assert encoder.score(pairs) == [0.1, 0.9, 0.5]
        assert encoder.score([]) == []
        ranked = CrossEncoderReranker(model=encoder, top_n=1).compress_documents([Document(t) for t in "abc"], "q")
        assert texts(ranked) == ["b"]
