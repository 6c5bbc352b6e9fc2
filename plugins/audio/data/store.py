"""The audio data set on disk: `waves.npy` and `index.jsonl`, as `recipe` writes them."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data.captions import Clip, from_row


def load(folder: Path) -> tuple[list[Clip], NDArray[np.int16]]:
    """The clips in row order, and their waveforms (N, samples) mapped from the file.

    Raises MissingError where the folder holds no finished data set.
    """
    waves, index = folder / "waves.npy", folder / "index.jsonl"
    if not (waves.is_file() and index.is_file()):
        raise MissingError(
            f"{folder} holds no audio data set; build it with: "
            f"python -m mdiff.plugins.audio.data.recipe --sources SOURCES --out {folder}"
        )
    with index.open(encoding="utf-8") as lines:
        clips = [from_row(json.loads(line)) for line in lines]
    mapped: NDArray[np.int16] = np.load(waves, mmap_mode="r", allow_pickle=False)
    if len(mapped) != len(clips):
        raise MissingError(f"{folder}: {len(mapped)} waveforms but {len(clips)} clips; build again")
    return clips, mapped


def to_float(pcm: NDArray[np.int16]) -> NDArray[np.float32]:
    """int16 samples to float32 within -1..1."""
    return np.asarray(pcm, dtype=np.float32) / np.float32(32767)
