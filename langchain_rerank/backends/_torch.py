"""What the backends that run on torch share: where a model comes from, its device and its dtype."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PrivateAttr, field_validator, model_validator
from typing_extensions import Self

from langchain_rerank.backends._files import ModelFiles
from langchain_rerank.backends.local import LocalBackend
from langchain_rerank.errors import ConfigurationError, ModelLoadError

if TYPE_CHECKING:
    import torch

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8"]
"""A dtype by name; `auto` is bfloat16 where the hardware multiplies in it, else float32; `int8` is for encoders."""


UNSET = 1_000_000
"""From here on a limit on tokens is none."""


class TorchBackend(LocalBackend):
    """A model that torch runs, from the Hugging Face hub or a folder."""

    device: str | None = None
    """A torch device such as `"cuda:1"`. `None` takes the best one there is."""

    dtype: Dtype = "auto"
    """`auto` is bfloat16 where the hardware multiplies matrices in it, else float32."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    local_files_only: bool = False
    """Never ask the hub: take what is in its cache on this machine."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Asks for a `revision`, so that it stays the code that you read."""

    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    """Further arguments of the model's `from_pretrained`."""

    without_effect: ClassVar[frozenset[str]] = LocalBackend.without_effect | {"local_files_only", "revision"}

    int8: ClassVar[bool] = False
    """Whether `dtype="int8"` is for models of this kind."""

    _digest: str | None = PrivateAttr(default=None)
    _device: Any = PrivateAttr(default=None)
    _dtype: Any = PrivateAttr(default=None)
    _model: Any = PrivateAttr(default=None)
    _tokenizer: Any = PrivateAttr(default=None)

    @field_validator("device", mode="before")
    @classmethod
    def _name_of_device(cls, device: Any) -> Any:
        return None if device is None or device == "auto" else str(device)

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not self.model:
            raise ConfigurationError("model is empty; give a name on the Hugging Face hub or a folder")
        if self.trust_remote_code and self.revision is None and not Path(self.model).is_dir():
            raise ConfigurationError("trust_remote_code runs the model's own code: pin it with revision='<commit>'")
        if self.dtype == "int8" and not self.int8:
            raise ConfigurationError(
                f"dtype='int8' is for encoders, and {self.model!r} is none; use 'auto', 'bfloat16' or 'float32'"
            )
        return self

    def _pick_device(self) -> None:
        """Settle device and dtype; for the beginning of `_load`."""
        self._device = pick_device(self.device)
        self._dtype = pick_dtype(self.dtype, self._device)

    def _source(self) -> dict[str, Any]:
        """The arguments that every `from_pretrained` takes."""
        return {
            "revision": self.revision or "main",
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def _weights_options(self) -> dict[str, Any]:
        """The arguments that a model's `from_pretrained` takes beside `_source`; no `.bin` file may run code."""
        return {"dtype": self._dtype, **self.model_kwargs, "weights_only": True}

    def _pretrained(self, kind: Any, config: Any) -> Any:
        """The whole model of an `AutoModelFor...` class, none of it made up; to be called in `_loading`."""
        model, report = kind.from_pretrained(
            self.model, config=config, **self._source(), **self._weights_options(), output_loading_info=True
        )
        self._refuse_random(report["missing_keys"] if isinstance(report, dict) else report.missing_keys)
        return model

    def _refuse_random(self, missing: Iterable[str]) -> None:
        """Refuse a checkpoint that lacks weights, which then are as they were drawn: at random."""
        if missing := sorted(missing):
            raise ModelLoadError(
                f"{self.model!r} lacks trained weights ({', '.join(missing[:3])}): its scores would be random. "
                "Use a whole checkpoint that was trained as a reranker"
            )

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Turn what transformers raises for a model that it cannot load into our error, without its progress bars."""
        if _is_path(self.model) and not Path(self.model).is_dir():
            raise ModelLoadError(f"{self.model!r} is no folder here; give one, or a name on the Hugging Face hub")
        try:
            with no_bars():
                yield
        except ModelLoadError:
            raise
        except UnpicklingError as error:
            raise ModelLoadError(
                f"{self.model!r} has a pytorch_model.bin with more than tensors in it; reading that may run code, and "
                "was refused. Use a checkpoint in safetensors"
            ) from error
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelLoadError(f"{self.model!r} cannot be loaded: {reason}") from error

    def fingerprint(self) -> dict[str, Any]:
        """As every backend's, with the kind of device, the dtype and the model's files as they turn out here."""
        return {**super().fingerprint(), **self._resolved(), "files": self._files_digest()}

    def _resolved(self) -> dict[str, Any]:
        """What the options that leave a choice turn out to be here."""
        device = pick_device(self.device)
        return {"device": device.type, "dtype": str(pick_dtype(self.dtype, device))}

    def _files_digest(self) -> str:
        """The commit of a model of the hub; of a folder the digest of its files, read once."""
        if self._digest is None:
            with self._loading():
                self._digest = ModelFiles(self.model, self.revision or "main", self.local_files_only).version()
        return self._digest

    def _overlaps(self) -> bool:
        """Whether the model computes elsewhere than the tokenizer."""
        return self._device is not None and self._device.type != "cpu"

    def _default_batch_tokens(self) -> int:
        return 1024 if self._device is None or self._device.type == "cpu" else 32768

    def _out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or is_out_of_memory(error)

    def _free_memory(self) -> None:
        free_memory(self._device)

    def _on_nan(self) -> str:
        return "; dtype='float32' has the range that the model may need" if self.dtype != "float32" else ""


def pick_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA, MPS or the CPU, whichever comes first.

    Raises:
        ConfigurationError: There is no such device here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for, else bfloat16 where the device multiplies matrices in it, else float32.

    Raises:
        ConfigurationError: float16 on a CPU: it is slow there, and overflows.
    """
    import torch

    if dtype == "float16" and device.type == "cpu":
        raise ConfigurationError("dtype 'float16' is not for a CPU; use 'auto', 'bfloat16' or 'float32'")
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)  # noqa: S101 - for the type checker
        return chosen
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _is_path(model: str) -> bool:
    """Whether it can be no name on the hub, which has one slash at most."""
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1


@contextmanager
def no_bars(*, downloads: bool = True) -> Iterator[None]:
    """No "Loading weights" bar on standard error meanwhile.

    Args:
        downloads: Leave the hub's own bars as they are; transformers turns both off together.
    """
    import huggingface_hub
    import transformers

    hub: Any = huggingface_hub.utils
    logging: Any = transformers.utils.logging
    shown, of_the_hub = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if of_the_hub and downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if of_the_hub else hub.disable_progress_bars)()


def longest(config: Any, *limits: int | None) -> int | None:
    """How many tokens an encoder reads, specials included: the least of its positions and of other limits.

    Args:
        config: Of transformers.
        limits: Such as the tokenizer's; one that knows no limit says 10**30.

    Returns:
        `None` where nothing says so.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions and ("roberta" in config.model_type or config.model_type == "camembert"):
        # RoBERTa and its kin count positions from the padding id on: 514 of them hold 512 tokens.
        positions -= (config.pad_token_id or 0) + 1
    known = [int(limit) for limit in (positions, *limits) if limit and limit < UNSET]
    return min(known, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or ONNX Runtime failed for want of memory, on a GPU or on the host."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "Failed to allocate memory" in text:  # ONNX Runtime's own classes
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free_memory(device: torch.device) -> None:
    """Give cached GPU memory back, so that a smaller batch finds it in one piece."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # The capabilities' public form is young; before it there are only private functions.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def adds_in_int16() -> bool:
    """Whether this CPU sums products of int8 up in int16, where they can overflow: x86 before VNNI.

    Source: https://github.com/openvinotoolkit/nncf, `OverflowFix`
    """
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    probes = ("_is_vnni_supported", "_is_amx_tile_supported")
    return not any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
