"""Programs are compiled in order, ahead of their use; what goes wrong is known when one is used."""

import threading
import types

import pytest

from gemma_jax.train import programs as module
from gemma_jax.train.programs import Programs


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(module, "THREADS", 2)


def lowered(compile_for):
    return lambda length: types.SimpleNamespace(compile=lambda: compile_for(length))


def test_all_are_begun_in_order_before_any_is_used():
    begun, wait = [], threading.Event()

    def compile_for(length):
        begun.append(length)
        wait.wait(10)
        return lambda: length

    with Programs(lowered(compile_for), [4, 1, 2]) as programs:
        while len(begun) < 2:
            pass
        assert begun == [4, 1]
        wait.set()
        programs.wait()
        assert [programs[length]() for length in (1, 2, 4)] == [1, 2, 4]
        assert begun == [4, 1, 2]


def test_what_is_not_begun_is_left_at_the_end():
    begun, wait = [], threading.Event()

    def compile_for(length):
        begun.append(length)
        wait.wait(10)

    with Programs(lowered(compile_for), range(10)):
        while len(begun) < 2:
            pass
    wait.set()
    assert len(begun) == 2


def test_tracing_is_done_by_one_thread():
    threads = set()

    def lower(length):
        threads.add(threading.current_thread())
        return types.SimpleNamespace(compile=lambda: length)

    with Programs(lower, range(5)) as programs:
        assert [programs[length] for length in range(5)] == list(range(5))
    assert threads == {threading.current_thread()}


def test_a_failure_is_raised_where_the_program_is_used():
    def compile_for(length):
        if length == 2:
            raise MemoryError("too long")
        return length

    with Programs(lowered(compile_for), [1, 2]) as programs:
        assert programs[1] == 1
        with pytest.raises(MemoryError, match="too long"):
            programs[2]
