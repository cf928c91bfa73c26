"""The memory of whole tokens: which of them stay, and that nothing else depends on what was read."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import NumpyGemma, all_logits, random_params, random_tokens, tiny_config

import gemma_jax
from gemma_jax.config import GemmaConfig
from gemma_jax.errors import UsageError
from gemma_jax.model import slots
from gemma_jax.model.kernels import ranks
from gemma_jax.model.memory import make_rule, write_segments

SEGMENTS, LENGTH = 12, 8


def written(scores, count, dtype="float32", neighbours=4):
    """Memory after tokens with these scores [T]; each token's key and value say which it was."""
    config = tiny_config(rule="slots", slots=count, num_kv_heads=1, dtype=dtype)
    config = config.with_memory(neighbours=neighbours)
    rule = make_rule(config)
    number = jnp.arange(len(scores), dtype=jnp.float32).reshape(-1, 1, LENGTH, 1, 1)
    tokens = {
        "key": jnp.broadcast_to(number, (*number.shape[:-1], 8)).astype(dtype),
        "value": jnp.broadcast_to(-number, (*number.shape[:-1], 8)).astype(dtype),
        "score": jnp.asarray(scores, jnp.float32).reshape(-1, 1, LENGTH, 1),
    }
    present = jnp.ones((len(number), 1), bool)
    return jax.tree.map(lambda x: x[0, 0], write_segments(rule, rule.init(1), tokens, present)[0])


@pytest.mark.parametrize("neighbours", [0, 1, 4, 2 * LENGTH])
def test_the_highest_scores_stay_in_the_order_of_the_text(neighbours):
    scores = np.random.default_rng(0).normal(size=SEGMENTS * LENGTH)
    memory = written(scores, 30, neighbours=neighbours)
    around = [
        segment[max(t - neighbours, 0) : t + neighbours + 1].max()
        for segment in scores.reshape(SEGMENTS, LENGTH)
        for t in range(LENGTH)
    ]
    best = np.sort(np.argsort(around, kind="stable")[-30:])
    np.testing.assert_array_equal(memory["key"][:, 0], best)
    np.testing.assert_array_equal(memory["value"][:, 0], -best)
    np.testing.assert_allclose(memory["score"], np.take(around, best), rtol=1e-6)


def test_neighbours_stay_with_a_token_that_stands_out():
    """They stand in its segment."""
    scores = np.full(SEGMENTS * LENGTH, -9.0)
    scores[[18, 40]] = 5.0, 3.0
    memory = written(scores, 12)
    np.testing.assert_array_equal(memory["key"][:, 0], [*range(16, 23), *range(40, 45)])
    np.testing.assert_array_equal(memory["score"], [5.0] * 7 + [3.0] * 5)


@pytest.mark.parametrize("kind", ["different", "equal"])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_comparing_all_with_all_writes_as_sorting_segment_by_segment_does(monkeypatch, kind, count):
    """GPUs do it so; also where rows have fewer segments than others."""
    rng = np.random.default_rng(count)
    config = tiny_config(rule="slots", slots=count, dtype="float32")
    rule = make_rule(config.with_memory(neighbours=1))
    shape = (SEGMENTS, 2, LENGTH, config.num_kv_heads)
    score = rng.normal(size=shape) if kind == "different" else rng.integers(0, 5, size=shape)
    kv = (*shape, config.head_dim)
    segments = {"key": rng.normal(size=kv), "value": rng.normal(size=kv), "score": score}
    segments = {name: jnp.asarray(x, jnp.float32) for name, x in segments.items()}
    present = jnp.ones((SEGMENTS, 2), bool).at[:2, 0].set(False).at[-3:, 1].set(False)
    weights = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(SEGMENTS + 1, *x.shape))), rule.init(2)
    )

    def total(segments, memory):
        after, before = write_segments(rule, memory, segments, present)
        everything = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), before, after)
        products = jax.tree.map(lambda x, y: jnp.sum(x * y), everything, weights)
        return sum(jax.tree.leaves(products)), everything

    slope = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    memory, _ = write_segments(rule, rule.init(2), segments, present)
    (_, expected), slopes = slope(segments, memory)
    monkeypatch.setattr(slots, "compares_all", lambda *shape: True)
    monkeypatch.setattr(ranks, "TILE", LENGTH // 2)
    monkeypatch.setattr(ranks, "count_ahead", functools.partial(ranks.count_ahead, interpret=True))
    again, _ = write_segments(rule, rule.init(2), segments, present)
    (_, found), found_slopes = slope(segments, memory)
    for name in slots.KEPT:
        np.testing.assert_array_equal(found[name], expected[name])
        np.testing.assert_array_equal(again[name], memory[name])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        (found, found_slopes),
        (expected, slopes),
    )


def test_scores_that_are_no_numbers_stay_as_sorting_has_it(monkeypatch):
    """So that a model which computes such numbers is found out, with the kernel as without it."""
    monkeypatch.setattr(ranks, "TILE", 4)
    monkeypatch.setattr(ranks, "count_ahead", functools.partial(ranks.count_ahead, interpret=True))
    score = jnp.arange(20.0).at[jnp.array([3, 8, 9])].set(jnp.nan).reshape(1, 1, 20)
    place = slots._places_by_segment(score, 4, 16)[-1]
    np.testing.assert_array_equal(np.flatnonzero(place >= 0), [3, 8, 9, 19])
    np.testing.assert_array_equal(slots._highest(score, 4)[0, 0], [3, 8, 9, 19])


def test_of_equal_scores_the_newest_stay():
    total = SEGMENTS * LENGTH
    np.testing.assert_array_equal(
        written(np.zeros(total), 10)["key"][:, 0], range(total - 10, total)
    )


def test_a_short_text_fills_the_slots_from_behind():
    memory = written(np.zeros(LENGTH), 10)
    np.testing.assert_array_equal(memory["key"][:, 0], [0, 0, *range(LENGTH)])
    np.testing.assert_array_equal(memory["score"] == slots.EMPTY, [True] * 2 + [False] * LENGTH)


def test_tokens_are_kept_as_they_are():
    memory = written(np.zeros(LENGTH), 10, "bfloat16")
    assert memory["key"].dtype == memory["value"].dtype == jnp.bfloat16
    assert memory["score"].dtype == jnp.float32
    np.testing.assert_array_equal(memory["key"][2:, 0].astype(np.float32), range(LENGTH))


def test_bfloat16_reads_what_float32_does():
    config = tiny_config(rule="slots", layer_types=("global",))
    params, tokens = random_params(config, scale=0.2), random_tokens(config, 1, 60)
    wanted = all_logits(params, tokens, config)
    small = dataclasses.replace(config, dtype="bfloat16")
    likes = gemma_jax.abstract_params(small)
    params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, likes)
    found = all_logits(params, tokens, small)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.995


def test_what_is_masked_is_never_kept():
    config = tiny_config(rule="slots", num_kv_heads=1, slots=10)
    rule, mask = make_rule(config), jnp.arange(LENGTH)[None] < 3
    tokens = {"key": jnp.ones((1, LENGTH, 1, 8)), "value": jnp.ones((1, LENGTH, 1, 8))}
    tokens["score"] = jnp.where(mask, 0.0, 5.0)[..., None]  # what is masked lifts no neighbour
    memory = rule.write(rule.init(1), rule.prepare(tokens, mask), mask)
    np.testing.assert_array_equal(memory["key"][0, 0, :, 0], [0] * 7 + [1] * 3)
    assert float(memory["written"][0, 0]) == 1.5 and float(memory["offered"][0, 0]) == 3


@pytest.mark.parametrize("seed", range(4))
def test_a_text_alone_is_kept_as_beside_another(seed):
    """Where there is one, segments that change nothing are passed over."""
    rng = np.random.default_rng(seed)
    config = tiny_config(rule="slots", slots=12)
    rule, shape = make_rule(config), (SEGMENTS, 2, LENGTH, config.num_kv_heads)
    tokens = {
        name: jnp.asarray(rng.normal(size=(*shape, 8)), jnp.float32) for name in ("key", "value")
    }
    tokens["score"] = jnp.asarray(rng.integers(-3, 3, shape), jnp.float32)
    present = jnp.asarray(rng.uniform(size=shape[:2]) < 0.8)
    both, _ = write_segments(rule, rule.init(2), tokens, present)
    for row in range(2):
        own = jax.tree.map(lambda x, row=row: x[:, row : row + 1], (tokens, present))
        alone, _ = write_segments(rule, rule.init(1), *own)
        for name, found in alone.items():
            np.testing.assert_array_equal(found[0], both[name][row], err_msg=name)


def test_an_empty_memory_changes_nothing():
    config = tiny_config(rule="slots")
    params, tokens = random_params(config), random_tokens(config, 1, config.memory.reach)
    off = all_logits(params, tokens, config.with_memory(rule="off"))
    np.testing.assert_array_equal(all_logits(params, tokens, config), off)


def test_what_scores_less_is_as_if_it_had_never_been_read():
    """A fact among 100,000 other tokens is found as among ten: bit by bit."""
    scores = np.full(100_000, -20.0)
    scores[[3, 12]] = 5.0  # with neighbours: 0 to 7, 8 to 15
    near, far = written(scores[:16], 16), written(scores, 16)
    for name in ("key", "value", "score"):
        np.testing.assert_array_equal(near[name], far[name])


def test_choosing_has_the_gradient_of_a_gather():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3, 9, 4)))
    weights = jnp.asarray(rng.normal(size=(4, 2, 3, 5, 4)))
    best = jnp.stack([slots._highest(jnp.asarray(rng.normal(size=(2, 3, 9))), 5) for _ in weights])
    place = jnp.stack([slots._places_of(one, 9) for one in best])
    np.testing.assert_array_equal(slots._chosen(place, 5), best)

    def ours(x):
        return jnp.sum(weights * slots._choose(x, best, place))

    def plain(x):
        return jnp.sum(weights * jnp.take_along_axis(x[None], best[..., None], axis=3))

    assert ours(x) == plain(x)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-5)


def test_all_parameters_are_learnt_by_what_is_found():
    """Which tokens stay has no gradient; how loud each is has the right one."""
    config = tiny_config(rule="slots", layer_types=("global",), slots=30)
    params, tokens = random_params(config), random_tokens(config, 1, 60)

    def loss(params):
        hidden, _ = gemma_jax.forward(params, tokens, gemma_jax.init_state(config), config=config)
        return jnp.sum(gemma_jax.logits(params, hidden[:, -1:], config=config)[..., 0])

    def moved(by):
        attention = params["layers_0"]["attention"]
        memory = {name: x + by * slope[name] for name, x in attention["memory"].items()}
        return params | {
            "layers_0": params["layers_0"] | {"attention": attention | {"memory": memory}}
        }

    slope = jax.grad(loss)(params)["layers_0"]["attention"]["memory"]
    assert all(np.abs(leaf).max() > 0 for leaf in slope.values())
    size = sum(float(jnp.sum(leaf**2)) for leaf in slope.values())
    step = 1e-2 / size**0.5
    found = (float(loss(moved(step))) - float(loss(moved(-step)))) / (2 * step)
    np.testing.assert_allclose(found, size, rtol=0.03)


def test_an_untrained_memory_holds_the_last_tokens_that_left_sight():
    config = tiny_config(rule="slots", layer_types=("global",), slots=10)
    params, tokens = gemma_jax.init_params(config, jax.random.key(0)), random_tokens(config, 1, 48)
    _, state = gemma_jax.prefill(params, tokens, gemma_jax.init_state(config), config=config)
    memory = state.layers[0].memory
    assert float(memory["offered"][0, 0]) == 40 and float(memory["written"][0, 0]) == 20
    kept = NumpyGemma(params, config)
    kept.logits(tokens[0])
    np.testing.assert_allclose(memory["key"][0], kept.memories[0]["key"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"attention_softcap": 2.0}, {"num_kv_heads": 4, "slots": 3}, {"qk_norm": False}]
)
def test_other_settings_equal_numpy(changes):
    config = tiny_config(rule="slots", **changes)
    params, tokens = random_params(config), random_tokens(config, 60)
    found, expected = all_logits(params, tokens[None], config)[0], NumpyGemma(params, config)
    expected = expected.logits(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_configurations_written_before_there_were_slots_are_read():
    config = tiny_config(rule="gated_delta")
    fields = json.loads(config.to_json())
    del fields["memory"]["slots"]
    found = GemmaConfig.from_json(json.dumps(fields))
    assert found.memory == dataclasses.replace(config.memory, slots=256)


def test_a_memory_without_slots_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        tiny_config(slots=0)
