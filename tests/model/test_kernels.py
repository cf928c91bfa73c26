"""Kernels compute what the plain lines of the model compute; here without a GPU, in interpret mode."""

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from reference import random_params, random_tokens, tiny_config

from gemma_jax import PRESETS, Greedy, decode_block, forward, prefill
from gemma_jax.config import GLOBAL, Rope
from gemma_jax.model import attention, kernels, memory
from gemma_jax.model.kernels import attention as attention_kernel
from gemma_jax.model.kernels import decode as decode_kernel
from gemma_jax.model.kernels import delta as delta_kernel
from gemma_jax.model.kernels import layer as layer_kernel
from gemma_jax.model.kernels import matvec as matvec_kernel
from gemma_jax.model.kernels import products as products_kernel
from gemma_jax.model.kernels import registers
from gemma_jax.model.kernels.lookup import Lookup
from gemma_jax.model.memory import make_rule
from gemma_jax.model.rope import rope_table
from gemma_jax.model.rule import WriteGate
from gemma_jax.model.state import Span, init_state
from gemma_jax.model.transformer import abstract_params

interprets_hopper = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this version of JAX cannot interpret them"
)

interprets_loose_barriers = pytest.mark.skipif(
    jax.__version_info__[:2] == (0, 11),
    reason="its interpreter asks that all arrivals at a barrier are waited for",
)


def on_simulated_hopper(function, *args, **kwargs):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return function(*args, **kwargs)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_near(found, wanted, tolerance):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


BF16 = 2**-8  # half a unit in the last place of what is written


@pytest.mark.parametrize("kind", ["random", "equal keys, gates 1", "gates 0 and 1", "gate 0"])
@pytest.mark.parametrize("tokens", [64, 200])
def test_delta_map(kind, tokens):
    key, value = normal(0, 2, tokens, 1, 64), normal(1, 2, tokens, 1, 32)
    gate = jax.nn.sigmoid(2 * normal(2, 2, tokens, 1, dtype=jnp.float32))
    if kind == "equal keys, gates 1":
        key, gate = jnp.broadcast_to(key[:, :1], key.shape), jnp.ones_like(gate)
    elif kind == "gates 0 and 1":
        gate = jnp.round(gate)
    elif kind == "gate 0":
        gate = jnp.zeros_like(gate)
    assert delta_kernel.takes(64, 32)
    length = jnp.sqrt(jnp.sum(jnp.square(key.astype(jnp.float32)), axis=-1) + memory.EPS)
    found = delta_kernel.delta_map(
        *(x[:, :, 0] for x in (key, length, value, gate)), interpret=True
    )
    wanted = memory.delta_map(key, value, gate)
    assert_near(found[0], wanted[0][:, 0], 2e-6)
    if kind == "gate 0":
        np.testing.assert_array_equal(found[0][0], np.eye(64))
        assert not np.any(found[1])
    else:
        assert_near(found[1], wanted[1][:, 0], 2e-6)


@interprets_hopper
@pytest.mark.parametrize(
    "rows, width, outputs, programs",
    [
        (256, 128, 512, 4),  # fewer steps than stages
        (512, 640, 1536, 10),  # tiles for some multiprocessors more than for others
        (256, 64, 256, 6),  # one step; none for some
        (768, 64, 512, 2),  # the last group of rows is smaller
    ],
)
def test_geglu(rows, width, outputs, programs, monkeypatch):
    monkeypatch.setattr(products_kernel, "GROUP", 2)
    x, weights = normal(0, rows, width), 0.1 * normal(1, outputs, width)
    assert products_kernel.takes(rows, width, outputs)
    found = on_simulated_hopper(products_kernel.geglu, x, weights, programs=programs)
    halves = jnp.split(x.astype(jnp.float32) @ weights.T.astype(jnp.float32), 2, axis=-1)
    gate, up = (half.astype(x.dtype).astype(jnp.float32) for half in halves)
    assert_near(found, nn.gelu(gate, approximate=True) * up, BF16)


@interprets_hopper
@pytest.mark.parametrize("widths", [(384, 256, 128), (320, 320, 128)])
def test_product_apart(widths):
    x, weights = normal(0, 512, 320), normal(1, 768, 320)
    found = on_simulated_hopper(
        products_kernel.product_apart, x, weights, widths=widths, programs=4
    )
    wanted = x.astype(jnp.float32) @ weights.T.astype(jnp.float32)
    assert [part.shape[1] for part in found] == [*widths]
    assert_near(jnp.concatenate(found, axis=1), wanted, BF16)


@pytest.mark.parametrize(
    "rows, width, widths, taken",
    [
        (1280, 320, (2048, 256, 256), True),
        (1024, 320, (2048, 256, 256), False),  # 80 tiles
        (1280, 328, (2048, 256, 256), False),
        (1408, 320, (2048, 256, 256), False),  # one multiprocessor would have no neighbour
        (16_384, 320, (320, 320, 128), True),
        (16_384, 320, (352, 352, 64), False),  # what is stored at once belongs to two arrays
        (16_384, 320, (384, 256, 256), False),
    ],
)
def test_which_products_are_written_apart(rows, width, widths, taken):
    assert products_kernel.takes_apart(rows, width, widths) == taken


@interprets_hopper
@pytest.mark.parametrize(
    "history, rule, q_size, size",  # the last of what is in memory
    [
        (128, "off", 1.0, 0.0),
        (0, "off", 1.0, 0.0),
        (128, "gated_delta", 1.0, 1.0),
        (0, "gated_delta", 2**-13, 1e-3),  # as small as the norms' epsilon
        (128, "linear", 1.0, 1.0),
        (0, "linear", 2**-6, 1e3),  # features that differ in what rounding takes away
    ],
)
def test_attention(history, rule, q_size, size, monkeypatch):
    """Two texts: one long read, one at its start, whose first segment has neither history nor sink.

    What is read from memory is part of it.
    """

    def accumulate(out, weight, values, meanwhile=lambda: None):
        """The interpreter has no such product."""
        meanwhile()
        return out + jnp.dot(weight, values[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(attention_kernel, "_accumulate", accumulate)
    length, segments, heads, kv_heads, dim = 128, 2, 4, 2, 128
    q = q_size * normal(0, 2, length * segments, heads, dim)
    keys, values = (normal(i, 2, history + length * segments, kv_heads, dim) for i in (1, 2))
    sink = normal(3, 2, segments, kv_heads, dim), normal(4, 2, 1, kv_heads, dim)
    past = jnp.array([10 * length, 0])
    span = Span(0 * past, past, 0 * past + length * segments, length * segments, length)
    assert attention_kernel.takes(length, history, dim)
    tables = rope_table(Rope(10_000.0), dim, history + 1 + length * segments)
    tables = tuple(table[history + 1 :] for table in tables)
    options = {"tables": tables, "history": history, "scale": dim**-0.5}
    args = (q, keys, values, sink, span)
    wanted = attention._attention_by_masks(*args, **options, window=None, softcap=None)
    lookup = None
    if rule != "off":
        matrix = size * normal(5, 2, segments, kv_heads, dim, dim, dtype=jnp.float32)
        matrix -= matrix.mean(axis=-2, keepdims=True)
        total = jnp.abs(normal(6, 2, segments, kv_heads, dim, dtype=jnp.float32))
        total = total.at[1, 0].set(0.0)  # nothing was written yet
        gates = {"gate": 3.0 * normal(7, heads, dtype=jnp.float32)}
        config = tiny_config(
            rule=rule, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, dtype="bfloat16"
        )
        made, memory = make_rule(config), {"M": matrix, "z": total}
        lookup = made.lookup(gates, memory)

        def by_segment(x):
            return x.reshape(2, segments, length, heads, dim)

        read = jax.vmap(functools.partial(made.read, gates), 1, 1)
        wanted = read(memory, by_segment(q), by_segment(wanted)).reshape(q.shape)
    found = on_simulated_hopper(attention._attention_by_kernel, *args, lookup, **options)
    assert_near(found, wanted, 2 * BF16)


@pytest.mark.parametrize(
    "rule, kind, softcap, batch",
    [
        ("off", "global", None, 3),
        ("off", "global", 5.0, 3),
        ("off", "no sink", None, 3),
        ("off", "sliding", None, 3),
        ("linear", "global", None, 3),
        ("gated_delta", "global", None, 3),
        ("gated_delta", "no sink", 5.0, 80),  # a program has several steps
    ],
)
def test_one_token(rule, kind, softcap, batch):
    """Texts at their start, in the middle of a segment, and at its end."""
    length, history, kv_heads, group, dim = 128, 128, 2, 3, 64
    q = normal(0, batch, 1, kv_heads * group, dim)
    keys, values = (normal(i, batch, history + length, kv_heads, dim) for i in (1, 2))
    sink = tuple(normal(i, batch, 1, kv_heads, dim) for i in (3, 4)) if kind == "global" else None
    fill, past = (jnp.resize(jnp.array(x), batch) for x in ([5, 100, 127], [0, 7 * length, 130]))
    span = Span(fill, past, jnp.ones_like(fill), 1, length)
    options = {"history": history, "window": 40 if kind == "sliding" else None, "scale": 0.125}
    options |= {"rope": Rope(10_000.0), "softcap": softcap}
    config = tiny_config(
        rule=rule, num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=dim, dtype="bfloat16"
    )
    made, p = make_rule(config), {"gate": normal(5, kv_heads * group, dtype=jnp.float32)}
    state = {"M": normal(6, batch, kv_heads, dim, dim, dtype=jnp.float32)}
    z = jnp.abs(normal(7, batch, kv_heads, dim, dtype=jnp.float32))
    state["z"] = z.at[0].set(0.0)  # nothing was written in the first row
    assert decode_kernel.takes(history + length, group, dim)

    args = (q, keys, values, sink)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    wanted = made.read(p, state, wide[0], attention.local_attention(*wide, span, **options))
    lookup = made.lookup(p, state)
    assert (lookup is None) == (rule == "off")
    with pytest.MonkeyPatch.context() as patch:
        kernel = functools.partial(decode_kernel.attend, interpret=True)
        patch.setattr(decode_kernel, "attend", kernel)
        found = attention.attention_of_one(*args, span, lookup, **options)
    assert_near(found, wanted, 2 * BF16)


def integer_product(rows, high, low):
    """`registers.integer_product`, which the interpreter cannot do."""
    parts = high.astype(jnp.int32), low.astype(jnp.int32) & 255
    sums = [(rows.astype(jnp.int32) * y[None]).sum(axis=1) for y in parts]
    return [s.reshape(len(s), 32, -1).sum(axis=2) for s in sums]


@pytest.mark.parametrize("kind", ["normal", "one large", "one small", "zeros"])
def test_fixed_point(kind):
    y = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    one = np.arange(2048) == 7
    y = {
        "normal": y,
        "one large": np.where(one, np.float32(-1e4), y),
        "one small": np.where(one, np.float32(3e-30), 0),
        "zeros": 0 * y,
    }[kind]
    unit, high, low = registers.fixed_point(jnp.asarray(y), jnp.abs(y).max())
    assert high.dtype == low.dtype == jnp.int8
    found = float(unit) * (256.0 * np.asarray(high) + (np.asarray(low, np.int64) & 255))
    assert np.abs(found - y).max() <= 1.01 / 65_534 * np.abs(y).max()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_fixed_point_hides_no_number_that_is_not_finite(number):
    y = jnp.ones((8, 256)).at[0, 7].set(number)
    rows = jnp.ones((1, 8, 256), jnp.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registers, "integer_product", integer_product)
        found = registers.fixed_product(rows, *registers.fixed_point(y, jnp.abs(y).max()))
    assert not np.isfinite(found.sum())


def test_which_products_of_one_vector_are_streamed():
    assert matvec_kernel.takes(256_000, 2048)
    assert not any(
        matvec_kernel.takes(*s) for s in ((16_384, 2048), (256_008, 2048), (65_536, 640))
    )


@interprets_hopper
@interprets_loose_barriers
def test_product_of_one_vector(monkeypatch):
    """One program does all, of more tiles than lie in shared memory, the last without a fellow."""
    monkeypatch.setattr(registers, "integer_product", integer_product)
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (9 * 16, 2048), np.int8)
    scale, x = rng.uniform(0.5, 2.0, len(values)).astype(np.float32), normal(0, 2048)
    found = on_simulated_hopper(
        matvec_kernel.product_of_one, x, jnp.asarray(values), jnp.asarray(scale), programs=1
    )
    wanted = values.astype(np.float64) @ np.asarray(x, np.float64) * scale
    assert_near(found, wanted, 2**-14)


def test_which_layers_are_taken_whole():
    takes = layer_kernel.takes
    assert takes(2048, 16384, 8, 1, 256, 2048)  # width, MLP, heads, KV heads, head's size, window
    others = (
        (4096, 16384, 8, 1, 256, 2048),
        (2048, 2048, 8, 1, 256, 2048),
        (2048, 3 * 2048, 8, 1, 256, 2048),
        (2048, 16384, 8, 2, 256, 2048),
        (2048, 16384, 8, 1, 256, 4096),
    )
    assert not any(takes(*shapes) for shapes in others)


@interprets_hopper
@interprets_loose_barriers
@pytest.mark.parametrize(
    "rule, quantized, seen",
    [
        ("gated_delta", False, (0, 77, 1, 1)),
        ("linear", True, (40, 127, 0, 1)),
        ("off", False, (0, 5, 0, 0)),
    ],
)
def test_layer_of_one(rule, quantized, seen, monkeypatch):
    """One program does all that falls to the many of a GPU, on small shapes."""
    heads, dim, window = 2, 256, 128
    # Chunks of the hidden vector in two steps of each warpgroup, also where two become bytes at once.
    width, mlp_dim = heads * dim, 4096 if quantized else 2048
    for name, value in (("SHARES", 16), ("PARTS", heads)):
        monkeypatch.setattr(layer_kernel, name, value)
    monkeypatch.setattr(registers, "integer_product", integer_product)

    def matrix(seed, outputs, inputs):
        values = normal(seed, outputs, inputs, dtype=jnp.float32) * inputs**-0.5
        scale = None
        if quantized:
            scale = jnp.abs(values).max(axis=1) / 127
            values = jnp.round(values / scale[:, None])
        values = values.astype(jnp.int8 if quantized else jnp.bfloat16)
        return layer_kernel.Matrix(values.reshape(outputs, -1, 256), scale)

    layer = layer_kernel.Layer(
        normal(0, width) * 0.1,
        matrix(1, (heads + 2) * dim, width),
        matrix(2, width, heads * dim),
        normal(3, width) * 0.1,
        matrix(4, 2 * mlp_dim, width),
        matrix(5, width, mlp_dim),
    )
    x, keys, values = normal(6, width), normal(7, window, dim), normal(8, window, dim)
    sink = normal(9, dim), normal(10, dim)
    rope = Rope(10_000.0)
    cosine, sine = map(jnp.asarray, rope_table(rope, dim, window + 1))
    lookup = None
    if rule != "off":
        lookup = Lookup(
            normal(11, 1, 1, dim, dim, dtype=jnp.float32),
            jnp.array([0.7, -0.4]),
            jnp.abs(normal(12, 1, 1, dim, dtype=jnp.float32)) if rule == "linear" else None,
        )
    gate = WriteGate(
        normal(13, width, 1, dtype=jnp.float32) * 0.03, jnp.array([0.2]), hard=quantized
    )
    gates = jnp.abs(normal(14, window, dtype=jnp.float32)).at[seen[1]].set(0.0)
    y, *found, opened = on_simulated_hopper(
        layer_kernel.layer_of_one,
        *(x, layer, keys, values, sink, jnp.array(seen), cosine, sine, lookup),
        None if rule == "off" else (gate, gates),
        eps=1e-6,
        scale=dim**-0.5,
        programs=1,
    )
    wanted_y, *wanted = layer_in_float64(
        x, layer, keys, values, sink, seen, cosine, sine, lookup, scale=dim**-0.5
    )
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, 2 * BF16)
    if not seen[3]:  # as it is where nothing was ever
        assert not np.signbit(np.asarray(found[2][seen[1]], np.float32)).any()
    if rule == "off":
        assert opened is None
    else:
        wanted_gate = gate.opened(wanted[0] @ gate.kernel + gate.bias)[0]
        assert_near(opened, gates.at[seen[1]].set(wanted_gate), 2 * BF16)
    assert_near(y - x.astype(jnp.float32), wanted_y - np.asarray(x, np.float64), 4 * BF16)


def layer_in_float64(x, layer, keys, values, sink, seen, cosine, sine, lookup, *, scale):
    """The layer for one token, written out in NumPy."""
    x, keys, values, sink, cosine, sine = jax.tree.map(
        lambda y: np.array(y, np.float64), (x, keys, values, sink, cosine, sine)
    )
    dim, (first, last, sees_sink, kept) = keys.shape[1], map(int, seen)

    def dense(matrix):
        found = np.asarray(matrix.values, np.float64).reshape(len(matrix.values), -1)
        return found if matrix.scale is None else found * np.asarray(matrix.scale)[:, None]

    def norm(y, gain):
        return y / np.sqrt((y * y).mean() + 1e-6) * (1 + np.asarray(gain, np.float64))

    def turn(y, at):
        left, right = np.split(y, 2)
        return np.concatenate(
            [left * cosine[at] - right * sine[at], right * cosine[at] + left * sine[at]]
        )

    normed = norm(x, layer.pre_attention_scale)
    qkv = dense(layer.qkv) @ normed
    *queries, key, value = qkv.reshape(-1, dim)
    keys[last], values[last] = key, value
    found = []
    for h, query in enumerate(queries):
        seen_keys = {i + 1: (keys[i], values[i]) for i in range(first, last + 1)}
        if sees_sink:
            seen_keys[0] = sink
        turned = turn(query, last + 1)
        score = np.array([turn(k, at) @ turned * scale for at, (k, _) in seen_keys.items()])
        weight = np.exp(score - score.max())
        attended = weight @ np.stack([v for _, v in seen_keys.values()]) / weight.sum()
        if lookup is not None:
            gate, matrix = float(lookup.gate[h]), np.asarray(lookup.matrix[0, 0], np.float64)
            if lookup.total is None:
                read = query @ matrix / np.sqrt(query @ query + 1e-6)
                attended = attended + gate * read / np.sqrt((read * read).mean() + 1e-6)
            else:
                phi = np.where(query > 0, query + 1, np.exp(np.minimum(query, 0)))
                read = phi @ matrix / (phi @ np.asarray(lookup.total[0, 0], np.float64))
                attended = gate * read + (1 - gate) * attended
        found.append(attended)
    middle = x + dense(layer.out) @ np.concatenate(found)
    gate, up = np.split(dense(layer.gate_up) @ norm(middle, layer.pre_mlp_scale), 2)
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    keys[last], values[last] = kept * key, kept * value
    return middle + dense(layer.down) @ (gelu * up), normed, qkv, keys, values


def test_what_a_rule_does_in_its_own_way_the_kernel_does_not_do():
    class Louder(memory.GatedDelta):
        def read(self, p, memory, q, attended):
            return 2 * super().read(p, memory, q, attended)

    class Eager(memory.GatedDelta):
        def features(self, p, x, q, k, v):
            return {"write": jnp.ones(x.shape[:2])[..., None]}

    class Forgetful(memory.GatedDelta):
        def write(self, memory, features, mask):
            return memory

    config = tiny_config(rule="gated_delta")
    p, state = {"gate": jnp.ones(4)}, memory.GatedDelta(config).init(1)
    assert memory.lookup_of(Louder(config), p, state) is None
    assert memory.lookup_of(Forgetful(config), p, state).matrix is state["M"]
    assert memory.lookup_of(memory.Delta(config), p, memory.Delta(config).init(1)) is not None
    p |= {"write_kernel": jnp.ones((config.width, 1)), "write_bias": jnp.zeros(1)}
    assert memory.write_gate_of(Eager(config), p) is None
    assert memory.write_gate_of(Forgetful(config), p).kernel is p["write_kernel"]
    assert memory.write_gate_of(memory.Linear(config), p) is None


def test_a_step_of_decoding_uses_them(monkeypatch):
    """The same tokens with the kernels, in interpret mode, as with the plain lines."""
    calls = []

    def attend(*args, real=decode_kernel.attend, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs, interpret=True)

    monkeypatch.setattr(decode_kernel, "attend", attend)
    config = tiny_config(
        rule="gated_delta", segment_length=32, dtype="bfloat16", head_dim=64, sliding_window=33
    )
    params, tokens = random_params(config, scale=0.1), random_tokens(config, 2, 78)

    def written():
        jax.clear_caches()
        logits, state = prefill(params, tokens, init_state(config, 2), config=config)
        steps = []
        for _ in range(5):
            _, _, logits, state = decode_block(
                params,
                jax.nn.one_hot(jnp.array([3, 7]), config.vocab_size),
                state,
                config=config,
                sampling=Greedy(),
                key=jax.random.key(0),
                num_tokens=1,
            )
            steps.append(np.asarray(logits))
        return np.stack(steps)

    wanted = written()
    assert not calls
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    for module in (attention_kernel, products_kernel, delta_kernel):
        monkeypatch.setattr(module, "takes", lambda *args: False)
    found = written()
    jax.clear_caches()
    assert calls
    assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)


def test_a_step_of_one_text_takes_a_kernel_for_each_layer(monkeypatch):
    """Within a segment, where the model and its rule are such that the kernel takes them."""
    config = tiny_config(
        rule="gated_delta", segment_length=64, dtype="bfloat16", layer_types=(GLOBAL,)
    )
    shapes = {"width": 512, "mlp_dim": 1024, "num_heads": 2, "num_kv_heads": 1, "head_dim": 256}
    config = dataclasses.replace(config, qk_norm=False, post_norms=False, **shapes)
    params, tokens = random_params(config, scale=0.03), random_tokens(config, 1, 203)

    def written(config):
        jax.clear_caches()
        logits, state = prefill(params, tokens, init_state(config), config=config)
        options = {"config": config, "sampling": Greedy(), "key": jax.random.key(0)}
        _, _, logits, state = decode_block(params, logits, state, num_tokens=2, **options)
        return logits, state.layers[0]

    wanted = written(config)
    calls = []

    def layer_of_one(x, layer, keys, values, *args, eps, scale):
        *args, (gate, gates) = args
        calls.append(eps)
        sizes = x.shape, x.shape, layer.qkv.values.shape[:1], keys.shape, values.shape
        y, normed, *found = jax.pure_callback(
            lambda *args: tuple(y.astype(x.dtype) for y in layer_in_float64(*args, scale=scale)),
            tuple(jax.ShapeDtypeStruct(size, x.dtype) for size in sizes),
            *(x, layer, keys, values, *args),
        )
        opened = gate.opened(normed.astype(jnp.float32) @ gate.kernel + gate.bias)
        seen = args[1]
        return y, normed, *found, gates.at[seen[1]].set(opened[0] * seen[3])

    monkeypatch.setattr(layer_kernel, "layer_of_one", layer_of_one)
    for name, value in (("SHARES", 16), ("PARTS", 2)):
        monkeypatch.setattr(layer_kernel, name, value)
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    monkeypatch.setattr(kernels, "lays_out_registers", lambda: True)
    for module in (attention_kernel, products_kernel, delta_kernel, decode_kernel):
        monkeypatch.setattr(module, "takes", lambda *args: False)
    for changes in ({"qk_norm": True}, {"post_norms": True}, {"attention_softcap": 9.0}, {}):
        other = dataclasses.replace(config, **changes)
        given = abstract_params(other)
        if not changes:  # float32 parameters
            given = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), given)
        decode_block.trace(
            given,
            jax.ShapeDtypeStruct((1, config.vocab_size), jnp.float32),
            jax.eval_shape(lambda other=other: init_state(other)),
            config=other,
            sampling=Greedy(),
            key=jax.random.key(0),
            num_tokens=2,
        )
    assert not calls
    found = written(config)
    jax.clear_caches()
    assert calls
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(y, np.float64) for y in (a, b))
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_each_segment_reads_memory_as_it_was_at_its_start(rule, monkeypatch):
    """By the operands of attention's kernel, which plain lines stand for here."""

    def mixed(lookup, q, attended):
        (batch, number, kv_heads), dim = lookup.matrix.shape[:3], q.shape[-1]
        shape = batch, number, -1, kv_heads, q.shape[2] // kv_heads, dim
        q, attended = (x.astype(jnp.float32).reshape(shape) for x in (q, attended))
        features = lookup.features(q)
        found = jnp.einsum("BNSKGF,BNKFC->BNSKGC", features, lookup.matrix)
        mix = lookup.mix  # of one query head: q, found, attended, gate, total
        for axes in ((0, None), (0, 0), (None, None), (None, 0), (None, 0)):
            mix = jax.vmap(mix, (0, 0, 0, *axes))
        return mix(q, found, attended, lookup.gate.reshape(kv_heads, -1), lookup.total)

    seen = []

    def attend(q, keys, values, cosine, sine, sink_keys, sink_values, past, lookup, **options):
        slots = q.shape[1]
        span = Span(0 * past, past, 0 * past + slots, slots, options["segment_length"])
        out = attention._attention_by_masks(
            *(q, keys, values, (sink_keys, sink_values[:, None]), span),
            tables=(cosine, sine),
            history=keys.shape[1] - slots,
            scale=options["scale"],
            window=None,
            softcap=None,
        )
        seen.append(lookup)
        return mixed(lookup, q, out).reshape(q.shape).astype(q.dtype)

    config = tiny_config(rule=rule, dtype="bfloat16")
    params, tokens = random_params(config), random_tokens(config, 2, 56)
    kind = type(make_rule(config))

    def lookup(*given, real=kind.lookup):
        assert given[-1]["M"].ndim == 4  # a rule's method sees one segment's memory
        return real(*given)

    monkeypatch.setattr(kind, "lookup", lookup)

    def hidden():
        jax.clear_caches()
        state = init_state(config, 2)
        return forward(params, tokens, state, config=config, step_tokens=24, aligned=True)[0]

    wanted = hidden()
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    monkeypatch.setattr(attention_kernel, "takes", lambda *args: True)
    monkeypatch.setattr(attention_kernel, "segment_attention", attend)
    for module in (products_kernel, delta_kernel):
        monkeypatch.setattr(module, "takes", lambda *args: False)
    found = hidden()
    jax.clear_caches()
    assert any(lookup.matrix.shape[:2] == (2, 3) for lookup in seen)
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "rule, used",
    [
        ("off", set()),
        ("linear", {"lookup"}),
        ("gated_delta", {"delta_map", "lookup"}),
    ],
)
def test_reading_uses_them_on_hopper(rule, used, monkeypatch):
    """What a Hopper GPU would run is traced; no kernel is run."""
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    calls = set()

    def spy(module, name, real):
        def called(*args, **kwargs):
            calls.add(name)
            calls.update("lookup" for x in args if isinstance(x, Lookup))
            return real(*args, **kwargs | ({"programs": 132} if module is products_kernel else {}))

        return called

    for module, name in (
        (attention_kernel, "segment_attention"),
        (products_kernel, "geglu"),
        (products_kernel, "product_apart"),
        (delta_kernel, "delta_map"),
    ):
        monkeypatch.setattr(module, name, spy(module, name, getattr(module, name)))
    config = dataclasses.replace(PRESETS["gemma-2b"], layer_types=(GLOBAL, GLOBAL))
    config = config.with_memory(rule=rule, segment_length=128)
    prefill.trace(
        abstract_params(config),
        jax.ShapeDtypeStruct((1, 2048), jnp.int32),
        jax.eval_shape(lambda: init_state(config)),
        config=config,
        lengths=jax.ShapeDtypeStruct((1,), jnp.int32),
        chunk_tokens=2048,
    )
    assert calls == used | {"segment_attention", "geglu", "product_apart"}
    jax.clear_caches()  # what was traced for another device must not be run on this one


@pytest.mark.parametrize(
    "capability, version, setting, used",
    [
        ("9.0", "cuda 13000", "on", True),
        ("9.0", "cuda 13000", "off", False),
        ("9.0", "cuda 12090", "on", False),
        ("8.0", "cuda 13000", "on", False),
        ("10.0", "cuda 13000", "on", False),
        ("gfx942", "rocm 60300", "on", False),
    ],
)
def test_where_they_are_used(capability, version, setting, used, monkeypatch):
    monkeypatch.setenv("GEMMA_JAX_KERNELS", setting)
    device = SimpleNamespace(
        platform="gpu",
        compute_capability=capability,
        client=SimpleNamespace(platform_version=version),
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert kernels.wanted() == used


def test_their_gradient_is_that_of_the_plain_lines():
    def plain(x, y):
        return x * x * y

    function = kernels.with_gradient_of(plain, lambda x, y: plain(x, y) + 0.5)
    assert function(3.0, 2.0) == 18.5
    assert jax.grad(function, argnums=(0, 1))(3.0, 2.0) == (12.0, 9.0)


def test_a_step_of_training_takes_the_gradient_of_the_plain_lines(monkeypatch):
    """Under `grad`, `jit` and `checkpoint`, with all the arguments that attention has."""
    config = tiny_config(rule="gated_delta", dtype="bfloat16", layer_types=(GLOBAL,))
    params, tokens = random_params(config), random_tokens(config, 1, 32)

    def gradient():
        def loss(params):
            state = init_state(config)
            hidden, _ = forward(params, tokens, state, config=config, step_tokens=16, remat="steps")
            return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

        return jax.grad(loss)(params)

    wanted = gradient()
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    for module in (attention_kernel, products_kernel, delta_kernel):
        monkeypatch.setattr(module, "takes", lambda *args: True)
    real, used = kernels.with_gradient_of, []

    def with_gradient_of(plain, kernel):
        used.append(getattr(kernel, "__name__", "a part of one"))
        return real(plain, plain)  # a kernel cannot run here

    monkeypatch.setattr(kernels, "with_gradient_of", with_gradient_of)
    jax.clear_caches()
    found = gradient()
    jax.clear_caches()
    assert {"of_segments", "fused"} <= set(used)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6), found, wanted)
