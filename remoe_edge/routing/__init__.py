"""Routing traces: reading and writing them, simulating caches on them, and models that replay them."""
