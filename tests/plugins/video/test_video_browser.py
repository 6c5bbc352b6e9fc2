"""Films play where people open them: in headless Chromium, which says what it saw. Left out where there is none."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch

from mdiff.plugins.video import io

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FRAMES, FPS = 16, 8
PAGE = """<!doctype html><canvas id="canvas"></canvas><video id="film" src="{name}" muted></video><script>
const film = document.getElementById("film"), seen = [];
const say = what => fetch("/seen", {{method: "POST", body: JSON.stringify(what)}});
const look = (now, data) => {{
  const pen = document.getElementById("canvas").getContext("2d");
  pen.drawImage(film, 0, 0);
  seen.push([data.mediaTime, pen.getImageData(20, 20, 1, 1).data[0]]);
  film.requestVideoFrameCallback(look);
}};
film.requestVideoFrameCallback(look);
film.onerror = () => say({{error: film.error.message}});
film.onended = () => say({{
  size: [film.videoWidth, film.videoHeight], duration: film.duration,
  frames: film.getVideoPlaybackQuality().totalVideoFrames, seen,
}});
film.playbackRate = {rate};
film.play();
</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, Queue[dict[str, Any]]]]:
    """A site of a folder, and what its pages say."""
    said: Queue[dict[str, Any]] = Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{site.server_port}", said
        finally:
            site.shutdown()


def played(folder: Path, name: str, rate: float) -> dict[str, Any]:
    """What Chromium says of a film that it played to its end."""
    assert CHROMIUM is not None
    (folder / "page.html").write_text(PAGE.format(name=name, rate=rate))
    with server(folder) as (address, said):
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--autoplay-policy=no-user-gesture-required",
        ]
        command = [
            CHROMIUM,
            *flags,
            f"--user-data-dir={folder / 'profile'}",
            f"{address}/page.html",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                return said.get(timeout=120)
            finally:
                browser.kill()


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chromium_plays_a_film(tmp_path: Path, suffix: str) -> None:
    bright = torch.linspace(0.1, 0.9, FRAMES).view(1, -1, 1, 1).expand(3, FRAMES, 64, 48)
    io.write(tmp_path / f"film{suffix}", {"video": bright, "fps": FPS}, {"schema": 1}, {})
    seen = played(tmp_path, f"film{suffix}", rate=0.25)
    assert seen["size"] == [48, 64]
    assert seen["duration"] == pytest.approx(FRAMES / FPS, abs=0.05)
    assert seen["frames"] == FRAMES
    for when, value in seen["seen"]:
        assert value / 255 == pytest.approx(0.1 + 0.8 * round(when * FPS) / (FRAMES - 1), abs=0.03)
    assert len(seen["seen"]) > FRAMES / 4


def test_chromium_says_what_is_no_film(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no film")
    assert played(tmp_path, "film.mp4", rate=1.0)["error"]
