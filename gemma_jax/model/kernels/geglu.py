"""Gate and up projection with GeGLU in one pass over the weights, for Hopper GPUs.

XLA writes the product x [gate | up] to device memory, twice as wide as the result, and reads it back
to multiply its halves. Here a tile of both halves stays in registers. Mosaic GPU (Pallas): one
warpgroup streams tiles in, two multiply.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

ROWS, COLUMNS, DEPTH = 128, 128, 64  # of a tile of the result, and of one step of the product
STAGES = 4  # tiles of operands in flight
GROUP = 4  # neighbouring tiles of the result that share operands in the cache
COMPUTE = 2  # warpgroups


def takes(rows: int, width: int, mlp_dim: int) -> bool:
    """Whether the kernel divides these shapes evenly."""
    return rows % ROWS == 0 and width % DEPTH == 0 and mlp_dim % COLUMNS == 0


@functools.partial(jax.jit, static_argnames=("programs",))
def geglu(
    x: Float[Array, "T D"], gate_up: Float[Array, "M2 D"], *, programs: int | None = None
) -> Float[Array, "T M"]:
    """gelu(x Wg) * (x Wu), with the tanh approximation of GELU; bfloat16 with float32 sums.

    Args:
        gate_up: [Wg; Wu], outputs first.
        programs: tiles computed at a time; one per multiprocessor of the device by default.
    """
    programs = programs or jax.local_devices()[0].core_count
    (rows, width), mlp_dim = x.shape, gate_up.shape[0] // 2
    tiles = (rows // ROWS, mlp_dim // COLUMNS)
    steps, half = width // DEPTH, ROWS // COMPUTE
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def kernel(x_ref, w_ref, out_ref, x_tiles, gate_tiles, up_tiles, out_tiles, full, empty):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        mine = pl.cdiv(tiles[0] * tiles[1] - program, jnp.int32(programs))

        def place(i):
            return plgpu.planar_snake(program + i * programs, tiles, 1, GROUP)

        @pl.when(warpgroup == COMPUTE)
        def load():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine * steps)
            def step(at):
                slot = lax.rem(at, jnp.int32(STAGES))

                @pl.when(at >= STAGES)
                def wait():
                    plgpu.barrier_wait(empty.at[slot])

                row, column = place(lax.div(at, jnp.int32(steps)))
                rows_at = pl.ds(row * ROWS, ROWS)
                depth_at = pl.ds(lax.rem(at, jnp.int32(steps)) * DEPTH, DEPTH)
                for ref, part, tile in (
                    (x_ref, (rows_at, depth_at), x_tiles),
                    (w_ref, (pl.ds(column * COLUMNS, COLUMNS), depth_at), gate_tiles),
                    (w_ref, (pl.ds(mlp_dim + column * COLUMNS, COLUMNS), depth_at), up_tiles),
                ):
                    plgpu.copy_gmem_to_smem(ref.at[part], tile.at[slot], full.at[slot])

        @pl.when(warpgroup < COMPUTE)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(warpgroup * half, half)

            @pl.loop(0, mine)
            def tile(i):
                def multiply(gate, up):
                    @pl.loop(0, steps)
                    def step(k):
                        at = i * steps + k
                        slot = lax.rem(at, jnp.int32(STAGES))
                        plgpu.barrier_wait(full.at[slot])
                        for total, halves in ((gate, gate_tiles), (up, up_tiles)):
                            weights = plgpu.transpose_ref(halves.at[slot], (1, 0))
                            plgpu.wgmma(total, x_tiles.at[slot, own], weights)
                        plgpu.wgmma_wait(2)  # the products of the step before are done

                        @pl.when(k > 0)
                        def release():
                            plgpu.barrier_arrive(empty.at[lax.rem(at - 1, jnp.int32(STAGES))])

                    plgpu.wgmma_wait(0)
                    last = lax.rem(i * steps + steps - 1, jnp.int32(STAGES))
                    plgpu.barrier_arrive(empty.at[last])
                    return gate[...], up[...]

                gate, up = pl.run_scoped(
                    multiply, *[plgpu.ACC((half, COLUMNS), jnp.float32) for _ in range(2)]
                )
                inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
                out = (
                    gate / (1.0 + jnp.exp(-2.0 * inner)) * up
                )  # (1 + tanh(y)) / 2 = 1 / (1 + e^-2y)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_tiles.at[warpgroup][...] = out.astype(out_ref.dtype)
                plgpu.commit_smem()
                row, column = place(i)
                target = out_ref.at[
                    pl.ds(row * ROWS + warpgroup * half, half), pl.ds(column * COLUMNS, COLUMNS)
                ]
                plgpu.copy_smem_to_gmem(out_tiles.at[warpgroup], target)

            plgpu.wait_smem_to_gmem(0)

    def body(x_ref, w_ref, out_ref):
        def tiles_of(*shape):
            return plgpu.SMEM(shape, x.dtype, transforms=layout)

        pl.run_scoped(
            lambda *scratch: kernel(x_ref, w_ref, out_ref, *scratch),
            tiles_of(STAGES, ROWS, DEPTH),
            tiles_of(STAGES, COLUMNS, DEPTH),
            tiles_of(STAGES, COLUMNS, DEPTH),
            tiles_of(COMPUTE, half, COLUMNS),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, mlp_dim), x.dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x, gate_up)
