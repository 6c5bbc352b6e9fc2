"""Checkpoints of PyTorch: every tensor as torch itself reads it, and nothing in them ever runs."""

import os
import pickle  # noqa: TID251 (to make what must be refused)
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from mdiff.core import pth
from mdiff.core.errors import IntegrityError, MissingError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.float8_e4m3fn,
]
FORMS = pytest.mark.parametrize("form", [True, False], ids=["zip", "row"])


def save(value: object, path: Path, form: bool, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form)
    return path


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, form, dtype):
    value = (
        torch.arange(-12, 12)
        .reshape(2, 3, 4)
        .to(torch.complex64 if dtype.is_complex else dtype)
        .to(dtype)
    )
    found = pth.tensors(save({"a": value}, tmp_path / "a.pth", form))
    assert list(found) == ["a"] and found["a"].dtype == dtype and found["a"].shape == value.shape
    assert torch.equal(found["a"].contiguous().view(torch.uint8), value.view(torch.uint8))


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_ties_and_empty_tensors(tmp_path, form, protocol):
    base = torch.arange(60.0).reshape(3, 4, 5)
    value = {
        "base": base,
        "tied": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1:, ::2, 1:4],
        "spread": base[0, 0, :1].expand(7),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    found = pth.tensors(save(value, tmp_path / "a.pt", form, protocol))
    assert list(found) == list(value)
    assert all(torch.equal(found[name], tensor) for name, tensor in value.items())
    assert found["turned"].stride() == value["turned"].stride()
    assert not any(tensor.requires_grad for tensor in found.values())
    found["base"][1, 0, 1] = -1
    assert found["tied"][1, 0, 1] == -1 and found["part"][0, 0, 0] == -1


@FORMS
def test_a_state_dict_of_a_module(tmp_path, form):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    found = pth.tensors(save(net.state_dict(), tmp_path / "a.bin", form))
    assert set(found) == set(net.state_dict())
    net.load_state_dict(found)


@FORMS
def test_nested_tables_have_dotted_names_and_keep_their_values(tmp_path, form):
    value = {
        "step": 1234,
        "big": 2**70,
        "rate": -2.5e-4,
        "note": "größer",
        "flags": [True, False, None, b"raw"],
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "model": OrderedDict(conv={"weight": torch.ones(2), 7: torch.zeros(1)}),
        "list": [torch.tensor([1]), (torch.tensor([2]), {"x": torch.tensor([3])})],
    }
    path = save(value, tmp_path / "a.ckpt", form)
    read = pth.read(path)
    assert {key: read[key] for key in list(value)[:7]} == {
        **{key: value[key] for key in list(value)[:7]}
    }
    names = ["model.conv.weight", "model.conv.7", "list.0", "list.1.0", "list.1.1.x"]
    assert list(pth.tensors(path)) == names


def test_a_checkpoint_of_many_entries(tmp_path):
    value = {f"block.{k}.weight": torch.full((k % 5 + 1,), float(k)) for k in range(700)}
    found = pth.tensors(save(value, tmp_path / "a.pth", True))
    assert all(torch.equal(found[name], tensor) for name, tensor in value.items())


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def archive(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", program)
        out.writestr("archive/version", "3\n")
    return path


@FORMS
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["system", "eval", "exec"])
def test_a_call_of_anything_else_is_refused_and_does_not_run(tmp_path, form, protocol, name):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()"
    evil = {
        "system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
    }[name]
    program = pickle.dumps({"a": evil}, protocol=protocol)
    if form:
        path = archive(tmp_path / "a.pth", program)
    else:
        path = tmp_path / "a.pth"
        head = [pickle.dumps(one, protocol=2) for one in (pth.MAGIC, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + program)
    with pytest.raises(IntegrityError) as caught:
        pth.read(path)
    if protocol:
        assert name in str(caught.value) and "was not run" in str(caught.value)
    assert not mark.exists() and "\n" not in str(caught.value)
    pickle.loads(program)  # it would have run
    assert mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cposix\nsystem\nq\x00.",  # named, never called
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # a call of what is no function here
        b"\x80\x02}(K\x01K\x02uK\x03b.",  # harmless: a state is ignored
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    ],
)
def test_programs_by_hand(tmp_path, program):
    path = archive(tmp_path / "a.pth", program)
    if program.endswith(b"b."):
        assert pth.read(path) == {1: 2}
        return
    with pytest.raises(IntegrityError):
        pth.read(path)


def test_a_module_is_refused_by_its_name(tmp_path):
    path = save(nn.Linear(1, 1), tmp_path / "a.pth", True)
    with pytest.raises(IntegrityError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        pth.read(path)


@FORMS
def test_a_file_that_is_cut_short(tmp_path, form):
    data = save({"a": torch.randn(100)}, tmp_path / "a.pth", form).read_bytes()
    for end in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "b.pth").write_bytes(data[:end])
        with pytest.raises(IntegrityError, match="b.pth"):
            pth.read(tmp_path / "b.pth")


def test_a_tensor_beyond_its_storage(tmp_path):
    path = save({"a": torch.zeros(4)}, tmp_path / "a.pth", True)
    with zipfile.ZipFile(path) as source:
        program = source.read("a/data.pkl")
        others = {name: source.read(name) for name in source.namelist() if name != "a/data.pkl"}
    assert program.count(b"K\x04\x85") == 1
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/data.pkl", program.replace(b"K\x04\x85", b"K\x05\x85"))
        for name, data in others.items():
            out.writestr(name, data)
    with pytest.raises(IntegrityError, match="beyond its storage"):
        pth.read(path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"hello")
    with pytest.raises(IntegrityError, match="a.pth"):
        pth.tensors(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as out:
        out.writestr("readme.txt", "x")
    with pytest.raises(IntegrityError, match="no data.pkl"):
        pth.tensors(tmp_path / "b.pth")
    with pytest.raises(MissingError, match="cannot be read"):
        pth.tensors(tmp_path / "none.pth")
    with pytest.raises(IntegrityError, match="holds no tensor"):
        pth.tensors(save({"step": 1}, tmp_path / "c.pth", True))


def test_a_list_that_holds_itself(tmp_path):
    path = archive(tmp_path / "a.pth", b"\x80\x02]q\x00h\x00a.")
    with pytest.raises(IntegrityError, match="nests deeper"):
        pth.tensors(path)


def test_sizes_that_lie_take_no_memory(tmp_path):
    path = archive(tmp_path / "a.pth", b"\x80\x02X" + struct.pack("<I", 2**31) + b"x.")
    with pytest.raises(IntegrityError, match="cut short"):
        pth.read(path)
