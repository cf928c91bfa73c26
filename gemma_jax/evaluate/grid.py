"""Runs the trials of a grid that are not finished yet, and notes each in the journal."""

import collections
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gemma_jax.evaluate.haystack import Haystack, Text
from gemma_jax.evaluate.journal import Journal, Reading, Trial
from gemma_jax.evaluate.plan import Grid, Group
from gemma_jax.inference.console import Console, as_gemma_error, duration
from gemma_jax.inference.progress import Progress

NOT_RUN = "not run"  # how the reason of a trial begins that was too long for the peer
NOT_FINITE = "the model computed numbers that are not finite"

Batch = list[tuple[Haystack, int]]  # haystacks, with the number of a question
Cell = tuple[str, str, int, float]  # setting, task, tokens, depth


class Clock:
    """Tells how far a grid is, on standard error, cell by cell."""

    def __init__(self, grid: Grid, settings: Iterable[str], journal: Journal, console: Console):
        self._console, self._journal = console, journal
        self._cells: dict[Cell, list[Any]] = collections.defaultdict(list)
        for setting in settings:
            for trial in blank_trials(grid, setting):
                self._cells[_cell(trial)].append(trial.key)
        self._told = {cell for cell in self._cells if self._finished(cell)}
        self._start, self._done, self._total = time.perf_counter(), 0, 0

    def begin(self, tokens: int) -> None:
        """So many tokens are going to be read."""
        self._start, self._done, self._total = time.perf_counter(), 0, tokens

    def advance(self, tokens: int) -> None:
        """So many more were read."""
        self._done += tokens
        self._console.progress(
            Progress(self._done, self._total, self._rate, self._left() if self._rate else None)
        )

    def failed(self, error: Exception) -> None:
        """Trials failed because of it."""
        self._console.passed_over(error)

    def tell(self) -> None:
        """Says which cells were finished since it was asked last."""
        for cell, keys in self._cells.items():
            if cell in self._told or not self._finished(cell):
                continue
            self._told.add(cell)
            journal = self._journal
            trials = [journal.trials[key] for key in keys if key in journal.trials]
            reasons = [journal.failed[key].failed for key in keys if key in journal.failed]
            not_run = sum(reason.startswith(NOT_RUN) for reason in reasons)
            failed = len(reasons) - not_run
            score = sum(trial.score for trial in trials)
            setting, task, tokens, depth = cell
            self._console.line(
                f"{task}, {tokens} tokens, depth {100 * depth:g}%, {setting}:"
                f" {score:g} of {len(trials)} right"
                + (f", {failed} failed" if failed else "")
                + (f", {not_run} not run" if not_run else "")
                + (f"; {duration(left)} left" if (left := self._left()) else "")
            )

    @property
    def _rate(self) -> float | None:
        seconds = time.perf_counter() - self._start
        return self._done / seconds if self._done and seconds > 0 else None

    def _left(self) -> float | None:
        return (self._total - self._done) / self._rate if self._rate else None

    def _finished(self, cell: Cell) -> bool:
        journal = self._journal
        return all(key in journal.trials or key in journal.failed for key in self._cells[cell])


def run(
    grid: Grid,
    readers: dict[str, Any],
    journal: Journal,
    console: Console,
    within: int,
    skip: Callable[[Group], str | None] = lambda group: None,
) -> None:
    """Runs what is unfinished of each setting; a trial that cannot be run is noted as failed.

    Args:
        readers: `running.Reader` by name of the setting.
        within: facts that end fewer tokens before the end may be known by local attention alone.
        skip: gives the reason when a group is not to be run after all.
    """
    clock = Clock(grid, readers, journal, console)
    todo = [
        (group, setting, batches)
        for group in grid.groups
        for setting, reader in readers.items()
        if (batches := unfinished(group, setting, reader.rows, journal))
    ]
    for setting, reader in readers.items():
        kinds = {group.shared for group, name, _ in todo if name == setting}
        if kinds:
            console.line(f"{setting}: preparing")
            console.line(f"{setting}: ready after {duration(reader.warm_up(kinds))}")
    clock.begin(sum(group.tokens for group, _, _ in todo))
    try:
        for group, setting, batches in todo:
            if reason := skip(group):
                journal.add(failures(setting, batches, reason))
            else:
                run_group(grid, group, setting, batches, readers[setting], journal, clock, within)
            clock.tell()
    finally:
        console.end_progress()


def run_group(
    grid: Grid,
    group: Group,
    setting: str,
    batches: Sequence[Batch],
    reader: Any,
    journal: Journal,
    clock: Clock,
    within: int,
) -> None:
    """Reads a group's haystacks and answers what is unfinished about them."""
    pending = list(batches)
    try:
        texts = {haystack.name: grid.text(haystack) for haystack in group.haystacks}
        order, start = list(texts), time.perf_counter()
        rows = reader.beside if group.shared else reader.rows
        state = reader.read(list(texts.values()), rows, clock.advance)
        read_seconds, answer_seconds, answer_tokens = time.perf_counter() - start, 0.0, 0
        while pending:
            batch, start = pending[0], time.perf_counter()
            asked = [haystack.asked[number] for haystack, number in batch]
            read_in = [order.index(haystack.name) for haystack, _ in batch]
            answers = reader.answer(
                reader.fork(state, read_in) if group.shared else state,
                [each.ids for each in asked],
                [each.limit for each in asked],
            )
            answer_seconds += time.perf_counter() - start
            answer_tokens += sum(answer.tokens for answer in answers)
            journal.add(
                answered(setting, haystack, number, texts[haystack.name], answer, within)
                for (haystack, number), answer in zip(batch, answers, strict=True)
            )
            pending.pop(0)
            clock.tell()
        read = sum(text.tokens for text in texts.values())
        composing = sum(text.seconds for text in texts.values())
        spent = (read_seconds, composing, answer_tokens, answer_seconds)
        journal.add([Reading(setting, read, *spent, reader.peak_bytes(), reader.device)])
    except Exception as error:
        clock.failed(error)
        journal.add(failures(setting, pending, str(as_gemma_error(error))))


def unfinished(group: Group, setting: str, rows: int, journal: Journal) -> list[Batch]:
    """Batches of a group of which some trial is unfinished.

    Batches do not depend on what is finished, so that every answer is computed beside the same others
    however often a grid was interrupted.
    """
    every: Batch = [(h, number) for h in group.haystacks for number in range(len(h.asked))]
    batches = [every[at : at + rows] for at in range(0, len(every), rows)]
    return [
        batch
        for batch in batches
        if any((setting, h.name, number) not in journal.trials for h, number in batch)
    ]


def blank_trials(grid: Grid, setting: str) -> Iterator[Trial]:
    """All trials of a setting, without answers, in the order of the plan."""
    for haystack in grid.haystacks:
        for number in range(len(haystack.asked)):
            yield blank(setting, haystack, number)


def blank(setting: str, haystack: Haystack, number: int, **fields: Any) -> Trial:
    """A trial of which only the question is known, and `fields`."""
    question = haystack.asked[number].question
    return Trial(
        setting=setting,
        task=haystack.task.name,
        tokens=haystack.tokens,
        depth=question.depth,
        haystack=haystack.name,
        question=number,
        seed=haystack.episode.seed,
        expected=question.answers,
        **fields,
    )


def failures(setting: str, batches: Iterable[Batch], reason: str) -> Iterator[Trial]:
    """Trials that have no answer, and why."""
    for haystack, number in itertools.chain.from_iterable(batches):
        yield blank(setting, haystack, number, failed=reason)


def answered(
    setting: str, haystack: Haystack, number: int, text: Text, answer: Any, within: int
) -> Trial:
    """A trial with its answer; with numbers that are not finite it has failed."""
    asked = haystack.asked[number]
    known = text.trial(asked)
    known["within_reach"] = known["distance"] < within
    if answer.finite:
        known["answered"] = answer.text
        known["score"] = float(haystack.task.score(asked.question, answer.text))
    else:
        known["failed"] = NOT_FINITE
    return blank(setting, haystack, number, **known)


def _cell(trial: Trial) -> Cell:
    return trial.setting, trial.task, trial.tokens, trial.depth
