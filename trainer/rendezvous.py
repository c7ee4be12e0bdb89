"""The rendezvous of processes on several nodes that torchrun started.

torchrun's agents keep one store for all attempts of a run: a restarted process may read there the addresses of dead
ones, and wait for them. So each attempt has its own store, served by its rank 0; the agents' store only has its
address."""

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
_ANSWER = datetime.timedelta(seconds=5)  # how long a live store may take to answer
_PAUSE_S = 0.2


def find_rendezvous(key: str, timeout: datetime.timedelta) -> dist.Store | None:
    """Returns the store of this attempt; None where the agents have no store to announce it. `key`: the same on all
    processes.

    Raises dist.DistError where they do not meet in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    address = _address_towards(master, port)
    # gloo would use the machine's name, which may mean another interface, or none.
    if interface := _interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    agent_store = dist.TCPStore(master, port, is_master=False, timeout=timeout)
    if os.environ["RANK"] == "0":
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        name = uuid.uuid4().hex
        store.set("name", name)
        # If it is reached over the loopback, the agents' store is on this machine, which the others know by this name.
        host = master if address.startswith("127.") else address
        agent_store.set(key, json.dumps([host, store.port, name]))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        host, port, name = json.loads(agent_store.get(key))
        with suppress(dist.DistError):  # the address of a dead attempt
            store = dist.TCPStore(host, port, is_master=False, timeout=_ANSWER)
            if store.get("name") == name.encode():
                store.set_timeout(timeout)
                return store
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"no process of rank 0 at {host}:{port} within {timeout.total_seconds():.0f} s")
        time.sleep(_PAUSE_S)


def _address_towards(host: str, port: int) -> str:
    """Returns this machine's address on the route to another."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


def _interface_of(address: str) -> str | None:
    """Returns the network interface that has an (IPv4) address, unless it is the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == address and name != "lo":
                    return name
    return None
