"""Makes `ablation.md` and plots of the records in `ablation.json`: `python -m benchmarks.ablation_page`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learners import START, VARIANTS
from gemma_jax.benchmark.records import Record, read
from gemma_jax.evaluate.heatmap import short

# What is told of the training: the ends of the figures' names, headings, scales, decimals.
TRAINED = {
    "steps": ("steps", 1.0, 0),
    "tokens_read": ("tokens read, M", 1e-6, 1),
    "seconds": ("seconds", 1.0, 0),
    "answers": ("answer tokens right in training", 1.0, 2),
    "written": ("tokens written, %", 100.0, 1),
}
SPREAD = 1.035  # between points of one length, so that none hides another


@dataclasses.dataclass(frozen=True)
class Figure(Record):
    """A figure of one rule: `repeats` has one value for each of `seeds`, `value` is their mean. Rule
    `START` is the model that all others go on from.

    Of recall: the share of `questions` about `task` that were answered after `length` tokens; `chance`
    answers as many without the text. Of the training `task` and `length` are None.
    """

    rule: str
    seeds: list[int]
    recipe: str  # of the training, as a command line
    task: str | None = None
    length: int | None = None
    questions: int | None = None
    chance: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and its plots beside the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "records", nargs="?", type=Path, default=Path(__file__).parent / "ablation.json"
    )
    write(parser.parse_args(arguments).records)


def write(file: Path) -> None:
    """Writes the page of a file of records, and its plots, beside it."""
    sections = by_command(read(file, Figure))
    plots = []
    for number, figures in enumerate(sections, 1):
        plots.append(f"{file.stem}{'' if number == 1 else f'_{number}'}.svg")
        plot(figures, file.parent / plots[-1])
    text = page(sections, plots, file.name)
    file.with_suffix(".md").write_text(text, encoding="utf-8")


def by_command(figures: Sequence[Figure]) -> list[list[Figure]]:
    """Figures that can be compared: those of one command."""
    commands = dict.fromkeys(figure.command for figure in figures)
    return [[figure for figure in figures if figure.command == command] for command in commands]


def rules(figures: Sequence[Figure]) -> list[str]:
    """Of these figures: the start, our rules in their order, then others."""
    found = dict.fromkeys(figure.rule for figure in figures)
    return sorted(found, key=lambda rule: [START, *VARIANTS, rule].index(rule))


def page(sections: Sequence[Sequence[Figure]], plots: Sequence[str], source: str) -> str:
    """The page as Markdown, a section for each command."""
    lines = [
        "# Memory rules compared",
        "",
        f"Made from `{source}` by `python -m benchmarks.ablation_page`. All rules go on from one start, a"
        " model without memory that answers from what local attention sees: each with fresh parameters"
        " of its memory, the same recipe and budget, and several seeds. Then the models answer questions"
        " about texts of several lengths. Facts stand beyond the reach of local attention, and a text"
        " holds as many at any length: what is lost with length was forgotten. Means of the seeds, with"
        " the lowest and the highest.",
        "",
    ]
    for figures, picture in zip(sections, plots, strict=True):
        lines += _section(figures, picture)
    return "\n".join(lines)


def _section(figures: Sequence[Figure], picture: str) -> list[str]:
    first = figures[0]
    lines = ["```", first.command, "```", ""]
    made = dict.fromkeys(
        (figure.device, figure.date, *figure.versions.items()) for figure in figures
    )
    for device, date, *versions in made:
        lines += [", ".join([device, date, *(" ".join(version) for version in versions)]), ""]
    recall = [figure for figure in figures if figure.task]
    if recall:
        lines += [f"![recall by length]({picture})", ""]
    for task in dict.fromkeys(figure.task for figure in recall):
        lines += recall_table(task, [figure for figure in recall if figure.task == task])
    lines += training_table([figure for figure in figures if not figure.task])
    for recipe, rule in {figure.recipe: figure.rule for figure in figures}.items():
        whose = "start's recipe" if rule == START else "rules' recipe, beside options of their own"
        lines += [f"The {whose}:", ""]
        lines += ["```", f"python -m gemma_jax.train {recipe}", "```", ""]
    return lines


def recall_table(task: str, figures: Sequence[Figure]) -> list[str]:
    """Rules down, lengths across."""
    lengths = sorted({figure.length for figure in figures})
    cells = {(figure.rule, figure.length): figure for figure in figures}
    asked = sorted({figure.questions for figure in figures})
    chance = f"chance {figures[0].chance:.2g}"
    return [
        f"## {task}",
        "",
        f"Share of answers that are right, of {' to '.join(map(str, asked))} questions a seed; {chance}.",
        "",
        f"| rule | seeds | {' | '.join(short(length) for length in lengths)} |",
        f"|---|---:|{'---:|' * len(lengths)}",
        *(
            _row(rule, [cells.get((rule, length)) for length in lengths], 1.0, 2)
            for rule in rules(figures)
        ),
        "",
    ]


def training_table(figures: Sequence[Figure]) -> list[str]:
    """What the start's and each rule's training took and came to."""
    lines = [
        "## Training",
        "",
        f"| rule | options | seeds | {' | '.join(title for title, *_ in TRAINED.values())} |",
        f"|---|---|---:|{'---:|' * len(TRAINED)}",
    ]
    for rule in rules(figures):
        own = [figure for figure in figures if figure.rule == rule]
        told = VARIANTS.get("off" if rule == START else rule)
        options = f"`{' '.join(told)}`" if told else ""
        cells = [
            _cell(next((f for f in own if f.name.endswith(f"_{end}")), None), scale, decimals)
            for end, (_, scale, decimals) in TRAINED.items()
        ]
        lines.append(f"| {rule} | {options} | {_seeds(own)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _row(rule: str, figures: Sequence[Figure | None], scale: float, decimals: int) -> str:
    there = [figure for figure in figures if figure]
    cells = [_cell(figure, scale, decimals) for figure in figures]
    return f"| {rule} | {_seeds(there)} | {' | '.join(cells)} |"


def _seeds(figures: Sequence[Figure]) -> str:
    return ", ".join(map(str, sorted({seed for figure in figures for seed in figure.seeds})))


def _cell(figure: Figure | None, scale: float, decimals: int) -> str:
    """`0.93 (0.88 to 0.97)`."""
    if figure is None:
        return "–"
    value, low, high = (
        f"{scale * number:,.{decimals}f}"
        for number in (figure.value, min(figure.repeats), max(figure.repeats))
    )
    return value if low == high else f"{value} ({low} to {high})"


def plot(figures: Sequence[Figure], file: Path) -> None:
    """Draws recall by length, a panel for each task and a line for each rule; nothing without recall."""
    figures = [figure for figure in figures if figure.task]
    if not figures:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gemma_jax"  # the same records give the same file
    from matplotlib import pyplot

    tasks, compared = list(dict.fromkeys(figure.task for figure in figures)), rules(figures)
    picture, panels = pyplot.subplots(
        1,
        len(tasks),
        figsize=(1.4 + 4.2 * len(tasks), 3.8),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, task in zip(panels.flat, tasks, strict=True):
        own = [figure for figure in figures if figure.task == task]
        for number, rule in enumerate(compared):
            shift = SPREAD ** (number - (len(compared) - 1) / 2)
            _line(axes, [figure for figure in own if figure.rule == rule], shift, f"C{number}")
        lengths = sorted({figure.length for figure in own})
        axes.axhline(own[0].chance, color="0.5", linestyle=":", linewidth=1, label="chance")
        axes.set(xscale="log", xlabel="tokens read", title=task, ylim=(-0.03, 1.03))
        axes.set_xticks(lengths, [short(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("answers that are right")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    picture.savefig(file, metadata={"Date": None})
    pyplot.close(picture)


def _line(axes: object, figures: Sequence[Figure], shift: float, colour: str) -> None:
    """The means of one rule, with bars from the lowest to the highest of the seeds."""
    if not figures:
        return
    figures = sorted(figures, key=lambda figure: figure.length)
    below = [figure.value - min(figure.repeats) for figure in figures]
    above = [max(figure.repeats) - figure.value for figure in figures]
    axes.errorbar(
        [figure.length * shift for figure in figures],
        [figure.value for figure in figures],
        yerr=[below, above],
        label=figures[0].rule,
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        linewidth=1.4,
        elinewidth=0.8,
    )


if __name__ == "__main__":
    main()
