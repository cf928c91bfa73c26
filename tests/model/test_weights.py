"""Weight matrices: int8 is as near as eight bits allow, and products agree with float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import NumpyGemma, all_logits, random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax.model import kernels
from gemma_jax.model.kernels import matvec
from gemma_jax.model.layers import geglu
from gemma_jax.model.transformer import keep_products
from gemma_jax.model.weights import (
    SCALE,
    Weight,
    product,
    product_in_halves,
    product_of_one,
    quantize,
)


def test_int8_is_the_nearest_of_255_steps():
    rng = np.random.default_rng(0)
    matrix = rng.normal(0.0, 1.0, (5000, 24)) * rng.uniform(1e-4, 1e3, (5000, 1))
    matrix[7] = 0.0
    values, scale = quantize(matrix)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    assert np.abs(values.astype(int)).max(axis=1).tolist() == [127 * (i != 7) for i in range(5000)]
    error = np.abs(values * scale[:, None].astype(np.float64) - matrix)
    assert (error <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantized", [False, True])
def test_products(quantized, dtype):
    rng = np.random.default_rng(0)
    matrix, x = rng.normal(size=(30, 50)), jnp.asarray(rng.normal(size=(2, 3, 50)), dtype)
    if quantized:
        weight = Weight(*map(jnp.asarray, quantize(matrix)))
        matrix = np.asarray(weight.values, np.float64) * np.asarray(weight.scale)[:, None]
    else:
        weight = Weight(jnp.asarray(matrix, dtype))
        matrix = np.asarray(weight.values, np.float64)
    wanted = np.asarray(x, np.float64) @ matrix.T
    tolerance = 3e-6 if dtype == "float32" else 2e-2
    found = product(x, weight)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=tolerance * 10)
    one = product_of_one(x[:1, :1], weight, jnp.float32)
    assert one.shape == (1, 1, 30) and one.dtype == jnp.float32
    np.testing.assert_allclose(one, wanted[:1, :1], atol=1e-5)  # sums and scales are float32
    np.testing.assert_allclose(weight.rows(jnp.array([3, 1]), "float32"), matrix[[3, 1]], rtol=1e-6)


def test_large_int8_matrices_are_streamed_by_a_kernel_where_there_is_one(monkeypatch):
    calls = []

    def kernel(row, values, scale):
        calls.append((values.shape, row.dtype.name))
        return values.astype(jnp.float32) @ row.astype(jnp.float32) * scale

    monkeypatch.setattr(kernels, "wanted", lambda: True)
    monkeypatch.setattr(kernels, "lays_out_registers", lambda: True)
    monkeypatch.setattr(matvec, "takes", lambda rows, columns: rows > 20)
    monkeypatch.setattr(matvec, "product_of_one", kernel)
    rng = np.random.default_rng(0)
    for rows, dtype in ((30, "bfloat16"), (30, "float32"), (10, "bfloat16")):
        weight = Weight(*map(jnp.asarray, quantize(rng.normal(size=(rows, 50)))))
        x = jnp.asarray(rng.normal(size=(1, 1, 50)), dtype)

        def of_x(x, weight=weight):
            return product_of_one(x, weight, jnp.float32).sum()

        wanted = weight.dense("float32")
        found = product_of_one(x, weight, jnp.float32)
        np.testing.assert_allclose(found, x.astype(jnp.float32) @ wanted.T, rtol=1e-4, atol=1e-4)
        slope = jax.jit(jax.grad(of_x))(x)
        np.testing.assert_allclose(
            np.asarray(slope[0, 0], np.float32), wanted.sum(axis=0), rtol=2e-2, atol=2e-2
        )
    assert set(calls) == {((30, 50), "bfloat16")}
    dense = Weight(jnp.ones((30, 50), jnp.bfloat16))
    calls.clear()
    product_of_one(jnp.ones((1, 50), jnp.bfloat16), dense)
    assert not calls


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_is_the_model_of_its_rounded_weights(tied):
    config = tiny_config(rule="gated_delta", tied_embeddings=tied)
    rounded = random_params(config)
    quantised = dataclasses.replace(config, quantization="int8")
    params = jax.tree.map(lambda leaf: leaf, rounded)

    def visit(wide, narrow):
        for name, leaf in list(wide.items()):
            if isinstance(leaf, dict):
                if name != "memory":
                    visit(leaf, narrow[name])
            elif leaf.ndim == 2:
                values, scale = quantize(np.asarray(leaf))
                narrow[name], narrow[name + SCALE] = jnp.asarray(values), jnp.asarray(scale)
                wide[name] = jnp.asarray(values * scale[:, None])

    visit(rounded, params)
    shapes = gemma_jax.abstract_params(quantised)
    assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), params, shapes)
    tokens = random_tokens(config, 1, 30)
    wanted = NumpyGemma(rounded, config).logits(tokens[0])
    found = all_logits(params, tokens, quantised)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_random_int8_weights_are_of_the_usual_size():
    config = tiny_config(quantization="int8", width=64, mlp_dim=128)
    params = gemma_jax.init_params(config, jax.random.key(0))
    mlp = params["layers_0"]["mlp"]
    assert mlp["down"].dtype == jnp.int8 and mlp["down" + SCALE].shape == (64,)
    spread = float(jnp.std(mlp["down"] * mlp["down" + SCALE][:, None]))
    assert abs(spread - 0.02) < 1e-3


def test_halves_of_a_product_and_their_gradients_are_those_of_the_product(monkeypatch):
    monkeypatch.setattr(kernels, "compute_capability", lambda: kernels.AMPERE)
    rng = np.random.default_rng(0)
    x, matrix, slope = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((2, 5, 24), (64, 24), (2, 5, 64))
    )
    halves, pull = jax.vjp(lambda x, matrix: product_in_halves(x, Weight(matrix)), x, matrix)
    of_x, of_matrix = pull(tuple(jnp.split(slope, 2, axis=-1)))
    assert [half.shape for half in halves] == [(2, 5, 32)] * 2
    exact = [np.asarray(y, np.float64) for y in (x, matrix, slope)]
    wanted = exact[0] @ exact[1].T, exact[2] @ exact[1], np.einsum("BTN,BTK->NK", *exact[2::-2])
    for found, exact in zip((jnp.concatenate(halves, -1), of_x, of_matrix), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(found, np.float64), exact, rtol=0, atol=2**-8 * np.abs(exact).max()
        )


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_halves_of_a_product_with_other_weights_are_those_of_the_product(kind, monkeypatch):
    """They are neither rounded to bfloat16 nor made dense for a single token."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 1, 24)), jnp.bfloat16)
    values = rng.normal(size=(64, 24)).astype(np.float32)
    weight = Weight(*map(jnp.asarray, quantize(values) if kind == "int8" else (values,)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    wanted = product(x, weight)
    monkeypatch.setattr(kernels, "compute_capability", lambda: kernels.AMPERE)
    monkeypatch.setattr(Weight, "dense", None)
    halves = product_in_halves(x, weight)
    np.testing.assert_array_equal(jnp.concatenate(halves, -1), wanted)


def test_the_gradient_of_a_feed_forward_joins_nothing_and_computes_no_product_again(monkeypatch):
    monkeypatch.setattr(kernels, "compute_capability", lambda: kernels.AMPERE)
    x, matrix = jnp.ones((1, 5, 24), jnp.bfloat16), jnp.ones((64, 24), jnp.bfloat16)

    @functools.partial(jax.checkpoint, policy=keep_products)
    def loss(x, matrix):
        return geglu(x, Weight(matrix)).astype(jnp.float32).sum()

    written = jax.jit(jax.grad(loss, (0, 1))).lower(x, matrix).as_text()
    assert written.count("stablehlo.dot_general") == 5  # one, and two for each gradient
    assert [line.split("-> ")[-1] for line in written.splitlines() if "concatenate" in line] == [
        "tensor<64x24xbf16>"
    ]
