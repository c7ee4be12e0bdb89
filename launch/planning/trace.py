"""One forward and backward pass on tensors without values, and how many bytes are alive at every moment of it.

Nothing is computed and nothing allocated: torch's fake tensors tell shapes and types of every result, and a dispatch
mode follows their storages from the first tensor on them to the last. What a kernel takes and gives back inside of
itself is not seen, nor is what an allocator rounds up or cannot use.
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
OUTSIDE = -1  # in place of a block's number: what is in none
REPRESENTATIVES = 3  # of blocks that are alike: the first, the last, and one for all between them


@dataclass(frozen=True)
class Segment:
    """A stretch of the pass: a block's forward or backward, or what is between blocks. Bytes of this process."""

    block: int
    backward: bool
    peak: int
    """Most that is alive at once, of what the pass has made: no parameters, no parameters' gradients that are done."""
    peak_with_gradients: int
    """Likewise, with the gradients of parameters that were done in this segment."""
    gradients: int
    """Bytes of those, at its end."""
    end: int
    """Alive at its end, without gradients."""
    flops: int = 0
    sent: int = 0
    """Bytes that go into collectives: those of layers which several processes share."""
    weighted: int = 0
    """Bytes that weights had a part in: as many are the gradients that those of the weights are computed from."""
    cast: bool = True
    """Whether copies that autocast keeps until the forward pass is over are among what is alive."""

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
        """Bytes that are alive between forward and backward."""
        return [segment.end for segment in self.segments if not segment.backward][-1]

    def of(self, backward: bool) -> list[Segment]:
        return [segment for segment in self.segments if segment.backward == backward]

    @property
    def flops(self) -> int:
        return sum(segment.flops for segment in self.segments)

    @property
    def sent(self) -> int:
        return sum(segment.sent for segment in self.segments)

    @property
    def weighted(self) -> int:
        return sum(segment.weighted for segment in self.of(backward=False))


class LiveBytes(TorchDispatchMode):
    """Counts what is alive of all that is made while it is entered."""

    def __init__(self, not_counted: Sequence[Tensor] = (), weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._weights = {_number(weight) for weight in weights}  # and copies in another data type
        self._known: dict[int, tuple[Any, int]] = {}
        self._gradients: set[int] = set()
        self.alive = self.done = self.flops = self.sent = self.weighted = 0
        self.peak = self.peak_with_gradients = 0
        for tensor in not_counted:
            self._follow(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does on this process's part comes by next
        result = func(*args, **(kwargs or {}))
        weighted = any(isinstance(arg, Tensor) and _number(arg) in self._weights for arg in args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, weighted=weighted and func is not _CAST)
                if weighted and func is _CAST:
                    self._weights.add(_number(leaf))
        if func.namespace == "_c10d_functional" and isinstance(result, Tensor) and "wait" not in func.__name__:
            self.sent += max(result.nbytes, args[0].nbytes)
        self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def restart(self) -> None:
        """Resets the peaks."""
        self.done, self.flops, self.sent, self.weighted = 0, 0, 0, 0
        self.peak = self.peak_with_gradients = self.alive

    def is_gradient(self, tensor: Tensor) -> None:
        """It is the gradient of a parameter, and done: from now on counted apart."""
        number = _number(tensor)
        if number in self._known and number not in self._gradients:
            self._gradients.add(number)
            size = self._known[number][1]
            self.alive -= size
            self.done += size

    def _follow(self, tensor: Tensor, counted: bool = True, weighted: bool = False) -> None:
        storage = _local(tensor).untyped_storage()
        number = id(storage)
        if number in self._known:
            return
        size = storage.nbytes() if counted else 0
        self.weighted += size if weighted else 0
        self._known[number] = weakref.ref(storage, lambda _: self._gone(number)), size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive + self.done)

    def _gone(self, number: int) -> None:
        _, size = self._known.pop(number)
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
    if (known := flop_registry.get(func.overloadpacket)) is not None:
        return int(known(*args, **kwargs, out_val=result))
    name = func.overloadpacket.__name__  # attention on a CPU, which torch's counter does not know
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _attention(*args[:3])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(2.5 * _attention(*args[1:4]))
    return 0


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Several heads of the queries may share one of the keys, which torch 2.11 does not count."""
    heads = query.shape[:2]
    return sdpa_flop_count(query.shape, (*heads, *key.shape[2:]), (*heads, *value.shape[2:]))


def trace(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    forward: Callable[[], Tensor],
    finish: Callable[[Tensor], Tensor],
    autocast: AbstractContextManager[object],
    given: Sequence[Tensor] = (),
    gradient: Tensor | None = None,
) -> Trace:
    """Runs `forward` under `autocast`, then `finish` (the loss of what it gives, or itself), then the backward pass,
    which begins with `gradient` (None: with 1).

    Parameters of `module`, what it is `given` and `gradient` are not counted. All within a FakeTensorMode.
    """
    kept = [*module.parameters(), *module.buffers(), *given, *([] if gradient is None else [gradient])]
    live = LiveBytes(kept, module.parameters())
    segments: list[Segment] = []
    block_now, backward_now, cast_now = OUTSIDE, False, True

    def mark(block: int, backward: bool, cast: bool, behind: int | None = None) -> None:
        nonlocal block_now, backward_now, cast_now
        if behind not in (None, block_now):
            return  # the next one has begun
        peaks = live.peak, live.peak_with_gradients, live.done, live.alive, live.flops, live.sent, live.weighted
        segments.append(Segment(block_now, backward_now, *peaks, cast_now))
        live.restart()
        block_now, backward_now, cast_now = block, backward, cast

    with _marked(module, blocks, live, mark), live:
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
def _marked(
    module: nn.Module, blocks: Sequence[nn.Module], live: LiveBytes, mark: Callable[..., None]
) -> Iterator[None]:
    """Tells `live` of gradients that are done, and `mark` of each block that begins or ends."""
    hooks = []
    for number, block in enumerate(blocks):

        def begins(_module: Any, args: Any, kwargs: Any, number: int = number) -> None:
            mark(number, False, True)
            if given := _differentiable((args, kwargs)):
                given[0].register_hook(lambda _: mark(OUTSIDE, True, False, behind=number))

        def ends(_module: Any, _args: Any, result: Any, number: int = number) -> None:
            mark(OUTSIDE, False, True)
            if made := _differentiable(result):
                made[0].register_hook(lambda _: mark(number, True, False))

        hooks.append(block.register_forward_pre_hook(begins, with_kwargs=True))
        hooks.append(block.register_forward_hook(ends))
    for parameter in module.parameters():
        if parameter.requires_grad:
            hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda of: live.is_gradient(of.grad))  # type: ignore[arg-type]
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
    """The trace of `count` blocks that are alike, of one of REPRESENTATIVES: the middle one stands for all that are
    neither first nor last, each of which leaves as much behind for the backward pass."""
    more = count - REPRESENTATIVES
    if more <= 0:
        return trace
    middle = [segment for segment in trace.segments if segment.block == 1]
    last = [segment for segment in trace.segments if segment.block == 2]
    # What a block adds in the forward pass, copies of its weights by autocast among it, and what of that stays.
    forward = last[0].end - middle[0].end
    stays = last[1].end - middle[1].end
    made: list[Segment] = []
    for segment in trace.segments:
        per_block = forward if segment.cast else stays
        if segment.block == 1:
            run = [segment.shifted(per_block * index, 1 + index) for index in range(more + 1)]
            made += reversed(run) if segment.backward else run
        elif segment.block == 2:
            made.append(segment.shifted(per_block * more, count - 1))
        else:
            made.append(segment)  # shifted below, where it is behind the blocks that were added
    return Trace(tuple(_outside_shifted(trace, made, forward * more, stays * more)))


def _outside_shifted(trace: Trace, made: list[Segment], forward: int, stays: int) -> list[Segment]:
    """Segments between the last block's forward and its backward have all of the added blocks' bytes alive."""
    top = max(segment.block for segment in made)
    begins = max(i for i, segment in enumerate(made) if segment.block == top and not segment.backward)
    ends = min((i for i, segment in enumerate(made) if segment.block == top and segment.backward), default=len(made))
    return [
        segment.shifted(forward if segment.cast else stays, segment.block)
        if begins < i < ends and segment.block == OUTSIDE
        else segment
        for i, segment in enumerate(made)
    ]
