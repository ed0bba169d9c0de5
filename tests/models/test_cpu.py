import torch

from stillhouse.models.cpu import use_onednn_for_float32


def test_float32_products_stay_exact() -> None:
    use_onednn_for_float32()
    left = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    assert (left @ left.T - left.double() @ left.double().T).abs().max() < 1e-3
