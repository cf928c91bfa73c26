"""A long reading that is saved now and then, and when it is interrupted."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax import text as text_lib
from gemma_jax.checkpoint import memory_file
from gemma_jax.checkpoint.memory_file import Memory
from gemma_jax.errors import GemmaError, InputError, UsageError
from gemma_jax.inference.console import INTERRUPTED
from gemma_jax.inference.reading import read
from gemma_jax.model.state import State

DEFAULT_SECONDS = 300.0
SUFFIX = ".partial.mem"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user wants to leave; the message says what was kept."""


class Autosave:
    """Saves a reading at an interval; as a context, also when it is interrupted.

    Within the context the first Ctrl-C (or SIGTERM) lets the piece that is being read be finished
    and saved; the second leaves at once.
    """

    def __init__(
        self,
        path: Path,
        model: Any,
        *,
        seconds: float = DEFAULT_SECONDS,
        say: Callable[[str], None] = lambda text: None,
    ):
        """`say` is given sentences for the user."""
        self.path = path
        self.interrupted = False
        self._model, self._seconds, self._say = model, seconds, say
        self._next = time.monotonic() + seconds
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Autosave":
        self._before = {number: signal.signal(number, self._interrupt) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.interrupted or time.monotonic() >= self._next

    def keep(self, memory: Memory | None) -> None:
        """Saves; a disk that is full costs a warning, as long as the reading goes on.

        Raises:
            Interrupted: the reading was interrupted, and is saved.
            InputError: it was interrupted, and cannot be saved.
        """
        if memory is None:
            if self.interrupted:
                raise Interrupted("interrupted before anything was read; nothing was saved.")
            return
        try:
            memory_file.save(self.path, memory, self._model)
        except GemmaError as error:
            if self.interrupted:
                raise
            self._say(f"the reading goes on, but is not saved: {error}")
        self._next = time.monotonic() + self._seconds
        if self.interrupted:
            raise Interrupted(
                f"interrupted: {memory.tokens} tokens are kept in {self.path}. Go on with:\n"
                f"  {command_to_go_on(sys.argv, self.path)}"
            )

    def remove(self) -> None:
        """Removes what was saved, when all is read and answered."""
        self.path.unlink(missing_ok=True)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            os._exit(INTERRUPTED)
        self.interrupted = True
        self._say("interrupted: this piece is finished and saved; once more leaves at once.")


def load_reading(path: str, model: Any, *, resume: bool = False, verify: bool = True) -> Memory:
    """A memory file of one text: with `resume` one that was interrupted, else a complete one.

    Raises:
        UsageError: it is the other, or holds a batch.
        InputError, CorruptError: as `memory_file.load`.
    """
    memory = memory_file.load(path, model, verify=verify)
    if memory.unread is not None and not resume:
        raise UsageError(f"{path} was not read to its end: go on with --resume {path}.")
    if memory.unread is None and resume:
        raise UsageError(f"{path} was read to its end: ask it with --load-memory {path}.")
    if (rows := memory.state.length.shape[0]) != 1:
        raise UsageError(f"{path} holds {rows} texts: load it from Python, with load_state.")
    return memory


def save_state(path: str | Path, state: State, *, model: Any, logits: Any = None) -> None:
    """Writes a State to a memory file.

    Args:
        path: the file; it is replaced when the new one is whole.
        state: of any batch size; it is not consumed.
        model: what it belongs to.
        logits: [B, V] float32 of what comes next, to be had back with it.

    Raises:
        InputError: the file cannot be written.
    """
    memory_file.save(path, Memory(state, logits), model)


def load_state(
    path: str | Path, model: Any, *, verify: bool = True
) -> tuple[jax.Array | None, State]:
    """The logits of what comes next, and the State, of a memory file: bit by bit what was saved.

    Of a file that `run.py` wrote, the last tokens are read first, as if the text ended there.

    Raises:
        InputError: there is no such file, or its sources were not read to their end.
        CorruptError: it is not as it was written.
        UsageError: it belongs to another model.
    """
    memory = memory_file.load(path, model, verify=verify)
    if memory.unread is not None:
        raise InputError(f"{path} was not read to its end: go on with run.py --resume {path}.")
    ids = [*memory.ids, *text_lib.encode(model.tokenizer, memory.text)]
    if ids:
        reading = read(model, [ids], memory.state)
        return reading.logits, reading.state
    return None if memory.logits is None else jnp.asarray(memory.logits), memory.state


def autosave_path(resume: str | None, save_memory: str | None, context: list[str]) -> Path:
    """Where a reading is saved that is not complete, by the options of the command line."""
    if resume:
        return Path(resume)
    if save_memory:
        return Path(save_memory).with_suffix(SUFFIX)
    first = next((file for file in context if file != "-"), "reading")
    return Path(Path(first).name).with_suffix(SUFFIX)


def command_to_go_on(arguments: list[str], path: Path) -> str:
    """The command line that goes on with a saved reading: the same, and where it was saved."""
    return shlex.join(
        [
            "python",
            *_without(arguments, "--resume", "--load-memory"),
            "--resume",
            str(path),
        ]
    )


def _without(arguments: list[str], *options: str) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in options:
            kept.append(argument)
        skip = argument in options
    return kept
