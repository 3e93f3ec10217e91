"""SIGTERM and Ctrl-C: an orderly end within GRACE_S seconds, with exit code 75, which schedulers know as `try again`.

SIGTERM becomes what Ctrl-C is in Python, KeyboardInterrupt: at once, but within `held` only when that ends, so that a
training step is never torn in two. Where the interpreter cannot be reached (a long call into C++), the process ends all
the same: what was saved before is whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
GRACE_S = 8.0

_state = {"held": False, "asked": False, "leaves_at_once": False}


@contextlib.contextmanager
def stop_signals():
    """Within, SIGTERM and SIGINT stop the main thread as this module says. No effect in any other thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.update(held=False, asked=False)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # a job in the background of a script ignores Ctrl-C
            signal.signal(number, _on_signal)
    wakeup, ended = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_end_in_time, args=(reader, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread, which closes the other end
        _state.update(held=False, asked=False)


def _on_signal(number, frame) -> None:
    first, _state["asked"] = not _state["asked"], True
    if first and _state["held"]:
        return
    raise KeyboardInterrupt


def _end_in_time(reader: int, ended: threading.Event) -> None:
    """Wait for a signal, then GRACE_S seconds for its effect."""
    with open(reader, "rb", buffering=0) as pipe:
        while received := pipe.read(1):
            if received[0] in (signal.SIGTERM, signal.SIGINT):
                if not ended.wait(GRACE_S):
                    print("graft: stopped; what was saved before is whole.", file=sys.stderr, flush=True)
                    os._exit(EXIT_CODE)
                return


@contextlib.contextmanager
def held():
    """Within, the first signal only makes `stop_asked` true, and takes effect at the end; a second one does at once."""
    _state["held"] = True
    try:
        yield
    finally:
        _state["held"] = False
    if _state["asked"]:
        raise KeyboardInterrupt


def stop_asked() -> bool:
    return _state["asked"]


def leave_at_once() -> None:
    """From now on `exit_code` ends the process where it would be told to stop, without what Python does at its end."""
    _state["leaves_at_once"] = True


def exit_code(code: int) -> int:
    """The exit code of a command; see `leave_at_once`."""
    if code == EXIT_CODE and _state["leaves_at_once"]:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
