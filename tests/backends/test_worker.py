"""Callers of one model share its batches: sharing, turns, cancelling, errors, and threads that end."""

import asyncio
import contextvars
import gc
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from pydantic import PrivateAttr

from langchain_rerank.backends import _worker
from langchain_rerank.backends._worker import IDLE, Call, IdleThread, Job, Scheduler
from langchain_rerank.backends.base import collect_usage, report_usage
from langchain_rerank.backends.local import Encoding, LocalBackend, sigmoid

WAIT = 20
"""Seconds after which something that should have happened has not."""


class Model:
    """Answers each pair, which is a caller's name and a length, with itself; a batch has at most `tokens`."""

    def __init__(self, tokens=100):
        self.tokens, self.batches, self.threads = tokens, [], []
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()

    def forward(self, pairs):
        self.began.set()
        assert self.go.wait(WAIT)
        self.threads.append(threading.current_thread())
        self.batches.append(list(pairs))
        if any(length == 13 for _, length in pairs):
            raise ValueError("13")
        return pairs

    def job(self, name, *lengths, answer=None, call=None):
        pairs = [(name, length) for length in lengths]
        return Job(pairs, lengths, self.forward, lambda length: max(1, self.tokens // length), answer=answer, call=call)

    def held(self):
        """The next batch waits until `go` is set."""
        self.began.clear()
        self.go.clear()


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def waiting(scheduler, count):
    """Wait until so many jobs stand in the queue."""
    end = time.monotonic() + WAIT
    while len(scheduler._jobs) < count:
        assert time.monotonic() < end, f"{len(scheduler._jobs)} jobs wait, not {count}"
        time.sleep(0.001)


def behind(scheduler, model, pool, *jobs):
    """The answers of jobs that queue up, in their order, while a first caller's batch is running."""
    model.held()
    first = pool.submit(scheduler.run, model.job("first", 100))
    assert model.began.wait(WAIT)
    found = []
    for place, job in enumerate(jobs, 2):
        found.append(pool.submit(scheduler.run, job))
        waiting(scheduler, place)
    model.go.set()
    assert first.result(WAIT) == [("first", 100)]
    return found


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rerank")]


def gone(names):
    end = time.monotonic() + WAIT
    while any(thread in names for thread in threads()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class TestParts:
    """A call in several jobs."""

    @staticmethod
    def makes(model, *parts):
        """What makes a job for each part."""
        call = Call(sum(map(sum, parts)))
        return [partial(lambda part, answer: model.job("a", *part, answer=answer, call=call), part) for part in parts]

    def test_rows_come_in_the_order_of_the_parts(self, scheduler, model):
        rows = scheduler.run_all(self.makes(model, [5, 50], [20], [90, 1]))

        assert [length for _, length in rows] == [5, 50, 20, 90, 1]

    async def test_awaited_rows_come_in_the_order_of_the_parts(self, scheduler, model):
        rows = await scheduler.arun(*self.makes(model, [5, 50], [20], [90, 1]))

        assert [length for _, length in rows] == [5, 50, 20, 90, 1]

    def test_one_part_starts_no_thread(self, scheduler, model):
        before = threads()
        scheduler.run_all(self.makes(model, [5, 50]))

        assert threads() == before

    def test_the_model_reads_a_part_while_the_next_is_made(self, scheduler, model):
        def second(answer):
            assert model.began.wait(WAIT), "nobody reads the first part"
            return model.job("a", 7, answer=answer)

        assert scheduler.run_all([*self.makes(model, [5]), second]) == [("a", 5), ("a", 7)]

    async def test_awaited_the_model_reads_a_part_while_the_next_is_made(self, scheduler, model):
        def second(answer):
            assert model.began.wait(WAIT), "nobody reads the first part"
            return model.job("a", 7, answer=answer)

        assert await scheduler.arun(*self.makes(model, [5]), second) == [("a", 5), ("a", 7)]

    @pytest.mark.parametrize(
        ("other", "order"),
        [(2, ["a"] + ["other"] * 2 + ["a"] * 5), (6, ["a"] * 6 + ["other"] * 6)],
        ids=["small", "as large"],
    )
    def test_parts_take_their_turn_as_one_job_would(self, scheduler, model, pool, other, order):
        model.held()
        large = pool.submit(scheduler.run_all, self.makes(model, [100] * 2, [100] * 2, [100] * 2))
        waiting(scheduler, 3)
        second = pool.submit(scheduler.run, model.job("other", *[100] * other))
        waiting(scheduler, 4)
        model.go.set()
        second.result(WAIT)
        large.result(WAIT)

        assert [batch[0][0] for batch in model.batches] == order

    def test_where_no_thread_would_drive_the_caller_drives_all_parts(self, scheduler, model):
        scheduler._driving._calls.end()
        found, makes = [], self.makes(model, [50, 10], [50])
        caller = threading.Thread(target=lambda: found.extend(scheduler.run_all(makes)), daemon=True)
        caller.start()
        caller.join(WAIT)

        assert found == [("a", 50), ("a", 10), ("a", 50)]

    def test_parts_wait_as_one_call(self, scheduler, model, pool):
        model.held()
        large = pool.submit(scheduler.run_all, self.makes(model, [50] * 40, [50] * 40))
        waiting(scheduler, 2)

        pool.submit(scheduler.wait_for_room, 10).result(WAIT)
        model.go.set()
        large.result(WAIT)

    @pytest.mark.parametrize("parts", [([13], [5], [5]), ([5], [5], [13]), ([5], [13], [5])])
    def test_an_error_in_a_part_ends_the_call(self, scheduler, model, parts):
        with pytest.raises(ValueError, match="13"):
            scheduler.run_all(self.makes(model, *parts))

        assert scheduler.run(model.job("b", 5)) == [("b", 5)]

    async def test_an_error_in_a_part_ends_an_awaited_call(self, scheduler, model):
        with pytest.raises(ValueError, match="13"):
            await scheduler.arun(*self.makes(model, [13], [5]))

        assert await scheduler.arun(lambda answer: model.job("b", 5, answer=answer)) == [("b", 5)]

    def test_when_a_part_cannot_be_made_those_before_it_leave_the_queue(self, scheduler, model):
        def broken(answer):
            raise RuntimeError("no such token")

        model.held()
        with pytest.raises(RuntimeError, match="no such token"):
            scheduler.run_all([*self.makes(model, [100] * 5), broken])
        assert scheduler._jobs == []
        model.go.set()

        assert scheduler.run(model.job("b", 5)) == [("b", 5)]
        assert len(model.batches) <= 2

    async def test_a_cancelled_call_takes_all_its_parts_along(self, scheduler, model):
        model.held()
        task = asyncio.create_task(scheduler.arun(*self.makes(model, [100] * 3, [100] * 3)))
        await asyncio.to_thread(waiting, scheduler, 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.go.set()

        assert scheduler._jobs == []
        assert await scheduler.arun(lambda answer: model.job("b", 5, answer=answer)) == [("b", 5)]


class TestAlone:
    def test_a_caller_who_is_alone_runs_in_its_own_thread_and_starts_none(self, scheduler, model):
        before = threads()
        rows = scheduler.run(model.job("a", 5, 50, 20))

        assert rows == [("a", 5), ("a", 50), ("a", 20)]
        assert set(model.threads) == {threading.current_thread()}
        assert threads() == before

    def test_its_batches_are_longest_first_whatever_their_lengths(self, scheduler, model):
        scheduler.run(model.job("a", 1, 50, 2, 33, 3))

        assert [sorted(length for _, length in batch) for batch in model.batches] == [[33, 50], [1, 2, 3]]

    def test_no_pairs_get_no_rows(self, scheduler, model):
        assert scheduler.run(model.job("a")) == []
        assert model.batches == []

    def test_an_error_is_raised_and_the_next_call_runs(self, scheduler, model):
        with pytest.raises(ValueError, match="13"):
            scheduler.run(model.job("a", 13))

        assert scheduler.run(model.job("a", 12)) == [("a", 12)]


class TestSharing:
    def test_callers_who_wait_share_a_batch(self, scheduler, model, pool):
        found = behind(scheduler, model, pool, *(model.job(name, 20, 20) for name in "ab"))

        assert [future.result(WAIT) for future in found] == [[("a", 20)] * 2, [("b", 20)] * 2]
        assert [len(batch) for batch in model.batches] == [1, 4]

    def test_pairs_of_another_length_do_not_join_another_callers_batch(self, scheduler, model, pool):
        found = behind(scheduler, model, pool, model.job("a", 20), model.job("b", 14, 40), model.job("c", 16, 16))

        assert [future.result(WAIT) for future in found] == [[("a", 20)], [("b", 14), ("b", 40)], [("c", 16)] * 2]
        assert [sorted(batch) for batch in model.batches[1:]] == [
            [("a", 20), ("c", 16), ("c", 16)],
            [("b", 14), ("b", 40)],
        ]

    def test_a_caller_with_many_pairs_does_not_hold_up_one_with_few(self, scheduler, model, pool):
        big, small = behind(scheduler, model, pool, model.job("big", *[20] * 1000), model.job("small", *[10] * 5))

        assert small.result(WAIT) == [("small", 10)] * 5
        assert big.result(WAIT) == [("big", 20)] * 1000
        last = max(place for place, batch in enumerate(model.batches) if ("small", 10) in batch)
        assert last <= 2, "one batch of the other's, then its own"

    def test_calls_of_one_size_are_answered_in_the_order_in_which_they_came(self, scheduler, model, pool):
        found = behind(scheduler, model, pool, *(model.job(name, *[100] * 3) for name in "abcd"))
        for future in found:
            future.result(WAIT)

        assert [batch[0][0] for batch in model.batches[1:]] == list("aaabbbcccddd")

    def test_a_large_call_is_not_put_off_by_small_ones_that_keep_coming(self, scheduler, model):
        class Busy(Model):
            """Whose every batch brings another small call."""

            def forward(self, pairs):
                if len(self.batches) < 200:
                    scheduler._enqueue(self.job("small", 100))
                return super().forward(pairs)

        busy = Busy()
        assert scheduler.run(busy.job("large", *[100] * 20)) == [("large", 100)] * 20
        last = max(place for place, batch in enumerate(busy.batches) if batch[0][0] == "large")

        assert 20 <= last <= 41, "as many tokens of the others' as of its own come before it, and no more"

    def test_the_one_who_drives_leaves_when_its_own_is_done(self, scheduler, model, pool):
        [big] = behind(scheduler, model, pool, model.job("big", *[100] * 50))
        big.result(WAIT)

        assert model.threads[0].name != "rerank"
        assert {thread.name for thread in model.threads[1:]} <= {"rerank", model.threads[0].name}
        assert model.threads[-1].name == "rerank"

    def test_random_callers_all_get_their_own(self, scheduler, model, pool):
        chance = random.Random(0)
        lengths = [[chance.choice([5, 9, 20, 60, 100, 200]) for _ in range(chance.randint(0, 30))] for _ in range(200)]
        found = pool.map(lambda name: scheduler.run(model.job(name, *lengths[name])), range(200))

        assert list(found) == [[(name, length) for length in lengths[name]] for name in range(200)]
        assert all(len(batch) * max(length for _, length in batch) <= max(100, batch[0][1]) for batch in model.batches)
        assert not scheduler._jobs
        assert scheduler._driver is None

    def test_no_thread_can_be_started_and_the_one_who_drives_goes_on(self, scheduler, model, pool):
        class Refusing(IdleThread):
            def call(self, function):
                raise RuntimeError("can't create new thread at interpreter shutdown")

        scheduler._driving = Refusing("rerank", scheduler._changed)
        found = behind(scheduler, model, pool, *(model.job(name, 100, 100) for name in "abc"))

        assert [future.result(WAIT) for future in found] == [[(name, 100)] * 2 for name in "abc"]


class TestErrors:
    def test_one_callers_error_is_not_the_others(self, scheduler, model, pool):
        bad, good = behind(scheduler, model, pool, model.job("bad", 12, 13, 12), model.job("good", 14, 11))

        assert good.result(WAIT) == [("good", 14), ("good", 11)]
        with pytest.raises(ValueError, match="13"):
            bad.result(WAIT)
        assert any({("good", 14), ("bad", 13)} <= set(batch) for batch in model.batches), "no batch was mixed"

    def test_a_caller_who_failed_costs_no_more(self, scheduler, model):
        with pytest.raises(ValueError, match="13"):
            scheduler.run(model.job("a", *[13] * 100))

        assert len(model.batches) == 1

    def test_a_wrong_number_of_rows_is_an_error(self, scheduler):
        job = Job(["one", "two"], [1, 1], lambda pairs: pairs[1:], lambda length: 9)

        with pytest.raises(ValueError, match="shorter"):
            scheduler.run(job)

    def test_an_error_before_the_model_runs_is_the_callers(self, scheduler, model):
        def broken(length):
            raise LookupError("no budget")

        with pytest.raises(LookupError, match="no budget"):
            scheduler.run(Job([1], [1], model.forward, broken))
        assert scheduler.run(model.job("a", 1)) == [("a", 1)]

    def test_an_interrupted_caller_loses_only_its_own(self, scheduler, model, pool):
        calls = []

        def interrupted(pairs):
            calls.append(pairs)
            model.began.set()
            if len(calls) == 1:
                waiting(scheduler, 2)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return pairs

        own = Job([("own", 50)] * 3, [50] * 3, interrupted, lambda length: 2)
        other = pool.submit(lambda: (model.began.wait(WAIT), scheduler.run(model.job("other", 50)))[1])
        with pytest.raises(KeyboardInterrupt):
            scheduler.run(own)

        assert other.result(WAIT) == [("other", 50)]
        assert calls == [[("own", 50)] * 2, [("own", 50), ("other", 50)]]
        assert not scheduler._jobs

    @pytest.mark.parametrize("place", ["_leave", "_drop", "_fill", "_step", "_failed", "deliver", "take"])
    @pytest.mark.parametrize("after", [False, True])
    def test_an_interruption_anywhere_leaves_the_others_somebody_who_drives(self, model, pool, place, after):
        main = threading.current_thread()
        places = []

        def interrupted(method):
            def call(self, *args, **kwargs):
                begun = threading.current_thread() is main and model.began.is_set()
                if places or not begun or (place == "take" and self is own):  # another's pairs are what may be lost
                    return method(self, *args, **kwargs)
                places.append(place)
                if after:
                    method(self, *args, **kwargs)
                raise KeyboardInterrupt

            return call

        class Interrupted(Scheduler):
            """In whose driving caller Ctrl+C is pressed once, at one place."""

        class InterruptedJob(Job):
            """As that."""

        owner = InterruptedJob if hasattr(Job, place) else Interrupted
        setattr(owner, place, interrupted(getattr(owner, place)))
        scheduler = Interrupted()

        def forward(pairs):
            if threading.current_thread() is main and not model.began.is_set():
                model.began.set()
                waiting(scheduler, 3)
                if place == "_failed":
                    raise ValueError
            return pairs

        def ask(name):
            assert model.began.wait(WAIT)
            return scheduler.run(InterruptedJob([(name, 50)] * 3, [50] * 3, forward, lambda length: 4))

        found = [pool.submit(ask, name) for name in "ab"]
        own = InterruptedJob([("own", 50)] * 5, [50] * 5, forward, lambda length: 4)
        with pytest.raises(KeyboardInterrupt):
            scheduler.run(own)

        assert [future.result(WAIT) for future in found] == [[("a", 50)] * 3, [("b", 50)] * 3]
        assert places == [place]
        assert scheduler.run(model.job("next", 1)) == [("next", 1)]

    def test_a_driver_who_was_interrupted_before_it_could_leave_is_replaced(self, scheduler, model):
        scheduler._enqueue(gone := model.job("gone", 1))
        gone.answer.cancel()

        assert scheduler.run(model.job("a", 1)) == [("a", 1)]
        assert model.batches == [[("a", 1)]]

    async def test_a_stop_iteration_reaches_who_awaits_and_who_blocks(self, scheduler):
        def forward(pairs):
            return [next(iter([]))]

        def job(answer=None):
            return Job([1], [1], forward, lambda length: 1, answer=answer)

        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await asyncio.wait_for(scheduler.arun(job), WAIT)
        assert isinstance(caught.value.__cause__, StopIteration)
        with pytest.raises(RuntimeError, match="StopIteration"):
            scheduler.run(job())
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(scheduler.arun(lambda answer: next(iter([]))), WAIT)

    async def test_whatever_is_raised_while_tokenising_reaches_the_one_who_awaits(self, scheduler, model):
        class Panic(BaseException):
            """As tokenizers' own."""

        def tokenize(answer):
            raise Panic

        with pytest.raises(Panic):
            await scheduler.arun(tokenize)
        assert await scheduler.arun(lambda answer: model.job("a", 1, answer=answer)) == [("a", 1)]


class TestCancelling:
    async def test_a_cancelled_await_stops_costing(self, scheduler, model):
        model.held()
        task = asyncio.create_task(scheduler.arun(lambda answer: model.job("a", *[100] * 50, answer=answer)))
        await asyncio.to_thread(model.began.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.go.set()

        assert await scheduler.arun(lambda answer: model.job("b", 1, answer=answer)) == [("b", 1)]
        assert model.batches == [[("a", 100)], [("b", 1)]]

    async def test_a_call_that_is_cancelled_before_its_turn_is_not_even_tokenised(self, scheduler, model):
        tokenised = []
        with scheduler.door:

            def tokenize(answer):
                with scheduler.door:
                    tokenised.append(1)
                return model.job("a", 1, answer=answer)

            tasks = [asyncio.create_task(scheduler.arun(tokenize)) for _ in range(3)]
            await asyncio.sleep(0.05)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.sleep(0.05)

        assert await tasks[0] == [("a", 1)]
        assert len(tokenised) == 1

    def test_a_cancelled_job_makes_room(self, scheduler, model, pool):
        model.held()
        first = pool.submit(scheduler.run, model.job("first", 100))
        assert model.began.wait(WAIT)
        jobs = [model.job(name, *[100] * 10, answer=Future()) for name in "ab"]
        found = [pool.submit(scheduler.run, job) for job in jobs]
        waiting(scheduler, 3)
        room = pool.submit(scheduler.wait_for_room, 5)
        time.sleep(0.05)
        assert not room.done()

        jobs[0].answer.cancel()
        room.result(WAIT)
        model.go.set()

        with pytest.raises(CancelledError):
            found[0].result(WAIT)
        assert found[1].result(WAIT) == [("b", 100)] * 10
        assert first.result(WAIT) == [("first", 100)]


class TestThreads:
    async def test_an_awaited_call_leaves_no_thread_after_idling(self, scheduler, model):
        before = threads()
        await scheduler.arun(lambda answer: model.job("a", 1, answer=answer))
        started = [thread for thread in threads() if thread not in before]

        assert started
        began = time.monotonic()
        assert await asyncio.to_thread(gone, started)
        assert time.monotonic() - began < IDLE + WAIT / 4

    async def test_a_thread_that_ended_is_started_again(self, scheduler, model):
        for _ in range(2):
            assert await scheduler.arun(lambda answer: model.job("a", 1, answer=answer)) == [("a", 1)]
            assert await asyncio.to_thread(gone, threads())

    async def test_the_thread_ends_when_the_backend_goes(self):
        backend = Gold()
        before = threads()
        await backend.ascore("q", ["gold"])
        started = [thread for thread in threads() if thread not in before]
        reference = weakref.ref(backend)
        del backend

        assert started
        assert await asyncio.to_thread(gone, started)
        gc.collect()
        assert reference() is None

    def test_an_idle_thread_ends_at_once_when_nothing_refers_to_it(self, monkeypatch):
        monkeypatch.setattr(_worker, "IDLE", 10 * WAIT)
        idle, called = IdleThread("rerank-test", threading.Condition()), threading.Event()
        idle.call(called.set)
        assert called.wait(WAIT)
        [thread] = [thread for thread in threads() if thread.name == "rerank-test"]
        del idle
        thread.join(WAIT)

        assert not thread.is_alive()

    def test_a_failed_call_keeps_nothing_alive(self):
        backend = Gold()
        reference = weakref.ref(backend)
        gc.disable()
        try:
            with suppress(ZeroDivisionError):
                backend.logits("q", ["poison"])
            del backend
            assert reference() is None
        finally:
            gc.enable()


GOLD = '''
import asyncio, os, pickle, sys, threading, time
import numpy as np
from langchain_rerank.backends.local import Encoding, LocalBackend, sigmoid


class Gold(LocalBackend):
    """The logit is how often a text says gold."""

    seconds: float = 0.0

    def _load(self):
        pass

    def _encode(self, query, texts):
        return [Encoding([2 if word == "gold" else 1 for word in text.split()]) for text in texts]

    def _offsets(self, text):
        return []

    def _forward(self, batch):
        time.sleep(self.seconds)
        return ((batch.ids == 2) * batch.mask).sum(axis=1).astype(np.float32)

'''


def script(code):
    """Run a script in an interpreter of its own; what it prints, when it ends by itself."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GOLD + code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


class TestExit:
    def test_the_interpreter_exits_while_a_daemon_thread_awaits(self):
        began = time.monotonic()
        code = """
backend = Gold(seconds=0.3, batch_size=1)
async def ask():
    await asyncio.gather(*(backend.ascore("q", ["gold"] * 100) for _ in range(8)))
threading.Thread(target=lambda: asyncio.run(ask()), daemon=True).start()
time.sleep(1)
print("end")
"""
        assert script(code) == ["end"]
        assert time.monotonic() - began < 30, "not before all 800 batches"

    def test_the_interpreter_exits_while_callers_wait_for_room(self):
        code = """
backend = Gold(seconds=0.3, batch_size=1, max_waiting=1)
async def ask():
    await asyncio.gather(*(backend.ascore("q", ["gold"] * 9) for _ in range(8)))
threading.Thread(target=lambda: asyncio.run(ask()), daemon=True).start()
for _ in range(4):
    threading.Thread(target=lambda: backend.score("q", ["gold"] * 9), daemon=True).start()
time.sleep(1)
print("end")
"""
        began = time.monotonic()
        assert script(code) == ["end"]
        assert time.monotonic() - began < 9, "it waited out its patience"

    def test_callers_who_keep_the_interpreter_get_their_answers(self):
        code = """
backend = Gold(seconds=0.05, batch_size=2)
for _ in range(4):
    threading.Thread(target=lambda: print(len(backend.score("q", ["gold"] * 6)))).start()
"""
        assert script(code) == ["6"] * 4

    def test_an_exit_handler_can_still_score(self):
        code = """
import atexit
backend = Gold(seconds=0.01, batch_size=1)
atexit.register(lambda: print(backend.score("q", ["gold"]) == [sigmoid(1)]))
async def ask():
    await asyncio.gather(*(backend.ascore("q", ["gold"] * 100) for _ in range(8)))
threading.Thread(target=lambda: asyncio.run(ask()), daemon=True).start()
time.sleep(0.5)
"""
        assert script(code) == ["True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_has_threads_and_locks_of_its_own():
    code = """
backend = Gold(seconds=0.02, batch_size=1)
async def busy():
    await asyncio.gather(*(backend.ascore("q", ["gold"] * 10) for _ in range(4)))
parent = threading.Thread(target=lambda: asyncio.run(busy()))
parent.start()
time.sleep(0.3)
held, done = threading.Event(), threading.Event()
def hold():
    with backend._lock, backend._queue._changed:
        held.set()
        done.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    print(backend.score("q", ["gold", "lead"]) == [sigmoid(1), 0.5], flush=True)
    print(asyncio.run(backend.ascore("q", ["gold gold"])) == [sigmoid(2)], flush=True)
    sys.exit(0)
done.set()
print(os.waitpid(child, 0)[1])
parent.join()
"""
    assert script(code) == ["True", "True", "0"]


class Gold(LocalBackend):
    """The logit is how often a text says gold; "poison" fails."""

    tells: bool = False

    _seen: list = PrivateAttr(default_factory=list)
    _go: threading.Event = PrivateAttr(default_factory=threading.Event)
    _encoded: list = PrivateAttr(default_factory=list)

    def _load(self):
        self._go.set()

    def _encode(self, query, texts):
        self._encoded.append(query)
        ids = {"gold": 2, "poison": 3}
        return [Encoding([ids.get(word, 1) for word in text.split()]) for text in texts]

    def _offsets(self, text):
        return []

    def _forward(self, batch):
        assert self._go.wait(WAIT)
        self._seen.append((CALLER.get(), len(batch)))
        if self.tells:
            report_usage(batches=1)
        if (batch.ids == 3).any():
            raise ZeroDivisionError
        return ((batch.ids == 2) * batch.mask).sum(axis=1).astype(np.float32)


CALLER = contextvars.ContextVar("caller", default="nobody")


class TestBackends:
    async def test_awaited_calls_share_batches_and_each_reports_its_own(self):
        backend = Gold()
        backend.warmup()
        backend._go.clear()

        async def ask(count):
            with collect_usage() as usage:
                scores = await backend.ascore("q", ["gold lead lead"] * count)
            return scores, usage

        tasks = [asyncio.create_task(ask(count)) for count in (1, 2, 3)]
        await asyncio.to_thread(waiting, backend._queue, 3)
        backend._go.set()

        assert await asyncio.gather(*tasks) == [([sigmoid(1)] * count, {"tokens": 3 * count}) for count in (1, 2, 3)]
        assert len(backend._seen) <= 3, "the warm-up, a batch of one or more, and the rest in one"

    async def test_a_model_runs_in_its_callers_context(self):
        backend = Gold(tells=True)
        CALLER.set("me")
        with collect_usage() as usage:
            await backend.ascore("q", ["gold"])

        assert backend._seen == [("me", 1)]
        assert usage == {"batches": 1, "tokens": 1}

    def test_threads_at_once_load_once_and_get_their_own(self, pool):
        loads = []

        class Slow(Gold):
            def _load(self):
                time.sleep(0.05)
                loads.append(1)
                super()._load()

        backend = Slow()
        found = pool.map(lambda count: backend.score("q", ["gold " * count]), [1, 2, 3] * 10)

        assert list(found) == [[sigmoid(count)] for count in [1, 2, 3] * 10]
        assert loads == [1]

    async def test_one_poisoned_call_among_awaited_ones_fails_alone(self):
        backend = Gold()
        calls = [backend.ascore("q", ["poison" if place == 3 else "gold", "lead"]) for place in range(8)]
        found = await asyncio.gather(*calls, return_exceptions=True)

        assert isinstance(found.pop(3), ZeroDivisionError)
        assert found == [[sigmoid(1), 0.5]] * 7

    @pytest.mark.parametrize(
        ("most", "calls", "count", "expected"),
        [pytest.param(4, 6, 3, 3, id="large calls"), pytest.param(16, 40, 2, 9, id="small calls")],
    )
    async def test_no_more_is_tokenised_than_there_is_room_for(self, most, calls, count, expected):
        backend = Gold(max_waiting=most)
        backend.warmup()
        backend._go.clear()
        tasks = [asyncio.create_task(backend.ascore(f"{place}", ["gold"] * count)) for place in range(calls)]
        await asyncio.to_thread(waiting, backend._queue, expected)
        await asyncio.sleep(0.2)
        tokenised = len(backend._encoded) - 1
        backend._go.set()

        assert await asyncio.gather(*tasks) == [[sigmoid(1)] * count] * calls
        assert tokenised == expected, "the largest, and beside it as many as reach the room that there is"

    @pytest.mark.parametrize("awaited", [True, False])
    async def test_a_small_call_does_not_wait_for_room_behind_large_ones(self, awaited):
        backend = Gold(max_waiting=16)
        backend.warmup()
        backend._go.clear()

        def start(query, count):
            texts = ["gold"] * count
            call = backend.ascore(query, texts) if awaited else asyncio.to_thread(backend.score, query, texts)
            return asyncio.create_task(call)

        tasks = []
        for place in range(4):
            tasks.append(start(f"large {place}", 20))
            await asyncio.to_thread(waiting, backend._queue, min(place + 1, 2))
        tasks.append(start("small", 2))
        await asyncio.to_thread(waiting, backend._queue, 3)
        tokenised = backend._encoded[1:]
        backend._go.set()

        assert await asyncio.gather(*tasks) == [[sigmoid(1)] * 20] * 4 + [[sigmoid(1)] * 2]
        assert tokenised == ["large 0", "large 1", "small"]

    async def test_a_call_that_is_cancelled_while_it_waits_for_room_is_not_tokenised(self):
        backend = Gold(max_waiting=4)
        backend.warmup()
        backend._go.clear()
        tasks = [asyncio.create_task(backend.ascore(f"{place}", ["gold"] * 3)) for place in range(4)]
        await asyncio.to_thread(waiting, backend._queue, 3)
        await asyncio.sleep(0.05)
        tasks[3].cancel()
        await asyncio.wait([tasks[3]])
        assert await asyncio.to_thread(backend._lock.acquire, timeout=WAIT), "the cancelled call still waits"
        backend._lock.release()
        backend._go.set()

        assert await asyncio.gather(*tasks[:3]) == [[sigmoid(1)] * 3] * 3
        assert backend._encoded == ["warm", "0", "1", "2"]

    def test_a_call_larger_than_the_queue_is_answered(self):
        assert Gold(max_waiting=1).score("q", ["gold"] * 50) == [sigmoid(1)] * 50

    async def test_several_queries_are_one_caller(self):
        backend = Gold()
        found = await backend.ascore_many([("a", ["gold", "lead"]), ("b", ["lead"]), ("c", [])])

        assert found == [[sigmoid(1), 0.5], [0.5], []]
        assert backend._seen == [("nobody", 3)]

    async def test_a_pickled_copy_starts_its_own(self):
        backend = Gold()
        await backend.ascore("q", ["gold"])
        twin = pickle.loads(pickle.dumps(backend))

        assert twin._queue is not backend._queue
        assert await twin.ascore("q", ["gold"]) == [sigmoid(1)]

    async def test_two_event_loops_share_one_model(self, pool):
        backend = Gold()

        def ask(count):
            return asyncio.run(backend.ascore("q", ["gold " * count]))

        found = [asyncio.wrap_future(pool.submit(ask, count)) for count in (1, 2, 3)]
        assert await asyncio.gather(*found) == [[sigmoid(count)] for count in (1, 2, 3)]
