"""The demonstration: a small real model and three small real adapters, from packages alone.

No model hub is needed. The model comes out of a package that ships its weights, and the adapters
are in `configs/demo-adapters`, trained by this package's own `train` command.
"""
