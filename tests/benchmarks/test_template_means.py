"""The benchmark of templates beside means lays each case where its templates lie on it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_plugin.transforms.placement import on_case

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
template_means = __import__("template_means")


@pytest.mark.parametrize("shape", [(6, 7, 8), (5, 6, 5), (4, 4, 3)])
def test_a_case_is_laid_where_the_templates_lie_on_it(shape):
    case = np.random.default_rng(0).random((2, *shape), np.float32)
    (laid,) = template_means._on_grid([case], (6, 7, 8))
    assert (on_case(torch.from_numpy(laid), shape).numpy() == case).all()
