import json
import random
from itertools import pairwise

import goldens
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_rerank.backends.llm import LLMBackend
from langchain_rerank.errors import BackendError, ConfigurationError, ModelLoadError
from langchain_rerank.testing import BackendTests


def gemma(folder, **options):
    return LLMBackend(**{"model": str(folder), "device": "cpu", "dtype": "float32"} | options)


class TestLLM(BackendTests):
    trained = False  # random weights

    @pytest.fixture
    def backend(self, tiny_gemma):
        return gemma(tiny_gemma, batch_size=4)


# The same numbers as FlagEmbedding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [512, 32])
def test_token_ids_equal_flagembeddings(tiny_gemma, max_length):
    pairs, ids, _ = goldens.case("gemma", tiny_gemma, max_length)
    backend = gemma(tiny_gemma, max_length=max_length)
    backend.warmup()

    for (query, passage), expected in zip(pairs, ids, strict=True):
        assert list(backend._encode(query, [passage])[0].ids) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("max_length", [512, 32])
def test_logits_equal_flagembeddings_at_every_batch_size(tiny_gemma, max_length, batch_size):
    pairs, _, [expected] = goldens.case("gemma", tiny_gemma, max_length)
    backend = gemma(tiny_gemma, max_length=max_length, batch_size=batch_size, batch_tokens=100_000)

    assert goldens.logits(backend, pairs)[0] == pytest.approx(expected, abs=goldens.TOLERANCE)


def test_one_pair_alone_has_flagembeddings_logit(tiny_gemma):
    pairs, _, [expected] = goldens.case("gemma", tiny_gemma, 512)
    backend = gemma(tiny_gemma)
    alone = [backend.logits(query, [passage])[0] for query, passage in pairs]

    assert alone == pytest.approx(list(expected), abs=goldens.TOLERANCE)


def published(model, tokenizer, query, passage, max_length):
    """The rules as they are published, one pair at a time, with the logits of the whole vocabulary.

    Prompt, `A: `, `B: `, separator, "Yes" and the last token: model card of BAAI/bge-reranker-v2-gemma.
    Limits: FlagEmbedding 1.4.2, inference/reranker/decoder_only/base.py, `compute_score_single_gpu`.
    """
    prompt = tokenizer(tiny.PROMPT, add_special_tokens=False).input_ids
    separator = tokenizer("\n", add_special_tokens=False).input_ids
    asked = tokenizer(
        f"A: {query}", add_special_tokens=False, truncation=True, max_length=max_length * 3 // 4
    ).input_ids
    answer = tokenizer(f"B: {passage}", add_special_tokens=False, truncation=True, max_length=max_length).input_ids
    first, second = [tokenizer.bos_token_id, *asked], [*separator, *answer]
    surplus = len(first) + len(second) - (max_length + len(separator) + len(prompt))
    ids = first + (second[:-surplus] if surplus > 0 else second) + separator + prompt
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return float(logits[tokenizer("Yes", add_special_tokens=False).input_ids[0]])


@pytest.mark.parametrize("max_length", [512, 100, 40])
def test_logits_equal_a_plain_transcription_of_the_published_rules(tiny_gemma, max_length):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_gemma).eval(),
        AutoTokenizer.from_pretrained(tiny_gemma),
    )
    pairs = goldens.read("gemma", tiny_gemma)["pairs"]
    expected = [published(model, tokenizer, query, passage, max_length) for query, passage in pairs]

    assert goldens.logits(gemma(tiny_gemma, max_length=max_length), pairs)[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pad", [0, 77])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_logit_is_read_at_the_last_real_token_not_at_a_pad(tiny_gemma, side, pad):
    _, ids, [expected] = goldens.case("gemma", tiny_gemma, 512)
    backend = gemma(tiny_gemma)
    backend.warmup()

    batch = goldens.padded(ids, side, pad=pad, width=640)
    assert backend._forward(batch) == pytest.approx(expected, abs=goldens.TOLERANCE)


def test_a_language_model_is_asked_with_its_prompt_and_yes_alone_counts(tiny_gemma):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_gemma).eval(),
        AutoTokenizer.from_pretrained(tiny_gemma),
    )
    with torch.inference_mode():
        bare = model(**tokenizer("red planet", "Mars is red.", return_tensors="pt")).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    [logit] = gemma(tiny_gemma).logits("red planet", ["Mars is red."])

    assert logit == pytest.approx(published(model, tokenizer, "red planet", "Mars is red.", 512), abs=1e-4)
    assert abs(logit - float(bare[yes] - bare[no])) > 0.1
    assert abs(logit - float(bare[yes])) > 0.1


def test_the_vocabularys_logits_are_not_computed(tiny_gemma):
    backend = gemma(tiny_gemma)
    backend.warmup()

    def computed(*_):
        raise AssertionError("the head ran over the whole vocabulary")

    backend._model.lm_head.register_forward_hook(computed)
    assert len(backend.score("red planet", ["Mars", "Bread"])) == 2


def test_the_token_before_the_query_is_left_out_where_it_is_the_padding(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<bos>"}))
    plain, padded = gemma(tiny_gemma), gemma(folder)
    plain.warmup()
    padded.warmup()

    assert padded._encode("q", ["p"])[0].ids == plain._encode("q", ["p"])[0].ids[1:]


# Limits -------------------------------------------------------------------------------------------------------------


def prose(seed, words):
    """Random text with odd white space, other scripts and long words."""
    pick = random.Random(seed).choices
    parts = ["planet", "Mars", "is", "the", " ", "\n", "火星", "é", "supercalifragilistic", "42", ".", "🪐", "Yes"]
    return " ".join(pick(parts, k=words))


@pytest.mark.parametrize("seed", range(10))
def test_the_query_and_the_prompt_survive_every_truncation(tiny_gemma, seed):
    backend = gemma(tiny_gemma, max_length=64)
    backend.warmup()
    query = prose(seed, 4 * seed)
    [encoding] = backend._encode(query, [prose(-1 - seed, 200)])
    asked = backend._ids(f"A: {query}")[:48]

    assert encoding.truncated
    assert list(encoding.ids)[: len(asked) + 1] == [2, *asked]
    assert list(encoding.ids)[-len(backend._end) :] == backend._ids("\n") + backend._ids(tiny.PROMPT)
    assert len(encoding.ids) <= 64 + 2 * len(backend._end)


@pytest.mark.parametrize("seed", range(10))
def test_the_passages_of_a_long_document_cover_it_and_none_is_cut(tiny_gemma, seed):
    backend = gemma(tiny_gemma, max_length=64, long_documents="max_passage")
    backend.warmup()
    text = prose(seed, 300)
    pieces = backend._pieces(prose(seed + 100, 4 * seed), [text])

    assert len(pieces) > 2
    assert not any(piece.encoding.truncated for piece in pieces)
    spans = [piece.span for piece in pieces]
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(start <= stop for (_, stop), (start, _) in pairwise(spans))


def test_a_long_document_is_as_good_as_its_best_passage(tiny_gemma):
    text = prose(3, 200)
    best = gemma(tiny_gemma, max_length=64, long_documents="max_passage")
    [score] = best.score("red planet", [text])
    alone = [best.score("red planet", [text[slice(*piece.span)]])[0] for piece in best._pieces("red planet", [text])]

    assert score == pytest.approx(max(alone))
    assert text[slice(*score.details["passage_span"])]


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "short", max_position_embeddings=256)

    with pytest.raises(ModelLoadError, match=r"max_length=512, but .* reads at most \d+ tokens"):
        gemma(folder, max_length=512).warmup()
    backend = gemma(folder)
    backend.warmup()
    assert len(backend._encode(prose(1, 500), [prose(0, 500)])[0].ids) <= 256


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_splits_yes_is_refused(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "no-yes")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocabulary["<unused>"] = vocabulary.pop("Yes")
    tokenizer["model"]["merges"] = [pair for pair in merges if "Yes" not in ["".join(pair), *pair]]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")

    with pytest.raises(ModelLoadError, match=r"no piece 'Yes' but makes \['Y', 'es'\] of it"):
        gemma(folder).warmup()


def test_a_tokenizer_that_knows_no_yes_at_all_is_refused(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "unknown")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    for number, piece in enumerate([piece for piece in vocabulary if set(piece) & set("Yes") and piece != "<unk>"]):
        vocabulary[f"<gone{number}>"] = vocabulary.pop(piece)
    for byte in b"Yes":
        vocabulary[f"<byte{byte}>"] = vocabulary.pop(f"<0x{byte:02X}>")
    tokenizer["model"]["merges"] = []
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in vocabulary]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")

    with pytest.raises(ModelLoadError, match=r"no piece 'Yes' but makes \['<unk>'\] of it"):
        gemma(folder).warmup()


def test_a_model_that_is_no_language_model_is_refused(tiny_xlmr):
    with pytest.raises(ModelLoadError, match="is no language model but XLMRobertaForSequenceClassification"):
        gemma(tiny_xlmr).warmup()


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "capped", final_logit_softcapping=30.0)

    with pytest.raises(ModelLoadError, match="changes its logits by final_logit_softcapping"):
        gemma(folder).warmup()


def test_a_checkpoint_with_missing_weights_is_refused(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "part")
    goldens.change_weights(
        folder, lambda weights: {name: value for name, value in weights.items() if "layers.2.mlp" not in name}
    )

    with pytest.raises(ModelLoadError, match=r"lacks trained weights .*layers\.2\.mlp.* would be random"):
        gemma(folder).warmup()


def test_a_folder_that_is_not_there_is_an_error_with_its_reason():
    with pytest.raises(ModelLoadError, match="'no/such-model' cannot be loaded: "):
        gemma("no/such-model", local_files_only=True).warmup()


def test_float16_on_a_cpu_is_refused(tiny_gemma):
    with pytest.raises(ConfigurationError, match="float16"):
        gemma(tiny_gemma, dtype="float16").warmup()


def test_a_nan_is_an_error_that_says_what_to_change(tiny_gemma, tmp_path):
    folder = goldens.copy_of(tiny_gemma, tmp_path / "nan")
    goldens.change_weights(
        folder, lambda weights: {name: value * np.float32(np.nan) for name, value in weights.items()}
    )

    with pytest.raises(BackendError, match=r"returned nan for text 0; dtype='float32'"):
        gemma(folder, dtype="bfloat16").score("q", ["t"])


# Dtype and options ---------------------------------------------------------------------------------------------------


def test_bfloat16_changes_a_score_little(tiny_gemma):
    pairs = goldens.read("gemma", tiny_gemma)["pairs"]
    exact, rounded = (goldens.logits(gemma(tiny_gemma, dtype=dtype), pairs) for dtype in ("float32", "bfloat16"))

    assert 0 < np.abs(exact - rounded).mean() < 0.1


def test_building_the_backend_loads_nothing(tiny_gemma):
    backend = gemma(tiny_gemma)

    assert backend._model is None
    assert backend.score("q", []) == []
    assert backend._model is None


def test_arguments_for_the_model_reach_it(tiny_gemma):
    backend = gemma(tiny_gemma, model_kwargs={"attn_implementation": "eager"})
    backend.warmup()

    assert backend._model.config._attn_implementation == "eager"


def test_the_raw_logit_is_there_for_the_asking(tiny_gemma):
    [score] = gemma(tiny_gemma, return_logits=True).score("red planet", ["Mars"])

    assert score.details["relevance_logit"] == pytest.approx(gemma(tiny_gemma).logits("red planet", ["Mars"])[0])
