"""Where the processes of several nodes meet, when torchrun starts them.

torchrun's agents keep one store for all attempts of a run: a process that starts anew may read there the addresses of
dead ones, and wait for them. So each attempt has a store of its own, served by its rank 0; the agents' only says where.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import struct
import time
import uuid
from contextlib import suppress

import torch.distributed as dist

_SIOCGIFADDR = 0x8915
_ANSWER = datetime.timedelta(seconds=5)  # of a store that lives
_PAUSE_S = 0.2


def find_rendezvous(key: str, timeout: datetime.timedelta) -> dist.Store | None:
    """The store of this attempt; None where the agents have no store to tell of it. `key`: the same on all processes.

    Raises dist.DistError where they do not meet in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    here = _address_towards(master, port)
    if interface := _interface_of(here):  # gloo would go by the machine's name, which may mean another one, or none
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    agents = dist.TCPStore(master, port, is_master=False, timeout=timeout)
    if os.environ["RANK"] == "0":
        own = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        name = uuid.uuid4().hex
        own.set("name", name)
        # Reached over the loopback, the agents' store is on this machine: the others know that by its name.
        host = master if here.startswith("127.") else here
        agents.set(key, json.dumps([host, own.port, name]))
        return own
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port, name = json.loads(agents.get(key))
        with suppress(dist.DistError):  # a dead attempt's
            own = dist.TCPStore(host, port, is_master=False, timeout=_ANSWER)
            if own.get("name") == name.encode():
                own.set_timeout(timeout)
                return own
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"no process of rank 0 at {host}:{port} within {timeout.total_seconds():.0f} s")
        time.sleep(_PAUSE_S)


def _address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to another."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


def _interface_of(address: str) -> str | None:
    """The network interface that has an (IPv4) address, other than the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address and name != "lo":
                    return name
    return None
