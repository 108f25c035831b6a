"""What a training does, in one object or one YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from langchain_rerank._training.base import EMBEDDED
from langchain_rerank.errors import ConfigurationError
from langchain_rerank.factory import expand, read_yaml, refuse_unknown, validated

Synthetic = Literal["title", "first_sentence", "llm"]


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""What a teacher counts beside the others."""


class Strict(BaseModel):
    """Options that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SetOptions(Strict):
    """One collection to learn from."""

    path: Path
    """A folder in BEIR layout (`corpus.jsonl` and `queries.jsonl`, perhaps with .gz, and judgements), or a file of JSON
    lines: pairs (`query`, `positive`, perhaps `negatives` and `grade`) or documents alone (`text`, perhaps `title`)."""

    name: str = ""
    """What the set is called in groups, report and card; by default as its file or folder, and what is synthetic."""

    split: str | None = None
    """Whose judgements of a folder in BEIR layout to learn from, such as `dev` for `qrels/dev.tsv`. `None` takes
    `qrels/train.tsv`, else `qrels.tsv`; a test split is learned from only where it is named."""

    queries: int | None = Field(default=None, ge=1)
    """Most queries to take, drawn by the seed; `None` takes all. Of an LLM's, most documents to ask it about."""

    documents: int | None = Field(default=None, ge=1)
    """Most documents to look for hard negatives in: those that answer a query taken, and others drawn by the seed."""

    synthetic: Synthetic | None = None
    """Make up the queries: a document's title, or its first sentence, asks for the rest of it, or the recipe's `llm` is
    asked for a question. Documents without labels need this. Such queries are marked as synthetic everywhere, and never
    used to judge the model."""

    licence: str | None = None
    """For the model card. `None` reads the line `- licence:` of the folder's SOURCE.md, if there is one."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, options: Any) -> Any:
        options = {"path": options} if isinstance(options, str | Path) else options
        if not isinstance(options, Mapping) or options.get("name") or not options.get("path"):
            return options
        stem, synthetic = Path(options["path"]).name.split(".")[0], options.get("synthetic")
        return {**options, "name": f"{stem} ({synthetic})" if synthetic else stem}


class Recipe(Strict):
    """All that a training depends on, beside the data; the same recipe and versions give the same model.

    Source of the defaults: Nogueira and Cho, 2019 (https://arxiv.org/abs/1901.04085) for the model, Cao et al., 2007
    (ListNet, https://doi.org/10.1145/1273496.1273513) for the loss over a group, and what was measured for the
    embedded model (docs/embedded-model.md).
    """

    base: str = EMBEDDED
    """A sequence-classification cross-encoder, or a plain encoder, which gets a fresh head: a folder or a name on the
    hub. `embedded` is the model in the package; a folder that was exported to ONNX will do as well."""

    sets: Annotated[tuple[SetOptions, ...], Field(min_length=1)]
    """What to learn from. A path alone will do for a set without other options."""

    llm: str | None = None
    """A chat model as LangChain's `init_chat_model` takes it, such as `openai:gpt-5-mini`: it makes up the queries
    of the sets with `synthetic: llm`."""

    seed: int = 0

    max_length: int = Field(default=256, ge=32)
    """Most tokens of query and passage together; a text's end is cut."""

    layers: int | None = Field(default=None, ge=1)
    """Keep so many of the base's layers, at equal distances, the last among them; `None` keeps all."""

    embedding: str | None = None
    """A sentence-transformers model as second first stage for hard negatives, beside BM25."""

    fetch_k: int = Field(default=30, ge=2)
    """How many candidates each first stage finds for a query."""

    group_size: int = Field(default=8, ge=2)
    """Passages that are ranked against each other for one query in training."""

    teacher: dict[str, Weight] = Field(default_factory=dict)
    """Whose scores to learn, with their weights: `bm25`, `dense` (the embedding), or any reranker, such as
    `bge:BAAI/bge-reranker-v2-m3` or `cross-encoder:my-folder`. Each is standardised within a group, then added up.
    Weights are above 0. Empty learns the labels alone."""

    label_bonus: float = Field(default=2.0, ge=0)
    """What a label is worth beside the teachers, in their standard deviations, for the highest grade."""

    near_duplicate: float = Field(default=0.8, gt=0, le=1)
    """A candidate that is so similar to a right answer (Jaccard, word shingles) is no negative."""

    relative_margin: float | None = Field(default=None, ge=0, lt=1)
    """A candidate is no negative either where the embedding finds it nearer to the query than the nearest right answer
    less this share of it, since it may be an answer that nobody labelled; 0.05 is usual. `None` takes all.
    Source: Moreira et al., 2024 (NV-Retriever), https://arxiv.org/abs/2407.15831"""

    listwise: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy between the group's softmax of targets and of logits."""

    pointwise: float = Field(default=0.1, ge=0)
    """Weight of the binary cross-entropy of each labelled pair, which gives scores their place in [0, 1]."""

    label_smoothing: float = Field(default=0.05, ge=0, lt=0.5)
    """How far the pointwise targets stay from 0 and 1."""

    epochs: float = Field(default=1.0, gt=0)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Part of the steps in which the learning rate rises."""

    batch_size: int = Field(default=8, ge=1)
    """Queries that one step learns from."""

    batch_pairs: int | None = Field(default=None, ge=1)
    """Pairs that go through the model together, longest first. The gradient is the same but for rounding. `None` takes
    8 on a CPU, where 32 made a step 2.5 times slower (docs/training.md), and 32 elsewhere."""

    base_share: float = Field(default=0.0, ge=0, lt=1)
    """How much of the base stays in the result: so much of each weight is the base's, the rest the trained one. A model
    that was trained further forgets less of what the sets do not show when it is mixed with what it was. With a fresh
    head or fewer `layers` there is nothing to mix with.
    Source: Wortsman et al., 2022 (WiSE-FT), https://arxiv.org/abs/2109.01903"""

    recompute: bool = False
    """Compute each `batch_pairs` again for its gradient, so that no more of them are in memory at once than that; else
    all `batch_size` times `group_size` are. Slower, and the same gradient."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 computes in mixed precision: weights stay float32. `auto` takes it where the hardware has it."""

    device: str | None = None
    """A torch device; `None` takes CUDA if it is there, else the CPU."""

    held_out: int = Field(default=200, ge=0)
    """Labelled queries that are never trained on: nDCG@10 on them chooses the best checkpoint and is reported. As many
    of each labelled set, and at most a fifth of it."""

    evaluations: int = Field(default=4, ge=1)
    """How often the held-out queries are asked, at equal distances; each leaves a checkpoint to resume from."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better nDCG@10; `None` goes on to the end."""


def read_recipe(spec: Recipe | Path | str | Mapping[str, Any], /, **options: Any) -> Recipe:
    """A recipe from an object, a mapping or a YAML file; `${VAR}` in a string is an environment variable.

    Args:
        spec: The recipe. Paths of sets, base, embedding and teachers in a file are relative to the file.
        options: Options that come before the recipe's own. Their paths are relative to the working directory.

    Raises:
        ConfigurationError: The file is not there, or an option is unknown or wrong; the message names the nearest.
    """
    if isinstance(spec, Recipe):
        spec = spec.model_dump(exclude_unset=True)
    folder = Path()
    if not isinstance(spec, Mapping):
        folder, found = Path(spec).parent, _read(Path(spec))
        if not isinstance(found, dict):
            raise ConfigurationError(f"{spec} holds a list; a training recipe is a mapping with base and sets")
        spec = found
    merged = expand({**spec, **options})
    _refuse_unknown(merged)
    recipe: Recipe = validated("training recipe", Recipe, merged)
    _refuse_namesakes(recipe)
    given = _in(Path(), recipe)
    return _in(folder, recipe).model_copy(update={name: getattr(given, name) for name in options})


def _read(file: Path) -> dict[str, Any] | list[Any]:
    """What a recipe's file holds."""
    if file.is_dir() or file.suffix in (".jsonl", ".gz"):
        raise ConfigurationError(f"{file} is data, and no recipe; a recipe has it among its sets, as in sets: [{file}]")
    return read_yaml(file)


def _refuse_unknown(merged: Mapping[str, Any]) -> None:
    refuse_unknown("a training recipe", merged, Recipe.model_fields)
    sets = merged.get("sets")
    for each in sets if isinstance(sets, list | tuple) else ():
        if isinstance(each, Mapping):
            refuse_unknown("a set of a training recipe", each, SetOptions.model_fields)


def _refuse_namesakes(recipe: Recipe) -> None:
    """Refuse two sets of one name, which report and card could not tell apart."""
    names = [each.name for each in recipe.sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{names.count(name)} sets are called {name!r}; give each its own name=")


def with_models(recipe: Recipe, named: Callable[[str], str]) -> Recipe:
    """The recipe with every model that it names, of base, embedding and teachers, as `named` gives it."""
    embedding = recipe.embedding and named(recipe.embedding)
    models = {"base": named(recipe.base), "embedding": embedding, "teacher": _teachers(recipe, named)}
    return recipe.model_copy(update=models)


def _teachers(recipe: Recipe, named: Callable[[str], str]) -> dict[str, float]:
    """The teachers with their weights; the model of each `backend:model` is as `named` gives it."""
    found = {}
    for name, weight in recipe.teacher.items():
        backend, _, model = name.partition(":")
        found[f"{backend}:{named(model)}" if model else name] = weight
    return found


def _in(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with its relative paths as from a folder."""
    sets = tuple(each.model_copy(update={"path": folder / each.path.expanduser()}) for each in recipe.sets)
    return with_models(recipe, lambda model: _placed(folder, model)).model_copy(update={"sets": sets})


def _placed(folder: Path, model: str) -> str:
    """A model that is a folder in there, as such; else the name as it stands."""
    return str(folder / model) if (folder / model).is_dir() else model
