"""Memory of the process that reads a long file, second by second: `python -m benchmarks.resident_memory`.

`run.py` reads the file in a process of its own, whose resident set is looked at every second, on Linux. It
is given a gigabyte of the project's books one after the other where no file is named.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gemma_jax.benchmark.records import stamp
from gemma_jax.checkpoint.files import write_file
from gemma_jax.checkpoint.memory_file import require_place
from gemma_jax.errors import GemmaError, UsageError
from gemma_jax.inference.console import ArgumentParser, Console, leave, number, run_command, size
from gemma_jax.inference.documents import read_text
from gemma_jax.tasks.haystacks import shipped

RUN = Path(__file__).parents[1] / "run.py"
PROGRESS_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.resident_memory", description=__doc__)
    add, positive = parser.add_argument, number(float)(0, float("inf"), above=True)
    add("--model", metavar="DIR", help="a checkpoint (default: the small one)")
    add("--text", metavar="FILE", help="to be read (default: the books, again and again)")
    add("--gigabytes", type=positive, default=1.0, metavar="G", help="of the books (default: 1)")
    add("--minutes", type=positive, default=5.0, metavar="M", help="at most (default: 5)")
    add("--start", type=positive, default=60.0, metavar="SECONDS", help="not judged (default: 60)")
    add("--output", type=Path, metavar="FILE", help="writes the figures to this JSON file")
    add("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    return run_command(lambda: watch(options), debug=options.debug)


def watch(options: argparse.Namespace) -> None:
    """Reads, prints the figures, and writes them down where that is asked for."""
    if options.output:
        require_place(options.output)
    if not Path("/proc/self/status").exists():
        raise UsageError("What a process holds is looked up in /proc, which only Linux has.")
    with tempfile.TemporaryDirectory() as directory:
        text = options.text or books(Path(directory) / "books.txt", options.gigabytes * 1e9)
        command = [sys.executable, str(RUN), "--context", str(text), "--max-new-tokens", "0"]
        command += ["--model", options.model] if options.model else []
        samples = sample(command, options.minutes * 60, Console())
        figures = {"text_bytes": os.path.getsize(text)} | judged(samples, options.start)
    for name, value in figures.items():
        print(f"{name:<24} {value:>16,}")
    if options.output:
        record = figures | stamp("benchmarks.resident_memory") | {"samples": samples}
        write_file(options.output, [json.dumps(record).encode()])


def books(path: Path, length: float) -> Path:
    """Writes the books one after the other until there are so many bytes."""
    everything = itertools.cycle((*shipped("train"), *shipped("held_out")))
    written = 0
    with open(path, "wb") as file:
        for piece in itertools.chain.from_iterable(map(read_text, everything)):
            written += file.write(piece.encode()[: max(int(length) - written, 0)])
            if written >= length:
                return path
    raise AssertionError("the books have no end")


def sample(command: Sequence[str], seconds: float, console: Console) -> list[tuple[float, int]]:
    """Seconds since the start and bytes, once a second, until the command ends or the time is over.

    Raises:
        GemmaError: the command failed.
    """
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    samples: list[tuple[float, int]] = []
    told = 0.0
    try:
        while (passed := time.monotonic() - start) < seconds and process.poll() is None:
            samples.extend((round(passed, 1), held) for held in resident(process.pid))
            if samples and passed >= told + PROGRESS_SECONDS:
                told = passed
                console.line(f"{passed:.0f} s: {size(samples[-1][1])}")
            time.sleep(1.0)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode not in (0, -signal.SIGKILL):
        raise GemmaError(f"{' '.join(command)} failed with {process.returncode}: run it alone.")
    return samples


def resident(process: int) -> Iterator[int]:
    """Bytes of a process in memory; nothing when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return
    yield from (int(line.split()[1]) * 1024 for line in status.splitlines() if "VmRSS" in line)


def judged(samples: Sequence[tuple[float, int]], start: float) -> dict[str, int]:
    """What was held when `start` seconds were over, and what came to it.

    Raises:
        UsageError: nothing came after the start.
    """
    after = [held for seconds, held in samples if seconds >= start]
    if len(after) < 2:
        raise UsageError(f"The reading ended within {start:g} s: give it more, or a lower --start.")
    half = len(after) // 2
    return {
        "seconds": round(samples[-1][0]),
        "bytes_after_start": after[0],
        "most_bytes_after_start": max(after),
        "bytes_at_the_end": after[-1],
        "most_in_first_half": max(after[:half]),
        "most_in_second_half": max(after[half:]),
    }


if __name__ == "__main__":
    leave(main())
