"""One forward and backward pass on tensors without values, and how many bytes are alive at every moment of it.

Nothing is computed and nothing allocated: torch's fake tensors tell shapes and types of every result, and a dispatch
mode follows their storages from the first tensor on them to the last. What a kernel allocates and frees internally is
not seen, nor is what an allocator rounds up or cannot use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_CAST = torch.ops.aten._to_copy.default
OUTSIDE = -1  # in place of a block's number: what is in no block
REPRESENTATIVES = 3  # of blocks that are alike: the first, the last, and one for all between them


@dataclass(frozen=True)
class Segment:
    """A stretch of the pass: a block's forward or backward, or what is between blocks. Bytes of this process."""

    block: int
    backward: bool
    peak: int
    """Most that is alive at once, of what the pass has made: no parameters, no parameters' gradients that are done."""
    peak_with_gradients: int
    """The same, with the gradients of parameters that were finished in this segment."""
    gradients: int
    """Bytes of those gradients at its end."""
    end: int
    """Bytes that are alive at its end, without gradients."""
    flops: int = 0
    collective_bytes: int = 0
    """Bytes that go into the collectives of layers that several processes share."""
    weight_output_bytes: int = 0
    """Bytes of outputs computed from weights: as many as the output gradients that weight gradients need."""
    has_casts: bool = True
    """Whether the live bytes include copies that autocast keeps until the forward pass is over."""

    def shifted(self, size: int, block: int) -> Segment:
        return replace(
            self,
            block=block,
            peak=self.peak + size,
            peak_with_gradients=self.peak_with_gradients + size,
            end=self.end + size,
        )


@dataclass(frozen=True)
class Trace:
    segments: tuple[Segment, ...]

    @property
    def retained(self) -> int:
        """Returns the bytes that are alive between forward and backward."""
        return [segment.end for segment in self.segments if not segment.backward][-1]

    def segments_of(self, backward: bool) -> list[Segment]:
        return [segment for segment in self.segments if segment.backward == backward]

    @property
    def flops(self) -> int:
        return sum(segment.flops for segment in self.segments)

    @property
    def collective_bytes(self) -> int:
        return sum(segment.collective_bytes for segment in self.segments)

    @property
    def weight_output_bytes(self) -> int:
        return sum(segment.weight_output_bytes for segment in self.segments_of(backward=False))


class LiveBytes(TorchDispatchMode):
    """Counts the live bytes of all tensors that are made while it is entered."""

    def __init__(self, uncounted: Sequence[Tensor] = (), weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._weights = {_number(weight) for weight in weights}  # and copies in another data type
        self._storages: dict[int, tuple[Any, int]] = {}
        self._gradients: set[int] = set()
        self.alive = self.gradients_done = self.flops = self.collective_bytes = self.weight_output_bytes = 0
        self.peak = self.peak_with_gradients = 0
        for tensor in uncounted:
            self._follow(tensor, is_counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on the local shard are dispatched next
        result = func(*args, **(kwargs or {}))
        takes_weight = any(isinstance(arg, Tensor) and _number(arg) in self._weights for arg in args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, from_weight=takes_weight and func is not _CAST)
                if takes_weight and func is _CAST:
                    self._weights.add(_number(leaf))
        if func.namespace == "_c10d_functional" and isinstance(result, Tensor) and "wait" not in func.__name__:
            self.collective_bytes += max(result.nbytes, args[0].nbytes)
        self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def restart(self) -> None:
        """Resets the peaks."""
        self.gradients_done, self.flops, self.collective_bytes, self.weight_output_bytes = 0, 0, 0, 0
        self.peak = self.peak_with_gradients = self.alive

    def mark_gradient(self, tensor: Tensor) -> None:
        """Marks the finished gradient of a parameter, which is counted apart from now on."""
        number = _number(tensor)
        if number in self._storages and number not in self._gradients:
            self._gradients.add(number)
            size = self._storages[number][1]
            self.alive -= size
            self.gradients_done += size

    def _follow(self, tensor: Tensor, is_counted: bool = True, from_weight: bool = False) -> None:
        storage = _local(tensor).untyped_storage()
        number = id(storage)
        if number in self._storages:
            return
        size = storage.nbytes() if is_counted else 0
        self.weight_output_bytes += size if from_weight else 0
        self._storages[number] = weakref.ref(storage, lambda _: self._forget(number)), size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive + self.gradients_done)

    def _forget(self, number: int) -> None:
        _, size = self._storages.pop(number)
        self._weights.discard(number)
        if number in self._gradients:
            self._gradients.discard(number)
        else:
            self.alive -= size


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _number(tensor: Tensor) -> int:
    """Returns the number of the tensor's storage, which is unique while the storage lives."""
    return id(_local(tensor).untyped_storage())


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if (count_flops := flop_registry.get(func.overloadpacket)) is not None:
        return int(count_flops(*args, **kwargs, out_val=result))
    name = func.overloadpacket.__name__  # attention on a CPU, which torch's counter does not know
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _attention(*args[:3])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(2.5 * _attention(*args[1:4]))
    return 0


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Counts the FLOPs of attention. Query heads may share a key head, which torch 2.11 does not count."""
    heads = query.shape[:2]
    return sdpa_flop_count(query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))


def trace(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    forward: Callable[[], Tensor],
    finish: Callable[[Tensor], Tensor],
    autocast: AbstractContextManager[object],
    inputs: Sequence[Tensor] = (),
    gradient: Tensor | None = None,
) -> Trace:
    """Traces `forward` under `autocast`, then `finish` (the loss, or the outputs unchanged), then the backward pass
    from `gradient` (None: with 1).

    Parameters of `module`, `inputs` and `gradient` are not counted. Needs a FakeTensorMode.
    """
    uncounted = [*module.parameters(), *module.buffers(), *inputs, *([] if gradient is None else [gradient])]
    live = LiveBytes(uncounted, module.parameters())
    segments: list[Segment] = []
    current_block, is_backward, casts_now = OUTSIDE, False, True

    def mark(block: int, backward: bool, has_casts: bool, only_after: int | None = None) -> None:
        nonlocal current_block, is_backward, casts_now
        if only_after not in (None, current_block):
            return  # the next segment has begun
        peaks = live.peak, live.peak_with_gradients, live.gradients_done, live.alive
        work = live.flops, live.collective_bytes, live.weight_output_bytes
        segments.append(Segment(current_block, is_backward, *peaks, *work, casts_now))
        live.restart()
        current_block, is_backward, casts_now = block, backward, has_casts

    with _mark_blocks(module, blocks, live, mark), live:
        with autocast:
            outputs = forward()
        mark(OUTSIDE, False, False)
        loss = finish(outputs)
        del outputs
        mark(OUTSIDE, True, False)
        loss.backward(gradient)
        del loss
        mark(OUTSIDE, True, False)
    for parameter in module.parameters():
        parameter.grad = None
    return Trace(tuple(segments))


@contextmanager
def _mark_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], live: LiveBytes, mark: Callable[..., None]
) -> Iterator[None]:
    """Marks finished gradients in `live`, and calls `mark` where a block begins or ends."""
    hooks = []
    for number, block in enumerate(blocks):

        def begin(_module: Any, args: Any, kwargs: Any, number: int = number) -> None:
            mark(number, False, True)
            if inputs := _differentiable((args, kwargs)):
                inputs[0].register_hook(lambda _: mark(OUTSIDE, True, False, only_after=number))

        def end(_module: Any, _args: Any, result: Any, number: int = number) -> None:
            mark(OUTSIDE, False, True)
            if outputs := _differentiable(result):
                outputs[0].register_hook(lambda _: mark(number, True, False))

        hooks.append(block.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(block.register_forward_hook(end))
    for parameter in module.parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda p: live.mark_gradient(p.grad))  # type: ignore[arg-type]
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _differentiable(values: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(values)
        if isinstance(leaf, Tensor) and leaf.requires_grad and not isinstance(leaf, nn.Parameter)
    ]


def repeat_trace(trace: Trace, count: int) -> Trace:
    """Extends a trace of REPRESENTATIVES equal blocks to `count` blocks: the middle one stands for all that are neither
    first nor last, each of which keeps as many bytes for the backward pass."""
    added = count - REPRESENTATIVES
    if added <= 0:
        return trace
    middle = [segment for segment in trace.segments if segment.block == 1]
    last = [segment for segment in trace.segments if segment.block == 2]
    # What a block adds in the forward pass, with autocast's copies of its weights, and how much of that is kept.
    forward = last[0].end - middle[0].end
    retained = last[1].end - middle[1].end
    segments: list[Segment] = []
    for segment in trace.segments:
        per_block = forward if segment.has_casts else retained
        if segment.block == 1:
            run = [segment.shifted(per_block * index, 1 + index) for index in range(added + 1)]
            segments += reversed(run) if segment.backward else run
        elif segment.block == 2:
            segments.append(segment.shifted(per_block * added, count - 1))
        else:
            segments.append(segment)  # shifted below, if it comes after the added blocks
    return Trace(tuple(_shift_outside(trace, segments, forward * added, retained * added)))


def _shift_outside(trace: Trace, segments: list[Segment], forward: int, retained: int) -> list[Segment]:
    """Shifts segments between the last block's forward and backward, where the bytes of all added blocks are alive."""
    last_block = max(segment.block for segment in segments)
    start = max(i for i, segment in enumerate(segments) if segment.block == last_block and not segment.backward)
    end = min(
        (i for i, segment in enumerate(segments) if segment.block == last_block and segment.backward),
        default=len(segments),
    )
    return [
        segment.shifted(forward if segment.has_casts else retained, segment.block)
        if start < i < end and segment.block == OUTSIDE
        else segment
        for i, segment in enumerate(segments)
    ]
