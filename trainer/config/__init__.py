"""The config: sections (names, types, help, contradictions), compose (Hydra), check (all errors at once)."""

from trainer.config.schema import Config, Plugin, Strategy

__all__ = ["Config", "Plugin", "Strategy"]
