"""What a command does with interruptions."""

import subprocess
import sys

import pytest

IN_A_CALLBACK = """
import gc, signal, sys, time
from gemma_jax.inference.console import leave, run_command

sent = []

def callback(phase, _):
    if not sent:
        sent.append(signal.raise_signal(signal.SIGINT))
    for _ in range(1000):
        pass

def command():
    gc.callbacks.append(callback)
    gc.collect()
    print("went on")
    time.sleep(60)

leave(run_command(command))
"""
ANYWHERE = IN_A_CALLBACK.replace("gc.collect()", "callback(0, 0)")


@pytest.mark.parametrize("program", [IN_A_CALLBACK, ANYWHERE], ids=["collection", "anywhere"])
def test_an_interruption_ends_a_command_wherever_it_comes(program):
    """Python throws away what is raised in a callback of its garbage collector."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_handlers_are_as_before_when_a_command_is_over():
    program = (
        "import signal\nfrom gemma_jax.inference.console import run_command\n"
        "assert run_command(lambda: None) == 0\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "assert run_command(lambda: signal.raise_signal(signal.SIGINT)) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_process_does_not_wait_for_a_thread_of_ours():
    """What is printed is out by then."""
    program = (
        "import threading, time\nfrom gemma_jax.inference.console import leave\n"
        "threading.Thread(target=time.sleep, args=(60,), name='gemma_jax compiler').start()\n"
        "print('said')\nleave(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"said\n", b"")
