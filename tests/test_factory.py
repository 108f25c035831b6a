import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from fakes import LengthBackend
from pydantic import SecretStr

from langchain_rerank import Reranker, init_reranker
from langchain_rerank.backends.base import Backend
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.embedded import EmbeddedBackend
from langchain_rerank.errors import ConfigurationError, MissingDependencyError
from langchain_rerank.factory import backend_class, installed_backends

MODEL = "BAAI/bge-reranker-v2-m3"


def test_a_name_and_a_model_make_a_reranker():
    reranker = init_reranker(f"cross-encoder:{MODEL}", top_n=5, device="cpu")

    assert isinstance(reranker, Reranker)
    assert isinstance(reranker.backend, CrossEncoderBackend)
    assert (reranker.backend.model, reranker.backend.device, reranker.top_n) == (MODEL, "cpu", 5)


def test_a_name_alone_takes_the_backends_default_model():
    assert isinstance(init_reranker("embedded").backend, EmbeddedBackend)


def test_a_mapping_makes_the_same_reranker():
    spec = {"backend": "cross-encoder", "model": MODEL, "device": "cpu", "top_n": 5, "score_threshold": 0.2}
    reranker = init_reranker(spec)

    assert reranker.backend.model_dump() == init_reranker(f"cross-encoder:{MODEL}", device="cpu").backend.model_dump()
    assert (reranker.top_n, reranker.score_threshold) == (5, 0.2)
    assert spec["backend"] == "cross-encoder"  # not written to


def test_options_come_before_the_mapping():
    assert init_reranker({"backend": "embedded", "top_n": 5}, top_n=None).top_n is None


@pytest.mark.parametrize("as_type", [lambda path: path, str])
def test_a_yaml_file_makes_the_same_reranker(tmp_path, as_type):
    path = tmp_path / "rerank.yaml"
    path.write_text(f"backend: cross-encoder:{MODEL}\ndevice: cpu\ntop_n: 5\n")

    reranker = init_reranker(as_type(path))

    assert (reranker.backend.model, reranker.top_n) == (MODEL, 5)


def test_nothing_at_all_is_the_embedded_model(monkeypatch):
    monkeypatch.delenv("LANGCHAIN_RERANK", raising=False)

    assert isinstance(init_reranker().backend, EmbeddedBackend)


def test_nothing_at_all_reads_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LANGCHAIN_RERANK", f"cross-encoder:{MODEL}")
    assert init_reranker().backend.model == MODEL

    path = tmp_path / "rerank.yml"
    path.write_text("backend: embedded\ntop_n: 3\n")
    monkeypatch.setenv("LANGCHAIN_RERANK", str(path))
    assert init_reranker().top_n == 3


def test_a_backend_is_wrapped():
    backend = LengthBackend()

    assert init_reranker(backend, top_n=2).backend is backend


def test_variables_of_the_environment_stand_in_any_string(monkeypatch, tmp_path):
    monkeypatch.setenv("MODEL_HOME", "/models")
    path = tmp_path / "rerank.yaml"
    path.write_text(
        "backend: cross-encoder\nmodel: ${MODEL_HOME}/bge\nmodel_kwargs: {cache_dir: '${MODEL_HOME}/cache'}\n"
    )

    backend = init_reranker(path).backend

    assert backend.model == "/models/bge"
    assert backend.model_kwargs == {"cache_dir": "/models/cache"}


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ConfigurationError, match="variable NO_SUCH_VARIABLE is not set"):
        init_reranker({"backend": "embedded", "model": "${NO_SUCH_VARIABLE}"})


def test_an_unknown_backend_names_the_nearest_and_what_is_installed():
    with pytest.raises(ConfigurationError) as caught:
        init_reranker("cohre")

    assert str(caught.value).startswith(
        "Unknown backend 'cohre'. Did you mean 'cohere'? Installed backends: bge, cohere,"
    )


def test_a_models_name_alone_and_another_case_get_a_hint():
    with pytest.raises(ConfigurationError, match=r"Write 'bge:BAAI/bge-reranker-v2-m3' or 'cross-encoder:BAAI"):
        init_reranker("BAAI/bge-reranker-v2-m3")
    with pytest.raises(ConfigurationError, match="Did you mean 'bge'"):
        init_reranker({"backend": "BGE"})
    with pytest.raises(ConfigurationError, match=r"Unknown option 'backnd' for .* Did you mean 'backend'"):
        init_reranker({"backnd": "embedded"})


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigurationError, match=r"Unknown option 'devise' for backend 'cross-encoder'. Did you mean 'device'"
    ):
        init_reranker(f"cross-encoder:{MODEL}", devise="cpu")
    with pytest.raises(ConfigurationError, match="Did you mean 'top_n'"):
        init_reranker("embedded", topn=3)


def test_a_wrong_value_is_named_with_its_option():
    with pytest.raises(ConfigurationError, match=r"^Reranker: top_n: Input should be greater than or equal to 0"):
        init_reranker("embedded", top_n=-1)
    with pytest.raises(ConfigurationError, match=r"^cross-encoder: max_length: "):
        init_reranker(f"cross-encoder:{MODEL}", max_length="long")


def test_a_secret_in_a_wrong_place_is_not_shown():
    with pytest.raises(ConfigurationError) as caught:
        init_reranker("embedded", max_length="sk-secret")

    error = caught.value
    while error is not None:
        assert "sk-secret" not in str(error)
        error = error.__cause__ or error.__context__


def test_two_models_are_refused():
    with pytest.raises(ConfigurationError, match="Two models: 'a/b'"):
        init_reranker("cross-encoder:a/b", model="c/d")
    with pytest.raises(ConfigurationError, match="Two models"):
        init_reranker({"backend": "cross-encoder:a/b", "model": "c/d"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3\n", "must hold a mapping"),
        ("backend: [unclosed\n", "is not valid YAML"),
        ("", "must hold a mapping"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    path = tmp_path / "rerank.yaml"
    path.write_text(content)

    with pytest.raises(ConfigurationError, match=message) as caught:
        init_reranker(path)

    assert "rerank.yaml" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Cannot read .*nothing.yaml: No such file"):
        init_reranker(tmp_path / "nothing.yaml")


def test_a_type_that_is_no_spec_is_refused():
    with pytest.raises(ConfigurationError, match="not int"):
        init_reranker(3)


def test_an_error_of_config_is_also_a_value_error():
    with pytest.raises(ValueError, match="Unknown backend"):
        init_reranker("nothing")


def test_a_missing_extra_is_refused_at_construction_with_the_pip_line(monkeypatch):
    monkeypatch.setattr(CrossEncoderBackend, "requires", ("torch", "not_installed_at_all"))

    with pytest.raises(MissingDependencyError, match=r"pip install 'langchain-rerank\[cross-encoder\]'"):
        init_reranker(f"cross-encoder:{MODEL}")


def test_all_our_backends_are_entry_points():
    assert set(installed_backends()) >= {"bge", "cohere", "cross-encoder", "embedded", "monot5", "remote"}
    for name in ("bge", "cohere", "cross-encoder", "embedded", "monot5", "remote"):
        assert issubclass(backend_class(name), Backend)


def _points(monkeypatch, *points):
    monkeypatch.setattr("langchain_rerank.factory.entry_points", lambda group: list(points))


def _point(name, value):
    return EntryPoint(name, value, "langchain_rerank.backends")


def test_a_third_partys_backend_is_found_by_its_entry_point(monkeypatch):
    _points(monkeypatch, _point("length", "fakes:LengthBackend"))

    assert isinstance(init_reranker("length:any").backend, LengthBackend)


def test_nobody_takes_the_name_of_one_of_ours(monkeypatch):
    ours = _point("embedded", "langchain_rerank.backends.embedded:EmbeddedBackend")
    theirs = _point("embedded", "fakes:LengthBackend")

    for points in ((ours, theirs), (theirs, ours)):
        _points(monkeypatch, *points)
        assert backend_class("embedded") is EmbeddedBackend


def test_an_entry_point_that_is_no_backend_is_refused(monkeypatch):
    _points(monkeypatch, _point("odd", "os:getcwd"))

    with pytest.raises(ConfigurationError, match="'odd' is 'os:getcwd', which is no subclass"):
        init_reranker("odd")


def test_building_a_backend_loads_nothing_heavy():
    code = (
        "import sys; from langchain_rerank import init_reranker;"
        f"init_reranker('cross-encoder:{MODEL}'); init_reranker(); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "transformers", "onnxruntime", "tokenizers"} & set(loaded)


def test_secrets_stay_secret():
    class Keyed(LengthBackend):
        api_key: SecretStr = SecretStr("")

    reranker = Reranker(backend=Keyed(api_key="sk-123"))

    assert "sk-123" not in f"{reranker!r} {reranker} {reranker.model_dump()}"
