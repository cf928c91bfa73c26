"""Processes side by side on the cards of one machine."""

import collections
import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

POLL_SECONDS = 0.1
DEVICE_MEMORY = 0.9  # share of a card that its processes divide


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of Python; what it says is added to `log`."""

    name: str
    arguments: tuple[str, ...]
    log: Path


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where jobs run.

    Attributes:
        devices: as CUDA_VISIBLE_DEVICES names them; one empty name stands for whatever there is.
        jobs: side by side on each of them.
        lock: an open file that jobs hold open too, see `alone`.
    """

    devices: tuple[str, ...]
    jobs: int
    lock: int

    @property
    def slots(self) -> int:
        return len(self.devices) * self.jobs

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, int], None]) -> None:
        """Runs all jobs, as many at once as there are slots; `ended` is told the exit code of each.

        When it is interrupted, jobs get SIGTERM and the time that they take to end.
        """
        waiting = collections.deque(jobs)
        running: dict[subprocess.Popen, tuple[Job, str]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.slots:
                    device = self._emptiest([device for _, device in running.values()])
                    job = waiting.popleft()
                    running[self._start(job, device)] = job, device
                time.sleep(POLL_SECONDS)
                for process in [process for process in running if process.poll() is not None]:
                    job, _ = running.pop(process)
                    ended(job, process.returncode)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()

    def _emptiest(self, taken: Sequence[str]) -> str:
        return min(self.devices, key=taken.count)

    def _start(self, job: Job, device: str) -> subprocess.Popen:
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{DEVICE_MEMORY / self.jobs:.3f}"}
        visible = {"CUDA_VISIBLE_DEVICES": device} if device else {}
        with open(job.log, "a") as log:
            return subprocess.Popen(
                [sys.executable, *job.arguments],
                env=os.environ | share | visible,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self.lock,),
                process_group=0,  # Ctrl-C reaches the parent alone, which tells them once
            )


@contextlib.contextmanager
def alone(directory: Path, wait: Callable[[], None]) -> Iterator[int]:
    """Holds a lock on a directory, and gives the open file that has it.

    Jobs inherit the file, so that the lock outlives a parent that is killed until they have ended too:
    two processes never write the same checkpoint. `wait` is called when others have it.
    """
    file = os.open(directory / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)
