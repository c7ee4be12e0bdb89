"""GPUs by their vendors' data sheets: memory as torch reports it, bf16 arithmetic, links. And what a device reports of
itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    name: str
    gib: float
    tflops: float
    """Dense bf16 (fp16 where there is none), 10^12 operations a second, at the most."""
    link: float
    """Bandwidth to the other GPUs of its node, GB/s in one direction."""
    bf16: bool = True

    @property
    def usable(self) -> float:
        """Returns the bytes for tensors: the rest is for CUDA's context, NCCL's buffers and fragmentation."""
        return 0.9 * self.gib * 2**30


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 79.1, 989, 450), Gpu("h200", 139.8, 989, 450), Gpu("b200", 178.4, 2250, 900),
        Gpu("a100-80", 79.2, 312, 300), Gpu("a100-40", 39.4, 312, 300), Gpu("mi300x", 191.7, 1307, 448),
        Gpu("l40s", 44.4, 362, 32), Gpu("a10g", 22.0, 70, 16), Gpu("l4", 22.0, 121, 16), Gpu("4090", 23.5, 165, 32),
        Gpu("3090", 23.5, 71, 32), Gpu("v100-32", 31.7, 125, 150, False), Gpu("v100-16", 15.8, 125, 150, False),
        Gpu("t4", 14.6, 65, 16, False),
    )
}  # fmt: skip
# The names that drivers report. A PCIe card of the same family is slower, so none of these matches one.
_NAMES = {
    r"H100 80GB HBM3": "h100", r"\bH200$": "h200", r"\bB200\b": "b200", r"A100.*80GB": "a100-80",
    r"A100.*40GB": "a100-40", r"MI300X": "mi300x", r"\bL40S\b": "l40s", r"\bA10G\b": "a10g", r"\bL4$": "l4",
    r"RTX 4090$": "4090", r"RTX 3090$": "3090", r"V100.*32GB": "v100-32", r"V100.*16GB": "v100-16", r"\bT4$": "t4",
}  # fmt: skip


def find_gpu(name: str) -> Gpu | None:
    """Returns the data sheet of the GPU that a driver calls by this name."""
    return next((GPUS[key] for pattern, key in _NAMES.items() if re.search(pattern, name)), None)


def peak_flops(device: torch.device) -> float | None:
    """Returns the peak of a device in dense bf16 operations a second; None for a CPU or an unknown device."""
    if device.type != "cuda":
        return None
    import torch

    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.tflops * 1e12 if gpu else None


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most that tensors took of a device since the last call; None for a CPU."""
    if device.type != "cuda":
        return None
    import torch

    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
