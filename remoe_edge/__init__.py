"""Fine-grained Mixture-of-Experts models in a fixed memory budget: router export, expert cache, measured proof."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remoe_edge.runtime.api import Llama as Llama

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    # Not at import: it loads the runtime, which most commands need not, and which may not be built yet.
    if name == "Llama":
        from remoe_edge.runtime.api import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
