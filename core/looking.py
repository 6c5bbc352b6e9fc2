"""Pictures of a run: a contact sheet of its outputs, the path of each denoising, previews while it goes on.

What a sample looks like is its plugin's to say (`Media.thumbnail`, `Stage.preview`); labels and layout are drawn here,
in Pillow's own font. The same outputs give the same bytes.
"""

import math
import time
import unicodedata
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mdiff.core import record
from mdiff.core.errors import MdiffError, UsageError
from mdiff.core.hooks import Request

if TYPE_CHECKING:
    from mdiff.core.host import Host
    from mdiff.core.pipeline import Job, Moment, Output

MOST = 1000
"""Outputs on a sheet."""
SIDES = ((64, 256), (256, 128), (MOST, 64))
"""Up to so many outputs have pictures of so many pixels an edge on a sheet."""
SMALL = 96
"""Pixels: a picture of less is enlarged by a whole number, so that a label fits below it."""
FRAMES: Mapping[str, int] = {"strip": 10, "animation": 32}
"""Steps that are shown, at most."""
FRAME_MS, LAST_MS = 120, 1500
"""How long a frame of an animation stays, and the last one."""
EVERY = 0.5
"""Seconds between two previews."""

FONT_SIZE, LINE, GAP = 12, 16, 6
"""Pixels: of letters, of a line of them, between things."""
PAPER, INK = (255, 255, 255), (32, 32, 32)
FORMS: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "PNG", "optimize": True},
    ".webp": {"format": "WEBP", "quality": 90, "method": 4},
    ".jpg": {"format": "JPEG", "quality": 90},
    ".jpeg": {"format": "JPEG", "quality": 90},
}
"""Files that a sheet goes into."""

Trajectory = Literal["strip", "animation"]


class Show:
    """What is to be seen of a run: `step` at each step, `add` with each output, `close` at the end.

    Args:
        sheet: the file of a contact sheet.
        trajectory: writes `NAME.steps.png` (a strip) or `NAME.steps.webp` (an animation) beside each output.
        preview: a file, or a folder for a file an output: x0 as it is now, written again and again.
        say: takes lines of talk.

    Raises:
        UsageError: the plugin has no pictures of such samples, a sheet of another kind of file, too many outputs.
        MdiffError: a folder cannot be written.
    """

    def __init__(
        self,
        jobs: "Sequence[Job]",
        host: "Host",
        *,
        sheet: Path | None = None,
        trajectory: Trajectory | None = None,
        preview: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.jobs, self.host, self.say = jobs, host, say
        self.sheet, self.trajectory, self.preview = sheet, trajectory, preview
        if (sheet or trajectory) and jobs[0].media.thumbnail is None:
            raise UsageError(
                f"plugin {jobs[0].card.plugin!r} does not say what a sample in a {jobs[0].media.suffix} file "
                "looks like: leave --sheet and --trajectory out"
            )
        if sheet is not None:
            form_of(sheet)
            if len(jobs) > MOST:
                raise UsageError(f"a sheet has room for {MOST} outputs, not for {len(jobs)}")
            record.make_folder(sheet.parent)
        self.one_file = preview is not None and bool(preview.suffix) and not preview.is_dir()
        if preview is not None:
            if self.one_file:
                form_of(preview)
            record.make_folder(preview.parent if self.one_file else preview)
        self.side = next((side for most, side in SIDES if len(jobs) <= most), SIDES[-1][1])
        self.shown: list[Image.Image] = []
        self.frames: list[tuple[str, Image.Image]] = []
        self.request: Request | None = None
        self.name, self.at, self.quiet = "", -math.inf, False

    def step(self, moment: "Moment") -> None:
        """Looks at a step."""
        if self.request is not moment.request:
            self.request, self.at = moment.request, -math.inf
            self.name = next(job.path.stem for job in self.jobs if job.request == moment.request)
            self.frames.clear()
        if self.trajectory is not None:
            self._frame(moment, FRAMES[self.trajectory])
        if self.preview is not None:
            self._preview(moment)

    def _frame(self, moment: "Moment", most: int) -> None:
        index, total = moment.index, moment.total
        if index not in spread(total, most) or moment.state.x0 is None:
            return
        sample = moment.sample()
        thumbnail = self.jobs[0].media.thumbnail
        if sample is not None and thumbnail is not None:
            picture = thumbnail(sample)
        elif moment.stage.preview is not None:
            picture = moment.stage.preview(moment.state.x0)
        else:
            return
        self.frames.append((f"step {index} of {total}", fitted(picture, 256)))

    def _preview(self, moment: "Moment") -> None:
        stages = [stage for stage in moment.model.stages if stage.denoiser is not None]
        if not (self.quiet or any(stage.preview for stage in stages)):
            self.quiet = True
            self.say(f"no previews: {moment.request.model} does not say what its x0 looks like")
        look, x0 = moment.stage.preview, moment.state.x0
        last = moment.index == moment.total
        if look is None or x0 is None or not (last or time.monotonic() - self.at > EVERY):
            return
        assert self.preview is not None  # `step` has looked
        path = self.preview if self.one_file else self.preview / f"{self.name}.png"
        try:
            save(fitted(look(x0), 512), path)
        except MdiffError as error:  # what is being made matters more
            self.preview = None
            self.say(f"no more previews: {error}")
        self.at = time.monotonic()

    def add(self, output: "Output") -> None:
        """Takes an output that is on the disk.

        Raises:
            UsageError: the way to it was to be shown, and it took no step.
        """
        if self.sheet is not None:
            self.shown.append(fitted(self._thumbnail(output), self.side))
        if self.trajectory is None or output.done_before:
            return
        if not self.frames:
            raise UsageError(
                f"{output.path.name} took no step that could be shown: leave --trajectory out for {output.card.id}"
            )
        suffix, draw = PATHS[self.trajectory]
        path = output.path.with_suffix(suffix)
        draw(self.frames, path, output.record)
        self.frames.clear()
        self.say(f"trajectory: {path}")

    def _thumbnail(self, output: "Output") -> Image.Image:
        """What is in the file of an output, so that one made before counts as well."""
        media = self.jobs[0].media
        with self.host.blame(output.card.plugin, f"drawing {output.path.name}"):
            assert media.thumbnail is not None  # `__init__` has looked
            return media.thumbnail(media.read(output.path))

    def close(self) -> None:
        """Writes the sheet, when all outputs are there."""
        if self.sheet is not None:
            save(contact_sheet([job.request for job in self.jobs], self.shown), self.sheet)
            self.say(f"sheet: {self.sheet}")


class Pace:
    """How far a run is and how fast: `done` outputs, a fraction among them, and texts for a progress bar."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.number, self.done, self.speed = 0, 0.0, ""
        self.first: tuple[Any, int, float] | None = None

    def step(self, moment: "Moment") -> None:
        """Looks at a step."""
        if self.requests[self.number] is not moment.request:
            self.number = self.requests.index(moment.request)
        stages = [stage for stage in moment.model.stages if stage.denoiser is not None]
        before = next(i for i, stage in enumerate(stages) if stage is moment.stage)
        index, now = moment.index, time.monotonic()
        self.done = self.number + (before + index / moment.total) / len(stages)
        which = (self.number, before)
        if self.first is None or self.first[0] != which:
            self.first = (which, index, now)
        elif now > self.first[2]:
            rate = (index - self.first[1]) / (now - self.first[2])
            self.speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"

    @property
    def place(self) -> str:
        """Which output it is at."""
        return f"{self.number + 1} of {len(self.requests)}"


# --- a contact sheet ------------------------------------------------------------------------------


def contact_sheet(requests: Sequence[Request], pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures on one, below a headline of what they have in common, each with what it alone has.

    Where two fields vary and every pair of their values is there, it is a table of the two.
    """
    facts = [facts_of(request) for request in requests]
    varied = varying(facts)
    common = {name: value for name, value in facts[0].items() if name not in varied}
    table = _as_table(facts, varied)
    body = _table(facts, pictures, *table) if table else _tiles(facts, pictures, list(varied))
    head = _headline(common, body.width - 2 * GAP)
    page = Image.new("RGB", (body.width, GAP + LINE * len(head) + body.height), PAPER)
    _write(page, head, GAP, GAP)
    page.paste(body, (0, GAP + LINE * len(head)))
    return page


def facts_of(request: Request) -> dict[str, str]:
    """The fields and options of a request, as texts; empty where they say nothing."""
    fields = asdict(request)
    fields |= fields.pop("options")
    fields.pop("sha256", None)
    return {name: _text(value) for name, value in fields.items()}


def varying(facts: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The names that do not stand for the same in all, with what they stand for in the order of appearance."""
    names = dict.fromkeys(name for row in facts for name in row)
    values = {name: list(dict.fromkeys(row.get(name, "") for row in facts)) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, "g")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)


def _as_table(
    facts: Sequence[Mapping[str, str]], varied: Mapping[str, list[str]]
) -> tuple[str, str] | None:
    """The names of rows and of columns, where the outputs fill a table of no more than 40 columns."""
    if len(varied) != 2 or len(facts) != math.prod(map(len, varied.values())):
        return None
    one, other = varied
    if len({(row[one], row[other]) for row in facts}) < len(facts):
        return None
    # seeds stand side by side, texts one above the other: they are long
    rows, columns = (other, one) if one == "seed" or other == "text" else (one, other)
    return (rows, columns) if len(varied[columns]) <= 40 else None


def _table(
    facts: Sequence[Mapping[str, str]], pictures: Sequence[Image.Image], rows: str, columns: str
) -> Image.Image:
    where = varying(facts)
    width, height = _largest(pictures)
    heads = {value: _label(rows, value, 2 * SMALL, 4) for value in where[rows]}
    margin = 2 * GAP + round(max(_length(line) for lines in heads.values() for line in lines))
    tops = {value: _label(columns, value, width, 2) for value in where[columns]}
    top = GAP + LINE * max(map(len, tops.values()))
    size = (
        margin + len(tops) * (width + GAP),
        top + len(heads) * (max(height, LINE * max(map(len, heads.values()))) + GAP),
    )
    step = (size[1] - top) // len(heads)
    page = Image.new("RGB", size, PAPER)
    for column, lines in enumerate(tops.values()):
        _write(page, lines, margin + column * (width + GAP), GAP)
    for row, lines in enumerate(heads.values()):
        _write(page, lines, GAP, top + row * step)
    for row_facts, picture in zip(facts, pictures, strict=True):
        column, row = list(tops).index(row_facts[columns]), list(heads).index(row_facts[rows])
        _paste(page, picture, margin + column * (width + GAP), top + row * step, width, height)
    return page


def _tiles(
    facts: Sequence[Mapping[str, str]], pictures: Sequence[Image.Image], names: Sequence[str]
) -> Image.Image:
    width, height = _largest(pictures)
    labels = [_labels(row, names, width) for row in facts]
    below = LINE * max(map(len, labels))
    across = min(len(pictures), math.ceil(math.sqrt(len(pictures) * (height + below) / width)))
    down = math.ceil(len(pictures) / across)
    step = height + below + GAP
    page = Image.new("RGB", (GAP + across * (width + GAP), GAP + down * step), PAPER)
    for place, (picture, lines) in enumerate(zip(pictures, labels, strict=True)):
        left, top = GAP + place % across * (width + GAP), GAP + place // across * step
        _paste(page, picture, left, top, width, height)
        _write(page, lines, left, top + height)
    return page


QUIET = ("device", "precision")
"""Fields that a headline leaves out."""


def _headline(common: Mapping[str, str], width: int) -> list[str]:
    said = {name: value for name, value in common.items() if value and name not in QUIET}
    lines = wrapped(said.pop("model", ""), width, 1) + wrapped(said.pop("text", ""), width, 2)
    return lines + wrapped(", ".join(f"{_named(n)} {v}" for n, v in said.items()), width, 3)


def _label(name: str, value: str, width: int, most: int) -> list[str]:
    """A field and its value; a text speaks for itself."""
    said = value if name == "text" and value else f"{_named(name)} {value or '-'}"
    return wrapped(said, width, most)


def _labels(row: Mapping[str, str], names: Sequence[str], width: int) -> list[str]:
    return [line for name in names for line in _label(name, row.get(name, ""), width, 2)][:4]


def _named(name: str) -> str:
    return {"class_name": "class"}.get(name, name)


# --- the path of a denoising ----------------------------------------------------------------------


def spread(total: int, most: int) -> set[int]:
    """Steps from the first to the last, evenly, `most` of them or all."""
    count = min(total, most)
    return {round(1 + i * (total - 1) / max(1, count - 1)) for i in range(count)} | {total}


Frames = Sequence[tuple[str, Image.Image]]


def strip(frames: Frames, path: Path, made: Mapping[str, Any]) -> None:
    """Writes frames side by side, with their labels, the record of their output inside."""
    width, height = _largest([picture for _, picture in frames])
    size = (GAP + len(frames) * (width + GAP), GAP + height + LINE + GAP)
    page = Image.new("RGB", size, PAPER)
    for place, frame in enumerate(frames):
        page.paste(_captioned(*frame, width, height), (GAP + place * (width + GAP), GAP))
    save(page, path, made)


def animation(frames: Frames, path: Path, made: Mapping[str, Any]) -> None:
    """Writes frames one after the other, with their labels; the last one stays longer."""
    width, height = _largest([picture for _, picture in frames])
    pages = [_captioned(*frame, width, height) for frame in frames]
    times = [FRAME_MS] * (len(pages) - 1) + [LAST_MS]
    with record.atomic_write(path) as temporary:
        pages[0].save(
            temporary,
            save_all=True,
            append_images=pages[1:],
            duration=times,
            loop=0,
            **FORMS[".webp"],
        )


PATHS: Mapping[str, tuple[str, Callable[[Frames, Path, Mapping[str, Any]], None]]] = {
    "strip": (".steps.png", strip),
    "animation": (".steps.webp", animation),
}


def _captioned(label: str, picture: Image.Image, width: int, height: int) -> Image.Image:
    page = Image.new("RGB", (width, height + LINE), PAPER)
    _paste(page, picture, 0, 0, width, height)
    _write(page, wrapped(label, width, 1), 0, height)
    return page


# --- drawing --------------------------------------------------------------------------------------


def fitted(picture: Image.Image, most: int) -> Image.Image:
    """A picture in RGB, transparent parts on white, of `SMALL` to `most` pixels along its longer edge."""
    if picture.has_transparency_data:
        own = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", own.size, (*PAPER, 255)), own)
    picture = picture.convert("RGB")
    longer = max(picture.size)
    if longer > most:
        size = [max(1, round(edge * most / longer)) for edge in picture.size]
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = math.ceil(min(SMALL, most) / longer)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def form_of(path: Path) -> Mapping[str, Any]:
    """How a picture goes into a file. Raises a UsageError for a suffix that is not of `FORMS`."""
    if path.suffix.lower() not in FORMS:
        raise UsageError(f"a picture goes into one of {', '.join(FORMS)}, not into {path.name!r}")
    return FORMS[path.suffix.lower()]


def save(picture: Image.Image, path: Path, made: Mapping[str, Any] | None = None) -> None:
    """Writes a picture whole, in a PNG the record `made` with it. Raises an MdiffError where the system refuses."""
    form = dict(form_of(path))
    if made is not None and form["format"] == "PNG":
        form["pnginfo"] = info = PngInfo()
        info.add_text("mdiff", record.canonical(made))
    try:
        with record.atomic_write(path) as temporary:
            picture.save(temporary, **form)
    except ValueError as error:
        raise MdiffError(f"cannot write {path}: {error}: write a .png file") from error


def wrapped(text: str, width: float, most: int) -> list[str]:
    """A text in lines of at most `width` pixels, `most` of them: what does not fit ends in dots.

    Letters that Pillow's font does not have lose their marks or become question marks.
    """
    rest = " ".join(printable(text).split())
    lines: list[str] = []
    while rest and len(lines) < most:
        fits = max(1, _fitting(rest, width))
        if fits == len(rest):
            return [*lines, rest]
        if len(lines) + 1 == most:
            short = rest[:fits]
            while len(short) > 1 and _length(short + "...") > width:
                short = short[:-1]
            return [*lines, short.rstrip() + "..."]
        cut = rest.rfind(" ", 1, fits + 1)
        cut = cut if cut > 0 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, width: float) -> int:
    """How many letters fit into a width."""
    return bisect(range(len(text) + 1), width, key=lambda count: _length(text[:count])) - 1


def printable(text: str) -> str:
    """A text in ASCII, as far as that goes."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in plain)


@cache
def _font() -> Any:
    return ImageFont.load_default(FONT_SIZE)


def _length(text: str) -> float:
    return _font().getlength(text)


def _write(page: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((left, top + number * LINE), line, fill=INK, font=_font())


def _paste(
    page: Image.Image, picture: Image.Image, left: int, top: int, width: int, height: int
) -> None:
    """A picture in the middle of a field."""
    page.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))


def _largest(pictures: Sequence[Image.Image]) -> tuple[int, int]:
    return max(p.width for p in pictures), max(p.height for p in pictures)
