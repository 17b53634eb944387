"""QArtSR Load Folder: what the nodes behind it get of a folder."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def run(nodes, tmp_path):
    """Runs the node on `input/pictures`, which holds four files."""
    folder = tmp_path / "input" / "pictures"
    folder.mkdir(parents=True)
    Image.new("RGB", (6, 4), (255, 0, 51)).save(folder / "b.png")
    Image.new("L", (3, 5), 102).save(folder / "a.bmp")
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(folder / "c.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8no")
    (folder / "notes.txt").write_text("no image")

    def execute(folder="pictures", first=0, limit=0, **changes):
        return nodes["QArtSRLoadFolder"].execute(folder=folder, first=first, limit=limit, **changes).args

    return execute


def test_images_of_any_size_come_one_after_another(run, caplog):
    images, masks, names = run()
    assert names == ["a", "b", "c"] and "broken.jpg" in caplog.text
    assert [tuple(image.shape) for image in images] == [(1, 5, 3, 3), (1, 4, 6, 3), (1, 2, 2, 3)]
    assert [tuple(mask.shape) for mask in masks] == [(1, 5, 3), (1, 4, 6), (1, 2, 2)]
    assert images[0].unique().tolist() == [pytest.approx(0.4)] and images[1][0, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert masks[2][0].tolist() == [[0, 0], [1, 1]] and not masks[1].any()
    assert run(first=3)[2] == ["c"], "the broken one counts"
    assert run(first=1, limit=2)[2] == ["b"]


def test_a_folder_of_one_size_is_a_batch(run, tmp_path):
    with pytest.raises(ValueError, match="b has 6 x 4 pixels, and a 3 x 5: .* Switch as_batch off"):
        run(as_batch=True)
    Image.new("RGB", (6, 4), (0, 255, 51)).save(tmp_path / "input" / "pictures" / "a.bmp")
    (images,), (masks,), names = run(limit=2, as_batch=True)
    assert images.shape == (2, 4, 6, 3) and masks.shape == (2, 4, 6) and names == ["pictures"]
    assert images[:, 0, 0, :2].tolist() == [[0, 1], [1, 0]]


def test_bad_folders_are_explained(run, nodes, tmp_path, monkeypatch):
    (tmp_path / "input" / "empty").mkdir()
    for arguments, message in (
        ({"folder": "no-such"}, "There is no .*no-such"),
        ({"folder": "empty"}, "holds no images"),
        ({"folder": "pictures/b.png"}, "give the folder that it is in"),
        ({"first": 9}, "choose a smaller `first`"),
        ({"first": 2, "limit": 1}, "none of the 1 images"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**arguments)
    assert "folder is empty" in nodes["QArtSRLoadFolder"].validate_inputs(folder=" ")
    monkeypatch.setattr("comfy_nodes.load_folder.BYTES_PER_PIXEL", 1e12)
    with pytest.raises(MemoryError, match="image 1 of 4.*`limit`"):
        run()


def test_a_changed_folder_is_loaded_again(run, nodes, tmp_path):
    fingerprint = nodes["QArtSRLoadFolder"].fingerprint_inputs
    before = fingerprint(folder="pictures", first=0, limit=0)
    assert before == fingerprint(folder="pictures", first=0, limit=0)
    Image.new("L", (2, 2)).save(tmp_path / "input" / "pictures" / "d.png")
    assert fingerprint(folder="pictures", first=0, limit=0) != before
