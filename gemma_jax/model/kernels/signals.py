"""How the programs of a kernel wait for each other, for `layer`: by counts in the GPU's memory.

The counts are an operand of the kernel, all 0 when it starts. The last program to leave puts them back
to 0: one array serves all kernels that run one after the other, and XLA makes it once for them. (Of
Pallas' semaphores each kernel has its own, which another kernel must make before it.) Mosaic GPU
(Pallas).
"""

from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

APART = 32  # int32 numbers from one count to the next: a line of the cache each


def signal(count: Any) -> None:
    """Adds one to a count, after all that this warpgroup has written."""

    def add(pointer: ir.Value) -> None:
        mgpu.warpgroup_barrier()
        mgpu.SemaphoreRef(pointer).signal(1, memory_scope="gpu")

    _inline(add, count)


def wait_for_signals(count: Any, number: int) -> None:
    """Waits until a count is at least `number`: what was written before its signals is seen then."""

    def wait(pointer: ir.Value) -> None:
        mgpu.SemaphoreRef(pointer).wait(number, decrement=False, memory_scope="gpu")

    _inline(wait, count)


def forget_signals(counts: Any, number: int) -> None:
    """Puts all counts [N, APART] back to 0, if this is the last of `number` warpgroups to say so.

    None of them may wait for a count again. The first of the counts is used for this.
    """

    def forget(pointer: ir.Value) -> None:
        last = number - 1
        zero = (
            f"@last st.relaxed.gpu.global.u32 [$0+{4 * APART * i}], 0;"
            for i in range(1, counts.shape[0])
        )
        asm = (
            "{.reg .u32 before; .reg .pred last;",
            f"atom.acq_rel.gpu.global.inc.u32 before, [$0], {last};",  # the last makes it 0
            f"setp.eq.u32 last, before, {last};",
            *zero,
            "}",
        )
        mgpu.warpgroup_barrier()
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            mgpu.inline_ptx("".join(asm), pointer, has_side_effects=True)

    _inline(forget, counts)


def _inline(work: Callable[[ir.Value], None], ref: Any) -> None:
    """Puts `work`, given where `ref` begins, into the kernel."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def inlined(_: Any, ref: Any) -> None:
        work(mgpu.memref_ptr(ref))

    inlined(ref)
