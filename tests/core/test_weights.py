"""Weights: what is loaded is what the card says, or nothing is."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from mdiff.core import weights
from mdiff.core.errors import IntegrityError, MissingError
from mdiff.core.hooks import File, Model, ModelCard

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.fixture
def card(tmp_path) -> ModelCard:
    return of(tmp_path, save(TENSORS))


def of(folder, data: bytes, module: str = "net") -> ModelCard:
    (folder / "w.safetensors").write_bytes(data)
    entry = File(
        name="w.safetensors", sha256=hashlib.sha256(data).hexdigest(), size=len(data), module=module
    )
    texts = dict.fromkeys(("modality", "system", "summary", "licence", "source"), "x")
    return ModelCard(id="demo/one", plugin="demo", root=folder, files=(entry,), **texts)


def model(**modules: nn.Module) -> Model:
    return Model(modules=modules, stages=())


def test_files_fill_their_modules_in_the_modules_precision(card):
    net = nn.Linear(3, 2).bfloat16()
    weights.load(model(net=net, free=nn.ReLU()), card)
    assert net.weight.dtype is torch.bfloat16 and net.weight.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_flipped_bit_a_cut_and_a_missing_file(card):
    path = card.root / "w.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="has sha256 .* and should have .* again"):
        weights.load(model(net=nn.Linear(3, 2)), card)
    path.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=f"has {len(data) - 1} bytes and should have"):
        weights.load(model(net=nn.Linear(3, 2)), card)
    path.unlink()
    with pytest.raises(MissingError, match="cannot be read .*: install"):
        weights.load(model(net=nn.Linear(3, 2)), card)


def test_names_and_shapes_must_fit_and_are_named_in_one_line(card):
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(3, 3))
    net.other = nn.Parameter(torch.zeros(1))
    with pytest.raises(IntegrityError) as caught:
        weights.load(model(net=net), card)
    assert str(caught.value) == (
        "w.safetensors does not fit its network: 1 missing (other); 1 unexpected (bias); "
        "1 of another shape (weight (2, 3) for (3, 3))"
    )
    assert not net.weight.any(), "nothing is loaded where not everything fits"


def test_no_module_runs_on_random_weights(card):
    with pytest.raises(IntegrityError, match="no file fills 'vae'"):
        weights.load(model(net=nn.Linear(3, 2), vae=nn.Linear(1, 1)), card)
    with pytest.raises(IntegrityError, match="is for 'net'; it has: core"):
        weights.load(model(core=nn.ReLU()), replace(card))


def test_a_file_that_is_no_safetensors(tmp_path):
    with pytest.raises(IntegrityError, match="not a whole safetensors file"):
        weights.load(model(net=nn.Linear(3, 2)), of(tmp_path, b"\x80\x04pickle"))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_damaged_bytes_are_refused_or_are_tensors(place, change):
    data = bytearray(save(TENSORS))
    data[place % len(data)] ^= change
    try:
        tensors = weights.parse(bytes(data), "w")
    except IntegrityError as error:
        assert "not a whole safetensors file" in str(error)
    else:
        assert sum(t.numel() for t in tensors.values()) <= len(data)
