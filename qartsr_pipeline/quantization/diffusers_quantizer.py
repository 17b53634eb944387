"""Makes stock diffusers load and save quantized models: config class, quantizer, registration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from qartsr_pipeline.quantization.deployed import DeployedLayer, deployed_like
from qartsr_pipeline.quantization.fold import fold_structure
from qartsr_pipeline.quantization.fold_wan import fold_wan_structure
from qartsr_pipeline.quantization.frames_as_channels import frames_as_channels
from qartsr_pipeline.quantization.fuse import fuse
from qartsr_pipeline.quantization.scheme import FORMAT_VERSION, QuantizationScheme, quantizable_layers, replace_module
from qartsr_pipeline.stored_values import StoredValueError, check_finite


class QArtSRMethod(str, Enum):
    """diffusers reads ``.value`` of the method's name."""

    QARTSR = "qartsr"


@dataclass
class QArtSRConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model: a `QuantizationScheme` in its JSON form. See `scheme` for the fields."""

    format_version: int = FORMAT_VERSION
    default: dict = field(default_factory=dict)
    overrides: list = field(default_factory=list)
    folding: dict | None = None
    quant_method: QArtSRMethod = QArtSRMethod.QARTSR  # type: ignore[assignment] # diffusers' own enum has no room for others

    def __post_init__(self):
        self.quant_method = QArtSRMethod(self.quant_method)
        self.scheme()

    def scheme(self) -> QuantizationScheme:
        """Raises ValueError if this is not a scheme that this version reads."""
        fields = ("format_version", "default", "overrides", "folding")
        return QuantizationScheme.from_dict({name: getattr(self, name) for name in fields})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QArtSRConfig | tuple[QArtSRConfig, dict[str, Any]]:
        """What diffusers calls with the JSON of ``config.json``; nothing in it is optional, nothing else may stand there.

        Raises:
            ValueError: for missing or unknown keys, a newer format, and whatever `QuantizationScheme` refuses.
        """
        data = {name: value for name, value in config_dict.items() if name != "quant_method"}
        config = cls.from_scheme(QuantizationScheme.from_dict(data))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def from_scheme(cls, scheme: QuantizationScheme) -> QArtSRConfig:
        return cls(**scheme.to_dict())


class QArtSRQuantizer(DiffusersQuantizer):
    """Exchanges layers before the weights are loaded, blocks after; keeps the stored dtypes of what belongs to quantization."""

    requires_calibration = True  # only folders that were quantized before can be loaded with it
    quantization_config: QArtSRConfig

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        scheme = self.quantization_config.scheme()
        if scheme.folding is not None:
            if isinstance(model, UNet2DConditionModel):
                fold_structure(model, scheme.folding)
            elif isinstance(model, WanTransformer3DModel):
                fold_wan_structure(model, scheme.folding)
            else:
                raise ValueError(
                    f"quantization_config has folding={scheme.folding}, but only a UNet or a transformer can be folded"
                )
        if isinstance(model, AutoencoderKLWan):
            frames_as_channels(model)
        for name, (layer, layer_scheme) in quantizable_layers(model, scheme).items():
            replace_module(model, name, deployed_like(layer, layer_scheme, layer.weight.device))

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """diffusers asks this before it loads, for all parts of a checkpoint together, and would initialize what is missing."""
        if missing_keys:
            raise ValueError(
                f"the checkpoint lacks {len(missing_keys)} tensors of this quantized model, the first is {min(missing_keys)!r}: "
                "it is incomplete, or its quantization_config was edited. Download or make it again"
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        """Raises StoredValueError for values that no layer can compute with."""
        for name, layer in model.named_modules():
            flaw = layer.joint_flaw() if isinstance(layer, DeployedLayer) else None
            if flaw is not None:
                raise StoredValueError(name, f"has values that do not go together: {flaw}")
        check_finite(model)
        fuse(model)
        return model

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), DeployedLayer)

    def create_quantized_param(  # type: ignore[override] # the base class has *args, and returns nothing either
        self,
        model: ModelMixin,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        parent, _, name = param_name.rpartition(".")
        layer = cast(DeployedLayer, model.get_submodule(parent))
        stored = state_dict[param_name]  # param_value was cast to the model's dtype
        expected = layer.get_buffer(name)
        # diffusers drops what the model has no place for; a dropped branch would spoil the image without a word
        surplus = [n for n, buffer in layer._buffers.items() if buffer is None and f"{parent}.{n}" in state_dict]
        if surplus:
            raise ValueError(
                f"the checkpoint holds {parent}.{surplus[0]}, for which quantization_config leaves no place: "
                "the weights do not belong to this quantization_config"
            )
        if stored.dtype != expected.dtype or stored.shape != expected.shape:
            raise ValueError(
                f"{param_name} is {stored.dtype} {tuple(stored.shape)}, expected {expected.dtype} {tuple(expected.shape)}: "
                "the weights do not belong to this quantization_config"
            )
        flaw = layer.flaw(name, stored)
        if flaw is not None:
            raise StoredValueError(param_name, flaw)
        layer._buffers[name] = stored.to(target_device)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def attach_quantizer(model: nn.Module, scheme: QuantizationScheme) -> None:
    """Marks a model quantized in memory as such, so that `save_pretrained` records how.

    Raises:
        TypeError: for a model that is not diffusers'.
    """
    if not isinstance(model, ConfigMixin):
        raise TypeError(f"{type(model).__name__} is not a model of diffusers, so its quantization_config cannot be stored")
    config = QArtSRConfig.from_scheme(scheme)
    marks = {"hf_quantizer": QArtSRQuantizer(config, pre_quantized=True), "is_quantized": True}
    for name, value in (marks | {"quantization_method": config.quant_method}).items():
        setattr(model, name, value)
    model.register_to_config(quantization_config=config)


def attached_scheme(model: nn.Module) -> QuantizationScheme | None:
    """The scheme that a loaded or frozen model was quantized with, None if it was not quantized by this package."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config.scheme() if isinstance(quantizer, QArtSRQuantizer) else None


def register() -> None:
    """Adds "qartsr" to the methods that diffusers knows. Doing it twice changes nothing."""
    auto.AUTO_QUANTIZER_MAPPING[QArtSRMethod.QARTSR.value] = QArtSRQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QArtSRMethod.QARTSR.value] = QArtSRConfig
