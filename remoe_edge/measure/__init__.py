"""Decode runs, and what they cost in time, memory and reads."""
