"""The `nccl` transport: one process per rank, joined by NCCL on GPUs and by Gloo without.

    transport   the driver's half: spawns the ranks, sends and receives their frames, ends them
    process     one rank's process: how it is spawned, watched and ended
    stream      frames over a socket: without blocking in the driver, blocking on the rank
    layout      a rank's place, and the descriptors that join it to the others
    rank        the rank's half, and what a rank's process runs
    devices     which GPU a rank gets
    hops        intermediate tensors from one pipeline stage to the next, through host memory
    gpu_hops    the same from GPU to GPU
    ways        what brings tensors there: peer_copies over a ring and cuda_driver, or nccl_pairs
    staging     memory that the driver fills and every rank can read

The driver imports no torch.
"""

from asyncexec_nccl.transport import NcclTransport

__all__ = ["NcclTransport"]
