"""Measures seconds of forward passes by the device's own clock; nothing waits for it before they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardTimer:
    def __init__(self, device: torch.device):
        self._device, self._seconds = device, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._device.type != "cuda":
            started_at = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started_at
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def read(self) -> float:
        """Returns the seconds since the last call. Waits for the device, so call it when its steps are done anyway."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
