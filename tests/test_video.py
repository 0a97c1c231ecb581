"""Videos and pictures come back as they were written, in the right order and at the right times."""

import struct
import subprocess
import sys
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from models.errors import InputError
from sources import images
from sources import video as source
from utils import video


def gradients(num_frames=12, height=64, width=96):
    """Smooth frames, each different from the others in every pixel's neighbourhood."""
    t, y, x = np.mgrid[:num_frames, :height, :width]
    red, green, blue = 60 + x, 255 * y / height, 128 + 100 * np.sin((x + y) / 20 + t)
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def numbered(num_frames, step=6):
    """Frames whose brightness is their number times `step`."""
    return np.full((num_frames, 32, 32, 3), step, np.uint8) * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]


def numbers(frames, step=6):
    return [round(float(frame.mean()) / step) for frame in frames]


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.mark.parametrize("fps", [10, 15, 29.97])
def test_mp4_comes_back(tmp_path, fps):
    frames = gradients()
    video.write_video(tmp_path / "new" / "a.mp4", frames, fps)
    read, read_fps = source.read_video(tmp_path / "new" / "a.mp4")
    assert read.shape == frames.shape
    assert min(psnr(a, b) for a, b in zip(read, frames, strict=True)) > 38
    assert read_fps == pytest.approx(fps, rel=1e-6)
    assert source.read_video_info(tmp_path / "new" / "a.mp4") == (12, 64, 96, Fraction(str(fps)), ())


def test_mp4_pads_odd_sides_with_copies(tmp_path):
    frames = gradients()[:, :63, :95]
    video.write_video(tmp_path / "a.mp4", frames, 10)
    read, _ = source.read_video(tmp_path / "a.mp4")
    assert psnr(read, np.pad(frames, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")) > 38


def test_gif_comes_back(tmp_path):
    frames = numbered(12)
    frames[:, 8:16, 8:16] = (250, 20, 20)
    video.write_video(tmp_path / "a.gif", frames, 10)
    read, fps = source.read_video(tmp_path / "a.gif")
    np.testing.assert_allclose(read, frames, atol=3)
    assert fps == 10
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0


def test_gif_of_many_colours_is_close(tmp_path):
    frames = gradients()
    video.write_video(tmp_path / "a.gif", frames, 20)
    assert psnr(source.read_video(tmp_path / "a.gif")[0], frames) > 30


def test_equal_frames_of_a_gif_come_back(tmp_path):
    frames = numbered(5, step=40)[[0, 1, 1, 1, 2, 3, 4, 4]]
    video.write_video(tmp_path / "a.gif", frames, 25)
    assert numbers(source.read_video(tmp_path / "a.gif")[0], step=40) == [0, 1, 1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("suffix", ["avi", "webm", "mkv", "mov"])
def test_other_containers(tmp_path, suffix):
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264")
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(25), width=32, height=32, pix_fmt="yuv420p")
        for frame in numbered(20, step=12):  # mpeg4 is coarse
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames, fps = source.read_video(tmp_path / f"a.{suffix}")
    assert numbers(frames, step=12) == list(range(20))
    assert fps == 25


@pytest.mark.parametrize(
    ("own_fps", "fps", "expected"),
    [
        (30, 15, [0, 2, 4, 6, 8, 10]),
        (30, 20, [0, 1, 3, 4, 6, 7, 9, 10]),
        (10, 20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]),
        (25, 15, [0, 2, 3, 5, 7, 8, 10]),
        (15, 15, list(range(12))),
    ],
)
def test_resampling_takes_the_nearest_frame(tmp_path, own_fps, fps, expected):
    video.write_video(tmp_path / "a.mp4", numbered(12), own_fps)
    assert numbers(source.iterate_video(tmp_path / "a.mp4", fps)) == expected


def test_frames_stay_as_long_as_the_file_says(tmp_path):
    images = [Image.fromarray(frame) for frame in numbered(3, step=80)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 200])
    frames, fps = source.read_video(tmp_path / "a.gif")
    assert fps == 10
    assert numbers(frames, step=80) == [0, 1, 1, 1, 2, 2]
    assert numbers(source.iterate_video(tmp_path / "a.gif", fps=5), step=80) == [0, 1, 2]


def test_a_jump_in_time_is_not_filled(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(10), width=32, height=32, pix_fmt="yuv420p")
        for t, pixels in enumerate(numbered(10)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = t if t < 5 else t + 36_000, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    fps = source.read_video_info(tmp_path / "a.mkv").fps
    assert numbers(source.iterate_video(tmp_path / "a.mkv", fps)) == list(range(10))


def test_rotated_videos_are_upright(tmp_path):
    frames = gradients()
    video.write_video(tmp_path / "a.mp4", frames, 10)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 16  # past version, times and ids, layer and volume
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    read, _ = source.read_video(tmp_path / "a.mp4")
    assert psnr(read, np.rot90(frames, -1, axes=(1, 2))) > 38  # a quarter turn clockwise
    assert source.read_video_info(tmp_path / "a.mp4")[1:3] == (96, 64)


def test_errors_name_the_file(tmp_path):
    video.write_video(tmp_path / "whole.mp4", gradients(40), 10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage.mp4").write_bytes(b"not a video" * 100)
    (tmp_path / "empty.gif").write_bytes(b"")
    for name in ("cut.mp4", "garbage.mp4", "empty.gif", "missing.mp4"):
        with pytest.raises(InputError, match=name):
            source.read_video(tmp_path / name)


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")

    def fail(temporary, frames, fps):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(video, "_write_mp4", fail)
    with pytest.raises(OSError, match="disk full"):
        video.write_video(path, gradients(), 10)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"before"


def test_wrong_frames_and_names_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.mp4 or \.gif"):
        video.write_video(tmp_path / "a.txt", gradients(), 10)
    for frames in (gradients() / 255, gradients()[0], gradients()[:0], gradients()[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            video.write_video(tmp_path / "a.mp4", frames, 10)
    assert not list(tmp_path.iterdir())


def test_png_comes_back(tmp_path):
    image = gradients()[0]
    video.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), image)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_gray_pictures_become_rgb_and_deep_ones_are_refused(tmp_path):
    gray = gradients()[0, :, :, 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "gray.png"), np.stack([gray] * 3, axis=-1))
    Image.fromarray(gray.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png.*8 bits"):
        images.read_image(tmp_path / "deep.png")


def test_shrinking_averages_areas():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    means = frames.reshape(3, 8, 4, 16, 3, 3).mean((2, 4))
    np.testing.assert_allclose(video.resize(frames, 8, 16), means, atol=1)


def test_enlarging_keeps_the_picture():
    frames = gradients()
    enlarged = video.resize(frames, 128, 144)
    assert psnr(video.resize(enlarged, 64, 96), frames) > 40
    assert video.resize(frames, 64, 96) is frames


def test_upscale_repeats_pixels():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    enlarged = video.upscale(image, 3)
    assert enlarged.shape == (6, 6, 3)
    for y in range(6):
        for x in range(6):
            np.testing.assert_array_equal(enlarged[y, x], image[y // 3, x // 3])
    np.testing.assert_array_equal(video.upscale(np.stack([image, image + 1]), 3)[1], enlarged + 1)


def test_label_leaves_the_frame_untouched():
    frame = gradients(1, 64, 64)[0]
    before = frame.copy()
    labelled = video.label(frame, "truth")
    np.testing.assert_array_equal(labelled[-64:], before)
    np.testing.assert_array_equal(frame, before)
    band = labelled[:-64]
    assert band.max() > 180  # light text
    assert np.median(band) < 40  # on dark ground
    assert (band != video.label(frame, "model")[:-64]).any()


@pytest.mark.parametrize("width", [64, 256])
def test_labels_of_any_length_fit_together(width):
    frame = gradients(1, 64, width)[0]
    shapes = {video.label(frame, text).shape for text in ("", "t = 3", "a line that is far too long for any frame" * 3)}
    assert len(shapes) == 1
    full = video.label(frame, "x" * 200)[:-64]
    assert full[:, -1].max() < 100  # cut, not spilled over the edge


def test_strip_is_rows_of_time():
    videos = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 5, 3), dtype=np.uint8)
    white_row, white_column = np.full((1, 17, 3), 255), np.full((4, 1, 3), 255)
    rows = [np.concatenate([v[0], white_column, v[1], white_column, v[2]], axis=1) for v in videos]
    expected = np.concatenate([rows[0], white_row, rows[1]])
    np.testing.assert_array_equal(video.strip(list(videos), gap=1), expected)
    assert video.strip(videos, gap=0).shape == (8, 15, 3)


def test_import_needs_neither_pyav_nor_pillow():
    program = "import sys; sys.modules.update(av=None, PIL=None); import utils.video"
    subprocess.run([sys.executable, "-c", program], check=True)
