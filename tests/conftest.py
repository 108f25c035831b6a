"""Fixtures for all tests: tiny models with random weights, real architectures and real tokenizer types."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test asks a hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("LANGCHAIN_RERANK", None)
os.environ.pop("LANGCHAIN_RERANK_PIPELINE", None)
os.environ.pop("COHERE_API_KEY", None)
os.environ.pop("CO_API_KEY", None)
os.environ.pop("CO_API_URL", None)
os.environ.pop("QDRANT_API_KEY", None)
os.environ.pop("LANGSMITH_TRACING", None)


@pytest.fixture(scope="session", autouse=True)
def _conversions(tmp_path_factory):
    """Converted models of this run, in a folder of its own; each is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANGCHAIN_RERANK_CACHE", str(tmp_path_factory.mktemp("conversions")))
        yield


def _tiny(name):
    @pytest.fixture(scope="session", name=name)
    def build(tmp_path_factory):
        import tiny

        return getattr(tiny, name)(tmp_path_factory.mktemp(name))

    return build


tiny_bert = _tiny("tiny_bert")
tiny_xlmr = _tiny("tiny_xlmr")
tiny_gemma = _tiny("tiny_gemma")
tiny_minicpm = _tiny("tiny_minicpm")
tiny_t5 = _tiny("tiny_t5")
tiny_mt5 = _tiny("tiny_mt5")
