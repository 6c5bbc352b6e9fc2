"""The plugin host: every way in which a plugin can be wrong has a status and a line, and the others
go on working.
"""

import logging
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from mdiff.core import host
from mdiff.core.errors import MissingError, PluginError, UsageError
from mdiff.core.host import Host, Record

HEAD = "from mdiff.core.hooks import PluginInfo, hookimpl\n"
INFO = """
@hookimpl
def mdiff_info():
    return PluginInfo(name={name!r}, api={api}, modality="{name}", summary="about {name}")
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a plugin module and gives its record; modules are forgotten after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, body: str | None = None, api=(1, 0), dist: str | None = None) -> Record:
        module = f"plug_{name}_{len(written)}"
        text = HEAD + (INFO.format(name=name, api=api) if body is None else dedent(body))
        (tmp_path / f"{module}.py").write_text(text)
        written.append(module)
        return Record(name=name, value=module, dist=dist or f"{name}-dist", version="2.0")

    yield write
    for module in written:
        sys.modules.pop(module, None)


def outcome(bad: Record, good: Record, **how) -> tuple[Record, str]:
    """What becomes of the bad plugin, given that the good one must work beside it."""
    both = Host([bad, good], **how)
    both.load_all()
    assert both.info(good.name).summary == f"about {good.name}"
    assert [record.name for record, _ in both.each("mdiff_info")] == [good.name]
    with pytest.raises((PluginError, MissingError)) as caught:
        both.load(bad.name)
    message = str(caught.value)
    assert "\n" not in message and repr(bad.name) in message and bad.dist in message
    return both.record(bad.name), message


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("import nothing_of_the_kind", "failed", "No module named 'nothing_of_the_kind'"),
        ("x = (", "failed", "SyntaxError"),
        ("raise SystemExit('bye')", "failed", "SystemExit: bye"),
        ("x = 1", "failed", "mdiff_info gave None instead of a PluginInfo"),
        (
            INFO.format(name="other", api=(1, 0)),
            "failed",
            "mdiff_info says 'other', the entry point 'bad'",
        ),
        (
            INFO.format(name="bad", api=(1, 0)) + "@hookimpl\ndef mdiff_bild(card): ...",
            "failed",
            "there is no hook 'mdiff_bild'; did you mean 'mdiff_build'?",
        ),
        (
            INFO.format(name="bad", api=(1, 0)) + "@hookimpl\ndef mdiff_build(card, gpu): ...",
            "failed",
            "{'gpu'} are declared in the hookimpl but can not be found in the hookspec",
        ),
        (INFO.format(name="bad", api=(2, 0)), "incompatible", "written for version 2.0"),
        (
            INFO.format(name="bad", api=(1, 9)),
            "incompatible",
            "`pip install -U mdiffusion bad-dist`",
        ),
        ("@hookimpl\ndef mdiff_info(): raise ValueError('two\\nlines')", "failed", "two lines"),
    ],
    ids=[
        "missing",
        "syntax",
        "exit",
        "empty",
        "name",
        "typo",
        "arguments",
        "major",
        "minor",
        "raises",
    ],
)
def test_a_wrong_plugin_is_named_and_harms_nobody(write, body, status, words):
    record, message = outcome(write("bad", body), write("good"))
    assert record.status == status
    assert words in record.error and words in message
    assert ("`pip uninstall bad-dist` removes it" in message) == (status == "failed")


def test_none_of_a_failed_plugins_hooks_run(write):
    bad = write("bad", INFO.format(name="bad", api=(3, 0)) + "@hookimpl\ndef mdiff_media(): 1 / 0")
    both = Host([bad, write("good")])
    assert list(both.each("mdiff_media")) == []
    assert both.record("bad").status == "incompatible"


def test_an_interrupt_while_loading_comes_through(write):
    with pytest.raises(KeyboardInterrupt):
        Host([write("bad", "raise KeyboardInterrupt")]).load("bad")


def test_loading_is_on_demand_and_once(write):
    marks = "import builtins\nbuiltins.loads = getattr(builtins, 'loads', 0) + 1\n"
    record = write("one", marks + INFO.format(name="one", api=(1, 0)))
    alone = Host([record])
    assert record.value not in sys.modules and alone.record("one").status == "found"
    alone.load("one")
    alone.load("one")
    import builtins

    assert vars(builtins).pop("loads") == 1
    assert alone.record("one").status == "loaded" and alone.record("one").seconds > 0


def test_block_and_allow(write):
    good, bad = write("good"), write("bad")
    for how in ({"block": ["bad"]}, {"block": ["bad-dist"]}, {"only": ["good"]}):
        record, message = outcome(bad, good, **how)
        assert record.status == "blocked" and bad.value not in sys.modules
        assert "blocked" in message
    assert Host([good, bad], only=[]).names() == []
    assert Host([good, bad], only=["bad-dist"]).names() == ["bad"]
    assert Host([good, bad]).blocking(["good"]).names() == ["bad"]


def test_two_distributions_with_one_name_clash(write):
    one, two = write("twin", dist="dist-a"), write("twin", dist="dist-b")
    both = Host([one, two, write("good")])
    assert [r.status for r in both.records if r.name == "twin"] == ["clash", "clash"]
    assert both.names() == ["good"]
    with pytest.raises(MissingError, match="dist-a and dist-b each bring .* MDIFF_BLOCK_PLUGINS="):
        both.load("twin")
    assert Host([one, two], block=["dist-b"]).load("twin").dist == "dist-a"
    assert Host([one, two], only=["dist-b"]).load("twin").dist == "dist-b"


def test_the_same_distribution_seen_twice_is_one_plugin(write):
    one = write("one")
    twice = Host([one, Record(name="one", value=one.value, dist=one.dist, version="1.9")])
    assert [r.version for r in twice.records] == ["2.0"]
    assert twice.load("one").status == "loaded"


def test_an_unknown_plugin_is_missing_and_the_nearest_named(write):
    with pytest.raises(MissingError, match="no plugin 'pointclod'.*did you mean 'pointcloud'"):
        Host([write("pointcloud")]).load("pointclod")


HOOKS = INFO.format(name="bad", api=(1, 0)) + dedent("""
    @hookimpl
    def mdiff_media(): raise ValueError("no media today")
    @hookimpl
    def mdiff_models(): raise SystemExit(3)
    @hookimpl
    def mdiff_text_encoders(): return {"one": lambda: 1 / 0}
    @hookimpl
    def mdiff_components():
        from mdiff.core.errors import UsageError
        raise UsageError("said clearly")
    """)


def test_a_failing_hook_is_blamed_on_its_plugin(write, caplog):
    good = write(
        "good", INFO.format(name="good", api=(1, 0)) + "@hookimpl\ndef mdiff_media(): return [1]"
    )
    both = Host([write("bad", HOOKS), good])
    words = r"plugin 'bad' \(bad-dist 2.0\) failed in mdiff_media: ValueError: no media today"
    with pytest.raises(PluginError, match=words):
        both.call("bad", "mdiff_media")
    with caplog.at_level(logging.WARNING):
        answers = [answer for _, answer in both.each("mdiff_media")]
    assert answers == [[1]] and "no media today" in caplog.text
    with pytest.raises(PluginError, match="failed in mdiff_models: SystemExit: 3"):
        both.call("bad", "mdiff_models")
    with pytest.raises(UsageError, match="^said clearly$"):
        both.call("bad", "mdiff_components")
    with pytest.raises(PluginError, match="building the text encoder bad/one: ZeroDivisionError"):
        both.text_encoder("bad/one")


def test_hooks_are_asked_of_one_plugin_and_may_leave_arguments_out(write):
    body = (
        INFO.format(name="{0}", api=(1, 0)) + "@hookimpl\ndef mdiff_build(card): return '{0}', card"
    )
    both = Host([write(name, body.format(name)) for name in ("one", "two")])
    both.load_all()
    assert both.call("two", "mdiff_build", card=1, device="cpu", dtype=None) == ("two", 1)
    assert both.call("one", "mdiff_media") is None


def test_strict_lets_the_plugins_own_exception_through(write):
    strict = Host(
        [
            write("bad", "import nothing_of_the_kind"),
            write("worse", HOOKS.replace("'bad'", "'worse'")),
        ],
        strict=True,
    )
    with pytest.raises(ModuleNotFoundError):
        strict.load("bad")
    with pytest.raises(ValueError, match="no media"):
        strict.call("worse", "mdiff_media")


def test_names_of_parts_are_behind_the_plugins(toy):
    assert toy.offer("text_encoders", "toy/letters").__name__ == "Encoder"
    assert toy.text_encoder("toy/letters") is toy.text_encoder("toy/letters")
    assert set(toy.offers("toy", "metrics")) == {"mean"}
    with pytest.raises(MissingError, match="no text encoder 'leters'; did you mean 'letters'"):
        toy.text_encoder("toy/leters")


def test_the_current_host_is_the_innermost(toy):
    assert host.current() is toy
    with host.use(Host([])) as empty:
        assert host.current() is empty
    assert host.current() is toy


def test_media_of_a_modality_serve_plugins_without_their_own(toy, write):
    body = INFO.format(name="kin", api=(1, 0)).replace('modality="kin"', 'modality="toy"')
    record = write("kin", body)
    both = Host([*toy.records, record])
    assert [m.suffix for m in both.media("kin")] == [".txt", ".csv"]


def test_the_environment_is_read(monkeypatch):
    monkeypatch.setattr(host, "installed", lambda: [Record(name=n, value=n, dist=n) for n in "abc"])
    assert host.discover().names() == ["a", "b", "c"]
    monkeypatch.setenv("MDIFF_BLOCK_PLUGINS", "a")
    assert host.discover().names() == ["b", "c"]
    monkeypatch.setenv("MDIFF_PLUGINS", "a, b")
    assert host.discover().names() == ["b"]
    monkeypatch.setenv("MDIFF_PLUGINS", "")
    assert host.discover().names() == []
    monkeypatch.setenv("MDIFF_STRICT_PLUGINS", "1")
    assert host.discover().strict


def test_discovery_imports_no_plugin():
    code = (
        "import sys; from mdiff.core import host; print(*host.discover().names()); "
        "print(*(m for m in sys.modules if m == 'torch' or m.startswith('mdiff.plugins')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, modules = done.stdout.split("\n")[:2]
    assert {"audio", "text"} <= set(names.split()) and modules == ""


def test_an_installed_package_is_found_by_its_metadata(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    info = Path(tmp_path) / "stray-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[mdiff.plugins]\nstray = stray_plugin\n")
    found = {record.name: record for record in host.installed()}
    assert found["stray"] == Record(name="stray", value="stray_plugin", dist="stray", version="3.1")
