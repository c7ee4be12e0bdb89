"""Model FLOPs utilization and peak memory: counted, and joined over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing

from trainer import hardware
from trainer.config.compose import load
from trainer.data.batch_sizes import Batches
from trainer.data.tokenizer import ByteTokenizer
from trainer.models import ModelFactory
from trainer.models.factory import model_factory
from trainer.topology import ALONE
from trainer.utilization import Meter, sequence_flops

LENGTH, WIDTH, LAYERS = 64, 32, 2
SMALL = {
    "gpt": [f"model.layers={LAYERS}", f"model.width={WIDTH}", "model.heads=2"],
    "llama": ["model.config.num_hidden_layers=1", "model.config.hidden_size=64", "model.config.intermediate_size=96",
              "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2"],
}  # fmt: skip


def factory(model: str) -> ModelFactory:
    config = load(["experiment=none", f"model={model}", f"data.sequence_length={LENGTH}", *SMALL[model]])

    def example() -> dict[str, torch.Tensor]:
        row = torch.zeros(1, LENGTH, dtype=torch.int64)
        return {"inputs": row, "targets": row, "draws": torch.zeros(1, dtype=torch.int64)}

    return model_factory(config, ByteTokenizer(), example)


def test_flops_of_a_transformer_are_six_a_parameter_and_token_and_its_attention() -> None:
    made = factory("gpt")
    matrices = sum(p.numel() for name, p in made.build().named_parameters() if p.ndim == 2 and "position" not in name)
    attention = 12 * LAYERS * LENGTH * WIDTH * LENGTH  # of queries with keys, and with values, thrice
    assert sequence_flops(made) == 6 * matrices * LENGTH + attention


def test_flops_of_a_model_of_transformers() -> None:
    made = factory("llama")
    matrices = sum(p.numel() for name, p in made.build().named_parameters() if p.ndim == 2 and "embed" not in name)
    assert sequence_flops(made) == 6 * matrices * LENGTH + 12 * LENGTH * 64 * LENGTH


def test_a_model_that_cannot_be_traced_has_no_mfu() -> None:
    class Odd(torch.nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.zeros(int(batch["inputs"].sum()))

    assert sequence_flops(replace(factory("gpt"), build=Odd)) is None


def test_mfu_is_of_the_batch_of_its_step_and_of_all_devices() -> None:
    made, ramped = factory("gpt"), Batches(8, {10: 4})
    with patch.object(hardware, "peak_flops", return_value=1e9):
        meter = Meter(replace(ALONE, world_size=4), ramped, made)
    flops = sequence_flops(made)
    assert flops is not None
    assert meter.mfu(10, 0.5)["mfu"] == pytest.approx(4 * flops / 0.5 / 4e9, abs=1e-4)
    assert meter.mfu(11, 0.5)["mfu"] == pytest.approx(8 * flops / 0.5 / 4e9, abs=1e-4)


def test_a_cpu_tells_neither() -> None:
    meter = Meter(ALONE, Batches(8), factory("gpt"))
    assert (meter.mfu(1, 1.0), meter.memory()) == ({}, {})


def _fullest(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    topology = replace(ALONE, rank=rank, world_size=2)
    meter = Meter(topology, Batches(8), factory("gpt"))
    for peaks in ((1, 3), (2, 1)):  # of ranks 0 and 1
        with patch.object(hardware, "peak_bytes", return_value=peaks[rank] * 2**30):
            assert meter.memory() == {"mem_gib": float(max(peaks))}
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_memory_is_that_of_the_fullest_device(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_fullest, (str(tmp_path / "store"),), nprocs=2)


def test_devices_are_known_by_their_drivers_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA A100-PCIE-40GB": "a100-40", "Tesla V100-SXM2-16GB": "v100-16", "Tesla T4": "t4", "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "4090", "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    assert {name: gpu and gpu.name for name in names if (gpu := hardware.find_gpu(name))} == names
    assert hardware.find_gpu("NVIDIA H100 PCIe") is None
    assert hardware.find_gpu("NVIDIA L40") is None
