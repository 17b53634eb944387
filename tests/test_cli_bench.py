"""`qartsr bench`, and the times that it is made of."""

import re

import numpy as np
import pytest
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.cli.timing import STAGES, OperatorTimes, kind_of, medians, tensor_bytes, time_stages
from qartsr_pipeline.kernels import list_backends
from tiny_models import build_tiny_pipeline


def test_the_table_has_what_is_compared_and_every_backend_that_can(tiny_folder, capsys):
    assert main(["bench", str(tiny_folder), "--against", "tiny-w2a2", "--size", "16", "--rounds", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (\d+\.\d+) \| (\d+\.\d\d) \|", said, re.MULTILINE)
    assert [name for name, *_ in rows] == ["tiny-w2a2", str(tiny_folder)] and rows[0][2] == "1.00"
    assert said.startswith("cpu: ") and "16 x 16 to 64 x 64" in said and re.search(", (float32|bfloat16)\n", said)
    assert main(["bench", "tiny-w2a2", "--size", "16", "--rounds", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for backend in list_backends():
        assert (f"| tiny-w2a2 on {backend} |" in said) != (f"not on {backend}: " in said)


@pytest.mark.parametrize("option", ["--rounds", "--size"])
def test_counts_are_above_zero(option, capsys):
    with pytest.raises(SystemExit):
        main(["bench", option, "0"])
    assert "expected a whole number above 0" in capsys.readouterr().err


def test_stages_are_timed_apart_and_give_the_pipelines_picture():
    network = build_tiny_pipeline().network()
    up = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32))
    times, picture = time_stages(network, up)
    assert tuple(times) == STAGES and min(times.values()) > 0
    with torch.no_grad():
        assert torch.equal(picture, network.decode(network.step(network.encode(up))))


def test_operators_are_timed_by_kind():
    network = build_tiny_pipeline().network()
    with OperatorTimes(network.device) as times:
        time_stages(network, torch.zeros(1, 3, 32, 32))
    assert {"convolutions", "linear layers", "attention", "normalization", "activations", "sums"} <= times.seconds.keys()
    assert all(seconds >= 0 for seconds in times.seconds.values())
    with OperatorTimes(network.device) as times:
        time_stages(QArtSRPipeline.from_pretrained("tiny-w2a2").network(), torch.zeros(1, 3, 32, 32))
    expected = {"onednn": {"byte products", "branches", "quantize steps"}, "int_mm": {"byte products"}}
    chosen = next(name for name, reason in list_backends().items() if reason is None)
    assert expected.get(chosen, set()) <= times.seconds.keys() and kind_of("aten.addmm.default") == "linear layers"


def test_medians_are_of_stages_and_of_sums():
    rounds = [{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 2.0}, {"a": 3.0, "b": 1.0}]
    assert medians(rounds) == {"a": 2.0, "b": 2.0, "total": 4.0}


def test_bytes_are_those_of_all_tensors():
    network = build_tiny_pipeline().network()
    expected = 4 * sum(p.numel() for model in (network.unet, network.vae) for p in model.parameters())
    assert tensor_bytes(network) == pytest.approx(expected, rel=1e-3)
