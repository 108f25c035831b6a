"""Throughput on a GPU in bge-reranker-v2-m3's shape, beside sentence-transformers at its best and FlagEmbedding.

    python benchmarks/gpu.py --data DIR [--rounds 3] [--ours OPTIONS] [--only TEXT] [--venv NAME=FOLDER] [--prepare]
                             [--json FILE] [--markdown FILE] [--plot FILE]

1,000 passages of mixed lengths and random weights; pairs/s, the share of the peak of matrix products in bfloat16, and
the most memory on the GPU. sentence-transformers runs in bfloat16 with the best of four sizes of batch, FlagEmbedding
in float16 as its documentation has it. All else is as in `latency.py`, whose options it takes too.

This has not been run on CUDA yet: only its code, with `--device cpu --shape tiny`, which measures nothing of use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from _contest import Contestant, ours
from latency import parser, run, setting_of

BATCHES = (32, 64, 128, 256)
PEERS = (
    Contestant("sentence-transformers", "sentence-transformers", "torch"),
    Contestant(
        "sentence-transformers, tuned",
        "sentence-transformers-tuned",
        "torch",
        options={"batches": BATCHES},
        always=True,
    ),
    Contestant("FlagEmbedding FlagReranker, fp16", "flagembedding", "flagembedding", always=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__ or "")
    made.add_argument("--device", default="cuda", help="cpu tries the code out (cuda)")
    options = made.parse_args(arguments)
    if options.device != "cpu" and (reason := _no_cuda()):
        print(f"{reason}; --device cpu --shape tiny tries the code out", file=sys.stderr)
        return 1
    contestants = [*ours(["padding_free=true", *options.ours]), *PEERS]
    title = f"{(__doc__ or '').partition(chr(10))[0]} Measured on {_name(options.device)}."
    return run(options, title, setting_of(options, options.device), options.shape or ("v2-m3",), contestants)


def _no_cuda() -> str:
    """Why there is nothing to measure on; empty where there is."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device != "cpu" else "the CPU, which says nothing"


if __name__ == "__main__":
    sys.exit(main())
