"""The documentation as its reader uses it: what it says is done in this process, in a directory of its own.

What a command names and a reader brings along (a model, a book) is put in its place as something
tiny, budgets are capped, and that is all that is changed.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from documented import PYTHONS, ROOT, SHELLS, Block, Command, commands, reason_not_run

from gemma_jax import PRESETS, random_model
from gemma_jax.checkpoint import store
from gemma_jax.checkpoint.convert import convert

COPIED = "benchmarks"  # where commands write; other directories are linked where commands run
NOT_OURS = {"__pycache__", "checkpoints"}  # and what begins with a dot
# The largest number that an option keeps.
CAPS = {
    "--lengths": 700,
    "--tokens": 400,
    "--new-tokens": 2,
    "--max-new-tokens": 4,
    "--batch-size": 2,
    "--trials": 1,
    "--questions": 1,
    "--haystacks": 1,
    "--length": 300,
    "--steps": 1,
    "--minutes": 0.01,
    "--probe-lengths": 700,
    "--probe-steps": 1,
}
# Options whose defaults take long, by command.
BESIDES = {
    "run.py": {"--max-new-tokens": "4"},
    "gemma_jax.benchmark": {"--repeats": "1"},
    "gemma_jax.train": {
        "--segments": "4",
        "--tokens-per-step": "512",
        "--probe-questions": "1",
        "--data-workers": "0",
    },
}
GRID = {"--trials": "1", "--depths": "50", "--batch-size": "1"}  # of evaluate without --text
# Arguments that a command makes, so that they are not there before.
MAKES = {"convert_weights.py": 1, "benchmarks.random_huggingface": 1}

SEGMENT = 128  # tokens: so short that some leave sight in short texts
WORDS = "the people called him and there was no water in the first place but a long way down. "
TEXT = "".join(WORDS[i:] + WORDS[:i] for i in range(0, 60, 2))
QUESTIONS = '"who was it"\n{"id": 7, "prompt": "and where", "max_new_tokens": 3}\n'


@dataclasses.dataclass(frozen=True)
class Belongings:
    """The tiny model, as Hugging Face has it and as we have it."""

    huggingface: Path
    checkpoint: Path

    @classmethod
    def make(cls, directory: Path) -> "Belongings":
        source = random_model.write_hugging_face(directory / random_model.NAME)
        keep_one_layer(source)
        made = directory / "checkpoint"
        config = convert(source, made, dtype="float32").config
        (made / store.CONFIG).write_text(config.with_memory(segment_length=SEGMENT).to_json())
        store.write_manifest(made)
        return cls(source, made)

    @property
    def preset(self) -> Any:
        """In place of Gemma 2B's shape."""
        return dataclasses.replace(store.read_config(self.checkpoint), name="gemma-2b")

    @property
    def stand_ins(self) -> dict[str, Path | str]:
        """What lies at each place: a link to a directory, or a file of this content.

        Other names of texts are stood in for as well.
        """
        return {
            "CHECKPOINT": self.checkpoint,
            "HF_DIRECTORY": self.huggingface,
            "checkpoints/gemma-3-270m": self.checkpoint,
            "google/gemma-3-270m": self.huggingface,
            "questions.jsonl": QUESTIONS,
            "small.json": dataclasses.replace(
                self.preset.with_memory(rule="gated_delta"), vocab_size=4096
            ).to_json(),
            "books/*.txt": TEXT,
        }


def keep_one_layer(directory: Path) -> None:
    """Removes from a Hugging Face model all layers but the first: what is left compiles faster."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = safetensors.numpy.load_file(file)
    first = re.compile(r"(?!model\.layers\.)|model\.layers\.0\.")
    kept = {name: tensor for name, tensor in tensors.items() if first.match(name)}
    safetensors.numpy.save_file(kept, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))


class Desk:
    """A directory like the repository's, in which one page is worked through."""

    def __init__(self, directory: Path, belongings: Belongings, patch: pytest.MonkeyPatch):
        self._directory, self._belongings, self._patch = directory, belongings, patch
        self._names: dict[str, Any] = {}  # of the page's Python
        for path in ROOT.iterdir():
            if path.name.startswith(".") or path.name in NOT_OURS:
                continue
            if path.is_file():
                shutil.copy(path, directory)
            elif path.name == COPIED:
                shutil.copytree(path, directory / path.name)
            else:
                (directory / path.name).symlink_to(path)
        patch.chdir(directory)
        patch.syspath_prepend(str(directory))
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        patch.setattr("gemma_jax.tasks.haystacks.shipped", lambda split: [self._book()])

    def _book(self) -> str:
        """In place of the books that come with the package."""
        (self._directory / "shipped.txt").write_text(TEXT)
        return str(self._directory / "shipped.txt")

    def do(self, block: Block, given: Mapping[str, Any]) -> None:
        """Does what a block says; `given` are names that its Python takes for granted.

        Raises:
            ValueError: it cannot be done, or is not understood.
        """
        if block.kind in SHELLS:
            for command in block.commands:
                self.run(command)
        elif block.kind == "python":
            self._execute(block, given)
        elif block.kind == "toml":  # its first line may say behind its name what is done with it
            self._write(block, r"# ([\w.]+)")
            for command in commands(block.text.splitlines()[0].partition(": ")[2]):
                self.run(command)
        elif block.kind != "text":
            raise ValueError(f"blocks of {block.kind} are not understood")
        elif any(line.startswith(PYTHONS) for line in block.text.splitlines()):
            raise ValueError("a block of text has a command in it")

    # --- Python ---

    def _execute(self, block: Block, given: Mapping[str, Any]) -> None:
        if block.text.startswith('"""') and ".py:" in block.text.splitlines()[0]:
            self._write(block, r'"""(\S+):')
            return
        self._put_what_is_named(block.text, making="")
        self._names = dict(given) | self._names
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = compile("\n" * block.line + block.text, str(block.page), "exec")
            exec(code, self._names)
        expected = re.findall(r"^print\(.*\)  # (.+)$", block.text, re.MULTILINE)
        if expected and said.getvalue().splitlines() != expected:
            raise ValueError(f"it prints {said.getvalue()!r}, and not {expected}")

    def _write(self, block: Block, name: str) -> None:
        """Writes a block as the file that its first line names."""
        found = re.match(name, block.text)
        if found is None:
            raise ValueError("its first line does not say which file this is")
        text = block.text
        for option, most in CAPS.items():
            option = option.removeprefix("--")
            text = re.sub(
                rf"^({option} = )(.*)$",
                lambda m, most=most: m[1] + cap(m[2], most),
                text,
                flags=re.M,
            )
        (self._directory / found[1]).write_text(text)

    # --- commands ---

    def run(self, command: Command) -> None:
        """Runs a command, or parses its options if it is one of those that are not run.

        Raises:
            ValueError: it did not end well.
        """
        if reason_not_run(command):
            self.parse(command)
            return
        if command.program is None:
            raise ValueError(f"{command.words[0]} is no program that can be run here")
        if "--resume" in command.words:
            self._interrupt(command)
        arguments = small(command)
        making = self._remove_what_is_made(command)
        self._put_what_is_named(" ".join(command.words), making)
        with self._patch.context() as patch, contextlib.ExitStack() as stack:
            patch.setitem(PRESETS, "gemma-2b", self._belongings.preset)
            for name, value in command.sets.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.StringIO("who was it\n/stats\n/quit\n"))
            if command.output:
                stack.enter_context(
                    contextlib.redirect_stdout(stack.enter_context(open(command.output, "w")))
                )
            code = start(command.program, arguments, module="-m" in command.words[:2], patch=patch)
        if code:
            raise ValueError(f"`{command}` ended with {code}")

    def parse(self, command: Command) -> None:
        """Parses the options of a command, and looks whether the files are there that pytest is given."""
        if command.program is None:
            return
        if command.program == "pytest":
            for word in command.arguments:
                if word.endswith(".py") and not (ROOT / word).is_file():
                    raise ValueError(f"{word} does not exist")
            return
        if not command.arguments:
            options_of(command.program, command.words[1] == "-m")
            return
        with self._patch.context() as patch:
            parser, code = parser_of(
                command.program, command.arguments, command.words[1] == "-m", patch
            )
        if parser is None and code:
            raise ValueError(f"the options of `{command}` cannot be parsed ({code})")

    def _interrupt(self, command: Command) -> None:
        """Leaves behind what `--resume` goes on with: the same command, stopped by Ctrl-C."""
        import run
        from gemma_jax.inference.saving import Autosave

        at = command.words.index("--resume")
        words = list(command.words[2:at] + command.words[at + 2 :])
        asked: list[bool] = []

        def due(autosave: Autosave) -> bool:
            asked.append(True)
            autosave.interrupted = len(asked) == 2
            return autosave.interrupted

        with self._patch.context() as patch:
            patch.setattr(Autosave, "due", due)
            if run.main(words) != 130 or not Path(command.words[at + 1]).is_file():
                raise ValueError(f"`{command}` has nothing to go on with")

    def _remove_what_is_made(self, command: Command) -> str:
        place = MAKES.get(command.program)
        if place is None:
            return ""
        made = [word for word in command.arguments if not word.startswith("-")][place]
        path = self._directory / made
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        return made

    def _put_what_is_named(self, text: str, making: str) -> None:
        texts = dict.fromkeys(re.findall(r"(?<![\w/*.-])[\w-]+\.txt\b", text), TEXT)
        for name, content in (self._belongings.stand_ins | texts).items():
            path = self._directory / name.replace("*", "one")
            if name == making or name not in text or path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content) if isinstance(content, str) else path.symlink_to(content)


def small(command: Command) -> list[str]:
    """The arguments of a command with its budgets capped, and small ones where defaults are large."""
    found, option = [], ""
    for word in command.arguments:
        if word.startswith("--"):
            option = word
        found.append(cap(word, CAPS[option]) if option in CAPS and word != option else word)
    besides = BESIDES.get(command.program, {})
    if command.program == "gemma_jax.evaluate" and "--text" not in found:
        besides = GRID
    for option, value in besides.items():
        if option not in found:
            found += [option, value]
    return found


def cap(value: str, most: float) -> str:
    """The value of an option with no number in it that is larger than `most`: `4K,1M`, `4:32`."""

    def capped(found: re.Match[str]) -> str:
        scale = {"K": 1024, "M": 1_000_000}.get(found[2], 1)
        return found[0] if float(found[1]) * scale <= most else str(most)

    return re.sub(r"(\d+(?:\.\d+)?)([KM]?)", capped, value)


# --- programs -------------------------------------------------------------------------------------


def start(
    program: str, arguments: Sequence[str], *, module: bool, patch: pytest.MonkeyPatch
) -> int:
    """Runs a script or module as Python's command line does, in this process; gives its exit code."""
    patch.setattr(sys, "argv", [program, *arguments])
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


class _Parsed(BaseException):
    pass


def parser_of(
    program: str, arguments: Sequence[str], module: bool, patch: pytest.MonkeyPatch
) -> tuple[Any, int | None]:
    """The parser that a program parses these arguments with, or None and its exit code."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: Any, *given: Any) -> None:
        parse_args(self, *given)
        raise _Parsed(self)

    patch.setattr(argparse.ArgumentParser, "parse_args", parse)
    try:
        return None, start(program, arguments, module=module, patch=patch)
    except _Parsed as parsed:
        return parsed.args[0], None


def options_of(program: str, module: bool, arguments: Sequence[str] = ()) -> set[str]:
    """The options that a program knows."""

    def show(self: Any, *given: Any) -> None:
        raise _Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", show)
        try:
            start(program, arguments, module=module, patch=patch)
        except _Parsed as parsed:
            return set(parsed.args[0]._option_string_actions)
    raise ValueError(f"{program} parses no options")


def files_of_the_repository() -> dict[str, int | None]:
    """Every file of the repository but caches; of those where commands write, when it was changed."""
    found: dict[str, int | None] = {}
    for directory, inside, files in os.walk(ROOT):
        inside[:] = [name for name in inside if name[0] != "." and name not in NOT_OURS]
        copied = Path(directory).is_relative_to(ROOT / COPIED)
        for path in (Path(directory) / name for name in files):
            found[str(path)] = path.stat().st_mtime_ns if copied else None
    return found
