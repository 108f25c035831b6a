"""Make the demo collection of the package from the StackFAQ data set in BEIR layout.

    python scripts/build_demo_data.py ../shared/data/eval/stackfaq langchain_rerank/data/stackfaq

All answers stay. Of the paraphrases of each question, `q<FAQ>-<number>`, one is drawn among those with judgements,
so that no question counts more than another. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_rerank.data import read_beir

if TYPE_CHECKING:
    from collections.abc import Collection as AnyCollection

SEED = 0
"""Fixed before any score was seen."""


def build(source: Path, target: Path) -> None:
    """Write `corpus.jsonl.gz`, `queries.jsonl` and `qrels.tsv`.

    Args:
        source: A folder with the same three files and every paraphrase.
        target: The folder to write to; made if it is not there.
    """
    collection = read_beir(source)
    drawn = draw_paraphrases(collection.qrels)
    target.mkdir(parents=True, exist_ok=True)
    rows = [{"_id": key, "title": "", "text": text} for key, text in collection.corpus.items()]
    # No file name and no time in the header, so that the bytes depend on the content alone.
    (target / "corpus.jsonl.gz").write_bytes(gzip.compress(_lines(rows), mtime=0))
    (target / "queries.jsonl").write_bytes(_lines([{"_id": key, "text": collection.queries[key]} for key in drawn]))
    judgements = [f"{key}\t{answer}\t{grade}" for key in drawn for answer, grade in collection.qrels[key].items()]
    (target / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judgements, ""]), encoding="utf-8")


def draw_paraphrases(queries: AnyCollection[str]) -> list[str]:
    """One query id `q<FAQ>-<number>` for each FAQ, in the order of the FAQs."""
    paraphrases: dict[int, list[int]] = {}
    for query in queries:
        faq, number = map(int, query.removeprefix("q").split("-"))
        paraphrases.setdefault(faq, []).append(number)
    chance = random.Random(SEED)  # noqa: S311 - a draw that anyone can repeat, no secret
    return [f"q{faq}-{chance.choice(sorted(numbers))}" for faq, numbers in sorted(paraphrases.items())]


def _lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the demo collection from StackFAQ in BEIR layout.")
    parser.add_argument("source", type=Path, help="folder with corpus.jsonl.gz, queries.jsonl and qrels.tsv")
    parser.add_argument("target", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    build(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
