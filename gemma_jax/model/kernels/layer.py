"""A whole layer for one new token, in one kernel for Hopper GPUs: what decoding a single text does.

Decoding is as fast as weights can be read, if nothing else takes time. One kernel with a program on
each multiprocessor therefore does all of a layer: a warpgroup streams the rows of the four matrices
that its program multiplies into shared memory, one matrix after the other, and never waits for a
result; two warpgroups multiply and attend (`split_attention`), and all programs meet between the steps
of the layer. While they wait for each other, the next tiles are taken into registers, which makes room
for more on its way. Whatever else a multiprocessor asks for waits behind what is streamed to it, so
only as much of that is on its way as the memory's bandwidth needs, and a little less while programs
exchange vectors. A warp that waits for one load may wait for its others with it: so beside products
nothing is loaded from the GPU's own memory but tiles, with which their scales come. Mosaic GPU
(Pallas).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gemma_jax.model.kernels.lookup import Lookup
from gemma_jax.model.kernels.registers import (
    COLUMNS,
    FLAT,
    PARTS,
    PIECE,
    ROW_SUMS,
    SHARED,
    SUMS,
    TILE,
    fixed_point,
    fixed_product,
    load,
    load_stored,
    spread,
)
from gemma_jax.model.kernels.signals import APART, forget_signals, signal, wait_for_signals
from gemma_jax.model.kernels.split_attention import SplitAttention
from gemma_jax.model.rule import WriteGate

ROWS, ROWS_INT8 = 8, 16  # of a tile, shared out to the four warps
BYTES = 192 * 1024  # of shared memory for tiles
IN_FLIGHT = 3  # half tiles on their way; one fewer until all places have had one of [gate | up]
SHARES = 128  # of the window and of the rows of memory, each of a program
AT_ONCE = 2  # chunks of the hidden vector that become bytes together
LINE = 32  # numbers of 4 bytes in 128, by which places that are copied to lie apart
# Signals: 0 of programs that leave, 1 to 4 of meetings, and two about the hidden vector.
HIDDEN = 5
QKV, OUT, GATE_UP, DOWN = range(4)  # the matrices


class Matrix(NamedTuple):
    """A matrix [N, K], its rows in parts of 256 columns; `scale` [N] if it is int8."""

    values: Float[Array, "N K/256 256"]
    scale: Float[Array, " N"] | None = None


class Tile(NamedTuple):
    """A tile in registers; the scales of the rows of its two halves if they are int8."""

    rows: Array
    scale: list[Array] | None


class Layer(NamedTuple):
    """A layer's parameters."""

    pre_attention_scale: Float[Array, " D"]
    qkv: Matrix
    out: Matrix
    pre_mlp_scale: Float[Array, " D"]
    gate_up: Matrix
    down: Matrix


def takes(width: int, mlp_dim: int, heads: int, kv_heads: int, head_dim: int, window: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    tile = PARTS * COLUMNS
    even = width == tile and mlp_dim % (2 * tile) == 0
    even &= window in (8 * SHARES, 16 * SHARES)  # scores of more would need another layout
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
    (length, dim), f32, dtype = keys.shape, jnp.float32, x.dtype
    heads = layer.out.values.shape[1] * COLUMNS // dim
    quantized = layer.qkv.scale is not None
    height = ROWS_INT8 if quantized else ROWS
    matrices = [layer.qkv, layer.out, layer.gate_up, layer.down]
    tiles = [m.values.shape[0] // height for m in matrices]
    chunks = [m.values.shape[1] // PARTS for m in matrices]
    deep = chunks[DOWN]  # of which the hidden vector has so many
    at_once = math.gcd(deep // 2, AT_ONCE) if quantized else 1  # of each of the two warpgroups
    # A tile of [gate | up] has as many rows of both; else its rows lie below each other.
    steps = [height, height, height // 2, height]
    below = [height // 2, height // 2, layer.gate_up.values.shape[0] // 2, height // 2]
    tile_shape = (height, PARTS, COLUMNS)
    tile_bytes = height * PARTS * COLUMNS * layer.qkv.values.dtype.itemsize
    stages = BYTES // tile_bytes // 2  # of each of the two warpgroups that multiply

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

    def kernel(given, out, slots, scales, full, empty, both, met, numbers, handed, vector, shared):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        attention = SplitAttention(
            given, out, *shared, warpgroup, lookup, scale=scale, shares=SHARES
        )
        # Programs have tiles in turn: of [gate | up] the last one first, as the first has more of others.
        turn = [program, program, programs - 1 - program, program]
        counts = [pl.cdiv(n - i, jnp.int32(programs)) for n, i in zip(tiles, turn, strict=True)]
        early = deep * 3 // 4  # chunks of the hidden vector, with which the product may begin

        def turns(at: int):
            """How many tiles of a matrix each of the two warpgroups has: every other one.

            Of a matrix with several chunks each has every other chunk.
            """
            if chunks[at] > 1:
                return [counts[at] * (chunks[at] // 2)] * 2
            return [lax.div(counts[at] + 1 - i, jnp.int32(2)) for i in range(2)]

        def before(at: int):
            """Tiles of each of the two warpgroups before those of a matrix."""
            each = [turns(i) for i in range(at)]
            return [sum((loads[i] for loads in each), jnp.int32(0)) for i in range(2)]

        def halves_of(at: int, i):
            """The two halves of the i-th tile that this program loads of a matrix, and their scales."""
            tile, chunk = lax.div(i, jnp.int32(chunks[at])), lax.rem(i, jnp.int32(chunks[at]))
            for row in rows_of(at, tile):
                rows = half_of(row)
                scale = given["scales"][at].at[rows] if quantized else None
                yield given["matrices"][at].at[rows, pl.ds(chunk * PARTS, PARTS)], scale

        def rows_of(at: int, tile):
            """The first row of each half of this program's tile."""
            row = (turn[at] + tile * programs) * steps[at]
            return row, row + below[at]

        def arrive(half, wanted):
            """Waits for half a tile, if `wanted`; returns what is to be waited for still."""

            @pl.when((half >= 0) & wanted)
            def wait():
                plgpu.barrier_wait(full.at[half])

            return jnp.where(wanted, -1, half)

        def half_of(row):
            return pl.ds(row, height // 2)

        def scales_at(slot, part):
            """Where the scales of half a tile are."""
            return scales.at[slot, part, half_of(0)]

        @pl.when(warpgroup == 2)
        def stream():
            plgpu.set_max_registers(40, action="decrease")
            waiting = (jnp.int32(-1),) * IN_FLIGHT  # halves, the oldest first; -1: none
            for at in range(len(matrices)):
                begin = before(at)

                @pl.loop(0, counts[at] * chunks[at], init_carry=waiting)
                def waiting(i, waiting, at=at, begin=begin):
                    odd = lax.rem(i, jnp.int32(2))
                    use = jnp.where(odd == 1, begin[1], begin[0]) + lax.div(i, jnp.int32(2))
                    slot = odd * stages + lax.rem(use, jnp.int32(stages))
                    exchanging = (at < GATE_UP) | ((at == GATE_UP) & (i < 2 * stages))

                    for part, (ref, scale) in enumerate(halves_of(at, i)):
                        arrive(waiting[0], True)
                        older = arrive(waiting[1], exchanging), *waiting[2:]

                        if part == 0:

                            @pl.when(use >= stages)
                            def wait():
                                plgpu.barrier_wait(empty.at[slot])

                        here = slots.at[slot, half_of(part * height // 2)]
                        plgpu.copy_gmem_to_smem(ref, here, full.at[2 * slot + part])
                        if quantized:
                            here = scales_at(slot, part)
                            plgpu.copy_gmem_to_smem(scale, here, full.at[2 * slot + part])
                        waiting = *older, 2 * slot + part
                    return waiting

        def meet(number, meanwhile=lambda: None):
            """Waits until all programs have come here, the `number`th time, and does `meanwhile`."""
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)
            if programs == 1:
                return meanwhile()

            @pl.when(warpgroup == 0)
            def tell():
                signal(given["signals"].at[number])

            found = meanwhile()

            @pl.when(warpgroup == 0)  # one asks for both: what is asked for by many takes longer
            def wait():
                wait_for_signals(given["signals"].at[number], programs)
                plgpu.barrier_arrive(met)

            @pl.when(warpgroup == 1)
            def follow():
                plgpu.barrier_wait(met)

            return found

        def over_parts(*reductions: tuple[Callable, Array]):
            """What is to be reduced, in each part and once more: the warps have different parts."""
            for i, (reduce, y) in enumerate(reductions):
                numbers.at[warpgroup, i][...] = reduce(y, axis=1)
            return [
                reduce(load(numbers.at[warpgroup, i], FLAT.reduce(1)))
                for i, (reduce, _) in enumerate(reductions)
            ]

        def keep_normalized(y, scale):
            """RMSNorm of a vector, which is kept. Returns it, and what `keep` does."""
            y = y.astype(f32)
            reductions, scaled = [(jnp.sum, y * y)], y * (1.0 + scale.astype(f32))
            if quantized:
                reductions.append((jnp.max, jnp.abs(scaled)))
            square, *top = over_parts(*reductions)
            factor = lax.rsqrt(square / y.size + eps)
            y = scaled * factor
            return y, keep([y], top=factor * top[0] if quantized else None)

        def mixed():
            """Attention and memory: a part is a head."""
            attended = load(out["joined"], SHARED)
            if lookup is None:
                return attended
            q = load_stored(out["qkv"].at[pl.ds(0, heads)], SHARED)
            found = load(out["read"], SHARED)
            gate, total, shape = load(given["gate"], SHARED.reduce(1)), None, (heads, dim)
            if lookup.total is not None:
                total = spread(load(given["total"], SHARED.reduce(0)), SHARED, shape, 1)
            along = functools.partial(spread, layout=SHARED, shape=shape, axis=0)
            return lookup.mix(q.astype(f32), found, attended, gate, total, along)

        def parts_of_hidden(step):
            """This warpgroup's chunks of the hidden vector, every other one, of a step."""
            chunks = [2 * (step * at_once + i) + warpgroup for i in range(at_once)]
            parts = [out["hidden"].at[pl.ds(chunk * PARTS, PARTS)] for chunk in chunks]
            return [load_stored(part, SHARED) for part in parts]

        def keep(ys: list, top=None):
            """Puts chunks of a vector where all warps can get them: as they are, or as bytes, for int8.

            Bytes are numbers in fixed point, of which it returns the unit; `top` is the largest |number|,
            if that is known.
            """
            ys = [y.astype(f32) for y in ys]
            if not quantized:
                (y,) = ys
                vector.at[warpgroup][...] = y
                return jnp.float32(1)
            if top is None:
                largest = functools.reduce(jnp.maximum, [jnp.abs(y) for y in ys])
                (top,) = over_parts((jnp.max, largest))
            for i, y in enumerate(ys):
                unit, *parts = fixed_point(y, top)
                for byte, part in enumerate(parts):
                    vector.at[warpgroup, byte, pl.ds(i * PARTS, PARTS)][...] = part
            return unit

        def multiplied(rows, unit, chunk=0):
            """Sums of a tile's rows with a chunk of what is kept, apart for each thread."""
            if quantized:
                some = pl.ds(chunk * PARTS, PARTS)
                parts = (load_stored(vector.at[warpgroup, i, some], FLAT) for i in range(2))
                return fixed_product(rows, unit, *parts)
            y = lax.broadcast_in_dim(load(vector.at[warpgroup], FLAT), tile_shape, (1, 2))
            return jnp.sum(rows.astype(f32) * plgpu.layout_cast(y, TILE), axis=1)

        def slot_of(use):
            return warpgroup * stages + lax.rem(use, jnp.int32(stages))

        def release(use, wanted):
            """Makes room for another tile in the place of one that was taken."""

            @pl.when(wanted)
            def free():
                plgpu.barrier_arrive(empty.at[slot_of(use)])

        def take(use, wanted, otherwise, release_now=True):
            """This warpgroup's next tile, into registers: another may come in its place, at once or later."""

            def some():
                slot = slot_of(use)
                for part in range(2):
                    plgpu.barrier_wait(full.at[2 * slot + part])
                rows, scale = plgpu.load(slots.at[slot], layout=TILE), None
                if quantized:
                    scale = [load_stored(scales_at(slot, i), ROW_SUMS) for i in range(2)]
                if release_now:
                    plgpu.barrier_arrive(empty.at[slot])
                return Tile(rows, scale)

            return lax.cond(wanted, some, lambda: otherwise)

        def nothing():
            """What is in the place of a tile while there is none."""
            rows = jnp.zeros(tile_shape, layer.qkv.values.dtype)
            scale = plgpu.layout_cast(jnp.zeros((height // 2,), f32), ROW_SUMS)
            return Tile(plgpu.layout_cast(rows, TILE), [scale] * 2 if quantized else None)

        def of_mine(of_both: list):
            """What belongs to this warpgroup."""
            return jnp.where(warpgroup == 1, of_both[1], of_both[0])

        def product(at: int, unit, held, residual=()):
            """The product of a matrix with the vector that is kept.

            Args:
                held: this warpgroup's next tile.
                residual: what is added to its products.

            Returns:
                The next tile still, if the product has none for this warpgroup; else one that is spent.
            """
            begin, mine = of_mine(before(at)), of_mine(turns(at))

            def tile(i, carry):
                held, residual = carry
                sums = jnp.sum(multiplied(held.rows, unit), axis=1)
                finish_tile(at, 2 * i + warpgroup, sums, held.scale, residual)
                if at == GATE_UP:
                    tell_of_hidden(i + 1, mine)
                residual = residual_of(at, 2 * i + 2 + warpgroup)
                return take(begin + i + 1, i + 1 < mine, held), residual

            held, _ = lax.fori_loop(0, mine, tile, (held, residual))
            return held

        def next_after(at: int):
            """Which tile to take after a product, and whether: if there is one, and that held is spent."""
            use, end = of_mine(before(at + 1)), of_mine(before(len(matrices)))
            return use, (of_mine(turns(at)) > 0) & (use < end)

        def product_with_hidden(held):
            """The product with the hidden vector, part by part, as the parts are made.

            Each of the two warpgroups multiplies every other chunk of a tile's columns.
            """
            at, rounds = DOWN, deep // 2 // at_once
            begin, mine = of_mine(before(at)), of_mine(turns(at))

            def tile(i, held):
                residual, scale = residual_of(at, i), held.scale

                def made(step):
                    """Waits for the parts of the vector that are needed from this step on."""
                    if programs == 1:
                        return
                    chunk = 2 * ((step + 1) * at_once - 1) + warpgroup  # the last of the step
                    for part, first in enumerate((0, early)):

                        @pl.when((i == 0) & (chunk >= first) & (chunk - 2 * at_once < first))
                        def wait(part=part):
                            wait_for_signals(given["signals"].at[HIDDEN + part], 2 * programs)

                made(0)

                def some(step, carry):
                    total, hidden, held = carry
                    unit = keep(hidden)
                    after = jnp.minimum(step + 1, rounds - 1)
                    made(after)
                    hidden = parts_of_hidden(after)

                    def multiply_chunk(k, carry):
                        total, held = carry
                        total += multiplied(held.rows, unit, k)
                        done = (i * rounds + step) * at_once + k + 1
                        return total, take(begin + done, done < mine, held)

                    total, held = lax.fori_loop(0, at_once, multiply_chunk, (total, held))
                    return total, hidden, held

                zeros = jnp.zeros((height, 32 if quantized else COLUMNS), f32)
                zeros = plgpu.layout_cast(zeros, SUMS if quantized else TILE.reduce(1))
                carry = zeros, parts_of_hidden(0), held
                total, _, held = lax.fori_loop(0, rounds, some, carry)
                total = jnp.sum(total, axis=1)
                other = handed.at[lax.rem(i, jnp.int32(2))]  # not what may still be read

                @pl.when(warpgroup == 1)
                def hand_over():
                    other[...] = total

                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)

                @pl.when(warpgroup == 0)
                def finish():
                    finish_tile(at, i, total + load(other, ROW_SUMS), scale, residual)

                return held

            lax.fori_loop(0, counts[at], tile, held)

        def tell_of_hidden(done, mine):
            """Signals that this warpgroup made its rows of the early parts of the hidden vector, or all."""
            if programs == 1:
                return
            # Of all programs, of this one, of this warpgroup.
            early_tiles = early * PARTS * COLUMNS // steps[GATE_UP]
            early_tiles = pl.cdiv(early_tiles - turn[GATE_UP], jnp.int32(programs))
            early_tiles = pl.cdiv(early_tiles - warpgroup, jnp.int32(2))
            for part, number in enumerate((early_tiles, mine)):

                @pl.when(done == jnp.maximum(number, 1))
                def made(part=part):
                    signal(given["signals"].at[HIDDEN + part])

        def residual_of(at: int, tile):
            """What is added to the products of both halves of a tile."""
            if at in (QKV, GATE_UP):
                return ()
            residual = given["x"] if at == OUT else out["middle"]
            end = matrices[at].values.shape[0] - height // 2  # there may be no such tile
            places = [place(residual, jnp.minimum(row, end)) for row in rows_of(at, tile)]
            return tuple(load_stored(ref, ROW_SUMS) for ref in places)

        def finish_tile(at: int, tile, sums, scale, residual):
            """Does what follows a product."""
            rows, sums = rows_of(at, tile), [sums[: height // 2], sums[height // 2 :]]
            if quantized:
                sums = [a * b for a, b in zip(sums, scale, strict=True)]
            if at == GATE_UP:
                gate, up = sums
                inner = gate * (0.7978845608028654 + 0.035677408136300125 * (gate * gate))
                found = 0.5 * gate * up * (1.0 + jnp.tanh(inner))
                place(out["hidden"], rows[0])[...] = found.astype(dtype)
                return
            ref = {QKV: out["qkv"], OUT: out["middle"], DOWN: out["y"]}[at]
            for i, (row, found) in enumerate(zip(rows, sums, strict=True)):
                if residual:
                    found += residual[i].astype(f32)
                place(ref, row)[...] = found.astype(dtype)

        def place(ref, row):
            return ref.at[
                lax.div(row, jnp.int32(COLUMNS)), half_of(lax.rem(row, jnp.int32(COLUMNS)))
            ]

        def open_gate():
            """The token's write gate."""
            products = load(out["normed"], SHARED) * load(given["write_kernel"], SHARED)
            (logit,) = over_parts((jnp.sum, products))
            opened = write[0].opened(logit + given["write_bias"][0])
            given["write"][given["seen"][1]] = opened * given["seen"][3].astype(f32)

        def each(number: int, work: Callable, first=program):
            """Does what falls to this program of so many pieces of work."""

            @pl.loop(0, pl.cdiv(number - first, jnp.int32(programs)))
            def step(i):
                work(first + i * programs)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")

            scale = load_stored(given["pre_attention_scale"], SHARED)
            y, unit = keep_normalized(load_stored(given["x"], SHARED), scale)
            held = product(QKV, unit, take(jnp.int32(0), of_mine(turns(QKV)) > 0, nothing()))

            # The last program has the fewest tiles of [q | k | v].
            @pl.when((program == programs - 1) & (warpgroup == 0))
            def save_normed():
                out["normed"][...] = y.astype(dtype)

            ahead = meet(1, meanwhile=lambda: attention.ahead(program))

            @pl.when(program < SHARES)
            def first_share():
                attention.attend(program, ahead)

            def further_share(i):
                attention.attend(i, attention.ahead(i))

            if programs < SHARES:
                each(SHARES, further_share, first=program + programs)

            if write is not None:
                pl.when((program == programs - 1) & (warpgroup == 1))(open_gate)

            first = of_mine(before(OUT))  # of those after the first product
            ahead, held = meet(
                2, meanwhile=lambda: (attention.sink_ahead(), take(first, True, held))
            )
            each(heads * dim // PIECE, lambda i: attention.join(i, ahead))

            residual, scale = meet(
                3,
                meanwhile=lambda: (
                    residual_of(OUT, warpgroup),
                    load_stored(given["pre_mlp_scale"], SHARED),
                ),
            )
            held = product(OUT, keep([mixed()]), held, residual)
            # The next tile's place stays taken, so that nothing streams in ahead of the vector.
            use, wanted = next_after(OUT)
            held = meet(4, meanwhile=lambda: take(use, wanted, held, release_now=False))
            _, unit = keep_normalized(load_stored(out["middle"], SHARED), scale)
            release(use, wanted)
            held = product(GATE_UP, unit, held)
            if programs == 1:  # both warpgroups, as there is no signal
                meet(HIDDEN)
            product_with_hidden(take(*next_after(GATE_UP), held))
            if programs > 1:
                forget_signals(given["signals"], 2 * programs)

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
        "signals": jnp.zeros((HIDDEN + 2, APART), jnp.int32),
    }
    if lookup is not None:
        operands |= {"memory": lookup.matrix[0, 0], "gate": lookup.gate}
        operands |= {} if lookup.total is None else {"total": lookup.total[0, 0]}
    if write is not None:
        operands["write_kernel"] = write[0].kernel.reshape(-1, COLUMNS)
        operands |= {"write_bias": write[0].bias, "write": jax.new_ref(write[1])}
    leaves, tree = jax.tree.flatten(operands)
    in_place = (operands.get(name) for name in ("keys", "values", "write"))

    def layer_of_one_kernel(*refs):
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        out = dict(zip(exchanged, refs[len(leaves) :], strict=True))
        pl.run_scoped(
            lambda *scratch: kernel(given, out, *scratch),
            plgpu.SMEM((2 * stages, *tile_shape), layer.qkv.values.dtype),
            plgpu.SMEM((2 * stages, 2, LINE), f32) if quantized else None,
            plgpu.Barrier(num_arrivals=2 if quantized else 1, num_barriers=4 * stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=2 * stages),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
            plgpu.SMEM((2, 2, PARTS), f32),
            plgpu.SMEM((2, height), f32),
            plgpu.SMEM((2, 2, at_once * PARTS, COLUMNS), jnp.int8)
            if quantized
            else plgpu.SMEM((2, PARTS, COLUMNS), f32),
            SplitAttention.shared_memory(heads, dim, length // SHARES),
            collective_axes="warpgroup",
        )

    y, normed, qkv, *_ = plgpu.kernel(
        layer_of_one_kernel,
        out_type=[jax.ShapeDtypeStruct(*shape) for shape in exchanged.values()],
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*leaves)
    window = (None if ref is None else jax.freeze(ref) for ref in in_place)
    return y.reshape(-1), normed.reshape(-1), qkv.reshape(-1), *window
