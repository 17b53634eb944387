"""Further metrics through pyiqa: learned ones, with and without a reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMES = ("lpips", "dists", "niqe", "musiq")


def load_metrics(names: list[str], device: str) -> dict[str, Callable[[torch.Tensor, torch.Tensor], float]]:
    """Metrics by name, each (output, original) -> value, both (1, 3, H, W) in [0, 1]. Their weights are downloaded once.

    Raises:
        ImportError: pyiqa is missing. ValueError: it knows no such metric, or cannot load it.
    """
    if not names:
        return {}
    try:
        import pyiqa
    except ImportError as error:
        raise ImportError(
            f"the metrics {', '.join(names)} are computed by the package pyiqa, which cannot be imported ({error}):"
            " install it with `pip install 'qartsr[metrics]'`, or leave --metrics out"
        ) from error
    return {name: _load(pyiqa, name, device) for name in names}


def _load(pyiqa, name: str, device: str) -> Callable[[torch.Tensor, torch.Tensor], float]:
    try:
        model = pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:
        raise ValueError(
            f"the metric {name!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}): check its name"
            " with pyiqa.list_models() and, on first use, the network"
        ) from error

    def measure(output: torch.Tensor, original: torch.Tensor) -> float:
        pictures = (output, original) if model.metric_mode == "FR" else (output,)
        with torch.no_grad():
            return float(model(*(picture.to(device) for picture in pictures)))

    return measure
