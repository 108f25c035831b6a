import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import langchain_rerank

HEAVY = {"torch", "transformers", "sentence_transformers", "onnxruntime", "qdrant_client", "langchain_classic"}


def loaded_by(code):
    code = f"import sys; {code}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "code", ["import langchain_rerank", "from langchain_rerank import Reranker, init_reranker, Backend, RerankResult"]
)
def test_importing_the_package_loads_nothing_heavy(code):
    assert not {*HEAVY, "cohere", "typer"} & loaded_by(code)


def test_the_public_names_are_these_and_each_is_there():
    assert langchain_rerank.__all__ == [
        "Backend",
        "RerankError",
        "RerankResult",
        "RerankRetriever",
        "Reranker",
        "create_qdrant_retriever",
        "create_rerank_retriever",
        "init_reranker",
    ]
    for name in langchain_rerank.__all__:
        assert getattr(langchain_rerank, name).__name__ == name
        assert getattr(langchain_rerank, name).__doc__
    assert set(dir(langchain_rerank)) == {*langchain_rerank.__all__, "__version__"}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Rerankr'"):
        langchain_rerank.Rerankr  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    assert langchain_rerank.__version__ == importlib.metadata.version("langchain-rerank")


def test_it_is_typed():
    assert (Path(langchain_rerank.__file__).parent / "py.typed").exists()


def test_the_base_install_needs_no_torch_and_nothing_needs_langchain_community():
    requirements = importlib.metadata.requires("langchain-rerank")
    base = {re.match(r"[\w-]+", line)[0].lower() for line in requirements if "extra ==" not in line}

    assert base == {
        "langchain-classic",
        "langchain-core",
        "numpy",
        "onnxruntime",
        "pydantic",
        "pyyaml",
        "rich",
        "tenacity",
        "tokenizers",
        "typer",
    }
    assert not any("langchain-community" in line for line in requirements)


def test_no_file_of_the_package_imports_langchain_community():
    for path in Path(langchain_rerank.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) langchain_community", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_backend_has_an_extra_of_its_own_name_or_needs_none():
    from langchain_rerank.factory import backend_class, installed_backends

    extras = set(importlib.metadata.metadata("langchain-rerank").get_all("Provides-Extra"))
    for name, point in installed_backends().items():
        if point.value.startswith("langchain_rerank."):
            assert backend_class(name).extra in ({name} if backend_class(name).requires else {""})
            assert name in extras or not backend_class(name).requires
