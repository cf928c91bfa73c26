"""Makes `README.md` and plots of the records in `h200.json`: `python -m benchmarks.page`."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gemma_jax.benchmark.records import Record, read

# Figures with a target: at least (>) or at most (<) so much.
TARGETS = {
    "prefill_10m_tokens_per_second": (">", 150_000),
    "prefill_10m_segment_tokens_per_second": (">", 160_000),
    "prefill_10m_ceiling_share": (">", 0.80),
    "prefill_10m_peak_bytes": ("<", 8e9),
    "peak_ratio_10m_100k": ("<", 1.01),
    "decode_tokens_per_second": (">", 700),
    "decode_int8_tokens_per_second": (">", 1200),
    "decode_b32_tokens_per_second": (">", 14_000),
    "decode_weight_copies": ("<", 0),
    "prefill_vs_hf_8k": (">", 1.3),
    "prefill_vs_hf_131k": (">", 3.8),
    "prefill_vs_hf_524k": (">", 12),
    "gemma3_270m_10m_seconds_beyond_tokenizing": ("<", 10),
    "train_step_mfu": (">", 0.42),
    "int8_peak_bytes": ("<", 4.5e9),
    "matmul_ceiling": (">", 735),
}
# Series of a plot: the names of their figures, with the context's length between.
PLOTS = {
    "speed": ("tokens/s read", "tokens_per_second", 1.0),
    "memory": ("peak device memory, GB", "peak_bytes", 1e-9),
}
SERIES = {
    "gemma_jax": "prefill_{}",
    "gemma_jax, segment form": "prefill_{}_segment",
    "Hugging Face transformers": "hf_prefill_{}",
}
OTHERS = (  # pages beside this one
    "Beside this page: [recall.md](recall.md), what models recall (`gemma_jax.evaluate --record`, then"
    " `python -m benchmarks.recall`); [ablation.md](ablation.md), memory rules taught alike and compared"
    " ([docs/training.md](../docs/training.md#comparing-memory-rules));"
    " [book_questions.json](book_questions.json), answers to questions about a book"
    " (`python -m benchmarks.book_questions`); and [profiles](profiles), by which kernels the time of a"
    " figure went (`--profile`)."
)
POWERS = {f"{2**i // 1000}k": 2**i for i in range(10, 24)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and its plots beside the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "records", nargs="?", type=Path, default=Path(__file__).parent / "h200.json"
    )
    file = parser.parse_args(arguments).records
    records = read(file)
    plots = [name for name in PLOTS if plot(records, name, file.parent / f"{name}.svg")]
    (file.parent / "README.md").write_text(page(records, plots, file.name), encoding="utf-8")


def page(records: Iterable[Record], plots: Iterable[str], source: str) -> str:
    """The page as Markdown: figures with targets, then all of them by the command behind them."""
    records = list(records)
    lines = [
        "# Measured",
        "",
        f"Made from `{source}` by `python -m benchmarks.page`; medians, with the lowest and the"
        " highest of the repeats. How to read a name: `gemma_jax/benchmark/records.py`.",
        "",
        OTHERS,
        "",
    ]
    lines += [f"![{PLOTS[name][0]} by length of the context]({name}.svg)\n" for name in plots]
    with_target = [record for record in records if record.name in TARGETS]
    if with_target:
        lines += [
            "## Targets",
            "",
            "| figure | value | unit | target | |",
            "|---|---:|---|---:|---|",
        ]
        lines += [_target_row(record) for record in with_target]
        lines.append("")
    for command in dict.fromkeys(record.command for record in records):
        lines += _section(command, [record for record in records if record.command == command])
    return "\n".join(lines)


def _target_row(record: Record) -> str:
    relation, target = TARGETS[record.name]
    reached = record.value >= target if relation == ">" else record.value <= target
    words = f"at {'least' if relation == '>' else 'most'} {_number(target)}"
    value, result = _number(record.value), "reached" if reached else "not reached"
    return f"| {record.name} | {value} | {record.unit} | {words} | {result} |"


def _section(command: str, records: list[Record]) -> list[str]:
    lines = ["```", command, "```", ""]
    for made in dict.fromkeys(_made(record) for record in records):
        lines += [made, "", "| figure | value | unit | from | to |", "|---|---:|---|---:|---:|"]
        for record in records:
            if _made(record) == made:
                spread = [_number(f(record.repeats)) for f in (min, max)]
                spread = spread if len(record.repeats) > 1 else ["", ""]
                cells = (record.name, _number(record.value), record.unit, *spread)
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _made(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"{record.device}, {record.date}, {versions}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(records: Iterable[Record], name: str, file: Path) -> bool:
    """Draws one of `PLOTS`; returns False where there is nothing to draw."""
    title, ending, scale = PLOTS[name]
    points = {label: series(records, f"{form}_{ending}") for label, form in SERIES.items()}
    if not any(points.values()):
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gemma_jax"  # the same records give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, values in points.items():
        if values:
            x, y = zip(*sorted(values.items()), strict=True)
            axes.plot(x, [scale * value for value in y], marker="o", label=label)
    axes.set(xscale="log", xlabel="tokens of context", ylabel=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True


def series(records: Iterable[Record], form: str) -> dict[int, float]:
    """By length of the context, the latest value of the figures named so."""
    pattern = re.compile(re.escape(form).replace(r"\{\}", r"(\d+[km]?)"))
    found = {}
    for record in records:
        if match := pattern.fullmatch(record.name):
            found[tokens(match[1])] = record.value
    return found


def tokens(label: str) -> int:
    """The number that `records.label` gave this label."""
    if label in POWERS:
        return POWERS[label]
    return int(label.rstrip("km")) * {"k": 1000, "m": 1_000_000}.get(label[-1], 1)


if __name__ == "__main__":
    main()
