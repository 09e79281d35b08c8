"""Bringing remoe-edge and a model to another machine over SSH, and results back."""
