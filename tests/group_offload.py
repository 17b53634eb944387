"""Where diffusers' group offloading can be tested."""

import pytest
import torch
from diffusers import __version__
from packaging.version import Version

needs_group_offload = pytest.mark.skipif(
    Version(__version__) < Version("0.41") and not torch.accelerator.is_available(),
    reason="diffusers up to 0.40 offloads groups only where there is a GPU",
)
