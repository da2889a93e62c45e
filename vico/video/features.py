"""The features of a video: its frames, encoded."""

from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from vico.video.encoder import Encoder
from vico.video.frames import BLOCK_FRAMES, VideoError, decode_frames


def video_features(
    path: Path, encoder: Encoder, fps: Fraction, batch_size: int = BLOCK_FRAMES
) -> Tensor:
    """fp16 [frames, width]: row t is second t / fps. Raises VideoError, also for a damaged video.

    Frames of one video alone share a batch, so that its features depend on nothing else.
    """
    blocks = decode_frames(path, fps, encoder.size, block=batch_size)
    return to_half(torch.cat([encoder.encode(block) for block in blocks]), path)


def to_half(features: Tensor, path: Path) -> Tensor:
    """As fp16, the type of the published features. Raises VideoError where it cannot hold them."""
    half = features.half()
    if not half.isfinite().all():
        raise VideoError(path, "the encoder's features are not finite in fp16; try another video")
    return half
