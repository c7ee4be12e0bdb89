"""DeepSpeed's ZeRO behind the seam (Rajbhandari et al. 2020, "ZeRO: Memory optimizations toward training trillion
parameter models"): stage 1 shards optimizer state over the processes, 2 gradients too, 3 parameters too; 0 nothing.

Its engine reduces, clips and steps. Everything else is ours: the loss's scale, autocast, initial weights, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer.config import strategy as schema
from trainer.models import ModelFactory, without_values
from trainer.objectives import Batch, Sums
from trainer.strategies.base import OptimizerFactory, Update
from trainer.strategies.layers import prepare
from trainer.strategies.single import Single, to_device
from trainer.strategies.zero_engine import (
    cpu_optimizer,
    deepspeed_config,
    flat_tensors,
    import_deepspeed,
    piece,
    released_saved,
)


class Zero(Single):
    """`Single` whose update is DeepSpeed's. Weights are fp32; matrix products are in what autocast says."""

    config: schema.Zero
    own_group = False

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory) -> None:
        self.deepspeed = import_deepspeed(self.topology.device)
        if not self.parallel and not dist.is_initialized():  # DeepSpeed cannot do without a process group
            backend = "cpu:gloo,cuda:nccl" if self.topology.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self.own_group = True
        self.deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.mesh = self.topology.mesh()["data"] if self.parallel else None
        super().setup(model_factory, optimizer_factory)

    def build(self, model_factory: ModelFactory) -> nn.Module:
        if self.config.stage < 3:
            return super().build(model_factory)
        with without_values():
            model = model_factory.build()
        self._shard_parameters(model, model_factory)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.topology.device)
        prepare(model, self.options.activation_checkpointing, self.options.compile)
        return model

    def _shard_parameters(self, model: nn.Module, model_factory: ModelFactory) -> None:
        """Fills and shards a model without values. Only one parameter is whole at a time."""
        sharded: dict[nn.Parameter, nn.Parameter] = {}

        def whole() -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in model.named_parameters():
                made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                yield name, made  # it is filled now
                place: dict[str, Any] = {"remote_device": "cpu"} if self.config.offload_parameters else {}
                alone = nn.ParameterList([made])
                self.deepspeed.zero.Init(alone, mem_efficient_linear=False, dtype=parameter.dtype, **place)
                sharded[parameter] = made

        view = SimpleNamespace(named_parameters=whole, initialise=model.initialise)
        model_factory.fill(view)  # type: ignore[arg-type]
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(module, name, sharded[parameter])

    def wrap(self, model: nn.Module) -> nn.Module:
        forward = model.forward

        def autocast(*arguments: Any) -> Any:  # inside of the engine, which switches off what it is called in
            with self.precision.autocast(cache=self.config.stage < 3):
                return forward(*arguments)

        model.forward = autocast
        optimizer = cpu_optimizer(self.optimizer) if self.config.offload_optimizer else self.optimizer
        largest = max(map(_elements, getattr(model, "blocks", [model])))
        config = deepspeed_config(self.config, self.precision, self.options.clip_norm, largest)
        self.files = {"deepspeed.json": config}
        self.engine, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.flat = flat_tensors(self.engine, self.parameters)
        self.optimizer = self.engine.optimizer.optimizer if self.config.stage else self.engine.optimizer
        return self.engine

    def loss_of(self, model: nn.Module, batch: Batch) -> Sums:
        batch = to_device(batch, self.topology.device)
        with released_saved() if self.config.stage == 3 else nullcontext():
            return self.objective.loss(model(batch), batch)

    def sync(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> Update:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.config.stage == 0:  # of which DeepSpeed gives none
            norm = self.norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm, dtype=torch.float32)
        return Update(norm, torch.zeros_like(norm, dtype=torch.bool))

    def state(self) -> dict[str, Tensor]:
        """Shards in dimension 0, in host memory. Parameters are put together one at a time."""
        self._settle()
        tensors = self.model.state_dict(keep_vars=True)
        state = {f"model/{name}": self._shard(self._weight(tensor)) for name, tensor in tensors.items()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self._optimizer_state(parameter).items():
                if _is_flat(value):
                    state[f"optimizer/{kind}/{name}"] = self._shard(self._gather(parameter, value))
                else:  # a count of steps
                    state[f"optimizer/{kind}/{name}"] = torch.as_tensor(value, dtype=torch.float32).cpu().clone()
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._settle()
        tensors = self.model.state_dict(keep_vars=True)
        for path, tensor in state.items():
            what, _, name = path.partition("/")
            whole = self.whole(tensor.to(self.topology.device))
            if what == "model":
                self._take_weight(tensors[name], whole)
                continue
            kind, _, name = name.partition("/")
            values = self._optimizer_state(tensors[name])
            if _is_flat(values[kind]):
                self._scatter(tensors[name], values[kind], whole)
            elif isinstance(values[kind], Tensor):
                values[kind].copy_(whole)
            else:
                values[kind] = type(values[kind])(whole.item())

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.engine.empty_partition_cache()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            weight = self._weight(tensor)
            if self.topology.is_main:
                yield name, weight.cpu()

    def close(self) -> None:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        self.engine.destroy()
        super().close()
        del self.engine
        if self.own_group:
            dist.destroy_process_group()
        groups._release_process_group_references()  # a sweep's next run has groups of its own
        comm.cdb = None

    @torch.no_grad()
    def _gather(self, parameter: Tensor, flat: Tensor) -> Tensor:
        """All of what `flat` holds of a parameter, on every process."""
        start, size, offset = piece(self.engine, parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self.topology.device)
        whole[offset : offset + size] = flat.view(-1)[start : start + size]
        if self.config.stage and self.parallel:
            dist.all_reduce(whole)  # each element is zero on all processes but one
        return whole.view(shape)

    def _scatter(self, parameter: Tensor, flat: Tensor, whole: Tensor) -> None:
        """The other way round."""
        start, size, offset = piece(self.engine, parameter)
        flat.view(-1)[start : start + size].copy_(whole.flatten()[offset : offset + size])

    def _weight(self, tensor: Tensor) -> Tensor:
        """A parameter or buffer, whole."""
        if not hasattr(tensor, "ds_tensor"):
            return tensor.detach()
        with self.deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _take_weight(self, tensor: Any, whole: Tensor) -> None:
        """Both what is computed with and what the optimizer steps on."""
        with self.deepspeed.zero.GatheredParameters([tensor], modifier_rank=0, enabled=hasattr(tensor, "ds_tensor")):
            tensor.copy_(whole)
        if tensor in self.flat and self.config.stage:
            self._scatter(tensor, self.flat[tensor], whole)

    def _optimizer_state(self, parameter: Any) -> dict[str, Any]:
        return self.optimizer.state.get(self.flat[parameter], {}) if parameter in self.flat else {}

    def _shard(self, whole: Tensor) -> Tensor:
        """This process's part in dimension 0, in host memory."""
        if self.mesh is None or not whole.dim():
            return whole
        part = distribute_tensor(whole, self.mesh, [Shard(0)], src_data_rank=None).to_local().clone()
        sizes: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(part, self.mesh, [Shard(0)], run_check=False, **sizes).to("cpu")

    def _settle(self) -> None:
        """There is optimizer state, and no parameter is on its way here as it was prefetched."""
        self._materialise()
        self.engine.empty_partition_cache()

    def _materialise(self) -> None:
        """As `Single`, for flat parameters: DeepSpeed shows them to the optimizer only while it steps, and has buffers
        of its own for their gradients."""
        if self.config.stage == 0:
            super()._materialise()
        if self.optimizer.state:
            return
        groups, flats = self.optimizer.param_groups, list(dict.fromkeys(self.flat.values()))
        shown = [(group["params"], group["lr"]) for group in groups]
        gradients = [flat.grad for flat in flats]
        for group in groups:
            group.update(params=[], lr=0.0)
        groups[0]["params"] = flats
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        self.optimizer.step()
        for flat, gradient in zip(flats, gradients, strict=True):
            flat.grad = gradient
        for group, (parameters, rate) in zip(groups, shown, strict=True):
            group.update(params=parameters, lr=rate)
        for values in self.optimizer.state.values():
            for kind, value in values.items():
                values[kind] = value.zero_() if isinstance(value, Tensor) else type(value)()


def _elements(layer: nn.Module) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in layer.parameters())


def _is_flat(value: Any) -> bool:
    """Whether it is a state of each element; else it is one of all."""
    return isinstance(value, Tensor) and value.dim() > 0
