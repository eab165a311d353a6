"""Frames of videos that the tests make: which, in what order, with what times, and files that are no video."""

import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from chat import video
from chat.video import Frame, read_frames
from model.errors import DataError, SampleError

SIZE = (96, 64)


def make_video(path: Path, ticks: list[int], rate: int = 10, codec: str = "mpeg4", draw=None, group: int = 12, **options) -> Path:
    """Frame number k (its red says which: 255 * k / all) appears at tick k, `rate` ticks a second; B-frames, key frames
    every `group`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"bf": "2", **options})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", group
        stream.codec_context.time_base, stream.bit_rate = Fraction(1, rate), 4_000_000
        for number, tick in enumerate(ticks):
            colour = (255 * number // len(ticks), 0, 255 - 255 * number // len(ticks))
            frame = av.VideoFrame.from_image(draw or Image.new("RGB", SIZE, colour))
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Frame], count: int) -> list[int]:
    """Which frames these are, by their red."""
    return [round(np.asarray(frame.image)[..., 0].mean() * count / 255) for frame in frames]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("ts", "mpeg2video")])
def test_frames_stand_in_the_middle_of_equal_parts(tmp_path, suffix, codec):
    frames = read_frames(make_video(tmp_path / f"v.{suffix}", list(range(80)), codec=codec), 8)
    assert [frame.seconds for frame in frames] == pytest.approx([number / 10 for number in range(5, 80, 10)], abs=0.002)
    assert numbers(frames, 80) == pytest.approx(list(range(5, 80, 10)), abs=2)
    assert all(frame.image.mode == "RGB" and frame.image.size == SIZE for frame in frames)
    assert [frame.time for frame in frames] == [f"0:0{second}.5" for second in range(8)]


def test_seeking_finds_what_decoding_everything_finds(tmp_path):
    path = make_video(tmp_path / "v.mp4", list(range(50)))
    with av.open(str(path)) as container:
        everything = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    for count in (1, 3, 7, 49, 50, 400):
        frames = read_frames(path, count)
        times = [frame.seconds for frame in frames]
        chosen = [everything[int((part + 0.5) * 50 / count)] for part in range(count)] if count <= 50 else everything
        assert times == [time for time, _ in chosen], count
        assert all(frame.image.tobytes() == image.tobytes() for frame, (_, image) in zip(frames, chosen, strict=True))


def test_time_decides_where_the_rate_varies(tmp_path):
    """40 frames within a second, then one that stays for nine."""
    path = make_video(tmp_path / "v.mkv", [*range(0, 1000, 25), 1000, 9975], rate=1000)
    frames = read_frames(path, 10)
    assert [frame.seconds for frame in frames] == pytest.approx([0.475, 1.0], abs=0.03), "the long one comes once"
    assert numbers(frames, 42) == pytest.approx([19, 40], abs=2)
    assert len(read_frames(path, 20_000)) == 42, "parts of half a millisecond: all frames"


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("m2ts", "libx264"), ("ts", "mpeg2video"), ("mp4", "libx264"), ("mkv", "libx264")])
@pytest.mark.parametrize(("there", "group"), [(60, 1000), (120, 50)])
def test_the_first_group_of_pictures_is_not_lost(tmp_path, suffix, codec, there, group):
    frames = read_frames(make_video(tmp_path / f"v.{suffix}", list(range(there)), codec=codec, group=group, sc_threshold="0"), 6)
    middles = [there * (2 * part + 1) // 12 for part in range(6)]
    assert [frame.seconds for frame in frames] == pytest.approx([number / 10 for number in middles], abs=0.002)
    assert numbers(frames, there) == pytest.approx(middles, abs=2)


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("png", {}), ("apng", {}), ("avif", {"quality": 95})])
def test_an_animation_is_a_video(tmp_path, suffix, options):
    colours = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    colours[0].save(tmp_path / f"v.{suffix}", save_all=True, append_images=colours[1:], duration=[1000, 200, 5000], **options)
    frames = read_frames(tmp_path / f"v.{suffix}", 40)
    assert [frame.image.getpixel((5, 5)) for frame in frames] == [pytest.approx(colour, abs=6) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert [frame.time for frame in frames] == ["0:00.0", "0:01.0", "0:01.2"]
    (frame,) = read_frames(tmp_path / f"v.{suffix}", 1)
    assert frame.image.getpixel((5, 5))[2] > 240, "on show in the middle"


@pytest.mark.parametrize(("there", "asked"), [(1, 8), (1, 1), (3, 8), (5, 5)])
def test_a_short_video_gives_all_it_has(tmp_path, there, asked):
    frames = read_frames(make_video(tmp_path / "v.mp4", list(range(there))), asked)
    assert [frame.seconds for frame in frames] == pytest.approx([number / 10 for number in range(there)])


def test_a_turned_video_is_shown_upright(tmp_path):
    """As a telephone films: the image lies on its side, the header says to turn it to the right."""
    lying = Image.new("RGB", SIZE, "blue")
    lying.paste("red", (0, 0, SIZE[0] // 2, SIZE[1]))
    data = bytearray(make_video(tmp_path / "v.mp4", [0, 1], draw=lying).read_bytes())
    matrix = data.index(b"tkhd") + 44  # ISO/IEC 14496-12, 8.3.2: nine fixed-point numbers
    turn = [0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[1] << 16, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    (tmp_path / "v.mp4").write_bytes(data)
    image = read_frames(tmp_path / "v.mp4", 1)[0].image
    assert image.size == SIZE[::-1]
    (top, _, top_blue), (bottom, _, bottom_blue) = image.getpixel((32, 10)), image.getpixel((32, 85))
    assert top > 200 > top_blue and bottom < 50 < bottom_blue


def test_a_recording_that_was_broken_off_is_told_so(tmp_path):
    """An mp4 has the places of its frames at its end."""
    data = make_video(tmp_path / "v.mp4", list(range(40)), codec="libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(SampleError, match="it may be truncated, or no video"):
        read_frames(tmp_path / "cut.mp4", 4)


def test_a_damaged_video_gives_what_decodes(tmp_path):
    data = make_video(tmp_path / "v.mkv", list(range(60)), codec="libx264").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 2 // 3])
    frames = read_frames(tmp_path / "cut.mkv", 4)
    assert frames and numbers(frames, 60) == pytest.approx([frame.seconds * 10 for frame in frames], abs=2)


def audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_files_that_are_no_video(tmp_path):
    segment = make_video(tmp_path / "segment.ts", [0, 1], codec="mpeg2video")
    contents = {"noise.mp4": np.random.default_rng(0).bytes(5000), "empty.mp4": b"", "text.mp4": b"hello " * 500,
                "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{segment}\n#EXT-X-ENDLIST\n".encode(),
                "list.mp4": f"ffconcat version 1.0\nfile {segment.name}\n".encode()}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SampleError, match=rf"{name}' cannot be read: .+"):
            read_frames(tmp_path / name, 3)
    with pytest.raises(SampleError, match="No such file"):
        read_frames(tmp_path / "nowhere.mp4", 3)
    with pytest.raises(SampleError, match="it is a folder, a pipe or a device"):
        read_frames(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe.mp4")  # which nobody writes into
    with pytest.raises(SampleError, match=r"pipe\.mp4' cannot be read: it is a folder, a pipe or a device"):
        read_frames(tmp_path / "pipe.mp4", 3)
    audio(tmp_path / "sound.m4a")
    with pytest.raises(SampleError, match=r"no images, only \['audio'\]"):
        read_frames(tmp_path / "sound.m4a", 3)


def test_a_giant_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(SampleError, match="96 x 64 pixels, more than 6,143"):
        read_frames(make_video(tmp_path / "v.mp4", [0]), 1)


def test_without_pyav_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(DataError, match=r"pip install -r requirements-video\.txt"):
        read_frames(tmp_path / "v.mp4", 1)


def test_times_as_text():
    texts = {0: "0:00.0", 3.99: "0:03.9", 0.3 - 1e-9: "0:00.3", 59.99: "0:59.9", 60: "1:00.0", 3599.95: "59:59.9", 3723: "1:02:03.0"}
    assert {seconds: Frame(None, seconds).time for seconds in texts} == texts
