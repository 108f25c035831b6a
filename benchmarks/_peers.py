"""Where the peers are installed: a virtual environment for each file in `benchmarks/peers`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
PEERS = HERE / "peers"
VENVS = HERE / ".venvs"
VARIABLE = "BENCHMARK_VENV_"
"""With the peers' name in capitals after it: an environment that is there already, which is not touched."""


class CannotInstallError(RuntimeError):
    """An environment could not be made; says why."""


def python_of(peers: str, given: Mapping[str, Path] | None = None) -> Path:
    """The Python that has some peers installed; makes their environment where there is none.

    Args:
        peers: A file's name in `benchmarks/peers`, without `.txt`; empty: the package's own Python.
        given: Environments that are there already.

    Raises:
        CannotInstallError: pip failed, or an environment that was named has no Python.
    """
    if not peers:
        return Path(sys.executable)
    named = (given or {}).get(peers) or os.environ.get(VARIABLE + peers.upper())
    folder = Path(named) if named else VENVS / peers
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if named:
        if not python.exists():
            raise CannotInstallError(f"{folder} has no Python; name a virtual environment")
        return python
    wanted = (PEERS / f"{peers}.txt").read_text(encoding="utf-8")
    done = folder / "installed.txt"
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        _install(folder, python, PEERS / f"{peers}.txt", wanted)
        done.write_text(wanted, encoding="utf-8")
    return python


def _install(folder: Path, python: Path, file: Path, wanted: str) -> None:
    """Make an environment; torch first, for left to itself pip may take a build with gigabytes of CUDA libraries."""
    print(f"installing {file.name} into {folder}", file=sys.stderr)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if torch := re.search(r"^torch==\S+", wanted, re.MULTILINE):
        _run(*pip, torch[0])
    _run(*pip, "-r", str(file))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CannotInstallError(f"{' '.join(command[1:4])} failed: {last}")
