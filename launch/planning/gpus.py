"""The GPUs that a plan is made for."""

from __future__ import annotations

from trainer.errors import ConfigError
from trainer.hardware import GPUS, Gpu

NODE = 8  # GPUs of a node
NETWORK = 50.0  # GB/s of each GPU to other nodes: one 400 Gb/s card a GPU


def target(name: str | None, gib: float | None) -> Gpu:
    """Returns the GPU of that name, with `gib` of memory instead of its own if set; h100 by default."""
    gpu = GPUS.get((name or "h100").lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name}: not known; there are {', '.join(GPUS)}; or give its memory: --memory GiB")
    if gib is None:
        return gpu
    label = f"{gpu.name} with {gib:g} GiB" if name else f"{gib:g} GiB"
    return Gpu(label, gib, gpu.tflops, gpu.link, gpu.bf16)
