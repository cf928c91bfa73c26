"""Makes `recall.md` and heatmaps of the records in `recall.json`: `python -m benchmarks.recall`."""

import argparse
import dataclasses
import itertools
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.benchmark.records import read, slug
from gemma_jax.evaluate import heatmap
from gemma_jax.evaluate.report import FULL_ATTENTION, Recall
from gemma_jax.evaluate.statistics import wilson

Pieces = Sequence[Recall]  # of one cell, each with a seed or books of its own
Series = tuple[str, str, str, str, str]  # task, model, rule, wording, haystack
HEAD = "| tokens | depth | accuracy | 95 % interval | trials (haystacks) | chance | memory off | repeated |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and its pictures beside the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "records", nargs="?", type=Path, default=Path(__file__).parent / "recall.json"
    )
    file = parser.parse_args(arguments).records
    records = read(file, Recall)
    pictures = file.parent / file.stem
    (file.parent / f"{file.stem}.md").write_text(page(records, pictures), encoding="utf-8")


def page(records: Sequence[Recall], pictures: Path) -> str:
    """The page as Markdown, a section for each task, model, rule of memory, wording and haystack."""
    lines = [
        "# Recalled",
        "",
        f"Made from `{pictures.name}.json` by `python -m benchmarks.recall`. A cell marked ~ lies within"
        " the reach of local attention, and *pooled* leaves those out; intervals are Wilson's, of as"
        " many trials as questions about shared haystacks count for (docs/evaluate.md). What was measured in"
        " pieces, of other seeds or books, counts as a whole; its commands stand below each other.",
        "",
    ]
    for series, found in by_series(records).items():
        lines += _section(series, found, pictures)
    return "\n".join(lines)


def by_series(records: Sequence[Recall]) -> dict[Series, list[Pieces]]:
    """The cells of each table, with the latest record of each seed and books."""
    latest: dict[Series, dict[tuple[int, float | None], dict[tuple, Recall]]] = {}
    for record in records:
        series = (record.task, record.model, record.rule, record.forms, record.haystack or "")
        cell = latest.setdefault(series, {}).setdefault((record.tokens, record.depth), {})
        cell[record.seed, *books(record.command)] = record
    return {
        series: [
            list(cells[at].values())
            for at in sorted(cells, key=lambda at: (at[0], at[1] is None, at[1]))
        ]
        for series, cells in sorted(latest.items())
    }


def books(command: str) -> tuple[str, ...]:
    """The files that a command names behind `--haystack`."""
    words = shlex.split(command)
    if "--haystack" not in words:
        return ()
    behind = words[words.index("--haystack") + 1 :]
    return tuple(itertools.takewhile(lambda word: not word.startswith("--"), behind))


def pooled(pieces: Pieces) -> Recall:
    """A cell as a whole."""
    if len(pieces) == 1:
        return pieces[0]
    trials = sum(piece.trials for piece in pieces)

    def mean(name: str) -> float:
        return math.fsum(getattr(piece, name) * piece.trials for piece in pieces) / trials

    accuracy, effective = mean("accuracy"), sum(piece.effective_trials for piece in pieces)
    low, high = wilson(accuracy, effective)
    controlled = all(piece.baseline is not None for piece in pieces)
    return dataclasses.replace(
        pieces[-1],
        trials=trials,
        accuracy=accuracy,
        low=low,
        high=high,
        effective_trials=effective,
        baseline=mean("baseline") if controlled else None,
        within_reach=any(piece.within_reach for piece in pieces),
        failed=sum(piece.failed for piece in pieces),
        haystacks=sum(piece.haystacks for piece in pieces),
        repeated_share=mean("repeated_share"),
    )


def _section(series: Series, cells: list[Pieces], pictures: Path) -> list[str]:
    task, model, rule, forms, haystack = series
    how = rule if rule == FULL_ATTENTION else f"memory {rule}"
    wording = "" if forms == "classic" else f", {forms} wording"
    where = f" in {haystack}" if haystack else ""
    lines = [f"## {task}{where}: {model}, {how}{wording}", ""]
    records, pieces = [pooled(cell) for cell in cells], list(itertools.chain(*cells))
    squares = [
        heatmap.Square(r.tokens, r.depth, r.accuracy, r.within_reach)
        for r in records
        if r.depth is not None
    ]
    if squares:
        pictures.mkdir(exist_ok=True)
        name = f"{slug('_'.join(series))}.png"
        title = f"{task}{where}{wording}\n{model}, {how}"
        heatmap.draw(pictures / name, title, records[0].chance, squares)
        lines += [f"![accuracy by length and depth]({pictures.name}/{name})", ""]
    lines += [HEAD, "|---:|---:|---:|---|---:|---:|---:|---:|"]
    lines += [_row(record) for record in records]
    for command in dict.fromkeys(piece.command for piece in pieces):
        made = next(piece for piece in pieces if piece.command == command)
        versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
        about = f"{made.device}, {made.date}, {versions}; seed {made.seed}"
        if made.trials_sha256:
            about += f", trials {made.trials_sha256[:16]}"
        if made.read_tokens_per_second:
            about += f"; read {made.read_tokens_per_second:,.0f} tokens/s"
        if made.peak_bytes:
            about += f", peak {made.peak_bytes / 1e9:.2f} GB"
        lines += ["", "```", command, "```", "", about]
    return [*lines, ""]


def _row(record: Recall) -> str:
    depth = "pooled" if record.depth is None else f"{100 * record.depth:g}%"
    off = "" if record.baseline is None else f"{record.baseline:.3g}"
    failed = f", {record.failed} failed" if record.failed else ""
    cells = (
        f"{record.tokens:,}",
        depth,
        f"{'~' if record.within_reach else ''}{record.accuracy:.3f}",
        f"{record.low:.3f} to {record.high:.3f}",
        f"{record.trials} ({record.haystacks}){failed}",
        f"{record.chance:.2g}",
        off,
        f"{100 * record.repeated_share:.1f}%",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
