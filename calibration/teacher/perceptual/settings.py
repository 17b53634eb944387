"""What the phase ``photo`` of the trainer adds up its loss from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

PHOTO = "photo"  # the phase's name
TERMS = ("l1", "lpips", "lpips_alex", "dists", "adversarial")
DISCRIMINATORS = ("patch", "unet")  # the keys of `losses.DISCRIMINATORS`


@dataclass(frozen=True)
class PhotoSettings:
    """Weights of the terms, and where they come from. A term of weight 0 is not computed.

    Attributes:
        l1, lpips, lpips_alex, dists, adversarial: weights; images are in [-1, 1].
        in_turn: LPIPS (VGG16) and DISTS, three quarters of a step's time, take turns, each with twice its weight.
        backbone: file of VGG16's features, for LPIPS and DISTS; see `qartsr_pipeline.calibration.perceptual`.
        alex: file of AlexNet's features, for ``lpips_alex``; validation reports LPIPS (Alex) where it is given.
        stages: of VGG16 that LPIPS looks at, 1 to 5.
        discriminator: a name in `DISCRIMINATORS`. discriminator_lr: its constant learning rate.
        distilled: folder of pairs with another upscaler's outputs; see `distilled_pairs`.
        distilled_share: of every batch that is taken from there, 0 to 1.
    """

    l1: float = 1.0
    lpips: float = 1.0
    lpips_alex: float = 0.0
    dists: float = 0.0
    adversarial: float = 0.0
    in_turn: bool = False
    backbone: str | None = None
    alex: str | None = None
    stages: int = 4
    discriminator: str = "patch"
    discriminator_lr: float = 2e-4
    distilled: str | None = None
    distilled_share: float = 0.25

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in TERMS}
        if min(weights.values()) < 0 or not any(weights.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in weights.items())
            raise ValueError(f"weights of the photo phase's losses ({shown}): none may be negative, one must be above 0")
        if (self.lpips or self.dists) and not self.backbone:
            raise ValueError(
                "LPIPS and DISTS look through VGG16: give its features with --backbone FILE.safetensors, or set --lpips 0"
                " --dists 0"
            )
        if self.in_turn and not (self.lpips and self.dists):
            raise ValueError("--in-turn is for LPIPS and DISTS together: give both a weight, or leave it out")
        if self.lpips_alex and not self.alex:
            raise ValueError(
                "LPIPS (Alex) as a term of the loss needs AlexNet's features: --alex FILE.safetensors, or --lpips-alex 0"
            )
        if not 0 <= self.distilled_share <= 1 or not 1 <= self.stages <= 5:
            raise ValueError("--distilled-share must be from 0 to 1, --stages from 1 to 5")


def add_photo_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings as options of the trainer."""
    group = parser.add_argument_group(
        "phase photo", "everything trains, on weighted L1 + LPIPS (VGG) + DISTS + the verdict of a discriminator"
    )
    for name, text in (
        ("l1", "absolute difference"), ("lpips", "LPIPS, VGG16"), ("lpips_alex", "LPIPS, AlexNet"), ("dists", "DISTS"),
        ("adversarial", "discriminator's verdict"),
    ):  # fmt: skip
        default = getattr(PhotoSettings, name)
        text = f"of the {text} (default: {default:g})"
        group.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, metavar="WEIGHT", help=text)
    text = "LPIPS (VGG16) and DISTS take turns, each with twice its weight: a step takes a third less time"
    group.add_argument("--in-turn", action="store_true", help=text)
    group.add_argument("--backbone", metavar="FILE", help="VGG16's features as .safetensors, in torchvision's names")
    group.add_argument("--alex", metavar="FILE", help="AlexNet's: validations then report LPIPS (Alex)")
    group.add_argument("--stages", type=int, default=PhotoSettings.stages, help="of VGG16 for LPIPS (default: %(default)s)")
    group.add_argument("--discriminator", choices=DISCRIMINATORS, default=PhotoSettings.discriminator)
    group.add_argument("--discriminator-lr", type=float, default=PhotoSettings.discriminator_lr, metavar="LR")
    group.add_argument("--distilled", metavar="FOLDER", help="pairs to distil from, of calibration.teacher.make_pairs")
    share = PhotoSettings.distilled_share
    text = "of every batch that is taken from there (default: %(default)s)"
    group.add_argument("--distilled-share", type=float, metavar="SHARE", default=share, help=text)
