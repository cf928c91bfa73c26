"""What a run leaves to look at: a table of its steps (log.csv), and a picture of it (progress.png)."""

import csv
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "step",
    "seconds",
    "tokens",
    "loss",
    "answer_loss",
    "answer_accuracy",
    "gradient_norm",
    "write_loss",
    "learning_rate",
    "sequence_tokens",
)
PICTURE_SECONDS = 60.0  # between two pictures


class Record:
    """Rows by step, on disk as soon as they are known; the picture follows now and then.

    Args:
        layers: that have memory, by number.
        recalls: names of what probes measure.
        resume_step: rows of later steps are dropped: those steps will be done again.
    """

    def __init__(
        self, directory: Path, layers: Sequence[int], recalls: Sequence[str], resume_step: int
    ):
        self._table, self._picture = directory / "log.csv", directory / "progress.png"
        self._layers, self._recalls = layers, recalls
        self._columns = [
            *COLUMNS,
            *(f"written_{i}" for i in layers),
            *(f"read_{i}" for i in layers),
            *(f"recall_{name}" for name in recalls),
        ]
        self._drawn = time.monotonic()
        old = read(self._table) if resume_step and self._table.exists() else []
        self.rows = [row for row in old if row["step"] <= resume_step]
        with open(self._table, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(self._columns)
            writer.writerows([self._cells(row) for row in self.rows])

    def add(self, row: Mapping[str, float]) -> None:
        """Adds a row; what is not measured has no number in it."""
        self.rows.append(dict(row))
        with open(self._table, "a", newline="") as stream:
            csv.writer(stream).writerow(self._cells(row))
        if time.monotonic() - self._drawn > PICTURE_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Writes the picture."""
        if self.rows:
            draw(self._picture, self.rows, self._layers, self._recalls)
        self._drawn = time.monotonic()

    def _cells(self, row: Mapping[str, float]) -> list[str]:
        return [_cell(row.get(name)) for name in self._columns]


def read(table: Path) -> list[dict[str, float]]:
    """The rows of a table; what was not measured is left out."""
    with open(table, newline="") as stream:
        return [
            {name: float(cell) for name, cell in row.items() if name and cell}
            for row in csv.DictReader(stream)
            if None not in row.values()  # a line that a killed run did not finish
        ]


def draw(
    picture: Path,
    rows: Sequence[Mapping[str, float]],
    layers: Sequence[int],
    recalls: Sequence[str],
) -> None:
    """Loss, recall, read gates and share of tokens written, by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, recall, read_gates, written = figure.subplots(2, 2, sharex=True).flat
    _lines(loss, rows, {"loss": "loss", "answer_loss": "of answers"})
    loss.set(title="loss [nats]", yscale="log")
    named = {"answer_accuracy": "answer tokens in training"}
    _lines(recall, rows, named | {f"recall_{name}": name for name in recalls})
    recall.set(title="recall", ylim=(-0.02, 1.02))
    _lines(read_gates, rows, {f"read_{i}": f"layer {i}" for i in layers})
    read_gates.set(title="read gates, mean size", xlabel="step")
    _lines(written, rows, {f"written_{i}": f"layer {i}" for i in layers})
    written.set(title="share of tokens written", xlabel="step")
    written.set_ylim(bottom=0.0)
    partial = picture.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(picture)


def _lines(axes: Any, rows: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> None:
    drawn = False
    for column, label in names.items():
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
            drawn = True
    axes.grid(alpha=0.3)
    if drawn and len(names) <= 12:
        axes.legend(fontsize=7)


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"
