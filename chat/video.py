"""A video as pictures: frames evenly spaced in time, each with its time.

Moving images are Pillow's. Decoding of all else is PyAV's (FFmpeg), an optional requirement: requirements-video.txt. The packets' times are read first, without
decoding: they are exact where a file's header is wrong or silent (recordings of browsers, variable frame rates). Then only
the frames asked for are decoded, each from the key frame before it.
"""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from dataset.images import MAX_PIXELS, open_image
from model.errors import DataError, SampleError, UsageError, check_fetched, reason, shown
from model.storage import is_regular
from model.vision import to_rgb

ANIMATED_SUFFIXES = {".gif", ".webp", ".apng", ".avif", ".avifs"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".3gp", ".wmv"}


@dataclass(frozen=True)
class Frame:
    """A picture of a video, RGB and upright, and the time at which it appears, in seconds from the first one."""

    picture: Image.Image
    seconds: float


def read_frames(path: str | Path, count: int) -> list[Frame]:
    """The frames on show in the middle of `count` equal parts of the video, in order.

    One that is on show in the middle of several parts comes once: a video of fewer frames gives all it has.
    Raises SampleError for a file without pictures or beyond decoding, DataError where PyAV is not installed.
    """
    if count < 1:
        raise ValueError(f"{count} frames of a video")
    name = shown(str(path))
    try:
        if not is_regular(path):
            raise SampleError(f"video {name} cannot be read: it is a folder, a pipe or a device")
        if not os.path.getsize(path):
            raise SampleError(f"video {name} cannot be read: it is empty")
        check_fetched(path)
        if frames := _animation(path, count):
            return frames
        import av

        # What a playlist disguised as a video names stays closed: no protocol is allowed but the file given.
        with open(path, "rb") as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            return _frames(container, _picture_stream(container, name), count, name)
    except (SampleError, MemoryError):
        raise
    except UsageError as error:
        raise SampleError(str(error)) from error
    except ImportError as error:
        raise DataError("reading a video needs PyAV: pip install -r requirements-video.txt") from error
    except Exception as error:  # decoders raise all kinds
        remedy = "; it is cut short, or no video" if isinstance(error, ValueError) else ""  # what FFmpeg calls invalid data
        raise SampleError(f"video {name} cannot be read: {reason(error)}{remedy}") from error


def clock(seconds: float, tenths: bool = False) -> str:
    """A time as people write it: 0:03, 12:40, 1:02:03, and with `tenths` 0:03.4; cut, not rounded."""
    # Rates like 30000/1001 leave times a hair below the tenth that they mean.
    whole, tenth = divmod(int(seconds * 10 + 1e-6), 10)
    text = f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    return f"{text}.{tenth}" if tenths else text


def labels(frames: list[Frame]) -> list[str]:
    """The times of the frames as text, in tenths of a second where seconds would not tell them apart."""
    seconds = [clock(frame.seconds) for frame in frames]
    return seconds if len(set(seconds)) == len(frames) else [clock(frame.seconds, tenths=True) for frame in frames]


def _picture_stream(container, name: str):
    """The first video stream that is no cover art; raises SampleError."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.width * stream.height > MAX_PIXELS:
                raise SampleError(f"video {name} has {stream.width} x {stream.height} pixels, more than {MAX_PIXELS:,}")
            stream.thread_type = "AUTO"
            return stream
    raise SampleError(f"video {name} has no pictures, only {[stream.type for stream in container.streams]}")


def _frames(container, stream, count: int, name: str) -> list[Frame]:
    """Chooses by the packets' times, in ticks of the stream's time base, and decodes what was chosen."""
    packets = sorted((packet.pts, packet.duration or 0, packet.is_keyframe, packet.pts if packet.dts is None else packet.dts)
                     for packet in container.demux(stream) if packet.size and packet.pts is not None and not packet.is_discard)  # fmt: skip
    if not packets:
        raise SampleError(f"video {name} has no frame with a time; a raw stream needs a container (mp4, mkv) around it")
    ticks = [packet[0] for packet in packets]
    last = packets[-1][1] or (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1)  # as long as the others, where no one says
    keys = [(tick, read_at) for tick, _, is_key, read_at in packets if is_key] or [(ticks[0], packets[0][3])]
    frames = [Frame(_upright(frame, stream), float((frame.pts - ticks[0]) * stream.time_base))
              for frame in _decode(container, stream, _shown(ticks, ticks[-1] + last, count), keys)]  # fmt: skip
    if not frames:
        raise SampleError(f"video {name} cannot be read: no frame of it decodes")
    return frames


def _shown(ticks: list[float], end: float, count: int) -> list[float]:
    """Those of the frames' times (ascending) that are on show in the middle of `count` equal parts of the time until `end`."""
    length = max(end - ticks[0], 1)
    middles = [ticks[0] + length * (2 * part + 1) / (2 * count) for part in range(count)]
    return sorted({ticks[bisect_right(ticks, middle) - 1] for middle in middles})


def _animation(path: str | Path, count: int) -> list[Frame]:
    """The frames of a GIF, WebP, PNG or AVIF that moves; none of other files."""
    with open(path, "rb") as file:
        if not re.match(rb"GIF8|\x89PNG|RIFF....WEBP|....ftypavis", file.read(12), re.DOTALL):
            return []
        file.seek(0)
        image, ticks = open_image(file.read(), MAX_PIXELS), [0]
    frames = range(getattr(image, "n_frames", 1))
    for number in frames:
        image.seek(number)
        image.load()  # which some formats' durations wait for
        ticks.append(ticks[-1] + (image.info.get("duration") or 100))  # ms; as browsers do where none is given
    wanted = set(_shown(ticks[:-1], ticks[-1], count))
    chosen = []
    for number in frames:
        if ticks[number] in wanted:
            image.seek(number)
            chosen.append(Frame(to_rgb(image.copy()), ticks[number] / 1000))
    return chosen


def _decode(container, stream, wanted: list[int], keys: list[tuple[int, int]]) -> Iterator:
    """The first decodable frame at or after each wanted tick (ascending), none twice. Containers are searched by the times at
    which packets are read, which are earlier than those of pictures: `keys` has both, of key frames."""
    frames, at = iter(()), None
    for tick in wanted:
        if at is not None and at >= tick:
            continue  # what stood between could not be decoded
        key = bisect_right(keys, (tick, math.inf))
        if at is None or key > bisect_right(keys, (at, math.inf)):
            frames = _after_seek(container, stream, tick, (keys[max(0, key - 1)][1], min(keys)[1]))
        for frame in frames:
            at = frame.pts
            if at >= tick:
                yield frame
                break


def _after_seek(container, stream, tick: int, starts: tuple[int, int]) -> Iterator:
    """Frames from the key frame before `tick` on, which is read at the first of `starts`; from the second, the beginning,
    where the container finds no way there."""
    frames = iter(())
    for start in starts:
        container.seek(start, stream=stream)
        frames = _decodable(container, stream)
        first = next(frames, None)
        if first is not None:
            frames = chain([first], frames)
            if first.pts <= tick:
                break
    return frames


def _decodable(container, stream) -> Iterator:
    """Frames in order of time; damaged packets are passed over."""
    import av

    for packet in container.demux(stream):
        try:
            yield from (frame for frame in packet.decode() if frame.pts is not None)
        except av.FFmpegError:
            continue


def _upright(frame, stream) -> Image.Image:
    """RGB with square pixels, turned as the file says."""
    aspect = min(max(stream.sample_aspect_ratio or 1, 1 / 4), 4)  # beyond that a header is wrong
    picture = frame.to_image(width=max(1, round(frame.width * aspect)), height=frame.height)
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
