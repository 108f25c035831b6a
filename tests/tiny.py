"""Builders of tiny models: real architectures and tokenizer types, the files of a checkpoint, random weights.

Nothing is downloaded and nothing is left to chance: sub-words come from the `tokenizers` BPE trainer, which gives the
same merges each time (its Unigram and WordPiece trainers do not), and weights from numpy's frozen `RandomState`, whose
uniform stream is the same on every machine and in every version. So `digest` of a folder can be compared with the one
that was noted when the golden scores were made.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)

CORPUS = (
    PROMPT,
    "Yes",
    "Yes",
    "No",
    "A: what is the red planet?",
    "B: Mars is called the red planet because of the iron oxide on its surface.",
    "Query: largest planet Document: Jupiter is the largest planet of the solar system. Relevant: true",
    "Query: bread Document: Venus is the hottest planet. Relevant: false",
    "yes no true false yes no true false sim não sim não",
    "The giant panda is a bear that lives in the mountains of China and eats bamboo.",
    "Bread is baked from flour, water, salt and yeast; the dough rests before it is baked.",
    "Der rote Planet ist der vierte Planet der Sonne.",
    "O planeta vermelho é o quarto planeta do sistema solar.",
    "La planète rouge tourne autour du soleil en 687 jours.",
    "Which planet has rings? Saturn has rings of ice and rock.",
    "How far is the moon? The moon is 384,400 km from the earth.",
)
"""What the sub-words are learnt from: the prompts of the models, a few planets, and other languages."""

_WEIGHTS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


# The models ---------------------------------------------------------------------------------------------------------


def tiny_bert(folder: Path) -> str:
    """A BERT cross-encoder with one logit and WordPiece, such as cross-encoder/ms-marco-MiniLM-L6-v2."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    text = [line.lower() for line in CORPUS]
    vocabulary = _ids([*specials, *_word_pieces(text)])
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(specials)
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        **_encoder_sizes(len(vocabulary), positions=512),
        "pad_token_id": 0,
        "type_vocab_size": 2,
    }
    _save_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="BertTokenizer",
        do_lower_case=True,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    return _save_transformers(folder, config, seed=11, gains={"query": 2.0, "key": 2.0, "classifier.weight": 8.0})


def tiny_xlmr(folder: Path) -> str:
    """An XLM-RoBERTa cross-encoder with Unigram pieces, such as BAAI/bge-reranker-base: `<s> q </s></s> p </s>`."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_unigram_pieces(), ("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = _words_with_a_mark()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)])
    config = {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        **_encoder_sizes(len(pieces), positions=514),
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "type_vocab_size": 1,
    }
    _save_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="XLMRobertaTokenizer",
        model_max_length=512,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token={"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False, "special": True},
    )
    return _save_transformers(folder, config, seed=32, gains={"query": 2.0, "key": 2.0, "out_proj.weight": 6.0})


def tiny_t5(folder: Path, *, weights: str = "safetensors") -> str:
    """A T5 with SentencePiece's Unigram pieces, `▁true` and `▁false` among them.

    With `weights="bin"` the folder looks like castorini/monot5-base-msmarco: `pytorch_model.bin` and `spiece.model`,
    no safetensors and no `tokenizer.json`.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_unigram_pieces()]
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **_t5_sizes(len(pieces) + len(sentinels)),
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "n_positions": 512,
    }
    gains = {"EncDecAttention.v": 4.0, "EncDecAttention.o": 4.0, "shared.weight": 2.0}
    if weights == "bin":
        _save_spiece(folder, pieces)
        _save_json(folder / "tokenizer_config.json", _t5_tokenizer_config(sentinels))
    else:
        _save_t5_tokenizer(folder, pieces, sentinels)
    return _save_transformers(folder, config, seed=23, gains=gains, weights=weights)


def tiny_mt5(folder: Path) -> str:
    """An mT5 with an untied output head, gated feed-forward and `▁yes`/`▁no`, such as unicamp-dl/mt5-base-mmarco-v2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_unigram_pieces()]
    config = {
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        **_t5_sizes(len(pieces)),
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }
    _save_t5_tokenizer(folder, pieces, [])
    return _save_transformers(folder, config, seed=14, gains={"lm_head.weight": 4.0})


def tiny_gemma(folder: Path) -> str:
    """A Gemma language model with `Yes` as one piece, such as BAAI/bge-reranker-v2-gemma."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces, merges = _byte_pairs(CORPUS)
    vocabulary = _ids([*specials, *_bytes(), "\n", *pieces])
    tokenizer = _byte_fallback(vocabulary, merges)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = _template("<bos>", 2)
    tokenizer.add_special_tokens(specials)
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    _save_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="GemmaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    gains = {"embed_tokens": 0.2, "q_proj": 2.0, "k_proj": 2.0, "o_proj": 3.0, "v_proj": 2.0}
    return _save_transformers(folder, config, seed=15, gains=gains, norm_weight=0.0)


def tiny_minicpm(folder: Path) -> str:
    """A layer-wise MiniCPM with a head on each layer from `start_layer` on: BAAI/bge-reranker-v2-minicpm-layerwise.

    transformers has no such class, so the tensors are written under their published names. The published config
    points to remote code; here that file stops whoever runs it.
    """
    specials = ["<unk>", "<s>", "</s>"]
    pieces, merges = _byte_pairs(CORPUS)
    vocabulary = _ids([*specials, *_bytes(), *pieces])
    tokenizer = _byte_fallback(vocabulary, merges)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = _template("<s>", 1)
    tokenizer.add_special_tokens(specials)
    _save_tokenizer(
        folder,
        tokenizer,
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        legacy=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    config = _minicpm_config(len(vocabulary))
    _save_json(folder / "config.json", config)
    (folder / "modeling_minicpm_reranker.py").write_text('raise AssertionError("remote code was run")\n')
    (folder / "configuration_minicpm_reranker.py").write_text('raise AssertionError("remote code was run")\n')
    gains = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 2.0, "o_proj": 2.0, "down_proj": 2.0, "linear_head": 2.0}
    _save_safetensors(folder, random_weights(_minicpm_shapes(config), seed=16, gains={"embed_tokens": 0.1, **gains}))
    return str(folder)


def digest(folder: str | Path) -> str:
    """SHA-256 of a safetensors model's config, tensors and tokenizer, however the libraries lay out their files."""
    from safetensors.numpy import load_file

    folder = Path(folder)
    sha = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sha.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    sha.update(repr([tokenizer.encode(line).ids for line in CORPUS]).encode())
    for name, tensor in sorted(load_file(folder / _WEIGHTS["safetensors"]).items()):
        sha.update(name.encode() + tensor.tobytes())
    return sha.hexdigest()


# Sizes --------------------------------------------------------------------------------------------------------------


def _encoder_sizes(vocabulary: int, *, positions: int) -> dict[str, Any]:
    """What BERT and XLM-RoBERTa call the same; one label makes it a cross-encoder with one logit."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _t5_sizes(vocabulary: int) -> dict[str, Any]:
    """A vocabulary rounded up to a multiple of 128, as in the published models."""
    return {
        "vocab_size": math.ceil(vocabulary / 128) * 128,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _minicpm_config(vocabulary: int) -> dict[str, Any]:
    """The published config.json, with smaller numbers, fewer key than query heads, and remote code beside it."""
    return {
        "architectures": ["LayerWiseMiniCPMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig",
            "AutoModel": "modeling_minicpm_reranker.LayerWiseMiniCPMModel",
            "AutoModelForCausalLM": "modeling_minicpm_reranker.LayerWiseMiniCPMForCausalLM",
        },
        "bos_token_id": 1,
        "dim_model_base": 16,
        "eos_token_id": 2,
        "head_multi": True,
        "head_type": "simple",
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.1,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "model_type": "minicpm",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "start_layer": 2,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": vocabulary,
    }


def _minicpm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor under its published name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    heads = config["num_hidden_layers"] - config["start_layer"] + 1
    return {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        **{f"model.layers.{i}.{n}": shape for i in range(config["num_hidden_layers"]) for n, shape in layer.items()},
        **{f"lm_head.{i}.linear_head.weight": (1, hidden) for i in range(heads)},
    }


# Weights ------------------------------------------------------------------------------------------------------------


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], *, seed: int, gains: Mapping[str, float], norm_weight: float = 1.0
) -> dict[str, np.ndarray]:
    """Uniform random float32 tensors by name, so scaled that the logits of a few pairs differ by about one.

    Matrices get a standard deviation of gain / sqrt(fan-in) and embeddings one of their gain, where the gain is that
    of the first key of `gains` inside the name, else 1; norms lie around `norm_weight`, biases around 0.
    """
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        centre, spread = 0.0, gain
        if len(shape) == 1:
            centre, spread = (norm_weight if "norm" in name.lower() else 0.0), 0.1
        elif not re.search(r"embed|shared|relative_attention_bias", name):
            spread = gain / math.sqrt(shape[-1])
        noise = (random.random_sample(shape) * 2 - 1) * math.sqrt(3)
        tensors[name] = (centre + spread * noise).astype(np.float32)
    return tensors


def _save_transformers(
    folder: Path,
    config: Mapping[str, Any],
    *,
    seed: int,
    gains: Mapping[str, float],
    norm_weight: float = 1.0,
    weights: str = "safetensors",
) -> str:
    """Save a model of transformers with random weights, with `config` as its config.json to the letter."""
    import transformers

    _save_json(folder / "config.json", config)
    loaded = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config["architectures"][0])(loaded)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not config.get("tie_word_embeddings", True):  # transformers 5 ties mT5's head all the same, until it sees one
        shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    tensors = random_weights(shapes, seed=seed, gains=gains, norm_weight=norm_weight)
    if weights == "bin":
        _save_bin(folder, tensors)
    else:
        _save_safetensors(folder, tensors)
    return str(folder)


def _save_safetensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / _WEIGHTS["safetensors"], metadata={"format": "pt"})


def _save_bin(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, folder / _WEIGHTS["bin"])


# Tokenizers ---------------------------------------------------------------------------------------------------------


def _byte_pairs(lines: Iterable[str], *, merges: int = 260) -> tuple[list[str], list[tuple[str, str]]]:
    """Sub-words of `lines` and the merges that make them; a space is `▁` and begins the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    characters = len({character for line in lines for character in line.replace(" ", "▁")})
    trainer = trainers.BpeTrainer(vocab_size=characters + merges, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in learnt["merges"]]
    return sorted(learnt["vocab"], key=learnt["vocab"].__getitem__), pairs


def _word_pieces(lines: Iterable[str]) -> list[str]:
    """WordPiece sub-words: one that begins a word stands as it is, one inside a word after `##`."""
    words = [" ".join(["", *re.findall(r"\w+|[^\w\s]", line)]) for line in lines]
    pieces, _ = _byte_pairs(words)
    starts = [piece[1:] for piece in pieces if piece.startswith("▁") and len(piece) > 1]
    inside = [piece for piece in pieces if not piece.startswith("▁")]
    characters = [piece for piece in inside if len(piece) == 1]
    return sorted({*starts, *characters, *(f"##{piece}" for piece in inside)})


def _unigram_pieces() -> list[tuple[str, float]]:
    """SentencePiece sub-words with their log probability in the corpus; every character is among them."""
    lines = [f" {line}" for line in CORPUS]
    pieces, _ = _byte_pairs(lines)
    text = "".join(lines).replace(" ", "▁")
    counts = Counter({piece: max(text.count(piece), 1) for piece in pieces})
    total = sum(counts.values())
    # Rounded, so that no last bit of a platform's logarithm can reach the digest.
    return [(piece, round(math.log(counts[piece] / total), 4)) for piece in pieces]


def _words_with_a_mark() -> pre_tokenizers.PreTokenizer:
    """Split at white space and put `▁` before each word, as SentencePiece does."""
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


def _byte_fallback(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A BPE whose unknown characters become bytes, as in Gemma and Llama."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _template(bos: str, token_id: int) -> processors.TemplateProcessing:
    """A beginning token before each text and nothing after it."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, token_id)]
    )


def _bytes() -> list[str]:
    return [f"<0x{value:02X}>" for value in range(256)]


def _ids(pieces: Iterable[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    """Both files of a published fast tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    _save_json(folder / "tokenizer_config.json", config)


def _save_t5_tokenizer(folder: Path, pieces: list[tuple[str, float]], sentinels: list[str]) -> None:
    """T5's tokenizer: pieces, then the sentinels in falling order, `</s>` after each text."""
    tokenizer = Tokenizer(models.Unigram([*pieces, *((name, 0.0) for name in reversed(sentinels))], unk_id=2))
    tokenizer.pre_tokenizer = _words_with_a_mark()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    _save_tokenizer(folder, tokenizer, **_t5_tokenizer_config(sentinels))


def _t5_tokenizer_config(sentinels: list[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": len(sentinels),
        "additional_special_tokens": sentinels,
        "model_max_length": 512,
    }


def _save_spiece(folder: Path, pieces: list[tuple[str, float]]) -> None:
    """A SentencePiece `spiece.model`: the protocol buffer of its ModelProto, Unigram, with T5's special ids.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # CONTROL, CONTROL, UNKNOWN; all others NORMAL
    model = b""
    for piece, score in pieces:
        message = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kinds.get(piece, 1))
        model += _field(1, message)
    unigram, no_bos = 1, 2**64 - 1
    trainer = _number(3, unigram) + _number(40, 2) + _number(41, no_bos) + _number(42, 1) + _number(43, 0)
    normalizer = _field(1, b"identity")
    (folder / "spiece.model").write_bytes(model + _field(2, trainer) + _field(3, normalizer))


def _varint(value: int) -> bytes:
    """The base-128 number of protocol buffers, least significant group first."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F)
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
