"""Windows in time: nothing is lost or doubled, whatever comes in, and borders fade."""

from __future__ import annotations

import pytest
import torch

from qartsr_pipeline.video.clip_color import ClipColor
from qartsr_pipeline.video.frames import checked_frames, scenes
from qartsr_pipeline.video.windows import refined_in_windows


@pytest.mark.parametrize("total", [1, 2, 5, 6, 7, 8, 9, 13, 20, 21])
@pytest.mark.parametrize(("length", "overlap"), [(1, 0), (5, 0), (5, 1), (5, 2), (6, 3)])
@pytest.mark.parametrize("group", [1, 3, 50])
def test_what_is_refined_to_itself_comes_out_unchanged(total, length, overlap, group):
    stream, sizes = torch.arange(total, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(1, 2, -1, 2, 3), []

    def refine(z):
        sizes.append(z.shape[2])
        return z.clone()

    made = torch.cat(list(refined_in_windows(iter(stream.split(group, dim=2)), refine, length, overlap)), dim=2)
    assert torch.allclose(made, stream, atol=1e-5) and made.shape == stream.shape
    assert max(sizes) == min(length, total) == min(sizes)  # the last window has its full length, too


def test_each_window_fades_into_the_next():
    numbers = iter(range(100))
    stream = torch.zeros(1, 1, 17, 1, 1)
    made = torch.cat(list(refined_in_windows(iter([stream]), lambda z: z + next(numbers), 9, 4)), dim=2).flatten()
    steps = made.diff()
    assert made[0] == 0 and made[-1] == 2 and (steps >= 0).all() and steps.max() < 1
    assert torch.equal(made[:5], torch.zeros(5))


def moving(count: int, brightness: float, seed: int) -> list[torch.Tensor]:
    base = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(seed)) * 0.2 + brightness
    return [base.roll(step, dims=-1) for step in range(count)]


def test_scenes_end_at_cuts_only():
    frames = [*moving(7, 0.1, 0), *moving(1, 0.7, 1), *moving(5, 0.3, 2)]
    assert [len(list(scene)) for scene in scenes(iter(frames))] == [7, 1, 5]
    pan = [frame for frame in torch.linspace(0, 0.9, 12).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 20, 20)]
    assert [len(list(scene)) for scene in scenes(iter(pan))] == [12]
    assert list(scenes(iter([]))) == []


def test_the_colour_correction_is_of_the_clip_not_of_the_frame():
    """A network that shifts colours is corrected; one whose frames vary around the right colours is left nearly alone."""
    generator = torch.Generator().manual_seed(0)
    references = [torch.rand(1, 3, 32, 32, generator=generator).repeat_interleave(4, -1) for _ in range(30)]
    align = ClipColor()
    shifted = [align(reference * 0.8 + 0.15, reference) for reference in references]
    assert max(float((a - b).abs().max()) for a, b in zip(shifted, references, strict=True)) < 1e-2
    align, noise = ClipColor(), torch.randn(30, generator=generator) * 0.02
    varied = [align(reference + shift, reference) - reference for reference, shift in zip(references, noise, strict=True)]
    steps = torch.stack(varied).mean((1, 2, 3, 4)).diff()
    assert torch.allclose(steps[10:], noise.diff()[10:], atol=5e-3)  # variation is not undone frame by frame


def test_frames_are_converted_one_at_a_time():
    read = []
    frames = (read.append(number) or torch.zeros(3, 4, 5) for number in range(10))
    first = next(checked_frames(frames))
    assert first.shape == (1, 3, 4, 5) and read == [0]
