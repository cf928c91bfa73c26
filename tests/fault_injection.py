"""What is killed, damaged or out of room: whole files, or a sentence. `python tests/fault_injection.py`
does it many times and prints a table; `test_faults.py` does it a few times.
"""

import argparse
import contextlib
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
READ = ("--max-new-tokens", "8", "--segment-length", "128")
# Saves States that tell which they are, one after the other, and says when each begins and is done.
SAVE = """
import sys, gemma_jax, jax.numpy as jnp
model = gemma_jax.load(sys.argv[1], segment_length=16384)
state = gemma_jax.init_state(model.config)
for i in range(10**6):
    print("saving", i, flush=True)
    saved = state.replace(length=state.length + i, layers=(
        state.layers[0].replace(keys=jnp.full_like(state.layers[0].keys, i)), state.layers[1]))
    gemma_jax.save_state(sys.argv[2], saved, model=model)
    print("saved", i, flush=True)
"""


class Failed(Exception):
    """Something is not as it has to be."""


def require(holds: Any, what: str) -> None:
    if not holds:
        raise Failed(what)


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@contextlib.contextmanager
def started(*arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        require(process.poll() is None and time.monotonic() < deadline, "the work did not begin")
        time.sleep(0.001)


def kill_a_conversion(source: Path, place: Path, rng: random.Random, seconds: float) -> str | None:
    """Replaces a checkpoint and is killed; afterwards there is a whole one.

    Returns:
        Where in the work it was; None when the work was done before.
    """
    from gemma_jax.checkpoint import store

    dest = place / "checkpoint"
    if not dest.exists():
        run("convert_weights.py", source, dest, "--dtype", "float32")
    before = store.part_hashes(dest)
    with started(
        "convert_weights.py", source, dest, "--overwrite", "--dtype", "float32"
    ) as process:
        wait_until(lambda: partials(dest), process)
        begun = time.monotonic()
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        moment = time.monotonic() - begun
        if process.wait() == 0:
            return None
    left = partials(dest)
    store.check(dest)
    new = store.part_hashes(dest) != before
    require(new or left, "it was killed before it had begun to write")
    return f"{moment:.3f} s after it began to write: the {'new' if new else 'old'} one is whole"


def partials(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{path.name}.*.partial"))


def kill_a_save(checkpoint: Path, place: Path, rng: random.Random, model: Any) -> str:
    """Saves memory after memory to one file and is killed; afterwards there is a whole one."""
    import numpy as np

    import gemma_jax

    path = place / "a.mem"
    with started("-c", SAVE, checkpoint, path) as process:
        for _ in range(rng.randrange(3, 8)):  # the first ones are there
            process.stdout.readline(), process.stdout.readline()
        process.stdout.readline()  # it says that it begins
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        log = process.stdout.read().decode().split("\n")
    _, state = gemma_jax.load_state(path, model)
    found = int(state.length[0])
    require((np.asarray(state.layers[0].keys) == found).all(), "it is neither the old nor the new")
    done = [int(line.split()[1]) for line in log if line.startswith("saved")]
    last = max(done, default=found)
    require(last <= found <= last + 1, f"it holds {found}, and {last} had been saved")
    return f"memory {found} is whole; the log ends with {next(filter(None, reversed(log)), 'saving')!r}"


def kill_a_reading(
    checkpoint: Path, book: Path, place: Path, rng: random.Random, seconds: float, expected: str
) -> str | None:
    """Reads a book and is killed; going on gives the same answer. None when it was done before."""
    partial = place / f"{book.stem}.partial.mem"
    partial.unlink(missing_ok=True)
    arguments = [ROOT / "run.py", "--model", checkpoint, "--context", book, "--autosave", "0.05"]
    command = [sys.executable, *map(str, arguments), *READ]
    process = subprocess.Popen(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(partial.exists, process)
        time.sleep(rng.uniform(0, seconds))
    finally:
        process.kill()
    if process.wait() == 0:
        return None
    done = run(*arguments, *READ, "--resume", partial)
    require(done.returncode == 0, done.stderr[-300:])
    require(done.stdout == expected, f"{done.stdout!r} is not {expected!r}")
    require(not partial.exists(), "the autosave is still there")
    tokens = re.search(r"(\d+) tokens were read before", done.stderr)[1]
    return f"{tokens} tokens had been kept; the answer is the same"


OPTIONS = {
    "--prompt": ("who", "", "\\", "<bos>", "-", "é" * 500),
    "--context": ("book.txt", "nowhere", "", ".", "-"),
    "--prompts": ("book.txt", "nowhere"),
    "--load-memory": ("nowhere", "book.txt", "."),
    "--resume": ("nowhere", "book.txt"),
    "--save-memory": ("new.mem", ".", "book.txt/new.mem"),
    "--max-new-tokens": ("3", "-1", "x"),
    "--temperature": ("0", "1", "nan", "-1"),
    "--top-k": ("1", "0", "9" * 30),
    "--top-p": ("0.5", "2"),
    "--seed": ("1", "-1"),
    "--stop": ("a", ""),
    "--memory": ("delta", "nothing", "a.py:B"),
    "--segment-length": ("64", "0"),
    "--autosave": ("5", "0"),
    "--chat": (),
    "--template": (),
    "--json": (),
    "--quiet": (),
    "--frob": (),
}


def run_any_command(place: Path, rng: random.Random) -> str:
    """Runs the command with options of all kinds: an exit code of the contract, and no traceback."""
    arguments: list[str] = []
    for name in rng.sample(sorted(OPTIONS), rng.randrange(1, 5)):
        arguments += [name, *rng.sample(OPTIONS[name], min(1, len(OPTIONS[name])))]
    if "--max-new-tokens" not in arguments:
        arguments += ["--max-new-tokens", "3"]
    arguments += ["--model", str(place / "model")]
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=300, input="the people\n"
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    require(done.returncode in (0, 2, 3, 4), f"{arguments}: {done.returncode}, {last}")
    require("Traceback" not in done.stderr and "Internal error" not in last, f"{arguments}: {last}")
    return f"exit code {done.returncode} of {arguments}"


def damage(
    files: list[Path], refuse: Callable[[Path], None], rng: random.Random, flips: int, cuts: int
) -> tuple[int, int]:
    """Flips bits and truncates files, one at a time; `refuse` has to notice each."""
    for kind, count in (("flip", flips), ("cut", cuts)):
        for _ in range(count):
            file = rng.choice(files)
            content = file.read_bytes()
            damaged = bytearray(content)
            if kind == "flip":
                place = rng.randrange(8 * len(content))
                damaged[place // 8] ^= 1 << place % 8
            else:
                place = rng.randrange(len(content))
                del damaged[place:]
            file.write_bytes(damaged)
            try:
                refuse(file)
            except Failed as error:
                raise Failed(f"{kind} at {place} of {file}: {error}") from error
            finally:
                file.write_bytes(content)
    return flips, cuts


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of this size.

    Raises:
        OSError: it cannot be mounted.
    """
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        raise OSError("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


# --- the table ------------------------------------------------------------------------------------


def repeated(name: str, times: int, trial: Callable[[int], str | None]) -> tuple[str, int, int]:
    """So many trials that count; those that came too late are made again."""
    good = done = seed = 0
    while done < times:
        try:
            found = trial(seed)
            good += found is not None
        except (Failed, Exception) as error:
            found = f"FAILED: {type(error).__name__}: {error}"
        done += found is not None
        seed += 1
        if found is not None:
            print(f"{name} {done}: {found}", flush=True)
    return name, good, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", choices=("convert", "save", "read", "commands"))
    options = parser.parse_args()
    import gemma_jax
    from gemma_jax import random_model
    from gemma_jax.checkpoint.convert import convert

    rows = []
    with tempfile.TemporaryDirectory() as place_:
        place = Path(place_)
        source = random_model.write_hugging_face(place / "source")
        convert(source, place / "model", dtype="float32")
        wanted = (options.only,) if options.only else ("convert", "save", "read", "commands")
        if "convert" in wanted:
            rows.append(
                repeated(
                    "convert",
                    options.times,
                    lambda i: kill_a_conversion(source, place, random.Random(i), 1.5),
                )
            )
        if "save" in wanted:
            model = gemma_jax.load(place / "model", segment_length=16384)
            rows.append(
                repeated(
                    "save-memory",
                    options.times,
                    lambda i: kill_a_save(place / "model", place, random.Random(i), model),
                )
            )
        if "read" in wanted:
            book = place / "book.txt"
            book.write_text("".join(f"the people called him {i}\n" for i in range(20_000)))
            done = run(ROOT / "run.py", "--model", place / "model", "--context", book, *READ)
            require(done.returncode == 0, done.stderr[-300:])
            rows.append(
                repeated(
                    "long read",
                    options.times,
                    lambda i: kill_a_reading(
                        place / "model", book, place, random.Random(i), 2.0, done.stdout
                    ),
                )
            )
        if "commands" in wanted:
            (place / "book.txt").write_text("the people called him\n" * 30)
            rows.append(
                repeated(
                    "any command",
                    options.times * 5 // 2,
                    lambda i: run_any_command(place, random.Random(i)),
                )
            )
    print("| killed with -9 during (and any command) | as it should be |\n|---|---|")
    for name, good, times in rows:
        print(f"| {name} | {good} of {times} |")


if __name__ == "__main__":
    main()
