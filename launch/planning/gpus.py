"""What there is to train on: memory as torch reports it, bf16 arithmetic, links; from vendors' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    name: str
    gib: float
    tflops: float
    """Dense bf16 (fp16 where there is none), 10^12 operations a second, at the most."""
    link: float
    """To the others of its node, GB/s in one direction."""
    bf16: bool = True

    @property
    def usable(self) -> float:
        """Bytes for tensors: the rest is for CUDA's context, NCCL's buffers, and holes that the allocator leaves."""
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
