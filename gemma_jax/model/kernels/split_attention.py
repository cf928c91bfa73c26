"""Attention and memory of one token, split over the programs of `layer`.

Each program attends to a share of the window and reads a share of the memory's rows, for all heads; what
they found is joined by the numbers of their softmax (Flash-Decoding, Dao et al. 2023). Mosaic GPU (Pallas).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from gemma_jax.model.kernels.decode import NOTHING
from gemma_jax.model.kernels.lookup import Lookup
from gemma_jax.model.kernels.registers import (
    HALF,
    HALVES,
    PIECE,
    PIECES,
    columns_among_threads,
    load,
    load_stored,
    spread,
    tiled,
)

f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class SplitAttention:
    """One warpgroup's part: half of the heads of a share; of a join, the softmax or what memory gave.

    Attributes:
        given, out: by name, what the kernel is given and what its programs exchange.
        queries, scores, weights: shared memory of the two warpgroups, see `shared_memory`.
        lookup: how memory is read, if it is.
        scale: of the scores.
        shares: of the window and of the rows of memory.
    """

    given: dict[str, Any]
    out: dict[str, Any]
    queries: Any
    scores: Any
    weights: Any
    warpgroup: Array
    lookup: Lookup | None
    scale: float
    shares: int

    @staticmethod
    def shared_memory(heads: int, dim: int, share: int) -> list[Any]:
        """For `queries`, `scores` and `weights`, with so many keys in a share."""
        shapes = (2, heads // 2, dim // 2), (heads // 2, share), (heads // 2, share)
        return [plgpu.SMEM((2, *shape), f32) for shape in shapes]

    @property
    def heads(self) -> int:
        return self.out["joined"].shape[0]

    @property
    def own(self) -> int:
        """Heads of a warpgroup."""
        return self.heads // 2

    @property
    def dim(self) -> int:
        return self.out["joined"].shape[1]

    @property
    def share(self) -> int:
        """Keys of a share."""
        return self.given["keys"].shape[0] // self.shares

    @property
    def depth(self) -> int:
        """Rows of memory of a share."""
        return self.dim // self.shares

    @property
    def whole(self) -> Any:
        """The layout of the values of a share."""
        return columns_among_threads(self.share, self.dim)

    @property
    def ends(self) -> list[Any]:
        """What rotation turns into each other."""
        half = self.dim // 2
        return [pl.ds(0, half), pl.ds(half, half)]

    def ahead(self, number: Array) -> tuple:
        """What a share needs of what is not made in this kernel, for `attend`."""
        given, share = self.given, self.share
        number = jnp.minimum(number, self.shares - 1)
        first, last = (given["seen"][i] for i in range(2))
        some, back = pl.ds(number * share, share), jnp.maximum(last - number * share, 0)
        key = [load_stored(given["keys"].at[some, end], HALVES) for end in self.ends]
        value = load_stored(given["values"].at[some], self.whole)
        near = [load(given[name].at[pl.ds(0, share)], HALVES) for name in ("cosine", "sine")]
        tables = self._table(back), self._table(jnp.minimum(back, share - 1))
        memory = []
        if self.lookup is not None:
            rows = [given["memory"].at[number * self.depth + i] for i in range(self.depth)]
            memory = [load(row, self.whole.reduce(0)) for row in rows]
        return first, last, key, near, value, tables, memory

    def attend(self, number: Array, ahead: tuple) -> None:
        """A share of the keys and of the rows of memory, for the heads of this warpgroup."""
        out, warpgroup, share = self.out, self.warpgroup, self.share
        heads, own, half, dtype = self.heads, self.own, self.dim // 2, self.given["keys"].dtype
        # [heads, keys]: the same in each warp.
        by_head = tiled((32 // share, share), (1,), warps=4, lanes=(-3, -2))
        first, last, key, near, value, (query_table, key_table), memory = ahead
        key = [y.astype(dtype) for y in _rotated(*(y.astype(f32) for y in key), *near)]
        read = []
        if self.lookup is not None:
            for h in range(own):
                row = number * self.depth
                q = [out["qkv"][warpgroup * own + h, row + i] for i in range(self.depth)]
                q = [self.lookup.features(y.astype(f32)) for y in q]
                read.append(sum(a * b for a, b in zip(q, memory, strict=True)))
        start, shape = number * share, (share, half)
        place = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=HALVES)
        new = (load(out["qkv"].at[heads, end], HALF) for end in self.ends)
        key = [
            jnp.where(place == last, spread(a, HALVES, shape, 1), b.astype(f32))
            for a, b in zip(_rotated(*new, *key_table), key, strict=True)
        ]
        mine = pl.ds(warpgroup * own, own)
        for i, part in enumerate(self._turned(mine, query_table, HALVES)):
            self.queries.at[warpgroup, i][...] = part

        @pl.loop(0, own)
        def score_head(h):
            query = (load(self.queries.at[warpgroup, i, h], HALF) for i in range(2))
            both = (a * spread(b, HALVES, shape, 1) for a, b in zip(key, query, strict=True))
            self.scores.at[warpgroup, h][...] = jnp.sum(sum(both), axis=1) * self.scale

        score, shape = load(self.scores.at[warpgroup], by_head), (own, share)
        place = start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=by_head)
        score = jnp.where((place >= first) & (place <= last), score, NOTHING)
        best = jnp.max(score, axis=1)
        weight = jnp.exp(score - spread(best, by_head, shape, 0))
        weight = jnp.where(score > NOTHING, weight, 0.0)
        self.weights.at[warpgroup][...] = weight
        whole, shape = self.whole, (share, self.dim)
        place = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=whole)
        new = spread(load(out["qkv"].at[heads + 1], whole.reduce(0)), whole, shape, 1)
        value = jnp.where(place == last, new, value.astype(f32))
        out["best"].at[mine, number][...] = best
        out["total"].at[mine, number][...] = jnp.sum(weight, axis=1)

        @pl.loop(0, own)
        def sum_values(h):
            weight = load(self.weights.at[warpgroup, h], whole.reduce(1))
            found = jnp.sum(spread(weight, whole, shape, 0) * value, axis=0)
            out["attended"].at[number, warpgroup * own + h][...] = found

        @pl.when((warpgroup == 0) & (number == lax.div(last, jnp.int32(share))))
        def of_token():
            self._keep_token(last)

        for h, found in enumerate(read):
            out["found"].at[number, warpgroup * own + h][...] = found

    def _keep_token(self, last: Array) -> None:
        """Puts the token's key and value in their place in the window, or nothing."""
        kept, layout = self.given["seen"][3] > 0, self.whole.reduce(0)
        for i, name in enumerate(("keys", "values")):
            place = self.given[name].at[last]

            @pl.when(kept)
            def new(place=place, source=self.out["qkv"].at[self.heads + i]):
                place[...] = load_stored(source, layout)

            @pl.when(~kept)
            def nothing(place=place):
                place[...] = plgpu.layout_cast(jnp.zeros((self.dim,), place.dtype), layout)

    def sink_ahead(self) -> tuple:
        """What `join` needs for the sink, of what is not made in this kernel."""
        last, sees_sink = self.given["seen"][1], self.given["seen"][2]
        key = [load_stored(self.given["sink_key"].at[end], HALF) for end in self.ends]
        return sees_sink, self._table(last + 1), key

    def join(self, number: Array, ahead: tuple) -> None:
        """Some columns of a head: one warpgroup joins its softmax, one what memory gave."""
        given, out = self.given, self.out
        pieces = jnp.int32(self.dim // PIECE)
        head, columns = lax.div(number, pieces), lax.rem(number, pieces)
        columns = pl.ds(columns * PIECE, PIECE)
        rows = pl.ds(0, self.shares)

        @pl.when(self.warpgroup == 0)
        def softmax():
            part = load(out["attended"].at[rows, head, columns], PIECES)
            best, total = (load(out[name].at[head], PIECES.reduce(1)) for name in ("best", "total"))
            sees_sink, sink_table, key = ahead
            value = load(given["sink_value"].at[columns], PIECES.reduce(0))
            query = self._turned(head, sink_table, HALF)
            score = sum(x * y.astype(f32) for x, y in zip(query, key, strict=True))
            score = jnp.where(sees_sink > 0, jnp.sum(score) * self.scale, NOTHING)
            top = jnp.maximum(jnp.max(best), score)
            weight, sink = jnp.exp(best - top), jnp.exp(score - top)
            total = jnp.sum(weight * total) + sink
            found = jnp.sum(spread(weight, PIECES, part.shape, 0) * part, axis=0)
            out["joined"].at[head, columns][...] = (found + sink * value) / total

        if self.lookup is not None:

            @pl.when(self.warpgroup == 1)
            def memory():
                part = load(out["found"].at[rows, head, columns], PIECES)
                out["read"].at[head, columns][...] = jnp.sum(part, axis=0)

    def _turned(self, head: Any, table: list[Array], layout: Any) -> tuple[Array, Array]:
        """Halves of the query of a head, or of some, rotated."""
        halves = [load(self.out["qkv"].at[head, end], layout) for end in self.ends]
        if halves[0].ndim == 2:
            table = [spread(row, HALVES, halves[0].shape, 1) for row in table]
        return _rotated(*halves, *table)

    def _table(self, position: Array) -> list[Array]:
        """Cosines and sines of a position."""
        return [load(self.given[name].at[position], HALF) for name in ("cosine", "sine")]


def _rotated(left: Array, right: Array, cosine: Array, sine: Array) -> tuple[Array, Array]:
    return left * cosine - right * sine, right * cosine + left * sine
