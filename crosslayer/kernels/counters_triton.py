"""What a kernel does with its counters (see `counters`)."""

import triton
import triton.language as tl


@triton.jit
def arrives_last(arrived, programs):
    """Whether the other of so many programs have been here before; then their counter is zero again.

    What each of them stored before it came here, the last one may load, past its own processor's cache (".cg"), as
    other processors have stored it.
    """
    tl.debug_barrier()  # what all threads have stored is there before one of them says so
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived, 0)
    return last
