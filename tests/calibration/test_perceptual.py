"""LPIPS and DISTS: the packages' own values, gradients, and backbones that cannot be used."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from qartsr_pipeline.calibration import backbones as backbone_files
from qartsr_pipeline.calibration.backbones import LAYOUTS, VARIABLE, fetch_backbone, find_backbone, load_backbone, package_file
from qartsr_pipeline.calibration.evaluation import evaluate
from qartsr_pipeline.calibration.perceptual import Dists, Lpips, NormalizedDistance
from qartsr_pipeline.calibration.training.losses import EncoderFeatures, load_perceptual
from tiny_models import build_tiny_pipeline

WIDTHS = {
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    "alexnet": (64, 0, 192, 0, 384, 256, 256, 0),
}


@pytest.fixture(autouse=True)
def nothing_else_on_this_machine(monkeypatch, tmp_path_factory):
    """Neither a variable nor PyTorch's cache, which the machine of a developer may have."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("cache")))


def torchvision_features(network: str, folder) -> nn.Sequential:
    """torchvision's `features`, layer by layer, with the weights of a folder."""
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS[network]:
        kernel = {3: (11, 4, 2), 64: (5, 1, 2)}.get(channels, (3, 1, 1)) if network == "alexnet" else (3, 1, 1)
        pool = (3, 2) if network == "alexnet" else (2, 2)
        layers += [nn.Conv2d(channels, width, *kernel), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(*pool)]
        channels = width or channels
    features = nn.Sequential(*layers)
    state = load_file(find_backbone("vgg" if network == "vgg16" else "alex", folder))
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in state.items()})
    return features


@pytest.fixture
def packages(monkeypatch):
    """Imports lpips and DISTS_pytorch with a torchvision that gives the weights of a folder; skips where they are missing."""

    def load(folder):
        models = types.ModuleType("torchvision.models")
        for network in WIDTHS:
            build = lambda pretrained, network=network: types.SimpleNamespace(features=torchvision_features(network, folder))  # noqa: E731
            setattr(models, network, build)
        torchvision, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
        torchvision.models, torchvision.transforms = models, transforms
        for module in (torchvision, models, transforms):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for name in [name for name in sys.modules if name.split(".")[0] in ("lpips", "DISTS_pytorch")]:
            del sys.modules[name]  # imported anew: they hold on to the torchvision that they found
        lpips, dists = pytest.importorskip("lpips"), pytest.importorskip("DISTS_pytorch.DISTS_pt")
        return lpips, dists

    return load


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """A part of a photograph and the same reduced and enlarged, (1, 3, 72, 100) in [-1, 1]."""
    image = Image.open(files("qartsr_pipeline") / "samples" / "rider.jpg").convert("RGB").crop((160, 60, 260, 132))
    blurred = image.resize((25, 18), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    high, low = (
        torch.from_numpy(np.asarray(each).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for each in (image, blurred)
    )
    return low, high


def check_against_packages(lpips, dists, folder):
    """What `evaluate` measures is what the packages compute."""
    low, high = photographs()
    theirs = {name: lpips.LPIPS(net=net, verbose=False)(low, high) for name, net in (("lpips", "alex"), ("lpips_vgg", "vgg"))}
    model = dists.DISTS(load_weights=False)  # which it would look for in sys.prefix
    shares = torch.load(package_file("DISTS_pytorch", "dists-pytorch", "weights.pt"), weights_only=True)
    model.alpha.data, model.beta.data = shares["alpha"], shares["beta"]
    theirs["dists"] = model((low + 1) / 2, (high + 1) / 2)
    options = {"metrics": list(theirs), "backbones": folder, "peers": {"low": lambda _: (low + 1) / 2}}
    row = evaluate({}, [(high + 1) / 2], **options)[1]
    assert list(row.values) == list(theirs) and all(value.item() > 1e-3 for value in theirs.values())
    assert row.values == pytest.approx({name: value.item() for name, value in theirs.items()}, rel=1e-5)


def test_the_values_are_the_packages_own(packages, backbones):
    check_against_packages(*packages(backbones), backbones)


FOLDER = os.environ.get(VARIABLE)


@pytest.mark.skipif(not FOLDER, reason=f"{VARIABLE} names no folder with the trained backbones")
def test_the_values_are_the_packages_own_with_the_trained_backbones(packages):
    check_against_packages(*packages(FOLDER), FOLDER)
    low, high = photographs()
    far = low + 0.3 * torch.randn(low.shape, generator=torch.Generator().manual_seed(0))
    for measure in (Lpips("alex", FOLDER), Lpips("vgg", FOLDER), Dists(FOLDER)):
        near = high + 0.02 * torch.randn(low.shape, generator=torch.Generator().manual_seed(0))
        assert measure(near, high) < measure(low, high) < measure(far, high)


def test_gradients_are_autograds(packages, backbones):
    lpips, _ = packages(backbones)
    # in float32, rounding decides at ReLU's edge; in flat areas of a photograph, which of equal values is pooled is up to PyTorch
    low, high = torch.rand(2, 1, 3, 48, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    gradients = []
    for measure in (lpips.LPIPS(net="vgg", verbose=False), Lpips("vgg", backbones)):
        image = low.clone().requires_grad_()
        measure.double()(image, high).mean().backward()
        gradients.append(image.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-12)


def test_the_written_out_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 5, 3, 4, generator=generator, dtype=torch.float64)
    weight, x = torch.rand(5, generator=generator, dtype=torch.float64), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: NormalizedDistance.apply(x, y, weight), x, rtol=1e-3)
    by_hand = ((x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)).square() * weight[:, None, None]).sum(1).mean()
    assert NormalizedDistance.apply(x, y, weight).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("kind, least", [("vgg", 16), ("alex", 31), ("dists", 16)])
def test_equal_images_are_at_distance_zero_and_small_ones_are_refused(kind, least, own_weights, backbones):
    measure = Dists(backbones) if kind == "dists" else Lpips(kind, backbones)
    image, wanted = (each[..., :40, :36] for each in photographs())
    assert measure(image, image).item() == pytest.approx(0, abs=1e-5) and measure(image, wanted) > 1e-4
    image, wanted = image.clone().requires_grad_(), wanted.clone().requires_grad_()
    measure(image, wanted).backward()
    assert image.grad.abs().sum() > 0 and wanted.grad is None
    assert measure(image[..., :least], wanted[..., :least]).isfinite()
    with pytest.raises(ValueError, match=rf"at least {least} x {least} pixels, got {least - 1} x 40"):
        measure(image[..., : least - 1], wanted[..., : least - 1])
    with pytest.raises(ValueError, match="images of one shape"):
        measure(image, wanted[..., :-1])


def test_backbones_are_found_where_they_are_said_to_be(backbones, tmp_path, monkeypatch):
    assert find_backbone("vgg") is None and find_backbone("alex") is None
    assert find_backbone("vgg", backbones) == backbones / "vgg16.safetensors"
    assert find_backbone("vgg", backbones / "alexnet-owt.safetensors").name == "alexnet-owt.safetensors", (
        "files are taken as given"
    )
    cached = LAYOUTS["alex"].cached
    cached.parent.mkdir(parents=True)
    torch.save(load_file(backbones / "alexnet-owt.safetensors") | {"classifier.1.weight": torch.ones(1)}, cached)
    assert find_backbone("alex") == fetch_backbone("alex") == cached
    assert torch.equal(load_backbone("alex")["features.3.bias"], load_backbone("alex", backbones)["features.3.bias"])
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    assert find_backbone("alex") == cached
    for name in ("vgg16_bn-6c64b313.pth", "vgg16.txt", "vgg16-397923af.pth"):
        (folder / name).touch()
    assert find_backbone("vgg") == folder / "vgg16-397923af.pth"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=f"{VARIABLE} names .*nowhere.*correct or unset it"):
        find_backbone("vgg")


def test_a_missing_backbone_names_file_variable_and_network(tmp_path, monkeypatch):
    def offline(url, *_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for given, error in ((None, OSError), (tmp_path, FileNotFoundError), (tmp_path / "none.pth", FileNotFoundError)):
        with pytest.raises(error) as said:
            load_backbone("vgg", given)
        assert all(text in str(said.value) for text in ("vgg16", "safetensors", VARIABLE, "network"))
        assert given is None or str(given) in str(said.value)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_files_that_are_no_such_backbone_are_named_and_execute_nothing(backbones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(backbones / "alexnet-owt.safetensors", "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((backbones / "vgg16.safetensors").read_bytes()[:100_000])
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, "part.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "part.pth").read_bytes()[:-100])
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"features.0.weight": Hostile()}))
    torch.save({"features.0.weight": Hostile()}, "hostile.pt")
    torch.save([1, 2], "list.pt")
    state = load_file(backbones / "alexnet-owt.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, "half.safetensors")
    state["features.10.bias"][3] = float("nan")
    save_file(state, "nan.safetensors")
    for name, network, message in (
        ("other.safetensors", "vgg", "holds no features.0.weight of shape .* of another network than vgg16"),
        ("part.pth", "vgg", "holds no features.0.bias"),
        ("list.pt", "vgg", "of another network than vgg16"),
        ("half.safetensors", "alex", "in float32"),
        ("cut.safetensors", "vgg", "it is truncated, or no file of tensors alone"),
        ("cut.pth", "vgg", "it is truncated, or no file of tensors alone"),
        ("hostile.pth", "vgg", "no file of tensors alone"),
        ("hostile.pt", "vgg", "no file of tensors alone"),
        ("nan.safetensors", "alex", "features.10.bias holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message) as said:
            load_backbone(network, name)
        assert name in str(said.value)
    assert not (tmp_path / "hostile").exists()


def test_a_missing_package_names_the_commands_and_the_file(backbones, monkeypatch):
    monkeypatch.setattr(backbone_files, "find_spec", lambda name: None)
    vae = build_tiny_pipeline().vae
    for build, package in (
        (lambda: Lpips("vgg", backbones), "lpips"),
        (lambda: Dists(backbones), "dists-pytorch"),
        (lambda: load_perceptual("lpips", vae, backbones), "lpips"),
    ):
        with pytest.raises(ImportError, match=f"the package {package}") as said:
            build()
        assert all(text in str(said.value) for text in ("qartsr[metrics]", "--no-deps lpips dists-pytorch", VARIABLE))
    assert isinstance(load_perceptual("encoder", vae), EncoderFeatures)


def test_torchvision_is_not_needed(own_weights, backbones, monkeypatch):
    """It stops diffusers from loading where it does not match PyTorch; both packages import it."""
    for name in ("torchvision", "lpips", "DISTS_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert load_perceptual("lpips", build_tiny_pipeline().vae, backbones).name == "LPIPS (vgg)"
    assert Dists(backbones).name == "DISTS"
