"""How much each loss counts. Apart from the losses, because the command line shows the defaults and has no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Weights:
    """Weights of the losses: L = ce CE + kl KL + a (reuse L_reuse + smooth L_smooth + lag L_lag + window L_window).

    `a` rises from 0 to 1 in the first steps of a run.
    """

    ce: float = 1.0
    kl: float = 2.0
    reuse: float = 0.8
    smooth: float = 0.16
    lag: float = 0.08
    window: float = 0.16

    @property
    def local(self) -> bool:
        return any((self.reuse, self.smooth, self.lag, self.window))

    def without(self, term: str) -> Weights:
        """The same with one weight 0."""
        return Weights(**{**asdict(self), term: 0.0})
