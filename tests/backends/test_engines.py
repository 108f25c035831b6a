"""Engines of encoder models: the choice, the conversion and its cache, and that scores stay what PyTorch says."""

import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pydantic import PrivateAttr, ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from langchain_rerank.backends._engines import CONVERTIBLE, choose
from langchain_rerank.backends._engines_cache import cache_folder, open_converted
from langchain_rerank.backends._engines_openvino import _core
from langchain_rerank.backends._engines_torch import has_varlen
from langchain_rerank.backends._torch import adds_in_int16
from langchain_rerank.backends.bge import BGEBackend
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.backends.monot5 import MonoT5Backend
from langchain_rerank.errors import ConfigurationError, MissingDependencyError, ModelLoadError
from langchain_rerank.testing import BackendTests

QUERY = "Which planet is called the red planet?"
TEXTS = [
    "Mars is the red planet.",
    "Jupiter is large.",
    "red",
    "Mars is a planet and it is red. " * 40,
    "one two three " * 31,
    "Bread is baked from flour, water, salt and yeast.",
]
PAIRS = [(query, text) for query in (QUERY, "How is bread baked?") for text in TEXTS]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def cross_encoder(model, **options):
    return CrossEncoderBackend(model=str(model), **{"device": "cpu", "dtype": "float32", **options})


class Counting(CrossEncoderBackend):
    """Counts how often the weights are loaded."""

    _loads: int = PrivateAttr(default=0)

    def _pretrained(self, kind, config):
        self._loads += 1
        return super()._pretrained(kind, config)


class Stubborn(CrossEncoderBackend):
    """A model that no engine can convert."""

    def _converted(self, choice, load):
        raise RuntimeError("no rule for aten::strange")


# Scores ---------------------------------------------------------------------------------------------------------------


class TestCrossEncoderOnOpenVINO(BackendTests):
    trained = False  # random weights

    @pytest.fixture
    def backend(self, tiny_xlmr):
        return cross_encoder(tiny_xlmr, engine="openvino", batch_size=4)


class TestEmbeddedOnOpenVINO(BackendTests):
    tolerance = 1e-2  # bfloat16, where the CPU has it

    @pytest.fixture
    def backend(self):
        return EmbeddedBackend(engine="openvino")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
def test_each_engine_gives_the_logits_of_pytorch(request, model, engine):
    model = request.getfixturevalue(model)
    expected = cross_encoder(model, engine="torch").logits(QUERY, TEXTS)

    for batch_size in (1, 4):
        found = cross_encoder(model, engine=engine, batch_size=batch_size).logits(QUERY, TEXTS)
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model_type", sorted(CONVERTIBLE - {"bert", "xlm-roberta"}))
def test_every_type_that_is_converted_by_default_gives_the_logits_of_pytorch(model_type, tiny_bert, tmp_path):
    of_another_type(model_type, tiny_bert, tmp_path)
    backend = cross_encoder(tmp_path, max_length=128)
    found = backend.logits(QUERY, TEXTS)

    assert backend.fingerprint()["engine"] == "openvino"
    assert found == pytest.approx(
        cross_encoder(tmp_path, engine="torch", max_length=128).logits(QUERY, TEXTS), abs=1e-4
    )
    assert max(found) - min(found) > 1e-3, "a model that says the same of all texts proves nothing"


def test_a_type_that_an_engine_gets_wrong_is_refused_where_the_engine_was_asked_for(tiny_bert, tmp_path):
    of_another_type("modernbert", tiny_bert, tmp_path)

    assert cross_encoder(tmp_path).fingerprint()["engine"] == "torch"
    with pytest.raises(
        ModelLoadError, match=r"cannot be converted for openvino \(the converted model gives the logits"
    ):
        cross_encoder(tmp_path, engine="openvino").warmup()


def of_another_type(model_type, tokenizer, folder):
    torch.manual_seed(1)
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if model_type == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=len(tokens), pad_token_id=0, num_labels=1, initializer_range=0.3, **ids, **sizes
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)


def test_bfloat16_changes_scores_of_trained_weights_by_less_than_a_hundredth():
    exact, fast = (
        EmbeddedBackend(engine="openvino", dtype=dtype).score(QUERY, TEXTS) for dtype in ("float32", "bfloat16")
    )

    assert exact == pytest.approx(EmbeddedBackend().score(QUERY, TEXTS), abs=1e-5)
    assert fast == pytest.approx(exact, abs=0.01)
    assert fast != exact


def test_norms_and_residual_sums_stay_float32(tiny_bert):
    backend = cross_encoder(tiny_bert, engine="openvino", dtype="bfloat16")
    backend.warmup()
    graph = backend._network._compiled.get_runtime_model()
    precisions = {
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str))
        for info in (operation.get_rt_info() for operation in graph.get_ops())
    }

    assert ("FullyConnected", "bf16") in precisions
    assert ("MVN", "f32") in precisions
    assert ("MVN", "bf16") not in precisions


@pytest.mark.slow
def test_int8_is_calibrated_quietly_and_says_how_much_it_changes(tiny_bert, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"query": query, "text": text}) for query, text in PAIRS))
    code = (
        "import logging; logging.basicConfig(format='%(name)s %(message)s')\n"
        "logging.getLogger('langchain_rerank').setLevel(logging.INFO)\n"
        "from langchain_rerank import init_reranker\n"
        f"backend = init_reranker('cross-encoder:{tiny_bert}', dtype='int8', calibration={str(file)!r}).backend\n"
        f"backend.score({QUERY!r}, ['Mars is the red planet.'])\n"
        "assert backend.fingerprint()['dtype'] == 'int8'\n"
        "assert backend.fingerprint()['engine'] == 'openvino'\n"
        "class_of_loggers = logging.getLoggerClass(); assert class_of_loggers is logging.Logger, class_of_loggers\n"
    )
    environment = {"HOME": str(tmp_path), "PATH": "", "LANGCHAIN_RERANK_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "int8 changes the scores of 12 pairs by 0." in done.stderr
    assert not (tmp_path / "intel").exists(), "OpenVINO or NNCF has written down who may be reported to its makers"
    [graph] = tmp_path.glob("cache/engines/*/model.xml")
    assert 'type="FakeQuantize"' in graph.read_text()


@pytest.mark.slow
def test_int8_takes_half_of_its_range_where_the_sums_could_overflow(tiny_bert, tmp_path, monkeypatch):
    ranges = []
    for overflows in (False, True):
        monkeypatch.setattr("langchain_rerank.backends._engines.adds_in_int16", lambda overflows=overflows: overflows)
        monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path / str(overflows)))
        cross_encoder(tiny_bert, dtype="int8", calibration=PAIRS).warmup()
        [graph] = tmp_path.glob(f"{overflows}/engines/*/model.xml")
        constants = [node.data for node in _core().read_model(graph).get_ops() if node.get_type_name() == "Constant"]
        ranges.append([int(abs(each.astype(int)).max()) for each in constants if each.dtype == np.int8])

    full, halved = ranges
    assert min(full) > 120
    assert sum(each > 64 for each in halved) == 3, "word, position and type tables are looked up, not multiplied"
    assert len(halved) == len(full) > 3


@pytest.mark.slow
def test_int8_does_not_depend_on_the_size_of_batches(tiny_bert, tmp_path, monkeypatch):
    found = []
    for batch_size in (1, 16):
        monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path / str(batch_size)))
        backend = cross_encoder(tiny_bert, dtype="int8", calibration=PAIRS, batch_size=batch_size)
        found.append(backend.logits(QUERY, TEXTS[:1]))

    assert found[0] == found[1]


def test_calibration_pairs_are_read_once_and_cleaned(tiny_bert, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"query": "\\ud800", "text": "red"}\n\n')
    backend = cross_encoder(tiny_bert, dtype="int8", calibration=tmp_path / "pairs.jsonl")
    before = backend.fingerprint()
    (tmp_path / "pairs.jsonl").unlink()
    backend.warmup()

    assert backend.fingerprint() == before
    assert before["beside_int8"] in ("float32", "bfloat16")


# Without padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
@pytest.mark.parametrize("batch_tokens", [8, 700, 100_000])
def test_pairs_without_padding_score_as_padded_ones(request, model, batch_tokens):
    model = request.getfixturevalue(model)
    packed = cross_encoder(model, padding_free=True, batch_tokens=batch_tokens)

    assert packed.logits(QUERY, TEXTS) == pytest.approx(
        cross_encoder(model, engine="torch").logits(QUERY, TEXTS), abs=1e-5
    )
    assert packed._model.config._attn_implementation == "langchain_rerank_segments"


def test_a_type_that_cannot_be_packed_is_refused(tiny_bert, tmp_path):
    of_another_type("distilbert", tiny_bert, tmp_path)

    with pytest.raises(ConfigurationError, match=r"padding_free is for models of type bert, .*not for 'distilbert'"):
        cross_encoder(tmp_path, padding_free=True).warmup()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_only_a_gpu_with_the_kernels_runs_all_pairs_in_one(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    assert has_varlen(CUDA) == expected
    assert not has_varlen(CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_pairs_without_padding_score_as_padded_ones_on_a_gpu(request, model, dtype, tolerance):
    model = request.getfixturevalue(model)
    packed = cross_encoder(model, device="cuda", dtype=dtype, padding_free=True)

    assert packed.score(QUERY, TEXTS) == pytest.approx(
        cross_encoder(model, engine="torch").score(QUERY, TEXTS), abs=tolerance
    )


# The choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "dtype", "options", "expected"),
    [
        ("auto", "float32", {}, ("openvino", "float32")),
        ("auto", "bfloat16", {"model_type": "bert"}, ("openvino", "bfloat16")),
        ("auto", "float32", {"model_type": "deberta-v2"}, ("torch", "float32")),
        ("auto", "float32", {"model_type": "bert", "as_it_is": "it is odd"}, ("torch", "float32")),
        ("auto", "int8", {"model_type": "bert"}, ("openvino", "int8")),
        ("openvino", "float32", {"model_type": "deberta-v2"}, ("openvino", "float32")),
        ("onnxruntime", "auto", {}, ("onnxruntime", "float32")),
        ("torch", "bfloat16", {}, ("torch", "bfloat16")),
    ],
)
def test_engine_and_dtype_are_settled(engine, dtype, options, expected):
    choice = choose(engine, dtype, CPU, **options)

    assert (choice.engine, choice.dtype) == expected
    assert choice.why


PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_vnni_supported")


@pytest.mark.parametrize(
    ("has", "dtype", "why", "overflows"),
    [
        ((), "float32", "this CPU does not multiply in bfloat16", True),
        (("_is_vnni_supported",), "float32", "this CPU does not multiply in bfloat16", False),
        (("_is_avx512_bf16_supported", "_is_vnni_supported"), "bfloat16", "this CPU multiplies in bfloat16", False),
        (("_is_amx_tile_supported",), "bfloat16", "this CPU multiplies in bfloat16", False),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies_fast(has, dtype, why, overflows, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for probe in PROBES:
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in has)

    choice = choose("auto", "auto", CPU, model_type="bert")

    assert (choice.engine, choice.dtype) == ("openvino", dtype)
    assert choice.why.endswith(why)
    assert adds_in_int16() == overflows


def test_a_processor_of_arm_sums_int8_up_without_overflow(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    for probe in PROBES:
        monkeypatch.setattr(torch.cpu, probe, lambda: False)

    assert not adds_in_int16()


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((7, 5), "float32", "this GPU does not multiply in bfloat16; dtype='float16' may be faster"),
        ((8, 0), "bfloat16", "this GPU multiplies in bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_it_multiplies_fast(capability, dtype, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    choice = choose("auto", "auto", CUDA)

    assert (choice.engine, choice.dtype) == ("torch", dtype)
    assert choice.why == f"PyTorch is the engine for cuda, {why}"


def test_a_mac_computes_in_float32():
    assert choose("auto", "auto", torch.device("mps")).dtype == "float32"


def test_a_gpu_is_for_pytorch():
    assert choose("auto", "float16", CUDA).engine == "torch"
    for engine, dtype in (("openvino", "auto"), ("onnxruntime", "auto"), ("auto", "int8")):
        with pytest.raises(ConfigurationError, match="runs on a CPU, not on 'cuda'"):
            choose(engine, dtype, CUDA)


@pytest.mark.parametrize(
    ("absent", "dtype", "expected"),
    [
        (("openvino",), "bfloat16", "torch"),
        (("openvino",), "float32", "onnxruntime"),
        (("openvino", "onnxscript"), "float32", "torch"),
    ],
)
def test_auto_takes_the_fastest_of_what_is_installed(absent, dtype, expected, monkeypatch):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)

    assert choose("auto", dtype, CPU, model_type="bert").engine == expected


@pytest.mark.parametrize(("installed", "expected"), [("2026.3.9", "torch"), ("2026.4.0", "openvino")])
def test_auto_leaves_an_old_openvino_alone(installed, expected, monkeypatch):
    monkeypatch.setattr("langchain_rerank.backends._engines.version", lambda _: installed)

    assert choose("auto", "bfloat16", CPU, model_type="bert").engine == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "openvino", "device": "cuda:0"}, "runs on a CPU, not on 'cuda'"),
        ({"engine": "onnxruntime", "dtype": "bfloat16"}, "engine='onnxruntime' computes in float32"),
        ({"engine": "torch", "dtype": "int8", "calibration": PAIRS}, "dtype='int8' is for engine='openvino'"),
        ({"engine": "openvino", "padding_free": True}, "padding_free is for PyTorch, not for engine='openvino'"),
        ({"engine": "onnxruntime", "padding_free": True}, "padding_free is for PyTorch, not for engine='onnxruntime'"),
        ({"dtype": "int8", "calibration": PAIRS, "padding_free": True}, "padding_free is for PyTorch, .*'int8'"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(options, message, tiny_bert):
    with pytest.raises(ValidationError, match=message):
        cross_encoder(tiny_bert, **options)


def test_a_missing_engine_shows_at_once(monkeypatch, tiny_bert):
    monkeypatch.setitem(sys.modules, "openvino", None)

    with pytest.raises(MissingDependencyError, match=r"pip install 'langchain-rerank\[openvino\]'"):
        cross_encoder(tiny_bert, engine="openvino")


def test_an_engine_that_is_not_installed_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for engine, dtype in (("openvino", "auto"), ("auto", "int8")):
        with pytest.raises(MissingDependencyError, match=r"pip install 'langchain-rerank\[openvino\]'"):
            choose(engine, dtype, CPU)
    with pytest.raises(MissingDependencyError, match=r"pip install 'langchain-rerank\[openvino\]'"):
        EmbeddedBackend(engine="openvino")


def test_onnx_runtime_computes_in_float32_only():
    with pytest.raises(ConfigurationError, match=r"engine='onnxruntime' computes in float32, not in 'bfloat16'"):
        choose("onnxruntime", "bfloat16", CPU)
    with pytest.raises(
        ConfigurationError, match=r"dtype='int8' is for engine='openvino', not for engine='onnxruntime'"
    ):
        choose("onnxruntime", "int8", CPU)
    with pytest.raises(ValidationError, match=r"dtype='bfloat16' is for engine='openvino'"):
        EmbeddedBackend(dtype="bfloat16")


@pytest.mark.parametrize("kind", [CrossEncoderBackend, BGEBackend])
def test_a_fingerprint_names_what_auto_turns_out_to_be_before_and_after_loading(kind, tiny_xlmr):
    backend = kind(model=tiny_xlmr, device="cpu")
    before = backend.fingerprint()
    backend.warmup()

    assert backend.fingerprint() == before
    assert before["engine"] == "openvino"
    assert before["dtype"] in ("float32", "bfloat16")
    assert before != kind(model=tiny_xlmr, device="cpu", engine="torch").fingerprint()


def test_the_embedded_models_fingerprint_names_engine_and_dtype():
    assert {"engine": "onnxruntime", "dtype": "float32"}.items() <= EmbeddedBackend().fingerprint().items()
    assert EmbeddedBackend(engine="openvino").fingerprint()["dtype"] in ("float32", "bfloat16")


def test_bge_runs_its_encoders_on_the_engine_asked_for(tiny_xlmr):
    backend = BGEBackend(model=tiny_xlmr, device="cpu", dtype="float32", engine="openvino")

    assert backend.logits(QUERY, TEXTS) == pytest.approx(
        cross_encoder(tiny_xlmr, engine="torch").logits(QUERY, TEXTS), abs=1e-4
    )
    assert type(backend._chosen._network).__name__ == "OpenVINONetwork"


def test_language_models_stay_in_pytorch(tiny_gemma):
    assert BGEBackend(model=tiny_gemma, device="cpu").fingerprint()["engine"] == "torch"
    with pytest.raises(ConfigurationError, match=r"engine='openvino' is for encoders, and .* is none \(LLM\)"):
        BGEBackend(model=tiny_gemma, device="cpu", engine="openvino").warmup()
    with pytest.raises(ConfigurationError, match=r"is for encoders, and .* is GemmaForCausalLM"):
        BGEBackend(model=tiny_gemma, device="cpu", engine="openvino").fingerprint()
    with pytest.raises(ValidationError, match="dtype='int8' is for encoders"):
        MonoT5Backend(model=tiny_gemma, dtype="int8")


def test_int8_wants_texts_and_only_int8_does(tiny_bert, tmp_path):
    with pytest.raises(ValidationError, match="dtype='int8' is calibrated on texts such as yours"):
        cross_encoder(tiny_bert, dtype="int8")
    with pytest.raises(ValidationError, match="calibration is for dtype='int8', not for dtype='float32'"):
        cross_encoder(tiny_bert, calibration=PAIRS)
    (tmp_path / "pairs.jsonl").write_text('{"question": "q"}')
    with pytest.raises(ConfigurationError, match=r"calibration='.*pairs.jsonl' cannot be read \(KeyError: 'query'\)"):
        cross_encoder(tiny_bert, dtype="int8", calibration=tmp_path / "pairs.jsonl").fingerprint()
    (tmp_path / "pairs.jsonl").write_text("\n \n")
    empty = cross_encoder(tiny_bert, dtype="int8", calibration=tmp_path / "pairs.jsonl")
    for use in (empty.fingerprint, empty.warmup):
        with pytest.raises(ConfigurationError, match=r"calibration='.*pairs.jsonl' holds no pairs"):
            use()


def test_a_fingerprint_is_worked_out_once(tiny_gemma):
    described = []

    class Watched(BGEBackend):
        def _described(self):
            described.append(self.model)
            return super()._described()

    backend = Watched(model=tiny_gemma, device="cpu")

    assert backend.fingerprint() == backend.fingerprint()
    assert described == [tiny_gemma]


def test_what_cannot_be_converted_runs_in_pytorch_unless_an_engine_was_asked_for(tiny_bert, caplog):
    options = {"model": tiny_bert, "device": "cpu", "dtype": "float32"}
    backend = Stubborn(**options)
    assert backend.fingerprint()["engine"] == "openvino"

    assert backend.score(QUERY, TEXTS) == cross_encoder(tiny_bert, engine="torch").score(QUERY, TEXTS)
    assert "cannot be converted for openvino and runs in PyTorch: no rule for aten::strange" in caplog.text
    assert backend.fingerprint()["engine"] == "torch"
    with pytest.raises(ModelLoadError, match=r"cannot be converted for openvino \(no rule for aten::strange\)"):
        Stubborn(**options, engine="openvino").warmup()


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_model_is_converted_once_and_then_its_weights_are_not_loaded(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path))
    backends = [Counting(model=tiny_bert, device="cpu", dtype=dtype) for dtype in ("float32", "float32", "bfloat16")]
    for backend in backends:
        backend.warmup()

    assert [backend._loads for backend in backends] == [1, 0, 0]
    assert backends[0].logits(QUERY, TEXTS) == backends[1].logits(QUERY, TEXTS)
    [folder] = (tmp_path / "engines").iterdir()
    assert json.loads((folder / "about.json").read_text())["versions"]["openvino"]


def test_trusted_code_has_a_conversion_of_its_own(tiny_bert):
    keys = []
    for trusted in (False, True):
        backend = cross_encoder(tiny_bert, engine="openvino", trust_remote_code=trusted)
        keys.append(backend._conversion_key(choose("openvino", "float32", CPU)))

    assert keys[0] != keys[1]


def test_onnx_runtime_out_of_memory_halves_the_batch(tiny_bert):
    class FailError(Exception):
        """As ONNX Runtime's, which is no RuntimeError."""

    class Small(CrossEncoderBackend):
        def _forward(self, batch):
            if len(batch) > 1:
                raise FailError("[ONNXRuntimeError] : Failed to allocate memory for requested buffer of size 8")
            return super()._forward(batch)

    backend = Small(model=tiny_bert, device="cpu", dtype="float32", engine="onnxruntime")
    expected = cross_encoder(tiny_bert, engine="onnxruntime").logits(QUERY, TEXTS)

    assert backend.logits(QUERY, TEXTS) == pytest.approx(expected, abs=1e-4)


def test_imports_by_several_threads_leave_the_environment_as_it_was(monkeypatch, tmp_path):
    from langchain_rerank.backends._engines_openvino import _unreported

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NNCF_CI", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"slow_library_{number}" for number in range(4)]
    for name in names:
        (tmp_path / f"{name}.py").write_text("import os, time\nCI = os.environ['CI']\ntime.sleep(0.05)\n")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_unreported, names * 2))

    assert [module.CI for module in found] == ["true"] * 8
    assert not {"CI", "NNCF_CI"} & os.environ.keys()


def test_a_model_whose_conversion_would_compute_something_else_is_not_converted(tiny_bert, tmp_path, monkeypatch):
    from langchain_rerank.backends._engines_convert import Convertible

    monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path))
    network = Convertible(AutoModelForSequenceClassification.from_pretrained(tiny_bert), wants_type_ids=True)
    with pytest.raises(ValueError, match="the converted model gives the logits"):
        network.check(lambda batch: network._expected[0][: len(batch)] + 0.01)


def write(content):
    return lambda folder: (folder / "file").write_text(content)


def read(folder):
    content = (folder / "file").read_text()
    if content == "broken":
        raise RuntimeError("unexpected end of file")
    return content


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_conversion_is_found_again_by_all_of_its_key(cache):
    assert open_converted({"model": "a", "dtype": "float32"}, write("first"), read) == "first"
    assert open_converted({"dtype": "float32", "model": "a"}, write("second"), read) == "first"
    assert open_converted({"model": "a", "dtype": "int8"}, write("third"), read) == "third"
    assert len(list((cache / "engines").iterdir())) == 2


def test_a_broken_conversion_is_made_again_and_said(cache, caplog):
    open_converted({"model": "a"}, write("first"), read)
    [folder] = (cache / "engines").iterdir()
    (folder / "file").write_text("broken")

    assert open_converted({"model": "a"}, write("second"), read) == "second"
    assert open_converted({"model": "a"}, write("third"), read) == "second"
    assert "cannot be read and is converted again: unexpected end of file" in caplog.text


def test_a_conversion_that_is_taken_away_meanwhile_is_made_again(cache):
    taken = []

    def robbed(folder):
        if not taken:
            taken.append(folder.rename(cache / "elsewhere"))
        return read(folder)

    assert open_converted({"model": "a"}, write("whole"), robbed) == "whole"


def test_what_killed_conversions_left_is_deleted_after_a_day(cache):
    old, new = cache / "engines" / ".old", cache / "engines" / ".new"
    for folder in (old, new):
        (folder / "half").mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)
    open_converted({"model": "a"}, write("whole"), read)

    assert new.exists()
    assert not old.exists()


def test_a_conversion_that_fails_leaves_nothing_behind(cache):
    def fails(folder):
        (folder / "file").write_text("half")
        raise RuntimeError("no rule for this")

    with pytest.raises(RuntimeError, match="no rule for this"):
        open_converted({"model": "a"}, fails, read)
    assert list((cache / "engines").iterdir()) == []


def test_of_several_writers_at_once_each_gets_a_whole_conversion(cache):
    together = threading.Barrier(8)

    def slowly(folder):
        together.wait(timeout=30)
        write("whole")(folder)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_converted({"model": "a"}, slowly, read), range(8)))

    assert found == ["whole"] * 8
    [folder] = (cache / "engines").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "file"]


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path / "file"))

    for content in ("first", "second"):
        assert open_converted({"model": "a"}, write(content), read) == content
    assert "cannot be written" in caplog.text
    assert "name another folder in LANGCHAIN_RERANK_CACHE" in caplog.text


def test_a_missing_home_costs_time_only(monkeypatch, caplog):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LANGCHAIN_RERANK_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)

    assert open_converted({"model": "a"}, write("whole"), read) == "whole"
    assert "cannot be written (Could not determine home directory.)" in caplog.text


def test_a_folder_that_cannot_be_read_costs_time_only(cache, monkeypatch, caplog):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", forbidden)

    assert open_converted({"model": "a"}, write("whole"), read) == "whole"
    assert "cannot be written ([Errno 13] Permission denied" in caplog.text


def test_the_folder_is_in_the_users_cache_unless_one_is_named(monkeypatch, tmp_path):
    assert cache_folder().name.startswith("conversions")
    monkeypatch.delenv("LANGCHAIN_RERANK_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "langchain-rerank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/langchain-rerank").expanduser()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "langchain-rerank"


def test_a_loaded_backend_logs_nothing_above_information(tiny_bert, caplog):
    with caplog.at_level(logging.WARNING):
        cross_encoder(tiny_bert, engine="openvino").score(QUERY, TEXTS[:2])

    assert [record.getMessage() for record in caplog.records] == []


def test_a_backend_that_goes_in_another_thread_leaves_signals_working():
    code = """
import gc, signal, threading
from langchain_rerank.backends.embedded import EmbeddedBackend

kept = [EmbeddedBackend(engine="openvino")]
kept[0].score("q", ["a text"])
thread = threading.Thread(target=lambda: (kept.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "interrupted\n")
