import hashlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from langchain_rerank import _export, init_reranker
from langchain_rerank.backends._cpus import allowed_cpus
from langchain_rerank.backends.embedded import EmbeddedBackend, _default_threads
from langchain_rerank.data import EMBEDDED_MODEL
from langchain_rerank.errors import ConfigurationError, ModelLoadError
from langchain_rerank.testing import BackendTests

QUERY = "Which planet is called the red planet?"
TEXTS = [
    "Mars is often called the red planet.",
    "Jupiter is the largest planet.",
    "red",
    "🪐 Grüße, 火星!",
    "Mars is a planet and it is red. " * 80,
]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, request):
    """A tiny model of a given kind as the script exports it: a folder for the kind and dtype, made once."""
    made = {}

    def export(kind, dtype="float16"):
        if (kind, dtype) not in made:
            target = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            _export.export(Path(request.getfixturevalue(kind)), target, dtype=dtype)
            made[kind, dtype] = target
        return made[kind, dtype]

    return export


@pytest.fixture(scope="session")
def packaged():
    return EmbeddedBackend()


class TestEmbedded(BackendTests):
    @pytest.fixture
    def backend(self):
        return EmbeddedBackend()


class TestEmbeddedFolder(BackendTests):
    trained = False  # random weights

    @pytest.fixture(params=["tiny_bert", "tiny_xlmr"])
    def backend(self, request, exported):
        return EmbeddedBackend(model=str(exported(request.param)), batch_size=4)


# The model of the package --------------------------------------------------------------------------------------------


def test_the_packaged_weights_score_in_torch_as_they_do_here(packaged):
    model, tokenizer = torch_twin(EMBEDDED_MODEL)
    expected = torch_logits(model, tokenizer, QUERY, TEXTS, max_length=256)

    assert max(expected) > 2 > -2 > min(expected)
    assert packaged.logits(QUERY, TEXTS) == pytest.approx(expected, abs=1e-3)


def test_the_model_card_names_the_packaged_files():
    card = (EMBEDDED_MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")

    for name in ("model.onnx", "tokenizer.json"):
        assert hashlib.sha256((EMBEDDED_MODEL / name).read_bytes()).hexdigest() in card


def test_the_packaged_model_is_small():
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.iterdir()) < 50_000_000


def test_scoring_imports_no_torch_and_says_nothing():
    code = (
        "import sys; from langchain_rerank import init_reranker\n"
        "scores = init_reranker('embedded').backend.score('capital of France', ['Paris is the capital.', 'bread'])\n"
        "assert scores[0] > 0.5 > scores[1], scores\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "onnxruntime" in done.stdout.split()
    assert not {"torch", "transformers", "onnx", "huggingface_hub"} & set(done.stdout.split())
    assert done.stderr == ""


@pytest.mark.parametrize(
    "query",
    [
        "红色行星是哪一颗?",
        "赤い惑星はどれですか",
        "붉은 행성은 무엇입니까",
        unicodedata.normalize("NFD", "붉은 행성은 무엇입니까"),
        "ﾄﾞﾚﾃﾞｽｶ",
        "ChatGPT 是什么，为什么这么受欢迎?",
    ],
)
def test_a_query_in_chinese_japanese_or_korean_is_warned_of_once(query, caplog):
    backend = EmbeddedBackend()
    for _ in range(2):
        backend.score(query, ["Mars"])

    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "bge:BAAI/bge-reranker-v2-m3" in record.getMessage()


@pytest.mark.parametrize("query", ["the word 火星 in English", "Grüße aus Köln", "?!", "красная планета"])
def test_other_queries_are_not_warned_of(query, packaged, caplog):
    packaged.score(query, ["Mars"])

    assert not caplog.records


def test_another_model_may_read_chinese(exported, caplog):
    EmbeddedBackend(model=str(exported("tiny_xlmr"))).score("红色行星", ["Mars"])

    assert not [record for record in caplog.records if record.name.startswith("langchain_rerank")]


# How it scores -------------------------------------------------------------------------------------------------------


def test_eight_threads_at_once_get_the_scores_of_one():
    backend, one = EmbeddedBackend(), EmbeddedBackend().score(QUERY, TEXTS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: backend.score(QUERY, TEXTS), range(16)))

    assert len(found) == 16
    for scores in found:  # batches are shared, and a score moves by rounding with its neighbours
        assert scores == pytest.approx(one, abs=1e-6)


def test_the_number_of_threads_does_not_matter(packaged):
    assert EmbeddedBackend(threads=1).score(QUERY, TEXTS) == pytest.approx(packaged.score(QUERY, TEXTS), abs=1e-5)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux confines a process to cores")
def test_a_process_confined_to_one_core_uses_one_thread():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        threads = _default_threads()
    finally:
        os.sched_setaffinity(0, cores)

    assert threads == (1 if os.cpu_count() > 1 else 0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "what?"}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores_counts(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")

    assert allowed_cpus(tmp_path) == (expected or 64)


def test_a_pickle_holds_options_and_no_weights(packaged):
    packaged.warmup()

    assert len(pickle.dumps(packaged)) < 2000


def test_a_text_of_a_megabyte_is_cut_and_reported(packaged):
    [score] = packaged.score(QUERY, ["Mars is the red planet. " * 42_000])

    assert score.details == {"truncated": True}
    assert score > 0.5


def test_a_long_document_can_be_read_to_its_end():
    text = "Bread is baked from flour and water. " * 20 + TEXTS[0]
    [cut] = EmbeddedBackend(max_length=64).score(QUERY, [text])
    [best] = EmbeddedBackend(max_length=64, long_documents="max_passage").score(QUERY, [text])

    assert best > 3 * cut
    assert text[slice(*best.details["passage_span"])].endswith(TEXTS[0])


def test_a_batch_too_large_for_memory_is_halved(exported):
    class Cramped(EmbeddedBackend):
        def _run_session(self, batch):
            if len(batch) > 2:
                raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 805306368")
            return super()._run_session(batch)

    folder = str(exported("tiny_bert"))

    assert Cramped(model=folder).score(QUERY, TEXTS) == pytest.approx(
        EmbeddedBackend(model=folder).score(QUERY, TEXTS), abs=1e-5
    )


# Other models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("tiny_bert", "float32", 1e-4), ("tiny_bert", "float16", 1e-2), ("tiny_xlmr", "float16", 1e-2)],
)
def test_an_exported_model_scores_as_in_torch(kind, dtype, tolerance, exported, request):
    source = request.getfixturevalue(kind)
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
    expected = torch_logits(model, AutoTokenizer.from_pretrained(source), QUERY, TEXTS, max_length=512)
    backend = EmbeddedBackend(model=str(exported(kind, dtype)), max_length=512)

    assert np.ptp(expected) > 0.1
    assert backend.logits(QUERY, TEXTS) == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
def test_int8_weights_change_scores_a_little_and_neighbours_change_nothing(tiny_bert, tmp_path):
    config = BertConfig.from_pretrained(tiny_bert, hidden_size=96, intermediate_size=96, initializer_range=0.1)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    for dtype in ("float32", "int8"):
        _export.export(tmp_path, tmp_path / dtype, dtype=dtype)
    exact, small = (EmbeddedBackend(model=str(tmp_path / dtype)).logits(QUERY, TEXTS) for dtype in ("float32", "int8"))
    alone = [EmbeddedBackend(model=str(tmp_path / "int8")).logits(QUERY, [text])[0] for text in TEXTS]

    assert TensorProto.INT8 in {each.data_type for each in onnx.load(tmp_path / "int8/model.onnx").graph.initializer}
    assert small == pytest.approx(alone, abs=1e-5)
    assert small == pytest.approx(exact, abs=0.1)
    assert small != pytest.approx(exact, abs=1e-4)


def test_weights_are_stored_in_one_of_three_ways(tiny_bert, tmp_path):
    with pytest.raises(ConfigurationError, match="'float8' cannot be stored; there are float32, float16 and int8"):
        _export.export(Path(tiny_bert), tmp_path, dtype="float8")


def test_a_batch_is_filled_up_with_the_models_own_padding(exported):
    backend = EmbeddedBackend(model=str(exported("tiny_xlmr")))
    backend.warmup()

    assert backend._pad_id() == 1


def test_the_same_source_gives_the_same_bytes(exported, tiny_bert, tmp_path):
    _export.export(Path(tiny_bert), tmp_path)

    for name in ("model.onnx", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (exported("tiny_bert") / name).read_bytes()


@pytest.mark.parametrize("folder", [None, "tiny_bert"])
def test_the_file_tells_nothing_of_the_machine_that_made_it(folder, exported):
    content = ((exported(folder) if folder else EMBEDDED_MODEL) / "model.onnx").read_bytes()

    assert b"site-packages" not in content
    assert b".py" not in content


def test_a_model_with_two_labels_is_not_exported(tiny_bert, tmp_path):
    config = BertConfig.from_pretrained(tiny_bert, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="has 2 labels; a reranker has one"):
        _export.export(tmp_path, tmp_path / "exported")


def test_a_graph_that_computes_something_else_is_not_exported(tmp_path):
    content = graph(tmp_path).SerializeToString()
    batch = {name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}

    _export._compare(content, [batch], [np.ones((1, 1))])
    for wrong in (np.full((1, 1), 1.1), np.ones((1, 2)), np.full((1, 1), np.nan)):
        with pytest.raises(ValueError, match="logits differ from torch's"):
            _export._compare(content, [batch], [wrong])


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_refused_at_once():
    with pytest.raises(ConfigurationError, match=r"'cross/encoder' is no folder.*model\.onnx.*cross-encoder: or bge:"):
        init_reranker("embedded:cross/encoder")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused_at_once(name, exported, tmp_path):
    copied = shutil.copytree(exported("tiny_bert"), tmp_path / "copied")
    (copied / name).unlink()

    with pytest.raises(ValidationError, match=f"copied' has no {name}; it must hold model.onnx and tokenizer.json"):
        EmbeddedBackend(model=str(copied))


def test_a_folder_that_went_away_is_refused_at_load(exported, tmp_path):
    backend = EmbeddedBackend(model=str(shutil.copytree(exported("tiny_bert"), tmp_path / "copied")))
    shutil.rmtree(tmp_path / "copied")

    with pytest.raises(ModelLoadError, match="copied' is no folder"):
        backend.warmup()


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_broken_file_is_refused_at_load(name, exported, tmp_path):
    copied = shutil.copytree(exported("tiny_bert"), tmp_path / "copied")
    (copied / name).write_text("{}")

    with pytest.raises(ModelLoadError, match=f"copied/{name}' cannot be loaded: "):
        EmbeddedBackend(model=str(copied)).warmup()


def test_a_model_with_two_labels_is_refused(tmp_path):
    graph(tmp_path, labels=2)

    with pytest.raises(ModelLoadError, match="gives 4 numbers for 2 pairs; a reranker gives one logit for each"):
        EmbeddedBackend(model=str(tmp_path)).warmup()


def test_a_model_with_two_outputs_is_refused(tmp_path):
    graph(tmp_path, outputs=("logits", "more"))

    with pytest.raises(ModelLoadError, match="gives 4 numbers for 2 pairs; a reranker gives one logit for each"):
        EmbeddedBackend(model=str(tmp_path)).warmup()


def test_a_model_with_other_inputs_is_refused(tmp_path):
    graph(tmp_path, inputs=("input_ids", "attention_mask", "pixel_values"))

    with pytest.raises(ModelLoadError, match="wants the inputs attention_mask, input_ids, pixel_values"):
        EmbeddedBackend(model=str(tmp_path)).warmup()


def test_a_plain_graph_of_anybodys_is_read(tmp_path):
    graph(tmp_path)

    assert EmbeddedBackend(model=str(tmp_path)).logits(QUERY, TEXTS) == [1.0] * len(TEXTS)


def test_more_tokens_than_the_model_can_read_are_refused(exported):
    with pytest.raises(ModelLoadError, match="reads at most 512 tokens"):
        EmbeddedBackend(model=str(exported("tiny_bert")), max_length=1024).warmup()


def test_more_tokens_than_a_model_can_read_are_refused_where_its_file_does_not_say_how_many(exported, tmp_path):
    copied = shutil.copytree(exported("tiny_bert"), tmp_path / "copied")
    model = onnx.load(copied / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, copied / "model.onnx")

    EmbeddedBackend(model=str(copied), max_length=512).warmup()
    with pytest.raises(ModelLoadError, match=r"cannot read 2 pairs of 1024 tokens \(max_length=1024\)"):
        EmbeddedBackend(model=str(copied), max_length=1024).warmup()


# Help ----------------------------------------------------------------------------------------------------------------


def torch_twin(folder):
    """The exported weights, in the class of transformers that they come from, and the tokenizer in its own."""
    tensors = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float32)
        for tensor in onnx.load(folder / "model.onnx").graph.initializer
        if tensor.name.startswith(("bert.", "classifier.")) and not tensor.name.endswith("position_ids")
    }
    state = {name.removesuffix(".T"): array.T if name.endswith(".T") else array for name, array in tensors.items()}
    vocabulary, hidden = state["bert.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=len(state["bert.encoder.layer.0.intermediate.dense.weight"]),
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return model, PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="[PAD]",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )


def torch_logits(model, tokenizer, query, texts, *, max_length):
    cut = {"truncation": "only_second", "max_length": max_length}
    batch = tokenizer([query] * len(texts), texts, **cut, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.view(-1).tolist()


def graph(folder, *, labels=1, inputs=("input_ids", "attention_mask"), outputs=("logits",)):
    """A model that gives each pair `labels` times the number 1, written to a folder beside a tokenizer."""
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in inputs]
    logits = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "labels"]) for name in outputs]
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["mask", "axis"], ["one"]),
        *(helper.make_node("Concat", ["one"] * labels, [name], axis=1) for name in outputs),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    made = helper.make_graph(nodes, "plain", ids, logits, [axis])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    shutil.copy(EMBEDDED_MODEL / "tokenizer.json", folder)
    return model
