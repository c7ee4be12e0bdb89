"""The GPUs that a plan is made for."""

from __future__ import annotations

from trainer.errors import ConfigError
from trainer.hardware import GPUS, Gpu

NODE = 8  # GPUs of a node
NETWORK = 50.0  # GB/s of each GPU to other nodes: one 400 Gb/s card a GPU


def target(name: str | None, gib: float | None) -> Gpu:
    """The GPU of that name; with so much memory instead of its own; h100 if neither is given."""
    chosen = GPUS.get((name or "h100").lower())
    if chosen is None:
        raise ConfigError(f"--gpu {name}: not known; there are {', '.join(GPUS)}; or give its memory: --memory GiB")
    if gib is None:
        return chosen
    label = f"{chosen.name} with {gib:g} GiB" if name else f"{gib:g} GiB"
    return Gpu(label, gib, chosen.tflops, chosen.link, chosen.bf16)
