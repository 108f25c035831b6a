"""The models that are measured, made on this machine, with what they have to rank."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from langchain_rerank.backends._engines_onnx import trace
from langchain_rerank.data import EMBEDDED_MODEL, load_stackfaq, read_beir

FEWEST_WORDS, MOST_WORDS = 40, 350
SEED = 0
MAX_LENGTH = 512
"""Tokens of query and passage together that every contestant is asked to read; no pair has more."""

VOCABULARY = 16_000
"""Pieces of the tokenizer that is trained for the XLM-R shapes; their embeddings have as many rows as the real ones."""


@dataclass(frozen=True)
class Shape:
    """A cross-encoder's size, and how it is measured."""

    layers: int
    hidden: int
    inner: int
    heads: int
    family: str
    """`bert` or `xlm-roberta`."""

    passages: int
    times: int
    """How often one process ranks them, once it is warm."""

    warm: int
    """How many passages it ranks before that."""

    vocabulary: int = 30522
    positions: int = 512
    real: bool = False
    """Whether the weights are those of the embedded model, else they are random."""

    @property
    def weights(self) -> str:
        """For people."""
        return "the embedded model's weights" if self.real else "random weights"

    def flops(self, lengths: Iterable[int]) -> float:
        """Operations that pairs of so many tokens take, two for each multiplication in a matrix product.

        Each layer takes 2 (4 h² + 2 h i) for a token and 4 t h for its attention to t tokens; embeddings, norms,
        softmax and the head are left out. All layers count in full for everyone, also where an engine computes only
        the first token of the last one.
        """
        each = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.inner)
        return float(sum(self.layers * (length * each + 4 * length**2 * self.hidden) for length in lengths))


SHAPES = {
    "minilm": Shape(6, 384, 1536, 12, "bert", passages=50, times=3, warm=50, real=True),
    "bert-base": Shape(12, 768, 3072, 12, "bert", passages=50, times=1, warm=4),
    "xlmr-large": Shape(
        24, 1024, 4096, 16, "xlm-roberta", passages=10, times=1, warm=2, vocabulary=250_002, positions=514
    ),
    "v2-m3": Shape(
        24, 1024, 4096, 16, "xlm-roberta", passages=1000, times=3, warm=200, vocabulary=250_002, positions=8194
    ),
    "tiny": Shape(2, 64, 256, 4, "xlm-roberta", passages=16, times=2, warm=4, vocabulary=VOCABULARY, positions=514),
}
"""MiniLM-L6, BERT-base, XLM-R-large and, for GPUs, bge-reranker-v2-m3; the last tries a script out."""


def place(name: str, root: Path) -> Path:
    """The folder of a shape's model for transformers of version 4 and 5, made unless it is there.

    Nothing else is ever written into it: it is part of the name under which a conversion is kept.

    Args:
        name: One of `SHAPES`.
        root: Holds the models.
    """
    shape, folder = SHAPES[name], root / f"{name}-{_digest(SHAPES[name])}" / "model"
    complete = folder.parent / "complete"
    if complete.is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if shape.real:
        from langchain_rerank._training.base import place_base

        place_base("embedded", folder)
    else:
        _random_weights(shape, folder)
    _tokenizer(shape, folder)
    complete.touch()
    return folder


def _digest(shape: Shape) -> str:
    """Tells models apart that have other weights or another tokenizer."""
    import hashlib

    content = json.dumps(asdict(shape)).encode()
    if shape.real:
        content += (EMBEDDED_MODEL / "model.onnx").read_bytes()
    return hashlib.sha256(content).hexdigest()[:8]


def _random_weights(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config: Any = AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=shape.positions,
        type_vocab_size=2 if shape.family == "bert" else 1,
        layer_norm_eps=1e-12 if shape.family == "bert" else 1e-5,
        num_labels=1,
        **({} if shape.family == "bert" else {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}),
    )
    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder)


def _tokenizer(shape: Shape, folder: Path) -> None:
    """The tokenizer's files, in words that transformers 4 and 5 both understand."""
    bert = shape.family == "bert"
    if bert:
        shutil.copyfile(EMBEDDED_MODEL / "tokenizer.json", folder / "tokenizer.json")
        _bare(folder / "tokenizer.json")
    else:
        _unigram().save(str(folder / "tokenizer.json"))
    specials = (
        {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
        if bert
        else {
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
            "cls_token": "<s>", "mask_token": "<mask>",
        }
    )  # fmt: skip
    names = ["input_ids", *(["token_type_ids"] if bert else []), "attention_mask"]
    content = {
        "tokenizer_class": "BertTokenizerFast" if bert else "XLMRobertaTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "model_input_names": names,
        **specials,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials), encoding="utf-8")


def _bare(file: Path) -> None:
    """Take padding and truncation out, which are the caller's business."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "padding": None, "truncation": None}), encoding="utf-8")


def _unigram() -> Any:
    """XLM-R's type of tokenizer, trained on the demo collection."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_stackfaq().corpus.values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def place_onnx(name: str, root: Path) -> Path:
    """The same model as `model.onnx` beside its tokenizer, as anyone would export it: all layers in full, float32."""
    folder = place(name, root)
    target = folder.parent / "onnx"
    if (target / "complete").is_file():
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / file, target / file)
    _export(folder, target / "model.onnx")
    (target / "complete").touch()
    return target


def _export(folder: Path, file: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 1000, (2, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "bert":
        batch["token_type_ids"] = torch.zeros_like(ids)
    trace(model, batch).save(file, external_data=True)  # one file holds 2 GB at most


@dataclass(frozen=True)
class Task:
    """One query with what is to be ranked."""

    query: str
    passages: list[str]
    source: str


def task(data: Path | None, count: int) -> Task:
    """A query and passages of 40 to 350 words, the same whenever the data are the same.

    At most half of them were judged relevant to the query, so that scores are not all next to 0; the others are drawn.

    Args:
        data: Holds `cranfield` in BEIR layout; `None` takes the demo collection of the package.
        count: How many passages; fewer where the collection has no more.
    """
    collection = read_beir(data / "cranfield") if data else load_stackfaq()
    fits = {text: name for name, text in collection.corpus.items() if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS}
    # Each text once: who scores duplicates once would be at an advantage.
    fitting = {name: text for text, name in fits.items()}
    asked = next(name for name in collection.queries if name in collection.qrels)
    relevant = [name for name, grade in collection.qrels[asked].items() if grade > 0 and name in fitting]
    names, draw = relevant[: count // 2], random.Random(SEED)
    others = [name for name in fitting if name not in names]
    names += draw.sample(others, min(count - len(names), len(others)))
    draw.shuffle(names)
    passages = [fitting[name] for name in names]
    return Task(collection.queries[asked], passages, "Cranfield" if data else "the demo collection")


def shortened(given: Task, folder: Path) -> tuple[Task, list[int]]:
    """The task with passages cut to what `MAX_LENGTH` holds, since some contestants cut and some do not.

    Returns:
        The task, and how many tokens each pair has, specials included.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    passages = [_fitting(tokenizer, given.query, passage) for passage in given.passages]
    return Task(given.query, passages, given.source), [
        len(tokenizer.encode(given.query, passage).ids) for passage in passages
    ]


def _fitting(tokenizer: Any, query: str, passage: str) -> str:
    words = passage.split(" ")
    while len(tokenizer.encode(query, " ".join(words)).ids) > MAX_LENGTH:
        del words[-10:]
    return " ".join(words)


def calibration(root: Path, count: int = 200) -> Path:
    """Pairs of the demo collection in a JSONL file, for `dtype="int8"`; none of them is measured on Cranfield."""
    root.mkdir(parents=True, exist_ok=True)
    collection, draw = load_stackfaq(), random.Random(SEED)
    queries: Sequence[str] = list(collection.queries.values())
    texts = draw.sample(list(collection.corpus.values()), count)
    lines = [json.dumps({"query": draw.choice(queries), "text": text}) for text in texts]
    file = root / "calibration.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
