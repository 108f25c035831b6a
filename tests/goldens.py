"""What the tests of BGE's rerankers share: FlagEmbedding's golden scores, batches padded on a chosen side."""

import json
import shutil
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import load_file, save_file

from langchain_rerank.backends.local import Batch

TOLERANCE = 1e-4
"""How far a logit in float32 may lie from FlagEmbedding's."""


def read(name, folder):
    """The golden file of a tiny model, if that is still the model that it was made with."""
    golden = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    assert golden["digest"] == tiny.digest(folder), f"tiny_{name} changed: run scripts/make_goldens.py again"
    return golden


def case(name, folder, max_length):
    """The pairs, and their token ids and logits (one list for each layer) at a `max_length`."""
    golden = read(name, folder)
    [found] = [case for case in golden["cases"] if case["max_length"] == max_length]
    return golden["pairs"], found["ids"], np.array(found["logits"])


def logits(backend, pairs):
    """Each pair's logits by a backend, shape (k, n): pairs of one query go together, as in use."""
    with backend._lock:
        backend._ensure_loaded()
        encodings = [backend._encode(query, [text])[0] for query, text in pairs]
        return np.array([np.ravel(row) for row in backend._run(encodings)]).T


def padded(rows, side, *, pad=0, width=None):
    """Rows of token ids as one batch, padded on one side."""
    width = width or max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad), np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in enumerate(rows):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[row, place], mask[row, place] = tokens, 1
    return Batch(ids, mask, np.zeros_like(ids))


def copy_of(model, folder, **config):
    """A copy of a model's folder with some values of its config.json changed, and `None` ones taken out."""
    folder = shutil.copytree(model, folder)
    path = folder / "config.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | config
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))
    return folder


def change_weights(folder, change):
    """Rewrite the weights of a folder as `change` gives them back."""
    weights = load_file(Path(folder, "model.safetensors"))
    save_file(change(weights), Path(folder, "model.safetensors"), metadata={"format": "pt"})
