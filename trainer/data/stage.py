"""The former module of `OrderedSamples`: scripts import it from here."""

from trainer.data.ordered_samples import OrderedSamples

__all__ = ["OrderedSamples"]
