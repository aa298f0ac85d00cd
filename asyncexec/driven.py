"""An event loop for engines whose own loop is a thread: whoever waits for a result runs it, without a thread hop.

An engine that blocks until a step is done pays, with an event loop on a thread of its own, for two thread switches in
every step.  Here the thread that waits runs the loop itself, until its future is done.  While nobody waits, a watcher
thread does, so that the death of a rank is noticed, timers fire and futures complete all the same.

At any time at most one thread has the loop: the one that holds the lock.  The watcher sleeps in an epoll of its own,
over the epoll of the loop, which is switched off while a caller has the loop: else each event would wake both.

What is frequent does without asyncio: whoever has the loop waits for events itself, and calls the readers of what can
be read.  Where there is more to do, such as timers, tasks and writers, asyncio has a turn.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import contextvars
import functools
import heapq
import math
import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, Unpack

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_SHORT = 0.001
"""Seconds to wait for the loop while the watcher has it, which never keeps it for long."""

_furnishing = threading.Lock()
"""Held while a future gets the attributes of its base class."""


class DrivenFuture(concurrent.futures.Future[T]):
    """A `concurrent.futures.Future` that really completes; `result` runs the loop meanwhile, if nobody else does.

    What it stands for is under way: `cancel` returns False.

    It has the locks and lists of its base class only once something asks for them: most futures are waited for by the
    thread that has the loop, and need none.
    """

    def __init__(self, loop: "DrivenLoop") -> None:
        self._driven_by = loop
        self._is_done = self._is_furnished = False
        self._value: Any = None
        self._error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        with _furnishing:
            if not self._is_furnished:
                super().__init__()
                self._is_furnished = True
        if self._is_done:
            self._complete_base()
        return super().__getattribute__(name)

    def cancel(self) -> bool:
        """It cannot be."""
        return False

    def cancelled(self) -> bool:
        """It is never."""
        return False

    def running(self) -> bool:
        """It runs since it was made."""
        return not self._is_done

    def set_running_or_notify_cancel(self) -> bool:
        """As `running`."""
        return True

    def done(self) -> bool:
        """Whether the result or the error is there."""
        return self._is_done

    def result(self, timeout: float | None = None) -> T:
        """The result, or raises the error; raises TimeoutError after `timeout` seconds, and may be called again."""
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # else its traceback would refer to them, and they to it
        result: T = self._value
        return result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, or None; raises TimeoutError as `result` does."""
        if not self._is_done:
            deadline = None if timeout is None else time.monotonic() + timeout
            if not self._driven_by.drive(self, timeout):
                # another thread runs the loop; it completes this future too, or the watcher does after it
                rest = None if deadline is None else max(0.0, deadline - time.monotonic())
                concurrent.futures.wait([self], rest)
            if not self._is_done:
                raise TimeoutError
        return self._error

    def set_result(self, result: T) -> None:
        """Complete it; on the loop."""
        self._value = result
        self._complete()

    def set_exception(self, exception: BaseException | None) -> None:
        """Fail it; on the loop."""
        self._error = exception
        self._complete()

    def _complete(self) -> None:
        self._is_done = True
        if self._is_furnished:
            self._complete_base()
        self._driven_by.completed(self)

    def _complete_base(self) -> None:
        """Whoever comes second of those who make it done and who furnish it, for that one sees what the other did."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # both did
            if self._error is None:
                super().set_result(self._value)
            else:
                super().set_exception(self._error)


class DrivenLoop(asyncio.SelectorEventLoop):
    """The loop.  `start` it, `call` coroutines and functions on it from any thread, and `end` it.

    Whether asyncio has something to run is what its queue says.  A flag would not do: another thread puts a callback
    there and writes to the loop's pipe, and a turn that is about to end may read the pipe without the callback.
    """

    _ready: collections.deque[asyncio.Handle]

    def __init__(self) -> None:
        self._readers: dict[int, Callable[[], object]] = {}
        selector = selectors.EpollSelector()
        super().__init__(selector)
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._awaited: DrivenFuture[Any] | None = None
        self._events = select.epoll.fromfd(os.dup(selector.fileno()))
        self._outer = select.epoll()
        self._outer.register(self._events, select.EPOLLIN | select.EPOLLONESHOT)
        self._armed = True
        self._timers: list[float] = []
        self._watched_until = math.inf
        self._ending = False
        self._watcher = threading.Thread(target=self._watch, name="asyncexec-watcher", daemon=True)

    def start(self) -> None:
        """Start the watcher."""
        self._watcher.start()

    def end(self) -> None:
        """End the watcher and close the loop; not on the loop itself."""
        self._ending = True
        with self._lock:  # whoever has the loop leaves it first, and may have left the watcher asleep
            self._outer.modify(self._events, select.EPOLLIN | select.EPOLLONESHOT)
        self.call_soon_threadsafe(_nothing)
        self._watcher.join()
        with self._lock:
            self._outer.close()
            self._events.close()
            self.close()

    @property
    def is_held(self) -> bool:
        """Whether the calling thread has the loop, so that it may touch what belongs to it."""
        return self._owner == threading.get_ident()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, on the watcher's thread unless another one has the loop; blocks until it is done."""
        if self.is_held:
            coroutine.close()
            raise RuntimeError("called from a callback of the executor: waiting here would wait for ever")
        return asyncio.run_coroutine_threadsafe(coroutine, self).result()

    def do(self, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Call a function while no other thread has the loop, on the calling thread if possible; returns its result."""
        if self._owner == threading.get_ident():
            return function(*args)
        if self._take():
            try:
                return function(*args)
            finally:
                self._release()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.call_soon_threadsafe(_run_for, done, functools.partial(function, *args))
        return done.result()

    def drive(self, future: DrivenFuture[Any], timeout: float | None) -> bool:
        """Run the loop on this thread until the future is done or the time is over; False where another thread runs it.

        A thread that runs a loop of its own, such as a notebook's, cannot run this one: there the watcher does.

        Raises:
            RuntimeError: in a callback of the loop, where waiting would wait for ever.
        """
        if self._owner == threading.get_ident():
            raise RuntimeError("result() of a future that is not done, in a callback of its own executor")
        if asyncio._get_running_loop() is not None or not self._take():
            return False
        try:
            if self._armed:
                self._armed = False
                self._outer.modify(self._events, 0)
            if not future.done():
                until = math.inf if timeout is None else time.monotonic() + timeout
                self._awaited = future
                while self._awaited is future:
                    self._turn(until)
                    if until <= time.monotonic():
                        break
        finally:
            self._awaited = None
            self._release()
        return True

    def completed(self, future: DrivenFuture[Any]) -> None:
        """Have the thread that waits for this future leave the loop."""
        if self._awaited is future:
            self._awaited = None

    def add_reader(self, fd: Any, callback: Callable[[Unpack[Ts]], Any], *args: *Ts) -> None:
        """As asyncio's; also notes whom to call."""
        super().add_reader(fd, callback, *args)
        self._readers[_number(fd)] = functools.partial(callback, *args)

    def remove_reader(self, fd: Any) -> bool:
        """As asyncio's."""
        self._readers.pop(_number(fd), None)
        return super().remove_reader(fd)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's; also notes when there will be something to run."""
        heapq.heappush(self._timers, when)
        return super().call_at(when, callback, *args, context=context)

    def _take(self) -> bool:
        """Take the loop, unless another caller runs it."""
        taken = self._lock.acquire(blocking=False) or (self._awaited is None and self._lock.acquire(timeout=_SHORT))
        if taken:
            self._owner = threading.get_ident()
        return taken

    def _release(self) -> None:
        """Leave the loop, to the watcher if need be."""
        self._owner = None
        wake = self._ready or (self._timers and self._timers[0] < self._watched_until)
        self._lock.release()
        if not self._armed and not self._ending:  # behind the release: the watcher may come at once
            self._armed = True
            self._outer.modify(self._events, select.EPOLLIN | select.EPOLLONESHOT)
        if wake and not self._ending:
            self.call_soon_threadsafe(_nothing)

    def _turn(self, until: float) -> None:
        """Wait for events, until then at most, and have them handled; with what else is due."""
        timers, due = self._timers, False
        if timers and timers[0] < until:
            until = timers[0]
        for number, events in self._events.poll(None if until == math.inf else max(0.0, until - time.monotonic())):
            reader = self._readers.get(number)
            if reader is None or events != select.EPOLLIN:
                due = True  # asyncio will see it too
                continue
            try:
                reader()
            except Exception as error:  # noqa: BLE001 - as asyncio has it
                self.call_exception_handler({"message": f"{reader!r} raised", "exception": error})
        if due or self._ready or (timers and timers[0] <= time.monotonic()):
            self._run_what_is_due()

    def _watch(self) -> None:
        """The watcher's thread: runs the loop whenever something happens while no caller has it."""
        while not self._ending:
            wait = max(0.0, self._watched_until - time.monotonic())
            self._outer.poll(None if math.isinf(wait) else wait)
            self._armed = False
            if self._lock.acquire(blocking=False):
                self._owner = threading.get_ident()
                try:
                    self._turn(0.0)
                    self._watch_timers()
                finally:
                    self._release()
            else:
                self._watch_timers()

    def _watch_timers(self) -> None:
        """Wake up for the next timer, also for one that a caller sets meanwhile.

        A caller sets a timer before it looks whether the watcher will wake up for it, and the watcher says when it will
        before it looks at the timers again: so one of them sees what the other did.
        """
        until = math.nan
        while until != (until := self._timers[0] if self._timers else math.inf):
            self._watched_until = until

    def _run_what_is_due(self) -> None:
        """Have asyncio run what is ready, and the timers whose time has come."""
        more = True
        while more:
            self.stop()  # documented: with it, run_forever runs what is ready and returns
            self.run_forever()
            more = bool(self._ready)
        now = self.time()
        while self._timers and self._timers[0] <= now:
            heapq.heappop(self._timers)


def _number(file: Any) -> int:
    """The descriptor of what `add_reader` takes."""
    return file if isinstance(file, int) else int(file.fileno())


def _nothing() -> None:
    """Something to run, which wakes the watcher."""


def _run_for(done: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    try:
        done.set_result(function())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the caller on the other thread gets it
        done.set_exception(error)
