"""Memory rules by themselves: hard inputs against a float64 loop, masks, and a rule from a file."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    RULES,
    NumpyGemma,
    all_logits,
    make_memory,
    random_params,
    random_tokens,
    tiny_config,
)

import gemma_jax
from gemma_jax.errors import UsageError
from gemma_jax.model import kernels
from gemma_jax.model.delta import delta_map, matrix_einsum, solve
from gemma_jax.model.memory import MemoryRule, make_rule, write_segments

LONG = 800  # more than three blocks of the chunked delta rule


def keys_and_gates(kind, rng, kv_heads=2, dim=8):
    key = rng.normal(size=(LONG, kv_heads, dim))
    gate = rng.uniform(size=(LONG, kv_heads))
    if kind == "equal keys":
        key[:] = key[0]
    elif kind == "nearly equal keys, gate 1":
        key, gate = key[:1] + 1e-4 * key, np.ones_like(gate)
    elif kind == "gates 0 and 1":
        gate = np.round(gate)
    elif kind == "gate 0":
        gate = np.zeros_like(gate)
    elif kind == "repeated filler":
        key, gate = np.tile(key[:10], (LONG // 10, 1, 1)), np.ones_like(gate)
    return key, gate


@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "equal keys",
        "nearly equal keys, gate 1",
        "gates 0 and 1",
        "gate 0",
        "repeated filler",
    ],
)
def test_the_chunked_delta_rule_equals_the_loop(kind):
    rng = np.random.default_rng(0)
    config = tiny_config(rule="gated_delta")
    key, gate = keys_and_gates(kind, rng)
    value = rng.normal(size=key.shape)
    loop = make_memory(config, {})
    loop.arrays["M"][:] = start = rng.normal(size=loop.arrays["M"].shape)
    loop.write_gated(key, value, gate)

    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    keep, add = delta_map(*(jnp.asarray(x[None], jnp.float32) for x in (unit, value, gate)))
    found = np.asarray(keep[0] @ start.astype(np.float32) + add[0])
    np.testing.assert_allclose(found, loop.arrays["M"], rtol=0, atol=2e-5 * np.abs(found).max())
    assert (kind == "gate 0") == np.array_equal(found, start.astype(np.float32))


def test_a_solve_and_its_gradient_are_those_of_a_triangular_system():
    rng = np.random.default_rng(0)
    lower = np.tril(rng.uniform(size=(3, 64, 64)), -1)
    lower[0] = np.tril(np.ones((64, 64)), -1)  # equal keys, gates of 1
    right, weights = rng.normal(size=(2, 3, 64, 5))
    wanted = np.linalg.solve(np.eye(64) + lower, right)
    found = solve(jnp.float32(lower), jnp.float32(right))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

    def loss(lower, right):
        return jnp.sum(weights * solve(lower, right))

    of_lower, of_right = jax.grad(loss, (0, 1))(jnp.float32(lower), jnp.float32(right))
    wanted_right = np.linalg.solve(np.eye(64) + lower.transpose(0, 2, 1), weights)
    np.testing.assert_allclose(of_right, wanted_right, rtol=1e-4, atol=1e-4)
    wanted_lower = -np.tril(wanted_right @ wanted.transpose(0, 2, 1), -1)
    np.testing.assert_allclose(of_lower, wanted_lower, rtol=1e-3, atol=1e-3)


def test_no_solver_waits_for_threads_that_solve_themselves():
    """LAPACK's does on CPUs: with two of them at work on two cores, training stood still."""
    key, gate = jnp.ones((2, 200, 2, 8)), jnp.ones((2, 200, 2))
    program = jax.jit(jax.grad(lambda key: delta_map(key, key, gate)[1].sum())).lower(key)
    assert "lapack" not in program.as_text()


@pytest.mark.parametrize("rule", RULES[1:])
def test_what_is_masked_leaves_no_trace(rule):
    config = tiny_config(rule=rule)
    made, rng = make_rule(config), np.random.default_rng(1)
    length, heads = config.memory.segment_length, (config.num_kv_heads, config.head_dim)
    tokens = {
        "key": jnp.asarray(rng.normal(size=(3, length, *heads)), jnp.float32),
        "value": jnp.asarray(rng.normal(size=(3, length, *heads)), jnp.float32),
        "write": jnp.asarray(rng.uniform(size=(3, length, heads[0])), jnp.float32),
        "score": jnp.asarray(rng.normal(size=(3, length, heads[0])), jnp.float32),
    }
    before = jax.tree.map(lambda leaf: leaf + 0.5, made.init(3))
    present = jnp.array([True, False, True])
    segments = jax.tree.map(lambda leaf: leaf[None], tokens)
    after, memories = write_segments(made, before, segments, present[None])
    for name in before:
        np.testing.assert_array_equal(memories[name][0], before[name])
    for name in before:
        np.testing.assert_array_equal(after[name][1], before[name][1])
        assert (np.asarray(after[name][0]) != np.asarray(before[name][0])).any()
    # Rows do not know of each other.
    alone, _ = write_segments(
        made,
        jax.tree.map(lambda leaf: leaf[2:], before),
        jax.tree.map(lambda leaf: leaf[:, 2:], segments),
        present[None, 2:],
    )
    for name in before:
        np.testing.assert_allclose(after[name][2:], alone[name], rtol=1e-6)


def test_a_row_without_a_segment_keeps_its_memory_whatever_the_rule_does():
    class Careless(MemoryRule):
        def write(self, memory, features, mask):
            return {"count": memory["count"] + 1}

    segments = {"key": jnp.ones((3, 2, 8, 2, 8))}
    present = jnp.array([[True, False], [False, False], [True, True]])
    after, before = write_segments(
        Careless(tiny_config()), {"count": jnp.zeros((2, 2))}, segments, present
    )
    assert after["count"].tolist() == [[2, 2], [1, 1]]
    assert before["count"][:, :, 0].tolist() == [[0, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_an_empty_memory_reads_zero_and_has_a_gradient(rule):
    made = make_rule(tiny_config(rule=rule))
    q = jnp.ones((1, 2, 4, 8))
    p = {"gate": jnp.zeros(4)}
    np.testing.assert_allclose(made.read(p, made.init(1), q, 3.0 * q), 1.5 * q)
    gradient = jax.grad(lambda q: made.read(p, made.init(1), q, q).sum())(q)
    assert np.isfinite(gradient).all()


def test_a_normaliser_keeps_growing():
    """In bfloat16 it would stand still after 256 equal additions."""
    made = make_rule(tiny_config(rule="linear", dtype="bfloat16"))
    memory, one = made.init(1), jnp.ones((1, 8, 2, 8), jnp.bfloat16)
    segments, present = {"key": one[None], "value": one[None]}, jnp.ones((1, 1), bool)
    write = jax.jit(lambda memory: write_segments(made, memory, segments, present)[0])
    for _ in range(100):
        memory = write(memory)
    np.testing.assert_allclose(memory["z"], 2.0 * 800)


def test_the_hard_gate_closes_exactly_and_can_open_again():
    made = make_rule(tiny_config(rule="gated_delta"))
    x = jnp.ones((1, 1, 20))
    q = k = jnp.ones((1, 1, 2, 8))

    def gate(bias):
        p = {"write_kernel": jnp.zeros((20, 2)), "write_bias": jnp.full(2, bias)}
        return made.features(p, x, q, k, k)["write"][0, 0, 0]

    assert [float(gate(bias)) for bias in (-9.0, -2.0, 0.0, 2.0, 9.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert float(jax.grad(gate)(-3.0)) > 0 and float(jax.grad(gate)(3.0)) > 0


@pytest.mark.parametrize("rule", RULES[1:])
def test_inspect_tells_gates_and_written_share(rule):
    config = tiny_config(rule=rule)
    params, tokens = random_params(config), random_tokens(config, 2, 40)
    _, state = gemma_jax.prefill(params, tokens, gemma_jax.init_state(config, 2), config=config)
    found = gemma_jax.inspect(params, state, config=config)
    assert list(found) == [0, 2]  # the sliding layer has no memory
    gate = np.asarray(params["layers_2"]["attention"]["memory"]["gate"], np.float64)
    expected = 1 / (1 + np.exp(-gate)) if rule in ("linear", "delta") else gate
    np.testing.assert_allclose(found[2]["read"], expected, rtol=1e-6)
    held = "key" if rule == "slots" else "M"
    np.testing.assert_array_equal(found[0][held], state.layers[0].memory[held])
    if rule not in ("linear", "delta"):
        share = np.asarray(found[0]["written_share"])
        assert share.shape == (2, 2) and (share > 0).all() and (share < 1).all()
        np.testing.assert_array_equal(found[0]["offered"], np.full((2, 2), 32.0))


def test_the_documented_rule_of_ones_own(tmp_path):
    page = pathlib.Path(__file__).parents[2] / "docs" / "memory_rules.md"
    file = tmp_path / "fading.py"
    file.write_text(page.read_text().split("```python\n")[1].split("```")[0])
    config = tiny_config(rule=f"{file}:Fading", layer_types=("global",))
    params, tokens = random_params(config), random_tokens(config, 1, 45)
    state = gemma_jax.init_state(config)
    _, state = gemma_jax.prefill(params, tokens, state, config=config)

    # The same token by token, for the 32 tokens that left sight.
    numpy = NumpyGemma(params, config)
    p = numpy.params["layers_0"]
    x = numpy.params["embedder"]["embedding"][tokens[0]] * np.sqrt(config.width)
    _, k, v = numpy.project(p["attention"], numpy.norm(p["pre_attention_norm"], x))
    keep = 1 / (1 + np.exp(-4.0 - p["attention"]["memory"]["decay"]))
    expected = np.zeros((config.num_kv_heads, config.head_dim, config.head_dim))
    for t in range(32):
        weights = np.exp(k[t]) / np.exp(k[t]).sum(-1, keepdims=True)
        expected = expected * keep[:, None, None] + weights[:, :, None] * v[t][:, None, :]
    np.testing.assert_allclose(state.layers[0].memory["M"][0], expected, rtol=1e-4, atol=1e-5)

    # Memory is read from where the first segment left sight, and any split gives the same.
    with_rule = all_logits(params, tokens, config)
    without = all_logits(params, tokens, config.with_memory(rule="off"))
    np.testing.assert_allclose(with_rule[:, :16], without[:, :16], rtol=0, atol=1e-5)
    assert np.abs(with_rule[:, 16:] - without[:, 16:]).max() > 1e-3
    split = gemma_jax.init_state(config)
    for piece in np.split(tokens, [3, 19, 20], axis=1):
        _, split = gemma_jax.prefill(params, piece, split, config=config)
    found, once = split.layers[0].memory["M"], state.layers[0].memory["M"]
    np.testing.assert_allclose(found, once, rtol=1e-5, atol=1e-5)


def test_a_rule_file_may_hold_what_looks_up_its_module(tmp_path):
    file = tmp_path / "rule.py"
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from gemma_jax import MemoryRule\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Rule(MemoryRule):\n"
        "    size: int = 3\n"
    )
    assert make_rule(tiny_config(rule=f"{file}:Rule")).size == 3


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("lineer", "no memory rule 'lineer'"),
        ("/nowhere/rule.py:Rule", "does not exist"),
        ("{file}:Missing", "cannot be loaded"),
        ("{file}:Other", "derive it from"),
        ("{broken}:Rule", "cannot be loaded"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(tmp_path, name, sentence):
    (tmp_path / "rule.py").write_text("class Other: pass\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    name = name.format(file=tmp_path / "rule.py", broken=tmp_path / "broken.py")
    with pytest.raises(UsageError, match=sentence):
        make_rule(tiny_config(rule=name))


def test_rules_are_documented():
    for name in RULES:
        kind = type(make_rule(tiny_config(rule=name)))
        assert issubclass(kind, MemoryRule) and kind.__doc__


def test_a_rule_that_remembers_nothing_still_reads(tmp_path):
    file = tmp_path / "negative.py"
    file.write_text(
        "from gemma_jax import MemoryRule\n"
        "class Negative(MemoryRule):\n"
        "    def read(self, p, memory, q, attended):\n"
        "        return -attended\n"
    )
    config = tiny_config()
    params, tokens = random_params(config), random_tokens(config, 1, 40)
    negative = config.with_memory(rule=f"{file}:Negative")
    state = gemma_jax.init_state(negative)
    assert not jax.tree.leaves([layer.memory for layer in state.layers])
    plain = all_logits(params, tokens, config)
    assert np.abs(all_logits(params, tokens, negative) - plain).max() > 1e-3


def on_nvidia(monkeypatch, capability, function, *args):
    """The program for a GPU of this compute capability; it is not run."""
    monkeypatch.setattr(kernels, "compute_capability", lambda: capability)
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_products_of_matrices_are_exact_on_tensor_cores(monkeypatch):
    """Never in one pass of TF32, the GPU's default."""

    def written(capability, **options):
        def product(x, y):
            return matrix_einsum("bij,bjk->bik", x, y, **options)

        x = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
        return on_nvidia(monkeypatch, capability, product, x, x)

    exact, narrow = written(kernels.AMPERE), written(kernels.AMPERE, rounded_to=jnp.bfloat16)
    assert "num_primitive_operations = 3" in exact and "precision_type = tf32" in exact
    assert "num_primitive_operations = 3" in narrow and "precision_type = bf16" in narrow
    assert "HIGHEST" in written(7) and "HIGHEST" in written(7, rounded_to=jnp.bfloat16)


@pytest.mark.parametrize("rule", ["linear", "gated_delta", "selective_delta"])
@pytest.mark.parametrize("dtype, passes", [("bfloat16", "bf16"), ("float32", "tf32")])
def test_reads_and_their_gradients_are_as_exact_as_the_dtype_needs(
    monkeypatch, rule, dtype, passes
):
    config = tiny_config(rule=rule, dtype=dtype)
    made = make_rule(config)
    q = jnp.ones((2, 4, config.num_heads, config.head_dim), dtype)
    p = {name: jnp.ones(spec.shape) for name, spec in made.params().items()}

    def loss(q, memory):
        return made.read(p, memory, q, q).astype(jnp.float32).sum()

    written = on_nvidia(monkeypatch, kernels.AMPERE, jax.grad(loss, (0, 1)), q, made.init(2))
    assert written.count("num_primitive_operations = 3") == 3  # q M, and the gradients of both
    assert written.count(f"lhs_precision_type = {passes}") == 3


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])  # of queries
def test_a_read_and_its_gradients_are_those_of_the_equations(monkeypatch, size):
    monkeypatch.setattr(kernels, "compute_capability", lambda: kernels.AMPERE)
    config = tiny_config(rule="gated_delta", num_heads=4, num_kv_heads=1, head_dim=64)
    made, rng = make_rule(config), np.random.default_rng(0)
    q = jnp.asarray(size * rng.normal(size=(1, 32, 4, 64)), jnp.bfloat16)
    attended, weights = rng.normal(size=(2, *q.shape)).astype(np.float32)
    memory = made.init(1) | {"M": jnp.asarray(rng.normal(size=(1, 1, 64, 64)), jnp.float32)}
    gate = np.ones(4)

    def read(q, M):
        return made.read({"gate": jnp.asarray(gate)}, memory | {"M": M}, q, jnp.asarray(attended))

    found, pull = jax.vjp(read, q, memory["M"])
    of_q, of_M = pull(jnp.asarray(weights))

    M, wide, weights = (np.asarray(x, np.float64) for x in (memory["M"][0, 0], q, weights))
    scale = 1 / np.sqrt((wide**2).sum(-1, keepdims=True) + 1e-6)
    unit = wide * scale
    scale_found = 1 / np.sqrt(((unit @ M) ** 2).mean(-1, keepdims=True) + 1e-6)
    normed = (unit @ M) * scale_found
    slope = scale_found * (weights - normed * (weights * normed).mean(-1, keepdims=True))
    of_unit = slope @ M.T
    wanted_q = scale * (of_unit - unit * (unit * of_unit).sum(-1, keepdims=True))

    def near(x, wanted, tolerance):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(x, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())

    near(found, attended + normed, 2**-16)
    near(of_M[0, 0], np.einsum("BTHF,BTHC->FC", unit, slope), 2**-16)
    near(of_q, wanted_q, 2**-8)
