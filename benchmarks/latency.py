"""Latency of ranking 50 passages, beside what others have, with the same weights and in the same run.

    python benchmarks/latency.py [--data DIR] [--ours OPTIONS] [--only TEXT] [--shape NAME] [--rounds 3] [--minutes 12]
                                 [--venv NAME=FOLDER] [--prepare] [--json FILE] [--markdown FILE] [--plot FILE]

Three shapes of cross-encoder: MiniLM-L6 with the embedded model's weights, BERT-base and XLM-R-large (10 passages) with
random ones. Every contestant is one process in each of the rounds, in turn; it loads, ranks some passages to be warm
and then all of them, several times where that is quick. Figures are medians over rounds of medians. `first score s`
has imports, loading and one pair; `peak MiB` is the most memory that the process had; `max score change` is held
against PyTorch in float32, one pair at a time. GFLOP are those of the pairs without padding, all layers counted in
full, `_shapes.py` says how; the peak is the best matrix product of several libraries and sizes, in the fastest dtype.

Whoever takes over `--slow` seconds for one ranking is measured in the first round only, save ours, LangChain's path
and the tuned peers, and after `--minutes` nothing more is begun but the first round; the column `rounds` tells. Models,
what was converted and the peers' environments are made before that and kept (`--prepare` does no more).

`--ours engine=torch,dtype=float32` adds this package with explicit options, and may be given again. `backend=embedded`
takes the embedded backend, `dtype=int8` is calibrated on pairs of the demo collection.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _contest import PEERS, Setting, compete, content, markdown, ours, plot, prepared
from _shapes import SHAPES

DEFAULT_SHAPES = ("minilm", "bert-base", "xlmr-large")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every contest takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, help="collections in BEIR layout, for Cranfield; none: the demo collection")
    made.add_argument("--shape", action="append", choices=SHAPES, help="this one only; may be given again")
    made.add_argument("--only", action="append", metavar="TEXT", help="contestants whose name has it; again for more")
    made.add_argument("--ours", action="append", default=[], metavar="OPTIONS", help="such as engine=torch,dtype=int8")
    made.add_argument("--rounds", type=int, default=3, help="fresh processes for each contestant, in turn (3)")
    made.add_argument("--passages", type=int, help="so many, if not as many as the shape says")
    made.add_argument("--minutes", type=float, default=12.0, help="begin no further round's runs after so many (12)")
    made.add_argument("--slow", type=float, default=8.0, help="seconds of a ranking that is measured once (8)")
    made.add_argument("--timeout", type=float, default=240.0, help="seconds that a process may take (240)")
    made.add_argument("--venv", action="append", default=[], metavar="NAME=FOLDER", help="peers' existing environment")
    made.add_argument("--models", type=Path, default=Path(__file__).parent / ".models", help="where models are kept")
    made.add_argument("--prepare", action="store_true", help="make models, conversions and environments, and stop")
    made.add_argument("--json", type=Path, help="write everything that was measured there")
    made.add_argument("--markdown", type=Path, help="write the tables there as well")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw the tables, with matplotlib")
    return made


def run(options: Any, title: str, setting: Setting, shapes: Sequence[str], contestants: Sequence[Any]) -> int:
    """Prepare, compete and write what was found.

    Returns:
        0 if anybody could be measured, 1 if nobody, 2 if the plot could not be drawn.
    """
    if options.plot and find_spec("matplotlib") is None:
        print("--plot asks for matplotlib, which is in the extra plot", file=sys.stderr)
        return 2
    chosen = [each for each in contestants if not options.only or any(text in each.name for text in options.only)]
    contests = list(prepared(setting, shapes, chosen))
    if options.prepare:
        return 0
    peaks = compete(setting, contests, rounds=options.rounds, minutes=options.minutes, slow=options.slow)
    shown = markdown(title, contests, peaks)
    print(shown)
    if options.markdown:
        options.markdown.write_text(shown + "\n", encoding="utf-8")
    if options.json:
        found = {"title": title, **content(contests, peaks)}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(contests, options.plot)
    return 0 if any(contest.ran for contest in contests) else 1


def setting_of(options: Any, device: str) -> Setting:
    """What the command line says of where and how."""
    venvs = {name: Path(folder) for name, _, folder in (given.partition("=") for given in options.venv)}
    return Setting(options.models.resolve(), options.data, device, options.passages, venvs, options.timeout)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__ or "").parse_args(arguments)
    contestants = [*ours(options.ours), *PEERS]
    title = (__doc__ or "").partition("\n")[0]
    return run(options, title, setting_of(options, "cpu"), options.shape or DEFAULT_SHAPES, contestants)


if __name__ == "__main__":
    sys.exit(main())
