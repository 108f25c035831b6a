import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.errors import ConfigurationError, ModelLoadError
from langchain_rerank.testing import BackendTests

QUERY = "Which planet is called the red planet?"
SHORT = ["Mars is the red planet.", "Jupiter is large.", "red", "Venus!"]
LONG = ["Mars is a planet and it is red. " * 40, "Jupiter " * 300, "one two three " * 31]


def cross_encoder(model, **options):
    return CrossEncoderBackend(model=model, **{"device": "cpu", "engine": "torch", "dtype": "float32", **options})


class TestCrossEncoder(BackendTests):
    trained = False  # random weights

    @pytest.fixture(params=["tiny_bert", "tiny_xlmr"])
    def backend(self, request):
        return cross_encoder(request.getfixturevalue(request.param), batch_size=4)


class TestCrossEncoderInBfloat16(BackendTests):
    trained = False  # random weights
    tolerance = 2e-2  # 8 bits of mantissa, and other shapes round otherwise

    @pytest.fixture
    def backend(self, tiny_xlmr):
        return cross_encoder(tiny_xlmr, dtype="bfloat16")


def plain(model, query, texts, max_length):
    """What plain transformers says, one pair at a time: query cut to 3/4, then `only_second`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(query, add_special_tokens=False)["input_ids"][: max_length * 3 // 4]
    logits = []
    for text in texts:
        passage = tokenizer(text, add_special_tokens=False)["input_ids"]
        specials = tokenizer.num_special_tokens_to_add(pair=True)
        passage = passage[: max_length - len(ids) - specials]
        # Both tokenisers write [CLS]/<s> a [SEP]/</s> (</s>) b [SEP]/</s>; only their specials differ.
        pair = tokenizer("x", "y", return_special_tokens_mask=True)
        specials_ids = [i for i, m in zip(pair["input_ids"], pair["special_tokens_mask"], strict=True) if m]
        row = [specials_ids[0], *ids, *specials_ids[1:-1], *passage, specials_ids[-1]]
        inputs = {"input_ids": torch.tensor([row])}
        if "token_type_ids" in tokenizer.model_input_names:
            first = 1 + len(ids) + len(specials_ids) - 2
            inputs["token_type_ids"] = torch.tensor([[0] * first + [1] * (len(row) - first)])
        with torch.no_grad():
            logits.append(float(network(**inputs).logits[0, 0]))
    return logits


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
@pytest.mark.parametrize("max_length", [64, 128])
def test_logits_equal_plain_transformers(request, model, max_length):
    model = request.getfixturevalue(model)
    expected = plain(model, QUERY, SHORT + LONG, max_length)
    found = cross_encoder(model, max_length=max_length).logits(QUERY, SHORT + LONG)

    assert np.std(expected) > 0.01, "random weights that say the same of all texts prove nothing"
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
def test_logits_equal_plain_transformers_for_a_query_over_three_quarters(request, model):
    model = request.getfixturevalue(model)
    query = QUERY * 30

    assert cross_encoder(model, max_length=64).logits(query, SHORT) == pytest.approx(
        plain(model, query, SHORT, 64), abs=1e-4
    )


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
def test_short_pairs_equal_the_tokenizers_own_pairs(request, model):
    model = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    backend = cross_encoder(model)
    backend.warmup()

    for encoding, text in zip(backend._encode(QUERY, SHORT), SHORT, strict=True):
        assert list(encoding.ids) == tokenizer(QUERY, text)["input_ids"]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_xlmr"])
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 100_000}, {"batch_tokens": 8}]
)
def test_logits_do_not_depend_on_the_batch(request, model, options):
    model = request.getfixturevalue(model)
    texts = SHORT + LONG

    assert cross_encoder(model, **options).logits(QUERY, texts) == pytest.approx(
        cross_encoder(model).logits(QUERY, texts), abs=1e-4
    )
    assert cross_encoder(model, **options).logits(QUERY, texts[::-1]) == pytest.approx(
        cross_encoder(model).logits(QUERY, texts)[::-1], abs=1e-4
    )


def test_logits_do_not_depend_on_threads(tiny_xlmr):
    backend, texts = cross_encoder(tiny_xlmr), SHORT + LONG
    expected = cross_encoder(tiny_xlmr).logits(QUERY, texts)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: backend.logits(QUERY, texts), range(12)):
            assert found == pytest.approx(expected, abs=1e-4)


def test_a_long_query_and_a_long_text_are_tokenised_without_their_product(tiny_bert):
    import tracemalloc

    backend = cross_encoder(tiny_bert)
    backend.warmup()
    tracemalloc.start()
    [encoding] = backend._encode("planet " * 5_000, ["red " * 50_000])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(encoding.ids) == backend._limit
    assert peak < 100_000_000


def test_a_lowered_default_length_fits_the_models_positions(tiny_xlmr, tmp_path):
    folder = shutil.copytree(tiny_xlmr, tmp_path / "model")
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    backend = cross_encoder(str(folder))
    backend.warmup()

    assert backend._limit <= positions - 2
    assert len(backend.score(QUERY, ["planet " * 5000])) == 1


def test_more_length_than_the_model_has_positions_is_refused_at_load(tiny_bert):
    with pytest.raises(ModelLoadError, match=r"max_length=100000, but .* reads at most \d+ tokens"):
        cross_encoder(tiny_bert, max_length=100_000).warmup()


def test_a_checkpoint_with_a_random_head_is_refused(tiny_bert, tmp_path):
    """peers.md, bug 5: LLM rerankers and plain encoders loaded as classifiers give random scores without a word."""
    folder = str(tmp_path / "encoder")
    config = BertConfig.from_pretrained(tiny_bert)
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)

    with pytest.raises(ModelLoadError, match="is no cross-encoder but BertForMaskedLM: its scoring head would be"):
        cross_encoder(folder).warmup()


def test_a_checkpoint_that_lacks_its_head_is_refused(tiny_bert, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelLoadError, match=r"lacks trained weights \(classifier.bias, classifier.weight\)"):
        cross_encoder(str(folder)).warmup()


def test_a_model_with_two_labels_is_refused(tiny_bert, tmp_path):
    """langchain#22556: a model with two logits breaks the order."""
    folder = str(tmp_path / "two")
    AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)

    with pytest.raises(ModelLoadError, match="has 2 labels; a reranker has one"):
        cross_encoder(folder).warmup()


def test_a_model_that_is_not_there_is_named_with_the_reason(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'.*nowhere' is no folder here; give one"):
        cross_encoder(str(tmp_path / "nowhere")).warmup()


def test_a_hub_model_that_is_not_in_the_cache_is_named_with_the_reason():
    with pytest.raises(ModelLoadError, match=r"'BAAI/bge-reranker-v2-m3' cannot be loaded: "):
        cross_encoder("BAAI/bge-reranker-v2-m3", local_files_only=True).warmup()


def test_remote_code_is_off_and_then_asks_for_a_revision():
    assert cross_encoder("a/b").trust_remote_code is False
    with pytest.raises(ValueError, match="pin it with revision="):
        cross_encoder("a/b", trust_remote_code=True)
    assert cross_encoder("a/b", trust_remote_code=True, revision="0a1b2c").trust_remote_code


def test_an_empty_model_is_refused():
    with pytest.raises(ValueError, match="model is empty"):
        cross_encoder("")


def test_a_device_that_is_not_there_is_refused_at_load(tiny_bert):
    with pytest.raises(ConfigurationError, match="device 'cuda:99' cannot be used here"):
        cross_encoder(tiny_bert, device="cuda:99").warmup()


def test_float16_on_a_cpu_is_refused(tiny_bert):
    with pytest.raises(ConfigurationError, match=r"'float16' is not for a CPU"):
        cross_encoder(tiny_bert, dtype="float16").warmup()


def test_options_of_from_pretrained_reach_it(tiny_bert):
    backend = cross_encoder(tiny_bert, model_kwargs={"attn_implementation": "eager"})
    backend.warmup()

    assert backend._model.config._attn_implementation == "eager"


def test_long_documents_are_read_whole_by_max_passage(tiny_xlmr):
    backend = cross_encoder(tiny_xlmr, max_length=64, long_documents="max_passage")
    text = "Jupiter is large. " * 30 + "Mars is the red planet."
    [score] = backend.score(QUERY, [text])
    start, end = score.details["passage_span"]

    assert 0 <= start < end <= len(text)
    passage = cross_encoder(tiny_xlmr, max_length=64).score(QUERY, [text[start:end]])
    assert float(score) == pytest.approx(passage[0], abs=1e-5)


def test_nan_is_an_error_that_says_what_to_change(tiny_bert, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_bert, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = np.full_like(weights["classifier.bias"], np.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(RuntimeError, match=r"returned nan for text 0; dtype='float32' has the range"):
        cross_encoder(str(folder), dtype="bfloat16").score(QUERY, SHORT)


def test_a_reloaded_folder_gives_the_same_scores(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "copy")

    assert cross_encoder(str(Path(folder))).logits(QUERY, SHORT) == cross_encoder(tiny_bert).logits(QUERY, SHORT)
