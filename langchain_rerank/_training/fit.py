"""The training itself: sentence-transformers' trainer with a loss over groups, set right for a CPU."""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from langchain_rerank._training.base import EMBEDDED
from langchain_rerank._training.callbacks import Bar, Clock, Interruption
from langchain_rerank._training.mining import Group
from langchain_rerank._training.prepare import Question
from langchain_rerank._training.recipe import Recipe
from langchain_rerank.backends._engines_onnx import quiet
from langchain_rerank.backends._torch import longest, pick_device, pick_dtype
from langchain_rerank.errors import ConfigurationError, ModelLoadError, RerankError
from langchain_rerank.evaluation import score_run
from langchain_rerank.factory import nearest

logger = logging.getLogger(__name__)

METRIC = "nDCG@10"
"""What chooses the best checkpoint."""


class GroupLoss(nn.Module):
    """Cross-entropy between a group's targets and logits, with binary cross-entropy where the answer is known.

    For targets t and logits z of a group, shape (g,): `listwise * -sum(softmax(t) * log_softmax(z))`, the mean over the
    groups, and `pointwise * BCE(z, label)`, the mean over the pairs whose relevance is known.
    ListNet: Cao et al., 2007, https://doi.org/10.1145/1273496.1273513

    Pairs go through the model longest first, `batch_pairs` of them at a time, so that few positions are padding. (The
    losses of sentence-transformers pad a whole batch to its longest pair, or cut it in the order given.)
    """

    def __init__(self, model: CrossEncoder, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self._recipe = recipe
        self._batch_pairs = batch_pairs(recipe)

    def forward(self, inputs: Sequence[Any], labels: Sequence[Tensor], **_: Any) -> Tensor:
        """The loss of some groups.

        Args:
            inputs: The queries, their lists of passages, and the lists of relevance.
            labels: The targets of each group.

        Returns:
            A scalar.
        """
        queries, groups, relevance = inputs
        logits = self._logits([(query, text) for query, texts in zip(queries, groups, strict=True) for text in texts])
        known = torch.tensor([grade for grades in relevance for grade in grades], device=logits.device)
        loss = self._recipe.pointwise * self._pointwise(logits, known)
        return loss + self._recipe.listwise * self._listwise(
            torch.split(logits, [len(texts) for texts in groups]), labels
        )

    def _logits(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Shape (n,), in float32, in the order of the pairs."""
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        found = []
        for start in range(0, len(order), self._batch_pairs):
            features = self.model.preprocess([pairs[i] for i in order[start : start + self._batch_pairs]])
            features = {key: value.to(self.model.device) for key, value in features.items() if hasattr(value, "to")}
            found.append(self._scores(features))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(found)[back.to(found[0].device)]

    def _scores(self, features: dict[str, Tensor]) -> Tensor:
        if self._recipe.recompute and torch.is_grad_enabled():
            # Of a copy: the model writes into what it is given, and is given it twice.
            scores = checkpoint(lambda: self.model(dict(features))["scores"], use_reentrant=False)
        else:
            scores = self.model(features)["scores"]
        logits: Tensor = scores.view(-1).float()
        return logits

    def _pointwise(self, logits: Tensor, relevance: Tensor) -> Tensor:
        smoothing = self._recipe.label_smoothing
        targets = relevance.clamp(smoothing, 1 - smoothing)
        each = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        known = (relevance >= 0).float()
        return (each * known).sum() / known.sum().clamp(min=1)

    @staticmethod
    def _listwise(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        losses = [
            -(target.to(group.device).float().softmax(0) * group.log_softmax(0)).sum()
            for group, target in zip(logits, labels, strict=True)
        ]
        return torch.stack(losses).mean()


class RankingEvaluator(BaseEvaluator):
    """nDCG@10 of the first stage's candidates as the model orders them, the mean over held-out queries."""

    def __init__(self, questions: Sequence[Question], recipe: Recipe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.primary_metric = METRIC
        self._questions = questions
        self._recipe = recipe

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """The metric over all held-out queries."""
        del output_path, epoch
        run = rank(model, self._questions, self._recipe)
        scores = score_run({each.query_id: each.grades for each in self._questions}, run, [METRIC])
        value = fmean(scores[METRIC].values())
        logger.info("Step %s: %s %.4f on %s held-out queries", steps, METRIC, value, len(self._questions))
        return {METRIC: value}


def rank(model: CrossEncoder, questions: Sequence[Question], recipe: Recipe) -> dict[str, list[str]]:
    """Document ids by query id, best first; ties stay as the first stage had them."""
    pairs = [(each.query, text) for each in questions for text in each.documents.values()]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16(recipe)):
        logits = iter(model.predict(pairs, batch_size=batch_pairs(recipe), show_progress_bar=False).tolist())
    run = {}
    for question in questions:
        scored = {key: next(logits) for key in question.documents}
        run[question.query_id] = sorted(scored, key=lambda key: -scored[key])
    return run


def load_base(base: str, recipe: Recipe) -> CrossEncoder:
    """The base as a cross-encoder with one logit: eager attention and no dropout, which train fastest on a CPU.

    Raises:
        ModelLoadError: There is no such model.
    """
    set_seed(recipe.seed)  # of a fresh head
    # That a plain encoder lacks a head is no news: a fresh one is what was asked for.
    with _loading(base), quiet("transformers"), quiet("sentence_transformers"):
        model: CrossEncoder = CrossEncoder(
            base,
            num_labels=1,
            max_length=recipe.max_length,
            device=str(choose_device(recipe)),
            activation_fn=nn.Identity(),
            model_kwargs={"dtype": torch.float32, "attn_implementation": "eager"},
        )
    _leave_dropout_out(model)
    return model


def _leave_dropout_out(model: nn.Module) -> None:
    """Set every dropout to 0 in the modules alone: the config keeps the base's, for whoever trains the model later."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # ModernBERT's attention keeps it so
                setattr(module, name, 0.0)


def check_base(folder: str, recipe: Recipe) -> None:
    """Refuse what cannot become a cross-encoder, before anything is done.

    Args:
        folder: Where the recipe's base is, as `place_base` says.
        recipe: Messages name the base as it does.

    Raises:
        ModelLoadError: There is no such model, it has several labels or no positions for so many tokens, or it writes
            text.
        ConfigurationError: It cannot do with so few layers.
    """
    base = recipe.base
    with _loading(base, nearest(base, [EMBEDDED])):
        config = AutoConfig.from_pretrained(folder)
    kind = next(iter(config.architectures or ()), type(config).__name__)
    if getattr(config, "is_encoder_decoder", False) or "CausalLM" in kind:
        raise ModelLoadError(
            f"{base!r} is a {kind}, a model that writes text, such as monoT5's, and is not trained here. Start from a "
            "cross-encoder with one label, or from an encoder such as BERT"
        )
    if _has_head(config) and config.num_labels != 1:
        raise ModelLoadError(f"{base!r} has {config.num_labels} labels; a reranker has one, the relevance")
    most = longest(config)
    if most is not None and recipe.max_length > most:
        raise ModelLoadError(f"max_length={recipe.max_length}, but {base!r} has positions for {most} tokens; lower it")
    if recipe.layers is not None:
        fresh: Any = AutoModelForSequenceClassification
        with _loading(base), torch.device("meta"):  # only the shapes are wanted
            keep_layers(fresh.from_config(config), recipe.layers)


def has_head(base: str) -> bool:
    """Whether the base is a cross-encoder already; a plain encoder gets a fresh head."""
    with _loading(base):
        return _has_head(AutoConfig.from_pretrained(base))


def _has_head(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


@contextmanager
def _loading(base: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except RerankError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{base!r} cannot be loaded: {' '.join(str(error).split())}{hint}") from error


def keep_layers(model: Any, count: int) -> None:
    """Leave out layers at equal distances, so that `count` remain, the last among them.

    Where the first layer is unlike the others, as ModernBERT's without a norm is, it remains in place of the first one
    chosen. Sajjad et al., 2023, On the effect of dropping layers of pre-trained transformer models, compare such
    choices: https://arxiv.org/abs/2004.03844

    Raises:
        ConfigurationError: The model has fewer, keeps them where nobody looked, or could not be loaded without some.
    """
    encoder, name = _where_layers_are(model, count)
    layers = getattr(encoder, name)
    equal = [round((i + 1) * len(layers) / count) - 1 for i in range(count)]
    kinds = getattr(model.config, "layer_types", None)
    for kept in (equal, [0, *equal[1:]]):
        setattr(encoder, name, nn.ModuleList(layers[i] for i in kept))
        model.config.num_hidden_layers = count
        if kinds:
            model.config.layer_types = [kinds[i] for i in kept]
        if _is_as_configured(model):
            return
    raise ConfigurationError(
        f"layers={count}: {type(model).__name__} has layers of several kinds, and cannot do without some; keep all"
    )


def _where_layers_are(model: Any, count: int) -> tuple[Any, str]:
    """The module that has the list of the encoder's layers, `count` at least, and what the list is called there."""
    encoder = getattr(model.base_model, "encoder", model.base_model)
    name = next((name for name in ("layer", "layers") if isinstance(getattr(encoder, name, None), nn.ModuleList)), None)
    if name is None:
        raise ConfigurationError(f"layers={count}: {type(model).__name__} has no list of encoder layers to shorten")
    if count > len(getattr(encoder, name)):
        raise ConfigurationError(f"layers={count}: {type(model).__name__} has {len(getattr(encoder, name))}")
    return encoder, name


def _is_as_configured(model: Any) -> bool:
    """Whether a model of this config has these weights, so that this one loads once it is saved."""
    with torch.device("meta"):  # only the shapes are wanted
        fresh = type(model)(copy.deepcopy(model.config))
    found, wanted = ({name: weight.shape for name, weight in each.state_dict().items()} for each in (model, fresh))
    return found == wanted


def copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, as they are now."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def mix(model: nn.Module, base: Mapping[str, Tensor], share: float) -> None:
    """Move every weight in place towards the base's, by a share of the way.

    Args:
        model: The trained model.
        base: The `copied_weights` of the same model before the training.
        share: 0 leaves the model as it is, 1 would make it the base.
    """
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                weight.lerp_(base[name].to(weight.device), share)


def fit(
    model: CrossEncoder,
    groups: Sequence[Group],
    questions: Sequence[Question],
    recipe: Recipe,
    folder: Path,
    *,
    progress: bool = True,
) -> float:
    """Train a model in place, and leave it as it was at its best evaluation.

    Args:
        model: As `load_base` gives it.
        groups: What to learn.
        questions: The held-out queries. Without any, the last step's model stays.
        recipe: How.
        folder: Checkpoints go here; where there are some already, the training goes on from the last.
        progress: Show a bar with the time that is left.

    Returns:
        Seconds of training and evaluation, those of earlier runs that the result comes from among them.

    Raises:
        KeyboardInterrupt: Ctrl-C. There is a checkpoint of the step that it came in.
    """
    interruption = Interruption()
    trainer = CrossEncoderTrainer(
        model=model,
        args=_arguments(recipe, len(groups), folder, evaluate=bool(questions), progress=progress),
        train_dataset=_dataset(groups),
        loss=GroupLoss(model, recipe),
        evaluator=RankingEvaluator(questions, recipe) if questions else None,
        callbacks=[Clock(), interruption],
    )
    if recipe.patience and questions:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    if trainer.pop_callback(ProgressCallback):  # and so does this one
        trainer.add_callback(Bar())
    with interruption.awaited():
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    if interruption.asked:
        raise KeyboardInterrupt
    # The trainer has made a new one, if it went on from a checkpoint.
    return next(each.seconds for each in trainer.callback_handler.callbacks if isinstance(each, Clock))


def _dataset(groups: Sequence[Group]) -> Any:
    """Groups as the columns that `GroupLoss` reads; the trainer takes `label` for what is to be learned."""
    from datasets import Dataset

    rows = [asdict(group) for group in groups]
    columns = {"query": "query", "docs": "docs", "relevance": "relevance", "label": "targets"}
    return Dataset.from_dict({name: [row[key] for row in rows] for name, key in columns.items()})


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that was written to its end, where the trainer's state comes last."""
    whole = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    return None if last is None else str(last.resolve())


def save(model: CrossEncoder, folder: Path) -> None:
    """Write the model as transformers has it: `config.json`, `model.safetensors` and the tokenizer's files."""
    classifier: Any = model.model
    classifier.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # which are for their owner alone, whatever the umask says
        shutil.copymode(folder / "config.json", weights)


def _arguments(
    recipe: Recipe, groups: int, folder: Path, *, evaluate: bool, progress: bool
) -> CrossEncoderTrainingArguments:
    steps = max(1, round(recipe.epochs * -(-groups // recipe.batch_size)))
    each = max(1, -(-steps // recipe.evaluations))
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder.resolve()),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        bf16=bfloat16(recipe),
        use_cpu=choose_device(recipe).type == "cpu",
        seed=recipe.seed,
        data_seed=recipe.seed,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=each,
        save_strategy="steps",
        save_steps=each,
        save_total_limit=2,
        load_best_model_at_end=evaluate,
        metric_for_best_model=f"eval_{METRIC}",
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, steps // 100),
        disable_tqdm=not progress,
        report_to=[],
    )
    # Of several GPUs the trainer would take all, each with a copy of the model and a batch of its own.
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001 - as the trainer itself does for a model in parts
    return arguments


def choose_device(recipe: Recipe) -> torch.device:
    """The recipe's device, else CUDA if it is there, else the CPU.

    Raises:
        ConfigurationError: The recipe's device is not there, or a GPU other than the first, which the trainer takes.
    """
    if recipe.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if later := re.fullmatch(r"cuda:0*([1-9]\d*)", recipe.device):
        raise ConfigurationError(
            f"device {recipe.device!r}: a training takes the first GPU that it sees; "
            f"set CUDA_VISIBLE_DEVICES={later[1]} and device='cuda'"
        )
    return pick_device(recipe.device)


def batch_pairs(recipe: Recipe) -> int:
    """Pairs that go through the model together: the recipe's, else 8 on a CPU and 32 elsewhere."""
    return recipe.batch_pairs or (8 if choose_device(recipe).type == "cpu" else 32)


def bfloat16(recipe: Recipe) -> bool:
    """Whether to compute in bfloat16: asked for, or the hardware has it."""
    return recipe.dtype != "float32" and pick_dtype(recipe.dtype, choose_device(recipe)) is torch.bfloat16
