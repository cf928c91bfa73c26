"""Tells what came of a grid: on standard output, in files, and in records."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.benchmark import records
from gemma_jax.errors import GemmaError
from gemma_jax.evaluate import heatmap, results
from gemma_jax.evaluate.grid import NOT_RUN, blank_trials
from gemma_jax.evaluate.journal import Journal, Trial
from gemma_jax.evaluate.results import Cell
from gemma_jax.inference.console import size

MODULE = "gemma_jax.evaluate"
FULL_ATTENTION = "full attention"  # the rule of the peer's records
# Options on which no figure depends, with how many values each takes.
NOT_RECORDED = {"--output": 1, "--resume": 0, "--quiet": 0, "--debug": 0}
SAME = ("model", "rule", "task", "tokens", "depth", "command")  # a later record replaces such


@dataclasses.dataclass(frozen=True)
class Recall:
    """One cell, as it stands in `benchmarks/recall.json`; accuracies and shares have no unit."""

    model: str
    rule: str  # of memory, or "full attention"
    task: str
    tokens: int
    depth: float | None  # None: all depths beyond local attention's reach
    trials: int
    accuracy: float
    low: float  # of the 95 % interval
    high: float
    effective_trials: float  # see gemma_jax/evaluate/statistics.py
    chance: float
    baseline: float | None  # accuracy of the same trials with memory off
    within_reach: bool
    failed: int
    haystacks: int
    repeated_share: float
    seed: int
    forms: str | None
    trials_sha256: str | None
    read_tokens_per_second: float | None
    peak_bytes: int | None
    state_bytes: int | None
    command: str
    device: str
    versions: dict[str, str]
    date: str
    haystack: str | None = None  # grass, books, needles or words; None in older records


def report(subject: Any, journal: Journal) -> None:
    """Prints the table and the figures, and writes the files.

    Raises:
        GemmaError: some trials failed.
    """
    directory = Path(subject.options.output)
    trials = [
        trial
        for name in subject.names
        for trial in results.in_order(journal, blank_trials(subject.grid, name))
    ]
    found, figures = results.cells(trials), results.figures(journal.readings)
    chances, labels = {task.name: task.chance for task in subject.tasks}, label_of(subject)
    digest = results.trials_sha256(trial for trial in trials if trial.setting == "ours")
    state_bytes = bytes_of_states(subject)
    results.write_csv(directory / results.TRIALS, trials)
    results.write_json(
        directory / results.RESULTS,
        found,
        model=model_name(subject),
        settings=subject.settings,
        labels=labels,
        chances=chances,
        figures=figures,
        state_bytes=state_bytes,
        trials_sha256=digest,
        **records.stamp(MODULE, NOT_RECORDED),
    )
    for picture in pictures(found, chances, labels):
        heatmap.draw(directory / picture.file, *picture.content)
    lines = results.table(found, chances, labels) + results.figure_lines(figures)
    lines += [f"{name}: State {size(some)} a row" for name, some in state_bytes.items()]
    lines.append(f"trials_sha256: {digest}")
    print("\n".join(lines).strip(), flush=True)
    if subject.options.record:
        made = list(recalls(subject, found, figures, digest, state_bytes))
        records.append(Path(subject.options.record), made, SAME)
    complain(trials)


def complain(trials: Sequence[Trial]) -> None:
    """Raises `GemmaError` when trials failed that could have been run."""
    failed = [t for t in trials if t.score is None and not (t.failed or "").startswith(NOT_RUN)]
    if failed:
        raise GemmaError(
            f"{len(failed)} of {len(trials)} trials failed ({failed[0].failed}): the same command"
            " tries them again."
        )


def model_name(subject: Any) -> str:
    """As it stands in records."""
    if subject.options.preset:
        return f"{subject.config.name} (random weights)"
    name = records.model_name(subject.config)
    return f"{name} with adapter" if subject.options.adapter else name


def label_of(subject: Any) -> dict[str, str]:
    """What is said of each setting."""
    name = model_name(subject)
    labels = {
        "ours": f"{name}, memory {subject.config.memory.rule}",
        "off": f"{name}, memory off",
        "hf": f"{Path(subject.options.peer_model or '').name} in transformers, full attention",
    }
    return {setting: labels[setting] for setting in subject.names}


def bytes_of_states(subject: Any) -> dict[str, int]:
    """Of one row, by setting; the peer has no State."""
    from gemma_jax.model.state import state_bytes

    configs = {"ours": subject.config, "off": subject.config.with_memory(rule="off")}
    return {name: state_bytes(configs[name]) for name in subject.names if name in configs}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A heatmap: its file's name, and what `heatmap.draw` is given."""

    file: str
    content: tuple[str, float, list[heatmap.Square]]


def pictures(
    found: Sequence[Cell], chances: dict[str, float], labels: dict[str, str]
) -> Iterator[Picture]:
    """One per task and setting."""
    for setting, task in dict.fromkeys((cell.setting, cell.task) for cell in found):
        squares = [
            heatmap.Square(
                cell.tokens,
                cell.depth,
                cell.estimate and cell.estimate.accuracy,
                cell.within_reach,
            )
            for cell in found
            if (cell.setting, cell.task) == (setting, task) and cell.depth is not None
        ]
        title = f"{task}\n{labels[setting]}"
        yield Picture(f"{task}_{setting}.png", (title, chances[task], squares))


def recalls(
    subject: Any,
    found: Sequence[Cell],
    figures: dict[str, dict[str, Any]],
    digest: str | None,
    state_bytes: dict[str, int],
) -> Iterator[Recall]:
    """Records of the cells that have an accuracy."""
    stamp = records.stamp(MODULE, NOT_RECORDED)
    tasks = {task.name: task for task in subject.tasks}
    rules = {"ours": subject.config.memory.rule, "off": "off", "hf": FULL_ATTENTION}
    off = {
        (cell.task, cell.tokens, cell.depth): cell.estimate.accuracy
        for cell in found
        if cell.setting == "off" and cell.estimate
    }
    for cell in found:
        if cell.estimate is None:
            continue
        values = dataclasses.asdict(cell.estimate)
        values["effective_trials"] = values.pop("effective")
        peers = {}
        if cell.setting == "hf":
            from gemma_jax.evaluate.peer import versions

            peers = {"versions": stamp["versions"] | versions()}
        figure = figures.get(cell.setting, {}).get  # of none if every reading was cut short
        device = figure("device")  # which may not be that of this process
        place = (cell.task, cell.tokens, cell.depth)
        yield Recall(
            **values,
            **{
                name: getattr(cell, name)
                for name in ("task", "tokens", "depth", "within_reach", "failed", "repeated_share")
            },
            model=model_name(subject),
            rule=rules[cell.setting],
            chance=tasks[cell.task].chance,
            haystack=tasks[cell.task].haystack,
            baseline=off.get(place) if cell.setting == "ours" else None,
            seed=subject.options.seed,
            forms=subject.options.forms,
            trials_sha256=digest,
            read_tokens_per_second=figure("read_tokens_per_second"),
            peak_bytes=figure("peak_bytes"),
            state_bytes=state_bytes.get(cell.setting),
            **stamp | peers | ({"device": device} if device else {}),
        )
