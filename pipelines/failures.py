"""Whose failure an error is: the machine's, after which a stage is started again, or the run's own. Imports no torch.

CUDA, NCCL, gloo and torch's store all raise RuntimeError: what failed stands in the words alone. They are those of the
libraries (cudaGetErrorString, ncclGetErrorString, strerror, torch's c10d), whatever stands before and after them.
"""

import re

from pipelines.config import UserError
from pipelines.stopping import Stopped

# NCCL's own word for a peer or a network that is lost. It comes before all others: what follows it, as the "Invalid
# argument" of a network card's library, is how it noticed.
_LOST = re.compile(r"ncclRemoteError|ncclSystemError|unhandled system error", re.IGNORECASE)
# Another start ends the same way. These come next: NCCL wraps them in its "unhandled cuda error".
_OWN = re.compile(
    r"out of memory|illegal memory access|illegal instruction|device-side assert triggered|misaligned address"
    r"|invalid (argument|device|configuration|resource handle)|no kernel image|driver version is insufficient",
    re.IGNORECASE,
)
_PEER = "another process, or the network"
_MACHINE = {
    "a GPU": r"uncorrectable ECC error|uncorrectable NVLink error|unspecified launch failure|launch timed out"
    r"|hardware stack error|peer GPU memory over nvlink|CUDA error: unknown error|CUDA unknown error|GPU is lost"
    r"|device\(s\) is/are busy or unavailable|no CUDA-capable device is detected|system not yet initialized"
    r"|unhandled cuda error|NVML_ERROR_GPU_IS_LOST|CUBLAS_STATUS_EXECUTION_FAILED",
    _PEER: r"connection (was )?(closed|reset|refused|timed out)"
    r"|broken pipe|closed by (remote )?peer|pair closure|remote process exit|failed to recv, got 0 bytes"
    r"|timed out waiting|timed out after \d+ seconds waiting|socket has timed out|(socket|wait|connect) timeout"
    r"|connectFullMesh failed|communicator was aborted|socket (recv|send|connect|accept) failed"
    r"|watchdog caught collective|operations have failed or timed out"
    r"|no route to host|network is (unreachable|down)|software caused connection abort",
    "a file system": r"stale (NFS )?file handle|input/output error|remote I/O error|transport endpoint",
}
# What no library raises for what it meets: our own mistake, whatever was lost while it was handled.
_MISTAKES = (AssertionError, AttributeError, LookupError, NameError, TypeError, ZeroDivisionError)
_KNOWN = {what: re.compile(words, re.IGNORECASE) for what, words in _MACHINE.items()}


def of_the_machine(error: BaseException | None) -> str:
    """What of the machine has failed, "a GPU" say, where an error or what it came from tells so; empty for any other.

    Such a failure decides nothing: whoever started the ranks finds no verdict, checks the nodes and starts them again,
    a limited number of times. Memory that does not suffice, kernels that read where they must not, whatever began with
    a mistake in the code, and whatever is not known here are the run's own. A broken pipe of Python's is a reader of
    our output that has gone; of torch's, a peer.
    """
    chain = []
    while error is not None:
        if isinstance(error, UserError | Stopped):
            return ""
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if not chain or isinstance(chain[-1], _MISTAKES):
        return ""
    told = [str(e) for e in chain if isinstance(e, OSError | RuntimeError) and not isinstance(e, BrokenPipeError)]
    if any(_LOST.search(text) for text in told):
        return _PEER
    if any(_OWN.search(text) for text in told):
        return ""
    return next((what for text in told for what, words in _KNOWN.items() if words.search(text)), "")
