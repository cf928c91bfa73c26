"""What finished trials say: a table, files, and records of `benchmarks/recall.json`."""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.evaluate.grid import NOT_RUN
from gemma_jax.evaluate.journal import Journal, Reading, Trial
from gemma_jax.evaluate.statistics import Estimate, estimate
from gemma_jax.inference.console import size

TRIALS, RESULTS = "trials.csv", "results.json"
SETTINGS = ("ours", "off", "hf")
FIELDS = (
    *("setting", "task", "tokens", "depth", "haystack", "question", "seed", "expected"),
    *("answered", "score", "correct", "tokens_read", "distance", "within_reach"),
    *("repeated_share", "failed", "text_sha256"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Trials of one setting, task and length, at one depth or pooled (depth None).

    Cells within local attention's reach are not pooled. A cell of which nothing could be run has no
    estimate.
    """

    setting: str
    task: str
    tokens: int
    depth: float | None
    within_reach: bool
    failed: int
    not_run: int
    repeated_share: float | None
    estimate: Estimate | None


def cells(trials: Sequence[Trial]) -> list[Cell]:
    """Cells depth by depth, and after each length the pooled one."""
    found: list[Cell] = []
    for setting in SETTINGS:
        for task in dict.fromkeys(trial.task for trial in trials):
            for tokens in sorted({trial.tokens for trial in trials}):
                some = [
                    trial
                    for trial in trials
                    if (trial.setting, trial.task, trial.tokens) == (setting, task, tokens)
                ]
                by_depth = [
                    _cell([trial for trial in some if trial.depth == depth], depth)
                    for depth in sorted({trial.depth for trial in some})
                ]
                if by_depth:
                    beyond = {cell.depth for cell in by_depth if not cell.within_reach}
                    pooled = [trial for trial in some if trial.depth in beyond]
                    whole = _cell(pooled, None) if pooled else None
                    nothing = Cell(setting, task, tokens, None, True, 0, 0, None, None)
                    found += [*by_depth, whole or nothing]
    return found


def _cell(trials: Sequence[Trial], depth: float | None) -> Cell:
    first = trials[0]
    run = [trial for trial in trials if trial.score is not None]
    not_run = sum((trial.failed or "").startswith(NOT_RUN) for trial in trials)
    shares = [trial.repeated_share for trial in run]
    return Cell(
        first.setting,
        first.task,
        first.tokens,
        depth,
        within_reach=any(trial.within_reach for trial in trials),
        failed=len(trials) - len(run) - not_run,
        not_run=not_run,
        repeated_share=sum(shares) / len(shares) if shares else None,
        estimate=estimate((trial.haystack, trial.score) for trial in run),
    )


def trials_sha256(trials: Iterable[Trial]) -> str | None:
    """A hash of everything that was read, in the order of the trials; None if some was not read."""
    found = hashlib.sha256()
    for trial in trials:
        if trial.text_sha256 is None:
            return None
        found.update(bytes.fromhex(trial.text_sha256))
    return found.hexdigest()


# --- figures --------------------------------------------------------------------------------------


def figures(readings: Sequence[Reading]) -> dict[str, dict[str, Any]]:
    """By setting: tokens read, seconds, and rates. Reading and composing run side by side."""
    found = {}
    for setting in SETTINGS:
        some = [reading for reading in readings if reading.setting == setting]
        if not some:
            continue
        names = ("tokens", "seconds", "compose_seconds", "answer_tokens", "answer_seconds")
        peaks = [reading.peak_bytes for reading in some if reading.peak_bytes is not None]
        sums = {name: sum(getattr(reading, name) for reading in some) for name in names}
        found[setting] = {
            "tokens_read": sums["tokens"],
            "reading_seconds": sums["seconds"],
            "read_tokens_per_second": _rate(sums["tokens"], sums["seconds"]),
            "composed_tokens_per_second": _rate(sums["tokens"], sums["compose_seconds"]),
            "answer_tokens": sums["answer_tokens"],
            "answer_seconds": sums["answer_seconds"],
            "answer_tokens_per_second": _rate(sums["answer_tokens"], sums["answer_seconds"]),
            "peak_bytes": max(peaks, default=None),
            "device": ", ".join(dict.fromkeys(r.device for r in some if r.device)) or None,
        }
    return found


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


# --- the table ------------------------------------------------------------------------------------


def table(found: Sequence[Cell], chances: dict[str, float], labels: dict[str, str]) -> list[str]:
    """Lines of a table per task and setting: lengths down, depths across."""
    lines = ["accuracy (95 % interval) n = trials"]
    for setting, task in dict.fromkeys((cell.setting, cell.task) for cell in found):
        some = [cell for cell in found if (cell.setting, cell.task) == (setting, task)]
        depths = sorted({cell.depth for cell in some if cell.depth is not None})
        lines += [
            "",
            f"{task}, {labels[setting]} (chance {chances[task]:.3g})",
        ]
        rows = [["tokens", *(f"depth {100 * depth:g}%" for depth in depths), "pooled"]]
        for tokens in sorted({cell.tokens for cell in some}):
            row = {cell.depth: cell for cell in some if cell.tokens == tokens}
            rows.append([f"{tokens:,}", *(cell_text(row.get(depth)) for depth in [*depths, None])])
        lines += _aligned(rows)
    if any(cell.within_reach and cell.depth is not None for cell in found):
        lines += ["", "~ within the reach of local attention; not pooled"]
    return lines


def cell_text(cell: Cell | None) -> str:
    """`0.95 (0.76-0.99) n=20`, with ~ within reach."""
    if cell is None or cell.estimate is None:
        if cell is not None and cell.not_run:
            return "not run"
        return f"{cell.failed} failed" if cell is not None and cell.failed else "-"
    found = cell.estimate
    mark = "~" if cell.within_reach else ""
    failed = f" {cell.failed} failed" if cell.failed else ""
    return f"{mark}{found.accuracy:.2f} ({found.low:.2f}-{found.high:.2f}) n={found.trials}{failed}"


def figure_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Speed and memory, a line per setting."""
    lines = [""]
    for setting, values in found.items():
        peak = values["peak_bytes"]
        line = (
            f"{setting}: read {values['tokens_read']:,.0f} tokens in"
            f" {values['reading_seconds']:.1f} s"
            f" ({values['read_tokens_per_second']:,.0f} tokens/s; composing them"
            f" {values['composed_tokens_per_second']:,.0f} tokens/s), wrote"
            f" {values['answer_tokens']:,.0f} tokens in {values['answer_seconds']:.1f} s;"
            f" peak device memory {'not known' if peak is None else size(peak)}"
        )
        lines.append(line)
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines whose columns begin below each other; the first column is numbers."""
    _, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{first:>10}  "
        + "  ".join(f"{text:<{width}}" for text, width in zip(rest, widths, strict=True)).rstrip()
        for first, *rest in rows
    ]


# --- files ----------------------------------------------------------------------------------------


def write_csv(path: Path, trials: Iterable[Trial]) -> None:
    """Every trial; several expected answers are joined by ` | `."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for trial in trials:
            values = {name: getattr(trial, name) for name in FIELDS}
            values["expected"] = " | ".join(trial.expected)
            writer.writerow(["" if value is None else value for value in values.values()])


def write_json(path: Path, found: Sequence[Cell], **content: Any) -> None:
    """All that is known beside the trials themselves."""
    whole = content | {"cells": [dataclasses.asdict(cell) for cell in found]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def in_order(journal: Journal, blanks: Iterable[Trial]) -> list[Trial]:
    """The trials of a plan as they ended."""
    ended = journal.failed | journal.trials
    return [ended.get(blank.key, blank) for blank in blanks]
