import json
import pathlib
import shutil

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import PrivateAttr, ValidationError

from langchain_rerank.backends.base import collect_usage
from langchain_rerank.backends.local import sigmoid
from langchain_rerank.backends.monot5 import MODELS, MonoT5Backend, Wording, _span
from langchain_rerank.errors import ConfigurationError, ModelLoadError
from langchain_rerank.testing import QUERY, TEXTS, BackendTests

ENGLISH = {"true_token": "▁true", "false_token": "▁false"}
ANSWERS = {"tiny_t5": ENGLISH, "tiny_flan": ENGLISH, "tiny_mt5": {"true_token": "▁yes", "false_token": "▁no"}}

LONG = " ".join(f"Planet number {number} of the solar system is Mars, or it is not." for number in range(60))
ODD = (
    "  begins and ends with spaces  ",
    "...punctuation!?",
    "🪐🚀 emoji 🪐",
    "火星は赤い惑星です。",
    "tab\tand\n\nline\r\nends",
    "nul\x00byte, no-break\u00a0space, e\u0301 in two characters",
    "\u0301begins with an accent",
    "it says </s> and <extra_id_0> and <pad>",
    "Relevant: Document: Query:",
    "▁",
    " ",
    "",
)
"""Documents whose seams with the prompt are not plain."""


@pytest.fixture(scope="session")
def tiny_flan(tiny_t5, tmp_path_factory):
    """A T5 v1.1: an output head of its own, over decoder states that are not scaled."""
    return _changed(tiny_t5, tmp_path_factory.mktemp("flan"), {"tie_word_embeddings": False}, head=True)


@pytest.fixture(scope="session")
def tiny_bin(tmp_path_factory):
    return tiny.tiny_t5(tmp_path_factory.mktemp("bin"), weights="bin")


@pytest.fixture(scope="session")
def loaded(tiny_t5):
    """A loaded backend that reads 64 tokens, and Hugging Face's own tokenizer."""
    backend = monot5(tiny_t5, max_length=64)
    backend.warmup()
    return backend, Reference(tiny_t5, **ENGLISH).tokenizer


@pytest.fixture(scope="session", params=ANSWERS)
def reference(request):
    """Hugging Face's own tokenizer and model, and the backend on the same folder."""
    return Reference(request.getfixturevalue(request.param), **ANSWERS[request.param])


class Reference:
    def __init__(self, folder, **answers):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.backend = monot5(folder, **answers)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        pieces = [answers["false_token"], answers["true_token"]]
        self.answers = self.tokenizer.convert_tokens_to_ids(pieces)

    def ids(self, query, text, limit=512):
        """The whole prompt's, or where that is too long those of its three parts, the second one cut."""
        whole = self.tokenizer(f"Query: {query} Document: {text} Relevant:").input_ids
        if len(whole) <= limit:
            return whole
        before = self.tokenizer(f"Query: {query} Document:", add_special_tokens=False).input_ids
        after = self.tokenizer("Relevant:").input_ids
        return [*before, *self.tokenizer(text, add_special_tokens=False).input_ids][: limit - len(after)] + after

    def first_step(self, ids):
        """The scores of "false" and "true" at the first step of `generate`, one prompt at a time."""
        import torch

        inputs = {"inputs": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        out = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        return out.scores[0][0, self.answers]


class Watched(MonoT5Backend):
    """Remembers the batches that it was given."""

    _seen: list = PrivateAttr(default_factory=list)

    def _forward(self, batch):
        self._seen.append(batch)
        return super()._forward(batch)


def monot5(folder, *, kind=MonoT5Backend, **options):
    return kind(**{"model": folder, "device": "cpu", "dtype": "float32", **ENGLISH, **options})


def encode(backend, query, texts):
    backend.warmup()
    return backend._encode(query, texts)


def _changed(source, folder, config, *, head=False, drop=()):
    """A copy of a checkpoint with other words in its config.json, a head of its own, or some tensors less."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    if head:
        shape = {"lm_head.weight": tensors["shared.weight"].shape}
        tensors |= tiny.random_weights(shape, seed=5, gains={"lm_head": 4.0})
    kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in drop)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    return str(folder)


class TestMonoT5(BackendTests):
    trained = False  # random weights
    tolerance = 1e-5  # float32

    @pytest.fixture(params=["tiny_t5", "tiny_mt5"])
    def backend(self, request):
        return monot5(request.getfixturevalue(request.param), batch_size=4, **ANSWERS[request.param])


# The numbers of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, None])
def test_the_logit_is_the_difference_at_the_first_step_of_generate(reference, batch_size):
    texts = [*TEXTS, *ODD, LONG, f"{LONG} {LONG}"]
    backend = reference.backend.model_copy(update={"batch_size": batch_size})
    expected = []
    for text in texts:
        false, true = reference.first_step(reference.ids(QUERY, text))
        expected.append(float(true - false))

    assert backend.logits(QUERY, texts) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_the_score_is_what_pygaggle_computes(reference, batch_size):
    import torch

    texts = [*TEXTS, *ODD[:-2], LONG, f"{LONG} {LONG}"]  # an empty text is not sent
    backend = reference.backend.model_copy(update={"batch_size": batch_size})
    expected = []
    for text in texts:
        start = torch.full((1, 1), reference.model.config.decoder_start_token_id)
        with torch.no_grad():
            output = reference.model(torch.tensor([reference.ids(QUERY, text)]), decoder_input_ids=start)
        answers = output.logits[:, -1, reference.answers]
        expected.append(float(torch.nn.functional.log_softmax(answers, dim=1)[:, 1].exp()))

    assert backend.score(QUERY, texts) == pytest.approx(expected, abs=1e-4)


def test_the_scores_of_the_tiny_models_differ(reference):
    logits = reference.backend.logits(QUERY, TEXTS)

    assert max(logits) - min(logits) > 0.1  # else parity would say nothing


def test_the_logit_is_the_scores_own(tiny_t5):
    backend = monot5(tiny_t5, return_logits=True)

    for score in backend.score(QUERY, TEXTS):
        assert score == sigmoid(score.details["relevance_logit"])


def test_the_encoder_reads_each_prompt_once_and_the_decoder_takes_one_step(tiny_t5):
    backend = monot5(tiny_t5, batch_size=3)
    backend.warmup()
    seen = {"encoder": [], "decoder": []}
    for name, shapes in seen.items():
        stack = getattr(backend._model, name)
        stack.register_forward_pre_hook(
            lambda _, args, inputs, shapes=shapes: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
        )
    backend.score(QUERY, TEXTS)

    assert sum(rows for rows, _ in seen["encoder"]) == len(TEXTS)
    assert [tokens for _, tokens in seen["decoder"]] == [1] * len(seen["encoder"])


def test_two_rows_of_the_output_head_are_kept_and_no_more(tiny_mt5):
    backend = monot5(tiny_mt5, **ANSWERS["tiny_mt5"])
    backend.warmup()

    assert backend._head.shape == (2, 32)
    assert not any("lm_head" in name for name, _ in backend._model.named_parameters())


def test_bfloat16_is_close(tiny_t5):
    exact = monot5(tiny_t5).score(QUERY, TEXTS)

    assert monot5(tiny_t5, dtype="bfloat16").score(QUERY, TEXTS) == pytest.approx(exact, abs=0.05)


# What the model reads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["red planet", " spaces ", "火星", "what?!", ""])
def test_a_prompt_that_fits_is_tokenised_as_one_string(reference, query):
    for text, encoding in zip(ODD, encode(reference.backend, query, ODD), strict=True):
        assert encoding.ids == reference.tokenizer(f"Query: {query} Document: {text} Relevant:").input_ids
        assert not encoding.truncated


_ANY = st.text() | st.text(st.sampled_from("planet Mars.,!?\n▁火é🪐"), max_size=120)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(query=_ANY, text=_ANY)
def test_any_prompt_is_whole_or_lacks_only_the_end_of_its_text(loaded, query, text):
    backend, tokenizer = loaded
    [encoding] = backend._encode(query, [text])
    whole = tokenizer(f"Query: {query} Document: {text} Relevant:").input_ids
    query_ids = tokenizer(query, add_special_tokens=False).input_ids

    if len(query_ids) <= 48:
        kept = min(len(whole), 64) - 2
        assert encoding.ids == [*whole[:kept], *whole[-2:]]
    assert len(encoding.ids) <= 64
    assert encoding.ids[-2:] == whole[-2:]


@pytest.mark.parametrize("split", [True, False])
def test_the_span_of_a_text_is_found_under_older_pre_tokenizers(tiny_t5, split):
    """Their ▁ has the offset of the space before its word, where today's has that of the word's first character."""
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(f"{tiny_t5}/tokenizer.json")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)

    def parts(text):
        before, after = "Query: red planet Document: ", " Relevant:"
        prompt = tokenizer.encode(before + text + after)
        first, last = _span(prompt.offsets, len(before), len(before + text))
        return prompt.tokens[:first], prompt.tokens[first:last], prompt.tokens[last:]

    lead = ["▁Query:", "▁red", "▁planet", "▁Document:"]
    assert parts("a 火 red") == (lead, ["▁a", "▁", "火", "▁red"], ["▁Relevant:", "</s>"])
    assert parts("火 red") == ([*lead, "▁"], ["火", "▁red"], ["▁Relevant:", "</s>"])
    assert parts("")[1] == []


def test_a_prompt_ends_with_relevant_and_the_end_token(reference):
    for encoding in encode(reference.backend, QUERY, [*TEXTS, *ODD, LONG]):
        assert reference.tokenizer.decode(encoding.ids).endswith(" Relevant:</s>")


@pytest.mark.parametrize("limit", [64, 65, 100, 511])
def test_a_text_that_does_not_fit_loses_its_last_tokens(reference, limit):
    backend = reference.backend.model_copy(update={"max_length": limit})
    [encoding] = encode(backend, QUERY, [f"{LONG} {LONG}"])

    assert encoding.ids == reference.ids(QUERY, f"{LONG} {LONG}", limit)
    assert len(encoding.ids) == limit
    assert encoding.truncated


def test_a_cut_between_the_two_lengths_is_exact(tiny_t5):
    whole = encode(monot5(tiny_t5, max_length=512), QUERY, [LONG[:300]])[0].ids
    length = len(whole)

    [fits] = encode(monot5(tiny_t5, max_length=length), QUERY, [LONG[:300]])
    [cut] = encode(monot5(tiny_t5, max_length=length - 1), QUERY, [LONG[:300]])

    assert (fits.ids, fits.truncated) == (whole, False)
    assert (cut.ids, cut.truncated) == ([*whole[:-3], *whole[-2:]], True)


def test_bug_7_of_rerankers_inranker_and_pygaggle_relevant_is_cut_off_long_documents(tiny_t5):
    """They cut the whole prompt on its right, so that a long document pushes the question out."""
    backend = monot5(tiny_t5, max_length=64)
    theirs = Reference(tiny_t5, **ENGLISH).tokenizer
    prompt = f"Query: {QUERY} Document: {LONG} Relevant:"
    [ours] = encode(backend, QUERY, [LONG])

    assert "Relevant:" not in theirs.decode(theirs(prompt, truncation=True, max_length=64).input_ids)
    assert theirs.decode(ours.ids).endswith(" Relevant:</s>")
    assert theirs.decode(ours.ids).startswith(f"Query: {QUERY} Document: Planet number 0 of")


def test_bug_10_of_pyterrier_a_short_row_gets_a_stray_end_beside_a_long_one(tiny_t5):
    """It cuts the padded batch and ends each row with `Relevant:</s>` again, a short one after its padding."""
    backend = monot5(tiny_t5, max_length=64, kind=Watched)
    backend.score(QUERY, ["Mars.", LONG])
    [batch] = backend._seen
    end, pad = 1, 0

    assert len(batch) == 2
    for ids, mask in zip(batch.ids.tolist(), batch.mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (64 - length)
        assert ids.count(end) == 1
        assert ids[length - 1] == end
        assert ids[length:] == [pad] * (64 - length)


def test_bug_10_of_pyterrier_the_score_depends_on_the_batch(reference):
    backend = reference.backend.model_copy(update={"max_length": 64})
    alone = [backend.score(QUERY, [text])[0] for text in TEXTS]

    together = backend.score(QUERY, [*TEXTS, LONG, f"{LONG} {LONG}"])[: len(TEXTS)]

    assert together == pytest.approx(alone, abs=1e-5)


def test_a_cut_is_reported(tiny_t5, caplog):
    backend = monot5(tiny_t5, max_length=64)
    with collect_usage() as usage:
        short, long = backend.score(QUERY, ["Mars.", LONG])

    assert usage["truncated"] == 1
    assert (short.details, long.details) == ({}, {"truncated": True})
    assert "1 of 2 documents did not fit into max_length=64" in caplog.text


def test_a_long_query_is_cut_to_three_quarters_first(reference, caplog):
    backend = reference.backend.model_copy(update={"max_length": 64})
    [encoding] = encode(backend, "planet " * 100, [LONG])

    assert "a query of 100 tokens was cut to 48 (max_length=64)" in caplog.text
    assert encoding.ids == reference.ids("planet " * 48, LONG, 64)


def test_a_long_query_leaves_room_for_a_long_text(tiny_t5):
    backend = monot5(tiny_t5, max_length=64)
    [encoding] = encode(backend, LONG, [LONG])

    assert len(encoding.ids) == 64
    assert encoding.truncated
    assert encoding.room > 0


def test_a_model_may_have_a_prompt_of_its_own(tiny_t5):
    backend = monot5(tiny_t5, prompt=MODELS["unicamp-dl/monoptt5-base"].prompt)
    plain = Reference(tiny_t5, **ENGLISH)
    [encoding] = encode(backend, "planeta {text}", ["Marte {query}"])

    expected = "Pergunta: planeta {text} Documento: Marte {query} Relevante:"
    assert encoding.ids == plain.tokenizer(expected).input_ids
    assert backend.score(QUERY, TEXTS) != plain.backend.score(QUERY, TEXTS)


# Long documents -----------------------------------------------------------------------------------------------------


def test_max_passage_is_the_best_of_the_passages(reference):
    backend = reference.backend.model_copy(update={"max_length": 64, "long_documents": "max_passage"})
    [score] = backend.score(QUERY, [LONG])
    start, end = score.details["passage_span"]

    assert backend.score(QUERY, [LONG[start:end]]) == pytest.approx([score], abs=1e-6)
    assert "truncated" not in score.details


@pytest.mark.parametrize("text", [LONG, "".join(LONG.split()), LONG.replace(" ", "火"), "planetmars" * 90])
def test_the_passages_cover_all_of_a_long_text_and_none_is_cut(tiny_t5, text):
    backend = monot5(tiny_t5, max_length=64, long_documents="max_passage", kind=Watched)
    backend.warmup()
    pieces = backend._pieces(QUERY, [text])

    assert len(pieces) > 1
    assert not any(piece.encoding.truncated for piece in pieces)
    covered = 0
    for piece in pieces:
        start, end = piece.span
        assert not text[covered:start].strip()
        covered = max(covered, end)
    assert covered == len(text)


# Which answers ------------------------------------------------------------------------------------------------------


def test_the_published_models_need_no_options():
    for name in MODELS:
        assert MonoT5Backend(model=name).name == "monot5"


def test_every_published_model_has_a_prompt_and_two_answers():
    for wording in MODELS.values():
        before, between, after = wording.parts()
        assert before
        assert between.startswith(" ")
        assert after.startswith(" ")
        assert wording.true != wording.false
        assert all(piece.startswith("▁") for piece in (wording.true, wording.false))


def test_the_answers_are_those_of_the_model():
    assert MonoT5Backend(model="castorini/monot5-3b-msmarco")._wording == Wording("▁true", "▁false")
    assert MonoT5Backend(model="unicamp-dl/mt5-base-mmarco-v2")._wording == Wording("▁yes", "▁no")
    assert MonoT5Backend(model="unicamp-dl/ptt5-base-pt-msmarco-100k-v2")._wording == Wording("▁sim", "▁não")
    assert MonoT5Backend(model="unicamp-dl/mt5-3B-mmarco-en-pt", false_token="▁no")._wording == Wording("▁true", "▁no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "unicamp-dl/mt5-13b-mmarco-100k"}, "no answers are known for 'unicamp-dl/mt5-13b-mmarco-100k'"),
        ({"model": "./monot5-base-msmarco"}, "A folder needs them too"),
        ({"model": "t5-base", "true_token": "▁true"}, "give true_token and false_token"),
        ({"model": "t5-base", "true_token": "▁x", "false_token": "▁x"}, "true_token and false_token are both '▁x'"),
        ({"true_token": "▁false"}, "true_token and false_token are both '▁false'"),
        ({"prompt": "Query: {query} Relevant:"}, r"must hold \{query\}, then \{text\}, each once"),
        ({"prompt": "Document: {text} Query: {query}"}, r"must hold \{query\}, then \{text\}, each once"),
        ({"prompt": "{query} {text} {text}"}, r"must hold \{query\}, then \{text\}, each once"),
        ({"max_length": 63}, "greater than or equal to 64"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValidationError, match=message):
        MonoT5Backend(**options)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("▁wahr", "has no vocabulary piece '▁wahr' to answer with$"),
        ("planet", "has no vocabulary piece 'planet' to answer with; did you mean '▁planet'?"),
        ("<unk>", "has no vocabulary piece '<unk>' to answer with$"),
    ],
)
def test_an_answer_that_is_no_piece_of_the_vocabulary_is_refused(tiny_t5, piece, message):
    with pytest.raises(ModelLoadError, match=message):
        monot5(tiny_t5, true_token=piece).warmup()


def test_other_answers_give_other_scores(tiny_t5):
    swapped = {"true_token": "▁false", "false_token": "▁true"}

    for score, mirrored in zip(
        monot5(tiny_t5).score(QUERY, TEXTS), monot5(tiny_t5, **swapped).score(QUERY, TEXTS), strict=True
    ):
        assert mirrored == pytest.approx(1 - score, abs=1e-6)


# Which models -------------------------------------------------------------------------------------------------------


def test_spiece_and_bin_alone_load_and_score_the_same(tiny_bin, tiny_t5):
    files = {path.name for path in pathlib.Path(tiny_bin).iterdir()}

    assert files == {"config.json", "pytorch_model.bin", "spiece.model", "tokenizer_config.json"}
    assert monot5(tiny_bin).score(QUERY, TEXTS) == pytest.approx(monot5(tiny_t5).score(QUERY, TEXTS), abs=1e-6)


def test_the_ids_are_those_of_sentencepiece_itself(tiny_bin):
    from sentencepiece import SentencePieceProcessor

    slow = SentencePieceProcessor(model_file=f"{tiny_bin}/spiece.model")
    # Hugging Face reads `</s>` as a special, and the tiny model has no table to normalise other white space with.
    texts = [text for text in (*TEXTS, *ODD) if text.isprintable() and not {"<", "▁"} & set(text)]
    encodings = encode(monot5(tiny_bin), QUERY, texts)

    for text, encoding in zip(texts, encodings, strict=True):
        prompt = f"Query: {QUERY} Document: {text} Relevant:"
        assert list(encoding.ids) == [*slow.encode(prompt), slow.eos_id()]


@pytest.mark.parametrize("options", [{}, {"model_kwargs": {"weights_only": False, "dtype": "auto"}}])
def test_a_bin_that_would_run_code_is_refused_and_not_run(tiny_bin, tmp_path, options):
    import torch

    class Malicious:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    shutil.copytree(tiny_bin, tmp_path / "model")
    torch.save({"shared.weight": Malicious()}, tmp_path / "model" / "pytorch_model.bin")

    with pytest.raises(ModelLoadError, match=r"more than tensors in it|Unable to load weights"):
        monot5(str(tmp_path / "model"), **options).warmup()
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


def test_the_class_that_castorinis_large_models_name_is_one_of_t5(tiny_t5, tmp_path):
    named = _changed(tiny_t5, tmp_path, {"architectures": ["T5Model"]})

    assert monot5(named).score(QUERY, TEXTS) == monot5(tiny_t5).score(QUERY, TEXTS)


def test_a_model_that_is_no_t5_is_refused(tiny_bert):
    with pytest.raises(ModelLoadError, match=r"is no T5 or mT5 but 'bert'.*Use cross-encoder: for a sequence-class"):
        monot5(tiny_bert).warmup()


def test_a_t5_with_a_classification_head_is_refused(tiny_t5, tmp_path):
    other = _changed(tiny_t5, tmp_path, {"architectures": ["T5ForSequenceClassification"]})

    with pytest.raises(ModelLoadError, match="is T5ForSequenceClassification, which gives no answer in words"):
        monot5(other).warmup()


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("decoder.block.1.", "decoder.block.1.layer"),
        ("shared", "decoder.embed_tokens.weight, "),
        ("encoder", "encoder"),
    ],
)
def test_a_t5_without_all_its_weights_is_refused(tiny_t5, tmp_path, part, named):
    other = _changed(tiny_t5, tmp_path, {}, drop=[part])

    with pytest.raises(ModelLoadError, match=rf"lacks trained weights \({named}.*its scores would be random"):
        monot5(other).warmup()


def test_an_mt5_without_its_own_output_head_is_refused(tiny_mt5, tmp_path):
    """Transformers 5 would use its embeddings in place of the head, and call nothing missing."""
    other = _changed(tiny_mt5, tmp_path, {}, drop=["lm_head"])

    with pytest.raises(ModelLoadError, match=r"lacks trained weights \(lm_head.weight\)"):
        monot5(other, **ANSWERS["tiny_mt5"]).warmup()


def test_a_tokenizer_that_adds_no_end_is_refused(tiny_t5, tmp_path):
    other = _changed(tiny_t5, tmp_path, {})
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(written | {"post_processor": None}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))

    with pytest.raises(ModelLoadError, match="does not end its texts with </s>"):
        monot5(other).warmup()


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ModelLoadError, match="nowhere' is no folder here"):
        monot5(str(tmp_path / "nowhere")).warmup()


@pytest.mark.parametrize(
    ("device", "message"), [("cpu", "is not for a CPU"), ("meta", "T5 overflows in dtype 'float16'")]
)
def test_float16_is_for_cuda_alone(tiny_t5, device, message):
    with pytest.raises(ConfigurationError, match=message):
        monot5(tiny_t5, device=device, dtype="float16").warmup()
