"""The Space of a judge: its functions against the scorer, and its page in a browser."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from rewarddance_hf.hub.release import add_pipeline
from rewarddance_hf.models import RewardDanceForYesScoring
from rewarddance_hf.scoring.scorer import RewardDanceScorer
from rewarddance_hf.shapes.generator import BASE_GENERATOR
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.release import build_space


gradio = pytest.importorskip("gradio", reason="needs gradio: `pip install gradio`")

CHROMIUM = shutil.which("chromium")
# No requests of the browser's own, which a closed network would refuse.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """Folder of a Space whose judge and generator are local folders."""
    judge = tmp_path_factory.mktemp("judge")
    RewardDanceForYesScoring.from_pretrained(BASE_VLM).save_pretrained(judge)
    judge_processor().save_pretrained(judge)
    add_pipeline(judge)
    return build_space(tmp_path_factory.mktemp("space"), str(judge), "v1", str(BASE_GENERATOR)), judge


@pytest.fixture(scope="module")
def app(space):
    """The Space's module, without its page being served."""
    spec = importlib.util.spec_from_file_location("space_app", space[0] / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images():
    row = ShapesPreferences(1, "id")[0]
    return row["prompt"], row["rejected"], row["chosen"]


def test_comparison_is_the_scorers(app, space, images):
    """Both orders are shown with the scorer's rewards, the winner is its winner, and the reasons are its reasons."""
    prompt, a, b = images
    verdict, rows, reasons = app.compare(prompt, "", a, b)
    scorer = RewardDanceScorer.from_pretrained(space[1])
    want_b, want_a = scorer.score([b, a], prompt, references=[a, b]).tolist()
    assert [row[2] for row in rows] == [f"{want_b:.3f}", f"{want_a:.3f}"]
    want = scorer.compare(a, b, prompt, explain=True, max_new_tokens=128)
    assert reasons == want.rationale
    assert verdict == f"{want.winner.upper()} is better"


def test_ranking_is_the_scorers(app, space, images):
    """Images of a gallery come back best first, as the scorer ranks them."""
    prompt, *two = images
    images = [*two, ShapesPreferences(2, "id")[1]["chosen"]]
    ranked = app.rank(prompt, "", [(image, None) for image in images])
    order = RewardDanceScorer.from_pretrained(space[1]).rank(images, prompt).order
    assert [image.tobytes() for image, _ in ranked] == [images[i].tobytes() for i in order]
    assert ranked[0][1].startswith(f"1. image {order[0] + 1}:")


def test_drawing(app):
    """The generator draws two different images, the same for the same seed."""
    first, second = app.draw("a red circle", 3)
    assert first.size == (32, 32)
    assert first.tobytes() != second.tobytes()
    assert app.draw("a red circle", 3)[0].tobytes() == first.tobytes()


def test_what_is_missing_is_said(app, images):
    """Without a prompt, with one image or too many, the page shows what is needed."""
    _, a, b = images
    for arguments, message in (
        ((" ", "", a, b), "A prompt is needed"),
        (("p", "", a, None), "Two images are needed"),
    ):
        with pytest.raises(gradio.Error, match=message):
            app.compare(*arguments)
    with pytest.raises(gradio.Error, match="1 images were given, but 2 to 12"):
        app.rank("p", "", [a])


@pytest.mark.new_process
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")
def test_page_in_a_browser(space, images, tmp_path):
    """Two images are uploaded, the button is pressed, and the page shows both orders, the winner and the reasons; then a ranking."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: `pip install playwright`")
    prompt, *two = images
    for name, image in zip("ab", two, strict=True):
        image.resize((128, 128), Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "GRADIO_TEMP_DIR": str(tmp_path / "gradio"),
    }
    screenshots = Path(os.environ.get("REWARDDANCE_SCREENSHOTS", tmp_path))  # to be looked at
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space[0], env=environment, stdout=output, stderr=output
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}", server, log)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("#prompt textarea").fill(prompt)
            for name in "ab":
                page.locator(f"#image_{name} input[type=file]").set_input_files(str(tmp_path / f"{name}.png"))
                page.wait_for_selector(f"#image_{name} img")
            page.locator("#judge").click()
            page.wait_for_selector("#verdict h2, #verdict .output-class")
            page.wait_for_function("document.querySelector('#reasons textarea').value.length > 0")
            text = page.inner_text("body")
            page.screenshot(path=str(screenshots / "compare.png"))
            page.get_by_role("tab", name="Rank many").click()
            page.locator("#images input[type=file]").set_input_files([str(tmp_path / f"{name}.png") for name in "ab"])
            page.wait_for_function("document.querySelectorAll('#images img').length >= 2")
            page.locator("#rank").click()
            page.wait_for_function(
                "(images => images.length >= 2 && images.every(image => image.complete && image.naturalWidth))"
                "([...document.querySelectorAll('#ranked img')])"
            )
            ranked = page.inner_text("#ranked")
            page.screenshot(path=str(screenshots / "rank.png"), full_page=True)
            browser.close()
    finally:
        server.kill()
        server.wait()
    assert "Is B better?" in text
    assert "Is A better?" in text
    assert "A is better" in text or "B is better" in text
    assert "1. image" in ranked


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"The Space does not answer: {log.read_text()[-2000:]}")
