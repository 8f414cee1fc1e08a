"""The app on loopback: its API against direct calls, its page in a real browser, the Space that starts it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hf_equissl.data import decode_image
from hf_equissl.demo import Analyst, Change, shipped
from hf_equissl.demo.analysis import in_a_row, to_picture
from hf_equissl.demo.shipped import CHECKPOINTS, shipped_photographs
from hf_equissl.demo.space import write_space
from tests import processes
from tests.demo.browser import Browser, find_browser

pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`)")
gradio_client = pytest.importorskip("gradio_client")
VALUES = {"angle": 25.0, "shift_right": 1.5, "shift_down": 0.0, "brightness": 0.2, "contrast": 0.0, "saturation": 0.0}


@pytest.fixture(scope="module")
def app(analyst: Analyst) -> Iterator[Any]:
    from hf_equissl.demo.app import launch_app

    running = launch_app(analyst, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield running
    running.close(verbose=False)


@pytest.fixture(scope="module")
def client(app: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return gradio_client.Client(app.local_url, verbose=False, download_files=tmp_path_factory.mktemp("answers"))


def ask(client: Any, path: Path, **values: float) -> Any:
    order = ("angle", "shift_right", "shift_down", "brightness", "contrast", "saturation", "hue", "blur")
    given = [{**VALUES, "hue": 0.0, "blur": 0.0, **values}[name] for name in order]
    return client.predict(gradio_client.handle_file(str(path)), *given, api_name="/analyse")


def test_the_api_answers_as_the_direct_call(client: Any, analyst: Analyst) -> None:
    path = shipped_photographs()[3]
    numbers, both, *columns = ask(client, path)
    found = analyst.analyse(decode_image(path), Change(**VALUES))
    assert numbers == found.numbers()
    assert numbers["encoders"]["painter"]["angle"] is not None
    expected = in_a_row([to_picture(found.image), to_picture(found.changed)])
    assert np.array_equal(np.asarray(Image.open(both).convert("RGBA")), np.asarray(expected))
    reading = found.readings["painter"]
    said, painted, patches, neighbours = columns[4:]
    assert f"read off the features: **{reading.angle:+.1f}°**" in said
    assert Image.open(painted).size == (4 * 160 + 2 * 6 + 24, 160)
    shown = in_a_row([to_picture(image, smooth=False) for image in (reading.before, reading.after)])
    assert np.array_equal(np.asarray(Image.open(patches).convert("RGBA")), np.asarray(shown))
    assert [entry["caption"].split()[0] for entry in neighbours] == list(reading.neighbours)
    assert columns[1] is None  # the base paints nothing


def test_what_is_no_image_is_refused_in_words(client: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(shipped_photographs()[0].read_bytes()[:300])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    for path in (broken, text):
        with pytest.raises(gradio_client.exceptions.AppError, match="This is no image that can be read"):
            ask(client, path)
    with pytest.raises(gradio_client.exceptions.AppError, match="60 is greater than maximum value 45"):
        ask(client, shipped_photographs()[0], angle=60)


def test_a_browser_shows_the_page(app: Any, tmp_path: Path) -> None:
    """Offline: nothing is asked of anyone else. Fonts are there, nothing is cut off, a broken image is refused."""
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with Browser(program, tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=app.local_url)
        browser.wait(lambda: browser.text().count("Cosine with the image") == 2)
        browser.wait(lambda: browser.evaluate("[...document.images].every(image => image.complete)"))
        assert "read off the features: " in browser.text()
        assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert browser.evaluate("document.images.length") >= 8 + 3 + 6
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.screenshot(tmp_path / "page.png")
        browser.give_file(broken)
        browser.wait(lambda: "This is no image that can be read" in browser.text())
        elsewhere = [url for url in browser.requests if not url.startswith((app.local_url, "data:", "blob:"))]
    assert not elsewhere
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert ((pixels.max(2) - pixels.min(2)) > 60).mean() > 0.01


def test_a_space_holds_all_that_it_needs(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own package is imported, from its folder, with the encoders that lie in it."""
    cards = tmp_path / "cards"
    for path, name in zip(encoders.values(), CHECKPOINTS.values(), strict=True):
        shutil.copytree(path, cards / name)
        (cards / name / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A card\n")
    (cards / "__init__.py").touch()
    monkeypatch.setattr(shipped, "model_cards", lambda: cards)
    monkeypatch.setattr("hf_equissl.demo.space.model_cards", lambda: cards)
    space = write_space(tmp_path / "space")
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "apache-2.0")
    needed = (space / "requirements.txt").read_text()
    assert "torch==" in needed
    assert "gradio" not in needed
    compile((space / "app.py").read_text(), "app.py", "exec")
    code = (
        f"import sys; sys.path.insert(0, {str(space)!r}); import hf_equissl; print(hf_equissl.__file__);"
        "from hf_equissl.demo import Analyst, Change; found = Analyst();"
        "print(*found.analyse(found.gallery['cat'], Change(angle=9)).numbers()['encoders'])"
    )
    said = processes.run([sys.executable, "-c", code], preloaded=processes.BARE).stdout.splitlines()
    assert said[-2:] == [str(space / "hf_equissl" / "__init__.py"), "base (VICReg) with reconstruction"]
