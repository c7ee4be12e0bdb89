"""Everything that changes or reads internals of torch and DeepSpeed, with the reason.

`READ_IN` says in which versions; tests/test_patches.py checks whether newer ones still have what is relied on. (The
internals of DeepSpeed's engine are in strategies/zero_engine.py, read in the same version.)
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
    """Makes parameters of modules that are built meanwhile take no memory (on the meta device); buffers are real.

    It replaces `nn.Module.register_parameter`, which `nn.Module.__setattr__` calls, too. Under
    `torch.device("meta")` buffers would have no values either, and no model says how to compute them again.
    """
    register = nn.Module.register_parameter
    empties: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}  # by the id of the parameter with values

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a meta parameter is tied to another one
            original, empty = empties.get(id(parameter), (None, None))
            if original is None or original() is not parameter:  # else it is registered again, so it is tied, too
                empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                empties[id(parameter)] = weakref.ref(parameter), empty
            parameter = empty
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def compile_numbers_of_layers() -> None:
    """Sets `torch._dynamo.config.allow_unspec_int_on_nn_module`. Else a number that differs from layer to layer, such
    as its index, is a constant to the compiler: each layer is compiled again, and from the ninth on none is."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


# torch: optimizers


def share_step_hooks(optimizer: torch.optim.Optimizer, source: torch.optim.Optimizer) -> None:
    """Runs hooks that are registered on `source`, now or later, after each step of `optimizer`: a moving average."""
    optimizer._optimizer_step_post_hooks = source._optimizer_step_post_hooks


def register_first_step_hook(optimizer: torch.optim.Optimizer, hook: Callable[..., None]) -> None:
    """Registers a hook that runs after each step, before all hooks registered so far: they see the weights as it leaves
    them. torch keeps hooks in an OrderedDict, and offers no order."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether hooks run after each step of the optimizer."""
    return bool(optimizer._optimizer_step_post_hooks)


# torch: FSDP2


def fsdp_groups(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the module's name and the group of each group of parameters that FSDP2 gathers and sends together."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield name, group


def note_gradients(sharded: nn.Module, note: Callable[[Tensor], None]) -> None:
    """Calls `note`, from now on, with each sharded parameter that has a gradient when a backward pass is done with it.

    It wraps `FSDPParamGroup.post_backward` on each group: there FSDP2 itself checks which of its gathered parameters,
    which are other tensors than those of the model, have one. Later all have: an unused one is sent as zeros.
    """
    for _, group in fsdp_groups(sharded):
        group.post_backward = _wrap_post_backward(group, group.post_backward, note)


def _wrap_post_backward(group: Any, reduce: Callable[..., None], note: Callable[[Tensor], None]) -> Callable[..., None]:
    def post_backward(*arguments: Any) -> None:
        for parameter in group.fsdp_params:
            gradient = getattr(parameter, "unsharded_accumulated_grad", None)
            if gradient is None and hasattr(parameter, "_unsharded_param"):
                gradient = parameter.unsharded_param.grad
            if gradient is not None:
                note(parameter.sharded_param)
        reduce(*arguments)

    return post_backward


def find_pending_reduction(model: nn.Module) -> str | None:
    """Returns the name of a module whose gradients HSDP has reduced among the shards, but not yet over the replicas."""
    return next((name for name, group in fsdp_groups(model) if group._partial_reduce_output is not None), None)


# torch: process groups


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Returns how long a collective of the group's gloo backend may take, which torch tells only its own loggers."""
    return group._get_backend(torch.device("cpu")).options._timeout


# DeepSpeed


class _ParameterView(NamedTuple):
    """Says how to compute a tensor that autograd saves from a parameter."""

    parameter: nn.Parameter
    dtype: torch.dtype
    layout: tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset


def release_saved_parameters() -> AbstractContextManager[object]:
    """Keeps tensors that autograd saves in a forward pass of stage 3 from keeping gathered parameters alive.

    DeepSpeed releases a parameter after its layer and gathers it again for backward. But what a layer saves is a
    view of it (a linear layer's transposed weight) or of autocast's copy of it: all of them would be in memory at once.
    The copy is recognized by its node in torch's graph, `ToCopyBackward0`, whose next one is the parameter's.
    """

    def pack(tensor: Tensor) -> Tensor | _ParameterView:
        base = tensor if tensor._base is None else tensor._base
        node: Any = base.grad_fn
        cast = type(node).__name__ == "ToCopyBackward0"
        parameter: Any = getattr(node.next_functions[0][0], "variable", None) if cast else base
        if parameter is tensor or not hasattr(parameter, "ds_tensor"):
            return tensor
        offset = int(tensor.storage_offset() - base.storage_offset())  # gathered again, it may lie elsewhere
        return _ParameterView(parameter, base.dtype, (tensor.size(), tensor.stride(), offset))

    def unpack(saved: Tensor | _ParameterView) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        value = saved.parameter.detach().to(saved.dtype)
        size, stride, offset = saved.layout
        return value.as_strided(size, stride, value.storage_offset() + offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def judge_norm(engine: Any, stage: int, accepts: Callable[[Tensor], bool]) -> None:
    """Makes DeepSpeed skip a step whose gradient norm `accepts` rejects, and not only one whose norm is infinite. Each
    process calls `accepts` once a step.

    It replaces the optimizer's method that measures the norm, whose result decides about the step.
    """
    optimizer = engine.optimizer
    method = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    measure = getattr(optimizer, method)

    def measure_and_judge() -> Any:
        norms = measure()
        parts = torch.stack([torch.as_tensor(part) for part in (norms if stage == 3 else [norms])])
        # DeepSpeed writes -1 where a part is not a number.
        norm = torch.linalg.vector_norm(torch.where(parts < 0, torch.inf, parts))
        if accepts(norm):
            return norms
        return [torch.full_like(norm, torch.inf)] if stage == 3 else torch.full_like(norm, torch.inf)

    setattr(optimizer, method, measure_and_judge)


def silence_shm(deepspeed: Any) -> None:
    """Keeps DeepSpeed from building its shared-memory collectives for CPUs, which takes a minute: gloo needs none."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def forget_groups() -> None:
    """Drops all process groups that DeepSpeed keeps in its modules: the next run of a process makes its own."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None


def compute_exact_powers(adam: Any) -> None:
    """Makes DeepSpeed's CPUAdam compute the powers of betas at each step. It multiplies them from step to step, in
    fp32; a resumed run would begin with exact ones, and differ in the last bits. So an empty step at a distant count
    runs before each step."""

    def do_distant_step(*_: Any) -> None:
        betas, nothing = adam.param_groups[0]["betas"], [torch.zeros(1) for _ in range(4)]
        adam.ds_opt_adam.adam_update(adam.opt_id, 2**40, 0.0, *betas, 1.0, 0.0, True, *nothing)

    adam.register_step_pre_hook(do_distant_step)
