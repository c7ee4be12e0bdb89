"""Checkpoints as earlier versions of the format wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from trainer.checkpoint.format import INDEX, folder_name, write_file, write_manifest

WHOLE = {"model/a": torch.arange(12.0).view(3, 4), "model/b": torch.tensor(7)}


def of_version_2(folder: Path) -> Path:
    """Step 3 of `WHOLE`, by two ranks. The index tells of each piece where it lies."""
    folder = folder / folder_name(3)
    folder.mkdir()
    cuts = {
        "rank-00000.safetensors": {"model/a@0,0": WHOLE["model/a"][:2].clone()},
        "rank-00001.safetensors": {"model/a@2,0": WHOLE["model/a"][2:].clone(), "model/b": WHOLE["model/b"]},
    }
    files = {name: write_file(folder / name, [safetensors.torch.save(its)]) for name, its in cuts.items()}
    starts = {name: 8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in cuts}
    tensors = {
        "model/a": ["F32", [3, 4], [[0, starts["rank-00000.safetensors"], [0, 0], [2, 4]], [1, 0, [2, 0], [1, 4]]]],
        "model/b": ["I64", [], [[1, 0, [], []]]],
    }
    text = json.dumps({"files": list(files), "tensors": tensors})
    files[INDEX] = write_file(folder / INDEX, [text.encode()])
    write_manifest(folder, {"version": 2, "step": 3, "files": files})
    return folder
