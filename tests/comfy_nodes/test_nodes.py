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

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, shipped_checkpoints, shipped_labels

ROOT = Path(__file__).resolve().parents[2]
IDS = [
    "QArtSRLoadModel",
    "QArtSRUpscale",
    "QArtSRModelInfo",
    "QArtSRQuantize",
    "QArtSRImport",
    "QArtSRLoadFolder",
    "QArtSRLoadVideoModel",
    "QArtSRVideoUpscale",
    "QArtSRVideoFrames",
]  # only ever added to: they stand in users' workflows


def test_every_node_has_its_id_tooltips_and_a_help_page(nodes):
    assert list(nodes) == IDS
    for name, node in nodes.items():
        schema = node.define_schema()
        assert all(each.tooltip for each in (*schema.inputs, *schema.outputs)), name
        assert schema.category == "QArtSR" and schema.display_name.startswith("QArtSR ") and schema.search_aliases, name
        assert schema.description.endswith("."), name
        assert (ROOT / "comfy_nodes" / "web" / "docs" / f"{name}.md").is_file()


def test_inputs_are_only_ever_appended(nodes):
    """Workflows store values by position: of required inputs first, then of optional ones."""
    known = {
        "QArtSRLoadModel": ["model", "hub_id", "backend", "dtype"],
        "QArtSRUpscale": ["model", "image", "scale", "long_side", "tile_size", "tile_overlap", "color_fix", "sample_posterior"]
        + ["seed", "mask", "size", "side", "megapixels", "fidelity"],
        "QArtSRModelInfo": ["model"],
        "QArtSRQuantize": ["model", "pictures", "recipe", "bits", "steps", "seed", "name"],
        "QArtSRImport": ["kind", "base", "checkpoint", "name", "prompt_embedding", "timestep", "scale"]
        + ["vae", "lora", "prompt"],
        "QArtSRLoadFolder": ["folder", "first", "limit", "as_batch"],
        "QArtSRLoadVideoModel": ["model", "hub_id", "backend", "dtype"],
        "QArtSRVideoUpscale": ["model", "video", "scale", "tile_size", "frames_per_chunk", "chunk_overlap", "keep_colors"]
        + ["deinterlace", "codec", "crf"],
        "QArtSRVideoFrames": ["model", "images", "scale", "tile_size", "frames_per_chunk", "chunk_overlap", "keep_colors"],
    }
    for name, ids in known.items():
        inputs = nodes[name].define_schema().inputs
        assert [each.id for each in inputs][: len(ids)] == ids
        assert [each.optional for each in inputs] == sorted(each.optional for each in inputs)
    upscale = nodes["QArtSRUpscale"].define_schema().inputs
    hidden = [each.id for each in upscale if (each.extra_dict or {}).get("advanced")]
    assert hidden == ["tile_size", "tile_overlap", "color_fix", "sample_posterior", "seed"], "what newer frontends fold away"


def test_nodes_take_what_their_schemas_declare(nodes):
    """ComfyUI passes inputs by name: all to `execute`, and to the other two those that they name, or all with `**`."""
    for name, node in nodes.items():
        inputs = {each.id: each.optional for each in node.define_schema().inputs}
        parameters = signature(node.execute).parameters
        assert list(parameters) == list(inputs), name
        assert [each.default is not each.empty for each in parameters.values()] == list(inputs.values()), name
        for method in ("validate_inputs", "fingerprint_inputs"):
            named = signature(getattr(node, method)).parameters.values() if hasattr(node, method) else ()
            assert {each.name for each in named if each.kind is not each.VAR_KEYWORD} <= inputs.keys(), (name, method)


def test_search_finds_upscale_by_what_people_call_it(nodes, monkeypatch):
    node = nodes["QArtSRUpscale"]
    assert {"upscale", "super resolution", "enhance", "enlarge", "4x"} <= set(node.define_schema().search_aliases)
    older = [(field.name, field.type, field) for field in fields(comfy_schema.Schema) if field.name != "search_aliases"]
    monkeypatch.setattr(comfy_schema.io, "Schema", make_dataclass("Schema", older))
    assert node.define_schema().node_id == "QArtSRUpscale"


def test_the_list_of_models_has_own_ones_first_and_says_what_each_is_for(nodes, comfy, tiny_folder):
    import folder_paths

    shutil.copytree(tiny_folder, Path(folder_paths.models_dir) / "qartsr" / "zebra")
    model = nodes["QArtSRLoadModel"].define_schema().inputs[0]
    shipped = {name: label for name, label in shipped_labels().items() if not name.startswith("video")}
    assert model.id == "model" and model.default == DEFAULT_CHECKPOINT
    assert model.options[:3] == ["zebra", DEFAULT_CHECKPOINT, "photo-w8a8"] and set(model.options[1:]) == set(shipped)
    labels = model.extra_dict["qartsr_labels"]
    assert labels == {"zebra": labels["zebra"], **shipped} and labels["zebra"].startswith("full precision")
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
        if hasattr(node, "validate_inputs"):
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


def test_weights_that_comfyui_left_in_main_memory_are_moved(model):
    """As with --novram."""
    model.patcher.load_device = torch.device("meta")
    model.bring_to_device()
    assert {tensor.device.type for tensor in model.patcher.model.parameters()} == {"meta"}


def test_model_info_says_where_it_runs(nodes, comfy):
    from comfy_nodes.managed_model import load_model

    loaded = load_model("tiny-w4a4", shipped_checkpoints()["tiny-w4a4"], "reference", "auto")
    output = nodes["QArtSRModelInfo"].execute(model=loaded)
    text = output.args[0]
    assert output.ui == {"text": (text,)}
    assert re.match(
        r"tiny-w4a4: clean images, 4 bits, 3 MB, x4, on the CPU, about \S+ s for a megapixel of the result here.\n\n", text
    )
    assert re.search(r"conv2d W4A4 x \d+: reference", text) and text.endswith("running on: cpu, float32, kernels reference")


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
