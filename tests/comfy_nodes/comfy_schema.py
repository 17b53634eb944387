"""ComfyUI's schema of nodes (`comfy_api.latest.io`) as far as the nodes use it: it refuses what the real one refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

# Options of `Input` for every type, and more for those with a widget.
INPUT = {"display_name", "optional", "tooltip", "lazy", "extra_dict"}
WIDGET = INPUT | {"default", "socketless"}
NUMBER = WIDGET | {"force_input", "min", "max", "step", "control_after_generate", "display_mode"}
INPUTS = {
    "BOOLEAN": WIDGET | {"force_input", "label_on", "label_off"},
    "INT": NUMBER,
    "FLOAT": NUMBER | {"round"},
    "STRING": WIDGET | {"force_input", "multiline", "placeholder", "dynamic_prompts"},
    "COMBO": WIDGET | {"options", "control_after_generate", "upload", "image_folder", "remote"},
    "IMAGE": INPUT,
    "MASK": INPUT,
    "VIDEO": INPUT,
    "CONDITIONING": INPUT,
}
VALUES = {"BOOLEAN": bool, "INT": int, "FLOAT": float, "STRING": str}


class Declared:
    """An input or output of a node.

    Attributes:
        io_type: such as "INT".
        id, and an attribute for every option; those that were not given are None.
    """

    def __init__(self, io_type: str, id: str | None, allowed: set[str], options: dict[str, Any]):
        unknown = options.keys() - allowed
        if unknown:
            raise TypeError(f"{io_type} {id!r} got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self.io_type, self.id, self.optional = io_type, id, False
        vars(self).update(dict.fromkeys(allowed) | {"optional": False} | options)


def io_type(name: str) -> SimpleNamespace:
    """A type of inputs and outputs, as `io.Int` and `io.Custom("MINE")` are."""

    def declare_input(id: str, *positional: Any, **options: Any) -> Declared:
        if positional:
            raise TypeError(f"{name} {id!r}: give options by name; their order differs from type to type")
        return Declared(name, id, INPUTS.get(name, INPUT), options)

    def declare_output(
        id: str | None = None, display_name: str | None = None, tooltip: str | None = None, is_output_list: bool = False
    ) -> Declared:
        options = {"display_name": display_name or id, "tooltip": tooltip, "is_output_list": is_output_list}
        return Declared(name, id, set(options), options)

    return SimpleNamespace(Input=declare_input, Output=declare_output)


@dataclass
class Schema:
    """Fields and defaults as in ComfyUI."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Declared] = field(default_factory=list)
    outputs: list[Declared] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    not_idempotent: bool = False
    search_aliases: list[str] = field(default_factory=list)  # not in older versions

    def validate(self) -> None:
        """Raises ValueError for ids that are not unique, and for defaults that the frontend would refuse or change."""
        for declared in (self.inputs, self.outputs):
            twice = [id for id, count in Counter(each.id for each in declared).items() if count > 1]
            if twice:
                raise ValueError(f"{self.node_id}: ids must be unique, but {twice} are not")
        for each in self.inputs:
            _check_default(each, f"{self.node_id}.{each.id}")


def _check_default(each: Declared, name: str) -> None:
    kind = VALUES.get(each.io_type)
    if kind and type(each.default) is not kind:
        raise ValueError(f"{name}: the default {each.default!r} is not a {kind.__name__}")
    if each.io_type in ("INT", "FLOAT"):
        if each.min is None or each.max is None or not each.min <= each.default <= each.max:
            raise ValueError(f"{name}: the default {each.default!r} is not between {each.min!r} and {each.max!r}")
    if each.io_type == "COMBO" and each.default is not None and each.default not in each.options:
        raise ValueError(f"{name}: the default {each.default!r} is not one of {each.options!r}")


class ComfyNode:
    """A node; its methods are class methods."""


class NodeOutput:
    """The results of a node, in the order of its outputs, and what is shown on it."""

    def __init__(self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None):
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution


def multi_type_input(id: str, types: list[SimpleNamespace], **options: Any) -> Declared:
    """An input that takes any of several types."""
    return Declared(",".join(each.Output().io_type for each in types), id, INPUT, options)


TYPES = {"Combo": "COMBO", "String": "STRING", "Int": "INT", "Float": "FLOAT", "Boolean": "BOOLEAN"}
TYPES |= {"Image": "IMAGE", "Mask": "MASK", "Video": "VIDEO", "Conditioning": "CONDITIONING"}
io = SimpleNamespace(
    **{name: io_type(kind) for name, kind in TYPES.items()},
    Custom=io_type,
    MultiType=SimpleNamespace(Input=multi_type_input),
    Schema=Schema,
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
)
