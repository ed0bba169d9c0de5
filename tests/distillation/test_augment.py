import pytest
import torch
from trajectory_vectors import load

from stillhouse.distillation import augment as dsa
from stillhouse.distillation.augment import DSA_GROUPS, Draw, augment, draw_augmentation

VECTOR = load("dd_mtt_03_dsa_ops.npz")
DRAWS = {
    "brightness": ["brightness"],
    "saturation": ["saturation"],
    "contrast": ["contrast"],
    "flip": ["flip"],
    "rotate": ["rotate_theta_rad"],
    "scale": ["scale_sx_sy"],
    "crop": ["crop_dx_dy"],
    "cutout": ["cutout_ox_oy"],
}


@pytest.mark.parametrize("name", DRAWS)
def test_operator_reproduces_the_reference(name):
    values = VECTOR[f"draw_{DRAWS[name][0]}"]
    found = getattr(dsa, name)(VECTOR["x"], *(values if values.ndim == 2 else [values]))
    torch.testing.assert_close(found, VECTOR[f"out_{name}"], rtol=1e-5, atol=1e-6)
