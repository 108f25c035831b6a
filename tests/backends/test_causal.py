import json
import random
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.local import Batch, sigmoid
from langchain_rerank.errors import BackendError, ConfigurationError, MissingDependencyError, ModelLoadError
from langchain_rerank.testing import BackendTests

QUERY = "Which planet is called the red planet?"
SHORT = ["Mars is the red planet.", "Jupiter is large.", "red", "Venus!", "火星 🪐"]
MIXED = [*SHORT, "Mars is a planet and it is red. " * 12, "Jupiter " * 60, "one two three " * 31]
LONG = ["Mars is a planet and it is red. " * 60, "Jupiter " * 300, "one two three " * 131]

SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | list -%}"
    "<|im_start|>system\nDoes the passage answer the query? yes or no<|im_end|>\n<|im_start|>user\n"
    "<Instruct>: {{ asked[0] if asked else 'what is the red planet?' }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "{{ " + repr(SUFFIX) + " }}"  # written plainly, its last newline would be lost
)
"""In the manner of Qwen3-Reranker: an instruction from the system message, then a pair, then the answer's beginning."""


def language_model(folder, architecture="Qwen3ForCausalLM", **changes):
    """A decoder with byte-level pieces, `yes` and `no` among them, and random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [*tiny.CORPUS, "yes", "yes", "no", "no", TEMPLATE]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 131072}
    tiny._save_tokenizer(folder, tokenizer, tokenizer_class="Qwen2Tokenizer", **names)
    config = {
        "architectures": [architecture],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **changes,
    }
    gains = {"embed_tokens": 0.5, "q_proj": 2.0, "k_proj": 2.0, "o_proj": 2.0, "lm_head": 2.0, "score": 4.0}
    return tiny._save_transformers(folder, config, seed=17, gains={**gains, "wte": 0.5, "wpe": 0.5})


def save(folder, source, *, template=TEMPLATE, task="text-generation", activation=None):
    """What sentence-transformers writes for a reranker."""
    options = {"processor_kwargs": {"chat_template": template}} if template else {}
    transformer = Transformer(source, transformer_task=task, **options)
    modules = [transformer]
    if task == "text-generation":
        yes, no = transformer.tokenizer.convert_tokens_to_ids(["yes", "no"])
        modules.append(LogitScore(yes, no))
    prompts = {"prompts": {"web": "largest planet of the solar system"}, "default_prompt_name": "web"}
    model = CrossEncoder(modules=modules, device="cpu", activation_fn=activation, **prompts)
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


@pytest.fixture(scope="session")
def plain_qwen(tmp_path_factory):
    """A language model as it is published: no files of sentence-transformers."""
    return language_model(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory, plain_qwen):
    return save(tmp_path_factory.mktemp("reranker"), plain_qwen)


def backend_for(model, **options):
    return CrossEncoderBackend(**{"model": str(model), "device": "cpu", "dtype": "float32"} | options)


def predicted(model, query, texts, *, prompt=None, **options):
    """The logits of sentence-transformers, one pair at a time."""
    reference = CrossEncoder(str(model), device="cpu", model_kwargs={"dtype": torch.float32}, **options)
    pairs = [[(query, text)] for text in texts]
    return [float(reference.predict(pair, prompt=prompt, activation_fn=torch.nn.Identity())[0]) for pair in pairs]


def edit(folder, name, **changes):
    """Change a JSON file of a model; `None` takes a key out."""
    content = {**json.loads(Path(folder, name).read_text()), **changes}
    Path(folder, name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def copy_of(tmp_path):
    return lambda model: str(shutil.copytree(model, tmp_path / "copy"))


class TestCausal(BackendTests):
    trained = False  # random weights

    @pytest.fixture
    def backend(self, tiny_qwen):
        return backend_for(tiny_qwen, batch_size=4)


class TestCausalInBfloat16(BackendTests):
    trained = False  # random weights
    tolerance = 3e-2  # 8 bits of mantissa, and the logit is a difference of two

    @pytest.fixture
    def backend(self, tiny_qwen):
        return backend_for(tiny_qwen, dtype="bfloat16")


# The same numbers as sentence-transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 3}, {"batch_tokens": 10**6}])
def test_logits_equal_sentence_transformers_at_every_batch_size(tiny_qwen, options):
    expected = predicted(tiny_qwen, QUERY, MIXED)
    backend = backend_for(tiny_qwen, **options)

    assert np.std(expected) > 0.1, "random weights that say the same of all texts prove nothing"
    assert backend.logits(QUERY, MIXED) == pytest.approx(expected, abs=1e-4)
    assert backend.logits(QUERY, MIXED[::-1]) == pytest.approx(expected[::-1], abs=1e-4)


def test_token_ids_are_sentence_transformers_own(tiny_qwen):
    reference = CrossEncoder(tiny_qwen, device="cpu")
    prompt = reference.prompts[reference.default_prompt_name]
    backend = backend_for(tiny_qwen)
    backend.warmup()

    for text, encoding in zip(MIXED, backend._encode(QUERY, MIXED), strict=True):
        assert encoding.ids == reference.preprocess([(QUERY, text)], prompt=prompt)["input_ids"][0].tolist()
        assert not encoding.truncated


@pytest.mark.parametrize("seed", range(6))
def test_any_prompt_is_the_one_that_sentence_transformers_reads(tiny_qwen, seed):
    words = random.Random(seed)
    prompt = " ".join(
        words.choice(tiny.CORPUS).split()[0] + words.choice(["", "\n", " 🪐", "{{ x }}"]) for _ in range(9)
    )
    expected = predicted(tiny_qwen, QUERY, SHORT, prompt=prompt)

    assert backend_for(tiny_qwen, prompt=prompt).logits(QUERY, SHORT) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(predicted(tiny_qwen, QUERY, SHORT), abs=1e-3)


def test_an_empty_prompt_leaves_the_models_own_out(tiny_qwen):
    expected = predicted(tiny_qwen, QUERY, SHORT, prompt="")

    assert backend_for(tiny_qwen, prompt="").logits(QUERY, SHORT) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(predicted(tiny_qwen, QUERY, SHORT), abs=1e-3)


def test_a_score_is_the_sigmoid_whatever_activation_the_files_name(plain_qwen, tmp_path):
    model = save(tmp_path, plain_qwen, activation=torch.nn.Identity())
    logits = predicted(model, QUERY, SHORT)
    scores = backend_for(model, return_logits=True).score(QUERY, SHORT)

    assert CrossEncoder(model, device="cpu").predict([(QUERY, SHORT[0])])[0] == pytest.approx(logits[0], abs=1e-4)
    assert scores == pytest.approx([sigmoid(logit) for logit in logits], abs=1e-5)
    assert [score.details["relevance_logit"] for score in scores] == pytest.approx(logits, abs=1e-4)


def test_a_model_without_a_chat_template_reads_the_pair_as_its_tokenizer_writes_it(plain_qwen, tmp_path):
    model = save(tmp_path, plain_qwen, template=None)

    assert backend_for(model).logits(QUERY, MIXED) == pytest.approx(predicted(model, QUERY, MIXED), abs=1e-4)


@pytest.fixture(scope="session")
def plain_classifier(tmp_path_factory):
    changes = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tie_word_embeddings": True}
    return language_model(tmp_path_factory.mktemp("classifier"), "Qwen3ForSequenceClassification", **changes)


def test_a_classifier_with_a_prompt_is_scored_with_it(plain_classifier, tmp_path):
    """A language model turned into a classifier keeps its prompt; query and passage alone would be another input."""
    model = save(tmp_path, plain_classifier, task="sequence-classification")
    expected = predicted(model, QUERY, MIXED)

    assert np.std(expected) > 0.1
    assert backend_for(model, batch_size=3).logits(QUERY, MIXED) == pytest.approx(expected, abs=1e-4)


def test_an_encoder_saved_by_sentence_transformers_goes_the_usual_way(tiny_bert, tmp_path):
    CrossEncoder(tiny_bert, device="cpu").save_pretrained(str(tmp_path), create_model_card=False)
    assert (tmp_path / "modules.json").is_file()
    backend = backend_for(tmp_path)

    assert backend.logits(QUERY, MIXED + LONG) == backend_for(tiny_bert).logits(QUERY, MIXED + LONG)
    assert backend._chosen is None


# Long pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [160, 200, 256])
def test_a_long_passage_is_cut_where_sentence_transformers_cuts_it(tiny_qwen, max_length):
    expected = predicted(tiny_qwen, QUERY, MIXED + LONG, max_length=max_length)
    backend = backend_for(tiny_qwen, max_length=max_length)

    assert backend.logits(QUERY, MIXED + LONG) == pytest.approx(expected, abs=1e-4)
    assert all(encoding.truncated and len(encoding.ids) == max_length for encoding in backend._encode(QUERY, LONG))


@pytest.mark.parametrize("query", [QUERY, QUERY * 40, "火星🪐" * 200])
@pytest.mark.parametrize("max_length", [140, 200, 512])
def test_a_cut_pair_keeps_prompt_query_and_suffix_and_some_of_the_passage(tiny_qwen, query, max_length):
    backend = backend_for(tiny_qwen, max_length=max_length)
    backend.warmup()
    tokenizer = backend._chosen._tokenizer
    texts = [*LONG, "火星是红色的🪐" * 200, QUERY * 100]

    for text, encoding in zip(texts, backend._encode(query, texts), strict=True):
        rendered = tokenizer.decode(encoding.ids, skip_special_tokens=False)
        asked, passage = rendered.removesuffix(SUFFIX).split("<Query>: ")[1].split("\n<Document>: ")

        assert rendered.startswith("<|im_start|>system\nDoes the passage answer the query? yes or no<|im_end|>")
        assert rendered.endswith(SUFFIX)
        assert "<Instruct>: largest planet of the solar system\n" in rendered
        assert query.startswith(asked)
        assert asked == query or len(query) > 2 * len(QUERY)
        assert passage
        assert text.startswith(passage)
        assert max_length - 4 <= len(encoding.ids) <= max_length


def test_a_long_query_is_cut_to_three_quarters_of_what_the_prompt_leaves(tiny_qwen, caplog):
    backend = backend_for(tiny_qwen, max_length=200)
    backend.score(QUERY * 40, SHORT)
    [warning] = [record.message for record in caplog.records if "a query of" in record.message]
    most = (200 - backend._chosen._frame) * 3 // 4
    whole = len(backend._chosen._offsets(QUERY * 40))

    assert f"a query of {whole} tokens was cut to {most} (max_length=200" in warning
    assert len(backend._chosen._offsets(backend._chosen._cut(QUERY * 40))) == most


def test_a_cut_passage_says_so_and_nothing_else_does(tiny_qwen, caplog):
    backend = backend_for(tiny_qwen, max_length=200)
    backend.warmup()
    caplog.clear()
    scores = backend.score(QUERY, [SHORT[0], LONG[0] * 9])

    assert [score.details for score in scores] == [{}, {"truncated": True}]
    assert ["1 of 2 documents did not fit" in record.message for record in caplog.records] == [True]


def test_long_documents_are_read_whole_by_max_passage(tiny_qwen):
    text = "Jupiter is large. " * 60 + "Mars is the red planet."
    backend = backend_for(tiny_qwen, max_length=200, long_documents="max_passage")
    [score] = backend.score(QUERY, [text])
    start, end = score.details["passage_span"]
    spans = [piece.span for piece in backend._pieces(QUERY, [text])]

    assert len(spans) > 3
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    assert not any(piece.encoding.truncated for piece in backend._pieces(QUERY, [text]))
    assert backend_for(tiny_qwen).score(QUERY, [text[start:end]]) == pytest.approx([score], abs=1e-5)
    assert score == pytest.approx(max(backend.score(QUERY, [text[start:end] for start, end in spans])), abs=1e-5)


def test_a_length_that_the_prompt_fills_is_refused(tiny_qwen):
    with pytest.raises(ModelLoadError, match=r"max_length=64 leaves no room .* has \d+ tokens, .* give at least \d+"):
        backend_for(tiny_qwen, max_length=64).warmup()


def test_more_length_than_the_model_has_positions_is_refused(tiny_qwen):
    with pytest.raises(ModelLoadError, match=r"max_length=4096, but .* reads at most 2048 tokens"):
        backend_for(tiny_qwen, max_length=4096).warmup()


def test_a_lowered_default_length_fits_the_models_positions(tiny_qwen, copy_of, caplog):
    model = copy_of(tiny_qwen)
    edit(model, "config.json", max_position_embeddings=256)
    backend = backend_for(model)
    backend.score(QUERY, LONG)

    assert [len(encoding.ids) for encoding in backend._encode(QUERY, LONG)] == [256] * 3
    assert "3 of 3 documents did not fit into max_length=256" in caplog.text


# Padding -------------------------------------------------------------------------------------------------------------


def padded(encodings, *, left):
    width = max(len(encoding.ids) for encoding in encodings) + 3
    ids, mask = np.full((len(encodings), width), 7), np.zeros((len(encodings), width), dtype=np.int64)
    for row, encoding in enumerate(encodings):
        places = slice(-len(encoding.ids), None) if left else slice(len(encoding.ids))
        ids[row, places], mask[row, places] = encoding.ids, 1
    return Batch(ids, mask, np.zeros_like(mask))


@pytest.mark.parametrize("left", [True, False])
def test_it_does_not_matter_on_which_side_a_batch_is_padded(tiny_qwen, left):
    backend = backend_for(tiny_qwen)
    backend.warmup()
    found = backend._forward(padded(backend._encode(QUERY, MIXED), left=left))

    assert found.tolist() == pytest.approx(predicted(tiny_qwen, QUERY, MIXED), abs=1e-4)


@pytest.fixture(scope="session")
def plain_bigcode(tmp_path_factory):
    """A language model with learnt positions, which adds up the embeddings of tokens and of their types."""
    sizes = {"model_type": "gpt_bigcode", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 512}
    return language_model(tmp_path_factory.mktemp("bigcode"), "GPTBigCodeForCausalLM", **sizes)


def test_padding_does_not_move_learnt_positions(plain_bigcode, tmp_path):
    model = save(tmp_path, plain_bigcode)

    assert backend_for(model).logits(QUERY, MIXED) == pytest.approx(predicted(model, QUERY, MIXED), abs=1e-4)


def test_a_model_that_reads_token_types_gets_them(plain_bigcode, tmp_path):
    model = save(tmp_path, plain_bigcode, template=None)
    untyped = predicted(model, QUERY, MIXED)
    edit(
        model,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    expected = predicted(model, QUERY, MIXED)

    assert expected != pytest.approx(untyped, abs=1e-2)
    assert backend_for(model).logits(QUERY, MIXED) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("plain", "kind"),
    [
        ("plain_qwen", {}),
        ("plain_qwen", {"template": None}),
        ("plain_classifier", {"task": "sequence-classification"}),
    ],
)
def test_a_tokenizer_without_a_padding_token_is_no_obstacle(request, tmp_path, plain, kind):
    """langchain-community#430."""
    model = save(tmp_path, request.getfixturevalue(plain), **kind)
    expected = predicted(model, QUERY, MIXED)
    edit(model, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", pad_token=None)
    edit(model, "config.json", pad_token_id=None)
    with pytest.raises(ValueError, match="does not have a padding token"):
        CrossEncoder(model, device="cpu").predict([(QUERY, text) for text in SHORT])

    assert backend_for(model, batch_size=4).logits(QUERY, MIXED) == pytest.approx(expected, abs=1e-4)


def test_only_the_last_positions_logits_are_computed(tiny_qwen):
    backend, shapes = backend_for(tiny_qwen), []
    backend.warmup()
    backend._chosen._network.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape[:2])))
    backend.logits(QUERY, SHORT)

    assert shapes == [(len(SHORT), 1)]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_language_model_without_such_files_is_refused(plain_qwen, tiny_gemma):
    """peers.md, bug 9: `CrossEncoder` gives it "yes" minus "no" without a prompt."""
    for model, kind in [(plain_qwen, "Qwen3ForCausalLM"), (tiny_gemma, "GemmaForCausalLM")]:
        with pytest.raises(ModelLoadError, match=rf"is {kind} without the files of .* or bge: for BGE's LLM rerankers"):
            backend_for(model).warmup()


@pytest.mark.parametrize("missing", ["modules.json", "config_sentence_transformers.json"])
def test_one_of_the_files_alone_is_not_enough(tiny_qwen, copy_of, missing):
    model = copy_of(tiny_qwen)
    Path(model, missing).unlink()

    with pytest.raises(ModelLoadError, match="without the files of a sentence-transformers CrossEncoder"):
        backend_for(model).warmup()


def test_an_embedding_model_is_refused(tiny_qwen, copy_of):
    """Qwen3-Embedding is a language model with a modules.json as well."""
    model = copy_of(tiny_qwen)
    edit(model, "config_sentence_transformers.json", model_type="SentenceTransformer")

    with pytest.raises(ModelLoadError, match="without the files of a sentence-transformers CrossEncoder"):
        backend_for(model).warmup()


def test_files_without_a_head_are_refused(tiny_qwen, copy_of):
    model = copy_of(tiny_qwen)
    modules = json.loads(Path(model, "modules.json").read_text())
    Path(model, "modules.json").write_text(json.dumps(modules[:1]))

    with pytest.raises(ModelLoadError, match="has 2 labels; a reranker has one"):
        backend_for(model).warmup()


def test_a_template_without_a_place_for_the_pair_is_refused(plain_qwen, tmp_path):
    model = save(tmp_path, plain_qwen, template="{{ messages[0]['content'] }}<|im_start|>assistant")

    with pytest.raises(ModelLoadError, match=r"cannot be loaded: The chat template of .* cannot carry"):
        backend_for(model).warmup()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(tiny_qwen, copy_of, lost):
    from safetensors.numpy import load_file, save_file

    model = copy_of(tiny_qwen)
    weights = load_file(Path(model, "model.safetensors"))
    del weights[lost]
    save_file(weights, Path(model, "model.safetensors"), metadata={"format": "pt"})

    with pytest.raises(ModelLoadError, match=rf"lacks trained weights \({lost}\)"):
        backend_for(model).warmup()


def test_a_module_that_comes_with_the_model_is_not_run(tiny_qwen, copy_of):
    model = copy_of(tiny_qwen)
    modules = json.loads(Path(model, "modules.json").read_text())
    modules[1]["type"] = "head.Head"
    Path(model, "modules.json").write_text(json.dumps(modules))
    Path(model, "head.py").write_text("raise AssertionError('remote code was run')\n")

    with pytest.raises(ModelLoadError, match="cannot be loaded: "):
        backend_for(model).warmup()
    with pytest.raises(AssertionError, match="remote code was run"):
        backend_for(model, trust_remote_code=True).warmup()


def test_a_prompt_for_an_encoder_is_refused(tiny_bert):
    with pytest.raises(ConfigurationError, match=r"prompt='Answer!' is for language models, and .* reads none"):
        backend_for(tiny_bert, prompt="Answer!").warmup()


def test_without_sentence_transformers_the_pip_line_is_named(tiny_qwen, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(MissingDependencyError, match=r"sentence_transformers not found. .*langchain-rerank\[cross-enc"):
        backend_for(tiny_qwen).warmup()


def test_nan_is_an_error(tiny_qwen, copy_of):
    from safetensors.numpy import load_file, save_file

    model = copy_of(tiny_qwen)
    weights = load_file(Path(model, "model.safetensors"))
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, Path(model, "model.safetensors"), metadata={"format": "pt"})

    with pytest.raises(BackendError, match="returned nan for text 0"):
        backend_for(model).score(QUERY, SHORT)


# Where it comes from -------------------------------------------------------------------------------------------------


def test_options_of_from_pretrained_reach_it(tiny_qwen):
    backend = backend_for(tiny_qwen, model_kwargs={"attn_implementation": "eager"}, dtype="bfloat16")
    backend.warmup()

    assert backend._chosen._network.config._attn_implementation == "eager"
    assert backend._chosen._network.dtype == torch.bfloat16


def test_a_folders_name_is_not_looked_up_on_the_hub(tiny_qwen):
    backend = backend_for(tiny_qwen)
    backend.warmup()

    assert backend._chosen._model.model_card_data.local_files_only


def test_a_name_on_the_hub_is_taken_from_the_cache(tiny_qwen, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--me--reranker"
    shutil.copytree(tiny_qwen, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    backend = backend_for("me/reranker", revision="v1", local_files_only=True)

    assert backend.logits(QUERY, SHORT) == pytest.approx(predicted(tiny_qwen, QUERY, SHORT), abs=1e-4)
    with pytest.raises(ModelLoadError, match="'me/reranker' cannot be loaded: "):
        backend_for("me/reranker", revision="v2", local_files_only=True).warmup()
