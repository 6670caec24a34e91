"""Validation: a run of the real router over real workers, against the simulation of the same run."""
