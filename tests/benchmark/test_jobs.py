"""Jobs run side by side, each with its share of a card, and are told once when they are to end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.jobs import Job, Machine, alone

SAYS = """
import json, os, sys, time
begun = time.monotonic()
time.sleep(0.3)
names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION")
print(json.dumps([begun, time.monotonic(), *map(os.environ.get, names)]))
sys.exit(int(sys.argv[1]))
"""
ENDS_LATE = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text("begun")
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    with alone(tmp_path, lambda: None) as file:
        yield file


def jobs(tmp_path, codes):
    return [
        Job(f"job {i}", ("-c", SAYS, str(code)), tmp_path / f"{i}.log")
        for i, code in enumerate(codes)
    ]


def test_slots_are_full_and_never_more_than_full(tmp_path, lock):
    made, ended = jobs(tmp_path, [0, 0, 3, 0, 0, 0]), {}
    machine = Machine(("0", "1"), 2, lock)
    machine.run(made, lambda job, code: ended.update({job.name: code}))
    assert ended == {f"job {i}": 3 if i == 2 else 0 for i in range(6)}
    told = [json.loads(job.log.read_text()) for job in made]
    beside = [[other for other in told if other[0] <= one[0] < other[1]] for one in told]
    assert max(map(len, beside)) == 4
    assert all(
        sum(other[2] == one[2] for other in some) <= 2
        for one, some in zip(told, beside, strict=True)
    )
    assert {one[2] for one in told} == {"0", "1"} and {one[3] for one in told} == {"0.450"}


def test_without_devices_the_environment_is_left_alone(tmp_path, lock, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    made = jobs(tmp_path, [0])
    Machine(("",), 1, lock).run(made, lambda *_: None)
    assert json.loads(made[0].log.read_text())[2:] == ["7", "0.900"]


def test_an_interruption_leaves_jobs_the_time_to_save(tmp_path, lock):
    note = tmp_path / "note"

    def interrupt():
        while not note.exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    job = Job("job", ("-c", ENDS_LATE, str(note)), tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        Machine(("",), 1, lock).run([job], lambda *_: pytest.fail("it was not done"))
    assert note.read_text() == "saved"


def test_a_directory_is_in_use_until_the_jobs_of_a_killed_parent_have_ended(tmp_path):
    parent = (
        "import pathlib, sys; from benchmarks.jobs import *; path = pathlib.Path(sys.argv[1])\n"
        "job = Job('job', ('-c', 'import time; time.sleep(1.5)'), path / 'log')\n"
        "with alone(path, print) as lock: Machine(('',), 1, lock).run([job], print)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)])
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    waited, start = [], time.monotonic()
    with alone(tmp_path, lambda: waited.append(True)):
        assert waited and time.monotonic() - start > 0.5
    with alone(tmp_path, lambda: pytest.fail("nobody has it")):
        pass
