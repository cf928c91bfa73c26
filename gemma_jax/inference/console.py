"""What a command tells its user on standard error, and the exit code it ends with."""

import argparse
import contextlib
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from gemma_jax.errors import GemmaError, InputError, OutOfMemoryError
from gemma_jax.inference.progress import Progress

PLAIN_INTERVAL_SECONDS = 10.0  # between progress lines where standard error is not a terminal
INTERRUPTED = 130
AGAIN_SECONDS = 0.01  # until an interruption is sent again


class ArgumentParser(argparse.ArgumentParser):
    """Says what is wrong with the options in one sentence, without the usage in front of it."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help).\n")


def number(kind: Callable[[str], Any]) -> Callable[..., Callable[[str], Any]]:
    """Makes argument types: `number(int)(1)` accepts whole numbers from 1."""

    def within(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], Any]:
        def convert(text: str) -> Any:
            try:
                value = kind(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r} is not a number of this kind") from None
            least = value > low if above else value >= low
            if not (least and value <= high) or value == math.inf:  # NaN is within nothing
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                limits = f"above {low} and at most {high}" if above else limits
                raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {limits}")
            return value

        return convert

    return within


def count(text: str) -> int:
    """`10M` is ten million, `8K` is 8,192."""
    scale = {"K": 1024, "M": 1_000_000}.get(text[-1:].upper(), 1)
    number = int(float(text[: -1 if scale > 1 else None]) * scale)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: it must be at least 1")
    return number


class Console:
    """Lines, warnings and a progress bar on standard error; with `quiet` only warnings, with `debug`
    also tracebacks of errors that end nothing.
    """

    def __init__(self, *, quiet: bool = False, debug: bool = False):
        self._quiet, self._debug = quiet, debug
        self._bar: Any = None
        self._warned: set[str] = set()
        self._next_line = time.monotonic() + PLAIN_INTERVAL_SECONDS

    def line(self, text: str) -> None:
        """Says something that may be missed."""
        if not self._quiet:
            self._print(text)

    def warning(self, text: str | None) -> None:
        """Says, once, something that must not be missed; None is nothing."""
        if text and text not in self._warned:
            self._warned.add(text)
            self._print(f"warning: {text}")

    def passed_over(self, error: BaseException) -> None:
        """Shows, with `debug`, where an error came from that the command goes on after."""
        if self._debug:
            self._print("".join(traceback.format_exception(error)).rstrip())

    def progress(self, progress: Progress) -> None:
        """Shows how far the reading is."""
        self.show(describe(progress), progress.tokens, progress.total_tokens)

    def show(self, what: str, done: int, total: int | None) -> None:
        """Shows how far something is: a bar in a terminal, a line now and then elsewhere."""
        if self._quiet:
            return
        if sys.stderr is not None and sys.stderr.isatty():
            self._show_bar(what, done, total)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_INTERVAL_SECONDS
            self._print(what)

    def end_progress(self) -> None:
        """Removes the bar, before something else is written to the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, what: str, done: int, total: int | None) -> None:
        from rich import progress as rich_progress
        from rich.console import Console as RichConsole

        if self._bar is None:
            self._bar = rich_progress.Progress(
                rich_progress.BarColumn(),
                rich_progress.TextColumn("{task.description}"),
                console=RichConsole(stderr=True),
                transient=True,
            )
            self._bar.add_task("", total=None)
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            completed=done,
            total=total,
            description=what,
        )

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif sys.stderr is not None:
            with contextlib.suppress(BrokenPipeError):  # nobody reads it; the answer goes on
                print(text, file=sys.stderr, flush=True)


def describe(progress: Progress) -> str:
    """Progress as a phrase: `reading 4096 of about 290000 tokens, 7100 tokens/s, 40 s left`."""
    rate, left = progress.tokens_per_second, progress.seconds_left
    return (
        f"reading {progress.tokens}"
        + ("" if progress.total_tokens is None else f" of about {progress.total_tokens}")
        + " tokens"
        + ("" if rate is None else f", {rate:.0f} tokens/s")
        + ("" if left is None else f", {duration(left)} left")
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(number_of_bytes: int) -> str:
    """Bytes as people say them: `1.5 GB`, `870 kB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.3g} {unit}"
    return f"{number_of_bytes} bytes"


def run_command(command: Callable[[], None], *, debug: bool = False) -> int:
    """Runs a command and returns its exit code; what goes wrong becomes one sentence on standard
    error.

    A reader that closes the output pipe has what it wanted: that ends quietly, with 0.
    """
    if not debug:  # Orbax logs a traceback before it raises
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # closed by the caller
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of the answer
    try:
        with interruptible():
            command()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The interpreter flushes standard output once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interruption:
        print(str(interruption) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = as_gemma_error(error)
        print(f"error: {known}", file=sys.stderr)
        return known.exit_code


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Loses no Ctrl-C: what is raised in a callback of the garbage collector, of which JAX has one, is
    thrown away, so an interruption that comes in there is sent again.
    """

    def interrupt(number: int, frame: Any) -> None:
        callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame is not None:
            if frame.f_code in callbacks:
                threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """Ends the process; where it was interrupted, or a thread of ours is still at work, at once: it may be
    deep in compiled code.
    """
    busy = any(thread.name.startswith("gemma_jax") for thread in threading.enumerate())
    if code == INTERRUPTED or busy:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def as_gemma_error(error: Exception) -> GemmaError:
    """The error that a user is shown for any exception."""
    if isinstance(error, GemmaError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)
        return InputError(f"{error.filename or 'A file'} cannot be read or written ({reason}).")
    if "No space left on device" in str(error):  # said by a library, in an error of its own
        return InputError("The disk is full: free some of it, or choose another place.")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return OutOfMemoryError(
            "Out of memory: the weights, the State and one piece of text do not fit; try a shorter"
            " --segment-length, a model converted with --quantize int8, or a smaller one."
        )
    first_line = next(iter(str(error).splitlines()), "")
    return GemmaError(
        f"Internal error ({type(error).__name__}: {first_line}): run again with --debug for the"
        " details."
    )
