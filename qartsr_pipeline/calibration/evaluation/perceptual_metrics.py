"""Further metrics through pyiqa: learned ones, with and without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

NAMES = ("lpips", "dists", "niqe", "musiq", "maniqa", "clipiqa")  # as pyiqa.list_models() has them


@dataclass(frozen=True)
class PyiqaMetric:
    """A metric of pyiqa as a function of two pictures.

    Attributes:
        needs_reference: False for one that looks at the output alone.
    """

    name: str
    model: Any
    needs_reference: bool
    device: str

    @torch.no_grad()
    def __call__(self, output: torch.Tensor, original: torch.Tensor) -> float:
        """The value of ``output``; both pictures are (1, 3, H, W) in [0, 1].

        Raises:
            ValueError: the metric cannot take the picture; some need a minimum size.
        """
        pictures = (output, original) if self.needs_reference else (output,)
        try:
            return float(self.model(*(picture.to(self.device) for picture in pictures)))
        except (RuntimeError, ValueError, AssertionError) as error:
            size = f"{output.shape[-1]} x {output.shape[-2]}"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                f"the metric {self.name!r} failed on {size} pixels ({reason}): leave it out or the picture, or free memory"
            ) from error


def load_metrics(names: list[str], device: str) -> dict[str, PyiqaMetric]:
    """Metrics by name. Their weights are downloaded once.

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


def _load(pyiqa: Any, name: str, device: str) -> PyiqaMetric:
    try:
        model = pyiqa.create_metric(name, device=torch.device(device))
    except Exception as error:
        raise ValueError(
            f"the metric {name!r} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}): check its name"
            " with pyiqa.list_models() and, on first use, the network"
        ) from error
    return PyiqaMetric(name, model, model.metric_mode == "FR", device)
