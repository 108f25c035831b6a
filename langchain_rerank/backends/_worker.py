"""Callers of one model share its batches: a fair queue, and the threads that work it off."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice
from typing import Any, Generic, TypeAlias, TypeVar

P = TypeVar("P")
"""A tokenised pair."""

R = TypeVar("R")
"""What the model says of one pair."""

IDLE = 1.0
"""Seconds without a call after which a thread ends; starting another takes a fraction of a millisecond."""

PATIENCE = 10.0
"""Most seconds that the interpreter's exit waits for a batch that is running."""

SIMILAR = 0.75
"""Other callers' pairs join a batch if they are at least this long, the longest being 1: padding costs as tokens do."""


class Call:
    """What several jobs have in common: they wait, and are due, as one job of all their pairs would.

    Args:
        tokens: How many tokens they have together, about.
        small: Whether they wait among small ones.
    """

    def __init__(self, tokens: int, *, small: bool = False) -> None:
        self.tokens, self.small = tokens, small
        self.due: int | None = None
        """`None` until the first of them is in the queue."""


class Job(Generic[P, R]):
    """One caller's pairs, longest first.

    Args:
        pairs: n tokenised pairs.
        lengths: How many tokens each has.
        forward: The model: some pairs in, as many rows out.
        fits: How many pairs of a length fit into one batch, at least 1.
        answer: Gets n rows, or the error; cancelled, it takes the pairs out of the queue.
        call: What it is a part of, if one call makes several jobs.
    """

    def __init__(
        self,
        pairs: Sequence[P],
        lengths: Sequence[int],
        forward: Callable[[list[P]], Sequence[R]],
        fits: Callable[[int], int],
        *,
        answer: Future[list[R]] | None = None,
        call: Call | None = None,
    ) -> None:
        self.pairs, self.forward, self.fits = pairs, forward, fits
        self.answer: Future[list[R]] = Future() if answer is None else answer
        self.call = call or Call(sum(lengths))
        self.context = contextvars.copy_context()
        self.alone = False
        self.due = 0
        self._length = lengths.__getitem__
        self._waiting = sorted(range(len(pairs)), key=self._length)
        self._rows: dict[int, R] = {}

    def length(self, taken: Iterable[int]) -> int:
        """How many tokens some pairs have together."""
        return sum(map(self._length, taken))

    @property
    def open(self) -> int:
        """How many pairs have no row yet."""
        return len(self.pairs) - len(self._rows)

    def longest(self) -> int:
        """The length of the longest pair that waits."""
        return self._length(self._waiting[-1])

    def take(self, room: int, width: int, least: float) -> list[int]:
        """At most `room` of the longest pairs that have `least` to `width` tokens."""
        end = bisect_right(self._waiting, width, key=self._length)
        start = max(end - room, bisect_left(self._waiting, least, hi=end, key=self._length))
        taken = self._waiting[start:end]
        del self._waiting[start:end]
        return taken

    def recover(self) -> None:
        """Between batches: let pairs wait again whose batch failed; answer if an interruption came before that."""
        if len(self._waiting) != self.open:
            self._waiting = sorted(set(range(len(self.pairs))) - self._rows.keys(), key=self._length)
        if not self.open:
            self.deliver([], [])

    def deliver(self, taken: Sequence[int], rows: Sequence[R]) -> None:
        """Keep what the model said of some pairs; with the last of them, answer."""
        self._rows.update(zip(taken, rows, strict=True))
        if not self.open:
            with suppress(InvalidStateError):  # cancelled meanwhile
                self.answer.set_result([self._rows[index] for index in range(len(self.pairs))])

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        _fail(self.answer, error)


Make: TypeAlias = Callable[[Future[list[R]]], Job[P, R]]
"""Gives a job with an answer. Of its two parameters the row comes first, then the pair."""


def _fail(answer: Future[Any], error: BaseException) -> None:
    if isinstance(error, StopIteration):  # which asyncio refuses to pass on: who awaits would wait for ever
        error, stop = RuntimeError(repr(error)), error
        error.__cause__ = stop
    with suppress(InvalidStateError):  # cancelled meanwhile
        answer.set_exception(error)


class Scheduler(Generic[P, R]):
    """The queue of one model, and who works it off.

    One thread at a time drives the model. A caller who can block and finds nobody driving drives its own batches, in
    its own thread; everything else is driven by a thread that ends when it has been idle.

    A batch is led by the caller who is due first, which is when as many tokens have been read since it came as it has
    itself. So calls of one size are answered in the order in which they came, a small one goes before what is left of
    a large one, and that is not put off for ever: who comes when it is due goes behind it. The leader's longest pair
    sets the batch's width; the room goes first to its pairs of about that length, then to the others', then to its
    shorter ones. A caller who is alone thus gets its pairs in one sorted run.
    """

    def __init__(self) -> None:
        self.door = threading.Lock()
        """For loading and tokenising: one caller at a time, while the model may be running another's batch."""
        self._lines = {True: threading.Lock(), False: threading.Lock()}
        """Where small callers stand, and large ones, so that none of the small waits for room behind a large one."""
        # Entered itself, not through the condition, in whose methods an interruption would leave it held.
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)
        self._jobs: list[Job[P, R]] = []
        self._read = 0
        self._driver: Future[list[R]] | None = None
        """Whose it is to drive. Done, it has left, or was interrupted before it could: the next caller takes over."""
        # At the exit the later one ends first: nothing may be queued up for a driver that has ended.
        self._driving = IdleThread("rerank", self._changed)
        self._tokenizing = {
            True: IdleThread("rerank-tokenize", self._changed),
            False: IdleThread("rerank-tokenize-large", self._changed),
        }

    @contextmanager
    def entered(self, most: int, answer: Future[list[R]] | None = None, *, small: bool = False) -> Iterator[None]:
        """The door, when there is room among the small or the large ones.

        Raises:
            CancelledError: The answer that it is for is not wanted any more.
        """
        with self._lines[small]:
            self.wait_for_room(most, answer, small=small)
            with self.door:
                yield

    def wait_for_room(self, most: int, answer: Future[list[R]] | None = None, *, small: bool = False) -> None:
        """Wait until fewer than `most` pairs of small or of large calls are in the queue, beside the largest of these.

        Raises:
            CancelledError: The answer that it is for is not wanted any more.
        """
        thread = self._tokenizing[small]
        with self._guard:
            self._changed.wait_for(
                lambda: (answer and answer.cancelled()) or self._beside_largest(small=small) < most or thread.ending
            )
        if answer and answer.cancelled():
            raise CancelledError

    def _beside_largest(self, *, small: bool) -> int:
        still_open: Counter[Call] = Counter()
        for job in self._jobs:
            if job.call.small == small:
                still_open[job.call] += job.open
        return still_open.total() - max(still_open.values(), default=0)

    def run(self, job: Job[P, R]) -> list[R]:
        """Every pair's row, in order; runs batches in this thread where nobody else does.

        Raises:
            Exception: What the model raised for these pairs.
        """
        try:
            job.answer.add_done_callback(self._drop)
            if self._enqueue(job):
                while not job.answer.done():
                    self._step(interruptible=True)
            return job.answer.result()
        finally:
            try:
                job.answer.cancel()  # of no effect if there is an answer
                self._leave(job.answer)
            except BaseException:  # interrupted: the others still need somebody who drives
                self._leave(job.answer)
                raise
            finally:
                del job  # an error's traceback holds this frame, and the job holds the error

    def run_all(self, makes: Sequence[Make[R, P]]) -> list[R]:
        """The rows of several jobs of one call, in order: while one is made, those before it run in the thread.

        Args:
            makes: Each tokenises a part of the call, and returns a job with the answer that it is given.

        Raises:
            Exception: What the model raised for these pairs, or the tokenizer.
        """
        if self._driving.ending:  # at the interpreter's exit no thread would drive the early ones
            return list(chain.from_iterable(self.run(make(Future())) for make in makes))
        *early, last = makes
        answers: list[Future[list[R]]] = []
        read = 0
        try:
            for make in early:
                answers.append(Future())  # before the job is in the queue: an interruption takes it out again
                self._start(make, answers[-1])
                while read < len(answers) and answers[read].done():
                    answers[read].result()  # an error ends it here
                    read += 1
            rows = self.run(last(Future()))
            return [*chain.from_iterable(map(Future.result, answers)), *rows]
        finally:
            while answers:
                self._give_up(answers.pop())  # no name for it here, as in `run`

    def _start(self, make: Make[R, P], answer: Future[list[R]]) -> None:
        """Make a job, and let the thread drive where nobody does."""
        answer.add_done_callback(self._drop)
        if self._enqueue(make(answer)):
            self._leave(answer)

    def _give_up(self, answer: Future[list[R]]) -> None:
        """Take a job out, if it has no answer yet."""
        try:
            answer.cancel()
            self._leave(answer)
        except BaseException:  # interrupted, as in `run`
            self._leave(answer)
            raise

    async def arun(self, *makes: Make[R, P], small: bool = False) -> list[R]:
        """As `run` and `run_all`, without blocking the event loop.

        Args:
            makes: Called in a thread, in this context: each tokenises, and returns a job with the answer that it is
                given.
            small: Whether the thread is that of small calls, none of which waits behind a large one.
        """
        answers: list[Future[list[R]]] = [Future() for _ in makes]
        try:
            for make, answer in zip(makes, answers, strict=True):
                self._tokenizing[small].call(partial(contextvars.copy_context().run, self._make, make, answer))
            del answer  # as in `run`
            return list(chain.from_iterable(await asyncio.gather(*map(asyncio.wrap_future, answers))))
        finally:
            while answers:
                answers.pop().cancel()

    def _make(self, make: Make[R, P], answer: Future[list[R]]) -> None:
        if answer.cancelled():
            return
        try:
            self._start(make, answer)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            _fail(answer, error)
        finally:
            del answer  # as in `run`

    def _enqueue(self, job: Job[P, R]) -> bool:
        """Queue a job up; whether it is now its caller's to drive, or to leave that to the thread."""
        if not job.open:
            job.deliver([], [])
        with self._guard:
            if job.answer.done():
                return False
            if job.call.due is None:
                job.call.due = self._read + job.call.tokens
            job.due = job.call.due
            self._jobs = sorted([*self._jobs, job], key=lambda job: job.due)
            if self._driver and not self._driver.done():
                return False
            self._driver = job.answer
            return True

    def _drop(self, _: object = None) -> None:
        """Take the jobs out that have an answer, and say that there may be room."""
        with self._guard:
            self._jobs = [job for job in self._jobs if not job.answer.done()]
            self._changed.notify_all()

    def _leave(self, driver: Future[list[R]]) -> None:
        """If this one drives, let the thread go on with what there is."""
        with self._guard:
            if self._driver is not driver:
                return
            if not self._jobs or self._driving.ending:
                self._driver = None
                return
            thread: Future[list[R]] = Future()
            drive = partial(self._drive, thread)
            started = True
            try:
                self._driving.call(drive)
            except RuntimeError:  # no thread can be started, for one when the interpreter is about to exit
                started = False
            self._driver = thread  # not before: an interrupted call would leave a driver who never comes
        if not started:
            drive()

    def _drive(self, driver: Future[list[R]]) -> None:
        """Run batches until there is no job."""
        try:
            while self._driver is driver and self._jobs and not self._driving.ending:
                self._step(interruptible=False)
        finally:
            self._leave(driver)

    def _step(self, *, interruptible: bool) -> None:
        """Run one batch. If it fails, only the caller concerned does; an interruption is for the caller who drives."""
        shares: list[tuple[Job[P, R], list[int]]] = []
        try:
            with self._guard:
                self._fill(shares)
            self._run(shares)
        except BaseException as error:
            interrupted = interruptible and not isinstance(error, Exception)
            self._failed(shares, error, interrupted=interrupted)
            if interrupted:
                raise
        finally:
            shares.clear()  # the error's traceback holds this frame

    def _run(self, shares: Sequence[tuple[Job[P, R], list[int]]]) -> None:
        """Run the model in its leader's context, as if that had called it."""
        pairs = [job.pairs[index] for job, taken in shares for index in taken]
        if pairs:
            rows = shares[0][0].context.run(shares[0][0].forward, pairs)
            checked = iter([row for _, row in zip(pairs, rows, strict=True)])
            found = [(job, taken, list(islice(checked, len(taken)))) for job, taken in shares]
            # The driver's own last: with its answer another may take over.
            for job, taken, own in sorted(found, key=lambda share: share[0].answer is self._driver):
                job.deliver(taken, own)

    def _fill(self, shares: list[tuple[Job[P, R], list[int]]]) -> None:
        """Choose the pairs of one batch; the first share is the leader's."""
        for job in self._jobs:
            job.recover()
        self._drop()
        if not self._jobs:
            return
        leader, *others = self._jobs
        shares.append((leader, []))
        others = [job for job in others if not (job.alone or leader.alone)]
        width = leader.longest()
        room, near = leader.fits(width), SIMILAR * width
        for job, least in [(leader, near), *((job, near) for job in others), (leader, 0.0)]:
            taken = job.take(room, width, least)
            room -= len(taken)
            self._read += job.length(taken)
            if taken:
                shares.append((job, taken))

    def _failed(
        self, shares: Sequence[tuple[Job[P, R], list[int]]], error: BaseException, *, interrupted: bool
    ) -> None:
        """A failure in a batch of one caller is its own; in a mixed one it may be anyone's: each tries again alone."""
        jobs = {job for job, _ in shares}
        if len(jobs) == 1 and not interrupted:
            jobs.pop().fail(error)
            return
        for job in jobs:
            job.alone = True


class IdleThread:
    """Makes calls one after another, in a thread that is there only while there are some.

    It ends after `IDLE` seconds without a call, when this object goes, and at the interpreter's exit after the call
    that is running. Calls must not raise.

    Args:
        name: The thread's name.
        changed: Guards the calls, and is notified when there are any.
    """

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self._calls = _Calls(name, changed)
        weakref.finalize(self, self._calls.end)

    @property
    def ending(self) -> bool:
        """Whether the thread has been told to end."""
        return self._calls.ending

    def call(self, function: Callable[[], object]) -> None:
        """Have a function called.

        Raises:
            RuntimeError: No thread can be started.
        """
        self._calls.add(function)


class _Calls:
    """What an `IdleThread` and its thread share, so that the thread does not keep the object alive."""

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self.ending = False
        self._name, self._changed, self._process = name, changed, os.getpid()
        self._waiting: deque[Callable[[], object]] = deque()
        self._thread: threading.Thread | None = None

    def add(self, function: Callable[[], object]) -> None:
        with self._changed:
            self.ending = False
            if self._thread is None:
                # A daemon, since the interpreter's exit would wait for any other until it has idled enough.
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._waiting.append(function)
            self._changed.notify_all()

    def end(self) -> None:
        """Tell the thread to end, and at the interpreter's exit wait for it.

        The garbage collector calls this in any thread, even a sibling's, which holds the lock: it must not wait.
        """
        if self._process != os.getpid():
            return  # a forked child: the thread is the parent's, and the lock may be held for ever
        with self._changed:  # re-entrant: this thread may hold it already
            self.ending = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and not threading.main_thread().is_alive():  # which is so when exit functions are called
            thread.join(PATIENCE)

    def _work(self) -> None:
        while (function := self._next()) is not None:
            function()
            del function  # while idle it would keep the model alive

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.ending, IDLE)
            if self._waiting and not self.ending:
                return self._waiting.popleft()
            self._thread = None
            return None
