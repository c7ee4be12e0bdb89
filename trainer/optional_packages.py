"""Packages that only some options need: whether they really work on this machine, or why they do not."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import nn

_NVIDIA = "NVIDIA's is built from github.com/NVIDIA/apex"
NOT_THERE = "NVIDIA Apex is not installed"
NAMESAKE = "the package `apex` that is installed is not NVIDIA's"


@cache
def without_apex(part: Literal["FusedAdam", "FusedLayerNorm"]) -> str:
    """Returns why this part of NVIDIA Apex cannot be used here; empty if it can.

    It is tried out: on machines without its CUDA extensions its classes can be imported, and fail when instantiated.
    The `apex` of PyPI is another project, and is not imported.
    """
    spec = find_spec("apex")
    if spec is None:
        return f"{NOT_THERE} ({_NVIDIA}; the package `apex` of PyPI is another project)"
    folders = spec.submodule_search_locations or []
    if not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        return f"{NAMESAKE} but another project of PyPI; {_NVIDIA}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if part == "FusedAdam":
            parameter = nn.Parameter(torch.zeros(1, device=device))
            optimizer = importlib.import_module("apex.optimizers").FusedAdam([parameter], adam_w_mode=True)
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        else:
            norm = importlib.import_module("apex.normalization").FusedLayerNorm(8)
            norm = norm.to_empty(device=device)  # also while models are made without values
            norm(torch.zeros(1, 8, device=device))
    except Exception as error:  # whatever a build that does not fit this machine raises
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        return f"NVIDIA Apex is installed, but its {part} does not work here: {problem}"
    return ""


@cache
def without_torchao() -> str:
    """Returns why torchao cannot be used here; empty if it can."""
    # On import it warns of each library of CUDA kernels that does not fit this machine; what is used here needs none.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        importlib.import_module("torchao")
    except Exception as error:
        problem = "is not installed" if find_spec("torchao") is None else f"cannot be imported ({error})"
        return f"torchao {problem}: pip install 'onecurve[torchao]'"
    return ""
