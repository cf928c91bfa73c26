"""The command: what to measure, in which process, and where the figures go."""

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_jax.benchmark import device, peer, records
from gemma_jax.benchmark.records import Figure, Record, Report
from gemma_jax.config import PRESETS, QUANTIZATIONS
from gemma_jax.errors import GemmaError, InputError, UsageError

# What can be measured, and the tokens it reads when none are given.
TOKENS = {
    "prefill": 100_000,
    "decode": 100_000,
    "train-step": 32_768,
    "read": 10_000_000,
    "load": 0,
    "ceilings": 0,
}
SHAPE = ("tokens", "batch_size", "chunk_tokens")  # options of which there may be several
NEEDS_MODEL = ("load", "read")
CAN_BE_PROFILED = ("prefill", "decode", "train-step")
SPEED = "_tokens_per_second"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(arguments)
    from gemma_jax.inference.console import run_command

    return run_command(lambda: benchmark(options), debug=options.debug)


def benchmark(options: argparse.Namespace) -> None:
    """Prints a table of figures, and writes them to `--output`.

    A peak of memory belongs to a process, so each shape has its own where there are several; reading
    and then writing are one.
    """
    check(options)
    tasks = list(plan(options))
    report = Report(options.format)
    try:
        measure_all(tasks, options, report)
    finally:  # what was measured until an error or Ctrl-C is kept
        if options.output:
            records.append(Path(options.output), report.records.values())


def measure_all(
    tasks: list[argparse.Namespace], options: argparse.Namespace, report: Report
) -> None:
    """Adds the figures of all tasks to the report as they come."""
    if options.ceilings and not device.is_cpu_by_choice() and tasks[0].what != ["ceilings"]:
        report.add_records(in_process_of_its_own(with_options(options, what=["ceilings"])))
    for task in tasks:
        if len(tasks) == 1 and not options.peer:
            report.add(measure(task))
            continue
        ours = []
        for record in in_process_of_its_own(task):
            ours.append(record)
            report.add_records([record])
        if options.peer:
            report.add_records(compare(task, ours))
    report.add_records(device.shares(report.records))


def check(options: argparse.Namespace) -> None:
    """Raises what is wrong with the options before anything is measured."""
    from gemma_jax.benchmark.running import read_config
    from gemma_jax.model.memory import make_rule

    if options.profile:
        if not set(options.what) <= set(CAN_BE_PROFILED):
            raise UsageError(
                f"--profile is for {', '.join(CAN_BE_PROFILED)}: leave out the rest, or it."
            )
        if Path(options.profile).exists() and not Path(options.profile).is_dir():
            raise InputError(f"{options.profile} is a file: name a directory with --profile.")
    if options.what == ["ceilings"]:
        return
    for what in set(options.what) & set(NEEDS_MODEL):
        if not options.model:
            raise UsageError(f"{what} needs a checkpoint: name one with --model DIR.")
    if options.quantize and (options.model or "train-step" in options.what):
        raise UsageError(
            "--quantize is for reading and writing with --preset: a checkpoint is what it was"
            " converted to."
        )
    if not (options.model or options.preset):
        raise UsageError("There is nothing to measure: give --preset NAME or --model DIR.")
    make_rule(read_config(options))
    if "read" in options.what:
        from gemma_jax.inference.documents import Documents

        if not options.text:
            raise UsageError("read needs text: name files with --text FILE.")
        Documents(options.text)
    if options.peer:
        if not set(options.what) <= {"prefill", "decode"}:
            raise UsageError("--peer reads and writes: measure it with prefill and decode alone.")
        peer.require()
    if options.output:
        path = Path(options.output)
        if path.exists():
            records.read(path)
        elif not path.absolute().parent.is_dir():
            raise InputError(
                f"{path.absolute().parent} is not a directory: choose another --output."
            )


def plan(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The measurements asked for, each with one shape; prefill and decode of a shape are together."""
    together = [what for what in options.what if what in ("prefill", "decode")]
    alone = [[what] for what in options.what if what not in together]
    for group in ([together] if together else []) + alone:
        default = TOKENS[group[0]]
        several = [getattr(options, name) or [None] for name in SHAPE]
        for tokens, batch_size, chunk_tokens in itertools.product(*several):
            shape = (tokens or default, batch_size or 1, chunk_tokens)
            yield with_options(options, what=group, **dict(zip(SHAPE, shape, strict=True)))


def with_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    changed = copy.copy(options)
    vars(changed).update(changes)
    return changed


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Figures of one task of `plan`, measured here."""
    from gemma_jax.benchmark import files, running, training

    alone = {
        "ceilings": lambda options: device.ceilings(),
        "train-step": training.train_step,
        "load": files.load,
        "read": files.read,
    }
    if options.what[0] in alone:
        yield from alone[options.what[0]](options)
        return
    run = running.Run(options, *running.load(options))
    for what in sorted(options.what, reverse=True):  # prefill before decode
        yield from {"prefill": run.prefill, "decode": run.decode}[what]()
    if options.profile:
        run.save_profiles()


def in_process_of_its_own(options: argparse.Namespace) -> Iterator[Record]:
    """Records of one task, measured by another process; the command they name is this one's.

    Raises:
        GemmaError: what that process said, after what it had measured before.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "records.json"
        arguments = [*as_arguments(options), "--no-ceilings", "--output", str(output)]
        process = subprocess.run(
            [sys.executable, "-m", "gemma_jax.benchmark", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        fields = json.loads(output.read_text()) if output.exists() else []
    told = records.command(without=records.UNRECORDED)
    yield from (Record(**{**field, "command": told}) for field in fields)
    if process.returncode:
        raise failed(process.returncode, process.stderr)


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The command line of a task of `plan`."""
    found = list(options.what)
    if found == ["ceilings"]:
        return found
    for name, value in vars(options).items():
        values = value if isinstance(value, list) else [value]
        if name not in ("what", "ceilings", "output", "format", "peer", "debug") and any(values):
            found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def failed(code: int, said: str) -> GemmaError:
    """The error that another process ended with."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    message = lines[-1].removeprefix("error: ") if lines else f"It ended with {code}: {said[-300:]}"
    kinds = {kind.exit_code: kind for kind in [GemmaError, *GemmaError.__subclasses__()]}
    return kinds.get(code, GemmaError)(message)


def compare(task: argparse.Namespace, ours: list[Record]) -> Iterator[Record]:
    """Measures the peer on the same shapes, and our speed over its."""
    from gemma_jax.benchmark.running import read_config

    config = read_config(task)
    for what in task.what:
        found, versions = peer.measure(what, config, task)
        speed = next(r for r in ours if f"{what}_" in r.name and r.name.endswith(SPEED))
        for name, unit, repeats in found:
            value = statistics.median(repeats)
            record = dataclasses.replace(
                speed, name=name, unit=unit, value=value, repeats=repeats, versions=versions
            )
            yield record
            if name.endswith(SPEED):
                name = speed.name.removesuffix(SPEED).replace(what, f"{what}_vs_hf", 1)
                ratios = [repeat / value for repeat in speed.repeats]
                yield dataclasses.replace(
                    speed,
                    name=name,
                    unit="1",
                    value=speed.value / value,
                    repeats=ratios,
                    versions=speed.versions | versions,
                )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    from gemma_jax.inference.console import ArgumentParser, count, number

    whole = number(int)
    parser = ArgumentParser(
        prog="python -m gemma_jax.benchmark",
        description="Measures reading, writing, training and loading, beside what the device can do.",
    )
    parser.add_argument("what", nargs="+", choices=tuple(TOKENS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=tuple(PRESETS), help="random weights of this shape")
    which.add_argument("--model", metavar="DIR", help="a checkpoint")
    parser.add_argument(
        "--tokens", metavar="N", type=count, nargs="+", help="read, e.g. 8K 10M (default: 100000)"
    )
    parser.add_argument("--batch-size", metavar="B", type=whole(1), nargs="+")
    parser.add_argument("--chunk-tokens", metavar="N", type=count, nargs="+", help="of a step")
    parser.add_argument("--new-tokens", metavar="N", type=whole(1), default=64, help="of a block")
    parser.add_argument("--text", metavar="FILE", nargs="+", help="what `read` reads")
    parser.add_argument("--memory", metavar="RULE")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="of --preset's random weights")
    parser.add_argument("--segment-length", metavar="S", type=whole(1))
    parser.add_argument("--local-attention", choices=("transformer_xl", "segment"))
    parser.add_argument("--repeats", metavar="N", type=whole(1), default=3)
    parser.add_argument(
        "--peer", choices=("hf",), help="also measure Hugging Face transformers (needs torch)"
    )
    parser.add_argument(
        "--no-ceilings",
        dest="ceilings",
        action="store_false",
        help="do not measure what the device does at best",
    )
    parser.add_argument("--format", choices=("table", "markdown"), default="table")
    parser.add_argument(
        "--profile", metavar="DIR", help="then write there which kernels a GPU's time goes to"
    )
    parser.add_argument("--output", metavar="FILE", help="adds records to this JSON file")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)
