"""A process of the examination that `onecurve doctor` started, here or by srun, and speaks with in lines of JSON.

It tells of its node, waits until it is told whom to meet, then does the common checks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

from launch.doctor.examination import Options, give_up_after, local
from launch.doctor.machine import node_name


def run_worker(options: Options, ranks: int, processes: int, alone: bool, number: int) -> int:
    """`number`: of this process among all that were started; on one node only the first examines it."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not for who reads our lines

    def say(**values: Any) -> None:
        print(json.dumps({"node": node_name(), **values}), file=lines)

    say(alive=True)
    say(told=local(options, ranks, processes, alone, number == 0) if number == 0 or not alone else {})
    while line := sys.stdin.readline():
        order = json.loads(line)
        if order.get("lead"):
            say(meet=_lead(options.limit_s))
            continue
        give_up_after(2 * options.limit_s)
        try:
            say(common=_common(options, order, lambda *stage: say(stage=stage)))
        except Exception as error:  # a peer is gone, or the network is: who started us judges
            say(failure=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
            lines.flush()
            os._exit(1)
        return 0
    return 1  # who started us is gone


_STORES: list[Any] = []  # of the first one: lives as long as the process


def _lead(limit_s: float) -> dict[str, Any]:
    """Opens the store at which all meet; where it can be reached."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit_s))
    _STORES.append(store)
    addresses = []
    with suppress(OSError):
        addresses.append(socket.gethostbyname(node_name()))
    with suppress(OSError, subprocess.TimeoutExpired):
        addresses += subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5).stdout.split()
    return {"port": store.port, "addresses": [*dict.fromkeys(a for a in addresses if a[:4] != "127."), "127.0.0.1"]}


def _common(options: Options, order: dict[str, Any], tell: Any) -> list[dict[str, Any]]:
    """The common checks, with those and in the way that the `order` says."""
    from launch.doctor import group
    from trainer import topology

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(order[name.lower()])
    store = None
    if "store" in order:
        os.environ["ONECURVE_STORE"] = order["store"]
    else:
        store = _STORES[0] if _STORES else _reached(order["meet"], options.limit_s)
    here = topology.join(int(options.limit_s), store=store)
    findings = group.examine(here, options.folder, options.quick, tell)
    here.close()
    return [vars(finding) for finding in findings]


def _reached(meet: dict[str, Any], limit_s: float) -> Any:
    import torch.distributed as dist

    for address in meet["addresses"]:
        try:
            socket.create_connection((address, meet["port"]), timeout=3).close()
        except OSError:
            continue
        return dist.TCPStore(
            address, meet["port"], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit_s)
        )
    raise ConnectionError(f"none of {', '.join(meet['addresses'])} can be reached at port {meet['port']}")
