"""The nodes on a real ComfyUI server, by its API. Needs COMFYUI_PATH; see docs/comfyui.md."""

from __future__ import annotations

import json
import os
import shutil
import time
from urllib.parse import quote

import av
import numpy as np
import pytest
import torch
from convert.stable_diffusion_base import adapt, build_parts, save_base
from convert.wan_names import original, transformer_name, vae_name, wan_autoencoder, wan_transformer
from local_hub import LocalHub
from PIL import Image
from safetensors.torch import save_file
from server import INPUTS, ROOT, Server, messages, upscale_graph

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import shipped_checkpoints

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set"),
]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("comfyui") / "base") as running:
        yield running


def saved(server, entry):
    images = [image for out in entry["outputs"].values() for image in out.get("images", ())]
    written = [image for image in images if image["type"] == "output"]  # others are previews
    return [server.base / "output" / image["subfolder"] / image["filename"] for image in written]


def size_of(path):
    if path.suffix != ".mp4":
        return Image.open(path).size
    with av.open(str(path)) as container:
        assert container.streams.audio, "sound is kept"
        return container.streams.video[0].width, container.streams.video[0].height


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_each_example_runs(server, workflow):
    graph = server.graph(json.loads(workflow.read_text()))
    for node in graph.values():
        if node["class_type"] == "QArtSRQuantize":  # minutes otherwise
            node["inputs"] |= {"recipe": "lsq", "steps": 2}
    if workflow.stem == "QArtSR text to image":  # no checkpoint is here: what is checked is all but that, then the part after it
        refused = server.post("/prompt", {"prompt": graph})
        (loader,) = (id for id, node in graph.items() if node["class_type"] == "CheckpointLoaderSimple")
        assert list(refused["node_errors"]) == [loader] and len(refused["node_errors"][loader]["errors"]) == 1
        (decode,) = (id for id, node in graph.items() if node["class_type"] == "VAEDecode")
        graph = {
            id: graph[id] for id, node in graph.items() if node["class_type"] in ("QArtSRLoadModel", "QArtSRUpscale", "SaveImage")
        }
        graph[decode] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 8421504}}
    entry = server.run(graph)
    assert "execution_success" in messages(entry), entry["status"]
    assert all(max(size_of(path)) >= 256 for path in saved(server, entry)) and saved(server, entry)


def test_the_output_is_the_pipelines(server):
    entry = server.run(upscale_graph(tile_size=128, dtype="float32"))
    result = np.asarray(Image.open(saved(server, entry)[0]), dtype=float)
    pipe = QArtSRPipeline.from_pretrained(shipped_checkpoints()["tiny-fp"])
    expected = pipe(Image.open(INPUTS / "qartsr_batch" / "left.png"), tile_size=128).images[0]
    assert np.abs(result - np.asarray(expected, dtype=float)).max() <= 1


def test_sizes_that_are_asked_for_and_the_line_that_is_shown(server):
    """`left.png` has 64 x 64 pixels or so; `size` and what follows are not in older workflows, which the other tests send."""
    source = Image.open(INPUTS / "qartsr_batch" / "left.png").size
    for options, expected, said in (
        ({"size": "x2"}, tuple(2 * side for side in source), "(x2), 1 tile, "),
        (
            {"size": "long side", "side": 100, "fidelity": 0.5},
            tuple(round(side * 100 / max(source)) for side in source),
            "(long side 100)",
        ),
        ({"size": "long side", "side": 20}, tuple(round(side * 20 / max(source)) for side in source), "the model was not used"),
    ):
        defaults = {"size": "scale, or long_side", "side": 2048, "megapixels": 4.0, "fidelity": 0.0}
        entry = server.run(upscale_graph(**defaults | options))
        assert Image.open(saved(server, entry)[0]).size == expected, entry["status"]
        shown = entry["outputs"]["3"]
        assert said in shown["text"][0] and f"{expected[0]} x {expected[1]} from" in shown["text"][0]
        for name in shown["qartsr_pair"][0].values():
            assert Image.open(server.base / "temp" / name).size == expected


def video_loader(model):
    return {"class_type": "QArtSRLoadVideoModel", "inputs": {"model": model, "hub_id": "", "backend": "auto", "dtype": "auto"}}


def test_model_info_begins_with_a_sentence(server):
    graph = {"2": upscale_graph()["2"], "5": {"class_type": "QArtSRModelInfo", "inputs": {"model": ["2", 0]}}}
    text = server.run(graph)["outputs"]["5"]["text"][0]
    assert text.startswith("tiny-fp: clean images, full precision, 10 MB, x4, on the CPU, about ")
    graph["2"] = video_loader("video-w4a4")
    text = server.run(graph)["outputs"]["5"]["text"][0]
    assert text.startswith("video-w4a4: clean clips, 4 bits, ") and "x4, on the CPU, about " in text and "vae: W8A8 x " in text


def test_the_model_is_loaded_again_only_after_unloading(server):
    def loads():
        return server.log.count("Requested to load QArtSRNetwork")

    server.run(upscale_graph(scale=2.0))
    before = loads()
    server.run(upscale_graph(scale=2.0, tile_size=192))
    assert loads() == before
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)  # the worker does it when it wakes up, which may be after the next graph has come
    assert "execution_success" in messages(server.run(upscale_graph(scale=2.0, tile_size=128)))
    assert loads() == before + 1


def test_cancel_stops_within_a_tile_and_the_next_run_works(server):
    prompt = server.start(upscale_graph("qartsr_rider.png", scale=8.0, tile_size=512))
    server.wait(lambda: server.get("/queue")["queue_running"], 30)
    server.post("/interrupt", {})
    assert "execution_interrupted" in messages(server.finish(prompt))
    assert "execution_success" in messages(server.run(upscale_graph(scale=3.0)))


def core_graph(model="tiny-w4a4", picture="qartsr_batch/left.png", **more):
    """Load Image, Load Model, core's upscale node, Save Image; `more` are further nodes, of which "image" replaces Load Image."""
    image = ["image", 0] if "image" in more else ["1", 0]
    graph = {name: node for name, node in upscale_graph(picture, model).items() if name != "3"}
    graph["3"] = {"class_type": "ImageUpscaleWithModel", "inputs": {"upscale_model": ["2", 1], "image": image}}
    return graph | more


@pytest.mark.parametrize("model", [name for name in sorted(shipped_checkpoints()) if not name.startswith("video-")])
def test_cores_node_enlarges_with_each_model_as_ours_does(server, model):
    ours = upscale_graph(model=model)
    ours["4"]["inputs"]["images"] = ["5", 0]
    graph = core_graph(model) | {"5": ours["3"], "6": ours["4"]}
    entry = server.run(graph)
    assert "execution_success" in messages(entry), entry["status"]
    results = [np.asarray(Image.open(path), dtype=float) for path in saved(server, entry)]
    assert len(results) == 2 and np.abs(results[0] - results[1]).max() <= 1


def test_cores_node_takes_batches_with_alpha_and_cuts_tiles(server):
    wide = {"image": ["1", 0], "upscale_method": "bicubic", "width": 640, "height": 64, "crop": "disabled"}
    more = {
        "wide": {"class_type": "ImageScale", "inputs": wide},
        "clear": {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 640, "height": 64}},
        "alpha": {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["wide", 0], "alpha": ["clear", 0]}},
        "image": {"class_type": "RepeatImageBatch", "inputs": {"image": ["alpha", 0], "amount": 2}},
    }
    entry = server.run(core_graph("photo-w4a4", **more))
    assert "execution_success" in messages(entry), entry["status"]
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in saved(server, entry))
    assert first.shape == (256, 2560, 3) and np.array_equal(first, second)
    small = first.reshape(64, 4, 640, 4, 3).mean((1, 3))
    with Image.open(INPUTS / "qartsr_batch" / "left.png") as picture:
        original = np.asarray(picture.convert("RGB").resize((640, 64), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(small - original).mean() < 4


def test_cores_node_can_be_cancelled_and_its_model_unloaded(server):
    prompt = server.start(core_graph("tiny-fp", "qartsr_rider.png"))
    server.wait(lambda: server.get("/queue")["queue_running"], 30)
    server.post("/interrupt", {})
    assert "execution_interrupted" in messages(server.finish(prompt))
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert "execution_success" in messages(server.run(core_graph("tiny-fp")))
    server.post("/free", {"unload_models": True})
    assert "execution_success" in messages(server.run(core_graph("tiny-fp", "qartsr_batch/right.png")))


def test_bad_input_is_explained_on_the_node_and_the_next_run_works(server):
    folder = server.base / "models" / "qartsr" / "mine"
    shutil.copytree(shipped_checkpoints()["tiny-fp"], folder)
    assert "mine" in server.get("/object_info/QArtSRLoadModel")["QArtSRLoadModel"]["input"]["required"]["model"][1]["options"]
    shutil.rmtree(folder)
    refused = server.post("/prompt", {"prompt": upscale_graph(model="mine")})
    (error,) = refused["node_errors"]["2"]["errors"]  # once, not for every input of the node
    assert "deleted" in error["details"] and error["extra_info"]["input_name"] == "model"
    entry = server.run(upscale_graph(long_side=65536))
    assert "is not possible: choose" in json.dumps(entry["status"]["messages"])
    assert "execution_success" in messages(server.run(upscale_graph(scale=1.5)))


def quantize_graph(**options):
    inputs = {"model": "tiny-fp", "pictures": "", "recipe": "maxmin", "bits": "w4a4", "steps": 0, "seed": 0} | options
    return {"1": {"class_type": "QArtSRQuantize", "inputs": inputs}}


def test_a_quantized_model_is_listed_when_it_is_whole_and_a_cancelled_one_is_kept_for_the_next_run(server):
    def models():
        described = server.get("/object_info/QArtSRLoadModel")["QArtSRLoadModel"]
        return described["input"]["required"]["model"][1]["options"]

    entry = server.run(quantize_graph(name="made"))
    assert "execution_success" in messages(entry), entry["status"]
    assert entry["outputs"]["1"]["images"][0]["type"] == "temp" and "made" in models()
    assert "execution_success" in messages(server.run(upscale_graph(model="made", scale=1.5)))
    prompt = server.start(quantize_graph(name="half", recipe="lsq", steps=1000))
    state = server.base / "models" / "qartsr" / ".runs" / "half" / "state.pt"
    server.wait(state.exists, 300)
    server.post("/interrupt", {})
    assert "execution_interrupted" in messages(server.finish(prompt))
    assert state.exists() and "half" not in models()


def test_an_imported_checkpoint_is_listed_and_upscales_at_once(server):
    models = server.base / "models"
    parts = build_parts(server.base / "tables")
    save_base(parts, models / "stable-diffusion")
    torch.save(adapt(parts), models / "osediff.pkl")
    inputs = {"kind": "osediff", "base": "stable-diffusion", "checkpoint": "osediff.pkl", "name": "imported"}
    inputs |= {"prompt_embedding": "", "timestep": 999, "scale": 4}
    entry = server.run({"1": {"class_type": "QArtSRImport", "inputs": inputs}})
    assert "execution_success" in messages(entry), entry["status"]
    assert "written:" in entry["outputs"]["1"]["text"][0]
    done = server.run(upscale_graph(model="imported", scale=1.5))
    assert "execution_success" in messages(done), done["status"]
    assert len(saved(server, done)) == 1


def test_a_model_for_clips_of_wans_files_is_listed_and_enlarges_frames(server):
    """Files of a small WAN where ComfyUI has them."""
    models = server.base / "models"
    for kind in ("diffusion_models", "vae"):
        (models / kind).mkdir(exist_ok=True)
    save_file(original(wan_transformer().state_dict(), transformer_name), models / "diffusion_models" / "wan.safetensors")
    save_file(original(wan_autoencoder().state_dict(), vae_name), models / "vae" / "wan_vae.safetensors")
    save_file({"prompt": torch.randn(1, 5, 16)}, models / "prompt.safetensors")
    inputs = {"kind": "wan", "base": "wan.safetensors", "checkpoint": "", "name": "steady", "vae": "wan_vae.safetensors"}
    inputs |= {"prompt_embedding": "prompt.safetensors", "timestep": -1, "scale": 4, "lora": ""}
    entry = server.run({"1": {"class_type": "QArtSRImport", "inputs": inputs}})
    assert "execution_success" in messages(entry), entry["status"]
    assert "choose steady in QArtSR Load Video Model" in entry["outputs"]["1"]["text"][0]
    listed = server.get("/object_info/QArtSRLoadVideoModel")["QArtSRLoadVideoModel"]["input"]["required"]["model"][1]["options"]
    assert "steady" in listed
    options = {"scale": 2.0, "tile_size": 0, "frames_per_chunk": 0, "chunk_overlap": -1, "keep_colors": True}
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 3, "color": 8421504}},
        "2": video_loader("steady"),
        "3": {"class_type": "QArtSRVideoFrames", "inputs": options | {"model": ["2", 0], "images": ["1", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "steady"}},
    }
    done = server.run(graph)
    assert [size_of(path) for path in saved(server, done)] == [(64, 32)] * 3, done["status"]


def test_a_model_of_the_hub_is_downloaded_once_and_works_offline_afterwards(tmp_path):
    graph = upscale_graph(scale=1.5)
    graph["2"]["inputs"]["hub_id"] = "artist/sharp"
    with (
        LocalHub("artist/sharp", shipped_checkpoints()["tiny-w2a2"]) as hub,
        Server(tmp_path / "base", hub=hub.endpoint) as server,
    ):
        done = server.run(graph)
        assert "execution_success" in messages(done), done["status"]
        hub.__exit__()
        again = server.run(graph | {"3": {**graph["3"], "inputs": graph["3"]["inputs"] | {"scale": 2.0}}})
        assert "execution_success" in messages(again), again["status"]
        described = server.get("/object_info/QArtSRLoadModel")["QArtSRLoadModel"]["input"]["required"]["model"][1]
        assert "artist/sharp" in described["options"]
        graph["2"]["inputs"]["hub_id"] = "artist/other"
        failed = server.run(graph)
        assert "artist/other could not be downloaded" in json.dumps(failed["status"]["messages"])
    assert sorted(set(hub.files_sent())) == sorted(hub.files_sent()), "no file was sent twice"


@pytest.mark.parametrize("way", ["clone", "registry", "link"])
def test_each_way_of_installing_shows_nodes_templates_and_help(tmp_path, way):
    with Server(tmp_path / "base", way) as server:
        assert "IMPORT FAILED" not in server.log and "Traceback" not in server.log
        nodes = [name for name in server.get("/object_info") if name.startswith("QArtSR")]
        assert {"QArtSRLoadModel", "QArtSRUpscale", "QArtSRModelInfo", "QArtSRQuantize", "QArtSRImport"} <= set(nodes)
        assert sorted(server.get("/workflow_templates")[server.name]) == [path.stem for path in WORKFLOWS]
        template = quote(WORKFLOWS[0].stem)
        assert server.get(f"/api/workflow_templates/{server.name}/{template}.json")["nodes"]
        for node in nodes:
            assert server.get(f"/extensions/{server.name}/docs/{node}.md").startswith("# ")


def test_frames_of_a_clip_and_models_that_do_not_fit(server):
    """ComfyUI itself refuses a model for clips where one for images is wanted: they have types of their own."""
    defaults = {"scale": 2.0, "tile_size": 0, "frames_per_chunk": 0, "chunk_overlap": -1, "keep_colors": True}
    graph = {
        "1": {"class_type": "LoadVideo", "inputs": {"file": "qartsr_flower.mp4"}},
        "2": {"class_type": "GetVideoComponents", "inputs": {"video": ["1", 0]}},
        "3": {"class_type": "ImageFromBatch", "inputs": {"image": ["2", 0], "batch_index": 0, "length": 2}},
        "4": video_loader("tiny-fp"),
        "5": {"class_type": "QArtSRVideoFrames", "inputs": defaults | {"model": ["4", 0], "images": ["3", 0]}},
        "6": {"class_type": "CreateVideo", "inputs": {"images": ["5", 0], "fps": 24.0, "audio": ["2", 1]}},
        "7": {
            "class_type": "SaveVideo",
            "inputs": {"video": ["6", 0], "filename_prefix": "a", "format": "auto", "codec": "auto"},
        },
    }
    entry = server.run(graph)
    assert [size_of(path) for path in saved(server, entry)] == [(256, 160)]
    (text,) = entry["outputs"]["5"]["text"]
    assert text.startswith("2 frames, 256 x 160 from 128 x 80, ") and "tiny-fp is a model for images" in text
    wrong = upscale_graph() | {"2": graph["4"]}
    refused = server.post("/prompt", {"prompt": wrong})
    assert [error["type"] for error in refused["node_errors"]["3"]["errors"]] == ["return_type_mismatch"]
