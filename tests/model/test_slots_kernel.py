"""The kernels for slots compute what the plain lines compute; here without a GPU, in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from reference import random_params, random_tokens, tiny_config

from gemma_jax.model import kernels
from gemma_jax.model.kernels import attention as attention_kernel
from gemma_jax.model.kernels import products as products_kernel
from gemma_jax.model.kernels import ranks, slots
from gemma_jax.model.scan import forward
from gemma_jax.model.state import init_state

SCALE = 0.125
NAMES = ("q", "key", "value", "bias", "local", "attended", "gate")
EXACT, BF16 = 5e-6, 2**-8  # of float32 sums; half a unit in the last place of bfloat16

# tokens, heads, KV heads, head dim, slots; between them they use every kernel and tile
ONE_PROGRAM = (64, 2, 2, 64, 128)  # sees all queries of a KV head
GROUPS = (64, 8, 2, 64, 192)
LARGE_DIM = (96, 4, 1, 256, 64)
SHAPES = [ONE_PROGRAM, GROUPS, LARGE_DIM]


def plain(q, key, value, bias, local, attended, gate):
    """`Slots.read` after queries and keys are rotated, in float32."""
    dtype = attended.dtype
    q, key, value, attended = (x.astype(jnp.float32) for x in (q, key, value, attended))
    grouped = q.reshape(*q.shape[:2], key.shape[1], -1, q.shape[3])
    logit = jnp.einsum("BTKGC,BKNC->BTKGN", grouped, key) * SCALE + bias[:, None, :, None]
    logit = jnp.concatenate([logit, local.reshape(*logit.shape[:-1], 1)], axis=-1)
    weight = jax.nn.softmax(logit, axis=-1)[..., :-1]
    share = weight.sum(axis=-1).reshape(*q.shape[:3], 1)
    found = jnp.einsum("BTKGN,BKNC->BTKGC", weight, value).reshape(q.shape)
    return (attended + gate[:, None] * (found - share * attended)).astype(dtype)


def kernel(*args):
    return slots.attend(*args, scale=SCALE, interpret=True)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, slope, *args):
    out, vjp = jax.vjp(function, *args)
    return out, *vjp(slope)


def arguments(shape, dtype, empty=0.3):
    """Of two rows; a part of the slots holds nothing."""
    tokens, heads, kv_heads, dim, count = shape
    assert slots.takes(tokens, heads // kv_heads, dim, count)
    random = np.random.default_rng(0)
    of_queries, of_slots = (2, tokens, heads, dim), (2, kv_heads, count, dim)
    shapes = (of_queries, of_slots, of_slots, of_slots[:3], of_queries[:3], of_queries, (heads,))
    args = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    args = [x.astype(dtype) if x.ndim == 4 else x for x in args]
    args[3] = jnp.where(random.random(of_slots[:3]) < empty, -1e4, args[3])
    args[4] = args[4] + 3.0  # local attention and slots have about as much
    args[6] = args[6].at[0].set(0.0)  # a gate that is shut
    return args


def assert_near(found, wanted, tolerance, name=""):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [("float32", EXACT), ("bfloat16", 2 * BF16)])
def test_results_and_gradients_are_those_of_the_plain_lines(shape, dtype, tolerance):
    args = arguments(shape, dtype)
    slope = jnp.flip(args[5], axis=1)  # numbers like any others
    (found, *gradients), (wanted, *wanted_gradients) = (
        with_gradients(function, slope, *args) for function in (kernel, plain)
    )
    assert_near(found, wanted, tolerance)
    for found, wanted, name in zip(gradients, wanted_gradients, NAMES, strict=True):
        assert_near(found, wanted, 2 * tolerance, name)


@pytest.mark.parametrize("shape", [ONE_PROGRAM, GROUPS])
def test_an_empty_memory_changes_nothing(shape):
    args = arguments(shape, "bfloat16", empty=1.0)
    slope = jnp.ones_like(args[0])
    found, *gradients = with_gradients(kernel, slope, *args)
    np.testing.assert_array_equal(found, args[5])
    for gradient, name in zip(gradients, NAMES, strict=True):
        wanted = slope if name == "attended" else jnp.zeros_like(gradient)
        np.testing.assert_array_equal(gradient, wanted, name)


def test_logits_far_apart_do_not_overflow():
    args = arguments(ONE_PROGRAM, "float32")
    args[0], args[4] = 100 * args[0], 1000 * args[4] * jnp.array([1.0, -1.0])
    assert_near(jax.jit(kernel)(*args), jax.jit(plain)(*args), 1e-4)


def test_shapes_that_are_not_divided_evenly_are_refused():
    assert slots.takes(128, 1, 128, 2048) and slots.takes(512, 4, 256, 512)
    assert not slots.takes(100, 1, 128, 512)  # queries
    assert not slots.takes(64, 3, 128, 512)
    assert not slots.takes(32, 1, 128, 512)
    assert not slots.takes(128, 1, 128, 96)  # slots
    assert not slots.takes(128, 1, 96, 512)  # head dim
    assert not slots.takes(128, 1, 512, 512)


@pytest.mark.parametrize(
    "shape, kernels",
    [
        ((128, 4, 4, 128, 512), 2),  # the demo model
        ((128, 4, 4, 128, 2048), 2),
        ((512, 4, 1, 256, 512), 3),  # Gemma 3 270M
        ((256, 8, 4, 256, 512), 3),
        ((256, 4, 4, 128, 512), 3),
        (ONE_PROGRAM, 2),
    ],
)
def test_triton_takes_what_is_given_to_it(shape, kernels):
    """The kernels in Triton's language, forwards and backwards; it is not compiled here."""
    args = jax.eval_shape(lambda: arguments(shape, "bfloat16"))
    function = functools.partial(slots.attend, scale=SCALE)
    assert lowered(with_gradients, function, args[0], *args) == kernels


# --- which tokens stay ----------------------------------------------------------------------------


@pytest.mark.parametrize("first, length, segments", [(70, 64, 2), (64, 128, 1), (1, 64, 3)])
@pytest.mark.parametrize("values", [5, 10_000])
def test_tokens_are_ahead_that_score_higher_or_are_later(first, length, segments, values):
    """Compared with a loop in NumPy; with five values many are equal."""
    tokens = first + segments * length
    score = np.random.default_rng(0).integers(0, values, (2, 2, tokens))
    found = ranks.count_ahead(
        jnp.asarray(score, jnp.float32), first=first, length=length, interpret=True
    )
    for row in np.ndindex(2, 2):
        for i in range(segments + 1):
            seen = score[row][: first + i * length]
            later = np.arange(len(seen)) > np.arange(tokens)[:, None]
            own = score[row][:, None]
            expected = np.sum((seen > own) | ((seen == own) & later), axis=1)
            np.testing.assert_array_equal(found[(i, *row)], expected)


def test_segments_that_are_not_divided_evenly_are_refused():
    assert ranks.takes(128) and ranks.takes(64)
    assert not ranks.takes(96)
    assert not ranks.takes(32)


@pytest.mark.parametrize(
    "first, length, segments", [(512, 128, 64), (1000, 128, 6), (1024, 1024, 8)]
)
def test_triton_takes_the_comparison(first, length, segments):
    score = jax.ShapeDtypeStruct((2, 4, first + length * segments), jnp.float32)
    assert lowered(ranks.count_ahead, score, first=first, length=length) == 1


# --- in a model -----------------------------------------------------------------------------------


def test_a_model_reads_and_learns_with_them_as_with_the_plain_lines(monkeypatch):
    """Six segments in one step; both kernels run in interpret mode."""
    config = tiny_config(rule="slots", layer_types=("global",), head_dim=64, dtype="bfloat16")
    config = config.with_memory(segment_length=64, slots=64)
    params, tokens = random_params(config), random_tokens(config, 2, 384)
    params["layers_0"]["attention"]["memory"]["gate"] += 1.0

    def gradient():
        def loss(params):
            hidden, state = forward(
                params, tokens, init_state(config, 2), config=config, step_tokens=384, aligned=True
            )
            hidden = hidden.astype(jnp.float32)
            return jnp.mean(jnp.square(hidden)), (hidden, state.layers[0].memory)

        return jax.grad(loss, has_aux=True)(params)

    wanted_slopes, (wanted, kept) = gradient()
    monkeypatch.setattr(kernels, "wanted", lambda: True)
    for module in (attention_kernel, products_kernel):
        monkeypatch.setattr(module, "takes", lambda *args: False)
    used = []
    for module, name in ((slots, "attend"), (ranks, "count_ahead")):
        monkeypatch.setattr(module, name, interpreted(used, name, getattr(module, name)))
    jax.clear_caches()
    slopes, (found, kept_by_them) = gradient()
    jax.clear_caches()  # what was traced for another device must not be run on this one
    assert {*used} == {"attend", "count_ahead"}
    for name in ("key", "value", "score"):
        np.testing.assert_array_equal(kept_by_them[name], kept[name])
    for one, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(wanted_slopes), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= 0.03 * np.linalg.norm(other)
    assert np.linalg.norm(found - wanted) <= 0.01 * np.linalg.norm(wanted)


def interpreted(used, name, real):
    def called(*args, **options):
        used.append(name)
        return real(*args, **options, interpret=True)

    return called


def lowered(function, *args, **options):
    """How many kernels there are in what JAX makes of a jitted function for a Hopper GPU."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = function.trace(*args, **options)
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("xla.gpu.triton")
