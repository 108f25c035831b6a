"""What runs an encoder's network, token ids in and logits out: PyTorch, OpenVINO or ONNX Runtime."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast

from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import Self

from langchain_rerank._optional import missing, require
from langchain_rerank.backends._cpus import allowed_cpus
from langchain_rerank.backends._engines_cache import open_converted
from langchain_rerank.backends._engines_torch import PackedNetwork, TorchNetwork
from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends._torch import Dtype, TorchBackend, adds_in_int16, pick_device, pick_dtype
from langchain_rerank.backends.base import clean
from langchain_rerank.backends.local import Batch, Logits
from langchain_rerank.errors import ConfigurationError, ModelLoadError, RerankError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Engine: TypeAlias = Literal["auto", "torch", "openvino", "onnxruntime"]
"""An engine by name; `auto` is the fastest that is installed, for a model that it is known to convert."""

Network: TypeAlias = Callable[[Batch], Logits]
"""A padded batch of b pairs, shape (b, t) token ids, to b logits."""

CONVERTIBLE = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"})
"""Values of `model_type` in config.json that `auto` converts: the tests compare each with PyTorch."""

OPENVINO = ("openvino",)
QUANTISING = ("openvino", "nncf")
EXPORTING = ("onnxscript",)
"""What must be installed to convert a model, by engine; ONNX Runtime itself always is."""

OLDEST_OPENVINO = (2026, 4)
"""The first version that `auto` takes: conversions by older ones were never compared with PyTorch."""


@dataclass(frozen=True)
class Choice:
    """An engine and a dtype, settled."""

    engine: Literal["torch", "openvino", "onnxruntime"]

    dtype: Literal["float32", "bfloat16", "float16", "int8"]

    why: str
    """For people, in a few words."""


def choose(
    engine: Engine, dtype: Dtype, device: torch.device, *, model_type: str | None = None, as_it_is: str = ""
) -> Choice:
    """Settle engine and dtype for a device.

    Args:
        engine: What was asked for.
        dtype: What was asked for.
        device: Where to compute; engines other than PyTorch run on a CPU.
        model_type: That of the model's config.json; `None` where no model is named yet.
        as_it_is: Why `auto` must not convert the model; empty: it may.

    Raises:
        ConfigurationError: They do not go together, or not with this device.
        MissingDependencyError: The engine asked for is not installed.
    """
    check(engine, dtype, device.type)
    if device.type != "cpu":
        return _in_torch(dtype, device, f"PyTorch is the engine for {device.type}, {_about_dtype(dtype, device)}")
    if dtype == "int8":
        return Choice("openvino", "int8", "OpenVINO computes in int8")
    if engine == "auto":
        return _fastest(dtype, device, model_type, as_it_is)
    if engine == "openvino":
        return Choice("openvino", _name(pick_dtype(dtype, device)), _about_dtype(dtype, device))
    if engine == "onnxruntime":
        return Choice("onnxruntime", "float32", "ONNX Runtime computes in float32")
    return _in_torch(dtype, device, _about_dtype(dtype, device))


def check(engine: Engine, dtype: Dtype, device_type: str) -> None:
    """Refuse what does not go together; no library is imported for it.

    Raises:
        ConfigurationError: Engine and dtype do not go together, or not with this type of device.
        MissingDependencyError: The engine asked for is not installed.
    """
    if device_type != "cpu":
        if engine in ("openvino", "onnxruntime") or dtype == "int8":
            raise ConfigurationError(
                f"engine={engine!r} with dtype={dtype!r} runs on a CPU, not on {device_type!r}; "
                "use device='cpu', or engine='torch' with another dtype"
            )
    elif dtype == "int8" and engine not in ("auto", "openvino"):
        raise ConfigurationError(f"dtype='int8' is for engine='openvino', not for engine={engine!r}")
    elif dtype not in ("auto", "float32") and engine == "onnxruntime":
        raise ConfigurationError(f"engine='onnxruntime' computes in float32, not in {dtype!r}; use engine='openvino'")
    elif engine == "onnxruntime":
        require(*EXPORTING, extra="train")
    elif engine == "openvino" or dtype == "int8":
        require(*(QUANTISING if dtype == "int8" else OPENVINO), extra="openvino")


def _in_torch(dtype: Dtype, device: torch.device, why: str) -> Choice:
    return Choice("torch", _name(pick_dtype(dtype, device)), why)


def _fastest(dtype: Dtype, device: torch.device, model_type: str | None, as_it_is: str) -> Choice:
    """In the order that was measured: OpenVINO, then PyTorch in bfloat16, then ONNX Runtime, then PyTorch."""
    if model_type is not None and model_type not in CONVERTIBLE:
        as_it_is = as_it_is or f"{model_type!r} is not among the model types that are converted by default"
    if as_it_is:
        return _in_torch(dtype, device, as_it_is)
    settled, why = _name(pick_dtype(dtype, device)), _about_dtype(dtype, device)
    if _has_openvino():
        return Choice("openvino", settled, f"OpenVINO is installed, {why}")
    if settled == "float32" and not missing(*EXPORTING):
        return Choice("onnxruntime", settled, f"onnxscript is installed, OpenVINO is not, {why}")
    return Choice("torch", settled, f"OpenVINO is not installed, {why}")


def _has_openvino() -> bool:
    """Whether OpenVINO is installed in a version that `auto` takes."""
    if missing(*OPENVINO):
        return False
    try:
        year, release, *_ = version("openvino").split(".")
    except PackageNotFoundError:  # built from source
        return False
    return (int(year), int(release)) >= OLDEST_OPENVINO


def _about_dtype(dtype: Dtype, device: torch.device) -> str:
    if dtype != "auto":
        return f"{dtype} was asked for"
    able = _name(pick_dtype("auto", device)) == "bfloat16"
    if device.type == "cuda" and not able:
        return "this GPU does not multiply in bfloat16; dtype='float16' may be faster"
    name = {"cpu": "CPU", "cuda": "GPU"}.get(device.type, device.type)
    return f"this {name} {'multiplies' if able else 'does not multiply'} in bfloat16"


def _name(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float16"]:
    return cast('Literal["float32", "bfloat16", "float16"]', str(dtype).removeprefix("torch."))


class EncoderBackend(TorchBackend):
    """A model that is, or may turn out to be, an encoder with one logit, which other engines than PyTorch run too."""

    int8: ClassVar[bool] = True

    engine: Engine = "auto"
    """What runs the network. `auto` is OpenVINO on a CPU, where it is installed and converts this type of model, and
    else the fastest of what there is."""

    calibration: tuple[tuple[str, str], ...] | Path | None = Field(default=None, repr=False)
    """For `dtype="int8"`: pairs of a query and a text, or a JSONL file with `query` and `text` on each line. 100 to
    300 pairs such as yours are enough; the log says how much they change."""

    padding_free: bool = False
    """Run pairs of different lengths without padding, in PyTorch. Unmeasured on CUDA so far."""

    without_effect: ClassVar[frozenset[str]] = TorchBackend.without_effect | {"padding_free"}

    _choice: Choice | None = PrivateAttr(default=None)
    _wants_type_ids: bool = PrivateAttr(default=False)
    _settled: dict[str, Any] | None = PrivateAttr(default=None)
    _pairs: Sequence[tuple[str, str]] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        check(self.engine, self.dtype, (self.device or "cpu").partition(":")[0])
        if self.padding_free and (self.engine not in ("auto", "torch") or self.dtype == "int8"):
            raise ConfigurationError(
                f"padding_free is for PyTorch, not for engine={self.engine!r} with dtype={self.dtype!r}; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if self.dtype == "int8" and not self.calibration:
            raise ConfigurationError(
                "dtype='int8' is calibrated on texts such as yours; give calibration=[(query, text), ...] or a JSONL "
                "file with query and text on each line"
            )
        if self.calibration is not None and self.dtype != "int8":
            raise ConfigurationError(f"calibration is for dtype='int8', not for dtype={self.dtype!r}; leave it out")
        return self

    def _pick_device(self) -> None:
        """Settle device, engine and dtype; for the beginning of `_load`."""
        import torch

        self._choice = self._choose_engine()
        self._device = self._wanted_device()
        # What another engine computes in is its own business: it converts the model in float32.
        self._dtype = getattr(torch, self._choice.dtype) if self._choice.engine == "torch" else torch.float32

    def _wanted_device(self) -> torch.device:
        on_cpu = self.engine in ("openvino", "onnxruntime") or self.dtype == "int8"
        return pick_device("cpu" if self.device is None and on_cpu else self.device)

    def _choose_engine(self) -> Choice:
        device = self._wanted_device()
        if device.type != "cpu" or self.engine == "torch":
            return choose(self.engine, self.dtype, device)
        config = self._described()
        architectures = config.get("architectures") or []
        if config and not any(name.endswith("ForSequenceClassification") for name in architectures):
            if self.engine != "auto" or self.dtype == "int8":
                raise ConfigurationError(
                    f"engine={self.engine!r} with dtype={self.dtype!r} is for encoders, and {self.model!r} is "
                    f"{', '.join(architectures) or 'of no named architecture'}; leave them out"
                )
            return choose("torch", self.dtype, device)
        return choose(
            self.engine, self.dtype, device, model_type=config.get("model_type", ""), as_it_is=self._as_it_is()
        )

    def _open_network(self, load: Callable[[], Any]) -> Network:
        """The network of the engine that was chosen.

        Args:
            load: Gives the model of transformers; not called where a conversion of it is on disk.
        """
        assert self._choice is not None  # noqa: S101 - `_pick_device` was called
        if self._choice.engine != "torch":
            try:
                return self._converted(self._choice, load)
            except RerankError:
                raise
            except Exception as error:  # noqa: BLE001 - engines raise what they like
                self._fall_back(error)
        self._model = load()
        kind = PackedNetwork if self.padding_free else TorchNetwork
        return kind(self._model, self._device, wants_type_ids=self._wants_type_ids)

    def _fall_back(self, error: Exception) -> None:
        """Take PyTorch, where the engine was not asked for by name."""
        assert self._choice is not None  # noqa: S101 - an engine was tried
        reason = " ".join(str(error).split())
        if self.engine != "auto" or self.dtype == "int8":
            raise ModelLoadError(
                f"{self.model!r} cannot be converted for {self._choice.engine} ({reason}); "
                "engine='torch' runs it as it is"
            ) from error
        logger.warning("%s cannot be converted for %s and runs in PyTorch: %s", self.model, self._choice.engine, reason)
        self._choice = replace(choose("torch", self.dtype, self._device), why="the conversion failed")
        self._dtype = pick_dtype(self.dtype, self._device)
        self._settled = None

    def _converted(self, choice: Choice, load: Callable[[], Any]) -> Network:
        import torch

        from langchain_rerank.backends import _engines_onnx as onnx
        from langchain_rerank.backends import _engines_openvino as openvino
        from langchain_rerank.backends._engines_convert import Convertible

        def convert(folder: Path) -> None:
            network = Convertible(load(), wants_type_ids=self._wants_type_ids)
            if choice.engine == "onnxruntime":
                onnx.export(network, folder)
            else:
                pairs = self._calibration_batches() if choice.dtype == "int8" else None
                openvino.convert(network, folder, calibration=pairs, half_range=adds_in_int16())

        def write(folder: Path) -> None:
            convert(folder)
            gc.collect()  # the layer that was cut refers to itself, and would keep its weights

        def read(folder: Path) -> Network:
            threads = min(torch.get_num_threads(), allowed_cpus())
            if choice.engine == "onnxruntime":
                return onnx.ONNXNetwork(folder, threads=threads)
            return openvino.OpenVINONetwork(folder, dtype=choice.dtype, threads=threads)

        return open_converted(self._conversion_key(choice), write, read)

    def _conversion_key(self, choice: Choice) -> dict[str, Any]:
        """All that a conversion depends on. Weights in float32 serve bfloat16 too."""
        libraries = ["torch", "transformers", *({"openvino": OPENVINO, "onnxruntime": EXPORTING}[choice.engine])]
        key: dict[str, Any] = {"engine": choice.engine, "weights": "float32"}
        if choice.dtype == "int8":
            libraries.append("nncf")
            key |= {"weights": "int8", "calibration": self._calibration_digest(), "max_length": self._limit}
            if adds_in_int16():
                key["half_range"] = True
        return {
            **key,
            "model": "" if Path(self.model).is_dir() else self.model,
            "files": self._files_digest(),
            "model_kwargs": repr(sorted(self.model_kwargs.items())),
            "trust_remote_code": self.trust_remote_code,
            "versions": {name: version(name) for name in libraries},
        }

    def _calibration_batches(self) -> list[Batch]:
        """Each calibration pair by itself: padding would change the scales, and with them what int8 computes."""
        return [self._collate(self._encode(clean(query), [clean(text)])) for query, text in self._calibration_pairs()]

    def _as_it_is(self) -> str:
        """Why `auto` leaves this model to PyTorch."""
        if self.padding_free:
            return "padding_free is for PyTorch"
        if self.model_kwargs:
            return "model_kwargs may ask for anything of PyTorch"
        return "the model brings code of its own" if self.trust_remote_code else ""

    def _described(self) -> Mapping[str, Any]:
        """The model's config.json, read as data; empty where there is none, which loading will say."""
        with self._loading():
            files = ModelFiles(self.model, self.revision or "main", self.local_files_only)
            return files.read_json("config.json") or {}

    def _resolved(self) -> dict[str, Any]:
        if self._settled is None:
            self._settled = self._settle()
        return self._settled

    def _settle(self) -> dict[str, Any]:
        choice = self._choice or self._choose_engine()
        settled = {"device": self._wanted_device().type, "engine": choice.engine, "dtype": choice.dtype}
        if choice.dtype != "int8":
            return settled
        from langchain_rerank.backends._engines_openvino import dtype_beside_int8

        return {**settled, "beside_int8": dtype_beside_int8(), "calibration": self._calibration_digest()}

    def _calibration_pairs(self) -> Sequence[tuple[str, str]]:
        if self._pairs is None:
            self._pairs = _read_pairs(self.calibration) if isinstance(self.calibration, Path) else self.calibration
        return self._pairs or ()

    def _calibration_digest(self) -> str:
        return hashlib.sha256(json.dumps(self._calibration_pairs()).encode()).hexdigest()


def _read_pairs(file: Path) -> list[tuple[str, str]]:
    """The calibration pairs of a JSONL file.

    Raises:
        ConfigurationError: It cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        pairs = [(str(pair["query"]), str(pair["text"])) for pair in map(json.loads, filter(str.strip, lines))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"calibration={str(file)!r} cannot be read ({type(error).__name__}: {error}); "
            'each line must be JSON such as {"query": "...", "text": "..."}'
        ) from error
    if not pairs:
        raise ConfigurationError(f"calibration={str(file)!r} holds no pairs; write one on each line")
    return pairs


def given_to(kind: type[TorchBackend], backend: EncoderBackend) -> dict[str, Any]:
    """The options that were set on a backend, for one of another kind that stands in for it.

    What only encoders have is left out where it asks for nothing.

    Raises:
        ConfigurationError: It asks for something.
    """
    given = {name: getattr(backend, name) for name in backend.model_fields_set}
    foreign = (EncoderBackend.model_fields.keys() - TorchBackend.model_fields.keys()) - kind.model_fields.keys()
    for name in sorted(foreign & given.keys()):
        if given.pop(name) not in (None, False, "auto", "torch"):
            raise ConfigurationError(
                f"{name}={getattr(backend, name)!r} is for encoders, and {backend.model!r} is none "
                f"({kind.__name__.removesuffix('Backend')}); leave it out"
            )
    return given
