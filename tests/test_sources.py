"""What cameras, browsers and broken disks do to files: frames that say their number show what became of them."""

import json
import os
from contextlib import ExitStack
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from models.errors import InputError
from preprocess_dataset import Config, main
from sources.arrays import Arrays
from sources.find import split_sources
from sources.kind import natural
from sources.rate import frame_rate
from sources.video import iterate_video, read_video_info
from tests.test_preprocess import by_id, read_all
from utils.records import read_metadata

RED, GREEN, BLUE, WHITE = (200, 40, 40), (40, 180, 60), (40, 60, 200), (230, 230, 230)


def picture(number, height=64, width=96):
    """Four coloured corners, which show orientation and colour, and a bar code of the number between them."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    h, w, bar = height // 4, width // 4, width // 8
    pixels[:h, :w], pixels[:h, -w:], pixels[-h:, :w], pixels[-h:, -w:] = RED, GREEN, BLUE, WHITE
    for bit in range(8):
        pixels[3 * h // 2 : 5 * h // 2, bit * bar : (bit + 1) * bar] = 235 if number >> bit & 1 else 20
    return pixels


def number(pixels):
    h, bar = pixels.shape[0] // 4, pixels.shape[1] // 8
    bits = [pixels[7 * h // 4 : 9 * h // 4, b * bar + bar // 4 : (b + 1) * bar - bar // 4].mean() for b in range(8)]
    return sum(1 << b for b, value in enumerate(bits) if value > 128)


def encode(path, pictures, rate=25, codec="libx264", times_ms=None, options=None, **add):
    """Writes a video, at constant rate or with the given times."""
    with av.open(str(path), "w", options=add.pop("mux", {})) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {"crf": "8"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = add.pop("pix_fmt", "yuv420p")
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(out, old, new):
    """Copies a stream, still encoded, to another container."""
    for packet in old.container.demux(old):
        if packet.dts is not None:
            packet.stream = new
            out.mux(packet)


def pictures(n, **size):
    return [picture(i, **size) for i in range(n)]


def numbers(path, fps=None):
    return [number(frame) for frame in iterate_video(path, fps) if frame is not None]


@pytest.fixture
def config(source, tmp_path):
    """Makes configurations of a small conversion in this process."""
    defaults = {"input_dir": str(source), "output_dir": str(tmp_path / "out"), "num_workers": 0}
    defaults |= {"clip_length": 64, "min_clip_length": 4, "val_fraction": 0, "test_fraction": 0}
    return lambda **changes: Config(**(defaults | changes))


def episodes(config):
    """Numbers of the frames of each clip, by clip."""
    return {
        clip_id: [number(frame) for frame in clip.frames_THWC] for clip_id, clip in by_id(config.output_dir).items()
    }


# Frame times.


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("suffix", ["avi", "mkv", "mp4", "ts"])
def test_frames_that_were_coded_out_of_order_come_back_in_order(tmp_path, codec, suffix):
    options = {"qscale": "2", "bf": "2"} if codec == "mpeg4" else {"crf": "10", "bf": "3", "b-adapt": "0"}
    path = encode(tmp_path / f"a.{suffix}", pictures(60), codec=codec, options=options)
    assert numbers(path) == list(range(60))
    assert read_video_info(path).fps == 25


@pytest.mark.parametrize("jitter_ms", [0, 8, 15])
def test_a_browsers_recording_has_the_rate_of_its_pictures(tmp_path, jitter_ms):
    rng = np.random.default_rng(0)
    times = [round(i * 1000 / 30 + (rng.uniform(-1, 1) * jitter_ms if i else 0)) for i in range(60)]
    options = {"crf": "10", "b:v": "1M", "deadline": "realtime"}
    path = encode(tmp_path / "a.webm", pictures(60), 1000, "libvpx", times, options, mux={"live": "1"})
    assert read_video_info(path).fps == 30
    assert numbers(path) == list(range(60))
    assert numbers(path, 15) == list(range(0, 60, 2))


def test_bursts_keep_their_pictures_and_their_pauses(tmp_path):
    """60 pictures a second for a while, then one that stays for half a second, as phones record."""
    times, now = [], 0.0
    for i in range(60):
        times.append(round(now * 1000))
        now += 1 / 60 if i % 20 < 15 else 0.5
    path = encode(tmp_path / "a.mp4", pictures(60), 60, times_ms=times, options={"crf": "8", "bf": "0"})
    assert read_video_info(path).fps == 60
    for fps in (60, 20):
        shown = numbers(path, fps)
        assert shown[0] == 0
        assert shown == sorted(shown)
        for moment, seen in enumerate(shown):
            on_screen = max(i for i, time in enumerate(times) if time <= moment * 1000 / fps + 1)
            assert abs(seen - on_screen) <= 1
    assert set(numbers(path, 60)) == set(range(60))


def test_a_capture_with_missing_frames_keeps_its_rate(tmp_path):
    kept = [i for i in range(90) if i % 9 not in (3, 7)][:60]
    path = encode(tmp_path / "a.mp4", pictures(60), 60, times_ms=[round(i * 1000 / 60) for i in kept])
    assert read_video_info(path).fps == 60
    assert len(numbers(path)) == kept[-1] + 1
    assert set(numbers(path)) == set(range(60))


@pytest.mark.parametrize("rate", [8, 12, 15, 24, 30, 40])
def test_gif_delays_that_alternate_are_one_rate(tmp_path, rate):
    stays = [round((i + 1) * 100 / rate) - round(i * 100 / rate) for i in range(40)]
    frames = [Image.fromarray(pixels) for pixels in pictures(40)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[10 * s for s in stays])
    assert float(read_video_info(tmp_path / "a.gif").fps) == pytest.approx(rate, rel=0.01)
    assert numbers(tmp_path / "a.gif") == list(range(40))


def test_the_rate_is_that_of_the_pictures():
    ms = Fraction(1, 1000)
    assert frame_rate([Fraction(1, 25)] * 9, [Fraction(90_000), Fraction(25)], Fraction(1, 90_000)) == 25
    assert frame_rate([33 * ms, 33 * ms, 34 * ms] * 20, [Fraction(1000)], ms) == 30
    assert frame_rate([Fraction(1001, 30000)] * 9, [Fraction(30000, 1001)], Fraction(1, 30000)) == Fraction(30000, 1001)
    assert frame_rate([Fraction(15)] * 9, [Fraction(1000)], ms) == Fraction(1, 15)
    assert frame_rate([], [Fraction(30)], ms) == 30
    assert frame_rate([], [], ms) is None


def test_time_lapses_are_not_a_jump(tmp_path):
    path = encode(tmp_path / "a.mkv", pictures(12), 1, times_ms=[15_000 * i for i in range(12)])
    assert read_video_info(path).fps == Fraction(1, 15)
    assert numbers(path) == list(range(12))


# The dataset's rate and size.


def test_rate_and_size_are_those_of_most_videos(source, config, capsys):
    encode(source / "0.mp4", pictures(20, height=96, width=128), 10)
    encode(source / "1.mp4", pictures(20), 50)
    for name in "234":
        encode(source / f"{name}.mp4", pictures(20), 25)
    main(config())
    metadata = read_metadata(config().output_dir)
    assert (metadata.frame_shape, metadata.fps) == ((64, 96, 3), 25)
    captured = capsys.readouterr()
    assert "0.mp4: has frames of 96×128 (height × width), most sources 64×96" in captured.err
    assert "frames of 64×96, 25 per second; 1 of 4 have another rate and are resampled" in captured.out


def test_rates_of_a_clock_need_a_choice(source, config):
    encode(source / "a.webm", pictures(20), 1000, "libvpx", list(range(0, 60, 3)), mux={"live": "1"})
    with pytest.raises(InputError, match=r"`fps`: the videos say 333.* per second"):
        main(config())
    main(config(fps=100))
    assert read_metadata(config().output_dir).fps == 100


def test_a_cover_picture_is_not_the_video(source, config):
    Image.new("RGB", (48, 48), (9, 99, 9)).save(source / "cover.jpg")
    encode(source / "v.mp4", pictures(20))
    names = ("cover.jpg", "v.mp4")
    with av.open(str(source / "a.mp4"), "w") as out, ExitStack() as stack:
        given = [stack.enter_context(av.open(str(source / name))).streams.video[0] for name in names]
        streams = [out.add_stream_from_template(stream) for stream in given]
        streams[0].disposition = av.stream.Disposition.attached_pic
        for old, new in zip(given, streams, strict=True):
            remux(out, old, new)
    (source / "v.mp4").unlink()
    main(config(source="video"))
    assert episodes(config()) == {"a.mp4/000000": list(range(20))}
    assert read_metadata(config().output_dir).fps == 25


def test_mostly_skipped_is_no_success(source, config, capsys):
    np.save(source / "a.npy", np.stack(pictures(8)))
    for name in "bc":
        (source / f"{name}.npy").write_bytes(b"")
    with pytest.raises(InputError, match="2 of 3 sources were skipped, more than half"):
        main(config())
    assert episodes(config()) == {"a.npy/000000": list(range(8))}
    main(config(output_dir=config().output_dir + "2", allow_skips=True))


# Damage.


@pytest.mark.parametrize("seed", range(4))
def test_damaged_videos_end_before_the_damage(source, config, capsys, seed):
    options = {"crf": "18", "g": "20", "bf": "2"}
    path = encode(source / "a.mp4", pictures(60), options=options, mux={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    rng = np.random.default_rng(seed)
    for place in rng.integers(start + (len(content) - start) // 2, start + (len(content) - start) * 3 // 4, 12):
        content[place] ^= int(rng.integers(1, 255))
    path.write_bytes(content)
    main(config())
    (clip,) = by_id(config().output_dir).values()
    assert 10 <= len(clip) < 50
    errors = [np.abs(frame.astype(int) - picture(i)).mean() for i, frame in enumerate(clip.frames_THWC)]
    assert max(errors) < 6
    assert f"a.mp4: is damaged after {len(clip)} of its pictures" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"a\.mp4: is damaged.*`strict`"):
        main(config(output_dir=config().output_dir + "2", strict=True))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_truncated_videos_keep_what_is_whole(source, config, capsys, suffix):
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264")
    options = {"qscale": "2"} if codec == "mpeg4" else {"crf": "8", "b:v": "2M"}
    mux = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = encode(source / f"a.{suffix}", pictures(50), codec=codec, options=options, mux=mux)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    main(config(min_clip_length=2))
    (found,) = episodes(config()).values()
    assert found == list(range(len(found)))
    assert 3 <= len(found) < 50
    assert f"a.{suffix}: is damaged after" in capsys.readouterr().err


def test_a_cut_picture_ends_its_folder(source, config, capsys):
    folder(source / "ep", [f"{i:03}.jpg" for i in range(12)])
    data = (source / "ep" / "007.jpg").read_bytes()
    (source / "ep" / "007.jpg").write_bytes(data[: len(data) // 2])
    main(config())
    assert episodes(config()) == {"ep/000000": list(range(7))}
    assert "007.jpg: cannot be read as a picture" in capsys.readouterr().err


# Orientation, and what the decoder knows.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(source, config, orientation):
    upright = np.stack(pictures(6))
    stored = {
        1: upright,
        2: upright[:, :, ::-1],
        3: upright[:, ::-1, ::-1],
        4: upright[:, ::-1],
        5: upright.swapaxes(1, 2),
        6: np.rot90(upright, 1, (1, 2)),
        7: np.rot90(upright, 2, (1, 2)).swapaxes(1, 2),
        8: np.rot90(upright, -1, (1, 2)),
    }[orientation]
    (source / "ep").mkdir()
    for i, pixels in enumerate(stored):
        image = Image.fromarray(pixels)
        exif = image.getexif()
        exif[274] = orientation
        image.save(source / "ep" / f"{i}.png", exif=exif)
    main(config())
    (clip,) = by_id(config().output_dir).values()
    np.testing.assert_array_equal(clip.frames_THWC, upright)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_display_matrices_turn_and_mirror(tmp_path, quarters, mirror):
    """Against ffmpeg's own filters for what the matrix says."""
    path = encode(tmp_path / "a.mp4", pictures(4))
    # Where the stored pixel (x, y) is shown: turned clockwise by quarters, then mirrored left to right.
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][quarters]
    if mirror:
        a, c = -a, -c
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 4 + 20 + 16  # past version, times and ids, layer and volume
    values = (a, b, 0, c, d, 0, 0, 0, 1)
    scales = (1 << 16, 1 << 16, 1 << 30) * 3
    content[place : place + 36] = b"".join(
        (value * scale).to_bytes(4, "big", signed=True) for value, scale in zip(values, scales, strict=True)
    )
    path.write_bytes(content)
    shown = np.rot90(picture(3), -quarters)
    expected = shown[:, ::-1] if mirror else shown
    frames = [frame for frame in iterate_video(path) if frame is not None]
    assert frames[3].shape == expected.shape
    assert np.abs(frames[3].astype(int) - expected).mean() < 6


def test_the_user_hears_what_the_decoder_knows(source, config, capsys):
    encode(source / "a.mp4", pictures(8))
    with av.open(str(source / "hdr.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "8"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.color_trc = 16
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for pixels in pictures(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    encode(source / "field.mkv", pictures(8), options={"x264-params": "interlaced=1", "crf": "8"})
    main(config())
    said = capsys.readouterr().err
    assert "1 of 3 videos: HDR (PQ)" in said
    assert "1 of 3 videos: pixels that are not square (4/3)" in said
    assert "1 of 3 videos: interlaced" in said
    with pytest.raises(InputError, match=r"(field\.mkv|hdr\.mp4): .*`strict`"):
        main(config(output_dir=config().output_dir + "2", strict=True))


def test_what_is_transparent_is_black(source, config, capsys):
    """Whatever an editor has left below."""
    alpha = np.full((64, 96, 1), 255, np.uint8)
    alpha[:16] = 0
    clear = [np.concatenate([pixels, alpha], axis=-1) for pixels in pictures(6)]
    encode(source / "a.mov", clear, codec="qtrle", pix_fmt="argb", options={})
    (source / "ep").mkdir()
    for i, pixels in enumerate(clear):
        Image.fromarray(pixels).save(source / "ep" / f"{i}.png")
    expected = np.stack(pictures(6))
    expected[:, :16] = 0
    for kind in ("video", "images"):
        out = config(source=kind, output_dir=config().output_dir + kind)
        main(out)
        (clip,) = by_id(out.output_dir).values()
        np.testing.assert_array_equal(clip.frames_THWC, expected)
        assert "transparency, laid over black" in capsys.readouterr().err


# Order and completeness.


def folder(path, names):
    """A folder of pictures, numbered in the order of the names."""
    path.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(picture(i)).save(path / name, quality=98)


@pytest.mark.parametrize(
    "names",
    [
        ["-10.png", "-9.png", "-1.png", "0.png", "2.png", "10.png"],
        ["0.png", "0.25.png", "0.5.png", "1.0.png", "10.0.png"],
        ["frame-9.jpg", "frame-10.jpg", "frame-11.jpg", "frame-100.jpg"],
        ["t_-2.5.webp", "t_-2.webp", "t_0.webp", "t_0.5.webp"],
        ["a.1.2.9.bmp", "a.1.2.10.bmp", "a.1.3.0.bmp", "a.1.3.1.bmp"],
    ],
)
def test_pictures_follow_the_numbers_in_their_names(source, config, names):
    folder(source / "ep", names)
    main(config())
    assert episodes(config()) == {"ep/000000": list(range(len(names)))}
    assert sorted(sorted(names), key=natural) == names


@pytest.mark.parametrize("second", ["{:03}_depth.png", "{:03}.jpg"])
def test_two_series_in_one_folder_are_no_video(source, config, capsys, second):
    first = "{:03}_rgb.png" if "depth" in second else "{:03}.png"
    folder(source / "ep", [name.format(i) for i in range(6) for name in (first, second)])
    folder(source / "good", [f"{i}.png" for i in range(6)])
    main(config())
    assert list(episodes(config())) == ["good/000000"]
    assert "ep: holds pictures of 2 series, like 000" in capsys.readouterr().err


def test_links_are_followed_and_everything_passed_over_is_counted(source, config, capsys, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    encode(tmp_path / "elsewhere" / "a.m4v", pictures(8), codec="mpeg4", options={"qscale": "2"})
    encode(source / "b.ts", pictures(8))
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(source)
    for name in ("notes.txt", "b.txt", "a.json", "README"):
        (source / name).touch()
    main(config())
    assert sorted(episodes(config()).values()) == [list(range(8))] * 2
    assert "2 videos; passed over: 1 .json, 2 .txt, 1 without a suffix" in capsys.readouterr().out


# Arrays beside the frames.


@pytest.mark.parametrize("key", ["dones", "terminated", "truncated", "is_last", "is_first"])
def test_episodes_in_an_array_end_where_it_says(source, config, key):
    ends = np.arange(40) == (20 if key == "is_first" else 19)
    if key == "is_first":
        ends[0] = True
    np.savez(
        source / "a.npz", frames=np.stack(pictures(40)), action=np.arange(40) % 5, reward=np.ones(40), **{key: ends}
    )
    main(config())
    assert episodes(config()) == {"a.npz/000000": list(range(20)), "a.npz/000020": list(range(20, 40))}
    for clip in by_id(config().output_dir).values():
        np.testing.assert_array_equal(clip.actions_T, [number(frame) % 5 for frame in clip.frames_THWC])
        np.testing.assert_array_equal(clip.rewards_T, np.ones(20))


def test_actions_of_other_types_and_what_is_not_used(source, config, capsys):
    actions = np.arange(12) % 3
    frames = np.stack(pictures(12))
    np.savez(source / "float.npz", frames=frames, actions=actions.astype(np.float32), depth=np.zeros(12))
    np.savez(source / "one_hot.npz", frames=frames, actions=np.eye(3)[actions], log_prob=np.zeros(12))
    np.savez(source / "bad.npz", frames=frames, actions=np.full((12, 3), 0.3))
    main(config())
    clips = by_id(config().output_dir)
    assert sorted(clips) == ["float.npz/000000", "one_hot.npz/000000"]
    for clip in clips.values():
        np.testing.assert_array_equal(clip.actions_T, actions)
    said = capsys.readouterr().err
    assert "1 of 2 arrays: hold depth, which is not used" in said
    assert "bad.npz: its actions are 3 columns: 0 (real), 1 (real), 2 (real); those of most sources one integer" in said


def test_actions_that_lead_to_their_frame_are_moved(source, config):
    led = np.arange(12)  # the action stored with frame t is t
    frames = np.stack(pictures(12))
    np.savez(source / "each.npz", frames=frames, actions=led, rewards=led)
    np.savez(source / "between.npz", frames=frames, actions=led[:-1], rewards=led[:-1])
    main(config(actions_lead_to=True))
    clips = by_id(config().output_dir)
    for name, expected in (("each", [*range(1, 12), 0]), ("between", [*range(11), 0])):
        np.testing.assert_array_equal(clips[f"{name}.npz/000000"].actions_T, expected)
        np.testing.assert_array_equal(clips[f"{name}.npz/000000"].rewards_T, expected)


def test_sources_without_actions_do_not_take_them_from_the_others(source, config, capsys):
    np.savez(source / "a.npz", frames=np.stack(pictures(8)), actions=np.arange(8))
    np.savez(source / "b.npz", frames=np.stack(pictures(8)))
    with pytest.raises(InputError, match=r"1 of 2 sources have no actions.*b\.npz; `drop_without_actions`"):
        main(config())
    main(config(drop_without_actions=True))
    (clip,) = by_id(config().output_dir).values()
    np.testing.assert_array_equal(clip.actions_T, np.arange(8))
    assert "1 of 2 sources have no actions" in capsys.readouterr().out


# Splits.


def test_groups_stay_together(source, config, capsys):
    for episode in range(6):
        for camera in "ab":
            np.save(source / f"{episode}_cam{camera}.npy", np.stack(pictures(8)))
    main(config(group=r"(\d+)_cam", val_fraction=0.3, test_fraction=0.3))
    splits = {
        split: {clip.clip_id.split("_")[0] for clip in clips} for split, clips in read_all(config().output_dir).items()
    }
    assert sorted(len(group) for group in splits.values()) == [2, 2, 2]
    assert not set.intersection(splits["train"], splits["val"]) | set.intersection(splits["val"], splits["test"])
    assert "12 usable sources in 6 groups" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"`group` \(: not a regular expression"):
        main(config(group="("))
    assert split_sources([], 0.1, 0.1, 0, "x") == {"train": [], "val": [], "test": []}


@pytest.mark.parametrize("name", ["a.mp4", "a.npy", "a"])
def test_episodes_in_one_file_are_parted_where_the_list_says(source, config, name):
    starts = [0, 10, 25]
    if name == "a":
        folder(source / "a", [f"{i}.png" for i in range(40)])
    elif name == "a.npy":
        np.save(source / name, np.stack(pictures(40)))
    else:
        encode(source / name, pictures(40))
    (source / "a.episodes.json").write_text(json.dumps(starts))
    main(config())
    parts = {f"{name}/{a:06d}": list(range(a, b)) for a, b in zip(starts, [10, 25, 40], strict=True)}
    assert episodes(config()) == parts
    if name == "a.mp4":  # numbers are those of the file's pictures, whatever the dataset's rate
        main(config(output_dir=config().output_dir + "2", fps=12.5))
        found = episodes(config(output_dir=config().output_dir + "2"))
        assert sorted(numbers[0] for numbers in found.values()) == [0, 10, 26]
    (source / "a.episodes.json").write_text("[10, 0]")
    with pytest.raises(InputError, match="none of its 1 sources can be used"):
        main(config(output_dir=config().output_dir + "3"))


# One bad file never ends a conversion.


def test_names_and_titles_need_not_be_utf8(source, config, capsys):
    path = encode(source / "title.mkv", pictures(8), codec="mpeg4", options={"qscale": "2"})
    with av.open(str(path)) as given, av.open(str(source / "t.avi"), "w") as out:
        out.metadata["title"] = "PLACEHOLDERTITLE"
        old = given.streams.video[0]
        remux(out, old, out.add_stream_from_template(old))
    content = (source / "t.avi").read_bytes()
    assert b"PLACEHOLDERTITLE" in content
    (source / "t.avi").write_bytes(content.replace(b"PLACEHOLDERTITLE", b"Caf\xe9 del Mar  \xff\xfe"))
    np.save(os.fsdecode(os.fsencode(source) + b"/caf\xe9.npy"), np.stack(pictures(8)))
    main(config(source="video"))
    assert sorted(episodes(config())) == ["t.avi/000000", "title.mkv/000000"]
    main(config(source="npy", output_dir=config().output_dir + "2"))
    assert list(by_id(config().output_dir + "2")) == ["caf\\xe9.npy/000000"]


def test_pictures_over_the_limit_are_skipped(source, config, capsys):
    for name in ("a", "b"):
        folder(source / name, [f"{i}.png" for i in range(6)])
    Image.new("1", (20_000, 10_000)).save(source / "b" / "0.png")
    main(config())
    assert list(episodes(config())) == ["a/000000"]
    assert "b/0.png: cannot be read as a picture" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["header", "open"])
def test_whatever_a_decoder_raises_is_named(source, config, monkeypatch, capsys, method):
    for name in "ab":
        np.save(source / f"{name}.npy", np.stack(pictures(8)))
    works = getattr(Arrays, method)

    def fails(self, path, *rest):
        if path.name == "a.npy":
            raise ZeroDivisionError("in a codec")
        return works(self, path, *rest)

    monkeypatch.setattr(Arrays, method, fails)
    main(config())
    assert list(episodes(config())) == ["b.npy/000000"]
    assert "a.npy: cannot be read (ZeroDivisionError: in a codec)" in capsys.readouterr().err
