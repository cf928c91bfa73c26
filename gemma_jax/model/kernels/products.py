"""Matrix products of many tokens, with what follows them, for Hopper GPUs.

XLA writes the product x [gate | up] to device memory, twice as wide as the result, and reads it back
to multiply its halves; it likewise copies queries out of the product that keys and values are in. Here
a tile of the product is finished in registers, while the next one is multiplied.

Mosaic GPU (Pallas): one warpgroup streams tiles in, two multiply. What limits a GPU at this is power.
So two neighbouring multiprocessors share tiles of the weights, of which each reads half, and the rows
of x that are multiplied at a time are so few that they stay in the cache while all weights pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

OUTPUTS, DEPTH = 256, 64  # of a tile of the product, and of one step of it
WARPGROUP, ROWS = 64, 128  # tokens of a warpgroup, and of a tile
PAIR = 2  # multiprocessors, one below the other, that share tiles of weights
STAGES = 4  # steps whose operands are in flight
GROUP = 16  # pairs of tiles, one below the other, that all weights pass before the next rows
COLUMNS = 64  # of the result that are stored at once
UNROLLED = 4  # steps
FEWEST_TILES = 96  # where there are fewer, XLA parts the sums among multiprocessors


def takes(rows: int, width: int, outputs: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    return rows > 0 and rows % (PAIR * ROWS) == width % DEPTH == outputs % OUTPUTS == 0


def takes_apart(rows: int, width: int, widths: tuple[int, ...]) -> bool:
    """Whether `product_apart` divides these shapes evenly, into work for most multiprocessors."""
    tiles = (rows // ROWS) * (sum(widths) // OUTPUTS)
    even = takes(rows, width, sum(widths)) and all(wide % COLUMNS == 0 for wide in widths)
    return even and tiles >= FEWEST_TILES


@functools.partial(jax.jit, static_argnames=("programs",))
def geglu(
    x: Float[Array, "T D"], gate_up: Float[Array, "M2 D"], *, programs: int | None = None
) -> Float[Array, "T M"]:
    """gelu(x Wg) * (x Wu), with the tanh approximation of GELU; bfloat16 with float32 sums.

    The products are rounded to bfloat16 before they are multiplied with each other, as XLA's are.

    Args:
        gate_up: [Wg; Wu], outputs first.
        programs: tiles computed at a time, an even number; one per multiprocessor of the device by default.
    """

    piece = 16  # columns: few, so that their arithmetic does not hold up the product beside it

    def finish(product, at):
        gate, up = (
            product[:, first + at : first + at + piece].astype(jnp.float32)
            for first in (0, OUTPUTS // 2)
        )
        inner = gate * (0.7978845608028654 + 0.035677408136300125 * (gate * gate))
        # tanh is one instruction, off by less than rounding is; a division would be some ten.
        return (0.5 * gate * up) * (1.0 + jnp.tanh(inner))

    return _multiply(x, gate_up, finish, piece, parts=2, programs=programs)


@functools.partial(jax.jit, static_argnames=("widths", "programs"))
def product_apart(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    *,
    widths: tuple[int, ...],
    programs: int | None = None,
) -> list[Float[Array, "T _"]]:
    """The columns of x W^T in arrays of these widths, one after the other; bfloat16."""

    def finish(product, at):
        return product[:, at : at + COLUMNS]

    return _multiply(x, weight, finish, COLUMNS, widths=widths, programs=programs)


def _multiply(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    finish: Callable[[Any, int], Any],
    piece: int,
    *,
    parts: int = 1,
    widths: tuple[int, ...] | None = None,
    programs: int | None = None,
) -> Any:
    """What `finish` makes of the tiles of x W^T.

    Args:
        finish: given a tile of the product, in x's dtype, and a column of the tile of the result that
            is made of it: `piece` columns of that from there on.
        piece: divides COLUMNS.
        parts: a tile of the product has as many columns of each part of the weights, which lie below
            each other; the result is as wide as one.
        widths: the result's columns are given in arrays of these widths; in one by default.
        programs: an even number; one per multiprocessor of the device by default.
    """
    pairs = (programs or jax.local_devices()[0].core_count) // PAIR
    (rows, width), of_part = x.shape, weight.shape[0] // parts
    columns = OUTPUTS // parts
    tiles, steps = (rows // (PAIR * ROWS), of_part // columns), width // DEPTH
    pieces = list(range(0, columns, piece))
    at_a_step = pl.cdiv(len(pieces), steps)
    finishing = pl.cdiv(len(pieces), at_a_step)  # steps at which the tile before is finished
    unrolled = math.gcd(steps - finishing, UNROLLED)
    shapes = [jax.ShapeDtypeStruct((rows, wide), x.dtype) for wide in widths or (of_part,)]

    def kernel(x_ref, w_ref, out_refs, x_tiles, w_tiles, out_tiles, full, empty):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        mine = pl.cdiv(tiles[0] * tiles[1] - program, jnp.int32(pairs))

        def place(i):
            """Row and column of a tile."""
            row, column = plgpu.planar_snake(program + i * pairs, tiles, 0, GROUP)
            return row * PAIR + lax.axis_index("pair"), column

        def slot_of(at):
            return lax.rem(at, jnp.int32(STAGES))

        def store(tile, rows_at, at):
            first = 0
            for out_ref in out_refs:
                here = (at >= first) & (at < first + out_ref.shape[1])

                @pl.when(here if len(out_refs) > 1 else True)
                def copy(out_ref=out_ref, first=first):
                    target = out_ref.at[rows_at, pl.ds(at - first, COLUMNS)]
                    plgpu.copy_smem_to_gmem(tile, target)

                first += out_ref.shape[1]

        @pl.when(warpgroup == 2)
        def load_tiles():
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, mine * steps)
            def step(at):
                slot = slot_of(at)

                @pl.when(at >= STAGES)
                def wait():
                    plgpu.barrier_wait(empty.at[slot])

                row, column = place(lax.div(at, jnp.int32(steps)))
                depth_at = pl.ds(lax.rem(at, jnp.int32(steps)) * DEPTH, DEPTH)
                arrived = full.at[slot]
                some = x_ref.at[pl.ds(row * ROWS, ROWS), depth_at]
                plgpu.copy_gmem_to_smem(some, x_tiles.at[slot], arrived)
                for part in range(parts):
                    some = w_ref.at[pl.ds(part * of_part + column * columns, columns), depth_at]
                    tile = w_tiles.at[slot, pl.ds(part * columns, columns)]
                    plgpu.copy_gmem_to_smem(some, tile, arrived, collective_axes="pair")

            # The other one's last arrivals are here before this multiprocessor leaves.
            @pl.loop(lax.max(mine * steps, jnp.int32(STAGES)), mine * steps + STAGES)
            def stay(at):
                plgpu.barrier_wait(empty.at[slot_of(at)])

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            own = pl.ds(warpgroup * WARPGROUP, WARPGROUP)

            def finish_piece(i, product, at):
                """Of tile i; COLUMNS are stored when they are there."""
                if at % COLUMNS == 0:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                target = out_tiles.at[warpgroup, :, pl.ds(at % COLUMNS, piece)]
                target[...] = finish(product, at).astype(x.dtype)
                if (at + piece) % COLUMNS == 0:
                    plgpu.commit_smem()
                    row, column = place(i)
                    rows_at = pl.ds(row * ROWS + warpgroup * WARPGROUP, WARPGROUP)

                    @pl.when((i >= 0) & (i < mine))
                    def copy():
                        first = column * columns + at + piece - COLUMNS
                        store(out_tiles.at[warpgroup], rows_at, first)

            def tile(i, before):
                def multiply(total):
                    def step(k, finished=()):
                        at = i * steps + k
                        slot = slot_of(at)
                        plgpu.barrier_wait(full.at[slot])
                        weights = plgpu.transpose_ref(w_tiles.at[slot], (1, 0))
                        plgpu.wgmma(total, x_tiles.at[slot, own], weights)
                        for column in finished:
                            finish_piece(i - 1, before, column)
                        plgpu.wgmma_wait(1)  # the product of the step before is done

                        @pl.when(k > 0)
                        def release():
                            plgpu.barrier_arrive(empty.at[slot_of(at - 1)])

                    for k in range(finishing):
                        step(jnp.int32(k), pieces[k * at_a_step : (k + 1) * at_a_step])

                    @pl.loop(0, (steps - finishing) // unrolled)
                    def some_steps(n):
                        for k in range(unrolled):
                            step(finishing + n * unrolled + k)

                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[slot_of(i * steps + steps - 1)])
                    return total[...].astype(x.dtype)

                return pl.run_scoped(multiply, plgpu.ACC((WARPGROUP, OUTPUTS), jnp.float32))

            nothing = jnp.zeros((WARPGROUP, OUTPUTS), x.dtype)
            product = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
            product = lax.fori_loop(0, mine, tile, product)
            for column in pieces:
                finish_piece(mine - 1, product, column)
            plgpu.wait_smem_to_gmem(0)

    def body(x_ref, w_ref, *out_refs):
        def tiles_of(*shape, wide):
            layout = (plgpu.TilingTransform((8, wide)), plgpu.SwizzleTransform(2 * wide))
            return plgpu.SMEM(shape, x.dtype, transforms=layout)

        pl.run_scoped(
            lambda *scratch: kernel(x_ref, w_ref, out_refs, *scratch),
            tiles_of(STAGES, ROWS, DEPTH, wide=DEPTH),
            tiles_of(STAGES, OUTPUTS, DEPTH, wide=DEPTH),
            tiles_of(2, WARPGROUP, COLUMNS, wide=piece),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=STAGES),
            plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=STAGES),
            collective_axes="warpgroup",
        )

    out = plgpu.kernel(
        body,
        out_type=shapes,
        grid=(pairs,),
        grid_names=("program",),
        cluster=(PAIR,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight)
    return out if widths else out[0]
