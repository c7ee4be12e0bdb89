"""Examines what else is installed: W&B, Apex, and the packages that single options need."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress

from launch.doctor.machine import installed_version
from launch.doctor.verdict import Finding

OPTIONAL = {"deepspeed": "strategy=zero", "torchao": "precision=fp8", "transformers": "model=llama", "obstore": "s3://"}
REACH_S = 2.0


def examine(quick: bool) -> Iterator[Finding]:
    yield apex()
    present = [f"{name} {version}" for name in OPTIONAL if (version := installed_version(name))]
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if not installed_version(name)]
    message = ", ".join(present) or "none"
    yield Finding("packages", "good", message + (f"; not installed: {', '.join(missing)}" if missing else ""))
    yield wandb(quick)


def apex() -> Finding:
    """Checks whether the installed Apex is NVIDIA's, PyPI's namesake, or absent."""
    from trainer.optional_packages import NAMESAKE, NOT_THERE, without_apex

    reasons = {part: without_apex(part) for part in ("FusedAdam", "FusedLayerNorm")}
    works = [part for part, reason in reasons.items() if not reason]
    if works:
        return Finding("Apex", "good", f"NVIDIA Apex works here: {', '.join(works)}")
    reason = reasons["FusedAdam"]
    if reason.startswith(NAMESAKE):
        return Finding("Apex", "warning", reason, "pip uninstall apex; torch's own fused AdamW needs nothing else")
    if reason.startswith(NOT_THERE):
        return Finding("Apex", "good", "not installed, and not needed: torch has its own fused AdamW")
    return Finding("Apex", "warning", reason, "optimizer.implementation=fused is torch's own, as fast")


def wandb(quick: bool) -> Finding:
    """Checks the mode that a run would use by default, and whether the server answers. No key is shown."""
    from trainer.tracking.wandb import WandB, has_credentials

    version, mode = installed_version("wandb"), WandB().requested_mode
    if version is None:
        return Finding("W&B", "warning", "wandb is not installed: runs are not tracked there", "pip install wandb")
    if mode in ("disabled", "offline"):
        return Finding("W&B", "good", f"wandb {version}, {mode} by WANDB_MODE")
    if quick:
        return Finding("W&B", "good", f"wandb {version}, mode {mode}")
    import wandb as library

    if not has_credentials(library):
        advice = "`wandb login` for online; `wandb sync RUN_DIR/wandb/offline-run-*` uploads later"
        return Finding("W&B", "warning" if mode == "online" else "good", f"wandb {version}, no key: offline", advice)
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host, problem = _reach(url)
    if problem:
        advice = "track.wandb.mode=offline and `wandb sync` later, or set WANDB_BASE_URL or HTTPS_PROXY"
        return Finding("W&B", "warning", f"wandb {version}, a key is there, but {host} {problem}", advice)
    return Finding("W&B", "good", f"wandb {version}, online: a key is there, {host} answers")


def _reach(url: str) -> tuple[str, str]:
    """Returns the host of `url`, and why it cannot be reached within REACH_S; empty if it can."""
    parts = urllib.parse.urlsplit(url)
    host, answered = parts.hostname or url, threading.Event()
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")):
        return host, ""  # the proxy connects

    def ask() -> None:
        connection_class = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        with suppress(OSError, http.client.HTTPException):
            connection = connection_class(host, parts.port, timeout=REACH_S)
            connection.request("HEAD", "/")
            connection.getresponse()
            answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name lookup has no timeout
    thread.start()
    thread.join(REACH_S)
    return host, "" if answered.is_set() else f"did not answer within {REACH_S:.0f} s"
