"""The recipe end to end on a handful of clips: what it exports loads strictly into the model of the card."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mdiff.core import host, registry
from mdiff.core.training import Budget
from mdiff.plugins.audio import audioldm
from mdiff.plugins.audio.data.captions import Clip, to_row
from mdiff.plugins.audio.train import MODEL, RECIPES, Clips, export


def write_clips(folder: Path) -> None:
    """Six decaying tones, of which the last is held out."""
    t = np.arange(40_960) / 16_000
    clips = [
        Clip(kind="note", instrument="flute", midi=60 + k, split="held_out" if k == 5 else "train")
        for k in range(6)
    ]
    waves = [np.sin(2 * np.pi * 261.6 * 2 ** (k / 12) * t) * np.exp(-t) for k in range(6)]
    np.save(folder / "waves.npy", (np.stack(waves) * 20_000).astype(np.int16))
    (folder / "index.jsonl").write_text("\n".join(json.dumps(to_row(clip)) for clip in clips))


def test_recipe_to_model(tmp_path: Path) -> None:
    write_clips(tmp_path)
    clips = Clips(tmp_path)
    assert clips.rows.tolist() == [0, 1, 2, 3, 4]
    run = tmp_path / "run"
    for _, recipe in RECIPES.values():
        recipe(clips, run, Budget(steps=2, warmup=1))
    export(clips, run, tmp_path)
    card = registry.load(host.current()).resolve(MODEL)
    model = audioldm.build(card, "cpu", torch.float32)
    for file in card.files:
        tensors = load_file(tmp_path / Path(file.name).name)
        assert all(value.isfinite().all() for value in tensors.values())
        model.modules[file.module].load_state_dict(tensors, strict=True)
    assert {file.module for file in card.files} == set(model.modules)
