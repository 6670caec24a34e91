"""The front end: OpenAI routes over aiohttp, keys, errors, and the relay to workers."""
