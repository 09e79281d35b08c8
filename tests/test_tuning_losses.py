"""The losses against values worked by hand, and where gradients flow."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from remoe_edge.tuning.losses import (  # noqa: E402
    lag_loss,
    reuse_loss,
    reuse_rate,
    smooth_loss,
    symmetric_kl,
    trust_loss,
    window_loss,
)

P = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]]], dtype=torch.float64)
IDS = torch.tensor([[[0, 1], [1, 2], [2, 0]]])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def test_reuse_is_minus_log_of_the_mean_mass_on_the_experts_before() -> None:
    # Token 1 gives experts 0 and 1 of token 0: 0.1 + 0.6; token 2 gives 1 and 2: 0.25 + 0.5. Over K = 2, mean of both.
    assert float(reuse_loss(P, IDS)) == pytest.approx(-np.log((0.7 / 2 + 0.75 / 2) / 2), abs=1e-6)


def test_smooth_is_the_mean_symmetric_kl_of_neighbours() -> None:
    p = P[0].numpy()
    expected = np.mean([0.5 * (kl(p[i], p[i + 1]) + kl(p[i + 1], p[i])) for i in range(2)])
    assert float(smooth_loss(P)) == pytest.approx(expected, rel=1e-5)
    assert float(symmetric_kl(P[0, 0], P[0, 0])) == 0


def test_lag_means_over_the_lags_that_fit() -> None:
    p = P[0].numpy()
    near = np.mean([0.5 * (kl(p[i], p[i + 1]) + kl(p[i + 1], p[i])) for i in range(2)])
    far = 0.5 * (kl(p[0], p[2]) + kl(p[2], p[0]))
    assert float(lag_loss(P)) == pytest.approx((near + far) / 2, rel=1e-5)
    assert float(lag_loss(P, (8,))) == 0


def test_window_is_the_entropy_of_the_mean_of_each_window() -> None:
    def entropy(q: np.ndarray) -> float:
        return float(-(q * np.log(q)).sum())

    p = P[0].numpy()
    expected = (2 * entropy(p[:2].mean(0)) + 1 * entropy(p[2])) / 3
    assert float(window_loss(P, 2)) == pytest.approx(expected, rel=1e-5)
    assert float(window_loss(P, 3)) == pytest.approx(entropy(p.mean(0)), rel=1e-5)


def test_trust_is_kl_of_student_first_and_holds_the_reference_still() -> None:
    student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, 0.5, 0.0]], requires_grad=True)
    loss = trust_loss(student, reference)
    p, q = (t.detach().softmax(-1)[0].numpy() for t in (student, reference))
    assert loss.item() == pytest.approx(kl(p, q), rel=1e-5)
    loss.backward()
    assert reference.grad is None
    assert student.grad is not None
    assert trust_loss(student, student).item() == pytest.approx(0, abs=1e-7)


def test_reuse_pulls_a_token_towards_its_predecessor_and_not_the_other_way() -> None:
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    loss = reuse_loss(logits.softmax(-1), torch.tensor([[[0, 1], [2, 3]]]))
    loss.backward()
    assert logits.grad is not None
    # Which experts the first token chose has no gradient; the second is to give them more.
    assert torch.equal(logits.grad[0, 0], torch.zeros(4))
    assert (logits.grad[0, 1, :2] < 0).all()
    assert (logits.grad[0, 1, 2:] > 0).all()


def test_smooth_moves_both_sides() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    smooth_loss(logits.softmax(-1)).backward()
    assert logits.grad is not None
    assert (logits.grad.abs() > 0).all()


def test_rows_do_not_see_each_other() -> None:
    both = torch.cat([P, P.flip(1)])
    ids = torch.cat([IDS, IDS.flip(1)])
    assert float(smooth_loss(both)) == pytest.approx((float(smooth_loss(P)) + float(smooth_loss(P.flip(1)))) / 2)
    assert reuse_rate(ids) == pytest.approx((reuse_rate(IDS) + reuse_rate(IDS.flip(1))) / 2)


def test_reuse_rate_of_known_sets() -> None:
    # {0,1} then {1,2}: one of two; {1,2} then {2,0}: one of two.
    assert reuse_rate(IDS) == 0.5
    assert reuse_rate(torch.tensor([[[0, 1], [1, 0]]])) == 1.0
    assert reuse_rate(IDS[:, :1]) == 0.0
