"""Calibration: measure a running engine by a design, and fit the latency model's coefficients."""
