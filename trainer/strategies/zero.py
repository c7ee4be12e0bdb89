"""DeepSpeed's ZeRO as a strategy (Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion
parameter models"): stage 1 shards optimizer state over the ranks, 2 also gradients, 3 also parameters; 0 nothing.

Its engine reduces, clips and steps. Everything else is ours: the loss's scale, autocast, initial weights, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.checkpoint.state import FlatShard, local_values
from trainer.config import strategy as schema
from trainer.models import ModelFactory, is_saved
from trainer.objectives import Batch, Outputs
from trainer.optim.groups import names
from trainer.patches import forget_groups, judge_norm, release_saved_parameters, without_values
from trainer.strategies.arithmetic import StepArithmetic
from trainer.strategies.base import OptimizerFactory, UpdateResult
from trainer.strategies.fsdp import FSDP
from trainer.strategies.layers import raise_if_scalars, wrap_layers
from trainer.strategies.used_parameters import UsedParameters
from trainer.strategies.zero_engine import (
    INSTALL,
    cpu_optimizer,
    deepspeed_config,
    find_shard,
    flat_tensors,
    import_deepspeed,
)
from trainer.strategies.zero_unused import UnusedParameter, put_back_after_steps


class Zero(StepArithmetic):
    """Trains with DeepSpeed's update. Weights are fp32; autocast chooses the data type of matrix products."""

    runs_alone = True  # offloading is useful there, too

    config: schema.Zero
    process_group = False
    unused: Sequence[UnusedParameter] = ()  # in this step
    grad_norm: Tensor  # of the step
    limit: Tensor | float

    @staticmethod
    def strategy_for_frozen() -> tuple[type[StepArithmetic], schema.FSDP]:
        """Returns the strategy of frozen models, FSDP2: DeepSpeed shards only models that have an optimizer."""
        return FSDP, schema.FSDP(
            name="fsdp", reshard_after_forward=True, gather="param", reduce="each", cpu_offload=False,
            find_unused_parameters=False, tensor_parallel=1, sequence_parallel=False, loss_parallel=False,
        )  # fmt: skip

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory | None) -> None:
        self.deepspeed = import_deepspeed(self.topology.device)
        if not dist.is_initialized():  # one process: DeepSpeed needs a process group nevertheless
            backend = "cpu:gloo,cuda:nccl" if self.topology.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self.process_group = True
        self.deepspeed.init_distributed(dist_init_required=False, verbose=False)
        super().setup(model_factory, optimizer_factory)

    def build(self, model_factory: ModelFactory) -> nn.Module:
        if self.config.stage < 3:
            model = super().build(model_factory)
            raise_if_scalars(model, "DeepSpeed cannot send")
            return model
        with without_values():
            model = model_factory.build()
        raise_if_scalars(model, "DeepSpeed cannot send")
        self._shard_parameters(model, model_factory)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.topology.device)
        wrap_layers(model, self.options.activation_checkpointing, self.options.compile)
        return model

    def _shard_parameters(self, model: nn.Module, model_factory: ModelFactory) -> None:
        """Fills and shards a model without values. Only one parameter is whole at a time."""
        options: dict[str, Any] = {"remote_device": "cpu"} if self.config.offload_parameters else {}
        sharded: dict[nn.Parameter, nn.Parameter] = {}
        for parameter, value in model_factory.values(model, self.topology.control, self.topology.device):
            filled = nn.Parameter(value.to(parameter.dtype), parameter.requires_grad)
            container = nn.ParameterList([filled])
            self.deepspeed.zero.Init(container, mem_efficient_linear=False, dtype=parameter.dtype, **options)
            sharded[parameter] = filled
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(module, name, sharded[parameter])

    def wrap(self, model: nn.Module) -> nn.Module:
        forward = model.forward

        def autocast(*arguments: Any) -> Any:  # inside of the engine, which disables a context around it
            with self.precision.autocast(cache=self.config.stage < 3):
                return forward(*arguments)

        model.forward = autocast
        optimizer = cpu_optimizer(self.optimizer) if self.config.offload_optimizer else self.optimizer
        largest = max(map(_count_elements, getattr(model, "blocks", [model])))
        config = deepspeed_config(self.config, self.precision, self.options.clip_norm, largest)
        self.files = {"deepspeed.json": config}
        self.engine, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if self.config.stage:
            judge_norm(self.engine, self.config.stage, self.accepts)
        self.flat = flat_tensors(self.engine, self.parameters)
        self.optimizer = self.engine.optimizer.optimizer if self.config.stage else self.engine.optimizer
        self.used = UsedParameters(names(model), model, self.topology.device)
        self.used.watch()
        if self.config.stage:
            put_back_after_steps(self.optimizer, lambda: self.unused)
        return self.engine

    def run_forward(self, model: nn.Module, batch: Batch) -> tuple[Outputs, Batch]:
        with release_saved_parameters() if self.config.stage == 3 else nullcontext():
            return super().run_forward(model, batch)

    def autocast_forward(self) -> AbstractContextManager[object]:
        return nullcontext()  # it is inside of the model, see `wrap`

    def sync(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float, limit: Tensor | float = math.inf) -> UpdateResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.limit = limit
        if self.config.stage:
            self.engine.step()  # asks `accepts`
        elif self.accepts(self.norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])):
            self.engine.step()
        else:
            self.engine.zero_grad()
        bad, empty = self.check_norm(self.grad_norm, limit)
        self.buffers.end_update(bad | empty)
        return UpdateResult(self.grad_norm, bad | empty, bad)

    def accepts(self, norm: Tensor) -> bool:
        """Returns whether the step with this gradient norm is to be done. The host waits for the device in it."""
        unused_parameters = [self.model.get_parameter(name) for name in self.used.find_unused()]
        self.unused = [
            UnusedParameter.of(self.engine, self.optimizer, self.flat[parameter], parameter)
            for parameter in unused_parameters
        ]
        if self.config.stage == 0:
            for parameter in unused_parameters:
                parameter.grad = None
        self.grad_norm = norm.detach().float()
        bad, empty = self.check_norm(self.grad_norm, self.limit)
        return not bool(bad | empty)

    def state(self, everything: bool = False) -> dict[str, Tensor | FlatShard]:
        """Returns what this rank holds, as it holds it: nothing is sent, and only counts of steps are copied."""
        self._end_update()
        tensors, saved = self.model.state_dict(keep_vars=True), is_saved(self.model)
        state: dict[str, Tensor | FlatShard] = {
            f"model/{name}": self._weight_shard(tensor) for name, tensor in tensors.items() if everything or saved(name)
        }
        for name, parameter in self.model.named_parameters():
            for kind, value in self._optimizer_state(parameter).items():
                state[f"optimizer/{kind}/{name}"] = self._optimizer_shard(parameter, value)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor | FlatShard]) -> None:
        current, counts = self.state(), dict[tuple[int, str], float]()
        for path, value in state.items():
            local_values(current[path]).copy_(local_values(value))
            section, _, name = path.partition("/")
            kind, _, name = name.partition("/")
            if section == "optimizer":
                shard = self._optimizer_state(self.model.get_parameter(name))
                if not _is_elementwise(shard[kind]):  # a count of steps, which `current` has a copy of
                    counts[id(shard), kind] = max(counts.get((id(shard), kind), -math.inf), local_values(value).item())
                    shard[kind] = _count_like(counts[id(shard), kind], shard[kind])
        if self.config.stage:
            self.engine.optimizer.refresh_fp32_params()  # on which the optimizer steps

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.engine.empty_partition_cache()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            with self.deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_tensor")):
                weight = tensor.detach().cpu().clone() if self.topology.is_main else None
            if weight is not None:
                yield name, weight

    def close(self) -> None:
        self.engine.destroy()
        super().close()
        del self.engine
        if self.process_group:
            dist.destroy_process_group()
        forget_groups()  # a sweep's next run has groups of its own

    def _weight_shard(self, tensor: Any) -> Tensor | FlatShard:
        """Returns this rank's shard of a parameter, or a whole buffer."""
        if not hasattr(tensor, "ds_tensor"):
            return tensor.detach()
        shard = tensor.ds_tensor.detach()
        start = dist.get_rank() * shard.numel()
        return FlatShard(shard[: max(0, tensor.ds_numel - start)], tensor.ds_shape, start)  # the last ones are padded

    def _optimizer_shard(self, parameter: Any, value: Any) -> Tensor | FlatShard:
        """Returns this rank's shard of one kind of a parameter's optimizer state."""
        if not _is_elementwise(value):  # one per flat tensor: the largest of its parameters' counts
            return torch.tensor(float(value), dtype=value.dtype if isinstance(value, Tensor) else None)
        if not self.config.stage:
            return value
        start, size, offset = find_shard(self.engine, parameter)
        return FlatShard(value.view(-1)[start : start + size], getattr(parameter, "ds_shape", parameter.shape), offset)

    def _optimizer_state(self, parameter: Any) -> dict[str, Any]:
        return self.optimizer.state.get(self.flat[parameter], {}) if parameter in self.flat else {}

    def _end_update(self) -> None:
        """Makes sure that there is optimizer state and that no prefetched parameter is still being gathered."""
        self._materialize()
        self.engine.empty_partition_cache()

    def _materialize(self) -> None:
        """Creates the optimizer state of flat parameters, too: DeepSpeed passes them to the optimizer only while it
        steps, and has its own buffers for their gradients."""
        if self.config.stage == 0:
            super()._materialize()
        if self.optimizer.state:
            return
        groups, flat_parameters = self.optimizer.param_groups, list(dict.fromkeys(self.flat.values()))
        group_values = [(group["params"], group["lr"]) for group in groups]
        gradients = [flat.grad for flat in flat_parameters]
        for group in groups:
            group.update(params=[], lr=0.0)
        groups[0]["params"] = flat_parameters
        for flat in flat_parameters:
            flat.grad = torch.zeros_like(flat)
        self.optimizer.step()
        for flat, gradient in zip(flat_parameters, gradients, strict=True):
            flat.grad = gradient
        for group, (parameters, rate) in zip(groups, group_values, strict=True):
            group.update(params=parameters, lr=rate)
        for shard in self.optimizer.state.values():
            for kind, value in shard.items():
                shard[kind] = value.zero_() if isinstance(value, Tensor) else type(value)()


def _is_elementwise(value: Any) -> bool:
    """Returns whether a state of an optimizer has a number for each element; otherwise it is one count for all."""
    return isinstance(value, Tensor) and value.dim() > 0


def _count_like(number: float, like: Any) -> Any:
    return torch.full_like(like, number) if isinstance(like, Tensor) else type(like)(number)


def missing(config: schema.Zero) -> str:
    """Returns what the strategy needs and this machine does not have; empty if nothing."""
    if find_spec("deepspeed"):
        return ""
    return f"strategy=zero: DeepSpeed is not installed: {INSTALL}; nearest: strategy=fsdp"


def _count_elements(layer: nn.Module) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in layer.parameters())
