"""The former home of `OrderedSamples`, from which scripts import it."""

from trainer.data.ordered_samples import OrderedSamples

__all__ = ["OrderedSamples"]
