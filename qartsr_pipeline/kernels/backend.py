"""The interface that every backend implements, and what it demands of machine, device and layer: declared as data."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from qartsr_pipeline.arithmetic.affine import BITS
from qartsr_pipeline.kernels import compiled
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer

X86 = ("x86_64", "amd64")


@dataclass(frozen=True)
class Constraints:
    """Demands on one kind of device. A backend has one of these per kind of device it runs on.

    Attributes:
        device: type of device, "cpu" or "cuda".
        machines: `platform.machine()` in lower case must be one of these; empty for any.
        operators: names under `torch.ops` that this build of torch must have, such as "onednn.qconv_prepack".
        loops: whether it runs loops that numba compiles.
        slow_without_vnni: x86 processors without VNNI are refused: the operator runs there, many times slower than the reference.
        capability: smallest CUDA compute capability, (major, minor).
        kinds, weight_bits, activation_bits: what a layer may be.
        kernel_size, stride: of convolutions; None for any.
        channel_multiple, fewest_channels: inputs and outputs must both be multiples of this, and as many.
        shortest_sum, longest_sum: fewest and most products in one output element: inputs x taps.
        needs_vnni: pairs (weight bits, activation bits) whose products overflow the 16-bit sums of x86 processors without VNNI.
        grids: of activations, as `LayerSpec.grid` has them.
        has_vnni: tries out whether this backend's operator has wider sums here. What the processor has may be switched off for
            oneDNN, and which operators go through oneDNN differs between processors.
    """

    device: str
    machines: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    loops: bool = False
    slow_without_vnni: bool = False
    capability: tuple[int, int] | None = None
    kinds: tuple[str, ...] = ("linear", "conv2d")
    weight_bits: tuple[int, ...] = BITS
    activation_bits: tuple[int, ...] = BITS
    kernel_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    channel_multiple: int = 1
    fewest_channels: int = 1
    shortest_sum: int = 1
    longest_sum: int | None = None
    needs_vnni: frozenset[tuple[int, int]] = frozenset()
    grids: tuple[str, ...] = ("tensor", "token")
    has_vnni: Callable[[], bool] = lambda: True


def machine_lacks(constraints: Constraints) -> str | None:
    """Why nothing can run here under these constraints, None if something can."""
    machine = platform.machine().lower()
    if constraints.machines and machine not in constraints.machines:
        return f"the processor is {machine}, not {' or '.join(constraints.machines)}"
    missing = [name for name in constraints.operators if not _has_operator(name)]
    if missing:
        return f"torch {torch.__version__} has no operator {missing[0]}"
    if constraints.loops and (reason := compiled.unavailable()):
        return reason
    if constraints.slow_without_vnni and machine in X86 and not torch.cpu._is_vnni_supported():
        return "the processor has no VNNI, without which this product is slower than the reference"
    if constraints.device != "cuda":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if constraints.capability is not None and found < constraints.capability:
        return "CUDA capability {}.{} is below {}.{}".format(*found, *constraints.capability)
    return None


def layer_lacks(constraints: Constraints, spec: LayerSpec) -> str | None:
    """Why such a layer cannot be computed under these constraints on a machine that lacks nothing, None if it can."""
    if spec.kind not in constraints.kinds:
        return f"{spec.kind} layers are not supported"
    if spec.grid not in constraints.grids:
        return f"activations on the {spec.grid} grid are not supported"
    for what in ("weight", "activation"):
        bits, known = getattr(spec, f"{what}_bits"), getattr(constraints, f"{what}_bits")
        if bits not in known:
            return f"{what}s have {bits} bits, not one of {known}"
    for what in ("kernel_size", "stride"):
        found, wanted = getattr(spec, what), getattr(constraints, what)
        if wanted not in (None, found):
            return "the {} is {} x {}, not {} x {}".format(what.replace("_", " "), *found, *wanted)
    fewest = constraints.fewest_channels
    if min(spec.in_channels, spec.out_channels) < fewest:
        return f"{spec.in_channels} inputs and {spec.out_channels} outputs are not both {fewest} or more"
    multiple = constraints.channel_multiple
    if spec.in_channels % multiple or spec.out_channels % multiple:
        return f"{spec.in_channels} inputs and {spec.out_channels} outputs are not both multiples of {multiple}"
    terms = spec.in_channels * spec.taps
    if terms < constraints.shortest_sum:
        return f"an output sums {terms} products, fewer than {constraints.shortest_sum}"
    if constraints.longest_sum is not None and terms > constraints.longest_sum:
        return f"an output sums {terms} products, more than {constraints.longest_sum}"
    if (spec.weight_bits, spec.carried_bits) in constraints.needs_vnni and not constraints.has_vnni():
        return f"W{spec.weight_bits}A{spec.activation_bits} needs a processor with VNNI"
    return None


def unmet(alternatives: tuple[Constraints, ...], spec: LayerSpec, device: str) -> str | None:
    """The first demand that such a layer on such a device does not meet, None if all are met or there are none."""
    if not alternatives:
        return None
    for constraints in alternatives:
        if constraints.device == device:
            return machine_lacks(constraints) or layer_lacks(constraints, spec)
    return f"it does not run on {device}"


def unavailable_because(alternatives: tuple[Constraints, ...]) -> str | None:
    """Why a backend with these constraints cannot run on this machine at all, None if it can."""
    reasons = []
    for constraints in alternatives:
        reason = machine_lacks(constraints)
        if reason is None:
            return None
        reasons.append(reason)
    return "; ".join(reasons) or None


def _has_operator(name: str) -> bool:
    namespace, operator = name.split(".")
    return hasattr(getattr(torch.ops, namespace), operator)


class Backend(Protocol):
    """One way to compute deployed layers. A new one subclasses this, and is entered into the table in `dispatch`.

    It states its `name` and `constraints` and computes whole layers (integer product, branch, bias). What it can compute follows
    from the constraints.
    """

    @property
    def name(self) -> str:
        """As in `list_backends`, `use_backend` and QARTSR_BACKEND."""

    @property
    def constraints(self) -> tuple[Constraints, ...]:
        """What it demands of machine, device and layer, one entry for each kind of device it runs on; empty for no demands."""

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """(..., C) -> (..., N), in x's dtype."""

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, H', W'), in x's dtype."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all, None if it can."""
        return unavailable_because(self.constraints)

    def unsupported(self, spec: LayerSpec, device: str) -> str | None:
        """Why it cannot compute such a layer on this type of device ("cpu", "cuda", ...), None if it can."""
        return unmet(self.constraints, spec, device)

    def preferred_for(self, spec: LayerSpec) -> bool:
        """Whether it is used for such a layer here, if it can compute it and nobody asks for another."""
        return True

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        """Makes what it keeps in `layer.prepared` for inputs of this dtype, as the layer's first call does."""
        return None

    def norm_fusion(self) -> NormFusion | None:
        """Its convolution with a GroupNorm in the same pass, None if it has none."""
        return None


class NormFusion(Protocol):
    """A convolution that applies GroupNorm and SiLU to its input while it quantizes it."""

    def group_scale_shift(self, x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x (B, C, H, W) as one factor and one summand a channel: float32 (B, C), twice."""

    def norm_conv2d(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        layer: StoredLayer,
        silu: bool,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``conv2d(silu(x * scale + shift)) + residual``, in x's dtype.

        Args:
            x: (B, C, H, W).
            scale, shift: float32 (B, C).
            silu: whether SiLU is applied.
            residual: of the output's shape and dtype; None adds nothing.
        """
