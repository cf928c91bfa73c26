"""The conversation of `run.py --chat`, in a terminal or through pipes."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_jax.checkpoint import memory_file
from gemma_jax.errors import GemmaError, OutOfMemoryError, UsageError
from gemma_jax.inference import notices
from gemma_jax.inference.chat import Chat
from gemma_jax.inference.console import Console, as_gemma_error
from gemma_jax.inference.saving import load_reading

HELP = """\
/save FILE   keep the conversation in a memory file
/load FILE   go on with one (or ask a memory that --save-memory wrote)
/reset       forget what was said, back to the beginning
/stats       how much was read and written, and how fast
/help        this
/quit        leave (or Ctrl-D)
Several lines: end each but the last with \\, or put them between two lines of \"\"\".
Ctrl-C stops an answer; what was written stays part of the conversation."""
WELCOME = "Say something; /help lists the commands, /quit leaves."
PROMPT, MORE = "> ", ". "
FENCE = '"""'


class Leave(Exception):
    """The user wants to leave."""


class Terminal:
    """Reads what a user types, and prints what the model answers."""

    def __init__(self, chat: Chat, model: Any, console: Console, *, verify: bool = True):
        self._chat, self._model, self._console, self._verify = chat, model, console, verify
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/stats": self._stats,
            "/help": lambda _: self._say(HELP),
            "/quit": self._quit,
        }

    def run(self) -> None:
        """Talks until the user leaves, or there is no more input."""
        self._console.line(WELCOME)
        with contextlib.suppress(EOFError, Leave):
            while True:
                try:
                    self._turn(self._message())
                except KeyboardInterrupt:
                    self._say("\n(stopped; /quit leaves)")
                except OutOfMemoryError:
                    raise
                except GemmaError as error:
                    self._say(f"error: {error}")

    def _turn(self, message: str) -> None:
        name, _, argument = message.strip().partition(" ")
        if name.startswith("/") and "\n" not in message:
            command = self._commands.get(name)
            if command is None:
                raise UsageError(f"{name} is no command: /help lists them.")
            command(argument.strip())
        elif name:
            self._answer(message)

    def _answer(self, message: str) -> None:
        with self._stops_at_ctrl_c():
            try:
                for piece in self._chat.say(message):
                    print(piece, end="", flush=True)
            except (GemmaError, KeyboardInterrupt, BrokenPipeError):
                raise
            except Exception as error:
                raise as_gemma_error(error) from error
            finally:
                print(flush=True)

    @contextlib.contextmanager
    def _stops_at_ctrl_c(self) -> Iterator[None]:
        """Ctrl-C ends the answer; before it has begun, it takes the message back."""

        def stop(number: int, frame: Any) -> None:
            if not self._chat.is_writing:
                raise KeyboardInterrupt
            self._chat.stop()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # --- commands ---

    def _save(self, path: str) -> None:
        memory_file.save(_named(path, "/save"), self._chat.memory, self._model)
        self._say(notices.saved(path, self._chat.memory))

    def _load(self, path: str) -> None:
        memory = load_reading(_named(path, "/load"), self._model, verify=self._verify)
        self._chat.memory = memory
        self._say(notices.loaded(path, memory))

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._say("(forgotten)")

    def _stats(self, _: str) -> None:
        self._say(notices.conversation(self._model.config, self._chat))

    def _quit(self, _: str) -> None:
        raise Leave

    # --- lines ---

    def _message(self) -> str:
        """What the user says next, of one line or several."""
        line = self._line(PROMPT)
        if line.strip() == FENCE:
            return "\n".join(iter(lambda: self._line(MORE), FENCE))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        if sys.stdin is None:
            raise EOFError
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` arrows and a history
            try:
                return input(prompt)
            except EOFError:
                self._say("")  # the terminal's line is not ended yet
                raise
        if sys.stdin.isatty():
            self._say(prompt, end="")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def _say(self, text: str, end: str = "\n") -> None:
        """Something that was asked for, which is no answer."""
        if sys.stderr is not None:
            print(text, end=end, file=sys.stderr, flush=True)


def _named(path: str, command: str) -> Path:
    if not path:
        raise UsageError(f"{command} needs the name of a file: {command} talk.mem")
    return Path(path)
