"""Figures: their names, how they are shown, and the file they are kept in."""

import dataclasses
import datetime
import importlib.metadata
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gemma_jax.config import PRESETS, GemmaConfig
from gemma_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax")
UNRECORDED = {"--profile": 1}  # options that change no figure, and how many values each has
PLAIN_MODEL = "gemma-2b"  # its figures have no model in their names
# Decoding after so many tokens a row has no length in its name: one row in bfloat16, and others.
PLAIN_DEPTH, OTHER_DEPTH = 10_000_000, 4096
# By form of local attention: the rule and S that have no place in a name.
PLAIN_MEMORY = {"transformer_xl": ("gated_delta", 1024), "segment": ("linear", 2048)}

Figure = tuple[str, str, list[float]]  # name, unit, repeats
R = TypeVar("R")  # a dataclass of records


@dataclasses.dataclass(frozen=True)
class Record:
    """One figure, as it stands in the files of `benchmarks/`."""

    name: str
    value: float
    unit: str
    command: str
    device: str
    versions: dict[str, str]
    date: str
    repeats: list[float]


class Report:
    """Shows figures as they come, in a table, and holds their records."""

    def __init__(self, style: str = "table"):
        """`style` is "table" or "markdown"."""
        self.records: dict[str, Record] = {}
        self._markdown = style == "markdown"
        self._row("figure", "median", "unit", "from", "to")
        if self._markdown:
            self._row("---", "---:", "---", "---:", "---:")

    def add(self, figures: Iterable[Figure]) -> None:
        """Adds what was measured by this process."""
        for name, unit, repeats in figures:
            self.add_records([make_record(name, unit, repeats)])

    def add_records(self, records: Iterable[Record]) -> None:
        for record in records:
            self.records[record.name] = record
            self._show(record)

    def _show(self, record: Record) -> None:
        spread = [f"{f(record.repeats):,.5g}" for f in (min, max)]
        spread = spread if len(record.repeats) > 1 else ["", ""]
        self._row(record.name, f"{record.value:,.5g}", record.unit, *spread)

    def _row(self, name: str, value: str, unit: str, low: str, high: str) -> None:
        if self._markdown:
            print(f"| {name} | {value} | {unit} | {low} | {high} |", flush=True)
        else:
            print(f"{name:<52} {value:>12} {unit:<9} {low:>12} {high:>12}".rstrip(), flush=True)


def make_record(name: str, unit: str, repeats: list[float]) -> Record:
    """A record of the median, made by this command on this device."""
    return Record(
        name=name,
        value=statistics.median(repeats),
        unit=unit,
        repeats=repeats,
        **stamp(without=UNRECORDED),
    )


def stamp(
    module: str = "gemma_jax.benchmark", without: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What every record says of where it comes from: command, device, versions and date; `without` as
    `command` has it.
    """
    import jax

    return {
        "command": command(module, without),
        "device": jax.local_devices()[0].device_kind,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def command(module: str = "gemma_jax.benchmark", without: Mapping[str, int] | None = None) -> str:
    """The command line of this process.

    Args:
        without: options that are left out, with how many values each takes (0 or 1).
    """
    arguments, kept, without = iter(sys.argv[1:]), [], without or {}
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in without:
            kept.append(argument)
        elif without[name] and not equals:
            next(arguments, None)
    return shlex.join(["python", "-m", module, *kept])


def read(path: Path, kind: type[R] = Record) -> list[R]:
    """The records of a file, all of one dataclass.

    Raises:
        InputError: it is missing, or holds something else.
    """
    try:
        return [kind(**fields) for fields in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{path} holds no records of this kind ({error}): name another file."
        ) from error


def append(path: Path, records: Iterable[R], same: Sequence[str] = ("name", "command")) -> None:
    """Adds records to a file; those that agree with a new one in the fields of `same` are replaced."""

    def place(record: R) -> tuple[Any, ...]:
        return tuple(getattr(record, field) for field in same)

    new = list(records)
    places = {place(record) for record in new}
    old = read(path, type(new[0])) if new and path.exists() else []
    kept = [record for record in old if place(record) not in places]
    if new:
        path.write_text(json.dumps([dataclasses.asdict(r) for r in [*kept, *new]], indent=1) + "\n")


# --- names ----------------------------------------------------------------------------------------


def figure_name(
    what: str,
    config: GemmaConfig,
    *,
    tokens: int | None = None,
    batch_size: int = 1,
    chunk_tokens: int | None = None,
    quantized: bool = False,
) -> str:
    """The beginning of the names of a measurement's figures, one for every shape measured.

    What is usual has no place in it: Gemma 2B's shape, the form's own rule and S, a batch of one.
    """
    model = model_name(config)
    rule, length = PLAIN_MEMORY[config.memory.local_attention]
    memory = config.memory
    parts = [
        *([] if model == slug(PLAIN_MODEL) else [model]),
        what,
        *([] if tokens is None else [label(tokens)]),
        *(["segment"] if memory.local_attention == "segment" else []),
        *([] if memory.rule == rule else [slug(memory.rule.rpartition(":")[2])]),
        *([] if memory.segment_length == length else [f"s{memory.segment_length}"]),
        *(["int8"] if quantized else []),
        *([] if config.dtype == "bfloat16" else [config.dtype]),
        *([] if batch_size == 1 else [f"b{batch_size}"]),
        *([] if chunk_tokens is None else [f"chunk{label(chunk_tokens)}"]),
    ]
    return "_".join(parts)


def with_plain_memory(config: GemmaConfig) -> GemmaConfig:
    """For names of what does not depend on the memory."""
    form = "transformer_xl"
    rule, length = PLAIN_MEMORY[form]
    return config.with_memory(rule=rule, segment_length=length, local_attention=form)


def model_name(config: GemmaConfig) -> str:
    """`gemma3_270m` for a model of that published shape, otherwise what it calls itself."""

    def shape(config: GemmaConfig) -> tuple[Any, ...]:
        return (
            config.family,
            config.width,
            config.mlp_dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.layer_types,
        )

    same = [name for name, preset in PRESETS.items() if shape(preset) == shape(config)]
    return slug(same[0] if same else config.name)


def slug(name: str) -> str:
    """A name for names: `gemma-3-270m` is `gemma3_270m`."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return re.sub(r"^gemma_([23])_", r"gemma\1_", words)


def label(number: int) -> str:
    """10,000,000 is `10m`, 100,000 is `100k`, 8,192 is `8k`, 131,072 is `131k`, 1,000 is `1000`.

    No two numbers share a label: powers of two have theirs in thousands, rounded down; round numbers
    that would have the same are written out.
    """
    if number >= 1024 and number.bit_count() == 1:
        return f"{number // 1000}k"
    if number % 1_000_000 == 0:
        return f"{number // 1_000_000}m"
    thousands, rest = divmod(number, 1000)
    next_power = 1 << (thousands * 1000).bit_length()
    return str(number) if rest or next_power // 1000 == thousands else f"{thousands}k"
