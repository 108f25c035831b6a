"""Local backends and training on CUDA against the CPU in float32. Run with `pytest -m gpu` where there is a GPU."""

import json
import math

import pytest
import torch

from langchain_rerank.backends.bge import BGEBackend
from langchain_rerank.backends.cross_encoder import CrossEncoderBackend
from langchain_rerank.backends.monot5 import MonoT5Backend

pytestmark = pytest.mark.gpu

QUERY = "Which planet is called the red planet?"
TEXTS = ["Mars is the red planet.", "Jupiter is large. " * 9, "red", "Venus is hot, they say. " * 40] * 4
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-4}

BACKENDS = {
    "tiny_bert": CrossEncoderBackend,
    "tiny_xlmr": CrossEncoderBackend,
    "tiny_gemma": BGEBackend,
    "tiny_minicpm": BGEBackend,
    "tiny_t5": MonoT5Backend,
    "tiny_mt5": MonoT5Backend,
}


def build(name, folder, **options):
    if name.endswith("t5"):
        options |= {"true_token": "▁yes", "false_token": "▁no"} if name == "tiny_mt5" else {}
        options = {"true_token": "▁true", "false_token": "▁false", **options}
    if name == "tiny_minicpm":
        from pathlib import Path

        config = json.loads(Path(folder, "config.json").read_text())
        options = {"cutoff_layers": [config["num_hidden_layers"]], **options}
    return BACKENDS[name](model=folder, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_scores_on_the_gpu_are_those_of_the_cpu(request, name, dtype):
    folder = request.getfixturevalue(name)
    expected = build(name, folder, device="cpu", dtype="float32").score(QUERY, TEXTS)
    found = build(name, folder, device="cuda", dtype=dtype).score(QUERY, TEXTS)

    assert found == pytest.approx(expected, abs=TOLERANCE[dtype])


def test_a_large_call_in_parts_gives_the_same(tiny_bert):
    texts = [f"{text} {place}" for place in range(20) for text in TEXTS]
    expected = build("tiny_bert", tiny_bert, device="cpu", dtype="float32").score(QUERY, texts)
    backend = build("tiny_bert", tiny_bert, device="cuda", dtype="float32", batch_tokens=512)
    backend.warmup()

    assert len(backend._parts([(QUERY, texts)])[0]) > 5
    assert backend.score(QUERY, texts) == pytest.approx(expected, abs=TOLERANCE["float32"])


SHAPES = {
    "bge-reranker-base, 278M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "bge-reranker-v2-m3, 568M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_size_shapes_agree_with_the_cpu(tiny_xlmr, tmp_path, shape, dtype):
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = SHAPES[shape]
    config = XLMRobertaConfig(
        vocab_size=250002,
        max_position_embeddings=8194,
        intermediate_size=4 * sizes["hidden_size"],
        num_labels=1,
        **sizes,
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_xlmr).save_pretrained(tmp_path)

    def scores(**options):
        return CrossEncoderBackend(model=str(tmp_path), **options).score(QUERY, TEXTS)

    assert scores(device="cuda", dtype=dtype) == pytest.approx(
        scores(device="cpu", dtype="float32"), abs=TOLERANCE[dtype]
    )


def _gemma_2b(tokenizer):
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return GemmaForCausalLM(GemmaConfig(vocab_size=256000, intermediate_size=16384, head_dim=256, **sizes, **ids))


def _t5(**sizes):
    def build(tokenizer):
        from transformers import T5Config, T5ForConditionalGeneration

        ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=32128, eos_token_id=tokenizer.eos_token_id, **sizes, **ids)
        )

    return build


LARGE = {
    "gemma-2b": ("tiny_gemma", _gemma_2b),
    "T5-base": ("tiny_t5", _t5(d_model=768, d_ff=3072, num_layers=12, num_heads=12)),
    "T5-3B": ("tiny_t5", _t5(d_model=1024, d_ff=16384, d_kv=128, num_layers=24, num_heads=32)),
}


@pytest.mark.parametrize("shape", LARGE)
def test_language_models_of_full_size_agree_with_the_cpu_in_bfloat16(request, tmp_path, shape):
    from transformers import AutoTokenizer

    name, network = LARGE[shape]
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    torch.manual_seed(0)
    network(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = build(name, str(tmp_path), device="cpu", dtype="float32").score(QUERY, TEXTS[:4])

    assert build(name, str(tmp_path), device="cuda").score(QUERY, TEXTS[:4]) == pytest.approx(expected, abs=5e-2)


def test_memory_does_not_grow_over_a_thousand_calls(tiny_xlmr):
    backend = CrossEncoderBackend(model=tiny_xlmr, device="cuda")
    for _ in range(20):
        backend.score(QUERY, TEXTS)
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        backend.score(QUERY, TEXTS)

    assert torch.cuda.memory_allocated() <= before + 1_000_000


def test_out_of_memory_recovers_and_loses_nothing(tiny_xlmr):
    backend = CrossEncoderBackend(model=tiny_xlmr, device="cuda", dtype="float32", batch_tokens=10**9)
    texts = [f"{text} {index}" for index, text in enumerate(TEXTS * 500)]
    expected = CrossEncoderBackend(model=tiny_xlmr, device="cuda", dtype="float32").score(QUERY, texts)
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        found = backend.score(QUERY, texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert backend._budget is not None, "it did not run out of memory: nothing was shown"
    assert all(math.isfinite(score) for score in found)
    assert found == pytest.approx(expected, abs=1e-4)


COLOURS = ("red", "blue", "green", "yellow")
QUESTIONS = [
    {"query": f"Which {thing} is {colour}?", "positive": f"The {colour} {thing} turns around the sun in {days} days."}
    for days, thing in enumerate(("planet", "moon", "star", "ring"))
    for colour in COLOURS
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_training_on_one_gpu_gives_what_it_gives_on_the_cpu(tiny_bert, tmp_path, dtype, tolerance):
    from langchain_rerank.training import train_reranker

    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    settings = {"held_out": 4, "group_size": 4, "batch_size": 4, "evaluations": 1, "learning_rate": 1e-3}
    recipe = {"base": tiny_bert, "sets": [{"path": pairs}], **settings}

    def scores(folder):
        return CrossEncoderBackend(model=str(folder), device="cpu", dtype="float32").score(QUERY, TEXTS)

    def trained(**options):
        return train_reranker(recipe, tmp_path / options["device"], progress=False, **options).folder

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = scores(trained(device="cuda", dtype=dtype))

    assert torch.cuda.max_memory_allocated() > before, "it did not train on the GPU: nothing was shown"
    assert found == pytest.approx(scores(trained(device="cpu", dtype="float32")), abs=tolerance)
    assert found != pytest.approx(scores(tiny_bert), abs=tolerance)
