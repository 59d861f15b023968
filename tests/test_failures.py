"""Errors in the words of those who raise them, as public reports have them."""

import pytest

from pipelines import launch
from pipelines.config import UserError
from pipelines.failures import of_the_machine

HINTS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1.\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2501, "
GPU, PEER, FILES = "a GPU", "another process, or the network", "a file system"


@pytest.mark.parametrize(
    ("message", "failed"),
    [
        # huggingface/accelerate issue 1192, opendatalab/MinerU 426, pytorch/pytorch 10853
        ("CUDA error: uncorrectable ECC error encountered" + HINTS, GPU),
        ("CUDA error: unspecified launch failure" + HINTS, GPU),
        ("CUDA error: the launch timed out and was terminated" + HINTS, GPU),
        ("CUDA error: uncorrectable NVLink error detected during the execution" + HINTS, GPU),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable" + HINTS, GPU),
        ("CUDA error: unknown error" + HINTS, GPU),
        (NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
         "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'unknown error'", GPU),
        # pytorch/pytorch 149984, NVIDIA/nccl 975 and 834
        ("Collective WorkNCCL(SeqNum=2, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1000000) raised the "
         "following async exception: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
         "version 2.25.1\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
         "error. \nLast error:\n", PEER),
        (NCCL + "remote process exited or there was a network error, NCCL version 2.27.3\nncclRemoteError: A call "
         "failed possibly due to a network error or a remote process exiting prematurely.", PEER),
        # NVIDIA/Megatron-LM 935, huggingface/open-r1 620
        ("[PG 1 Rank 6] Process group watchdog thread terminated with exception: [Rank 6] Watchdog caught collective "
         "operation timeout: WorkNCCL(SeqNum=199, OpType=_REDUCE_SCATTER_BASE, NumelIn=7098994688, "
         "NumelOut=443687168, Timeout(ms)=600000) ran for 882722 milliseconds before timing out.", PEER),
        # pytorch/pytorch 75512 and 153586, RVC-Project/Retrieval-based-Voice-Conversion-WebUI 1882
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer [18.25.6.30]:28048", PEER),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:589] Read error [192.168.70.92]:25266: Connection reset by "
         "peer", PEER),
        ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation", PEER),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", PEER),
        ("[Errno 116] Stale file handle: '/lustre/run/distil/metrics.jsonl'", FILES),
        ("[Errno 5] Input/output error", FILES),
        # torch's rendezvous and gloo's, where a node comes late or not at all; NCCL's aborts
        ("The client socket has timed out after 600000ms while trying to connect to (node1, 29500).", PEER),
        ("Timed out after 301 seconds waiting for clients. 1/2 clients joined.", PEER),
        ("[../gloo/transport/tcp/pair.cc:144] Connect timeout [10.0.0.2]:4242", PEER),
        ("Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error", PEER),
        ("NCCL communicator was aborted on rank 3.", PEER),
        (NCCL + "internal error - please report this issue to the NCCL developers, NCCL version 2.21.5\n"
         "ncclInternalError: Internal check failed.\nLast error:\nSocket recv failed while polling for opId", PEER),
        (NCCL + "unhandled system error, NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or "
         "external library call failed or device error.\nLast error:\nCall to ibv_modify_qp failed with error "
         "Invalid argument errno 22", PEER),
        (NCCL + "remote process exited or there was a network error\nncclRemoteError: A call failed.\nLast error:\n"
         "invalid argument", PEER),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`", GPU),
        # the run's own
        ("CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 79.10 GiB of which 512.00 MiB "
         "is free.", ""),
        ("CUDA error: out of memory" + HINTS, ""),
        (NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\n"
         "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 10485760 bytes: "
         "out of memory", ""),
        ("CUDA error: device-side assert triggered" + HINTS, ""),
        ("CUDA error: an illegal memory access was encountered" + HINTS, ""),
        ("CUDA error: no kernel image is available for execution on the device" + HINTS, ""),
        ("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1", ""),
    ],
)  # fmt: skip
def test_what_failed_is_told_by_the_words(message: str, failed: str) -> None:
    assert of_the_machine(RuntimeError(message)) == failed
    assert of_the_machine(OSError(message)) == failed
    assert of_the_machine(ValueError(message)) == "", "no library raises that"
    try:
        raise ValueError("while saving") from RuntimeError(message)
    except ValueError as error:
        assert of_the_machine(error) == failed
        told = launch.describe_failure(error)
        assert told["code"] == 1 and ("the same command continues" in told["message"]) == bool(failed)
    try:
        raise UserError("expected another thing") from RuntimeError(message)
    except UserError as error:
        assert of_the_machine(error) == ""


@pytest.mark.parametrize("mistake", [KeyError, AssertionError, TypeError, IndexError, AttributeError])
def test_a_mistake_of_ours_stays_ours_whatever_is_lost_while_it_is_handled(mistake: type[Exception]) -> None:
    lost = "[../gloo/transport/tcp/pair.cc:598] Connection closed by peer [18.25.6.30]:28048"
    try:
        try:
            raise mistake("layer")
        except mistake:
            raise RuntimeError(lost)  # noqa: B904 as it happens
    except RuntimeError as error:
        assert of_the_machine(error) == ""
    try:
        try:
            raise mistake("not cached")
        except mistake:
            raise RuntimeError(lost) from None
    except RuntimeError as error:
        assert of_the_machine(error) == PEER, "who writes `from None` says that it has nothing to do with it"


def test_a_reader_that_has_gone_is_no_network() -> None:
    assert of_the_machine(BrokenPipeError(32, "Broken pipe")) == ""
    assert of_the_machine(RuntimeError("sendBytes failed on SocketImpl(fd=61): Broken pipe")) == PEER
