"""Clock and power of an NVIDIA GPU at work: one that is at its limit of power lowers its clock."""

import contextlib
import os
import subprocess
from collections.abc import Iterator

from gemma_jax.benchmark.records import Figure

SECONDS = 2  # from sample to sample
QUERY = ("--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits")


class Samples:
    """What `nvidia-smi` said meanwhile: MHz and watts."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.power: list[float] = []

    def figures(self, name: str) -> Iterator[Figure]:
        """All but the first, which is of when the work began."""
        if len(self.clock) > 1:
            yield f"{name}_clock", "MHz", self.clock[1:]
            yield f"{name}_power", "W", self.power[1:]


@contextlib.contextmanager
def watched() -> Iterator[Samples]:
    """Samples of the GPU that programs run on, complete when the block is left."""
    from gemma_jax.model.kernels import compute_capability

    samples = Samples()
    if not compute_capability():
        yield samples
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", visible, *QUERY, f"--loop={SECONDS}"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:  # not installed
        yield samples
        return
    try:
        yield samples
    finally:
        process.terminate()
        for line in process.communicate()[0].splitlines():
            try:
                clock, power = map(float, line.split(","))
            except ValueError:  # "[N/A]", or a line cut off
                continue
            samples.clock.append(clock)
            samples.power.append(power)
