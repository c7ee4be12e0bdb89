"""A rank of the examination that torchrun, srun or another launcher started: it meets the others by the launcher's
environment variables.

Each rank leaves its report in the common store, so that rank 0 can also say which ones are missing, or where all hang.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

from launch.doctor.examination import Examination, NodeReport, Options, examine_node, give_up_after, print_report
from launch.doctor.machine import node_name
from launch.doctor.verdict import Finding
from trainer.errors import ConfigError

EARLIER_S = 2.0  # before the limit, so that the report is still printed


def rank(options: Options) -> int:
    """Examines one rank; rank 0 prints the table. Returns exit code 4 on rank 0 if something is bad."""
    examination = Examination()
    from trainer import topology

    this_rank, size = int(os.environ.get("RANK", "0")), topology.world_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    answer = examine_node(options, local_size, size, local_size == size, this_rank == 0) if local_rank == 0 else {}
    store = _store(this_rank, size, local_size, options.limit_s)

    def report_stage(*stage: Any) -> None:
        if store is not None:
            store.set(f"stage-{this_rank}", json.dumps(stage))

    def end(common: list[Finding] | None, failure: str = "") -> int:
        if this_rank:
            return 1 if failure else 0
        examination.common_findings = common
        examination.reports = [NodeReport(node_name(), answer, failure=failure)]
        for number in range(1, size):
            if report := _read_report(store, number):
                examination.reports.append(report)
            else:
                absent = f"rank {number} did not come within {options.limit_s:.0f} s"
                examination.absences.append(Finding("group", "bad", absent, "see its output: it may not have started"))
        return print_report(examination.report(), options)

    if store is not None:
        store.set(f"told-{this_rank}", json.dumps({"node": node_name(), "told": answer}))
    timer = give_up_after(options.limit_s, lambda: end(None, f"no end within {options.limit_s:.0f} s"))
    try:
        from launch.doctor import group

        ranks = topology.join(max(1, int(options.limit_s - EARLIER_S)), store=store)
        common = group.examine(ranks, options.folder, options.quick, report_stage)
        timer.cancel()
        code = end(common)
        ranks.close()
    except Exception as error:  # a peer is gone, or the network is
        timer.cancel()
        code = end(None, f"{type(error).__name__}: {error}".partition("\n")[0][:300])
        sys.stdout.flush()
        os._exit(code)
    return code


def _store(this_rank: int, size: int, local_size: int, limit_s: float) -> Any:
    """Returns the store at which all ranks meet; None if there is only one rank. Raises ConfigError."""
    import torch.distributed as dist

    from trainer import topology

    limit = timedelta(seconds=limit_s)
    store = topology.store_of(size, local_size, limit)
    if store is not None or size == 1:
        return store
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(f"{' and '.join(missing)} must be set: where {size} processes meet")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        address, port, is_master=this_rank == 0 and not agent_store, wait_for_workers=False, timeout=limit
    )
    return dist.PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _read_report(store: Any, number: int) -> NodeReport | None:
    """Returns the report that rank `number` left in the store; None if it never came."""
    if not store.check([f"told-{number}"]):
        return None
    values = json.loads(store.get(f"told-{number}"))
    report = NodeReport(str(values["node"]), values["told"])
    if store.check([f"stage-{number}"]):
        order, text, awaited = json.loads(store.get(f"stage-{number}"))
        report.stage = (int(order), str(text), list(awaited))
    return report
