"""A whole layer for one new token, in one kernel for Hopper GPUs: what decoding a single text does.

Decoding is as fast as weights can be read, if nothing else takes time. One kernel with a program on
each multiprocessor therefore does all of a layer: a warpgroup streams the rows of the four matrices
that its program multiplies into shared memory, one matrix after the other, and never waits for a
result; two warpgroups multiply and attend, and all programs meet between the steps of the layer.
Whatever else a multiprocessor asks for waits behind what is streamed to it, so only as much of that is
on its way as the memory's bandwidth needs. Mosaic GPU (Pallas).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gemma_jax.model.kernels.decode import NOTHING, Lookup
from gemma_jax.model.kernels.registers import (
    COLUMNS,
    FLAT,
    HALF,
    HALVES,
    PARTS,
    PIECE,
    PIECES,
    SHARED,
    SUMS,
    TILE,
    columns_among_threads,
    integer_product,
    spread,
    tiled,
)
from gemma_jax.model.rule import WriteGate

ROWS, ROWS_INT8 = 8, 16  # of a tile, shared out to the four warps
BYTES = 192 * 1024  # of shared memory for tiles
IN_FLIGHT = 3  # half tiles on their way; one fewer until programs have attended
SHARES = 128  # of the window and of the rows of memory, each of a program


class Matrix(NamedTuple):
    """A matrix [N, K], its rows in parts of 256 columns; `scale` [N] if it is int8."""

    values: Float[Array, "N K/256 256"]
    scale: Float[Array, " N"] | None = None


class Layer(NamedTuple):
    """A layer's parameters."""

    pre_attention_scale: Float[Array, " D"]
    qkv: Matrix
    out: Matrix
    pre_mlp_scale: Float[Array, " D"]
    gate_up: Matrix
    down: Matrix


def available() -> bool:
    """Whether this version of JAX compiles the kernel: others infer layouts of registers otherwise."""
    return jax.__version_info__[:2] == (0, 11)


def takes(width: int, mlp_dim: int, heads: int, kv_heads: int, head_dim: int, window: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    tile = PARTS * COLUMNS
    even = width == tile and mlp_dim % tile == 0 and mlp_dim > tile
    even &= window in (8 * SHARES, 16 * SHARES, 32 * SHARES)
    return even and kv_heads == 1 and (heads, head_dim) == (PARTS, COLUMNS)


@functools.partial(jax.jit, static_argnames=("eps", "scale", "programs"))
def layer_of_one(
    x: Float[Array, " D"],
    layer: Layer,
    keys: Float[Array, "L C"],
    values: Float[Array, "L C"],
    sink: tuple[Float[Array, " C"], Float[Array, " C"]],
    seen: Int[Array, " 4"],
    cosine: Float[Array, "L1 C/2"],
    sine: Float[Array, "L1 C/2"],
    lookup: Lookup | None,
    write: tuple[WriteGate, Float[Array, " L"]] | None = None,
    *,
    eps: float,
    scale: float,
    programs: int | None = None,
) -> tuple[
    Float[Array, " D"],
    Float[Array, " D"],
    Float[Array, " HC2"],
    Float[Array, "L C"],
    Float[Array, "L C"],
    Float[Array, " L"] | None,
]:
    """What the layer makes of a token; x after the first norm; the token's queries, key and value side
    by side; the keys, values and write gates with the token's in its place.

    Args:
        keys, values: the window, not rotated; the token's own place, `seen[1]`, is still free.
        seen, cosine, sine, lookup: as of `decode.attend`, for a batch of one; and lastly in `seen`
            whether key and value stay (0 or 1), in whose place there is nothing else.
        write: how a token's write gate is computed, and the window's gates.
        eps: of the norms.
        scale: of the scores.
    """
    programs = programs or jax.local_devices()[0].core_count
    (length, dim), half, f32, dtype = keys.shape, keys.shape[1] // 2, jnp.float32, x.dtype
    heads = layer.out.values.shape[1] * COLUMNS // dim
    own = heads // 2  # heads of a warpgroup
    share, depth = length // SHARES, dim // SHARES  # keys and rows of memory at a time
    quantized = layer.qkv.scale is not None
    height = ROWS_INT8 if quantized else ROWS
    matrices = [layer.qkv, layer.out, layer.gate_up, layer.down]
    tiles = [m.values.shape[0] // height for m in matrices]
    chunks = [m.values.shape[1] // PARTS for m in matrices]
    # A tile of [gate | up] has as many rows of both; else its rows lie below each other.
    steps = [height, height, height // 2, height]
    below = [height // 2, height // 2, layer.gate_up.values.shape[0] // 2, height // 2]
    tile_shape = (height, PARTS, COLUMNS)
    tile_bytes = height * PARTS * COLUMNS * layer.qkv.values.dtype.itemsize
    stages = BYTES // tile_bytes // 2  # of each of the two warpgroups that multiply
    whole = columns_among_threads(share, dim)
    # [heads, keys]: the same in each warp.
    by_head = tiled((32 // share, share), (1,), warps=4, lanes=(-3, -2))

    def in_parts(size: int) -> tuple[int, int]:
        return size // COLUMNS, COLUMNS

    exchanged = {
        "y": (in_parts(x.shape[0]), dtype),
        "normed": (in_parts(x.shape[0]), dtype),
        "qkv": (in_parts(layer.qkv.values.shape[0]), dtype),
        "middle": (in_parts(x.shape[0]), dtype),
        "hidden": (layer.down.values.shape[1:], dtype),
        "joined": ((heads, dim), f32),
        "read": ((heads, dim), f32),
        "attended": ((SHARES, heads, dim), f32),
        "best": ((heads, SHARES), f32),
        "total": ((heads, SHARES), f32),
        "found": ((SHARES, heads, dim), f32),
    }

    def kernel(
        given, out, slots, scores, weights, full, empty, both, met, numbers, queries, vector
    ):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        counts = [pl.cdiv(n - program, jnp.int32(programs)) for n in tiles]
        early = chunks[3] * 3 // 4  # chunks of the hidden vector, with which the product may begin
        if programs > 1:
            meeting = pl.get_global(plgpu.SemaphoreType.REGULAR)
            ready = pl.get_global(plgpu.SemaphoreType.REGULAR((2,)))

        def shares(at: int):
            """How many of a matrix's tiles each of the two warpgroups has: every other one."""
            return [lax.div(counts[at] + 1 - i, jnp.int32(2)) for i in range(2)]

        def before(at: int):
            """Tiles of each of the two warpgroups before those of a matrix."""
            each = [[share * chunks[i] for share in shares(i)] for i in range(at)]
            return [sum((loads[i] for loads in each), jnp.int32(0)) for i in range(2)]

        def turn(i, at: int):
            """Which load is the i-th of a matrix: of which pair of tiles which tile, and which chunk.

            The two warpgroups have a tile each of a pair; the last pair may lack one.
            """
            of_pair = jnp.int32(2 * chunks[at])
            pair, rest = lax.div(i, of_pair), lax.rem(i, of_pair)
            alone = pair * 2 + 1 == counts[at]
            odd = jnp.where(alone, 0, lax.rem(rest, jnp.int32(2)))
            return pair, odd, jnp.where(alone, rest, lax.div(rest, jnp.int32(2)))

        def halves_of(at: int, tile, chunk):
            """The two halves of a tile, in the order of this program's."""
            row = (program + tile * programs) * steps[at]
            for part in range(2):
                some = pl.ds(row + part * below[at], height // 2)
                yield given["matrices"][at].at[some, pl.ds(chunk * PARTS, PARTS)]

        def arrive(half, wanted):
            """Waits for half a tile, if `wanted`; returns what is to be waited for still."""

            @pl.when((half >= 0) & wanted)
            def wait():
                plgpu.barrier_wait(full.at[half])

            return jnp.where(wanted, -1, half)

        @pl.when(warpgroup == 2)
        def stream():
            plgpu.set_max_registers(40, action="decrease")
            waiting = (jnp.int32(-1),) * IN_FLIGHT  # halves, the oldest first; -1: none
            for at in range(len(matrices)):
                begin = before(at)

                @pl.loop(0, counts[at] * chunks[at], init_carry=waiting)
                def waiting(i, waiting, at=at, begin=begin):
                    pair, odd, chunk = turn(i, at)
                    use = jnp.where(odd == 1, begin[1], begin[0]) + pair * chunks[at] + chunk
                    slot = odd * stages + lax.rem(use, jnp.int32(stages))
                    attending = (at < 2) | ((at == 2) & (i < 2 * stages))

                    for part, ref in enumerate(halves_of(at, 2 * pair + odd, chunk)):
                        arrive(waiting[0], True)
                        older = arrive(waiting[1], attending), *waiting[2:]

                        if part == 0:

                            @pl.when(use >= stages)
                            def wait():
                                plgpu.barrier_wait(empty.at[slot])

                        here = slots.at[slot, pl.ds(part * height // 2, height // 2)]
                        plgpu.copy_gmem_to_smem(ref, here, full.at[2 * slot + part])
                        waiting = *older, 2 * slot + part
                    return waiting

        def load(ref, layout):
            """What programs exchange, or were given."""
            return plgpu.load(ref, layout=layout, optimized=False).astype(f32)

        def meet(number, meanwhile=lambda: None):
            """Waits until all programs have come here, the `number`th time, and does `meanwhile`."""
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)
            if programs == 1:
                return meanwhile()

            @pl.when(warpgroup == 0)
            def tell():
                plgpu.semaphore_signal(meeting, memory_scope="gpu")

            found = meanwhile()

            @pl.when(warpgroup == 0)  # one asks for both: what is asked for by many takes longer
            def wait():
                everyone = programs * number
                plgpu.semaphore_wait(meeting, everyone, decrement=False, memory_scope="gpu")
                plgpu.barrier_arrive(met)

            @pl.when(warpgroup == 1)
            def follow():
                plgpu.barrier_wait(met)

            return found

        def over_parts(reduce: Callable, y):
            """A number of each part, reduced once more: the warps have different parts."""
            numbers.at[warpgroup][...] = y
            return reduce(load(numbers.at[warpgroup], FLAT.reduce(1)))

        def normalized(y, scale):
            """RMSNorm of a vector."""
            square = over_parts(jnp.sum, jnp.sum(y * y, axis=1))
            return y * lax.rsqrt(square / y.size + eps) * (1.0 + scale)

        def mixed():
            """Attention and memory: a part is a head."""
            attended = load(out["joined"], SHARED)
            if lookup is None:
                return attended
            q, found = load(out["qkv"].at[pl.ds(0, heads)], SHARED), load(out["read"], SHARED)
            gate, total, shape = load(given["gate"], SHARED.reduce(1)), None, (heads, dim)
            if lookup.total is not None:
                total = spread(load(given["total"], SHARED.reduce(0)), SHARED, shape, 1)
            along = functools.partial(spread, layout=SHARED, shape=shape, axis=0)
            return lookup.mix(q, found, attended, gate, total, along)

        def before_feeding_forward():
            scale = load(given["pre_mlp_scale"], SHARED)
            return normalized(load(out["middle"], SHARED), scale)

        def part_of_hidden(chunk):
            """Of the hidden vector, once it is made; as it is stored, so that no loading is waited for."""
            if programs > 1:
                for i, first in enumerate((0, early)):

                    @pl.when(chunk == first)
                    def wait(i=i):
                        everyone = 2 * programs
                        made = ready.at[i]
                        plgpu.semaphore_wait(made, everyone, decrement=False, memory_scope="gpu")

            part = out["hidden"].at[pl.ds(chunk * PARTS, PARTS)]
            return plgpu.load(part, layout=SHARED, optimized=False)

        def keep(y):
            """Puts a vector where all warps can get it: as it is, or in bytes for int8 weights.

            Then as fixed-point numbers of three signed bytes, highest first. Returns their unit.
            """
            if not quantized:
                vector.at[warpgroup][...] = y
                return jnp.float32(1)
            top = over_parts(jnp.max, jnp.max(jnp.abs(y), axis=1))
            unit = jnp.where(top > 0.0, top, 1.0) * 2.0**-22
            rest = (y * (1.0 / unit)).astype(jnp.int32)
            for i in reversed(range(3)):
                low = ((rest + 128) & 255) - 128
                vector.at[warpgroup, i][...] = low.astype(jnp.int8)
                rest = (rest - low) >> 8
            return unit

        def multiplied(rows, unit):
            """Sums of a tile's rows with the vector that is kept, apart for each thread."""
            if quantized:
                y = [
                    plgpu.load(vector.at[warpgroup, i], layout=FLAT, optimized=False)
                    for i in range(3)
                ]
                high, middle, low = (x.astype(f32) for x in integer_product(rows, y))
                return (65536.0 * high + 256.0 * middle + low) * unit
            y = lax.broadcast_in_dim(load(vector.at[warpgroup], FLAT), tile_shape, (1, 2))
            return jnp.sum(rows.astype(f32) * plgpu.layout_cast(y, TILE), axis=1)

        def pick(at, numbers):
            """One of a few numbers, known only when the program runs."""
            if isinstance(at, int):
                return numbers[at]
            return functools.reduce(
                lambda found, i: jnp.where(at == i, numbers[i], found),
                range(1, len(numbers)),
                jnp.int32(numbers[0]),
            )

        def multiply(at, first_unit=None):
            """The product with one of the matrices; with the first, of a vector that is kept already."""
            share, begin = pick(at, every(shares)), pick(at, every(before))
            number = pick(at, chunks)
            # Tiles of this program, then of this warpgroup, with rows of the early parts.
            early_tiles = early * PARTS * COLUMNS // steps[2] - program
            early_tiles = pl.cdiv(early_tiles, jnp.int32(programs))
            early_tiles = pl.cdiv(early_tiles - warpgroup, jnp.int32(2))

            def fresh(hidden):
                """Keeps the vector, or a part of it."""
                vectors = [mixed, before_feeding_forward, lambda: hidden.astype(f32)]
                return lax.switch(at - 1, [lambda vector=v: keep(vector()) for v in vectors])

            def hidden_at(j, otherwise):
                more = (number > 1) & (j < number)
                return lax.cond(more, lambda: part_of_hidden(j), lambda: otherwise)

            nothing = plgpu.layout_cast(jnp.zeros((PARTS, COLUMNS), dtype), SHARED)

            def tile(i, unit):
                hidden = [] if first_unit is not None else [hidden_at(0, nothing)]
                scales, residual = (
                    scales_of(at, 2 * i + warpgroup),
                    residual_of(at, 2 * i + warpgroup),
                )

                def chunk(j, carry):
                    total, unit, *hidden = carry
                    if first_unit is None:
                        is_new = (i == 0) | (number > 1)
                        unit = lax.cond(is_new, lambda: fresh(*hidden), lambda: unit)
                        hidden = [hidden_at(j + 1, *hidden)]
                    slot = lax.rem(begin + i * number + j, jnp.int32(stages)) + warpgroup * stages
                    for part in range(2):
                        plgpu.barrier_wait(full.at[2 * slot + part])
                    total += multiplied(plgpu.load(slots.at[slot], layout=TILE), unit)
                    plgpu.barrier_arrive(empty.at[slot])
                    return total, unit, *hidden

                zeros = jnp.zeros((height, 32 if quantized else COLUMNS), f32)
                zeros = plgpu.layout_cast(zeros, SUMS if quantized else TILE.reduce(1))
                total, unit, *_ = lax.fori_loop(0, number, chunk, (zeros, unit, *hidden))
                finish_tile(at, 2 * i + warpgroup, jnp.sum(total, axis=1), scales, residual)
                if programs > 1 and first_unit is None:
                    for part, number_of_tiles in enumerate((early_tiles, share)):

                        @pl.when((at == 2) & (i + 1 == jnp.maximum(number_of_tiles, 1)))
                        def made(part=part):
                            plgpu.semaphore_signal(ready.at[part], memory_scope="gpu")

                return unit

            lax.fori_loop(0, share, tile, jnp.float32(1) if first_unit is None else first_unit)

        def every(count: Callable):
            """What `count` gives for each matrix, of this warpgroup."""
            pairs = (count(at) for at in range(len(matrices)))
            return [jnp.where(warpgroup == 1, odd, even) for even, odd in pairs]

        def rows_of(at, tile):
            """The first row of each half of a tile."""
            row = (program + tile * programs) * pick(at, steps)
            return row, row + pick(at, below)

        def scales_of(at, tile):
            """The scales of both halves of a tile: on their way before they are needed."""
            if not quantized:
                return None

            def scales(ref):
                return [load(ref.at[half_of(row)], SUMS.reduce(1)) for row in rows_of(at, tile)]

            return lax.switch(at, [lambda ref=ref: scales(ref) for ref in given["scales"]])

        def residual_of(at, tile):
            """What is added to both halves of a tile, likewise, if anything is."""
            if isinstance(at, int):
                return None
            rows = rows_of(at, tile)

            def some(ref):
                return [
                    plgpu.load(place(ref, row), layout=SUMS.reduce(1), optimized=False)
                    for row in rows
                ]

            def nothing():
                zeros = jnp.zeros((height // 2,), dtype)
                return [plgpu.layout_cast(zeros, SUMS.reduce(1))] * 2

            return lax.switch(
                at - 1, [lambda: some(given["x"]), nothing, lambda: some(out["middle"])]
            )

        def finish_tile(at, tile, sums, scales, residual):
            """Does what follows a product."""
            rows, sums = rows_of(at, tile), [sums[: height // 2], sums[height // 2 :]]
            if quantized:
                sums = [a * b for a, b in zip(sums, scales, strict=True)]

            def save(name):
                for i, (row, found) in enumerate(zip(rows, sums, strict=True)):
                    if residual is not None:
                        found += residual[i].astype(f32)
                    place(out[name], row)[...] = found.astype(dtype)

            def save_geglu():
                row, (gate, up) = rows[0], sums
                inner = gate * (0.7978845608028654 + 0.035677408136300125 * (gate * gate))
                found = 0.5 * gate * up * (1.0 + jnp.tanh(inner))
                place(out["hidden"], row)[...] = found.astype(dtype)

            if isinstance(at, int):
                return save("qkv")
            lax.switch(at - 1, [lambda: save("middle"), save_geglu, lambda: save("y")])

        def half_of(row):
            return pl.ds(row, height // 2)

        def place(ref, row):
            return ref.at[
                lax.div(row, jnp.int32(COLUMNS)), half_of(lax.rem(row, jnp.int32(COLUMNS)))
            ]

        ends = [pl.ds(0, half), pl.ds(half, half)]  # what rotation turns into each other

        def turned(head, table, layout):
            """Halves of the query of a head, or of some, rotated."""
            halves = [load(out["qkv"].at[head, end], layout) for end in ends]
            if halves[0].ndim == 2:
                table = [spread(row, HALVES, halves[0].shape, 1) for row in table]
            return rotated(*halves, *table)

        def rotated(left, right, cosine, sine):
            return left * cosine - right * sine, right * cosine + left * sine

        def table(position):
            """Cosines and sines of a position."""
            return [load(given[name].at[position], HALF) for name in ("cosine", "sine")]

        def what_is_there(number):
            """What attention and memory need for a share, of what is not made in this kernel."""
            number = jnp.minimum(number, SHARES - 1)
            first, last = (given["seen"][i] for i in range(2))
            some, back = pl.ds(number * share, share), jnp.maximum(last - number * share, 0)
            key = [
                plgpu.load(given["keys"].at[some, end], layout=HALVES, optimized=False)
                for end in ends
            ]
            value = plgpu.load(given["values"].at[some], layout=whole, optimized=False)
            near = [load(given[name].at[pl.ds(0, share)], HALVES) for name in ("cosine", "sine")]
            tables = table(back), table(jnp.minimum(back, share - 1))
            memory = []
            if lookup is not None:
                rows = [given["memory"].at[number * depth + i] for i in range(depth)]
                memory = [load(row, whole.reduce(0)) for row in rows]
            return first, last, key, near, value, tables, memory

        def attend(number, there):
            """A share of the keys and of the rows of memory, for the heads of this warpgroup."""
            first, last, key, near, value, (query_table, key_table), memory = there
            key = [y.astype(dtype) for y in rotated(*(y.astype(f32) for y in key), *near)]
            read = []
            if lookup is not None:
                for h in range(own):
                    row = number * depth
                    q = [out["qkv"][warpgroup * own + h, row + i] for i in range(depth)]
                    q = [lookup.features(y.astype(f32)) for y in q]
                    read.append(sum(a * b for a, b in zip(q, memory, strict=True)))
            start, shape = number * share, (share, half)
            place = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=HALVES)
            new = (load(out["qkv"].at[heads, end], HALF) for end in ends)
            key = [
                jnp.where(place == last, spread(a, HALVES, shape, 1), b.astype(f32))
                for a, b in zip(rotated(*new, *key_table), key, strict=True)
            ]
            mine = pl.ds(warpgroup * own, own)
            for i, part in enumerate(turned(mine, query_table, HALVES)):
                queries.at[warpgroup, i][...] = part

            @pl.loop(0, own)
            def one(h):
                query = (load(queries.at[warpgroup, i, h], HALF) for i in range(2))
                both = (a * spread(b, HALVES, shape, 1) for a, b in zip(key, query, strict=True))
                scores.at[warpgroup, h][...] = jnp.sum(sum(both), axis=1) * scale

            score, shape = load(scores.at[warpgroup], by_head), (own, share)
            place = start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=by_head)
            score = jnp.where((place >= first) & (place <= last), score, NOTHING)
            best = jnp.max(score, axis=1)
            weight = jnp.exp(score - spread(best, by_head, shape, 0))
            weight = jnp.where(score > NOTHING, weight, 0.0)
            weights.at[warpgroup][...] = weight
            shape = (share, dim)
            place = start + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=whole)
            new = spread(load(out["qkv"].at[heads + 1], whole.reduce(0)), whole, shape, 1)
            value = jnp.where(place == last, new, value.astype(f32))
            out["best"].at[mine, number][...] = best
            out["total"].at[mine, number][...] = jnp.sum(weight, axis=1)

            @pl.loop(0, own)
            def other(h):
                found = weighted(weights.at[warpgroup, h], value, whole)
                out["attended"].at[number, warpgroup * own + h][...] = found

            @pl.when((warpgroup == 0) & (number == lax.div(last, jnp.int32(share))))
            def keep_token():
                kept = given["seen"][3] > 0
                for i, name in enumerate(("keys", "values")):
                    place, layout = given[name].at[last], whole.reduce(0)

                    @pl.when(kept)
                    def new(place=place, source=out["qkv"].at[heads + i], layout=layout):
                        place[...] = plgpu.load(source, layout=layout, optimized=False)

                    @pl.when(~kept)
                    def nothing(place=place, layout=layout):
                        place[...] = plgpu.layout_cast(jnp.zeros((dim,), dtype), layout)

            for h, found in enumerate(read):
                out["found"].at[number, warpgroup * own + h][...] = found

        def weighted(weights_ref, rows, layout):
            """The sum of rows, each with its weight."""
            weight = load(weights_ref, layout.reduce(1))
            return jnp.sum(spread(weight, layout, rows.shape, 0) * rows, axis=0)

        def open_gate():
            """The token's write gate."""
            products = load(out["normed"], SHARED) * load(given["write_kernel"], SHARED)
            logit = over_parts(jnp.sum, jnp.sum(products, axis=1))
            opened = write[0].opened(logit + given["write_bias"][0])
            given["write"][given["seen"][1]] = opened * given["seen"][3].astype(f32)

        def sink_there():
            """What the join needs for the sink, likewise."""
            last, sees_sink = given["seen"][1], given["seen"][2]
            key = [
                plgpu.load(given["sink_key"].at[end], layout=HALF, optimized=False) for end in ends
            ]
            return sees_sink, table(last + 1), key

        def join(number, there):
            """Some columns of a head: one warpgroup joins its softmax, one what memory gave."""
            head, columns = (
                lax.div(number, jnp.int32(dim // PIECE)),
                lax.rem(number, jnp.int32(dim // PIECE)),
            )
            columns = pl.ds(columns * PIECE, PIECE)
            rows = pl.ds(0, SHARES)

            @pl.when(warpgroup == 0)
            def softmax():
                part = load(out["attended"].at[rows, head, columns], PIECES)
                best, total = (
                    load(out[name].at[head], PIECES.reduce(1)) for name in ("best", "total")
                )
                sees_sink, sink_table, key = there
                value = load(given["sink_value"].at[columns], PIECES.reduce(0))
                query = turned(head, sink_table, HALF)
                score = sum(x * y.astype(f32) for x, y in zip(query, key, strict=True))
                score = jnp.where(sees_sink > 0, jnp.sum(score) * scale, NOTHING)
                top = jnp.maximum(jnp.max(best), score)
                weight, sink = jnp.exp(best - top), jnp.exp(score - top)
                total = jnp.sum(weight * total) + sink
                found = jnp.sum(spread(weight, PIECES, part.shape, 0) * part, axis=0)
                out["joined"].at[head, columns][...] = (found + sink * value) / total

            if lookup is not None:

                @pl.when(warpgroup == 1)
                def memory():
                    part = load(out["found"].at[rows, head, columns], PIECES)
                    out["read"].at[head, columns][...] = jnp.sum(part, axis=0)

        def each(number: int, work: Callable, first=program):
            """Does what falls to this program of so many pieces of work."""

            @pl.loop(0, pl.cdiv(number - first, jnp.int32(programs)))
            def step(i):
                work(first + i * programs)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")

            scale = load(given["pre_attention_scale"], SHARED)
            y = normalized(load(given["x"], SHARED), scale)
            multiply(0, keep(y))

            @pl.when((program == 0) & (warpgroup == 0))
            def save_normed():
                out["normed"][...] = y.astype(dtype)

            there = meet(1, meanwhile=lambda: what_is_there(program))

            @pl.when(program < SHARES)
            def first_share():
                attend(program, there)

            if programs < SHARES:
                each(SHARES, lambda i: attend(i, what_is_there(i)), first=program + programs)

            if write is not None:
                pl.when((program == programs - 1) & (warpgroup == 1))(open_gate)

            there = meet(2, meanwhile=sink_there)
            each(heads * dim // PIECE, lambda i: join(i, there))

            @pl.loop(1, len(matrices))
            def step(at):
                @pl.when(at < (3 if programs > 1 else 4))
                def wait():
                    meet(at + 2)

                multiply(at)

    operands = {
        "x": x.reshape(-1, COLUMNS),
        "pre_attention_scale": layer.pre_attention_scale.reshape(-1, COLUMNS),
        "pre_mlp_scale": layer.pre_mlp_scale.reshape(-1, COLUMNS),
        "matrices": [m.values for m in matrices],
        "scales": [m.scale for m in matrices] if quantized else [],
        "keys": jax.new_ref(keys),
        "values": jax.new_ref(values),
        "sink_key": sink[0],
        "sink_value": sink[1],
        "seen": seen,
        "cosine": cosine,
        "sine": sine,
    }
    if lookup is not None:
        operands |= {"memory": lookup.matrix[0, 0], "gate": lookup.gate}
        operands |= {} if lookup.total is None else {"total": lookup.total[0, 0]}
    if write is not None:
        operands["write_kernel"] = write[0].kernel.reshape(-1, COLUMNS)
        operands |= {"write_bias": write[0].bias, "write": jax.new_ref(write[1])}
    leaves, tree = jax.tree.flatten(operands)
    in_place = (operands.get(name) for name in ("keys", "values", "write"))

    def body(*refs):
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        out = dict(zip(exchanged, refs[len(leaves) :], strict=True))
        pl.run_scoped(
            lambda *scratch: kernel(given, out, *scratch),
            plgpu.SMEM((2 * stages, *tile_shape), layer.qkv.values.dtype),
            plgpu.SMEM((2, own, share), f32),
            plgpu.SMEM((2, own, share), f32),
            plgpu.Barrier(num_arrivals=1, num_barriers=4 * stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=2 * stages),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
            plgpu.SMEM((2, PARTS), f32),
            plgpu.SMEM((2, 2, own, half), f32),
            plgpu.SMEM((2, 3, PARTS, COLUMNS), jnp.int8)
            if quantized
            else plgpu.SMEM((2, PARTS, COLUMNS), f32),
            collective_axes="warpgroup",
        )

    y, normed, qkv, *_ = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in exchanged.values()],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*leaves)
    window = (None if ref is None else jax.freeze(ref) for ref in in_place)
    return y.reshape(-1), normed.reshape(-1), qkv.reshape(-1), *window
