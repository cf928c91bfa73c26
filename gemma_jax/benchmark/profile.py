"""Where a GPU's time goes: the kernels of some calls and the waits between them, as a page of Markdown."""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_jax.benchmark.records import stamp
from gemma_jax.errors import GemmaError, UsageError

KERNEL_ROWS, WAIT_ROWS = 40, 8  # of the tables; what takes less is summed up
SCOPES = 4  # of an instruction's innermost scopes are shown
WAIT = 10e-6  # seconds; the launches of kernels that follow each other are closer than this

_MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)
_METADATA = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
_LAYER = re.compile(r"layers_\d+")
_DULL = re.compile(
    r"p?jit\(|(while|body|cond|branch_\d+_fun|eval_jaxpr|closed_call|checkpoint|remat2?"
    r"|rematted_computation)$"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, or one copy: seconds on the device's clock, and the HLO module and instruction it
    belongs to. Of kernels in a CUDA graph only the name is known.
    """

    name: str
    start: float
    end: float
    module: str = ""
    instruction: str = ""

    @property
    def family(self) -> str:
        """The name without the number that tells a fusion from others of its kind."""
        return re.sub(r"_\d+$", "", self.name)


def check() -> None:
    """Raises where there are no kernels to see. It starts JAX."""
    import jax

    if jax.default_backend() != "gpu":
        raise UsageError(
            "--profile shows the kernels of a GPU, and JAX has none here: leave it out, or install"
            " JAX for your GPU."
        )


def save(directory: str, name: str, call: Callable[[], Any], program: Callable[[], str]) -> None:
    """Profiles a call and writes `directory/name.md`.

    Args:
        call: waits until the device is done.
        program: gives the text of the optimised HLO module.

    Raises:
        GemmaError: no kernel was seen.
    """
    kernels = record(call)
    if not kernels:
        raise GemmaError(f"The profiler saw no kernel of {name}: is CUPTI installed?")
    text = page(name, kernels, program(), stamp(without={"--output": 1}))
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{name}.md").write_text(text, encoding="utf-8")


def record(call: Callable[[], Any]) -> list[Kernel]:
    """What the first GPU runs during a call, in the order of the beginnings."""
    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        files = Path(directory).rglob("*.xplane.pb")
        traces = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
    found = []
    for plane in (plane for trace in traces for plane in trace.planes):
        if "/device:GPU:0" in plane.name:
            for event in (e for line in plane.lines if "Stream" in line.name for e in line.events):
                begin, end = event.start_ns / 1e9, (event.start_ns + event.duration_ns) / 1e9
                stats = dict(event.stats)
                of = (str(stats.get(key, "")) for key in ("hlo_module", "hlo_op"))
                found.append(Kernel(event.name, begin, end, *of))
    return sorted(found, key=lambda kernel: kernel.start)


def scopes(program: str) -> dict[str, str]:
    """By instruction of an HLO module, the innermost scopes of the model's that it computes.

    All layers have the same, so that their kernels count together.
    """
    return {instruction: _scope(path) for instruction, path in _METADATA.findall(program)}


def _scope(path: str) -> str:
    parts = [part for part in path.split("/") if not _DULL.match(part)]
    parts = [_LAYER.sub("layer", re.sub(r"[\w.]+\(|\)", "", part)) for part in parts]
    backward = "backward: " if "transpose(" in path else ""
    again = "again: " if "rematted_computation" in path else ""
    return backward + again + "/".join([part for part in parts if part][-SCOPES:])


def waits(kernels: Iterable[Kernel]) -> list[tuple[float, Kernel, Kernel]]:
    """Seconds in which nothing runs, with the kernels before and after."""
    found: list[tuple[float, Kernel, Kernel]] = []
    last: Kernel | None = None
    for kernel in kernels:
        if last is not None and kernel.start > last.end:
            found.append((kernel.start - last.end, last, kernel))
        if last is None or kernel.end > last.end:
            last = kernel
    return found


def page(name: str, kernels: list[Kernel], program: str, stamped: Mapping[str, Any]) -> str:
    """The profile as Markdown: time by kernel and by what of the model it computes.

    A kernel of a graph goes by the instruction that it is named after. Fusions that are alike share a
    kernel, and so its name.
    """
    module, of = _MODULE.search(program), scopes(program)
    by_name = {re.sub(r"[.\-]", "_", instruction): scope for instruction, scope in of.items()}
    times: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        if kernel.instruction:
            known = module is not None and kernel.module == module[1]
            scope = of.get(kernel.instruction, "") if known else ""
        else:
            scope = by_name.get(kernel.name, "")
        times[f"`{kernel.family}`", scope].append(kernel.end - kernel.start)
    whole = max(kernel.end for kernel in kernels) - kernels[0].start
    idle = waits(kernels)
    long = [wait for wait in idle if wait[0] > WAIT]
    between: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
    for seconds, before, after in long:
        between[f"`{before.family}`", f"`{after.family}`"].append(seconds)
    versions = ", ".join(f"{package} {version}" for package, version in stamped["versions"].items())
    lines = [
        f"# {name}: where the time goes",
        "",
        f"```\n{stamped['command']}\n```",
        "",
        f"{stamped['device']}, {stamped['date']}, {versions}",
        "",
        f"{1e3 * whole:.2f} ms from the first kernel to the end, {len(kernels):,} launches and copies;"
        f" nothing ran in {1e3 * sum(seconds for seconds, *_ in idle):.2f} ms. What of the model a"
        " kernel of a CUDA graph computes is known only where it has the name of an instruction.",
        "",
        "| ms | share | launches | us each | kernel | what of the model |",
        "|---:|---:|---:|---:|---|---|",
        *_rows(times, whole, KERNEL_ROWS),
    ]
    if long:
        lines += [
            "",
            f"Where nothing ran for more than {1e6 * WAIT:.0f} us:",
            "",
            "| ms | share | waits | us each | after | before |",
            "|---:|---:|---:|---:|---|---|",
            *_rows(between, whole, WAIT_ROWS),
        ]
    return "\n".join(lines) + "\n"


def _rows(groups: Mapping[tuple[str, ...], list[float]], whole: float, number: int) -> list[str]:
    """Rows of a table of seconds, the largest first; `number` of them, and one of all others."""
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))
    rows = ranked[:number]
    if rest := [seconds for _, group in ranked[number:] for seconds in group]:
        rows.append(((f"{len(ranked) - number} others", ""), rest))
    found = []
    for labels, group in rows:
        total, each = sum(group), sum(group) / len(group)
        cells = (f"{1e3 * total:.2f}", f"{total / whole:.1%}", str(len(group)), f"{1e6 * each:.1f}")
        found.append(f"| {' | '.join((*cells, *labels))} |")
    return found
