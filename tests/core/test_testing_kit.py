"""The conformance kit passes a right plugin and fails each wrong one in the check that is about it."""

import pytest

from mdiff.core.testing import CHECKS, check_plugin, conforms


def test_a_right_plugin_passes(toy):
    checks = list(check_plugin("toy", toy))
    assert [check.name for check in checks] == list(CHECKS)
    assert all(check.passed for check in checks), checks
    conforms("toy", toy)


def edit(site, file: str, old: str, new: str) -> None:
    path = site / "mdiff_toy" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


WRONG = {
    "heavy": (
        "__init__.py",
        "import json\n",
        "import json\nimport torch\n",
        "light",
        "imports torch",
    ),
    "api": ("__init__.py", "api=(1, 0)", "api=(9, 0)", "loads", "version 9.0"),
    "typo": (
        "__init__.py",
        "def mdiff_media",
        "def mdiff_medium",
        "loads",
        "no hook 'mdiff_medium'",
    ),
    "summary": ("__init__.py", 'summary="Lists of numbers"', 'summary=" "', "info", "empty"),
    "modality": ("__init__.py", 'modality="toy"', 'modality="sound"', "cards", "makes 'toy'"),
    "card": ("registry.toml", 'source = "made up"', "", "cards", "'source' is missing"),
    "default": (
        "registry.toml",
        "steps = 6",
        "steps = 0",
        "requests",
        "--steps should be at least 1",
    ),
    "slash": ("__init__.py", '{"mean":', '{"a/mean":', "parts", "without a slash"),
    "builder": ("__init__.py", '"letters": Encoder', '"letters": 3', "parts", "not callable"),
    "weights": ("registry.toml", 'sha256 = "', 'sha256 = "0000', "cards", "64 hexadecimal"),
    "names": (
        "model.py",
        "self.width = nn.Par",
        "self.w = self.width = nn.Par",
        "build",
        "not fit",
    ),
    "stages": ("model.py", "stages=(", "stages=() and (", "build", "has no stages"),
    "random": ("model.py", "x[x.sum(", "torch.rand(1) + x[x.sum(", "runs", "gives two outputs"),
    "nan": (
        "model.py",
        "* request.options",
        "* float('nan') * request.options",
        "runs",
        "not finite",
    ),
    "global": (
        "model.py",
        'return {"coarse": x',
        'torch.rand(1); return {"coarse": x',
        "seeds",
        "global",
    ),
    "deaf": ("model.py", 'carry["fine"][0].float()', '0 * carry["fine"][0]', "seeds", "two seeds"),
    "writer": (
        "__init__.py",
        "    Path(path).write_text(json",
        "    Path(path + 'x').write_text(json",
        "media",
        "TypeError",
    ),
    "extra": (
        "__init__.py",
        "    Path(path).write_text(json",
        "    Path(path).with_suffix('.b').touch(); Path(path).write_text(json",
        "media",
        "not one file",
    ),
    "record": (
        "__init__.py",
        "return record.parse(lines[1])",
        "return {**record.parse(lines[1]), 'seed': 0}",
        "media",
        "not the one written",
    ),
    "thumbnail": (
        "__init__.py",
        "thumbnail=thumbnail",
        "thumbnail=lambda sample: b''",
        "media",
        "the thumbnail of .txt is bytes",
    ),
    "preview": (
        "model.py",
        'return thumbnail({"values"',
        'return 3 if thumbnail else ({"values"',
        "runs",
        "the preview of stage 'fine' is int, not a Pillow image",
    ),
    "blind": (
        "model.py",
        "given=tasks.given(request",
        "given=None and tasks.given(request",
        "inputs",
        "did anything with the input",
    ),
    "nothing": (
        "__init__.py",
        "def mdiff_media():\n    return [",
        "def mdiff_media():\n    return [] and [",
        "media",
        "nothing writes",
    ),
    "recipe key": ("default.toml", "rate = ", "rte = ", "recipes", "did you mean 'rate'?"),
    "recipe part": (
        "default.toml",
        'part = "net"',
        'part = "nut"',
        "recipes",
        "no 'nut'; it has: net",
    ),
    "recipe law": ("default.toml", '"uniform"', '"uniforn"', "recipes", "did you mean 'uniform'?"),
    "task": ("__init__.py", "return task(", "return (lambda *a: 3)(", "recipes", "gives 3"),
    "data set": (
        "__init__.py",
        "@hookimpl\ndef mdiff_recipes",
        "@hookimpl\ndef mdiff_datasets():\n    return {'ones': list}\n\n\n@hookimpl\ndef mdiff_recipes",
        "parts",
        "not a DataSet",
    ),
    "width": ("model.py", "pooled_width = 1", "pooled_width = 2", "encoders", "pooled is (2, 1)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_plugin_fails_where_it_is_wrong(toy_site, toy, fault):
    file, old, new, name, words = WRONG[fault]
    edit(toy_site, file, old, new)
    failed = {check.name: check.detail for check in check_plugin("toy", toy) if not check.passed}
    assert name in failed and words in failed[name], failed
    if name != "light":
        with pytest.raises(AssertionError, match=name):
            conforms("toy", type(toy)(toy._given))


def test_a_plugin_that_is_not_there_fails(toy):
    failed = [check for check in check_plugin("tory", toy) if not check.passed]
    assert failed and "no plugin 'tory' is installed" in failed[0].detail


def test_every_check_is_failed_by_some_wrong_plugin():
    assert {fault[3] for fault in WRONG.values()} == set(CHECKS)
