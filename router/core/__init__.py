"""The routing core: pure asyncio, no I/O, shared by production and simulation."""
