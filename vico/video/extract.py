"""Many videos to features, on all ranks, with decoding ahead of the encoder."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vico.distributed.world import World
from vico.io import log
from vico.io.failpoints import reached
from vico.video.encoder import Encoder
from vico.video.features import to_half
from vico.video.frames import Frames, VideoError, decode_frames
from vico.video.listing import Video
from vico.video.parts import Parts
from vico.video.pictures import decode_pictures

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Extraction:
    """What is extracted, and how."""

    fps: Fraction
    frames_fps: Fraction | None  # of pictures on disk; None: the videos are files
    batch_size: int
    num_workers: int  # threads of this rank that decode
    keep_damaged: bool

    def decode(self, video: Video, size: int) -> Iterator[Frames]:
        """Raises VideoError, for a damaged video after its last block."""
        if self.frames_fps is None:
            return decode_frames(video.path, self.fps, size, block=self.batch_size)
        return decode_pictures(video.path, self.frames_fps, self.fps, size, self.batch_size)


@dataclass
class Share:
    """What came of a rank's videos."""

    left_out: dict[str, str] = field(default_factory=dict)  # reason by id
    damaged: dict[str, str] = field(default_factory=dict)  # those that were kept
    num_videos: int = 0
    num_frames: int = 0
    decode_seconds: float = 0.0  # of one thread, without waiting
    num_workers: int = 1

    @property
    def decoding_seconds(self) -> float:
        """How long this rank would take if it decoded alone."""
        return self.decode_seconds / self.num_workers


def extract(
    videos: Sequence[Video], encoder: Encoder, how: Extraction, parts: Parts, world: World
) -> Share:
    """Write the part of each of this rank's videos. Raises DiskError.

    A video that cannot be used is left out. No collective.
    """
    share = Share(num_workers=how.num_workers)
    progress = _TimeLeft(videos, world)
    encoded: dict[str, list[Tensor]] = {}
    with _one_thread_each(encoder.device.type == "cpu"):
        decoder = _Decoder(videos, how, encoder)
        try:
            for video, item in decoder:
                if isinstance(item, _End):
                    _finish(video, encoded.pop(video.id, []), item, how, parts, share)
                    progress(video, share)
                    continue
                features = item if isinstance(item, Tensor) else encoder.encode(item)
                encoded.setdefault(video.id, []).append(features)
                share.num_frames += len(features)
                world.set_phase(f"encoding {video.path.name}")
        finally:
            decoder.close()
    share.decode_seconds = decoder.decode_seconds
    return share


@contextmanager
def _one_thread_each(is_cpu: bool) -> Iterator[None]:
    """A sum over several threads has other last bits: the file would depend on their number."""
    before = torch.get_num_threads()
    if is_cpu:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(
    video: Video, blocks: list[Tensor], end: "_End", how: Extraction, parts: Parts, share: Share
) -> None:
    """The part of a video, or why it has none."""
    reason = end.reason
    if blocks and (reason is None or how.keep_damaged):
        try:
            features = to_half(torch.cat(blocks), video.path)
        except VideoError as problem:
            reason = problem.reason
        else:
            parts.write(video, features, reason is not None)
            reached("extract:part")
            share.num_videos += 1
            if reason is not None:
                share.damaged[video.id] = reason
            return
    share.left_out[video.id] = reason or "no frame can be decoded"


class _TimeLeft:
    """Says now and then how far this rank is, and how long it will take."""

    def __init__(self, videos: Sequence[Video], world: World) -> None:
        self._total = len(videos)
        self._bytes = max(1, sum(video.num_bytes for video in videos))
        self._done, self._done_bytes, self._start = 0, 0, time.monotonic()
        self._others = f" of rank 0 of {world.size}" if world.size > 1 else ""
        self._log = log.ProgressLog(world.set_phase, world.is_main)

    def __call__(self, video: Video, share: Share) -> None:
        self._done += 1
        self._done_bytes += video.num_bytes
        seconds = time.monotonic() - self._start
        left = seconds * (self._bytes / max(1, self._done_bytes) - 1)
        self._log(
            f"{self._done} of {self._total} videos{self._others}, "
            f"{share.num_frames / seconds:.1f} frames/s, about {log.duration(left)} left"
        )


@dataclass(frozen=True)
class _End:
    """After the last block of a video. `reason`: why it is damaged."""

    reason: str | None


class _Decoder:
    """(video, block of frames) from threads that decode ahead: FFmpeg runs without Python's lock.

    On a CPU they encode too, and give features in place of frames: each on one core. Each thread
    has one video at a time; the queue bounds the frames in memory.
    """

    def __init__(self, videos: Sequence[Video], how: Extraction, encoder: Encoder) -> None:
        self._how, self._encoder = how, encoder
        self._encodes = encoder.device.type == "cpu"
        self._videos, self._lock = iter(videos), threading.Lock()
        self._queue: queue.Queue[Any] = queue.Queue(2 * how.num_workers)
        self._stop = threading.Event()
        self.decode_seconds = 0.0
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(how.num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[Video, Frames | Tensor | _End]]:
        num_running = len(self._threads)
        while num_running:
            item = self._queue.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item

    def close(self) -> None:
        """End the threads, wherever they are."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while (video := self._next()) is not None and not self._stop.is_set():
                self._decode(video)
            self._put(None)
        except Exception as bug:  # raised where the frames are taken
            self._put(bug)
        with self._lock:
            self.decode_seconds += time.thread_time()

    def _next(self) -> Video | None:
        with self._lock:
            return next(self._videos, None)

    def _decode(self, video: Video) -> None:
        reason = None
        try:
            for block in self._how.decode(video, self._encoder.size):
                self._put((video, self._encoded(block) if self._encodes else block))
                if self._stop.is_set():
                    return
        except VideoError as problem:
            reason = problem.reason
        self._put((video, _End(reason)))

    def _encoded(self, block: Frames) -> Tensor:
        start = time.thread_time()
        features = self._encoder.encode(block)
        with self._lock:
            self.decode_seconds -= time.thread_time() - start
        return features

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
