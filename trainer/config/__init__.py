"""The config: schema (names, types, help), compose (Hydra), check (all errors at once), rules (contradictions)."""

from trainer.config.schema import Config, Plugin

__all__ = ["Config", "Plugin"]
