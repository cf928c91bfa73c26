"""The pages of the documentation, the blocks in them, and the commands in those."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
RECORDS = [page for page in sorted(ROOT.glob("benchmarks/*.md")) if page not in PAGES]
SHELLS = ("", "console")  # kinds of blocks that hold commands
PYTHONS = ("python", "python3", ".venv/bin/python")
# Commands that are not run, by what is in them. Their options are parsed all the same.
NOT_RUN = {
    "-m venv ": "makes an environment: .ci/run does, with this very command",
    "pip install ": "downloads packages: .ci/run does, with this very command",
    "-m pytest ": "tests",
    "-m gemma_jax.demo": "takes a minute: tests/demo runs it",
    "-m benchmarks.ablation ": "trains many models: tests/benchmark/test_ablation.py trains few",
    "-m benchmarks.ask_again": "reads a million tokens: tests/benchmark/test_ask_again.py reads few",
    "-m benchmarks.book_questions": "reads a million tokens: tests/benchmark reads few",
    "-m benchmarks.resident_memory": "watches for minutes: tests/benchmark watches for seconds",
    " --adapter gemma_jax/adapters": "needs the weights it was trained for: tests/test_real_weights.py",
    "--model checkpoints/demo-9m-stories": "takes a GPU and 14 minutes to make",
    "--model checkpoints/stories": "likewise, 5.5 of them",
    " --peer ": "needs torch",
    " --verify": "needs torch",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences of a page; `kind` is what is said behind the first."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def commands(self) -> tuple["Command", ...]:
        """Of a session (kind `console`) those behind a `$`; the rest of it is what they said."""
        text = self.text
        if self.kind == "console":
            joined = re.sub(r"\\\n", " ", text)
            lines = [line for line in joined.splitlines() if line.startswith("$ ")]
            text = "\n".join(line.removeprefix("$ ") for line in lines)
        return tuple(commands(text)) if self.kind in SHELLS else ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for number, kind, text in _parts(page):
        if kind is not None:
            yield Block(page, number, kind, text)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return "\n".join(text for _, kind, text in _parts(page) if kind is None)


def _parts(page: Path) -> Iterator[tuple[int, str | None, str]]:
    parts = re.split(r"^ *```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(parts) % 4 == 1, f"{page} has a fence that is not closed"
    line = 1
    for i, part in enumerate(parts):
        if i % 2 == 0:  # between them stands what is said behind a fence
            yield line, parts[i - 1] if i % 4 == 2 else None, part
            line += part.count("\n") + 1


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a shell: what it sets, its words, and where its output goes."""

    words: tuple[str, ...]
    sets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    output: str | None = None

    @property
    def program(self) -> str | None:
        """The script or module that Python runs."""
        if self.words[0] not in PYTHONS:
            return None
        return self.words[2] if self.words[1] == "-m" else self.words[1]

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.words[3:] if self.words[1] == "-m" else self.words[2:]

    def __str__(self) -> str:
        return " ".join(self.words)


def commands(text: str) -> Iterator[Command]:
    """The commands of a block, or of a line.

    Raises:
        ValueError: something that is not understood.
    """
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>;")
        lexer.whitespace_split = True
        words = list(lexer)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield _command(words[:end])
            words = words[end + 1 :]


def _command(words: list[str]) -> Command:
    sets = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        sets[name] = value
    if words[:2] == ["/usr/bin/time", "-v"]:
        words = words[2:]
    output = None
    if words[-2:-1] == [">"]:
        *words, _, output = words
    if unknown := [word for word in words if re.fullmatch(r"[&|<>;]+", word)]:
        raise ValueError(f"{unknown[0]} is not understood")
    return Command(tuple(words), sets, output)


def reason_not_run(command: Command) -> str | None:
    """Why a command is not run, None if it is."""
    return next((reason for part, reason in NOT_RUN.items() if part in f"{command} "), None)
