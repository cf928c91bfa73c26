"""Where XLA is asked for the same numbers every time, the model leaves out what does not go with that."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_params, random_tokens, tiny_config

from gemma_jax.model import determinism, kernels
from gemma_jax.model.attention import cudnn_takes
from gemma_jax.model.weights import ROWS_ADDED, Weight
from gemma_jax.train.step import Batch, batch_loss

ASKED = "--xla_gpu_deterministic_ops=true"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false {ASKED}")
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "flags, is_asked",
    [
        ("", False),
        ("--xla_gpu_autotune_level=0", False),
        (ASKED, True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_exclude_nondeterministic_ops=1", True),
        (f"{ASKED} --xla_gpu_deterministic_ops=false", False),  # the last one counts
        ("--xla_gpu_deterministic_ops=0", False),
    ],
)
def test_flags_are_understood_as_xla_does(monkeypatch, flags, is_asked):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert determinism.is_asked() is is_asked


@pytest.mark.parametrize("flags", ["", "--xla_gpu_autotune_level=0"])
def test_asking_keeps_other_flags(monkeypatch, flags):
    monkeypatch.setenv("XLA_FLAGS", flags)
    determinism.ask()
    assert determinism.is_asked()
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), ASKED]


def test_cudnn_is_left_out(monkeypatch):
    monkeypatch.setattr(kernels, "compute_capability", lambda: kernels.HOPPER)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert cudnn_takes(256)
    monkeypatch.setenv("XLA_FLAGS", ASKED)
    assert not cudnn_takes(256)


@pytest.mark.parametrize("shape", [(2, 5), (3, ROWS_ADDED // 2 + 1), (0,)])
def test_rows_and_their_gradient(asked, shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 4)).astype(np.float32)
    indices, slope = rng.integers(0, 7, shape), rng.normal(size=(*shape, 4)).astype(np.float32)
    found, vjp = jax.vjp(lambda x: Weight(x).rows(jnp.asarray(indices), "float32"), values)
    np.testing.assert_array_equal(found, values[indices])
    wanted = np.zeros((7, 4))  # float64
    np.add.at(wanted, indices, slope)
    np.testing.assert_allclose(vjp(jnp.asarray(slope))[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["slots", "gated_delta", "linear"])
def test_nothing_is_scattered_into_gradients(asked, rule):
    config = tiny_config(rule=rule)
    text = random_tokens(config, 2, 33)
    batch = Batch(text[:, :-1], text[:, 1:], jnp.ones((2, 32)))
    gradient = jax.jit(jax.grad(lambda params: batch_loss(params, batch, config=config)))
    lowered = gradient.lower(random_params(config)).as_text()
    scattered = re.findall(r'"stablehlo.scatter".*?-> tensor<[^>]*>', lowered, re.DOTALL)
    assert not [one for one in scattered if "unique_indices = true" not in one]
