"""Workloads made up by rule: arrivals, lengths, adapters, tenants, sessions. Pure, and seeded.

The same parameters give the same rows on every machine and every Python: numbers are drawn by
`Random.random` alone, the one method whose sequence Python promises to keep, and what the C
library's logarithm may round differently in its last bit is rounded far above it.
"""
