"""Train a reranker of one's own: pairs of query and passage to hard negatives, to a small model, to ONNX."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from langchain_core.language_models import BaseChatModel

from langchain_rerank._optional import require
from langchain_rerank._training import NEEDED

require(*NEEDED, extra="train")

# ruff: noqa: E402 - the checks come first
from langchain_rerank._export import export as export_reranker
from langchain_rerank._training.base import place_base
from langchain_rerank._training.fit import (
    check_base,
    choose_device,
    copied_weights,
    fit,
    has_head,
    keep_layers,
    load_base,
    mix,
    save,
)
from langchain_rerank._training.prepare import check_folder, prepare
from langchain_rerank._training.recipe import Recipe, SetOptions, read_recipe
from langchain_rerank._training.report import (
    Ranking,
    TrainingReport,
    judge,
    judge_first_stage,
    read_report,
    write_report,
)
from langchain_rerank.backends._torch import no_bars
from langchain_rerank.errors import ConfigurationError

logger = logging.getLogger(__name__)

__all__ = [
    "Ranking",
    "Recipe",
    "SetOptions",
    "TrainingReport",
    "export_reranker",
    "read_recipe",
    "train_reranker",
]


def train_reranker(
    recipe: Recipe | Path | str | Mapping[str, Any],
    output: Path | str,
    *,
    llm: BaseChatModel | None = None,
    progress: bool = True,
    **options: Any,
) -> TrainingReport:
    """Train a cross-encoder on collections of queries and passages.

    Hard negatives come from BM25 and, where the recipe has an embedding, from dense search, in an embedded Qdrant. They
    are kept in the folder as `groups.jsonl`, to look at. A training that was stopped goes on from its last checkpoint
    when it is called again with the same recipe, data and folder, and one that is done gives its report. Ctrl-C stops
    after the step that it is at, with a checkpoint; a second one stops at once.

    Args:
        recipe: A `Recipe`, the same as a mapping, or a YAML file of it.
        output: The folder to write to: the model (which `cross-encoder:` loads and `export_reranker` reads), its card
            `README.md`, all numbers in `training.json`, and `checkpoints`, which can go when all is done.
        llm: A chat model that makes up the queries of sets with `synthetic: llm`, in place of the recipe's `llm`. What
            it said is kept in the folder as `questions.jsonl`, and not asked for again.
        progress: Show bars with the time that is left on standard error; without, the log says it at level INFO.
        options: Options that come before the recipe's own, such as `seed=1`.

    Returns:
        What it gave on held-out queries, before and after.

    Raises:
        ConfigurationError: The recipe cannot be right, its data cannot be read or teach nothing, or the folder holds a
            training by another recipe or on data that changed since, or files of no training that this one would
            overwrite.
        ModelLoadError: The base, the embedding or a teacher cannot be loaded.
        BackendError: A teacher or the chat model failed.
        KeyboardInterrupt: Ctrl-C; what is done is kept.

    Example:
        >>> from langchain_rerank.training import train_reranker
        >>> report = train_reranker(
        ...     {"base": "tiny-bert", "sets": [{"path": "pairs.jsonl"}]}, "my-reranker", epochs=2
        ... )  # doctest: +SKIP
    """
    settled, folder = read_recipe(recipe, **options), Path(output)
    check_folder(settled, folder)
    if (done := read_report(folder)) is not None:
        logger.info("%s was trained by this recipe already; this is its report", folder)
        return done
    try:
        return _trained(settled, folder, llm=llm, progress=progress)
    except KeyboardInterrupt:
        logger.warning("Stopped. With the same recipe and the folder %s the training goes on from what is kept", folder)
        raise


def _trained(settled: Recipe, folder: Path, *, llm: BaseChatModel | None, progress: bool) -> TrainingReport:
    """The way from the sets to the report."""
    unpacked = TemporaryDirectory(prefix="langchain-rerank-", ignore_cleanup_errors=True)
    with no_bars(downloads=progress), unpacked as place:
        base_folder = place_base(settled.base, Path(place))
        choose_device(settled)  # what cannot be is said before the long search
        check_base(base_folder, settled)
        _check_mixture(settled, base_folder)
        load = cache(lambda: load_base(base_folder, settled))
        prepared = prepare(settled, folder, load, llm=llm, progress=progress)
        questions, model = prepared.questions, load()
        base = judge(model, questions, settled) if has_head(base_folder) else None
        if settled.layers is not None:
            keep_layers(model.model, settled.layers)
        before = copied_weights(model) if settled.base_share else {}
        seconds = fit(model, prepared.groups, questions, settled, folder / "checkpoints", progress=progress)
        if settled.base_share:
            mix(model, before, settled.base_share)
        save(model, folder)
    report = TrainingReport(
        folder=folder,
        groups=len(prepared.groups),
        pairs=sum(len(each.documents) for each in questions),
        seconds=seconds,
        first_stage=judge_first_stage(questions),
        base=base,
        trained=judge(model, questions, settled),
        sets=dict(Counter(each.name for each in questions)),
    )
    write_report(report, settled, prepared)
    return report


def _check_mixture(recipe: Recipe, base: str) -> None:
    """Refuse to mix the result with a base that has not its weights."""
    if recipe.base_share and recipe.layers is not None:
        raise ConfigurationError(
            "base_share mixes the result with its base, which has other layers= than it; choose one"
        )
    if recipe.base_share and not has_head(base):
        raise ConfigurationError(
            f"base_share mixes the result with its base, and {recipe.base!r} has no head that ranks yet; leave it out"
        )
