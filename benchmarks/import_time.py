"""What `import langchain_rerank` adds to what every LangChain user has imported already.

    python benchmarks/import_time.py [--runs 15] [--json FILE]

Fresh interpreters in turn, A B A B ..., after one of each that fills the disk cache; medians. The promise is at most
0.15 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

BASE = "from langchain_core.documents import BaseDocumentCompressor"
STATEMENTS = {
    "langchain-core's base class": BASE,
    "and the package": f"{BASE}; import langchain_rerank",
    "and its names": f"{BASE}; from langchain_rerank import Reranker, init_reranker",
    "and the embedded reranker, built": f"{BASE}; from langchain_rerank import init_reranker as i; i('embedded')",
}
PROMISE = 0.15


def seconds(statement: str) -> float:
    """Seconds that one statement takes in a fresh interpreter, its start not counted."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure(runs: int) -> dict[str, float]:
    """The median of each statement, the statements in turn."""
    for statement in STATEMENTS.values():
        seconds(statement)
    found = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(runs)]
    return {name: statistics.median(run[name] for run in found) for name in STATEMENTS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    medians = measure(arguments.runs)
    base, package, *_ = medians.values()
    print(f"Python {platform.python_version()}, medians of {arguments.runs} fresh interpreters\n")
    print("| imported | seconds | added |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median - base:+.3f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": platform.python_version(), "medians": medians}, indent=2))
    return int(package - base > PROMISE)


if __name__ == "__main__":
    sys.exit(main())
