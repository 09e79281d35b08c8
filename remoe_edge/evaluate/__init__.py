"""Base against tuned routers: reuse, misses, quality, and whether a difference is more than chance."""
