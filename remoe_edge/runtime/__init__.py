"""The patched llama.cpp: its pin, its patches, its build, and the handle to use it from Python."""
