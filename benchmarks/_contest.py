"""Contestants side by side: prepared, run in turn in fresh processes, put together as tables."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from _common import Figures, machine, table
from _peers import CannotInstallError, python_of
from _shapes import MAX_LENGTH, SHAPES, Shape, Task, calibration, shortened, task

HERE = Path(__file__).parent
BASELINE = "LangChain CrossEncoderReranker"

Job: TypeAlias = dict[str, Any]
Answer: TypeAlias = dict[str, Any]
"""What `_worker.py` reads and writes."""


class FailedError(RuntimeError):
    """A contestant could not be run; says why."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part, and with what options."""

    name: str
    worker: str
    """Its function in `_worker.py`."""

    peers: str = ""
    """The file in `benchmarks/peers` that installs it; empty: the package itself."""

    options: dict[str, Any] = field(default_factory=dict)
    onnx: bool = False
    """Whether it reads an ONNX file."""

    always: bool = False
    """Whether it is measured in every round even where that takes long."""

    @property
    def real_only(self) -> bool:
        """Whether it has weights of its own, and so is no contestant where others are asked for."""
        return self.options.get("backend") == "embedded"


PEERS = (
    Contestant(BASELINE, "langchain", "torch", always=True),
    Contestant("sentence-transformers", "sentence-transformers", "torch"),
    Contestant("sentence-transformers, tuned", "sentence-transformers-tuned", "torch", always=True),
    Contestant("sentence-transformers on OpenVINO", "sentence-transformers-openvino", "openvino", always=True),
    Contestant("FlagEmbedding FlagReranker", "flagembedding", "flagembedding"),
    Contestant("rerankers", "rerankers", "torch"),
    Contestant("FlashRank", "flashrank", "onnx", onnx=True),
    Contestant("fastembed", "fastembed", "onnx", onnx=True),
)


def ours(settings: Sequence[str]) -> list[Contestant]:
    """This package with its defaults, and with each of the settings, such as `engine=torch,dtype=float32`."""
    chosen = [Contestant("langchain-rerank", "ours", always=True)]
    for given in settings:
        options = {
            name.strip(): yaml.safe_load(value) for name, _, value in (o.partition("=") for o in given.split(","))
        }
        chosen.append(Contestant(f"langchain-rerank, {given}", "ours", options=options, always=True))
    return chosen


@dataclass
class Lane:
    """One contestant with one shape: what it has done so far."""

    contestant: Contestant
    shape: str
    job: Job = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    trouble: str = ""
    """Why it cannot be run; empty while it can."""

    first_load: float | None = None
    """Seconds to the first score before anything was cached on disk, for conversions."""

    @property
    def seconds(self) -> float:
        """The median of its rankings."""
        return statistics.median(answer["figures"]["s"] for answer in self.answers)

    @property
    def variant(self) -> str:
        """The variant that was fastest in the first round."""
        return str(self.answers[0]["variant"]) if self.answers else ""

    @property
    def name(self) -> str:
        """The contestant with its best variant."""
        return self.contestant.name + (f", {self.variant}" if self.variant else "")


@dataclass(frozen=True)
class Setting:
    """What all contests of one command have in common."""

    root: Path
    """Holds models and what was converted."""

    data: Path | None = None
    device: str = "cpu"
    passages: int | None = None
    """How many, if not as many as the shape says."""

    venvs: Mapping[str, Path] = field(default_factory=dict)
    timeout: float = 240.0
    """Seconds that one process may take."""

    def environment(self) -> dict[str, str]:
        """What every process sees: conversions stay beside the models."""
        return {**os.environ, "LANGCHAIN_RERANK_CACHE": str(self.root / "converted")}


def answer(setting: Setting, contestant: Contestant, job: Job, *, timeout: float | None = None) -> Answer:
    """One job done by a fresh process.

    Raises:
        FailedError: It is not installed, it ended badly or it took too long.
    """
    try:
        python = python_of(contestant.peers, setting.venvs)
        done = subprocess.run(
            [str(python), str(HERE / "_worker.py")],
            input=json.dumps({**job, "contestant": contestant.worker}),
            capture_output=True,
            text=True,
            timeout=timeout or setting.timeout,
            env=setting.environment(),
            check=False,
        )
    except CannotInstallError as error:
        raise FailedError(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"took more than {error.timeout:.0f} s") from error
    if done.returncode:
        raise FailedError(_last(done.stderr) or f"ended with status {done.returncode}")
    found: Answer = json.loads(done.stdout.splitlines()[-1])
    return found


def _last(text: str) -> str:
    """The last line of a process's complaints that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


@dataclass
class Contest:
    """One shape's task, its contestants and what all of them are held against."""

    name: str
    lanes: list[Lane]
    task: Task
    lengths: list[int]
    reference: list[float]
    """Scores by PyTorch in float32; empty where they could not be had."""

    @property
    def shape(self) -> Shape:
        """The model's."""
        return SHAPES[self.name]

    @property
    def ran(self) -> list[Lane]:
        """Those that were measured."""
        return [lane for lane in self.lanes if lane.answers]

    @property
    def flops(self) -> float:
        """Operations of one ranking, padding not counted."""
        return self.shape.flops(self.lengths)


def prepare(setting: Setting, name: str, contestants: Sequence[Contestant]) -> Contest:
    """Make a shape's model, its ONNX file, the reference scores and our conversions, each unless it is there.

    Raises:
        FailedError: The model cannot be made.
    """
    shape, folder = SHAPES[name], Path(_made("place", name, setting.root))
    given, lengths = shortened(task(setting.data, setting.passages or shape.passages), folder)
    job = {
        "model": str(folder),
        "device": setting.device,
        "query": given.query,
        "passages": given.passages,
        "times": shape.times,
        "warm": shape.warm,
        "max_length": MAX_LENGTH,
        "calibration": str(calibration(setting.root)),
    }
    lanes = [
        Lane(each, name, {**job, "options": each.options}) for each in contestants if shape.real or not each.real_only
    ]
    _give_onnx(setting, name, [lane for lane in lanes if lane.contestant.onnx])
    for lane in lanes:
        if lane.contestant.worker == "ours":
            _convert(setting, lane)
    return Contest(name, lanes, given, lengths, _reference(setting, job, folder))


def _made(function: str, name: str, root: Path) -> str:
    """What a function of `_shapes.py` makes, in a process of its own, whose memory ends with it.

    Raises:
        FailedError: It made nothing.
    """
    print(f"making the model {name} unless it is there ({function})", file=sys.stderr)
    code = f"import sys, pathlib, _shapes; print(_shapes.{function}(sys.argv[1], pathlib.Path(sys.argv[2])))"
    command = [sys.executable, "-c", code, name, str(root)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(_last(done.stderr))
    return done.stdout.splitlines()[-1]


def _give_onnx(setting: Setting, name: str, lanes: Sequence[Lane]) -> None:
    """Export the model for those that read ONNX."""
    if not lanes:
        return
    made = trouble = ""
    try:
        made = _made("place_onnx", name, setting.root)
    except FailedError as error:
        trouble = f"the model cannot be exported to ONNX: {error}"
    for lane in lanes:
        lane.job["onnx"], lane.trouble = made, trouble


def _convert(setting: Setting, lane: Lane) -> None:
    """Let one of ours load once, so that its conversion is on disk when it is measured."""
    print(f"loading {lane.contestant.name}, {lane.shape}", file=sys.stderr)
    try:
        found = answer(setting, lane.contestant, {**lane.job, "times": 0}, timeout=900)
    except FailedError as error:
        lane.trouble = str(error)
    else:
        lane.first_load = found["figures"]["first score s"]


def _reference(setting: Setting, job: Job, folder: Path) -> list[float]:
    """The scores of PyTorch in float32, kept on disk; none where that fails."""
    digest = hashlib.sha256(json.dumps([job["query"], job["passages"], job["device"]]).encode()).hexdigest()[:16]
    file = folder.parent / f"scores-{digest}.json"
    if file.is_file():
        kept: list[float] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    print(f"scoring {folder.parent.name} in float32", file=sys.stderr)
    try:
        found = answer(setting, Contestant("", "reference"), {**job, "times": 1, "warm": 1}, timeout=900)
    except FailedError as error:
        print(f"no reference scores: {error}", file=sys.stderr)
        return []
    file.write_text(json.dumps(found["scores"]), encoding="utf-8")
    scores: list[float] = found["scores"]
    return scores


def prepared(setting: Setting, names: Sequence[str], contestants: Sequence[Contestant]) -> Iterator[Contest]:
    """Those of several shapes whose models can be made."""
    for name in names:
        try:
            yield prepare(setting, name, contestants)
        except FailedError as error:  # noqa: PERF203 - the next shape may do
            print(f"{name} is left out: {error}", file=sys.stderr)


def compete(
    setting: Setting, contests: Sequence[Contest], *, rounds: int, minutes: float, slow: float
) -> list[Figures]:
    """Measure all contestants in turn, round after round.

    Args:
        setting: Where and what.
        contests: Prepared ones.
        rounds: How many.
        minutes: After so many nothing more is begun but the first round.
        slow: Whoever takes longer than so many seconds for one ranking is measured once, unless it is one of `always`.

    Returns:
        The machine's peaks in GFLOP/s, measured at the beginning of each round.
    """
    began, found = time.perf_counter(), []
    for turn in range(rounds):
        found.append(_peak(setting))
        for lane in (lane for contest in contests for lane in contest.lanes):
            late = time.perf_counter() - began > minutes * 60
            if lane.trouble or (turn and (late or (lane.seconds > slow and not lane.contestant.always))):
                continue
            print(f"round {turn + 1} of {rounds}: {lane.shape}, {lane.name}", file=sys.stderr)
            job = {**lane.job, **({"variant": lane.variant} if turn else {})}
            try:
                lane.answers.append(answer(setting, lane.contestant, job))
            except FailedError as error:
                lane.trouble = str(error)
    return found


def _peak(setting: Setting) -> Figures:
    try:
        figures: Figures = answer(setting, Contestant("", "peak"), {"device": setting.device})["figures"]
    except FailedError as error:
        print(f"no peak: {error}", file=sys.stderr)
        return {}
    return figures


def peak_of(found: Sequence[Figures]) -> Figures:
    """The best of all rounds: it is to be a limit."""
    dtypes = dict.fromkeys(dtype for figures in found for dtype in figures)
    return {dtype: max(figures.get(dtype, 0.0) for figures in found) for dtype in dtypes}


def rows(contest: Contest, peak: Figures) -> dict[str, Figures]:
    """A contest's table: the medians, and what follows from them."""
    return {lane.name: _row(contest, lane, max(peak.values(), default=0.0)) for lane in contest.ran}


def _row(contest: Contest, lane: Lane, peak: float) -> Figures:
    seconds, speed = lane.seconds, contest.flops / lane.seconds / 1e9
    figures = {"s": seconds, "pairs/s": len(contest.lengths) / seconds, "GFLOP/s": speed}
    if peak:
        figures["% of the peak"] = 100 * speed / peak
    for column in ("first score s", "peak MiB", "GPU peak MiB"):
        if column in lane.answers[0]["figures"]:
            figures[column] = statistics.median(each["figures"][column] for each in lane.answers)
    if contest.reference:
        figures["max score change"] = max(map(partial(_change, contest.reference), lane.answers))
    return {**figures, "rounds": len(lane.answers)}


def ratios(contest: Contest) -> Iterator[str]:
    """How much faster each of ours is than LangChain's own path and than the fastest peer, in words."""
    peers = [lane for lane in contest.ran if lane.contestant.worker != "ours"]
    baseline = [lane for lane in peers if lane.contestant.name == BASELINE]
    others = baseline + sorted((lane for lane in peers if lane not in baseline), key=lambda lane: lane.seconds)[:1]
    for lane in contest.ran:
        if lane.contestant.worker == "ours" and others:
            times = (f"{other.seconds / lane.seconds:.2f} times as fast as {other.name}" for other in others)
            yield f"{lane.name}: {', '.join(times)}"


def _change(reference: Sequence[float], found: Answer) -> float:
    scores: list[float] = found["scores"]
    return max(abs(score - other) for score, other in zip(scores, reference, strict=True))


def markdown(title: str, contests: Sequence[Contest], peaks: Sequence[Figures]) -> str:
    """The whole report: machine, limits, one table for each shape, and who could not run."""
    about, peak = machine(), peak_of(peaks)
    limits = " and ".join(f"{speed:.0f} GFLOP/s in {dtype}" for dtype, speed in peak.items()) or "not measured"
    where = (
        f"{about['cpu']}, {about['cores']} cores ({', '.join(about['instructions'])}), {about['memory GiB']} GiB, "
        f"{about['system']}, Python {about['python']}."
    )
    parts = [title, f"{where} Peak of matrix products: {limits}. Versions: {_versions(contests)}."]
    for contest in contests:
        parts.append(f"## {contest.name}\n\n{_about(contest)}")
        if contest.ran:
            parts.append(table(rows(contest, peak)))
        parts += [f"- {line}" for line in ratios(contest)]
        parts += [f"- {lane.contestant.name} could not run: {lane.trouble}" for lane in contest.lanes if lane.trouble]
        loads = [f"{lane.contestant.name} {lane.first_load:.1f} s" for lane in contest.lanes if lane.first_load]
        if loads:
            parts.append(f"First score of a model not converted before, or taken from the cache: {', '.join(loads)}.")
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace(" |\n- ", " |\n\n- ")


def _about(contest: Contest) -> str:
    words = sorted(len(passage.split()) for passage in contest.task.passages)
    return (
        f"{contest.shape.weights}, {len(words)} passages of {contest.task.source} ({words[0]} to {words[-1]} words), "
        f"{sum(contest.lengths)} tokens without padding, {contest.flops / 1e9:.3g} GFLOP."
    )


def _versions(contests: Sequence[Contest]) -> str:
    """Every package of every environment once, with all versions it has."""
    found: dict[str, set[str]] = {}
    for given in (each for contest in contests for lane in contest.lanes for each in lane.answers):
        for name, number in given["versions"].items():
            found.setdefault(name, set()).add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}" for name, numbers in sorted(found.items()))


def content(contests: Sequence[Contest], peaks: Sequence[Figures]) -> dict[str, Any]:
    """Everything that was measured, for JSON; the passages are left out."""
    peak = peak_of(peaks)
    return {"machine": machine(), "peaks": list(peaks), "contests": [_content(contest, peak) for contest in contests]}


def _content(contest: Contest, peak: Figures) -> dict[str, Any]:
    return {
        "shape": contest.name,
        "weights": contest.shape.weights,
        "source": contest.task.source,
        "lengths": contest.lengths,
        "flops": contest.flops,
        "table": rows(contest, peak),
        "reference": contest.reference,
        "contestants": [dict(_runs(lane)) for lane in contest.lanes],
    }


def _runs(lane: Lane) -> Iterator[tuple[str, Any]]:
    yield "name", lane.contestant.name
    yield "options", dict(lane.contestant.options)
    yield "trouble", lane.trouble
    yield "first load s", lane.first_load
    yield "runs", lane.answers


def plot(contests: Sequence[Contest], file: Path) -> None:
    """Seconds of each contestant as bars, one panel for each shape; asks for the extra `plot`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ran = [contest for contest in contests if contest.ran]
    figure, panels = plt.subplots(len(ran), 1, figsize=(8, 1 + 2.6 * len(ran)), squeeze=False, layout="constrained")
    for panel, contest in zip(panels[:, 0], ran, strict=True):
        lanes = sorted(contest.ran, key=lambda lane: -lane.seconds)
        colours = ["tab:blue" if lane.contestant.worker == "ours" else "tab:gray" for lane in lanes]
        bars = panel.barh([lane.name for lane in lanes], [lane.seconds for lane in lanes], color=colours)
        panel.bar_label(bars, fmt="%.2f", padding=3)
        panel.margins(x=0.16)
        title = f"{contest.name} ({contest.shape.weights}), {len(contest.lengths)} passages"
        panel.set_title(title, loc="right", fontsize="medium")  # a narrow panel, beside long names
        panel.set_xlabel("seconds, less is better")
    figure.savefig(file, dpi=150)
    plt.close(figure)
