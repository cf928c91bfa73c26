"""What changes while a run goes on."""

import pytest

from gemma_jax.train.plan import Plan, Ramp


def test_a_ramp_changes_by_constant_factors():
    ramp = Ramp(8.0, 0.5, (256, 4096))
    assert [ramp.at(256 * 2**i) for i in range(5)] == pytest.approx([8, 4, 2, 1, 0.5])
    assert Ramp(8.0, 0.5, (256, 256)).at(256) == 0.5


def test_the_penalty_grows_with_the_length_and_spares_the_shortest():
    plan = Plan(steps=1, minutes=None, learning_rate=1, memory_learning_rate=1, write_penalty=0.3)
    lengths = (256, 512, 1024, 2048, 4096)
    found = [plan.penalty(length, lengths) for length in lengths]
    assert found == pytest.approx([0, 0, 0, 0.1, 0.3])
    assert plan.penalty(256, (256,)) == 0.3  # of sequences that all have one length
