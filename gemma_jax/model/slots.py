"""A memory of whole tokens: of all that was read, those with the highest scores stay."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.model.delta import EPS, einsum
from gemma_jax.model.rope import rope_rows, rotate
from gemma_jax.model.rule import Memory, MemoryRule, Parameter

MOST_COMPARED = 4096  # tokens that are ranked by comparing all with all
EMPTY = -1e4  # score of a slot that holds nothing; exp of it is 0, so it is not seen at all
HIDDEN = 64  # units of the network that scores tokens
DISTANCE = 64  # positions from the newest slot to every query
LOCAL_LOGIT = 8.0  # of local attention as a whole, before anything is learnt


class Slots(MemoryRule):
    """Keeps the keys and values of the `config.memory.slots` tokens with the highest scores.

    A small network scores each token when it is read (as the retaining heads of Locret do, Huang et al.
    2024, for a cache of one prompt). A token counts as much as the highest of itself and its
    `config.memory.neighbours` on either side in the segment: a fact stays as a whole, by the tokens that
    give it away. Of equal scores the newest stay, so an untrained memory holds the last tokens that left
    sight.

    Slots are attended to as if their tokens stood side by side in the order of the text, the newest
    `DISTANCE` positions before the query: tokens that were not kept leave no trace. What a token counts,
    s, adds log sigmoid(s) to its slot's logits: by that, and by `write_loss`, scores are learnt.

    Attention over slots shares its softmax with one more logit, q r + c, that stands for all that local
    attention sees. Where slots get the share m of it, and found = sum of p v, reads add
    g * (found - m * local).
    """

    def params(self) -> dict[str, Parameter]:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        width, dim = self.config.width, self.config.head_dim
        return {
            "gate": Parameter((heads,), ("heads",), nn.initializers.ones),
            "local_kernel": Parameter((heads, dim), ("heads", "head_dim")),
            "local_bias": Parameter((heads,), ("heads",), nn.initializers.constant(LOCAL_LOGIT)),
            "hidden_kernel": Parameter(
                (width, HIDDEN), ("embed", "hidden"), nn.initializers.normal(width**-0.5)
            ),
            "score_kernel": Parameter((HIDDEN, kv_heads), ("hidden", "kv_heads")),
            "write_kernel": Parameter((width, kv_heads), ("embed", "kv_heads")),
            "write_bias": Parameter((kv_heads,), ("kv_heads",)),
        }

    def features(self, p, x, q, k, v):
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
        hidden = jax.nn.gelu(einsum("BTD,DE->BTE", x, p["hidden_kernel"]))
        score = einsum("BTE,EK->BTK", hidden, p["score_kernel"])
        return {"score": score + einsum("BTD,DK->BTK", x, p["write_kernel"]) + p["write_bias"]}

    def init(self, batch_size):
        config = self.config
        shape = (batch_size, config.num_kv_heads, config.memory.slots)
        return {
            "key": jnp.zeros((*shape, config.head_dim), config.dtype),
            "value": jnp.zeros((*shape, config.head_dim), config.dtype),
            "score": jnp.full(shape, EMPTY, jnp.float32),
            "written": self.zeros(batch_size),  # sum of sigmoid(score)
            "offered": self.zeros(batch_size),  # tokens they were computed for
        }

    def read(self, p, memory, q, attended):
        config, count = self.config, self.config.memory.slots
        rows = functools.partial(rope_rows, config.global_rope, config.head_dim, count + DISTANCE)
        key = rotate(jnp.moveaxis(memory["key"], 1, 2), *rows(0, count))
        asked = rotate(q, *rows(count + DISTANCE - 1, count + DISTANCE))
        asked = asked.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
        logit = _product("BTKGC,BNKC->BTKGN", asked, key) * config.query_scale
        if config.attention_softcap is not None:
            logit = config.attention_softcap * jnp.tanh(logit / config.attention_softcap)
        logit += jax.nn.log_sigmoid(memory["score"])[:, None, :, None]
        local = einsum("BTHC,HC->BTH", q.astype(jnp.float32), p["local_kernel"]) + p["local_bias"]
        local = local.reshape(*logit.shape[:-1], 1)
        weight = jax.nn.softmax(jnp.concatenate([logit, local], axis=-1), axis=-1)[..., :-1]
        share = weight.sum(axis=-1).reshape(*attended.shape[:-1], 1)
        found = _product("BTKGN,BKNC->BTKGC", weight.astype(attended.dtype), memory["value"])
        change = found.reshape(attended.shape) - share * attended
        return (attended + p["gate"][:, None] * change).astype(attended.dtype)

    def prepare(self, features, mask):
        # What is masked has less than an empty slot, and there are always enough of these.
        score = jnp.where(mask[..., None], features["score"], 2 * EMPTY)
        score = jnp.where(mask[..., None], self._of_neighbours(score), 2 * EMPTY)
        features = {**features, "score": score}
        by_head = {name: jnp.moveaxis(x, 2, 1) for name, x in features.items()}
        return by_head | {"written": jax.nn.sigmoid(score).sum(axis=1)}

    def write(self, memory, features, mask):
        tokens = {name: memory[name] for name in ("key", "value", "score")}
        new = {name: features[name].astype(x.dtype) for name, x in tokens.items()}
        if len(mask) == 1:  # of a long text alone, most segments change nothing
            changes = ~jnp.all(new["score"].max(axis=2) < memory["score"].min(axis=2))
            tokens = jax.lax.cond(changes, _best_of, lambda tokens, _: tokens, tokens, new)
        else:
            tokens = _best_of(tokens, new)
        return tokens | {
            "written": memory["written"] + features["written"],
            "offered": memory["offered"] + mask.sum(axis=1, dtype=jnp.float32)[:, None],
        }

    def _of_neighbours(self, score: Float[Array, "B S K"]) -> Float[Array, "B S K"]:
        """The highest score of each token and its neighbours."""
        length, width = score.shape[1], self.config.memory.neighbours
        around = jnp.pad(score, [(0, 0), (width, width), (0, 0)], constant_values=2 * EMPTY)
        return jnp.stack([around[:, i : i + length] for i in range(2 * width + 1)]).max(axis=0)

    def write_loss(self, features, wanted):
        score = features["score"]  # the logit of a token's being one to keep
        return jnp.mean(jax.nn.softplus(score) - wanted[..., None] * score, axis=-1)

    def gates(self, p):
        return {"read": p["gate"]}


def _best_of(tokens: Memory, new: Memory) -> Memory:
    """Of those in the slots and new ones, as many as there are slots."""
    joined = {name: jnp.concatenate([x, new[name]], axis=2) for name, x in tokens.items()}
    best = _highest(joined["score"], tokens["score"].shape[2])
    place = _places(best, joined["score"].shape[2])
    return {name: _choose(x, best, place) for name, x in joined.items()}


def _highest(score: Float[Array, "B K M"], count: int) -> Int[Array, "B K count"]:
    """Where the highest scores are, from left to right; of equal ones, the last."""
    score = jax.lax.stop_gradient(score)
    many = score.shape[-1] > MOST_COMPARED or jax.default_backend() != "gpu"
    return (_by_sorting if many else _by_ranks)(score, count)


def _by_ranks(score: Array, count: int) -> Array:
    """Compares all with all, where that is faster than sorting: on a GPU, whose threads are many."""
    number = jnp.arange(score.shape[-1], dtype=jnp.int32)
    earlier = number < number[:, None]
    own, others = score[..., None], score[..., None, :]
    ahead = (others > own) | ((others == own) & (number > number[:, None]))
    chosen = ahead.sum(axis=-1, dtype=jnp.int32) < count
    place = jnp.sum(chosen[..., None, :] & earlier, axis=-1, dtype=jnp.int32)
    here = chosen[..., None, :] & (place[..., None, :] == number[:count, None])
    return jnp.sum(jnp.where(here, number, 0), axis=-1)


def _by_sorting(score: Array, count: int) -> Array:
    last = score.shape[-1] - 1
    found = jax.lax.top_k(score[..., ::-1], count)[1]
    return jnp.sort(last - found, axis=-1)


def _places(best: Int[Array, "B K N"], length: int) -> Int[Array, "B K length"]:
    """For each of `length` candidates where it stands among the chosen ones; -1: it was not chosen."""
    rows, heads = jnp.indices(best.shape[:2])[..., None]
    numbers = jnp.arange(best.shape[-1], dtype=best.dtype)
    places = jnp.full((*best.shape[:2], length), -1, best.dtype)
    return places.at[rows, heads, best].set(numbers, unique_indices=True)


@jax.custom_vjp
def _choose(
    x: Float[Array, "B K M *c"], best: Int[Array, "B K N"], place: Int[Array, "B K M"]
) -> Float[Array, "B K N *c"]:
    """The rows `best` of `x`. None is chosen twice, so its gradient is looked up, not summed."""
    return jnp.take_along_axis(x, _as_rows(best, x), axis=2)


def _choose_forward(x: Array, best: Array, place: Array) -> tuple[Array, Array]:
    return _choose(x, best, place), place


def _choose_backward(place: Array, slope: Array) -> tuple[Array, None, None]:
    rows = _as_rows(place, slope)
    found = jnp.take_along_axis(slope, jnp.maximum(rows, 0), axis=2)
    return jnp.where(rows >= 0, found, 0), None, None


_choose.defvjp(_choose_forward, _choose_backward)


def _as_rows(index: Array, x: Array) -> Array:
    return index.reshape(*index.shape, *[1] * (x.ndim - index.ndim))


def _product(subscripts: str, x: Array, y: Array) -> Array:
    """In float32 of what may be bfloat16; CPUs have no such product."""
    if jax.default_backend() == "cpu":
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
