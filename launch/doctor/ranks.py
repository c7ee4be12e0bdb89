"""A process of the examination that torchrun, srun or the like started: it finds the others by what the launcher set.

Each leaves in the common store what it tells, so that rank 0 can also say who is missing, or where all hang.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

from launch.doctor.examination import Examination, NodeReport, Options, give_up_after, local, tell_all
from launch.doctor.machine import node_name
from launch.doctor.verdict import Finding
from trainer.errors import ConfigError

EARLIER_S = 2.0  # before the limit, so that what is known is still told


def rank(options: Options) -> int:
    """Exit code 4 on rank 0 if something is bad; there also the table."""
    examination = Examination()
    from trainer import topology

    mine, size = int(os.environ.get("RANK", "0")), topology.world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    told = local(options, local_size, size, local_size == size, mine == 0) if local_rank == 0 else {}
    store = _store(mine, size, local_size, options.limit_s)

    def tell(*stage: Any) -> None:
        if store is not None:
            store.set(f"stage-{mine}", json.dumps(stage))

    def end(common: list[Finding] | None, failure: str = "") -> int:
        if mine:
            return 1 if failure else 0
        examination.common = common
        examination.heard = [NodeReport(node_name(), told, failure=failure)]
        for number in range(1, size):
            if heard := _of_rank(store, number):
                examination.heard.append(heard)
            else:
                absent = f"rank {number} did not come within {options.limit_s:.0f} s"
                examination.absent.append(Finding("group", "bad", absent, "see its output: it may not have started"))
        return tell_all(examination.report(), options)

    if store is not None:
        store.set(f"told-{mine}", json.dumps({"node": node_name(), "told": told}))
    timer = give_up_after(options.limit_s, lambda: end(None, f"no end within {options.limit_s:.0f} s"))
    try:
        from launch.doctor import group

        here = topology.join(max(1, int(options.limit_s - EARLIER_S)), store=store)
        common = group.examine(here, options.folder, options.quick, tell)
        timer.cancel()
        code = end(common)
        here.close()
    except Exception as error:  # a peer is gone, or the network is
        timer.cancel()
        code = end(None, f"{type(error).__name__}: {error}".partition("\n")[0][:300])
        sys.stdout.flush()
        os._exit(code)
    return code


def _store(mine: int, size: int, local_size: int, limit_s: float) -> Any:
    """Where all ranks meet; None for one alone. Raises ConfigError."""
    import torch.distributed as dist

    from trainer import topology

    limit = timedelta(seconds=limit_s)
    store = topology.store_of(size, local_size, limit)
    if store is not None or size == 1:
        return store
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(f"{' and '.join(missing)} must be set: where {size} processes meet")
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=mine == 0 and not of_torchrun, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _of_rank(store: Any, number: int) -> NodeReport | None:
    """What rank `number` left in the store; None if it never came."""
    if not store.check([f"told-{number}"]):
        return None
    values = json.loads(store.get(f"told-{number}"))
    heard = NodeReport(str(values["node"]), values["told"])
    if store.check([f"stage-{number}"]):
        order, text, awaited = json.loads(store.get(f"stage-{number}"))
        heard.stage = (int(order), str(text), list(awaited))
    return heard
