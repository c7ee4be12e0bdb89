"""One process. Data-parallel strategies are this one with a wrapper and a sum over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import schema
from trainer.models import ModelFactory
from trainer.objectives import Batch, Objective, Sums
from trainer.precision import Precision
from trainer.strategies.base import OptimizerFactory, Update
from trainer.strategies.layers import prepare
from trainer.topology import Topology


@dataclass
class StepOptions:
    """What every strategy is told of the step, besides its own keys."""

    clip_norm: float
    activation_checkpointing: str
    compile: bool


class Single:
    config: schema.Plugin

    def __init__(
        self,
        config: schema.Plugin,
        topology: Topology,
        precision: Precision,
        objective: Objective,
        options: StepOptions,
    ):
        self.topology, self.precision, self.objective, self.options = topology, precision, objective, options
        self.config, self.parallel = config, topology.dp_size > 1
        self.scaler = precision.scaler()
        self.averaged_over = topology.dp_size  # how many ranks' gradients are averaged; 1 if they are summed

    def setup(self, model_factory: ModelFactory, optimizer_factory: OptimizerFactory) -> None:
        self.model = self.build(model_factory)
        self.optimizer = optimizer_factory(self.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.wrapped = self.wrap(self.model)

    def build(self, model_factory: ModelFactory) -> nn.Module:
        """The model with its initial weights, on the device, its layers prepared."""
        model = model_factory().to(self.topology.device)
        prepare(model, self.options.activation_checkpointing, self.options.compile)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that training calls."""
        return model

    def sync(self, last: bool) -> AbstractContextManager[object]:
        """Around each micro-batch: only the last one's backward needs to exchange gradients."""
        return nullcontext()

    def total(self, sums: Tensor) -> Tensor:
        """Adds up over data-parallel ranks."""
        if self.parallel:
            dist.all_reduce(sums)
        return sums

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor that may be sharded."""
        return tensor

    def train_step(self, micro_batches: Sequence[Batch]) -> Sums:
        count = sum(self.objective.count(batch) for batch in micro_batches)
        # Where gradients are averaged over ranks, their number / count makes that the sum over targets / global count.
        count_everywhere = self.total(torch.full((), count, dtype=torch.float64, device=self.topology.device))
        scale = self.averaged_over / count_everywhere.clamp(min=1)
        sums: Sums = {}
        for number, batch in enumerate(micro_batches, 1):
            # For models that draw from torch's generator: the same draws in every life of the run.
            torch.manual_seed(int(batch["draws"][0]) if len(batch["draws"]) else 0)
            with self.sync(last=number == len(micro_batches)):
                part = self.loss_of(self.wrapped, batch)
                wide = torch.promote_types(part["loss"].dtype, torch.float32)
                self.scaler.scale(part["loss"] * scale.to(wide)).backward()
            for name, value in part.items():
                value = value.detach().double()
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def loss_of(self, model: nn.Module, batch: Batch) -> Sums:
        batch = to_device(batch, self.topology.device)
        with self.precision.autocast():
            outputs = model(batch)
        return self.objective.loss(outputs, batch)

    def update(self, lr: float) -> Update:
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.options.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.clip_norm, norm)
        norm = self.whole(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        overflow = ~norm.isfinite() if self.scaler.is_enabled() else torch.zeros_like(norm, dtype=torch.bool)
        return Update(norm, overflow)

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> Sums:
        self.model.eval()
        batch = to_device(batch, self.topology.device)
        with self.precision.autocast():
            outputs = self.model(batch)
        self.model.train()
        return {name: value.double() for name, value in self.objective.evaluate(outputs, batch).items()}

    def reduce(self, sums: Mapping[str, Tensor]) -> dict[str, list[float]]:
        names = sorted(sums)
        stacked = torch.stack([sums[name].to(self.topology.device, torch.float64) for name in names])
        return dict(zip(names, self.total(stacked).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        self._materialise()
        state = {f"model/{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                state[f"optimizer/{kind}/{name}"] = value
        if self.scaler.is_enabled():
            values = self.scaler.state_dict()
            state["scaler/scale"] = torch.tensor(values["scale"], dtype=torch.float64)
            state["scaler/growth_tracker"] = torch.tensor(values["_growth_tracker"], dtype=torch.int64)
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.state()
        for name, tensor in state.items():
            own[name].copy_(tensor)
        if self.scaler.is_enabled():
            values = {
                "scale": float(state["scaler/scale"]),
                "_growth_tracker": int(state["scaler/growth_tracker"]),
            }
            self.scaler.load_state_dict({**self.scaler.state_dict(), **values})

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach().cpu()

    def close(self) -> None:
        """Lets go of the wrapper, and with it of its hold on the process group."""
        del self.wrapped

    def _materialise(self) -> None:
        """Makes the optimizer's state, which torch creates only at the first step, so that it can be read into.

        A step of no length does it for any optimizer; then the state is what it is before a first step, zero.
        """
        if self.optimizer.state:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for values in self.optimizer.state.values():
            for value in values.values():
                value.zero_()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies that do not wait for the device's queue (from pinned memory)."""
    if device.type == "cpu":
        return batch
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
