"""What is changed or read inside of torch and DeepSpeed, beyond what they promise: all of it, with the reason.

`READ_IN` says in which versions; tests/test_patches.py asks newer ones whether what is relied on is still there. (What
DeepSpeed's engine keeps where is in strategies/zero_engine.py, and read in the same version.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

READ_IN = {"torch": "2.13.0", "deepspeed": "0.19.8"}


# torch: modules and compilation


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters of modules that are made meanwhile take no memory (they are on the meta device); buffers are real.

    `nn.Module.register_parameter` is replaced, through which `nn.Module.__setattr__` goes, too. Under
    `torch.device("meta")` buffers would have no values either, and no model says how to compute them again.
    """
    register = nn.Module.register_parameter
    made: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}  # by the identity of those with values

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is, is tied to another
            given, empty = made.get(id(parameter), (None, None))
            if given is None or given() is not parameter:  # else it is registered again: tied as well
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                made[id(parameter)] = weakref.ref(parameter), empty
            parameter = empty
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def compile_numbers_of_layers() -> None:
    """Sets `torch._dynamo.config.allow_unspec_int_on_nn_module`. Else a number that differs from layer to layer, such
    as its own, is a constant to the compiler: each layer is compiled anew, and from the ninth on none is."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


# torch: optimizers


def share_step_hooks(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    """Behind each step of `optimizer` runs what was registered on `other`, now or later: a moving average."""
    optimizer._optimizer_step_post_hooks = other._optimizer_step_post_hooks


def first_behind_steps(optimizer: torch.optim.Optimizer, hook: Callable[..., None]) -> None:
    """Registers a hook that runs behind each step before all others that are there: they see what it made of the
    weights. torch keeps them in an OrderedDict, and offers no order."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether something runs behind each step of the optimizer."""
    return bool(optimizer._optimizer_step_post_hooks)


# torch: FSDP2


def fsdp_groups(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the module's name and the group of each group of parameters that FSDP2 gathers and sends together."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield name, group


def note_gradients(sharded: nn.Module, note: Callable[[Tensor], None]) -> None:
    """From now on `note` is told which sharded parameters have a gradient when a backward pass is done with them.

    `FSDPParamGroup.post_backward` is wrapped, on each group: there FSDP2 itself asks which of its gathered parameters,
    which are other tensors than those of the model, have one. Later all have: what was not used is sent as zeros.
    """
    for _, group in fsdp_groups(sharded):
        group.post_backward = _noting(group, group.post_backward, note)


def _noting(group: Any, reduce: Callable[..., None], note: Callable[[Tensor], None]) -> Callable[..., None]:
    def post_backward(*arguments: Any) -> None:
        for held in group.fsdp_params:
            gradient = getattr(held, "unsharded_accumulated_grad", None)
            if gradient is None and hasattr(held, "_unsharded_param"):
                gradient = held.unsharded_param.grad
            if gradient is not None:
                note(held.sharded_param)
        reduce(*arguments)

    return post_backward


def with_sums_left(model: nn.Module) -> str | None:
    """Returns the name of a module whose gradients HSDP has reduced among the shards, but not yet over the replicas."""
    return next((name for name, group in fsdp_groups(model) if group._partial_reduce_output is not None), None)


# torch: process groups


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Returns how long a collective of the group's gloo backend may take, which torch tells only its own loggers."""
    return group._get_backend(torch.device("cpu")).options._timeout


# DeepSpeed


class _OfParameter(NamedTuple):
    """Instead of a tensor that autograd saves: how it is made of a parameter."""

    parameter: nn.Parameter
    dtype: torch.dtype
    layout: tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset


def released_saved() -> AbstractContextManager[object]:
    """For forward passes of stage 3: what autograd saves for backward keeps no gathered parameter alive.

    DeepSpeed releases a parameter after its layer and gathers it again for backward. But what a layer saves is a
    view of it (a linear layer's transposed weight) or of autocast's copy of it: all of them would be there at once.
    The copy is told by its node in torch's graph, `ToCopyBackward0`, whose next one is the parameter's.
    """

    def pack(tensor: Tensor) -> Tensor | _OfParameter:
        base = tensor if tensor._base is None else tensor._base
        node: Any = base.grad_fn
        cast = type(node).__name__ == "ToCopyBackward0"
        parameter: Any = getattr(node.next_functions[0][0], "variable", None) if cast else base
        if parameter is tensor or not hasattr(parameter, "ds_tensor"):
            return tensor
        offset = int(tensor.storage_offset() - base.storage_offset())  # gathered again, it may lie elsewhere
        return _OfParameter(parameter, base.dtype, (tensor.size(), tensor.stride(), offset))

    def unpack(saved: Tensor | _OfParameter) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        value = saved.parameter.detach().to(saved.dtype)
        size, stride, offset = saved.layout
        return value.as_strided(size, stride, value.storage_offset() + offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def judge_norm(engine: Any, stage: int, accepts: Callable[[Tensor], bool]) -> None:
    """DeepSpeed leaves out a step whose gradient norm is infinite: from now on also one that `accepts` does not take,
    which is asked once a step, on every process alike.

    The optimizer's method that measures the norm is replaced: what it returns decides about the step.
    """
    optimizer = engine.optimizer
    method = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    measure = getattr(optimizer, method)

    def judged() -> Any:
        found = measure()
        parts = torch.stack([torch.as_tensor(part) for part in (found if stage == 3 else [found])])
        # It writes -1 where a part is not a number.
        norm = torch.linalg.vector_norm(torch.where(parts < 0, torch.inf, parts))
        if accepts(norm):
            return found
        return [torch.full_like(norm, torch.inf)] if stage == 3 else torch.full_like(norm, torch.inf)

    setattr(optimizer, method, judged)


def silence_shm(deepspeed: Any) -> None:
    """Keeps DeepSpeed from building its shared-memory collectives for CPUs, for a minute: gloo does without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_groups() -> None:
    """Lets go of all process groups that DeepSpeed keeps in its modules: the next run of a process has its own."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None


def with_exact_powers(adam: Any) -> None:
    """DeepSpeed's CPUAdam multiplies powers of betas on from step to step, in fp32; in a resumed run it would begin
    with exact ones, and differ in the last bits. From now on a step of nothing at a far count, before each step, makes
    it compute them anew every time."""

    def elsewhere(*_: Any) -> None:
        betas, nothing = adam.param_groups[0]["betas"], [torch.zeros(1) for _ in range(4)]
        adam.ds_opt_adam.adam_update(adam.opt_id, 2**40, 0.0, *betas, 1.0, 0.0, True, *nothing)

    adam.register_step_pre_hook(elsewhere)
