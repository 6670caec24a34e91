"""The router: an OpenAI-compatible front end, a routing core, and what reaches workers and adapters."""
