"""What the benchmarks share: cases in fresh processes, in turn; medians; the machine; JSON and a Markdown table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

Figures: TypeAlias = dict[str, float]
"""What one case measured, by the column's name with its unit, such as `p95 ms`."""

Case: TypeAlias = Callable[[], Figures]
"""Sets up, measures and returns; runs alone in a process of its own."""

PACKAGES = (
    "langchain-rerank",
    "langchain-core",
    "numpy",
    "onnxruntime",
    "openvino",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def main(description: str, cases: Mapping[str, Case], *, runs: int = 3, arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark: measure every case several times and print the table.

    Args:
        description: What `--help` says; its first line stands above the table.
        cases: What to measure, by the row's name.
        runs: How often, if `--runs` does not say.
        arguments: The command line, if not the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help=f"fresh processes for each case, in turn ({runs})")
    parser.add_argument("--only", action="append", metavar="TEXT", help="cases whose name has it; may be given again")
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    parser.add_argument("--markdown", type=Path, help="write the table there as well")
    parser.add_argument("--case", choices=cases, metavar="NAME", help="measure one, here, once")
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(cases[options.case]()))
        return 0
    chosen = [name for name in cases if not options.only or any(text in name for text in options.only)]
    found = measure(chosen, options.runs)
    shown = report(description.partition("\n")[0], found)
    print(shown)
    if options.markdown:
        options.markdown.write_text(shown + "\n", encoding="utf-8")
    if options.json:
        content = {"machine": machine(), "versions": versions(), "medians": medians(found), "runs": found}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def measure(names: Sequence[str], runs: int) -> dict[str, list[Figures]]:
    """Each case `runs` times, A B C A B C ..., so that what else the machine does meets all of them."""
    found: dict[str, list[Figures]] = {name: [] for name in names}
    for turn in range(runs):
        for name in names:
            print(f"run {turn + 1} of {runs}: {name}", file=sys.stderr)
            found[name].append(in_fresh_process(name))
    return found


def in_fresh_process(name: str) -> Figures:
    """One case of the script that is running, measured by another interpreter."""
    command = [sys.executable, sys.argv[0], "--case", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(found: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """The median of each figure over the runs."""
    return {
        name: {column: statistics.median(run[column] for run in several) for column in several[0]}
        for name, several in found.items()
    }


def report(title: str, found: Mapping[str, Sequence[Figures]]) -> str:
    """Title, machine and table in Markdown."""
    about = machine()
    runs = max((len(several) for several in found.values()), default=0)
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"{title}\n\n{about['cpu']}, {about['cores']} cores ({', '.join(about['instructions'])}), "
        f"{about['memory GiB']} GiB, {about['system']}, Python {about['python']}; {packages}. "
        f"Medians of {runs} fresh processes.\n\n{table(medians(found))}"
    )


def table(rows: Mapping[str, Figures]) -> str:
    """Rows of figures in Markdown; a figure that a row has not is left empty."""
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_shown(row.get(column)) for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def _shown(figure: float | None) -> str:
    """Three digits that count."""
    if figure is None:
        return ""
    return f"{figure:.0f}" if abs(figure) >= 100 else f"{figure:.3g}"


def timed(function: Callable[[], object], *, times: int, before: int = 3) -> list[float]:
    """Seconds of each of several calls, after some that do not count."""
    for _ in range(before):
        function()
    return list(_seconds(function, times))


def _seconds(function: Callable[[], object], times: int) -> Iterator[float]:
    for _ in range(times):
        began = time.perf_counter()
        function()
        yield time.perf_counter() - began


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of all are not above, such as 0.95."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round(share * (len(ranked) - 1)))]


def peak_memory() -> float:
    """Most memory that this process has had, in MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = set(re.findall(r"^flags\s*: (.*)$", text, re.MULTILINE)[0].split()) if "flags" in text else set()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": cores,
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "memory GiB": round(memory),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "threads set": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ
        },
    }


def versions() -> dict[str, str]:
    """The packages that matter, those that are installed."""
    return {name: number for name in PACKAGES if (number := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def tiny_cross_encoder(folder: Path, *, positions: int) -> str:
    """A cross-encoder of two small layers and random weights, for what does not depend on the weights.

    Args:
        folder: Where to put it.
        positions: How many tokens it reads.

    Returns:
        The folder, as a model's name.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(1000))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=positions,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=positions,
        num_labels=1,
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    return str(folder)
