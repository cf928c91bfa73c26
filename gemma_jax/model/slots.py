"""A memory of whole tokens: of all that was read, those with the highest scores stay."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_jax.model import kernels
from gemma_jax.model.delta import EPS, einsum
from gemma_jax.model.rope import rope_rows, rotate
from gemma_jax.model.rule import UNROLL, Memory, MemoryRule, Parameter

KEPT = ("key", "value", "score")  # of each token
MOST_COMPARED = 16_384  # tokens that are ranked by comparing all with all
MOST_PLACES = 2**20  # tokens times segments: arrays of a row and head are as large
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
        bias = jax.nn.log_sigmoid(memory["score"])
        local = einsum("BTHC,HC->BTH", q.astype(jnp.float32), p["local_kernel"]) + p["local_bias"]
        given = asked, jnp.moveaxis(key, 1, 2), memory["value"], bias, local, attended, p["gate"]
        return (self._attend_by_kernel if self._kernel_takes(q) else self._attend)(*given)

    def _attend(self, q, key, value, bias, local, attended, gate):
        config = self.config
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
        logit = _product("BTKGC,BKNC->BTKGN", q, key) * config.query_scale
        if config.attention_softcap is not None:
            logit = config.attention_softcap * jnp.tanh(logit / config.attention_softcap)
        logit += bias[:, None, :, None]
        logit = jnp.concatenate([logit, local.reshape(*logit.shape[:-1], 1)], axis=-1)
        weight = jax.nn.softmax(logit, axis=-1)[..., :-1]
        share = weight.sum(axis=-1).reshape(*attended.shape[:-1], 1)
        found = _product("BTKGN,BKNC->BTKGC", weight.astype(attended.dtype), value)
        change = found.reshape(attended.shape) - share * attended
        return (attended + gate[:, None] * change).astype(attended.dtype)

    def _kernel_takes(self, q: Array) -> bool:
        config = self.config
        if q.dtype != jnp.bfloat16 or config.attention_softcap is not None or not kernels.wanted():
            return False
        from gemma_jax.model.kernels import slots as kernel

        group = config.num_heads // config.num_kv_heads
        return kernel.takes(q.shape[1], group, config.head_dim, config.memory.slots)

    def _attend_by_kernel(self, *given):
        from gemma_jax.model.kernels import slots as kernel

        return kernel.attend(*given, scale=self.config.query_scale)

    def prepare(self, features, mask):
        # What is masked has less than an empty slot, and there are always enough of these.
        score = jnp.where(mask[..., None], features["score"], 2 * EMPTY)
        score = jnp.where(mask[..., None], self._of_neighbours(score), 2 * EMPTY)
        features = {**features, "score": score}
        by_head = {name: jnp.moveaxis(x, 2, 1) for name, x in features.items()}
        return by_head | {"written": jax.nn.sigmoid(score).sum(axis=1)}

    def write(self, memory, features, mask):
        tokens = {name: memory[name] for name in KEPT}
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

    def write_all(self, memory, segments, mask):
        number, _, length = mask.shape
        count = self.config.memory.slots
        if not compares_all(count, length, number):
            return super().write_all(memory, segments, mask)

        def pooled(old: Array, new: Array) -> Array:
            """Those in the slots and all new ones, [B, K, M, ...]."""
            new = jnp.moveaxis(new, 0, 2).astype(old.dtype)
            return jnp.concatenate([old, new.reshape(*old.shape[:2], -1, *old.shape[3:])], axis=2)

        pool = {name: pooled(memory[name], segments[name]) for name in KEPT}
        place = _places_by_segment(pool["score"], count, length)
        chosen = _chosen(place, count)
        before = {name: _choose(x, chosen[:-1], place[:-1]) for name, x in pool.items()}
        after = {name: _choose(x, chosen[-1:], place[-1:])[0] for name, x in pool.items()}
        offered = mask.sum(axis=2, dtype=jnp.float32)[..., None]
        for name, new in (("written", segments["written"]), ("offered", offered)):
            sums = memory[name] + jnp.cumsum(new, axis=0)
            before[name] = jnp.concatenate([memory[name][None], sums[:-1]])
            after[name] = sums[-1]
        return after, before

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


def compares_all(count: int, length: int, segments: int) -> bool:
    """Whether the tokens of all segments are compared with each other at once, not sorted in turn.

    It takes the kernel: what XLA makes of so many comparisons is slow, or takes minutes to compile.
    """
    tokens = count + segments * length
    few = tokens <= MOST_COMPARED and (segments + 1) * tokens <= MOST_PLACES
    if not few or not kernels.wanted():
        return False
    from gemma_jax.model.kernels import ranks

    return ranks.takes(length)


def _places_by_segment(
    score: Float[Array, "B K M"], count: int, length: int
) -> Int[Array, "segments+1 B K M"]:
    """Where each token stands in the slots before any segment and after each; -1: it is not there.

    Args:
        score: of `count` tokens in the slots, and of those of segments of `length` tokens.
    """
    from gemma_jax.model.kernels import ranks

    score = jax.lax.stop_gradient(score)
    score = jnp.where(jnp.isnan(score), jnp.inf, score)  # they stay, as sorting has it
    ahead = ranks.count_ahead(score, first=count, length=length)
    read = count + length * jnp.arange(len(ahead))[:, None, None, None]
    kept = (jnp.arange(score.shape[-1]) < read) & (ahead < count)
    return jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, -1)


def _chosen(place: Int[Array, "N B K M"], count: int) -> Int[Array, "N B K count"]:
    """Which token stands in each slot, of `count` tokens that have a place."""
    number = jnp.arange(place.shape[-1], dtype=place.dtype)
    nowhere = count + number  # each its own, as no two indices may be equal
    at = jnp.where(place < 0, nowhere, place)
    rows = jnp.indices(place.shape[:-1])[..., None]
    chosen = jnp.zeros((*place.shape[:-1], count), place.dtype)
    number = jnp.broadcast_to(number, place.shape)
    return chosen.at[*rows, at].set(number, mode="drop", unique_indices=True)


def _best_of(tokens: Memory, new: Memory) -> Memory:
    """Of those in the slots and new ones, as many as there are slots."""
    joined = {name: jnp.concatenate([x, new[name]], axis=2) for name, x in tokens.items()}
    best = _highest(joined["score"], tokens["score"].shape[2])
    place = _places_of(best, joined["score"].shape[2])
    return {name: _choose(x, best[None], place[None])[0] for name, x in joined.items()}


def _highest(score: Float[Array, "B K M"], count: int) -> Int[Array, "B K count"]:
    """Where the highest scores are, from left to right; of equal ones, the last."""
    last = score.shape[-1] - 1
    found = jax.lax.top_k(jax.lax.stop_gradient(score)[..., ::-1], count)[1]
    return jnp.sort(last - found, axis=-1)


def _places_of(best: Int[Array, "B K N"], length: int) -> Int[Array, "B K length"]:
    """For each of `length` candidates where it stands among the chosen ones; -1: it was not chosen."""
    rows = jnp.indices(best.shape[:2])[..., None]
    numbers = jnp.arange(best.shape[-1], dtype=best.dtype)
    places = jnp.full((*best.shape[:2], length), -1, best.dtype)
    return places.at[*rows, best].set(numbers, unique_indices=True)


@jax.custom_vjp
def _choose(
    x: Float[Array, "B K M *c"], chosen: Int[Array, "N B K count"], place: Int[Array, "N B K M"]
) -> Float[Array, "N B K count *c"]:
    """The rows `chosen` of `x`. None is chosen twice at once, so its gradient is looked up."""
    return jnp.take_along_axis(x[None], _as_rows(chosen, x), axis=3)


def _choose_forward(x: Array, chosen: Array, place: Array) -> tuple[Array, Array]:
    return _choose(x, chosen, place), place


def _choose_backward(place: Array, slope: Array) -> tuple[Array, None, None]:
    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        place, slope = one
        rows = place.reshape(*place.shape, *[1] * (slope.ndim - place.ndim))
        found = jnp.take_along_axis(slope, jnp.maximum(rows, 0), axis=2)
        return total + jnp.where(rows >= 0, found, 0).astype(jnp.float32), None

    shape = (*slope.shape[1:3], place.shape[-1], *slope.shape[4:])
    start = jnp.zeros(shape, jnp.float32)
    # Not a sum over the first axis, for which all that is found would be laid out in memory.
    total, _ = jax.lax.scan(add, start, (place, slope), unroll=min(len(place), UNROLL))
    return total.astype(slope.dtype), None, None


_choose.defvjp(_choose_forward, _choose_backward)


def _as_rows(index: Int[Array, "N B K J"], x: Float[Array, "B K _ *c"]) -> Array:
    return index.reshape(*index.shape, *[1] * (x.ndim + 1 - index.ndim))


def _product(subscripts: str, x: Array, y: Array) -> Array:
    """In float32 of what may be bfloat16; CPUs have no such product."""
    if jax.default_backend() == "cpu":
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
