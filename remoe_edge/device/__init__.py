"""The machine that is measured on: its state, and whether a benchmark on it would be valid."""
