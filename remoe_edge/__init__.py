"""Fine-grained Mixture-of-Experts models in a fixed memory budget: router export, expert cache, measured proof."""

__version__ = "0.1.0.dev0"
