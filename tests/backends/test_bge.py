import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import goldens
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from langchain_rerank import init_reranker
from langchain_rerank.backends.bge import BGEBackend
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.layerwise import LayerwiseBackend
from langchain_rerank.backends.llm import LLMBackend
from langchain_rerank.errors import ConfigurationError, ModelLoadError
from langchain_rerank.testing import BackendTests

KINDS = {"tiny_xlmr": CrossEncoderBackend, "tiny_gemma": LLMBackend, "tiny_minicpm": LayerwiseBackend}


def bge(folder, **options):
    return BGEBackend(**{"model": str(folder), "device": "cpu", "engine": "torch", "dtype": "float32"} | options)


@pytest.fixture(params=KINDS)
def any_bge(request):
    """A backend of each kind, on a tiny model."""
    options = {"cutoff_layers": [4]} if request.param == "tiny_minicpm" else {}
    return bge(request.getfixturevalue(request.param), **options)


class TestBGE(BackendTests):
    trained = False  # random weights

    @pytest.fixture
    def backend(self, any_bge):
        return any_bge.model_copy(update={"batch_size": 4})


# The same numbers as FlagEmbedding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [512, 32])
def test_an_encoders_token_ids_equal_flagembeddings(tiny_xlmr, max_length):
    pairs, ids, _ = goldens.case("xlmr", tiny_xlmr, max_length)
    backend = bge(tiny_xlmr, max_length=max_length)
    backend.warmup()

    for (query, passage), expected in zip(pairs, ids, strict=True):
        assert list(backend._encode(query, [passage])[0].ids) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("max_length", [512, 32])
def test_an_encoders_logits_equal_flagembeddings_at_every_batch_size(tiny_xlmr, max_length, batch_size):
    pairs, _, [expected] = goldens.case("xlmr", tiny_xlmr, max_length)
    backend = bge(tiny_xlmr, max_length=max_length, batch_size=batch_size, batch_tokens=100_000)

    assert goldens.logits(backend, pairs)[0] == pytest.approx(expected, abs=goldens.TOLERANCE)


def published(model, tokenizer, query, passage, max_length):
    """The rules as they are published, one pair at a time.

    Query cut to three quarters, then `<s> q </s></s> p </s>` cut in the passage only:
    FlagEmbedding 1.4.2, inference/reranker/encoder_only/base.py, `compute_score_single_gpu`.
    """
    asked = tokenizer(query, add_special_tokens=False, truncation=True, max_length=max_length * 3 // 4).input_ids
    answer = tokenizer(passage, add_special_tokens=False).input_ids[: max_length - len(asked) - 4]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    with torch.inference_mode():
        return float(model(torch.tensor([[start, *asked, end, end, *answer, end]])).logits)


@pytest.mark.parametrize("max_length", [512, 100, 32])
def test_an_encoders_logits_equal_a_plain_transcription_of_the_published_rules(tiny_xlmr, max_length):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_xlmr).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_xlmr)
    pairs = goldens.read("xlmr", tiny_xlmr)["pairs"]
    expected = [published(model, tokenizer, query, passage, max_length) for query, passage in pairs]

    assert goldens.logits(bge(tiny_xlmr, max_length=max_length), pairs)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "options"), [("gemma", {}), ("minicpm", {"cutoff_layers": [2, 3, 4, 5, 6]})])
def test_a_language_models_logits_equal_flagembeddings(request, name, options):
    folder = request.getfixturevalue(f"tiny_{name}")
    pairs, _, expected = goldens.case(name, folder, 512)

    assert goldens.logits(bge(folder, **options), pairs) == pytest.approx(expected, abs=goldens.TOLERANCE)


# Which kind ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", KINDS)
def test_the_kind_is_read_from_the_config_and_not_guessed_from_the_name(request, fixture, tmp_path):
    others = {"tiny_xlmr": "bge-reranker-v2-gemma", "tiny_gemma": "bge-reranker-v2-m3", "tiny_minicpm": "bge-m3"}
    folder = goldens.copy_of(request.getfixturevalue(fixture), tmp_path / others[fixture])
    backend = bge(folder, **({"cutoff_layers": 4} if fixture == "tiny_minicpm" else {}))
    backend.warmup()

    assert type(backend._chosen) is KINDS[fixture]


def test_a_gemma_reranker_is_never_loaded_with_a_random_classification_head(tiny_gemma):
    pairs, _, [expected] = goldens.case("gemma", tiny_gemma, 512)
    twice = [goldens.logits(bge(tiny_gemma), pairs)[0] for _ in range(2)]

    assert twice[0] == pytest.approx(twice[1])
    assert twice[0] == pytest.approx(expected, abs=goldens.TOLERANCE)
    with pytest.raises(ModelLoadError, match="GemmaForCausalLM"):
        CrossEncoderBackend(model=tiny_gemma, device="cpu").warmup()


def test_a_layer_wise_reranker_is_never_loaded_with_a_random_classification_head(tiny_minicpm):
    with pytest.raises(ModelLoadError, match="custom code"):
        CrossEncoderBackend(model=tiny_minicpm, device="cpu").warmup()


def test_a_fine_tuned_copy_loads_the_same_way(tiny_xlmr, tmp_path):
    folder = goldens.copy_of(tiny_xlmr, tmp_path / "checkpoint-500")
    goldens.change_weights(
        folder, lambda weights: {name: value * (1 + 9 * ("out_proj" in name)) for name, value in weights.items()}
    )
    [logit] = bge(tiny_xlmr).logits("red planet", ["Mars is red."])

    assert bge(folder).logits("red planet", ["Mars is red."]) == pytest.approx([10 * logit], rel=1e-4)


def test_it_goes_by_the_name_bge(tiny_minicpm):
    reranker = init_reranker({"backend": "bge", "model": tiny_minicpm, "cutoff_layers": [2, 6], "dtype": "float32"})

    assert isinstance(reranker.backend, BGEBackend)
    assert reranker.backend.name == "bge"
    assert [result.index for result in reranker.rerank("red planet", ["Mars"])] == [0]


def test_layer_scores_pass_through(tiny_minicpm):
    [score] = bge(tiny_minicpm, cutoff_layers=[2, 6]).score("red planet", ["Mars"])

    assert score.details["layer_scores"].keys() == {"2", "6"}


def test_a_long_document_is_split_by_the_rules_of_its_kind(any_bge):
    backend = any_bge.model_copy(update={"max_length": 64, "long_documents": "max_passage"})
    [score] = backend.score("red planet", ["Mars is the red planet. " * 200])

    assert backend._chosen.max_length == 64
    assert score.details["passage_span"]


@pytest.mark.parametrize(("fixture", "pad"), [("tiny_xlmr", 1), ("tiny_gemma", 0), ("tiny_minicpm", 2)])
def test_a_batch_is_padded_with_the_models_own_token(request, fixture, pad):
    backend = bge(request.getfixturevalue(fixture), **({"cutoff_layers": 4} if fixture == "tiny_minicpm" else {}))
    backend.warmup()
    batch = backend._collate(backend._encode("red planet", ["Mars", "Jupiter is the largest planet."]))

    assert batch.ids[0, -1] == pad
    assert batch.mask[0, -1] == 0


def test_what_the_loaded_model_can_read_is_the_limit_here_too(tiny_gemma, tmp_path, caplog):
    backend = bge(goldens.copy_of(tiny_gemma, tmp_path / "short", max_position_embeddings=256))
    [score] = backend.score("red planet", ["Mars is the red planet. " * 200])

    assert score.details == {"truncated": True}
    assert backend._limit == backend._chosen._limit < 256
    assert f"did not fit into max_length={backend._limit} and were cut" in caplog.text
    assert backend._device == torch.device("cpu")


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_name_on_the_hub_loads_from_the_cache_without_its_remote_code(tiny_xlmr, tiny_gemma, tiny_minicpm, tmp_path):
    names = {"bge-reranker-base": tiny_xlmr, "bge-reranker-v2-gemma": tiny_gemma, "layerwise": tiny_minicpm}
    for name, folder in names.items():
        repository = tmp_path / "hub" / f"models--BAAI--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0123abc")
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / "0123abc").symlink_to(folder)
    code = """if True:
        import sys
        from langchain_rerank.backends.bge import BGEBackend
        for name in sys.argv[1:]:
            layers = {"cutoff_layers": [4]} if name == "layerwise" else {}
            backend = BGEBackend(model=f"BAAI/{name}", dtype="float32", device="cpu", local_files_only=True, **layers)
            print(backend.logits("red planet", ["Mars is red."])[0])
    """
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    ran = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, env=environment
    )
    expected = [
        bge(folder, **({"cutoff_layers": [4]} if folder == tiny_minicpm else {})).logits(
            "red planet", ["Mars is red."]
        )[0]
        for folder in names.values()
    ]

    assert [float(line) for line in ran.stdout.split()] == pytest.approx(expected, abs=1e-5)


def test_building_one_loads_nothing_and_needs_no_model():
    code = (
        "import sys; from langchain_rerank.backends.bge import BGEBackend; "
        "BGEBackend(model='no/such-model', cutoff_layers=[99]); print(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"torch", "transformers", "huggingface_hub"} & set(ran.stdout.split())


# What is refused ----------------------------------------------------------------------------------------------------


def test_an_embedding_model_is_refused(tiny_xlmr, tmp_path):
    folder = goldens.copy_of(tiny_xlmr, tmp_path / "bge-m3", architectures=["XLMRobertaModel"])

    with pytest.raises(ModelLoadError, match="is no reranker but XLMRobertaModel, such as an embedding model"):
        bge(folder).warmup()


def test_a_config_that_names_no_architecture_is_refused(tiny_xlmr, tmp_path):
    folder = goldens.copy_of(tiny_xlmr, tmp_path / "anonymous", architectures=None)

    with pytest.raises(ModelLoadError, match="is no reranker but of no named architecture"):
        bge(folder).warmup()


@pytest.mark.parametrize("changed", [{"model_type": "cost_wise_gemma"}, {"compress_ratio": 2}])
def test_the_token_compressing_reranker_is_refused(tiny_gemma, tmp_path, changed):
    folder = goldens.copy_of(
        tiny_gemma, tmp_path / "lightweight", architectures=["CostWiseGemmaForCausalLM"], **changed
    )

    with pytest.raises(ModelLoadError, match="token-compressing reranker, which is not supported; use BAAI/"):
        bge(folder).warmup()


def test_an_adapter_without_its_base_is_refused(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "BAAI/bge-reranker-v2-gemma"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))

    with pytest.raises(ModelLoadError, match=r"is an adapter, not a whole model: .* 'BAAI/bge-reranker-v2-gemma' with"):
        bge(tmp_path).warmup()


def test_a_classifier_of_two_labels_is_refused(tiny_xlmr, tmp_path):
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    folder = goldens.copy_of(tiny_xlmr, tmp_path / "two", **labels)

    with pytest.raises(ModelLoadError, match="2 labels"):
        bge(folder).warmup()


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        bge(tmp_path).warmup()


def test_a_model_that_is_not_there_is_an_error_with_its_name():
    with pytest.raises(ModelLoadError, match="no/such-model"):
        bge("no/such-model", local_files_only=True).warmup()


def test_a_broken_config_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text("{")

    with pytest.raises(ModelLoadError, match="cannot be loaded: Expecting property name"):
        bge(tmp_path).warmup()


@pytest.mark.parametrize("fixture", ["tiny_xlmr", "tiny_gemma"])
def test_layers_for_a_model_that_has_none_are_refused(request, fixture):
    backend = bge(request.getfixturevalue(fixture), cutoff_layers=[28])

    with pytest.raises(ConfigurationError, match=r"cutoff_layers=.* is for layer-wise models, and .* is none"):
        backend.warmup()


def test_arguments_for_transformers_are_refused_where_it_does_not_load_the_model(tiny_minicpm):
    with pytest.raises(ConfigurationError, match="does not load a layer-wise model; leave them out"):
        bge(tiny_minicpm, cutoff_layers=[4], model_kwargs={"attn_implementation": "eager"}).warmup()


def test_an_empty_list_of_layers_is_refused_at_once():
    with pytest.raises(ValidationError, match="cutoff_layers"):
        bge("any", cutoff_layers=[])


def test_no_layers_given_means_the_published_default(tiny_minicpm):
    with pytest.raises(ModelLoadError, match=r"cutoff_layers=\[28\]: the model has no head on layer 28"):
        bge(tiny_minicpm).warmup()


# Peers' bugs --------------------------------------------------------------------------------------------------------


def test_an_error_in_the_forward_pass_is_not_taken_for_a_lack_of_memory(any_bge):
    any_bge.warmup()
    calls = []

    def fails(*_):
        calls.append(1)
        raise RuntimeError("shapes cannot be multiplied")

    any_bge._chosen._model.register_forward_pre_hook(fails)
    if isinstance(any_bge._chosen, LLMBackend):
        any_bge._chosen._model.base_model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        any_bge.score("red planet", ["Mars", "Jupiter", "Bread"])
    assert calls == [1]


def test_scoring_from_several_threads_leaves_the_model_as_it_was(any_bge):
    any_bge.warmup()
    model = any_bge._chosen._model
    before = {name: (value.data_ptr(), value.dtype, value.sum().item()) for name, value in model.named_parameters()}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: any_bge.score(f"planet {number}", ["Mars", "Jupiter"]), range(8)))

    after = {name: (value.data_ptr(), value.dtype, value.sum().item()) for name, value in model.named_parameters()}
    assert any_bge._chosen._model is model
    assert after == before
    assert not model.training


def test_no_pairs_are_no_error(any_bge):
    assert any_bge.score("red planet", []) == []
    assert any_bge._chosen is None
