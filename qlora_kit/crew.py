"""Crew: processes that do the same work on other items, where one alone would be busy for long.

    items -> the first ones here, for PATIENCE_S -> the others in chunks, each to a worker -> what is made, in order

A worker is a Python of its own that reads chunks from its standard input and ends with that, so that none is left when
the process that began it is gone, whatever ended it. (multiprocessing forks the threads of libraries, or runs the
user's script again.) It begins while work goes on here, and what it fails at is done here: a crew changes what is made
in nothing but time. Items are taken ahead of what is made of them.
"""

import os
import pickle
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Generic, TypeVar

import psutil

from qlora_kit.errors import RunError, tokenizing
from qlora_kit.units import GIB

T = TypeVar("T")
R = TypeVar("R")

PATIENCE_S = 10.0
"""After which workers are worth the seconds that they take to begin."""
MOST_WORKERS = 8
CHUNK = 64
"""Items that a worker is given at a time: a few tenths of a second of encoding."""

# The work is read before the libraries are imported that it is made of: who sends it does not wait for them.
_BEGIN = """
import pickle, sys
job = pickle.load(sys.stdin.buffer)
from qlora_kit.crew import serve
serve(job, int(sys.argv[1]))
"""
_IS_GONE = (OSError, EOFError, pickle.UnpicklingError)
_HAS_NO_PICKLE = (pickle.PicklingError, AttributeError, TypeError, RunError)


def each_done(work: Callable[[T], R], items: Iterable[T]) -> Generator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order.

    Args:
        work: a function of a module, or a `partial` of one; with what it takes and makes, it can be pickled.
        items: of any number; few of them are held at a time.
    """
    items, begun = iter(items), time.monotonic()
    yield from _until(lambda: time.monotonic() - begun > PATIENCE_S, work, items)
    if not (more := list(islice(items, 1))):
        return
    yield more[0], work(more[0])
    with _crew(work) as workers:
        yield from _until(lambda: all(worker.has_begun for worker in workers), work, items)
        fit = [worker for worker in workers if worker.is_fit]
        yield from _shared(fit, items) if fit else _until(lambda: False, work, items)


def _until(is_enough: Callable[[], bool], work: Callable[[T], R], items: Iterator[T]) -> Iterator[tuple[T, R]]:
    """Items done here, one at least."""
    for item in items:
        yield item, work(item)
        if is_enough():
            return


def _shared(workers: "list[_Worker[T, R]]", items: Iterator[T]) -> Iterator[tuple[T, R]]:
    """Items done by workers. Each has one chunk at a time: it never waits to be read while it is written to."""
    idle, asked = deque(workers), deque[tuple[_Worker[T, R], list[T]]]()
    while chunk := list(islice(items, CHUNK)):
        earlier, made = list[T](), list[R]()
        if not idle:
            worker, earlier = asked.popleft()
            made = worker.answer(earlier)
            idle.append(worker)
        asked.append((idle.popleft(), chunk))
        asked[-1][0].ask(chunk)
        yield from zip(earlier, made, strict=True)
    for worker, chunk in asked:
        yield from zip(chunk, worker.answer(chunk), strict=True)


@contextmanager
def _crew(work: Callable[[T], R]) -> "Iterator[list[_Worker[T, R]]]":
    """As many workers as there are cores and memory for; none where there is but one, or the work cannot be sent."""
    workers: list[_Worker[T, R]] = []
    count = min(MOST_WORKERS, psutil.cpu_count() or 1, psutil.virtual_memory().available // GIB)
    try:
        with suppress(*_HAS_NO_PICKLE, OSError):
            with tokenizing(RunError, "it has parts that are no data"):
                job = pickle.dumps(work)
            for _ in range(count if count > 1 else 0):
                workers.append(_Worker(work, job))
        yield workers
    finally:
        for worker in workers:
            worker.end()


class _Worker(Generic[T, R]):
    """A process that does the work, or this one in its place."""

    def __init__(self, work: Callable[[T], R], job: bytes) -> None:
        self.work = work
        answers, to_answer = os.pipe()  # what libraries print is no answer
        self.out = os.fdopen(answers, "rb")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self.process = subprocess.Popen(
                # -P: modules come from where they come from here, and nowhere else
                [sys.executable, "-P", "-c", _BEGIN, str(to_answer)],
                pass_fds=[to_answer],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C is for the process that began it
            )
        finally:
            os.close(to_answer)
        assert self.process.stdin is not None
        self.into = self.process.stdin
        self.ask(job)

    @property
    def has_begun(self) -> bool:
        """Whether it has something to say, or is gone."""
        poll = select.poll()
        poll.register(self.out)
        return bool(poll.poll(0))

    @property
    def is_fit(self) -> bool:
        """Whether it has begun well; to be asked once."""
        try:
            return bool(pickle.load(self.out))
        except _IS_GONE:
            return False

    def ask(self, given: object) -> None:
        """Send something; whether it is gone is seen when it should answer."""
        with suppress(OSError):
            pickle.dump(given, self.into, pickle.HIGHEST_PROTOCOL)
            self.into.flush()

    def answer(self, chunk: list[T]) -> list[R]:
        """What it makes of the chunk that it was sent."""
        try:
            made: list[R] = pickle.load(self.out)
        except _IS_GONE:
            made = [self.work(item) for item in chunk]
        return made

    def end(self) -> None:
        """Let it go."""
        self.process.kill()
        self.process.wait()
        self.out.close()
        with suppress(OSError):  # what was not sent yet
            self.into.close()


def serve(job: bytes, to_answer: int) -> None:
    """What a worker does until nothing more is sent."""
    work, given = pickle.loads(job), sys.stdin.buffer
    with os.fdopen(to_answer, "wb") as out, suppress(EOFError, BrokenPipeError):
        answer: object = True
        while True:
            pickle.dump(answer, out, pickle.HIGHEST_PROTOCOL)
            out.flush()
            answer = [work(item) for item in pickle.load(given)]
