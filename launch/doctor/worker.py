"""A worker of the examination: `onecurve doctor` starts it, here or by srun, and exchanges lines of JSON with it.

It reports on its node, waits for the address at which all meet, then does the common checks.
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

from launch.doctor.examination import Options, examine_node, give_up_after
from launch.doctor.machine import node_name


def run_worker(options: Options, ranks: int, processes: int, alone: bool, number: int) -> int:
    """Runs one worker. `number`: its index among all workers; on one node only the first one examines the node."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the starter reads our lines, not what libraries print

    def send(**values: Any) -> None:
        print(json.dumps({"node": node_name(), **values}), file=output)

    send(alive=True)
    send(told=examine_node(options, ranks, processes, alone, number == 0) if number == 0 or not alone else {})
    while line := sys.stdin.readline():
        order = json.loads(line)
        if order.get("lead"):
            send(meet=_open_store(options.limit_s))
            continue
        give_up_after(2 * options.limit_s)
        try:
            send(common=_examine_group(options, order, lambda *stage: send(stage=stage)))
        except Exception as error:  # a peer is gone, or the network is: the starter judges
            send(failure=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
            output.flush()
            os._exit(1)
        return 0
    return 1  # the starter is gone


_STORES: list[Any] = []  # of the first worker: lives as long as the process


def _open_store(limit_s: float) -> dict[str, Any]:
    """Opens the store at which all meet. Returns its port and addresses."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit_s))
    _STORES.append(store)
    addresses = []
    with suppress(OSError):
        addresses.append(socket.gethostbyname(node_name()))
    with suppress(OSError, subprocess.TimeoutExpired):
        addresses += subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5).stdout.split()
    return {"port": store.port, "addresses": [*dict.fromkeys(a for a in addresses if a[:4] != "127."), "127.0.0.1"]}


def _examine_group(options: Options, order: dict[str, Any], report_stage: Any) -> list[dict[str, Any]]:
    """Does the common checks with the ranks that the `order` names."""
    from launch.doctor import group
    from trainer import topology

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(order[name.lower()])
    store = None
    if "store" in order:
        os.environ["ONECURVE_STORE"] = order["store"]
    else:
        store = _STORES[0] if _STORES else _connect(order["meet"], options.limit_s)
    ranks = topology.join(int(options.limit_s), store=store)
    findings = group.examine(ranks, options.folder, options.quick, report_stage)
    ranks.close()
    return [vars(finding) for finding in findings]


def _connect(meet: dict[str, Any], limit_s: float) -> Any:
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
