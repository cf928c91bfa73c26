"""What changes while a run goes on."""

import pytest

from gemma_jax.train.plan import Plan, Ramp


def test_a_ramp_changes_by_constant_factors():
    ramp = Ramp(8.0, 0.5, (256, 4096))
    assert [ramp.at(256 * 2**i) for i in range(5)] == pytest.approx([8, 4, 2, 1, 0.5])
    assert Ramp(8.0, 0.5, (256, 256)).at(256) == 0.5


def test_gates_are_pressed_shut_when_the_longest_sequences_have_come():
    plan = Plan(steps=1, minutes=None, learning_rate=1, memory_learning_rate=1)
    found = [plan.pressure(done, growth=0.6) for done in (0.0, 0.6, 0.7, 0.9, 1.0, 1.1)]
    assert found == pytest.approx([0, 0, 0.5, 1, 1, 1])
    assert [plan.pressure(done, growth=0.0) for done in (0.0, 0.25)] == pytest.approx([0, 0.5])
    assert plan.pressure(1.0, growth=1.0) == 0
