"""What a failure most likely comes from, and what to do: recognized by the words of its message."""

from __future__ import annotations

import re

_ADVICE = (
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full: free some space (`onecurve checkpoint prune`), or keep fewer checkpoints (checkpoint.keep), "
        "and run the same command again",
    ),
    (
        r"Read-only file system",
        "the folder cannot be written any more: mount it again, or copy the run and set run.dir",
    ),
    (r"Stale file handle|Transport endpoint", "the shared folder went away: look after its server, and run again"),
    (
        r"No module named '?([\w.]+)'?",
        "install the package of '{0}' in the Python that runs this, on every node; or take it out of run.plugins",
    ),
    (r"cannot import name|undefined symbol|DLL load", "a package does not fit the others here: `onecurve doctor`"),
    (
        r"[Tt]imed out|[Tt]imeout",
        "a process did not come to what all do together within launch.timeout_s: it hangs, is much slower, or the "
        "network between them is gone; logs/hang-* tell where each was, `onecurve doctor` measures the network",
    ),
    (
        r"Expected to have finished reduction in the prior iteration",
        "a parameter of the model had no gradient on some process: strategy.find_unused_parameters=true, or freeze "
        "what is never used (requires_grad=False); TORCH_DISTRIBUTED_DEBUG=DETAIL names it",
    ),
    (r"Address already in use", "another program has the port: start again, or choose another --master-port"),
    (r"ncclSystemError|NCCL.*(socket|network|IB)", "launch.interface and launch.nccl_debug=INFO: NCCL finds no way"),
    (r"NCCL", "look for the first NCCL warning in logs/, with launch.nccl_debug=INFO or NCCL_DEBUG=INFO"),
    (
        r"device-side assert|index out of range in self|index .* is out of bounds for dimension",
        "an index beyond a table, such as a token beyond the vocabulary: data.tokenizer must be the shards' own",
    ),
    (r"CUDA driver|no CUDA|CUDA unknown error|uncorrectable ECC", "the GPU or its driver is ill: `onecurve doctor`"),
    (r"Bus error|/dev/shm|shared memory", "shared memory is full: more of it (docker --shm-size), or data.workers=0"),
    (r"Too many open files", "raise the limit of open files: `ulimit -n 65536`"),
    (r"CUDA error|cuBLAS|cuDNN", "again with CUDA_LAUNCH_BLOCKING=1 the trace names the call that failed"),
)
_SIGNALS = {
    9: "by the kernel for want of memory (`dmesg | grep -i oom`: then fewer data.workers or a smaller "
    "train.micro_batch), or by somebody",
    11: "by a fault in compiled code; `python -X faulthandler` tells where",
    7: "for want of shared memory: more of /dev/shm, or data.workers=0",
    6: "by an assertion in compiled code; what it said stands above, or in logs/",
}


def advice_for(text: str) -> str | None:
    """Returns what to do about a failure with this text; None where nothing is known."""
    for pattern, advice in _ADVICE:
        if match := re.search(pattern, text):
            return advice.format(*match.groups())
    return None


def signal_cause(number: int) -> str:
    """Returns who or what may have killed a process with this signal."""
    return _SIGNALS.get(number, "by somebody")
