"""A quantized convolution over frames side by side in channels, with the RMS norm and SiLU before it, on CPUs with numba.

Made of torch's operators, norm and SiLU pass over a map six times, and the maps of three frames are copied as floats. Here each
frame is read once, and its codes are written into the places of the three maps that see it.
"""

from __future__ import annotations

import torch

from qartsr_pipeline.kernels import compiled, compiled_clips
from qartsr_pipeline.kernels.cpu import OnCPU, dtype_on_cpu
from qartsr_pipeline.kernels.dispatch import choose_backend
from qartsr_pipeline.kernels.finite import note_input
from qartsr_pipeline.kernels.stored_layer import StoredLayer


def can_run_frames(x: torch.Tensor, layer: StoredLayer) -> bool:
    """Whether `normalized_frames_conv2d` takes x (1, C, T, H, W) and a layer for a multiple of C channels."""
    spec = layer.spec
    return (
        x.shape[0] == 1
        and compiled.can_run(x)
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and (spec.kind, spec.grid, spec.rank) == ("conv2d", "tensor", 0)
        and isinstance(choose_backend(spec, "cpu"), OnCPU)
    )


def normalized_frames_conv2d(
    x: torch.Tensor, before: torch.Tensor | None, weight: torch.Tensor, layer: StoredLayer, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution of ``silu(rms_norm(x))``.

    Args:
        x: (1, C, T, H, W).
        before: (1, C, t, H, W), normalized frames before x, at most as many as the layer looks back; None for none. Frames
            before these are zeros.
        weight: the norm's, times sqrt(C), (C,) float32.
        layer: its input channel number k C + c is channel c of the k-th frame, the earliest first.
        kept: how many of the last frames are wanted, normalized; at most T.

    Returns:
        (1, N, T, H', W') in x's dtype, channels-last; and (1, C, kept, H, W).
    """
    backend = choose_backend(layer.spec, "cpu")
    assert isinstance(backend, OnCPU)  # `can_run_frames`
    _, channels, frames, height, width = x.shape
    ready = backend.ready(layer, x.dtype, height * width)
    rows, earlier = _rows(x), None if before is None else _rows(before)
    taps = layer.spec.in_channels // channels
    codes, last, total = compiled_clips.quantize_frames(rows, earlier, weight, ready.grid(layer, backend.code_dtype), taps, kept)
    note_input(total)
    maps = codes.view(frames, height, width, -1).permute(0, 3, 1, 2)
    y = backend.conv2d_product(maps, ready, layer, dtype_on_cpu(x.dtype)).to(x.dtype)
    return y.transpose(0, 1)[None], last.view(kept, height, width, channels).permute(3, 0, 1, 2)[None]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(1, C, T, H, W) -> (T, H W, C), contiguous; a view of channels-last input."""
    return x[0].permute(1, 2, 3, 0).contiguous().flatten(1, 2)
