"""One engine behind HTTP: vLLM, or an emulation of it where vLLM is not installed."""
