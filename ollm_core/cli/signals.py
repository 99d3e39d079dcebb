"""Handles SIGINT, SIGTERM and SIGHUP: the verb stops as by Ctrl-C, closes what it has open, and the
command exits with the code that shells give for the signal.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ollm_core.contracts.closing import Closing

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE_SECONDS = 10.0
"""A signal that comes so soon after the one that is being obeyed is one too many."""
_AGAIN_SECONDS = 0.01
_OPENS = "ollm_core.api"
"""Before this module is there, a verb that is importing has nothing open, and need not be waited
for.
"""


class Ended(KeyboardInterrupt):
    """A signal asks for an end. Whoever makes way for Ctrl-C makes way for it."""

    hint = ""
    """How to go on, where a verb knows."""


class Signals:
    """The signals of one command line. Use `handled` around all of it, and `raising` around what
    may be broken off.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first that was obeyed."""
        self._raising = False
        self._quiet_until = 0.0
        self._handled = True
        self._sending = threading.Lock()

    @property
    def exit_code(self) -> int:
        """As shells give it."""
        return 128 + (self.received or signal.SIGINT)

    @property
    def word(self) -> str:
        """What happened to the command."""
        return "terminated" if self.received in ENDING[1:] else "interrupted"

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Outside of `raising`, nothing happens on a signal. What was there comes back.

        Signals that are ignored, as by nohup, stay so. Does nothing but in the main thread, which
        alone may choose.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        found = {number: signal.getsignal(number) for number in ENDING}
        handlers = {
            number: one for number, one in found.items() if one not in (signal.SIG_IGN, None)
        }
        hook = sys.unraisablehook
        try:
            for number in handlers:
                signal.signal(number, self._on_signal)
            sys.unraisablehook = self._unraisable(hook)
            yield
        finally:
            with self._sending:
                self._handled = False
            sys.unraisablehook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Signals raise Ended in the `with`, also one that came before it."""
        self._raising = True
        try:
            if self.received:
                raise Ended
            yield
        finally:
            self._raising = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if not self._raising or time.monotonic() < self._quiet_until:
            return
        importing = _is_importing(frame)
        if importing and not hasattr(sys.modules.get(_OPENS), "load"):
            os.write(2, f"error: {self.word}\n".encode())
            os._exit(self.exit_code)
        if importing or _is_closing(frame):
            self._send_again()
        else:
            self._quiet_until = time.monotonic() + _PATIENCE_SECONDS
            raise Ended

    def _send_again(self) -> None:
        """Let the signal come once more in a moment."""
        # A Thread would take locks that what is being interrupted may hold.
        _thread.start_new_thread(self._send, (self.received or signal.SIGINT,))

    def _send(self, number: int) -> None:
        time.sleep(_AGAIN_SECONDS)
        with self._sending:
            if self._handled:
                signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _unraisable(self, hook: Callable[[Any], Any]) -> Callable[[Any], None]:
        """Python drops what is raised in a callback of its own, as those of weak references are."""

        def dropped(unraisable: Any) -> None:
            if isinstance(unraisable.exc_value, Ended):
                self._quiet_until = 0.0
                self._send_again()
            else:
                hook(unraisable)

        return dropped


@contextmanager
def at_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """In the `with` the first Ctrl-C calls `act`, and ends nothing; the next one does as elsewhere.
    In the main thread alone, which may choose.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        act()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported there: what is raised in the C++ of one ends the process
    with a core dump.
    """
    return any("importlib._bootstrap" in one.f_code.co_filename for one in _frames(frame))


def _is_closing(frame: FrameType | None) -> bool:
    """Whether something is being closed there: it would stay half open."""
    return any(
        one.f_code is weakref.finalize.__call__.__code__
        or (one.f_code.co_name == "close" and isinstance(one.f_locals.get("self"), Closing))
        for one in _frames(frame)
    )
