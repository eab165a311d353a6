"""A video as images: frames evenly spaced in time, each with its time.

Decoding is PyAV's (FFmpeg), an optional requirement: requirements-video.txt. The packets' times are read first, without
decoding: they are exact where a file's header is wrong or silent (recordings of browsers, variable frame rates), where
`transformers.video_utils` finds no frame at all. Then each frame is decoded from the key frame before it.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from PIL import Image

from dataset.images import MAX_PIXELS
from model.errors import DataError, SampleError, UsageError, check_fetched, reason, shown
from model.storage import is_regular


@dataclass(frozen=True)
class Frame:
    """An image of a video, RGB and upright, and when it appears, in seconds from the first one."""

    image: Image.Image
    seconds: float

    @property
    def time(self) -> str:
        """As people write it: 0:03.4, 12:40.0, 1:02:03.0; cut, not rounded."""
        # Rates like 30000/1001 leave times a hair below the tenth that they mean.
        whole, tenth = divmod(int(self.seconds * 10 + 1e-6), 10)
        minutes = f"{whole // 3600}:{whole // 60 % 60:02}" if whole >= 3600 else f"{whole // 60}"
        return f"{minutes}:{whole % 60:02}.{tenth}"


def read_frames(path: str | Path, count: int) -> list[Frame]:
    """The frames on show in the middle of `count` equal parts of the video, in order; of fewer, all there are.

    Raises SampleError for a file without images or beyond decoding, UsageError for one that was not fetched, DataError
    where PyAV is not installed.
    """
    name = shown(str(path))
    try:
        if not is_regular(path):
            raise SampleError(f"video {name} cannot be read: it is a folder, a pipe or a device")
        check_fetched(path)
        import av

        # What a playlist disguised as a video names stays closed: no protocol is allowed but the file given.
        with open(path, "rb") as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
            return choose_frames(container, count, name)
    except (SampleError, UsageError, MemoryError):
        raise
    except ImportError as error:
        raise DataError("reading a video needs PyAV: pip install -r requirements-video.txt") from error
    except Exception as error:  # decoders raise all kinds
        raise SampleError(f"video {name} cannot be read: {reason(error)}; it may be truncated, or no video") from error


def choose_frames(container, count: int, name: str) -> list[Frame]:
    """Chooses by the packets' times, in ticks of the stream's time base, and decodes what was chosen."""
    stream = container.streams.best("video")  # no cover art, if there is anything else
    if stream is None:
        raise SampleError(f"video {name} has no images, only {[stream.type for stream in container.streams]}")
    if stream.width * stream.height > MAX_PIXELS:
        raise SampleError(f"video {name} has {stream.width} x {stream.height} pixels, more than {MAX_PIXELS:,}")
    stream.thread_type = "AUTO"
    packets = sorted((packet.pts, packet.duration or 0) for packet in container.demux(stream)
                     if packet.size and packet.pts is not None and not packet.is_discard)  # fmt: skip
    if not packets:
        raise SampleError(f"video {name} has no frame with a time; a raw stream needs a container (mp4, mkv) around it")
    ticks = [pts for pts, _ in packets]
    length = ticks[-1] - ticks[0] + (packets[-1][1] or (ticks[-1] - ticks[0]) / max(len(ticks) - 1, 1))
    middles = [ticks[0] + length * (2 * part + 1) / (2 * count) for part in range(count)]
    frames = {}
    for tick in sorted({ticks[bisect_right(ticks, middle) - 1] for middle in middles}):
        frame = frame_at(container, stream, tick, ticks[0])
        if frame is not None:
            image = frame.to_image().rotate(frame.rotation, expand=True)  # as a phone's header says
            frames[frame.pts] = Frame(image, float((frame.pts - ticks[0]) * stream.time_base))
    if not frames:
        raise SampleError(f"video {name} cannot be read: no frame of it decodes")
    return list(frames.values())


def frame_at(container, stream, tick: int, first: int):
    """The first decodable frame at or after `tick`; None when nothing decodes from there on."""
    for start in (tick, min(first, 0)):  # where the search lands too late, as in MPEG-TS, from the start
        container.seek(start, stream=stream)
        frames = decodable(container, stream)
        earliest = next(frames, None)
        if earliest is not None and (earliest.pts <= tick or start != tick):
            return next((frame for frame in chain([earliest], frames) if frame.pts >= tick), None)
    return None


def decodable(container, stream) -> Iterator:
    """Frames in order of time; damaged packets are passed over."""
    import av

    for packet in container.demux(stream):
        with suppress(av.FFmpegError):
            yield from (frame for frame in packet.decode() if frame.pts is not None)
