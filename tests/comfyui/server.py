"""A real ComfyUI server on the CPU, in a base directory of its own, driven by its HTTP API."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ROOT / "example_workflows" / "inputs"
LINKED = {"clone": ROOT, "registry": ROOT, "link": ROOT / "comfy_nodes"}  # way of installing -> what stands in custom_nodes/
NAMES = {"clone": "QArtSR", "registry": "qartsr", "link": "comfy_nodes"}


class Server:
    """Context manager: the server runs with the nodes installed one of the ways of `LINKED`.

    Args:
        hub: address of the Hub that it downloads from; without one it is offline.
        frontend: folder of an unpacked comfyui-frontend-package's `static`; without one it is what ComfyUI pins.
    """

    def __init__(self, base: Path, way: str = "clone", hub: str | None = None, frontend: str | None = None):
        self.base, self.name = base, NAMES[way]
        self.frontend = frontend
        self.network = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub}
        for folder in ("custom_nodes", "input", "output", "models"):
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / self.name).symlink_to(LINKED[way])

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes"]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--front-end-root", self.frontend] if self.frontend else []
        environment = dict(os.environ, PYTHONUNBUFFERED="1", **self.network)
        with open(self.base / "log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=os.environ["COMFYUI_PATH"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self.wait(lambda: self.get("/system_stats"), 300)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return (self.base / "log").read_text(errors="replace")

    def wait(self, what: object, seconds: float) -> object:
        """`what()` as soon as it is true; connection errors count as not yet."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log[-3000:]
            try:
                if result := what():
                    return result
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    raise
            time.sleep(0.2)
        raise TimeoutError(self.log[-3000:])

    def get(self, path: str) -> object:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if answer.headers["Content-Type"].startswith("application/json") else body.decode()

    def post(self, path: str, content: dict) -> object:
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            body = error.read()
        return json.loads(body) if body else None

    def start(self, graph: dict) -> str:
        answer = self.post("/prompt", {"prompt": graph})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def finish(self, prompt: str, seconds: float = 300) -> dict:
        return self.wait(lambda: self.get(f"/history/{prompt}").get(prompt), seconds)

    def run(self, graph: dict) -> dict:
        """The history entry of a finished run."""
        return self.finish(self.start(graph))

    def graph(self, workflow: dict) -> dict:
        """A workflow as the editor saves it -> as the API takes it."""
        described, links, graph = self.get("/object_info"), {link[0]: link for link in workflow["links"]}, {}
        for node in workflow["nodes"]:
            if node["type"] not in described:  # a note, which only the editor knows
                assert node["type"] == "MarkdownNote"
                continue
            declared = described[node["type"]]["input"]
            widgets = iter(node["widgets_values"])
            connected = {each["name"]: links[each["link"]] for each in node["inputs"] if each["link"]}
            inputs = {name: [str(link[1]), link[2]] for name, link in connected.items()}
            for name, spec in (declared["required"] | declared.get("optional", {})).items():
                kind = spec[0]
                if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    default = spec[1].get("default") if len(spec) > 1 else None  # of inputs that the workflow is older than
                    inputs[name] = next(widgets, default)
                    if len(spec) > 1 and spec[1].get("control_after_generate"):
                        next(widgets, None)  # what the editor does with a seed after a run
            graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        return graph


def upscale_graph(picture: str = "qartsr_batch/left.png", model: str = "tiny-fp", dtype: str = "auto", **options: object) -> dict:
    """Load Image, Load Model, Upscale, Save Image as the API takes them; ``options`` are inputs of Upscale."""
    inputs = {"scale": 4.0, "long_side": 0, "tile_size": 0, "tile_overlap": 0, "color_fix": "wavelet"}
    inputs |= {"sample_posterior": False, "seed": 0, "model": ["2", 0], "image": ["1", 0], "mask": ["1", 1]} | options
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "2": {"class_type": "QArtSRLoadModel", "inputs": {"model": model, "hub_id": "", "backend": "auto", "dtype": dtype}},
        "3": {"class_type": "QArtSRUpscale", "inputs": inputs},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "result"}},
    }


def messages(entry: dict) -> list[str]:
    """Kinds of the messages of a run: execution_success, execution_error, execution_interrupted, .."""
    return [kind for kind, _ in entry["status"]["messages"]]
