"""Emulates a GPU's warpgroups as threads that run one at a time, its barriers, and its engines.

An engine is a unit that copies or multiplies asynchronously, such as TMA.
"""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Probabilities, of which a seed chooses one each.
_ENGINE = (0.2, 0.9)  # that a pending copy happens when a thread looks at a barrier
_SWITCH = (0.3, 0.8)  # that another thread goes on
_EARLY = (0.0, 0.5)  # that a product reads its operands when it is issued, not when waited for
_PACES = (1, 10, 100)  # how often a thread is chosen, against others


class Deadlock(RuntimeError):
    """Error: every thread waits for a barrier or an address that no thread can change."""


class Barrier:
    """An mbarrier, whose phase completes when all its arrivals and bytes have come."""

    def __init__(self) -> None:
        self.count = 0
        self.pending = 0
        self.bytes = 0
        self.phase = 0

    def init(self, count: int) -> None:
        assert self.count == 0, "initialised twice"
        self.count = self.pending = count

    def change(self, arrivals: int = 0, expected: int = 0) -> None:
        """Counts arrivals, and adds `expected` to the bytes that the phase waits for.

        Bytes that have come are a negative `expected`.
        """
        assert self.count > 0, "not initialised"
        self.pending -= arrivals
        self.bytes += expected
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.phase ^= 1


class NamedBarrier:
    """A hardware named barrier, which completes when the given number of threads has arrived."""

    def __init__(self) -> None:
        self.came: list[Thread] = []
        self.threads = 0
        self.count = 0
        self.rounds = 0

    def come(self, threads: int, count: int) -> int:
        """Counts the arrival of the current warpgroup's threads.

        Args:
            threads: Number of arriving threads.
            count: Number of threads at which the barrier completes.

        Returns:
            The number of times that the barrier had completed before.
        """
        now = self.rounds
        assert current() not in self.came, "a warpgroup comes twice to a barrier"
        assert not self.came or count == self.count, "warpgroups differ in what a barrier counts"
        self.count = count
        self.came.append(current())
        self.threads += threads
        assert self.threads <= count, "more threads than the barrier counts"
        if self.threads == count:
            self.came, self.threads = [], 0
            self.rounds += 1
        return now


class Program:
    """State of one emulated program (thread block) that its threads share."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...]):
        self.index = index
        self.grid = grid
        # Generic writes to shared memory that their thread has not fenced: (thread, first, last).
        self.unfenced: list[tuple[Any, int, int]] = []
        self.named = [NamedBarrier() for _ in range(16)]


class Operation:
    """An asynchronous copy or product, which runs once.

    It runs at a random moment, or at the latest when a thread waits for it.
    """

    def __init__(self, function: Callable[[], None]):
        self.function: Callable[[], None] | None = function

    def run(self) -> None:
        function, self.function = self.function, None
        if function is not None:
            function()


class Thread:
    """A warpgroup or a single warp of an emulated program, and its asynchronous operations."""

    def __init__(
        self, machine: "Machine", program: Program, function: Callable[[], object], pace: float
    ):
        self.machine = machine
        self.pace = pace
        self.program = program
        self.function = function
        self.turn = threading.Semaphore(0)
        self.done = False
        self.waits_for: Callable[[], bool] | None = None
        self.products: list[Callable[[], None]] = []  # oldest first, as all of these
        self.reads: list[Operation] = []  # of copies from shared memory, and their writes
        self.writes: list[Operation] = []
        self.small_copies: list[Callable[[], None]] = []
        self.polled: tuple[object, int] | None = None  # an address, and the machine's writes then
        self.native = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        _LOCAL.thread = self
        try:
            if self.machine.error is None:
                with np.errstate(all="ignore"):  # infinities and NaNs are as usual as on a GPU
                    self.function()
                assert not self.reads, "ended before its copies from shared memory did"
                assert not self.products, "ended before its products did"
        except BaseException as error:  # reported by the thread that launched
            self.machine.error = self.machine.error or error
        self.done = True
        self.machine.next_turn()

    def finish_products(self, left: int) -> None:
        """Runs this thread's pending products, oldest first, until at most `left` are pending."""
        while len(self.products) > left:
            self.products.pop(0)()

    def finish_reads(self, left: int) -> None:
        """Runs this thread's copies out of shared memory, until at most `left` have not read it."""
        while len(self.reads) > left:
            self.reads.pop(0).run()

    def finish_writes(self, left: int) -> None:
        """Runs this thread's copies to global memory, until at most `left` are incomplete."""
        while len(self.writes) > left:
            self.writes.pop(0).run()


class Machine:
    """The emulated GPU: runs all threads one at a time, in an order that a seed sets."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.engine_pace = self.random.choice(_ENGINE)
        self.switching = self.random.choice(_SWITCH)
        self.early = self.random.choice(_EARLY)
        self.writes = 0  # to global memory, by which a thread that polls may get on
        self.threads: list[Thread] = []
        self.engine: list[Operation] = []
        self.error: BaseException | None = None
        self.finished = threading.Semaphore(0)

    def run(self, programs: Iterator[Program], function: Callable[[], None], at_once: int) -> None:
        """Runs a function in every program, at most `at_once` programs at a time."""

        def start_next() -> None:
            program = next(programs, None)
            if program is not None:
                self.start(program, lambda: (function(), start_next()))

        for _ in range(at_once):
            start_next()
        self.next_turn()
        self.finished.acquire()
        if self.error is not None:
            raise self.error
        while self.engine:
            self.copy()

    def start(self, program: Program, function: Callable[[], object]) -> Thread:
        thread = Thread(self, program, function, self.random.choice(_PACES))
        self.threads.append(thread)
        thread.native.start()
        return thread

    def _ready(self) -> list[Thread]:
        return [
            thread
            for thread in self.threads
            if not thread.done and (thread.waits_for is None or thread.waits_for())
        ]

    def next_turn(self) -> None:
        """Lets a random thread run, among those that do not wait."""
        self.threads = [thread for thread in self.threads if not thread.done]
        if self.error is not None:
            for thread in self.threads:
                thread.waits_for = None
        try:
            ready = self._ready()
            while not ready and self.engine:
                self.copy()
                ready = self._ready()
        except BaseException as error:
            self.error = self.error or error
            ready = self.threads
        if ready:
            paces = [thread.pace for thread in ready]
            self.random.choices(ready, paces)[0].turn.release()
        elif self.threads:
            self.error = Deadlock(f"{len(self.threads)} threads wait and no copy is pending")
            self.next_turn()
        else:
            self.finished.release()

    def copy(self) -> None:
        """Runs a random pending copy."""
        self.engine.pop(self.random.randrange(len(self.engine))).run()
        self.writes += 1

    def post(self, function: Callable[[], None]) -> Operation:
        """Queues an asynchronous operation, which runs later."""
        operation = Operation(function)
        self.engine.append(operation)
        return operation

    def look(self, until: Callable[[], bool] | None = None) -> None:
        """Lets a pending copy complete or another thread run, at random.

        With `until`, the running thread waits until the function returns True.
        """
        if self.engine and self.random.random() < self.engine_pace:
            self.copy()
        if (until is None or until()) and self.random.random() >= self.switching:
            return
        thread = current()
        thread.waits_for = until
        self.next_turn()
        thread.turn.acquire()
        thread.waits_for = None
        if self.error is not None:
            raise self.error


_LOCAL = threading.local()


def current() -> Thread:
    """Returns the emulated thread that is running."""
    return _LOCAL.thread


def note_write(first: int, last: int) -> None:
    """Records that the running thread wrote bytes [first, last) of shared memory without a fence.

    An engine must not read them before the thread's next fence.
    """
    current().program.unfenced.append((current(), first, last))


def fence() -> None:
    """Makes this thread's writes to shared memory visible to the engines."""
    program = current().program
    program.unfenced = [entry for entry in program.unfenced if entry[0] is not current()]


def require_fenced(first: int, last: int) -> None:
    """Fails if bytes [first, last) that an engine reads were written without a fence."""
    for _, begin, end in current().program.unfenced:
        assert last <= begin or end <= first, "an engine reads a write that no fence showed"


def issue_product(product: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Starts an asynchronous product; once it has run, the returned list holds its result."""
    thread = current()
    result: list[np.ndarray] = []
    thread.products.append(lambda: result.append(product()))
    if thread.machine.random.random() < thread.machine.early:
        thread.finish_products(0)
    return result
