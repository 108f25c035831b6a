import json

import goldens
import numpy as np
import pytest
from langchain_core.documents import Document
from pydantic import ValidationError

from langchain_rerank import Reranker
from langchain_rerank.backends.layerwise import LayerwiseBackend
from langchain_rerank.backends.local import sigmoid
from langchain_rerank.errors import ConfigurationError, ModelLoadError
from langchain_rerank.testing import BackendTests

ALL = (2, 3, 4, 5, 6)


def minicpm(folder, **options):
    return LayerwiseBackend(
        **{"model": str(folder), "device": "cpu", "dtype": "float32", "cutoff_layers": [4]} | options
    )


class TestLayerwise(BackendTests):
    trained = False  # random weights

    @pytest.fixture(params=[(4,), (3, 6)])
    def backend(self, request, tiny_minicpm):
        return minicpm(tiny_minicpm, cutoff_layers=request.param, batch_size=4)


# The same numbers as FlagEmbedding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [512, 32])
def test_token_ids_equal_flagembeddings(tiny_minicpm, max_length):
    pairs, ids, _ = goldens.case("minicpm", tiny_minicpm, max_length)
    backend = minicpm(tiny_minicpm, max_length=max_length)
    backend.warmup()

    for (query, passage), expected in zip(pairs, ids, strict=True):
        assert list(backend._encode(query, [passage])[0].ids) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("max_length", [512, 32])
def test_every_layers_logits_equal_flagembeddings_at_every_batch_size(tiny_minicpm, max_length, batch_size):
    pairs, _, expected = goldens.case("minicpm", tiny_minicpm, max_length)
    backend = minicpm(
        tiny_minicpm, max_length=max_length, cutoff_layers=ALL, batch_size=batch_size, batch_tokens=100_000
    )

    assert goldens.logits(backend, pairs) == pytest.approx(expected, abs=goldens.TOLERANCE)


@pytest.mark.parametrize("layer", ALL)
def test_one_layers_logit_is_flagembeddings_of_that_layer(tiny_minicpm, layer):
    pairs, _, expected = goldens.case("minicpm", tiny_minicpm, 512)
    backend = minicpm(tiny_minicpm, cutoff_layers=[layer])
    logits = [backend.logits(query, [passage])[0] for query, passage in pairs]

    assert logits == pytest.approx(list(expected[ALL.index(layer)]), abs=goldens.TOLERANCE)


@pytest.mark.parametrize("pad", [2, 77])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_logit_is_read_at_the_last_real_token_not_at_a_pad(tiny_minicpm, side, pad):
    _, ids, expected = goldens.case("minicpm", tiny_minicpm, 512)
    backend = minicpm(tiny_minicpm, cutoff_layers=ALL)
    backend.warmup()

    logits = backend._forward(goldens.padded(ids, side, pad=pad, width=640))
    assert logits == pytest.approx(expected.T, abs=goldens.TOLERANCE)


# Layers -------------------------------------------------------------------------------------------------------------


def test_the_published_default_is_layer_28():
    assert LayerwiseBackend().cutoff_layers == (28,)


def test_of_several_layers_the_last_gives_the_score_and_each_is_in_the_metadata(tiny_minicpm):
    [document] = Reranker(backend=minicpm(tiny_minicpm, cutoff_layers=[6, 2])).compress_documents(
        [Document(page_content="Mars is red.")], "red planet"
    )
    second, sixth = (
        minicpm(tiny_minicpm, cutoff_layers=layer).score("red planet", ["Mars is red."])[0] for layer in (2, 6)
    )

    assert document.metadata["layer_scores"] == {"2": pytest.approx(second), "6": pytest.approx(sixth)}
    assert document.metadata["relevance_score"] == pytest.approx(sixth)
    assert json.dumps(document.metadata)


def test_one_layer_adds_nothing_to_the_metadata(tiny_minicpm):
    [score] = minicpm(tiny_minicpm).score("red planet", ["Mars is red."])

    assert score.details == {}


def test_the_raw_logit_is_that_of_the_last_layer(tiny_minicpm):
    backend = minicpm(tiny_minicpm, cutoff_layers=[2, 6], return_logits=True)
    [score] = backend.score("red planet", ["Mars is red."])

    assert score == sigmoid(score.details["relevance_logit"])
    assert backend.logits("red planet", ["Mars is red."]) == pytest.approx([score.details["relevance_logit"]])


@pytest.mark.parametrize("layers", [[1], [7], [4, 28]])
def test_a_layer_without_a_head_is_refused(tiny_minicpm, layers):
    with pytest.raises(ModelLoadError, match=r"has no head on layer .* choose from 2 to 6"):
        minicpm(tiny_minicpm, cutoff_layers=layers).warmup()


def test_no_layer_at_all_is_refused():
    with pytest.raises(ValidationError, match="cutoff_layers"):
        LayerwiseBackend(cutoff_layers=[])


def test_only_the_layers_that_are_needed_are_held(tiny_minicpm):
    backend = minicpm(tiny_minicpm, cutoff_layers=3)
    backend.warmup()

    assert len(backend._model.model.layers) == 3
    assert len(backend._model.lm_head) == 1


# What is refused ----------------------------------------------------------------------------------------------------


def test_remote_code_is_never_run_whatever_is_allowed(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "trap")
    path = folder / "tokenizer_config.json"
    trap = {"auto_map": {"AutoTokenizer": [None, "modeling_minicpm_reranker.Tokenizer"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | trap))

    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert "raise AssertionError" in (folder / "modeling_minicpm_reranker.py").read_text()
    assert minicpm(folder, trust_remote_code=True).score("q", ["t"]) == minicpm(tiny_minicpm).score("q", ["t"])


def test_another_kind_of_model_is_refused(tiny_gemma):
    with pytest.raises(ModelLoadError, match=r"is no layer-wise MiniCPM \(model_type='gemma', start_layer=None\)"):
        minicpm(tiny_gemma).warmup()


def test_a_plain_minicpm_without_heads_is_refused(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "plain", start_layer=None)

    with pytest.raises(ModelLoadError, match=r"is no layer-wise MiniCPM \(model_type='minicpm', start_layer=None\)"):
        minicpm(folder).warmup()


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        minicpm(tmp_path).warmup()


def test_a_model_that_is_not_in_the_cache_is_an_error_with_its_reason():
    with pytest.raises(ModelLoadError, match="no/such-model"):
        minicpm("no/such-model", local_files_only=True).warmup()


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_minicpm):
    with pytest.raises(ModelLoadError, match=r"max_length=2048, but .* reads at most \d+ tokens"):
        minicpm(tiny_minicpm, max_length=2048).warmup()


def test_arguments_for_transformers_are_refused(tiny_minicpm):
    with pytest.raises(ConfigurationError, match="does not load a layer-wise model; leave them out"):
        minicpm(tiny_minicpm, model_kwargs={"attn_implementation": "eager"}).warmup()


# Dtype --------------------------------------------------------------------------------------------------------------


def test_bfloat16_changes_a_score_little(tiny_minicpm):
    pairs, _, expected = goldens.case("minicpm", tiny_minicpm, 512)
    logits = goldens.logits(minicpm(tiny_minicpm, dtype="bfloat16", cutoff_layers=ALL), pairs)

    assert 0 < np.abs(logits - expected).mean() < 0.1


def test_a_fine_tuned_copy_loads_the_same_way(tiny_minicpm, tmp_path):
    folder = goldens.copy_of(tiny_minicpm, tmp_path / "tuned")
    goldens.change_weights(
        folder, lambda weights: {name: value * (1 + 9 * ("linear_head" in name)) for name, value in weights.items()}
    )
    [logit] = minicpm(tiny_minicpm).logits("red planet", ["Mars is red."])

    assert minicpm(folder).logits("red planet", ["Mars is red."]) == pytest.approx([10 * logit], rel=1e-4)
