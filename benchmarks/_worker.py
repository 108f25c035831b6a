"""Measures one contestant in a process of its own, with the Python that has it installed.

Reads a job as JSON from standard input and writes what it measured as the last line of standard output. Nothing is
imported before the contestant is, so that `first score s` has its imports, its loading and one pair.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

BEGAN = time.perf_counter()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

Rank = Callable[[list[str]], list[float]]
"""Passages to their scores as probabilities, in the same order."""

REPORTED = (
    "FlagEmbedding", "fastembed", "flashrank", "langchain-classic", "langchain-community", "langchain-core",
    "langchain-rerank", "numpy", "onnxruntime", "openvino", "rerankers", "sentence-transformers", "tokenizers", "torch",
    "transformers",
)  # fmt: skip


def main() -> None:
    """One job."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        result = peaks(job) if job["contestant"] == "peak" else measured(job)
    print(json.dumps({**result, "versions": versions()}))


def measured(job: Mapping[str, Any]) -> dict[str, Any]:
    """Every variant of a contestant, one after the other; the fastest is reported.

    A job with `times` 0 stops after the first score.
    """
    passages, found = job["passages"], {}
    first = math.nan
    for name, rank in CONTESTANTS[job["contestant"]](job):
        if job.get("variant", name) != name:
            continue
        rank(passages[:1])
        if math.isnan(first):
            first = time.perf_counter() - BEGAN
        if job["times"]:
            rank(passages[: job["warm"]])
            found[name] = repeated(rank, passages, job["times"])
    best = min(found, key=lambda name: found[name][0], default="")
    seconds, scores = found.get(best, (math.nan, []))
    return {
        "variant": best,
        "scores": scores,
        "figures": {"s": seconds, "first score s": first, "peak MiB": peak_memory(), **gpu_memory()},
        "variants": {name: seconds for name, (seconds, _) in found.items()},
    }


def repeated(rank: Rank, passages: list[str], times: int) -> tuple[float, list[float]]:
    """The median of the seconds, and the scores."""
    taken, scores = [], []
    for _ in range(times):
        began = time.perf_counter()
        scores = rank(passages)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken), scores


def ours(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """This package: `Reranker` as a LangChain user calls it, with the options given."""
    from langchain_core.documents import Document

    from langchain_rerank import init_reranker

    options = dict(job["options"])
    backend = options.pop("backend", "cross-encoder")
    if backend == "embedded":
        options = {"max_length": job["max_length"], **options}
    else:
        options = {"model": job["model"], "device": job["device"], **options}
    if options.get("dtype") == "int8":
        options = {"calibration": job["calibration"], **options}
    reranker = init_reranker(backend, **options)

    def rank(passages: list[str]) -> list[float]:
        documents = [Document(text, metadata={"place": place}) for place, text in enumerate(passages)]
        ranked = reranker.compress_documents(documents, job["query"])
        scores = {document.metadata["place"]: document.metadata["relevance_score"] for document in ranked}
        return [scores[place] for place in range(len(passages))]

    yield "", rank


def langchain(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """What LangChain's users run: `CrossEncoderReranker` over `HuggingFaceCrossEncoder`, as documented."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_community.cross_encoders import HuggingFaceCrossEncoder
    from langchain_core.documents import Document

    class Remembering(HuggingFaceCrossEncoder):  # type: ignore[misc]
        """Keeps the scores, which the compressor throws away."""

        last: Any = None

        def score(self, text_pairs: list[tuple[str, str]]) -> Any:
            self.last = super().score(text_pairs)
            return self.last

    model = Remembering(model_name=job["model"], model_kwargs={"device": job["device"]})

    def rank(passages: list[str]) -> list[float]:
        documents = [Document(text) for text in passages]
        CrossEncoderReranker(model=model, top_n=len(documents)).compress_documents(documents, job["query"])
        return [float(score) for score in model.last]

    yield "", rank


def sentence_transformers(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """`CrossEncoder` as it comes: float32, batches of 32."""
    yield "", _cross_encoder(job, {}, 32)


def sentence_transformers_tuned(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """`CrossEncoder` in bfloat16, with the best of several sizes of batch."""
    import torch

    options = {"model_kwargs": {"dtype": torch.bfloat16}}
    for size in job["options"].get("batches", (1, 4, 8, 16)):
        yield f"bf16, batch {size}", _cross_encoder(job, options, size)


def sentence_transformers_openvino(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """`CrossEncoder` on OpenVINO, in its own precision and in bfloat16, with the best of several sizes of batch."""
    for name, config in (("", {}), ("bf16, ", {"INFERENCE_PRECISION_HINT": "bf16"})):
        options = {"backend": "openvino", "model_kwargs": {"ov_config": config}}
        for size in job["options"].get("batches", (1, 4, 8)):
            yield f"{name}batch {size}", _cross_encoder(job, options, size)


def _cross_encoder(job: Mapping[str, Any], options: Mapping[str, Any], size: int) -> Rank:
    def rank(passages: list[str]) -> list[float]:
        pairs = [(job["query"], passage) for passage in passages]
        model = _loaded(job, options)
        return [float(score) for score in model.predict(pairs, batch_size=size, show_progress_bar=False)]

    return rank


_LOADED: dict[str, Any] = {}
"""Models by their options: variants that differ in the size of batch alone share one."""


def _loaded(job: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    from sentence_transformers import CrossEncoder

    if (key := repr(options)) not in _LOADED:
        _LOADED[key] = CrossEncoder(job["model"], device=job["device"], **options)
    return _LOADED[key]


def reference(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """PyTorch in float32, one pair at a time, nothing between: what every score is compared with."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    kind: Any = AutoModelForSequenceClassification
    model = kind.from_pretrained(job["model"], dtype=torch.float32).eval().to(job["device"])

    def rank(passages: list[str]) -> list[float]:
        with torch.inference_mode():
            inputs = (tokenizer(job["query"], passage, return_tensors="pt") for passage in passages)
            return [sigmoid(float(model(**given.to(job["device"])).logits)) for given in inputs]

    yield "", rank


def flagembedding(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """`FlagReranker` with its own batch of 128; in float16 on a GPU, as its documentation does."""
    from FlagEmbedding import FlagReranker

    model = FlagReranker(
        job["model"], use_fp16=job["device"] != "cpu", devices=job["device"], max_length=job["max_length"]
    )

    def rank(passages: list[str]) -> list[float]:
        scores = model.compute_score([(job["query"], passage) for passage in passages], normalize=True)
        return [float(score) for score in scores]

    yield "", rank


def rerankers(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """`rerankers.Reranker` as it comes: batches of 16."""
    from rerankers import Reranker

    model: Any = Reranker(job["model"], model_type="cross-encoder", device=job["device"], verbose=0)

    def rank(passages: list[str]) -> list[float]:
        results = model.rank(job["query"], passages, doc_ids=list(range(len(passages)))).results
        scores = {result.document.doc_id: sigmoid(float(result.score)) for result in results}
        return [scores[place] for place in range(len(passages))]

    yield "", rank


def flashrank(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """FlashRank with our file under the name of one of its own models, since it loads no other names."""
    import tempfile
    from pathlib import Path

    from flashrank import Ranker, RerankRequest
    from flashrank.Config import model_file_map

    name = "ms-marco-MiniLM-L-12-v2"
    with tempfile.TemporaryDirectory() as cache:
        folder = Path(cache, name)
        folder.mkdir()
        for file in Path(job["onnx"]).iterdir():
            folder.joinpath(model_file_map[name] if file.name == "model.onnx" else file.name).symlink_to(file)
        model = Ranker(name, cache_dir=cache, max_length=job["max_length"], log_level="ERROR")

    def rank(passages: list[str]) -> list[float]:
        given = [{"id": place, "text": text} for place, text in enumerate(passages)]
        found = model.rerank(RerankRequest(query=job["query"], passages=given))
        scores = {passage["id"]: float(passage["score"]) for passage in found}
        return [scores[place] for place in range(len(passages))]

    yield "", rank


def fastembed(job: Mapping[str, Any]) -> Iterator[tuple[str, Rank]]:
    """TextCrossEncoder of fastembed with our file as a custom model: batches of 64."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    TextCrossEncoder.add_custom_model("local/model", ModelSource(hf="local/model"), model_file="model.onnx")
    model = TextCrossEncoder("local/model", specific_model_path=job["onnx"])

    def rank(passages: list[str]) -> list[float]:
        return [sigmoid(float(score)) for score in model.rerank(job["query"], passages)]

    yield "", rank


CONTESTANTS: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, Rank]]]] = {
    "ours": ours,
    "langchain": langchain,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers-tuned": sentence_transformers_tuned,
    "sentence-transformers-openvino": sentence_transformers_openvino,
    "flagembedding": flagembedding,
    "rerankers": rerankers,
    "flashrank": flashrank,
    "fastembed": fastembed,
    "reference": reference,
}


def peaks(job: Mapping[str, Any]) -> dict[str, Any]:
    """The most GFLOP/s of a matrix product, by dtype: the best of several sizes and libraries."""
    import torch

    device = job["device"]
    found = {"float32": max(_torch_peak(device, torch.float32), _numpy_peak(), _onnxruntime_peak())}
    if device != "cpu":
        found = {"float32": _torch_peak(device, torch.float32)}
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device != "cpu" or any(getattr(torch.cpu, probe, bool)() for probe in probes):
        found["bfloat16"] = _torch_peak(device, torch.bfloat16)
    return {"figures": found}


SIZES = ((1024, 768, 3072), (1024, 3072, 768), (512, 1024, 4096), (2048, 2048, 2048), (8192, 8192, 8192))
"""Rows, inner and columns; those of the layers that are measured, and large ones. The last is for GPUs."""


def _best(product: Callable[[int, int, int], Callable[[], object]], sizes: Any = SIZES[:-1]) -> float:
    """The best GFLOP/s over sizes, each repeated for a quarter of a second."""
    best = 0.0
    for m, k, n in sizes:
        multiply = product(m, k, n)
        for _ in range(3):
            multiply()
        began, taken = time.perf_counter(), []
        while time.perf_counter() - began < 0.25:
            start = time.perf_counter()
            multiply()
            taken.append(time.perf_counter() - start)
        best = max(best, 2e-9 * m * k * n / statistics.median(taken))
    return best


def _torch_peak(device: str, dtype: Any) -> float:
    import torch

    def product(m: int, k: int, n: int) -> Callable[[], object]:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)

        def multiply() -> None:
            torch.nn.functional.linear(a, b)
            if device != "cpu":
                torch.cuda.synchronize()

        return multiply

    with torch.inference_mode():
        return _best(product, SIZES[-2:] if device != "cpu" else SIZES[:-1])


def _numpy_peak() -> float:
    import numpy as np

    def product(m: int, k: int, n: int) -> Callable[[], object]:
        a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
        return lambda: a @ b

    return _best(product)


def _onnxruntime_peak() -> float:
    """ONNX Runtime's own kernels are faster than MKL's on some processors; 0 where it is not installed."""
    try:
        import numpy as np
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return 0.0

    def product(m: int, k: int, n: int) -> Callable[[], object]:
        given = helper.make_tensor_value_info("a", TensorProto.FLOAT, [m, k])
        gives = helper.make_tensor_value_info("c", TensorProto.FLOAT, [m, n])
        weights = numpy_helper.from_array(np.ones((k, n), np.float32), "b")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [given], [gives], [weights]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        a = np.ones((m, k), np.float32)
        return lambda: session.run(None, {"a": a})

    return _best(product)


def sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit))."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def peak_memory() -> float:
    """Most memory that this process has had, in MiB; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def gpu_memory() -> dict[str, float]:
    """Most memory that PyTorch has had on a GPU, if it used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"GPU peak MiB": torch.cuda.max_memory_allocated() / 2**20}


def versions() -> dict[str, str]:
    """What is installed of the packages that matter."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in REPORTED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
