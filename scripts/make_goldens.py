"""Write the scores that FlagEmbedding gives to the tiny models of the tests, as golden values.

FlagEmbedding's layer-wise model does not run under transformers 5, so the values are made once, apart from the
tests, and committed. In an environment of its own:

    python -m venv goldens
    goldens/bin/pip install torch==2.13.0 'transformers==4.57.6' 'FlagEmbedding==1.4.2' sentencepiece protobuf
    goldens/bin/python scripts/make_goldens.py

Each file in `tests/golden/` holds the pairs, the token ids that the model was fed, the logits, and the digest of the
tiny model: a test that builds another model than this script did says so instead of comparing apples with pears.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402 - it lies in tests/

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOLDEN = ROOT / "tests" / "golden"
LAYERS = {"cutoff_layers": [2, 3, 4, 5, 6]}
"""Every layer of the tiny layer-wise model that has a head."""

TOLERANCE = 3e-5
"""How far batch size, padding side and other layers may move a logit in float32."""

_LONG = " ".join(tiny.CORPUS[index % len(tiny.CORPUS)] for index in range(40))
_LONG_QUERY = " ".join(f"what is planet number {number} of the solar system?" for number in range(80))

PAIRS = [
    ("what is the red planet?", "Mars is called the red planet because of the iron oxide on its surface."),
    ("what is the red planet?", "Bread is baked from flour, water, salt and yeast."),
    ("what is the red planet?", "Mars"),
    ("planet", "."),
    ("Which planet has rings?", "Saturn has rings of ice and rock.\n\nJupiter has thin ones.\tSo does Uranus."),
    ("der rote Planet", "火星是太阳系的第四颗行星。 O planeta vermelho é o quarto planeta."),
    ("  spaces   around ", "  The giant panda   eats bamboo.  "),
    ("How far is the moon?", _LONG),
    ("largest planet", f"Jupiter is the largest planet of the solar system. {_LONG}"),
    (_LONG_QUERY, "Neptune is the eighth planet."),
    (_LONG_QUERY, _LONG),
]
"""Short and long, one longer than the limit on either side and on both, other scripts, odd white space."""


def main() -> None:
    """Write one file for each of the three kinds of reranker."""
    short_and_usual = [{"max_length": 512}, {"max_length": 32}]
    _write("xlmr", tiny.tiny_xlmr, "FlagReranker", short_and_usual)
    _write("gemma", tiny.tiny_gemma, "FlagLLMReranker", short_and_usual)
    _write("minicpm", tiny.tiny_minicpm, "LayerWiseFlagLLMReranker", [case | LAYERS for case in short_and_usual])


def _write(name: str, build: Callable[[Path], str], kind: str, cases: list[dict[str, Any]]) -> None:
    import FlagEmbedding

    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder))
        reranker = getattr(FlagEmbedding, kind)(path, devices="cpu")
        golden = {
            "made_with": {package: version(package) for package in ("FlagEmbedding", "transformers", "torch")},
            "reranker": kind,
            "digest": tiny.digest(path),
            "pairs": PAIRS,
            "cases": [case | _scores(reranker, case) for case in cases],
        }
    text = json.dumps(golden, ensure_ascii=False, indent=1)
    (GOLDEN / f"{name}.json").write_text(_numbers_in_one_line(text) + "\n", encoding="utf-8")


def _scores(reranker: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Token ids and logits of each pair, scored alone, after a look that nothing else changes them."""
    inputs: list[list[int]] = []
    hook = reranker.model.register_forward_pre_hook(
        lambda _, __, kwargs: inputs.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    alone = [_columns(reranker.compute_score([pair], batch_size=1, **case)) for pair in PAIRS]
    hook.remove()
    logits = [[column[0] for column in layer] for layer in zip(*alone, strict=True)]
    for name, others in _otherwise(reranker, case):
        _compare(f"{case}, {name}", logits, others)
    # FlagEmbedding runs its first batch twice, once to see whether it fits.
    return {"ids": [_unpadded(reranker, ids) for ids in inputs[::2]], "logits": logits}


def _otherwise(reranker: Any, case: dict[str, Any]) -> Iterator[tuple[str, list[list[float]]]]:
    """The same logits from other batch sizes, from padding on the other side, and from one layer at a time."""
    # An encoder reads its score at the first position, whatever stands there.
    sides = ("left", "right") if "CausalLM" in type(reranker.model).__name__ else ("right",)
    for side in sides:
        reranker.tokenizer.padding_side = side
        for size in (2, 3, len(PAIRS)):
            yield f"{size} pairs padded on the {side}", _columns(reranker.compute_score(PAIRS, batch_size=size, **case))
    if layers := case.get("cutoff_layers"):
        single = [reranker.compute_score(PAIRS, **case | {"cutoff_layers": [layer]}) for layer in layers]
        yield "one layer at a time", single


def _columns(scores: list[Any]) -> list[list[float]]:
    """One list of logits for each layer, as FlagEmbedding gives them where there are several."""
    return scores if isinstance(scores[0], list) else [scores]


def _compare(name: str, expected: list[list[float]], found: list[list[float]]) -> None:
    worst = max(abs(a - b) for one, two in zip(expected, found, strict=True) for a, b in zip(one, two, strict=True))
    if worst > TOLERANCE:
        raise SystemExit(f"{name}: a logit moves by {worst}")


def _unpadded(reranker: Any, ids: list[int]) -> list[int]:
    """The ids without the padding to a multiple of 8 that FlagEmbedding adds on one side or the other."""
    pad = reranker.tokenizer.pad_token_id
    while ids[0] == pad:
        ids = ids[1:]
    while ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _numbers_in_one_line(text: str) -> str:
    """Lists of numbers on one line each: thousands of lines with one id are no help to a reader."""
    return re.sub(
        r"\[\s*(-?\d[^\[\]\"]*?)\s*\]", lambda match: f"[{', '.join(match[1].split())}]".replace(",,", ","), text
    )


if __name__ == "__main__":
    main()
