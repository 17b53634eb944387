"""The nodes' schemas, the list of models, and an upscale through the node's function, without ComfyUI."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, make_dataclass
from inspect import signature
from pathlib import Path

import comfy_schema
import pytest
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, shipped_checkpoints, shipped_labels

ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "QArtSRLoadModel",
    "QArtSRUpscale",
    "QArtSRModelInfo",
    "QArtSRQuantize",
    "QArtSRImport",
    "QArtSRLoadFolder",
]  # only ever added to: they stand in users' workflows


@pytest.fixture
def model(comfy, tiny_folder):
    from comfy_nodes.managed_model import load_model

    return load_model("tiny", tiny_folder, "auto", "auto")


def upscale(nodes, model, image, mask=None, **changes):
    options = {"scale": 4.0, "long_side": 0, "tile_size": 0, "tile_overlap": 0, "color_fix": "wavelet"}
    options |= {"sample_posterior": False, "seed": 0} | changes
    return nodes["QArtSRUpscale"].execute(model=model, image=image, mask=mask, **options).args


def test_every_node_has_its_id_tooltips_and_a_help_page(nodes):
    assert list(nodes) == IDS
    for name, node in nodes.items():
        assert all(each.tooltip for each in node.define_schema().inputs), name
        assert (ROOT / "comfy_nodes" / "web" / "docs" / f"{name}.md").is_file()


def test_nodes_take_what_their_schemas_declare(nodes):
    """ComfyUI passes inputs by name: all to `execute`, and to the other two those that they name, or all with `**`."""
    for name, node in nodes.items():
        inputs = {each.id: each.optional for each in node.define_schema().inputs}
        parameters = signature(node.execute).parameters
        assert list(parameters) == list(inputs), name
        assert [each.default is not each.empty for each in parameters.values()] == list(inputs.values()), name
        for method in ("validate_inputs", "fingerprint_inputs"):
            named = signature(getattr(node, method)).parameters.values() if method in vars(node) else ()
            assert {each.name for each in named if each.kind is not each.VAR_KEYWORD} <= inputs.keys(), (name, method)


def test_search_finds_upscale_by_what_people_call_it(nodes, monkeypatch):
    node = nodes["QArtSRUpscale"]
    assert {"upscale", "super resolution", "enhance", "enlarge", "4x"} <= set(node.define_schema().search_aliases)
    older = [(field.name, field.type, field) for field in fields(comfy_schema.Schema) if field.name != "search_aliases"]
    monkeypatch.setattr(comfy_schema.io, "Schema", make_dataclass("Schema", older))
    assert node.define_schema().node_id == "QArtSRUpscale"


def test_nodes_of_others_take_the_model(nodes, comfy, tiny_folder):
    """As core's Upscale Image (using Model) does: bytes, device, a call for each tile, and `cpu` at the end."""
    import folder_paths

    shutil.copytree(tiny_folder, Path(folder_paths.models_dir) / "qartsr" / "base")
    node = nodes["QArtSRLoadModel"]
    assert [output.io_type for output in node.define_schema().outputs] == ["QARTSR_MODEL", "UPSCALE_MODEL"]
    loaded, upscale_model = node.execute(model="base", hub_id="", backend="auto", dtype="auto").args
    assert sum(tensor.numel() for tensor in upscale_model.model.state_dict().values()) > 1000 and upscale_model.scale == 4
    image = torch.rand(2, 12, 10, 3)
    upscale_model.to(torch.device("cpu"))
    result = upscale_model(image.movedim(-1, -3))
    assert torch.equal(result.movedim(-3, -1), upscale(nodes, loaded, image)[0])
    grey, clear = torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    rgb = grey.expand(1, 3, 8, 8)
    assert (
        torch.equal(upscale_model(grey), upscale_model(torch.cat([rgb, clear], 1)))
        and upscale_model(grey.half()).dtype == torch.half
    )
    # newer versions of core, and nodes of others
    assert upscale_model.patcher is loaded.patcher and upscale_model.device == upscale_model.patcher.load_device
    assert upscale_model.cpu() is upscale_model.eval() is upscale_model.to(dtype=torch.half) is upscale_model
    assert not upscale_model.supports_half and upscale_model.input_channels == upscale_model.output_channels == 3
    dtypes = [tensor.dtype for tensor in upscale_model.model.state_dict().values()]
    upscale_model.model.to(torch.device("cpu"), torch.half).half()  # would round the scales of quantized layers
    assert dtypes == [tensor.dtype for tensor in upscale_model.model.state_dict().values()]
    comfy.cancel_at = comfy.looked
    with pytest.raises(Exception) as raised:
        upscale_model(rgb)
    assert type(raised.value).__name__ == "InterruptProcessingException"


def test_the_list_of_models_has_own_ones_first_and_says_what_each_is_for(nodes, comfy, tiny_folder):
    import folder_paths

    shutil.copytree(tiny_folder, Path(folder_paths.models_dir) / "qartsr" / "zebra")
    model = nodes["QArtSRLoadModel"].define_schema().inputs[0]
    assert model.id == "model" and model.default == DEFAULT_CHECKPOINT
    assert model.options[:3] == ["zebra", DEFAULT_CHECKPOINT, "photo-w8a8"] and set(model.options[1:]) == set(shipped_labels())
    labels = model.extra_dict["qartsr_labels"]
    assert labels == {"zebra": labels["zebra"], **shipped_labels()} and labels["zebra"].startswith("full precision")
    (Path(folder_paths.models_dir) / "qartsr" / "zebra" / "unet" / "config.json").write_text("{")
    assert "zebra" in nodes["QArtSRLoadModel"].define_schema().inputs[0].options


def test_a_schema_that_comfyui_would_refuse_is_refused_here():
    """The stand-in is as strict as ComfyUI's own."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'maximum'"):
        comfy_schema.io.Int.Input("steps", default=0, maximum=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'multiline'"):
        comfy_schema.io.Image.Input("image", multiline=True)
    for wrong, message in (
        ([comfy_schema.io.Int.Input("steps", default=9, min=0, max=3)], "not between"),
        ([comfy_schema.io.Combo.Input("kind", options=["a"], default="b")], "is not one of"),
        ([comfy_schema.io.Image.Input("image"), comfy_schema.io.Mask.Input("image")], "must be unique"),
    ):
        with pytest.raises(ValueError, match=message):
            comfy_schema.io.Schema(node_id="Wrong", inputs=wrong).validate()


def test_models_are_found_in_every_path_and_other_folders_are_not(comfy, tiny_folder, tmp_path):
    import folder_paths

    from comfy_nodes.model_folders import find_models, folder_of, register_model_folder

    extra = tmp_path / "extra"
    folder_paths.folder_names_and_paths["qartsr"] = ([str(extra)], set())
    register_model_folder()
    own = Path(folder_paths.models_dir) / "qartsr"
    shutil.copytree(tiny_folder, own / "owner" / "name")
    shutil.copytree(tiny_folder, extra / "mine")
    shutil.copytree(tiny_folder, own / ".downloads" / "unfinished")
    for name, content in (("broken", "{"), ("other", '{"_class_name": "StableDiffusionPipeline"}')):
        (own / name).mkdir()
        (own / name / "model_index.json").write_text(content)
    found = find_models()
    assert {"owner/name", "mine", "tiny-w4a4"} <= set(found)
    assert not {"broken", "other", ".downloads/unfinished"} & set(found)
    shutil.rmtree(extra / "mine")
    with pytest.raises(ValueError, match="'mine' any more"):
        folder_of("mine")


def test_values_that_are_not_in_the_list_are_refused(nodes, comfy):
    """Before the run where a single input of the node is checked, because ComfyUI repeats the message for each of them."""
    load = nodes["QArtSRLoadModel"]
    assert load.validate_inputs(model="tiny-w4a4") is True and "'gone' any more" in load.validate_inputs(model="gone")
    inputs = {"model": "gone", "hub_id": "", "backend": "auto", "dtype": "auto"}
    (remember,) = comfy.handlers
    for hub_id, said in (("owner/name", True), (["3", 0], True), (" ", "any more")):
        request = {"prompt": {"2": {"class_type": "QArtSRLoadModel", "inputs": inputs | {"hub_id": hub_id}}, "3": None}}
        assert remember(request) is request
        answer = load.validate_inputs(model="gone")
        assert answer is True if said is True else said in answer
    for name, value in (("backend", "no-such"), ("dtype", "int5"), ("model", "gone")):
        with pytest.raises(ValueError, match=f"'{value}'"):
            load.execute(**inputs | {"model": "tiny-w4a4", name: value})
    assert "'x'" in nodes["QArtSRUpscale"].validate_inputs(color_fix="x")


def test_connected_and_missing_inputs_are_not_judged_before_they_are_known(nodes):
    for node in nodes.values():
        if "validate_inputs" in vars(node):
            assert node.validate_inputs() is True, node
    assert nodes["QArtSRLoadModel"].fingerprint_inputs(model=None, hub_id=None, backend="auto", dtype="auto") is None


def test_a_checkpoint_that_was_deleted_is_made_again(nodes, tmp_path):
    from comfy_nodes.model_folders import free_folder, remember

    before = nodes["QArtSRQuantize"].fingerprint_inputs(name="mine", seed=0)
    free_folder("mine").mkdir()
    remember(tmp_path / "models" / "qartsr" / "mine")
    assert nodes["QArtSRQuantize"].fingerprint_inputs(name="mine", seed=0) == before, "what is there is not made again"
    (tmp_path / "models" / "qartsr" / "mine").rmdir()
    assert nodes["QArtSRImport"].fingerprint_inputs(name="mine", scale=4) != before


def test_the_output_is_the_pipelines_image_by_image(nodes, model, comfy, tiny_folder):
    images = torch.rand(2, 40, 24, 3)
    mask = torch.zeros(2, 40, 24)
    mask[1, :20] = 1
    result, transparency = upscale(nodes, model, images, mask, scale=2.5, tile_size=64, sample_posterior=True, seed=7)
    assert result.shape == (2, 100, 60, 3) and transparency.shape == (2, 100, 60)
    pipe = QArtSRPipeline.from_pretrained(tiny_folder)
    images = [images[0].permute(2, 0, 1), torch.cat([images[1].permute(2, 0, 1), 1 - mask[1:2]])]
    options = {"upscale": 2.5, "tile_size": 64, "sample_posterior": True, "generator": torch.Generator().manual_seed(7)}
    expected = pipe(images, output_type="pt", **options).images
    torch.testing.assert_close(result, torch.stack([one[:3].permute(1, 2, 0) for one in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(transparency[1], 1 - expected[1][3])
    assert not transparency[0].any()
    values, totals, previews = zip(*comfy.progress, strict=True)
    assert list(values) == list(range(1, totals[0] + 1)) and set(totals) == {len(values)}
    assert previews[0][1].size == previews[-1][1].size == (60, 100), "ComfyUI writes the preview's size below it"


def test_long_side_and_one_pixel(nodes, model):
    assert upscale(nodes, model, torch.rand(1, 30, 50, 3), long_side=173)[0].shape == (1, 104, 173, 3)
    assert upscale(nodes, model, torch.rand(1, 1, 1, 3))[0].shape == (1, 4, 4, 3)


def test_cancel_stops_between_layers_and_leaves_nothing(nodes, model, comfy):
    image = torch.rand(1, 32, 32, 3)
    before = upscale(nodes, model, image)[0]
    comfy.cancel_at = comfy.looked + 20
    with pytest.raises(Exception) as raised:
        upscale(nodes, model, image)
    assert type(raised.value).__name__ == "InterruptProcessingException"
    assert comfy.looked == comfy.cancel_at + 1
    comfy.cancel_at = None
    assert not any(module._forward_pre_hooks for module in model.patcher.model.modules())
    assert torch.equal(upscale(nodes, model, image)[0], before)


def test_bad_input_is_explained(nodes, model):
    image = torch.rand(3, 16, 16, 3)
    with pytest.raises(ValueError, match="2 masks for 3 images"):
        upscale(nodes, model, image, torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="is not possible: choose long_side up to 128"):
        upscale(nodes, model, image, long_side=4000)
    with pytest.raises(MemoryError, match="smaller scale"):
        upscale(nodes, model, torch.zeros(1).expand(1, 200_000, 200_000, 3))
    image[1, 3, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="image 2 of 3: .*NaN"):
        upscale(nodes, model, image)
    with pytest.raises(ValueError, match="image has 2 channels"):
        upscale(nodes, model, image[..., :2])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize(
    "automatic, overlap, expected", [(None, 0, [None, 512, 256]), (None, 300, [None, 512]), (256, 0, [None])]
)
def test_smaller_tiles_are_tried_when_memory_runs_out(nodes, model, monkeypatch, error, automatic, overlap, expected):
    tried = []

    def full(self, image, **options):
        tried.append(options["tile_size"])
        raise error

    monkeypatch.setattr(QArtSRPipeline, "__call__", full)
    monkeypatch.setattr("qartsr_pipeline.image.tiles.choose_tile_size", lambda *_: automatic)
    with pytest.raises(MemoryError, match="smaller tile_size"):
        upscale(nodes, model, torch.rand(1, 200, 200, 3), tile_overlap=overlap)
    assert tried == expected


def test_the_draw_is_the_same_after_memory_ran_out(nodes, model, monkeypatch):
    image, call, failures = torch.rand(2, 16, 16, 3), QArtSRPipeline.__call__, [1]
    expected = upscale(nodes, model, image, sample_posterior=True, seed=3)[0]

    def full_once(self, image, **options):
        result = call(self, image, **options)
        if failures:
            raise torch.OutOfMemoryError(str(failures.pop()))
        return result

    monkeypatch.setattr(QArtSRPipeline, "__call__", full_once)
    monkeypatch.setattr("comfy_nodes.upscale_batch.automatic_tile", lambda *_: 1024)
    assert torch.equal(upscale(nodes, model, image, sample_posterior=True, seed=3)[0], expected)


def test_errors_that_are_not_of_memory_are_told_as_they_are(nodes, model, monkeypatch):
    def broken(self, image, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(QArtSRPipeline, "__call__", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        upscale(nodes, model, torch.rand(1, 16, 16, 3))


def test_weights_that_comfyui_left_in_main_memory_are_moved(model):
    """As with --novram."""
    model.patcher.load_device = torch.device("meta")
    model.bring_to_device()
    assert {tensor.device.type for tensor in model.patcher.model.parameters()} == {"meta"}


def test_the_preview_of_a_large_result_is_reduced_and_not_shown_for_every_tile(nodes, model, comfy, monkeypatch):
    monkeypatch.setattr("comfy_nodes.progress.LARGEST_PREVIEW", 32 * 32)
    monkeypatch.setattr("comfy_nodes.progress.EVERY", 3600)
    upscale(nodes, model, torch.rand(1, 32, 32, 3), tile_size=64)
    previews = [preview for _, _, preview in comfy.progress]
    assert len(previews) > 2 and previews[0][1].size == previews[-1][1].size == (32, 32) and set(previews[1:-1]) == {None}
    upscale(nodes, model, torch.rand(1, 1, 1, 3))
    upscale(nodes, model, torch.rand(1, 2, 90, 3), tile_size=128)


def test_model_info_says_where_it_runs(nodes, comfy):
    from comfy_nodes.managed_model import load_model

    loaded = load_model("tiny-w4a4", shipped_checkpoints()["tiny-w4a4"], "reference", "auto")
    output = nodes["QArtSRModelInfo"].execute(model=loaded)
    text = output.args[0]
    assert output.ui == {"text": (text,)}
    assert re.match(
        r"tiny-w4a4: clean images, 4 bits, 4 MB, x4, on the CPU, about \S+ s for a megapixel of the result here.\n\n", text
    )
    assert "conv2d W4A4 x 38: reference" in text and text.endswith("running on: cpu, float32, kernels reference")


def test_a_missing_dependency_gives_one_line_with_the_command(comfy, monkeypatch, caplog):
    import comfy_nodes

    real = importlib.metadata.version

    def version(name):
        if name == "diffusers":
            raise importlib.metadata.PackageNotFoundError
        return "0.33.4" if name == "huggingface-hub" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with caplog.at_level(logging.WARNING):
        listed = asyncio.run(asyncio.run(comfy_nodes.comfy_entrypoint()).get_node_list())
    assert listed == [] and len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "huggingface-hub 0.33.4 is older than 0.34.0, diffusers is missing" in message
    assert re.search(r"-m pip install -r \".*requirements.txt\"$", message) and "\n" not in message


def test_a_clone_in_custom_nodes_needs_no_installation(tmp_path):
    """ComfyUI imports the folder by its path, under a name of its own."""
    code = f"""
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
spec = importlib.util.spec_from_file_location("cloned", {str(ROOT / "comfy_nodes" / "__init__.py")!r})
sys.modules["cloned"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["cloned"])
from cloned.installation import import_own_package
before = list(sys.path)
import_own_package()
import_own_package()
import qartsr_pipeline.checkpoint_files
assert qartsr_pipeline.__file__ == {str(ROOT / "qartsr_pipeline" / "__init__.py")!r} and sys.path == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'diffusers', 'transformers', 'optimum', 'torch', 'qartsr_pipeline', 'calibration'}"
    code = f"import sys, comfy_nodes; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_requirements_are_those_of_the_package_without_torch():
    command = [sys.executable, str(ROOT / "tools" / "minimum_requirements.py")]
    declared = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    lines = (ROOT / "comfy_nodes" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    # pip goes through them in order and keeps what is installed where it can; diffusers' newest release asks for others.
    assert listed[0] == "transformers" and listed[-1].startswith("diffusers>=")
    assert not any(re.search(r"<|~=|==", line) for line in listed)
    assert {line.lower() for line in listed[1:]} == {
        line.replace("==", ">=") for line in declared if not line.startswith("torch==")
    }


def test_managers_that_install_line_by_line_install_all_requirements_together():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert lines == ["-rcomfy_nodes/requirements.txt"], "one argument of pip, relative to the repository and to this file"
