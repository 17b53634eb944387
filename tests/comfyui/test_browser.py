"""The nodes in ComfyUI's frontend, in a headless browser. See docs/comfyui.md for what it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from server import ROOT, Server

BROWSER = shutil.which(os.environ.get("CHROMIUM", "chromium"))
MODULES = os.environ.get("PLAYWRIGHT_MODULES")
FRONTENDS = [None, *filter(None, os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep))]  # ComfyUI's own, and others
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH is not set"),
    pytest.mark.skipif(MODULES is None, reason="PLAYWRIGHT_MODULES is not set"),
    pytest.mark.skipif(BROWSER is None or shutil.which("node") is None, reason="no Chromium, or no node"),
]


@pytest.fixture(scope="module", params=FRONTENDS, ids=lambda folder: folder and Path(folder).name or "pinned")
def server(tmp_path_factory, request):
    with Server(tmp_path_factory.mktemp("comfyui") / "base", frontend=request.param) as running:
        running.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False})
        yield running


@pytest.mark.parametrize(
    "name",
    [f"QArtSR {name}" for name in ("simple upscale", "video upscale", "compare precisions", "batch folder", "core upscale node")],
)
def test_a_template_loads_runs_and_takes_another_node(server, name):
    """The screenshot is kept in COMFYUI_SCREENSHOTS, if that is set, for a person to look at."""
    kept = Path(os.environ.get("COMFYUI_SCREENSHOTS", server.base)) / f"{name}, {Path(server.frontend or 'pinned').name}.png"
    arguments = [server.url, ROOT / "example_workflows" / f"{name}.json", "QArtSR Model Info", kept, MODULES, BROWSER]
    script = Path(__file__).with_name("browser.mjs")
    done = subprocess.run(["node", script, *map(str, arguments)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    upscaled, labels = report.pop("upscaled"), report.pop("labels")
    added = ["QArtSRModelInfo", "QArtSRUpscale"]
    assert report == {"errors": [], "run": "execution_success", "missing": [], "added": added}, server.log[-3000:]
    for node in upscaled:
        assert " 1 tile, " in node["line"] and node["shown"] and node["grey"] == ["seed", "side", "megapixels"]
    assert all(label.endswith(" MB") for label in labels)
    assert kept.stat().st_size > 10_000
