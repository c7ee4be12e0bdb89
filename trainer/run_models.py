"""All models of a run: its main model, further trained models, frozen models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trainer.checkpoint.state import FlatShard, model_of
from trainer.errors import ConfigError
from trainer.step import MAIN
from trainer.strategies.base import Strategy


class RunModels(Mapping[str, Strategy]):
    """The models by name. Trained ones are saved: the run's own under `model/`, `optimizer/`, `scaler/`, another one
    under the same with its name in front, `critic/model/`. Frozen ones are not saved."""

    def __init__(
        self,
        main: Strategy,
        trained: Mapping[str, Strategy] | None = None,
        frozen: Mapping[str, Strategy] | None = None,
    ):
        self.main, self.trained, self.frozen = main, dict(trained or {}), dict(frozen or {})
        self._all = {MAIN: main, **self.trained, **self.frozen}

    def __getitem__(self, name: str) -> Strategy:
        if name not in self._all:
            has = f"it has {', '.join(self._all)}; name it in the objective's `frozen` or `trained`"
            raise ConfigError(f"the objective asks for the model '{name}', but the run has none of that name: {has}")
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def state(self, everything: bool = False) -> dict[str, Tensor | FlatShard]:
        """Returns the state of all trained models, in the form of `Strategy.state`."""
        state = dict(self.main.state(everything))
        for name, model in self.trained.items():
            state |= {f"{name}/{path}": tensor for path, tensor in model.state(everything).items()}
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Loads tensors that `state` returned, filled with other values."""
        by_model: dict[str, dict[str, Any]] = {}
        for path, tensor in state.items():
            name, local_path = model_of(path)
            by_model.setdefault(name or MAIN, {})[local_path] = tensor
        for name, model_state in by_model.items():
            self[name].load_state(model_state)

    def close(self) -> None:
        """Closes all models, the run's own last, as it may have started what all of them use."""
        for model in reversed(self._all.values()):
            model.close()
