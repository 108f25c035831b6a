"""What a training gave: the same held-out queries before and after, and the model card."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from sentence_transformers.cross_encoder import CrossEncoder

from langchain_rerank._training.fit import rank
from langchain_rerank._training.mining import written_whole
from langchain_rerank._training.prepare import Prepared, Question
from langchain_rerank._training.recipe import Recipe, SetOptions, with_models
from langchain_rerank.evaluation import METRICS, Interval, bootstrap, score_run

_MADE_BY = {
    "title": "synthetic (the documents' titles)",
    "first_sentence": "synthetic (the documents' first sentences)",
    "llm": "synthetic (written by an LLM)",
}

_MINUTE = 60

_VERSIONS = ("langchain-rerank", "torch", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class Ranking:
    """How well somebody ordered what BM25 found for the held-out queries."""

    scores: Mapping[str, Mapping[str, float]]
    """Metric to query to value, in [0, 1]."""

    seconds: float | None = None
    """How long that took; `None` for the first stage."""

    def mean(self, metric: str) -> float:
        """A metric's mean over the queries."""
        return fmean(self.scores[metric].values())


@dataclass(frozen=True)
class TrainingReport:
    """What a training gave. All figures are of held-out queries of the sets that it learned from."""

    folder: Path
    """Where the model and its card are."""

    groups: int
    """How many queries it learned from."""

    pairs: int
    """How many pairs of held-out query and passage were scored."""

    seconds: float
    """Of training alone."""

    first_stage: Ranking | None
    """BM25's own order; `None` where no query was held out."""

    base: Ranking | None
    """The base's, before training; `None` too for a plain encoder, whose head was fresh."""

    trained: Ranking | None
    """The model's."""

    sets: Mapping[str, int]
    """How many held-out queries come from each set."""

    def difference(self, before: Ranking | None) -> Interval | None:
        """The paired difference of nDCG@10 between the trained model and what was before it."""
        if before is None or self.trained is None:
            return None
        old, new = before.scores["nDCG@10"], self.trained.scores["nDCG@10"]
        return bootstrap([new[query] - old[query] for query in new])

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells: what, first stage, base, trained."""
        stages = (self.first_stage, self.base, self.trained)
        speeds = (_speed(stage, self.pairs) for stage in stages)
        table = [(metric, *(_cell(stage, metric) for stage in stages)) for metric in METRICS]
        return [*table, ("pairs per second", *speeds)]


def _cell(stage: Ranking | None, metric: str) -> str:
    return "-" if stage is None else f"{stage.mean(metric):.3f}"


def _speed(stage: Ranking | None, pairs: int) -> str:
    return "-" if stage is None or not stage.seconds else f"{pairs / stage.seconds:.0f}"


def judge_first_stage(questions: Sequence[Question]) -> Ranking | None:
    """BM25's order of the held-out queries."""
    return _ranking(questions, {each.query_id: list(each.documents) for each in questions}) if questions else None


def judge(model: CrossEncoder, questions: Sequence[Question], recipe: Recipe) -> Ranking | None:
    """A model's order of the same passages, and how long it took, on the device and in the dtype of the training."""
    if not questions:
        return None
    start = time.perf_counter()
    run = rank(model, questions, recipe)
    return _ranking(questions, run, time.perf_counter() - start)


def _ranking(questions: Sequence[Question], run: Mapping[str, Sequence[str]], seconds: float | None = None) -> Ranking:
    return Ranking(score_run({each.query_id: each.grades for each in questions}, run), seconds)


def write_report(report: TrainingReport, recipe: Recipe, prepared: Prepared) -> None:
    """Write `training.json`, with each query's values, and `README.md`, the model card."""
    content = {"recipe": recipe.model_dump(mode="json"), **asdict(report), "folder": report.folder.resolve().name}
    (report.folder / "README.md").write_text(_card(report, recipe, prepared), encoding="utf-8")
    with written_whole(report.folder / "training.json") as file:  # last: it says that all is done
        file.write(json.dumps(content, indent=1))


def read_report(folder: Path) -> TrainingReport | None:
    """What `write_report` wrote there, if it did."""
    file = folder / "training.json"
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    given = {each.name: content[each.name] for each in fields(TrainingReport)}
    stages = {name: given[name] and Ranking(**given[name]) for name in ("first_stage", "base", "trained")}
    return TrainingReport(**{**given, **stages, "folder": folder})


def _card(report: TrainingReport, recipe: Recipe, prepared: Prepared) -> str:
    """The model card, in Markdown."""
    name = report.folder.resolve().name
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    told = with_models(recipe, _called)
    settings = told.model_dump(mode="json", exclude={"sets", "base"})
    parts = [
        "---\nlibrary_name: langchain-rerank\npipeline_tag: text-ranking\n---\n",
        f"# {name}: a reranker\n",
        f"A cross-encoder with one logit, trained from `{told.base}` on {report.groups} queries",
        f"in {lasted(report.seconds)} ({platform.machine()}, {versions}).\n",
        "```python\nfrom langchain_rerank import init_reranker\n",
        f'reranker = init_reranker("cross-encoder:{name}")  # the path of this folder',
        "```\n",
        "## Data\n",
        _data(recipe, prepared),
        "## Before and after\n",
        _before_and_after(report, recipe),
        "## Settings\n",
        "```json\n" + json.dumps(settings, indent=1) + "\n```\n",
    ]
    return "\n".join(parts)


def lasted(seconds: float) -> str:
    """A time as one says it."""
    return f"{seconds:.0f} seconds" if seconds < _MINUTE else f"{seconds / _MINUTE:.1f} minutes"


def held_out(report: TrainingReport, recipe: Recipe) -> str:
    """How many queries were held out, and how many should have been, if they are fewer."""
    count = sum(report.sets.values())
    why = "" if count >= recipe.held_out else f" (the recipe asks for {recipe.held_out}; a set gives a fifth at most)"
    return f"{count} held-out queries{why}"


def _called(model: str) -> str:
    """A folder by its name alone, since its place says nothing elsewhere; else the model's name on the hub."""
    return Path(model).name if Path(model).is_dir() else model


def _data(recipe: Recipe, prepared: Prepared) -> str:
    """A table of the sets."""
    lines = ["| set | queries learned from | queries are | licence | drawn at most |", "|---|---|---|---|---|"]
    for options, each in zip(recipe.sets, prepared.sets, strict=True):
        count = sum(group.name == each.name for group in prepared.groups)
        kind = _MADE_BY[each.synthetic] if each.synthetic else "the set's own"
        kind += f" (split {options.split})" if options.split else ""
        lines.append(f"| {each.name} | {count} | {kind} | {each.licence.replace('|', '/')} | {_limits(options)} |")
    return "\n".join(lines) + "\n"


def _limits(options: SetOptions) -> str:
    limits = {"queries": options.queries, "documents": options.documents}
    return ", ".join(f"{limit} {what}" for what, limit in limits.items() if limit is not None) or "all"


def _before_and_after(report: TrainingReport, recipe: Recipe) -> str:
    """The table of the held-out queries, with the paired intervals."""
    if report.trained is None:
        return "No query was held out, so nothing was measured.\n"
    sets = ", ".join(f"{count} of {name}" for name, count in report.sets.items())
    lines = [
        f"The candidates are BM25's, for {held_out(report, recipe)}, which were not trained on: {sets}.",
        "They chose the checkpoint too, and come from the sets that were trained on: other data will see less gain.",
        f"Base and trained read at most {recipe.max_length} tokens of query and passage.\n",
        "| | BM25 | base | trained |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in report.rows()),
        "",
    ]
    for name, before in (("BM25", report.first_stage), ("the base", report.base)):
        if (difference := report.difference(before)) is not None:
            lines.append(f"nDCG@10 against {name}: {difference}.")
    return "\n".join(lines) + "\n"
