"""Optimizers and schedules. A schedule is a pure function of the step: none of it is saved or restored."""
