"""How arrays lie in the registers of a warpgroup, and get there, for `layer`; and a product of bytes.

Mosaic GPU (Pallas).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import vector as vector_dialect
from jaxtyping import Array

COLUMNS = 256  # that the threads of a warp hold side by side
PARTS = 8  # of so many columns, of a tile
PIECE = 16  # columns of what was found that a program joins at once


def tiled(*tiles: tuple[int, ...], warps: int, lanes: int | tuple[int, ...]) -> Any:
    """A layout of registers: which dimensions of the tiling warps and their threads share out."""
    lanes = lanes if isinstance(lanes, tuple) else (lanes,)
    warp_dims = (warps if warps < 0 else plgpu.Replicated(warps),)
    tiling = plgpu.Tiling(tiles)
    return plgpu.Layout.TILED(tiling, warp_dims=warp_dims, lane_dims=lanes, vector_dim=-1)


# [rows, parts, columns]: rows among warps, columns among threads.
TILE = tiled((4, PARTS, COLUMNS), (COLUMNS // 32,), warps=-4, lanes=-2)
SUMS = tiled((4, 32), (1,), warps=-3, lanes=-2)  # [rows, threads]
ROW_SUMS = SUMS.reduce(1)  # [rows], the same in each thread of a warp
# [parts, columns], a vector: the same in each warp, or parts among warps.
FLAT = TILE.reduce(0)
SHARED = tiled((4, COLUMNS), (COLUMNS // 32,), warps=-3, lanes=-2)
# [keys, columns]: keys among warps, columns among threads.
HALVES = tiled((4, COLUMNS // 2), (COLUMNS // 64,), warps=-3, lanes=-2)
HALF = HALVES.reduce(0)
# [shares, columns]: shares among threads, columns among warps.
PIECES = tiled((32, PIECE), (PIECE // 4,), warps=-2, lanes=-3)


def columns_among_threads(rows: int, width: int) -> Any:
    """The layout of [rows, width] where a thread has all rows of neighbouring columns."""
    return tiled((rows, width), (width // 4,), (width // 128,), warps=-3, lanes=-2)


def fixed_point(y: Array, top: Array) -> tuple[Array, Array, Array]:
    """A vector [N] in float32, the largest of which is `top`, as numbers of two bytes.

    Each is off by half a unit at most, 1/65,534 of the largest, so the vector by sqrt(N) / 65,534 of its
    norm: 7e-4 for 2,048 numbers, 1e-3 for 4,096, where rounding to bfloat16 is off by up to 2e-3. Products
    with a vector that is not finite are not finite.

    Returns:
        Their unit, the high bytes, which have the sign, and the low ones.
    """
    unit = jnp.where(top == 0.0, 1.0, top) * (1.0 / 32767)
    numbers = (y * (1.0 / unit) + 32768.5).astype(jnp.int32) - 32768  # rounded
    return unit, (numbers >> 8).astype(jnp.int8), numbers.astype(jnp.int8)


def fixed_product(rows: Array, unit: Array, high: Array, low: Array) -> Array:
    """Sums [rows, threads] of int8 rows with such a vector, apart for each thread."""
    high, low = integer_product(rows, high, low)
    return (256 * high + low).astype(jnp.float32) * unit


def integer_product(rows: Array, high: Array, low: Array) -> list[Array]:
    """Sums [rows, threads] of products with two vectors of bytes: exact in int32.

    The bytes of `low` have no sign, whatever their type says.
    """
    shape = len(rows), 32
    sums = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=SUMS)

    @plgpu.inline_mgpu(arg_types=(TILE, FLAT, FLAT), return_type=[sums] * 2)
    def multiply(_, rows, high, low):
        i32 = ir.IntegerType.get_signless(32)

        def fours(registers):
            for register in registers.flat:
                words = vector_dialect.bitcast(ir.VectorType.get((2,), i32), register)
                yield from (vector_dialect.extract(words, [], [i]) for i in range(2))

        def dot(row, vector, kind):
            total = mgpu.c(0, i32)
            for a, b in zip(fours(row), fours(vector.registers), strict=True):
                asm = f"dp4a.s32.{kind} $0, $1, $2, $3;", "=r,r,r,r"
                total = llvm.inline_asm(i32, [a, b, total], *asm)
            return vector_dialect.broadcast(ir.VectorType.get((1,), i32), total)

        layout, found = SUMS.to_mgpu(), []
        for vector, kind in ((high, "s32"), (low, "u32")):
            registers = np.empty(layout.registers_shape(shape), dtype=object)
            for i in range(len(registers)):
                registers[i] = np.full(registers[i].shape, dot(rows.registers[i], vector, kind))
            found.append(
                mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)
            )
        return found

    return multiply(rows, high, low)


def load_stored(ref: Any, layout: Any) -> Array:
    """What is in the GPU's memory or in shared memory: as it is stored, so that nothing waits for it yet."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load(ref: Any, layout: Any) -> Array:
    """The same in float32."""
    return load_stored(ref, layout).astype(jnp.float32)


def spread(x: Array, layout: Any, shape: tuple[int, ...], axis: int) -> Array:
    """A vector repeated along the other axes; it is `axis` of the result."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (axis,)), layout)
