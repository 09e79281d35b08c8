"""Runtimes and container images for NVIDIA Jetson, made on another machine."""
