import torch

from stillhouse.distillation.methods.ftd import gsam_direction

CURVATURE = torch.tensor([2.0, 8.0])


def gradient_at(theta):
    return CURVATURE * theta


def test_plain_step_by_hand():
    """g = (6, 8), e = g/10: g' = (6 + 1.2, 8 + 6.4), along (1, 2)."""
    theta = torch.tensor([3.0, 1.0])
    found = gsam_direction(gradient_at, theta, rho=1.0, alpha=0.0, adaptive=False)
    torch.testing.assert_close(found, torch.tensor([7.2, 14.4]))
    found = gsam_direction(gradient_at, theta, rho=1.0, alpha=0.5, adaptive=False)
    along = torch.tensor([4.4, 8.8])  # (6, 8) . (1, 2) / 5 = 4.4
    torch.testing.assert_close(
        found, torch.tensor([7.2, 14.4]) - 0.5 * (torch.tensor([6, 8]) - along)
    )


def test_adaptive_step_by_hand():
    """g = (3, 4), |theta| g = (4.5, 2), theta^2 g = (6.75, 1)."""
    theta = torch.tensor([1.5, 0.5])
    norm = (4.5**2 + 2**2) ** 0.5
    step = torch.tensor([2.25 * 3, 0.25 * 4]) / norm
    found = gsam_direction(gradient_at, theta, rho=1.0, alpha=0.0)
    torch.testing.assert_close(found, CURVATURE * (theta + step))


def test_rho_zero_is_the_plain_gradient():
    theta = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(gsam_direction(gradient_at, theta, rho=0.0), gradient_at(theta))
