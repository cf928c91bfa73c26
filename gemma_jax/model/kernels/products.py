"""Matrix products of many tokens, with what follows them, for Hopper GPUs.

XLA writes the product x [gate | up] to device memory, twice as wide as the result, and reads it back
to multiply its halves; it likewise copies queries out of the product that keys and values are in. Here
a tile of the product is finished in registers. Mosaic GPU (Pallas): one warpgroup streams tiles in, two
multiply.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

OUTPUTS, DEPTH = 256, 64  # of a tile of the product, and of one step of it
COLUMNS = 128  # of a tile of the result that is stored at once
STAGES = 4  # tiles of operands in flight
GROUP = 4  # neighbouring tiles of the result that share operands in the cache
WARPGROUP = 64  # tokens of a warpgroup
FEWEST_TILES = 96  # where there are fewer, XLA parts the sums among multiprocessors


def takes(rows: int, width: int, outputs: int) -> bool:
    """Whether the kernels divide these shapes evenly."""
    even = rows % (2 * WARPGROUP) == 0 and width % DEPTH == 0 and outputs % OUTPUTS == 0
    return even and rows > 0


def takes_apart(rows: int, width: int, widths: tuple[int, ...]) -> bool:
    """Whether `product_apart` divides these shapes evenly, into work for most multiprocessors."""
    tiles = (rows // (2 * WARPGROUP)) * (sum(widths) // OUTPUTS)
    even = takes(rows, width, sum(widths)) and all(wide % COLUMNS == 0 for wide in widths)
    return even and tiles >= FEWEST_TILES


@functools.partial(jax.jit, static_argnames=("programs",))
def geglu(
    x: Float[Array, "T D"], gate_up: Float[Array, "M2 D"], *, programs: int | None = None
) -> Float[Array, "T M"]:
    """gelu(x Wg) * (x Wu), with the tanh approximation of GELU; bfloat16 with float32 sums.

    Args:
        gate_up: [Wg; Wu], outputs first.
        programs: tiles computed at a time; one per multiprocessor of the device by default.
    """

    def finish(total, columns):
        gate, up = total[:, :COLUMNS], total[:, COLUMNS:]
        inner = gate * (0.7978845608028654 + 0.035677408136300125 * (gate * gate))
        # tanh is one instruction, off by less than rounding is; a division would be some ten.
        yield columns, (0.5 * gate * up) * (1.0 + jnp.tanh(inner))

    return _multiply(x, gate_up, finish, parts=2, programs=programs)


@functools.partial(jax.jit, static_argnames=("widths", "programs"))
def product_apart(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    *,
    widths: tuple[int, ...],
    programs: int | None = None,
) -> list[Float[Array, "T _"]]:
    """The columns of x W^T in arrays of these widths, one after the other; bfloat16."""

    def finish(total, columns):
        for part in range(0, OUTPUTS, COLUMNS):
            yield columns + part, total[:, part : part + COLUMNS]

    return _multiply(x, weight, finish, parts=1, widths=widths, programs=programs)


def _multiply(
    x: Float[Array, "T K"],
    weight: Float[Array, "N K"],
    finish: Callable[..., Iterator[tuple[Any, Any]]],
    parts: int,
    widths: tuple[int, ...] | None = None,
    programs: int | None = None,
) -> Any:
    """What `finish` makes of the tiles of x W^T.

    Args:
        finish: given a tile of the product in float32 and its first column of the result, yields
            first columns and tiles [_, COLUMNS] of the result.
        parts: a tile of the product has as many columns of each part of the weights, which lie below
            each other; the result is as wide as one.
        widths: the result's columns are given in arrays of these widths; in one by default.
    """
    programs = programs or jax.local_devices()[0].core_count
    (rows, width), of_part = x.shape, weight.shape[0] // parts
    tall, columns = 2 * WARPGROUP, OUTPUTS // parts
    tiles, steps = (rows // tall, of_part // columns), width // DEPTH
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    shapes = [jax.ShapeDtypeStruct((rows, wide), x.dtype) for wide in widths or (of_part,)]

    def kernel(x_ref, w_ref, out_refs, x_tiles, w_tiles, out_tiles, full, empty):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        mine = pl.cdiv(tiles[0] * tiles[1] - program, jnp.int32(programs))

        def place(i):
            """Row and column of a tile."""
            return plgpu.planar_snake(program + i * programs, tiles, 1, GROUP)

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
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine * steps)
            def step(at):
                slot = lax.rem(at, jnp.int32(STAGES))

                @pl.when(at >= STAGES)
                def wait():
                    plgpu.barrier_wait(empty.at[slot])

                row, column = place(lax.div(at, jnp.int32(steps)))
                depth_at = pl.ds(lax.rem(at, jnp.int32(steps)) * DEPTH, DEPTH)
                arrived = full.at[slot]
                some = x_ref.at[pl.ds(row * tall, tall), depth_at]
                plgpu.copy_gmem_to_smem(some, x_tiles.at[slot], arrived)
                for part in range(parts):
                    some = w_ref.at[pl.ds(part * of_part + column * columns, columns), depth_at]
                    tile = w_tiles.at[slot, pl.ds(part * columns, columns)]
                    plgpu.copy_gmem_to_smem(some, tile, arrived)

        @pl.when(warpgroup < 2)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(warpgroup * WARPGROUP, WARPGROUP)

            @pl.loop(0, mine)
            def tile(i):
                def multiply(total):
                    @pl.loop(0, steps)
                    def step(k):
                        at = i * steps + k
                        slot = lax.rem(at, jnp.int32(STAGES))
                        plgpu.barrier_wait(full.at[slot])
                        weights = plgpu.transpose_ref(w_tiles.at[slot], (1, 0))
                        plgpu.wgmma(total, x_tiles.at[slot, own], weights)
                        plgpu.wgmma_wait(1)  # the product of the step before is done

                        @pl.when(k > 0)
                        def release():
                            plgpu.barrier_arrive(empty.at[lax.rem(at - 1, jnp.int32(STAGES))])

                    plgpu.wgmma_wait(0)
                    last = lax.rem(i * steps + steps - 1, jnp.int32(STAGES))
                    plgpu.barrier_arrive(empty.at[last])
                    return total[...]

                total = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP, OUTPUTS), jnp.float32))
                row, column = place(i)
                rows_at = pl.ds(row * tall + warpgroup * WARPGROUP, WARPGROUP)
                for at, result in finish(total, column * columns):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_tiles.at[warpgroup][...] = result.astype(x.dtype)
                    plgpu.commit_smem()
                    store(out_tiles.at[warpgroup], rows_at, at)

            plgpu.wait_smem_to_gmem(0)

    def body(x_ref, w_ref, *out_refs):
        def tiles_of(*shape):
            return plgpu.SMEM(shape, x.dtype, transforms=layout)

        pl.run_scoped(
            lambda *scratch: kernel(x_ref, w_ref, out_refs, *scratch),
            tiles_of(STAGES, tall, DEPTH),
            tiles_of(STAGES, OUTPUTS, DEPTH),
            tiles_of(2, WARPGROUP, COLUMNS),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            collective_axes="warpgroup",
        )

    out = plgpu.kernel(
        body,
        out_type=shapes,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, weight)
    return out if widths else out[0]
