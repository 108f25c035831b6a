"""What the trainer tells us while it trains: how long it takes, and that somebody wants it to stop."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)


class Bar(ProgressCallback):
    """The trainer's bar, with a name and the loss at its end; transformers' own prints that to standard output."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss."""
        del args, state, control
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds up to a checkpoint and on from it, in whatever run, and logs the time that is left."""

    def __init__(self) -> None:
        self.before = 0.0
        """Seconds of earlier runs."""

        self._start = time.perf_counter()
        self._first = 0

    @property
    def seconds(self) -> float:
        """All of them till now."""
        return self.before + time.perf_counter() - self._start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to count."""
        del args, control
        self._start, self._first = time.perf_counter(), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Say how far it is, and how far to go."""
        del args, control
        done = state.global_step - self._first
        if "loss" in (logs or {}) and done:
            left = (time.perf_counter() - self._start) / done * (state.max_steps - state.global_step)
            text = "Step %s of %s: loss %.3f, about %s left"
            logger.info(text, state.global_step, state.max_steps, float(logs["loss"]), timedelta(seconds=round(left)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"before": self.seconds}}


class Interruption(TrainerCallback):
    """Lets a Ctrl-C take effect after a whole step, with a checkpoint of it; a second one takes effect at once."""

    def __init__(self) -> None:
        self.asked = False
        """Whether there was one."""

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, Ctrl-C comes here; unless somebody else waits for it already, or this is no main thread."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop, if that was asked for."""
        del args, state
        if self.asked:
            control.should_save = control.should_training_stop = True
