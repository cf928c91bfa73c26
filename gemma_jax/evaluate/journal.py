"""Every finished trial on disk at once, so that an interrupted grid goes on where it stopped.

The journal is lines of JSON: the settings of the grid, then trials and readings as they are finished,
and settings that came later (a peer, say, that the first command did not have).
A line that was cut off by a kill is dropped.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from gemma_jax.errors import InputError, UsageError

JOURNAL = "trials.jsonl"
Key = tuple[str, str, int]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One question and what became of it; what is not known is None."""

    setting: str  # "ours", "off" (our model with memory off) or "hf"
    task: str
    tokens: int  # the length that was asked for
    depth: float
    haystack: str
    question: int  # of its haystack
    seed: int  # of its haystack
    expected: tuple[str, ...]
    answered: str | None = None
    score: float | None = None
    tokens_read: int | None = None  # haystack and question, with BOS
    distance: int | None = None  # from the end of the latest fact that is needed to the end
    within_reach: bool | None = None  # local attention alone might reach it
    repeated_share: float | None = None  # of the haystack
    text_sha256: str | None = None  # of the ids that were read
    failed: str | None = None  # why there is no answer

    @property
    def key(self) -> Key:
        return self.setting, self.haystack, self.question

    @property
    def correct(self) -> bool | None:
        return None if self.score is None else self.score >= 1


@dataclasses.dataclass(frozen=True)
class Reading:
    """What it took to read one group of haystacks and to answer what was asked."""

    setting: str
    tokens: int
    seconds: float
    compose_seconds: float
    answer_tokens: int
    answer_seconds: float
    peak_bytes: int | None  # of device memory, in the process until then
    device: str | None = None


class Journal:
    """The journal of a directory; it is read when it is opened.

    Attributes:
        trials: those finished so far, by key; failed ones are not among them.
        failed: those that failed, by key, as long as they have not been tried again.
        readings: as they were finished.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, must_exist: bool = False):
        """Opens the journal, or begins one.

        Raises:
            UsageError: it belongs to other settings; or `must_exist` and there is none.
            InputError: it cannot be read or written.
        """
        self.trials: dict[Key, Trial] = {}
        self.failed: dict[Key, Trial] = {}
        self.readings: list[Reading] = []
        self.path = directory / JOURNAL
        settings = json.loads(json.dumps(settings))
        if not self.path.exists():
            if must_exist:
                raise UsageError(f"{directory} has nothing to resume: leave --resume out.")
            directory.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_line("settings", settings), encoding="utf-8")
        else:
            self._read(settings)
        self._file: TextIO = open(self.path, "a", encoding="utf-8")

    def add(self, finished: Iterable[Trial | Reading]) -> None:
        """Notes what was finished; it is on disk when this returns.

        Raises:
            InputError: the disk does not take it.
        """
        lines = []
        for item in finished:
            self._note(item)
            lines.append(_line(type(item).__name__.lower(), dataclasses.asdict(item)))
        try:
            self._file.write("".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}): make room, and the same command"
                " goes on from here."
            ) from error

    def close(self) -> None:
        self._file.close()

    def _note(self, item: Trial | Reading) -> None:
        if isinstance(item, Reading):
            self.readings.append(item)
            return
        self.failed.pop(item.key, None)
        (self.failed if item.failed else self.trials)[item.key] = item

    def _read(self, settings: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        try:
            lines = [json.loads(line) for line in data[:whole].splitlines()]
            found = dict(lines[0]["settings"]) if lines else {}
            for line in lines[1:]:
                if "trial" in line:
                    fields = line["trial"]
                    self._note(Trial(**fields | {"expected": tuple(fields["expected"])}))
                elif "reading" in line:
                    self._note(Reading(**line["reading"]))
                else:
                    found |= line["settings"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path} is no journal of this command ({error}): choose another --output."
            ) from error
        for name, value in settings.items():
            if name in found and found[name] != value:
                raise UsageError(
                    f"{self.path.parent} holds trials of other settings ({name} was"
                    f" {_short(found[name])}, now {_short(value)}): choose another --output."
                )
        if more := {name: value for name, value in settings.items() if name not in found}:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line("settings", more))


def _line(kind: str, content: Mapping[str, Any]) -> str:
    return json.dumps({kind: content}, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
