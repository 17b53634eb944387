"""What is quantized how: dataclasses, and their JSON in a model's ``config.json`` under ``quantization_config``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from qartsr_pipeline.arithmetic import FORMAT_VERSION

LAYER_BITS = (2, 3, 4, 6, 8, 16)
GRIDS = ("tensor", "token")
LARGEST_ROTATION = 256
SINCE_VERSION_2 = ("grid", "rotation", "exponents")  # keys of a layer's scheme
_RENEW = "download the checkpoint again, or copy the folder again from its source."
_WRITTEN = f"it was edited, or written by something else; {_RENEW}"


@dataclass(frozen=True)
class LayerScheme:
    """How one linear or convolution layer is quantized.

    Attributes:
        weight_bits: 2, 3, 4, 6, 8; 16 means that weights are kept in 16-bit floating point.
        activation_bits: the same for the layer's input; 16 means no quantizer.
        rank: rank of the 16-bit low-rank branch, 0 for none. Clamped to what the layer's shape admits.
        grid: of a linear layer's input. "tensor": one static scale and zero point. "token": symmetric, with a scale for each
            token that it gives itself at run time (`arithmetic.token_grid`). Convolutions are always on the tensor grid.
        rotation: on the token grid, size of the Hadamard matrices that rotate the input, a power of two: the largest that divides
            the layer's inputs, up to this one; 0 for none.
        exponents: on the token grid, whether input channels have static scales as well, powers of two.

    Weights have one scale and zero point per output channel.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    rank: int = 0
    grid: str = "tensor"
    rotation: int = 0
    exponents: bool = False

    def __post_init__(self):
        for name in ("weight_bits", "activation_bits"):
            value = getattr(self, name)
            if not _is_integer(value) or value not in LAYER_BITS:
                raise ValueError(
                    f"{name} is {repr(value)[:80]}, expected one of {LAYER_BITS}: no layer is computed with others. Choose one of"
                    f" these; in a stored quantization_config, {_RENEW}"
                )
        if not _is_integer(self.rank) or self.rank < 0:
            raise ValueError(
                f"rank is {repr(self.rank)[:80]}, expected an integer >= 0: it is the inner dimension of a layer's branch. Give 0"
                f" for no branch; in a stored quantization_config, {_RENEW}"
            )
        self._check_grid()

    def _check_grid(self) -> None:
        size, token = self.rotation, self.grid == "token"
        expected = {
            "grid": (self.grid in GRIDS, f"one of {GRIDS}"),
            "rotation": (
                _is_integer(size) and 0 <= size <= LARGEST_ROTATION * token and not size & (size - 1),
                f"0 or, on the token grid, a power of two up to {LARGEST_ROTATION}",
            ),
            "exponents": (
                isinstance(self.exponents, bool) and (token and self.activation_bits < 16 or not self.exponents),
                "true or false, and false but on the token grid with activations below 16 bits",
            ),
        }
        for name, (fits, what) in expected.items():
            if not fits:
                raise ValueError(
                    f"{name} is {repr(getattr(self, name))[:80]}, expected {what}. In a stored quantization_config, {_RENEW}"
                )

    @property
    def version(self) -> int:
        """The first format_version that has such layers."""
        return 1 if all(getattr(self, name) == getattr(LayerScheme, name) for name in SINCE_VERSION_2) else 2

    @property
    def changes_nothing(self) -> bool:
        return self.weight_bits == 16 and self.activation_bits == 16 and self.rank == 0

    def rank_for(self, layer: nn.Linear | nn.Conv2d) -> int:
        """The rank that fits the layer: at most the smaller side of the weight's (outputs x taps, inputs) unfolding."""
        weight = layer.weight
        outputs = weight.shape[0] * (weight[0, 0].numel() if weight.dim() == 4 else 1)
        return min(self.rank, outputs, weight.shape[1])


@dataclass(frozen=True)
class Folding:
    """Which constants were folded: those of this timestep, and of a prompt of so many tokens (see `fold` and `fold_wan`)."""

    timestep: int
    tokens: int

    def __post_init__(self):
        for name, value, smallest in (("timestep", self.timestep, 0), ("tokens", self.tokens, 1)):
            if not _is_integer(value) or value < smallest:
                raise ValueError(
                    f"folding has {name} {repr(value)[:80]}, expected an integer >= {smallest}: constants of one timestep and of"
                    f" a prompt with so many tokens were folded. In a stored quantization_config, {_RENEW}"
                )


@dataclass(frozen=True)
class QuantizationScheme:
    """How a whole model is quantized.

    Attributes:
        default: for every linear and convolution layer that no override names.
        overrides: shell-style pattern of qualified layer names -> its scheme, or None to leave the layer as it is. The first
            matching pattern wins.
        folding: set if the constants of a UNet or a WAN transformer were folded.
    """

    default: LayerScheme = field(default_factory=LayerScheme)
    overrides: dict[str, LayerScheme | None] = field(default_factory=dict)
    folding: Folding | None = None

    def for_layer(self, name: str) -> LayerScheme | None:
        """The scheme of the layer with this qualified name, None if it stays as it is."""
        for pattern, scheme in self.overrides.items():
            if fnmatchcase(name, pattern):
                return None if scheme is None or scheme.changes_nothing else scheme
        return None if self.default.changes_nothing else self.default

    def to_dict(self) -> dict:
        """JSON types only. Overrides become a list of pairs: their order counts, and diffusers sorts the keys of JSON objects.

        What version 1 can say is written in version 1, which releases that know no other read as well.
        """
        version = max(scheme.version for scheme in (self.default, *filter(None, self.overrides.values())))
        names = _keys(LayerScheme, version)

        def content(scheme: LayerScheme | None) -> dict | None:
            return None if scheme is None else {name: getattr(scheme, name) for name in names}

        return {
            "format_version": version,
            "default": content(self.default),
            "overrides": [[pattern, content(scheme)] for pattern, scheme in self.overrides.items()],
            "folding": None if self.folding is None else asdict(self.folding),
        }

    @classmethod
    def from_dict(cls, data: dict) -> QuantizationScheme:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: for a newer format, unknown keys or values; the message names them.
        """
        data = dict(data)
        version = data.pop("format_version", None)
        if not _is_integer(version) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"the quantized weights have format_version {repr(version)[:80]}; this qartsr reads versions 1 to"
                f" {FORMAT_VERSION}. "
                "Upgrade it with `pip install --upgrade qartsr`, or use weights made for this version."
            )
        unknown = set(data) - {"default", "overrides", "folding"}
        if unknown:
            raise ValueError(f"quantization_config has unknown keys {sorted(map(str, unknown))}: {_WRITTEN}")
        if "default" not in data:
            raise ValueError(f"quantization_config lacks default, the scheme of every layer without its own: {_WRITTEN}")
        overrides, folding = data.get("overrides"), data.get("folding")
        return cls(
            _stored("default", data["default"], LayerScheme, version),
            _stored_overrides([] if overrides is None else overrides, version),
            None if folding is None else _stored("folding", folding, Folding, version),
        )


Stored = TypeVar("Stored", LayerScheme, Folding)


def _keys(kind: type, version: int) -> list[str]:
    """The keys that such an object has in that format_version."""
    return [part.name for part in fields(kind) if version > 1 or part.name not in SINCE_VERSION_2]


def _stored(label: str, value: object, kind: type[Stored], version: int) -> Stored:
    """The object that stands at `label` of a quantization_config; ValueError, with the label, if it is not complete."""
    names = _keys(kind, version)
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(
            f"quantization_config cannot be read: {label} is {str(value)[:120]}, not an object of exactly {', '.join(names)}:"
            f" {_WRITTEN}"
        )
    try:
        return kind(**value)
    except ValueError as error:
        raise ValueError(f"quantization_config cannot be read: in {label}, {error}") from error


def _stored_overrides(pairs: object, version: int) -> dict[str, LayerScheme | None]:
    overrides: dict[str, LayerScheme | None] = {}
    for pair in pairs if isinstance(pairs, (list, tuple)) else [pairs]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str) or pair[0] in overrides:
            raise ValueError(
                f"quantization_config cannot be read: overrides holds {str(pair)[:120]}, not a pair of a pattern that occurs once"
                f" and a layer's scheme or null: {_WRITTEN}"
            )
        pattern, value = pair
        overrides[pattern] = None if value is None else _stored(f"overrides, {pattern[:80]!r}", value, LayerScheme, version)
    return overrides


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def quantizable_layers(model: nn.Module, scheme: QuantizationScheme) -> dict[str, tuple[nn.Linear | nn.Conv2d, LayerScheme]]:
    """Qualified name -> (layer, its scheme) of every plain linear or convolution layer that the scheme quantizes.

    Grouped, dilated and not zero-padded convolutions have no quantized form and are left out.
    """
    layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
            if not plain or module.dilation != (1, 1):
                continue
        elif type(module) is not nn.Linear:
            continue
        layer_scheme = scheme.for_layer(name)
        if layer_scheme is not None:
            layers[name] = (module, layer_scheme)
    return layers


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` where the module of this qualified name is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
