"""Icon sets: images of any kind, sizes of SVG, what is drawn in a picture."""

from io import BytesIO

import pytest
from PIL import Image

from mdiff.core import icons
from mdiff.core.errors import MdiffError


def test_a_file_that_is_no_image_is_refused() -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for data_ in (b"", b"text", file.getvalue()[:40]):
        with pytest.raises(MdiffError, match="not an image"):
            icons.opened(data_)


def test_an_icon_takes_the_size_of_its_set_where_it_has_none() -> None:
    made = {
        "width": 32,
        "height": 24,
        "icons": {"a": {"body": "<g/>"}, "b": {"body": "", "width": 9}},
    }
    assert 'viewBox="0 0 32 24"' in icons.svg(made, "a")
    assert 'viewBox="0 0 9 24"' in icons.svg(made, "b")


def test_what_is_drawn_is_cut_out_and_a_trace_is_not() -> None:
    image = Image.new("RGBA", (40, 30))
    image.paste((10, 20, 30, 255), (5, 6, 15, 26))
    image.putpixel((39, 29), (0, 0, 0, icons.FAINT))
    assert icons.trimmed(image).size == (10, 20)
    with pytest.raises(MdiffError, match="nothing is drawn"):
        icons.trimmed(Image.new("RGBA", (8, 8)))


def test_every_set_has_a_pinned_package_and_someone_to_name() -> None:
    assert icons.SETS.keys() == icons.CREDITS.keys()
    assert all(spec.startswith("npm:") and spec[-1].isdigit() for spec in icons.SETS.values())
    assert icons.code_of("❤️") == "2764" and icons.code_of("🧑‍🚀") == "1f9d1-200d-1f680"
