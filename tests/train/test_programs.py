"""Programs are compiled in order, ahead of their use; what goes wrong is known when one is used."""

import threading

import pytest

from gemma_jax.train.programs import THREADS, Programs


def test_all_are_begun_in_order_before_any_is_used():
    begun, wait = [], threading.Event()

    def compile_for(length):
        begun.append(length)
        wait.wait(10)
        return lambda: length

    with Programs(compile_for, [4, 1, 2]) as programs:
        while len(begun) < THREADS:
            pass
        assert begun == [4, 1]
        wait.set()
        assert [programs[length]() for length in (1, 2, 4)] == [1, 2, 4]
        assert begun == [4, 1, 2]


def test_what_is_not_begun_is_left_at_the_end():
    begun, wait = [], threading.Event()

    def compile_for(length):
        begun.append(length)
        wait.wait(10)

    with Programs(compile_for, range(10)):
        while len(begun) < THREADS:
            pass
    wait.set()
    assert len(begun) == THREADS


def test_a_failure_is_raised_where_the_program_is_used():
    def compile_for(length):
        if length == 2:
            raise MemoryError("too long")
        return length

    with Programs(compile_for, [1, 2]) as programs:
        assert programs[1] == 1
        with pytest.raises(MemoryError, match="too long"):
            programs[2]
