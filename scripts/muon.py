"""Muon for the hidden matrices and AdamW for the rest.

Muon moves a matrix along its orthogonalised momentum, here with the scale of AdamW's updates (Jordan et al. 2024;
arXiv 2502.16982, section 2.2). torch.optim.Muon takes single matrices only; the experts of a layer are a stack of them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For parameters [..., rows, columns]; all leading dimensions count matrices.

    Processes of a group share the parameters out among them: gradients must be the same on all.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                if i % size == rank:
                    update = orthogonal(torch.lerp(param.grad, state["momentum"], group["momentum"]))
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-group["lr"] * 0.2 * max(param.shape[-2:]) ** 0.5)
            if size > 1:
                for i, param in enumerate(group["params"]):
                    dist.broadcast(param, i % size)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices [..., rows, columns], roughly: singular values in 0.7 to 1.2."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
