"""The product of one vector with a large int8 matrix: the logits of a token, for Hopper GPUs.

It is to be as fast as the matrix is read. What XLA makes of it turns every byte into float32 before it
multiplies, which takes longer; here four bytes are multiplied at once, with a vector in fixed point. A
warpgroup streams tiles of rows into shared memory, two multiply every other of them. Mosaic GPU
(Pallas).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gemma_jax.model.kernels.registers import (
    COLUMNS,
    FLAT,
    PARTS,
    ROW_SUMS,
    TILE,
    fixed_point,
    fixed_product,
    load,
    load_stored,
)

ROWS = 16  # of a tile, shared out to the four warps
STAGES = 6  # tiles in shared memory, an even number
LEAST = 32_768  # rows for which it pays


def takes(rows: int, columns: int) -> bool:
    """Whether the kernel divides a matrix of this shape evenly, and is faster with it."""
    return rows >= LEAST and rows % ROWS == 0 and columns == PARTS * COLUMNS


@functools.partial(jax.jit, static_argnames=("programs",))
def product_of_one(
    x: Float[Array, " K"],
    values: Int[Array, "N K"],
    scale: Float[Array, " N"],
    *,
    programs: int | None = None,
) -> Float[Array, " N"]:
    """(values * scale[:, None]) x in float32, with x in fixed point: see `registers.fixed_point`."""
    programs = programs or jax.local_devices()[0].core_count
    number = len(values) // ROWS

    def kernel(x, values, scale, out, slots, full, empty):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        count = pl.cdiv(number - program, jnp.int32(programs))

        def rows_of(i):
            return pl.ds((program + i * programs) * ROWS, ROWS)

        @pl.when(warpgroup == 2)
        def stream():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def tile(i):
                slot = lax.rem(i, jnp.int32(STAGES))

                @pl.when(i >= STAGES)
                def wait():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(values.at[rows_of(i)], slots.at[slot], full.at[slot])

        @pl.when(warpgroup < 2)
        def multiply():
            plgpu.set_max_registers(232, action="increase")
            y = load(x, FLAT)
            vector = fixed_point(y, jnp.max(jnp.max(jnp.abs(y), axis=0)))

            def scales_of(i):
                rows = rows_of(jnp.minimum(i, count - 1))
                return load_stored(scale.at[rows], ROW_SUMS)

            def tile(j, scales):
                i = 2 * j + warpgroup
                after = scales_of(i + 2)  # there when they are needed
                slot = lax.rem(i, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                rows = plgpu.load(slots.at[slot], layout=TILE)
                plgpu.barrier_arrive(empty.at[slot])
                sums = jnp.sum(fixed_product(rows, *vector), axis=1)
                out.at[rows_of(i)][...] = sums * scales
                return after

            lax.fori_loop(
                0, lax.div(count + 1 - warpgroup, jnp.int32(2)), tile, scales_of(warpgroup)
            )

    def product_of_one_kernel(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            plgpu.SMEM((STAGES, ROWS, PARTS, COLUMNS), jnp.int8),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        product_of_one_kernel,
        out_type=jax.ShapeDtypeStruct((len(values),), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x.reshape(PARTS, COLUMNS), values.reshape(-1, PARTS, COLUMNS), scale)
