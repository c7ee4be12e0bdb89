"""Optimizers and schedules. A schedule is a pure function of the step: nothing of it is saved or restored."""
