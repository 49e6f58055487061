"""The page in a real browser shows what the model computes, and the reason of each refusal."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import NAMES, REPO, TEMPLATE, cosines, environment, png, save
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver (chromium-driver)"),
]
SWITCHES = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1120,1500"
)
DROP = """
const [name, bytes] = arguments, data = new DataTransfer();
data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
document.getElementById("drop").dispatchEvent(
  new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
"""


@pytest.fixture(scope="module")
def address(encoder, images, tmp_path_factory):
    """The address of the page that the command serves."""
    model = tmp_path_factory.mktemp("model") / "step"
    save(encoder, model)
    command = [sys.executable, "-m", "flip_jax", "demo", f"--model={model}", f"--images={images}", "--port=0"]
    with subprocess.Popen(
        command, cwd=REPO, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        line = server.stdout.readline()
        yield re.match(r"(http://127\.0\.0\.1:\d+)  \(Ctrl-C stops it\)", line)[1]
        server.terminate()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in [*SWITCHES.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser, address):
    """Open the page; a function that waits until a CSS selector finds something, and returns all of it."""
    browser.get(address)

    def find(selector):
        return WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))

    find("body[data-ready]")
    return find


def write(element, text):
    element.clear()
    element.send_keys(text)


def message(browser, page, text):
    """Wait until the page says `text`."""
    WebDriverWait(browser, 60).until(lambda _: re.search(text, page("#message")[0].text), f"the page never said {text}")


def test_a_dropped_image_is_classified_masked_and_searched_for(browser, page, encoder, tmp_path):
    write(page("#names")[0], "\n".join(NAMES))
    write(page("#template")[0], TEMPLATE)
    browser.execute_script(DROP, "dropped.png", list(png(50)))
    rows = [element.text.split("\n") for element in page("#scores li")]
    (cosine,) = cosines(encoder, [png(50)], [TEMPLATE.replace("{}", name) for name in NAMES])
    order = np.argsort(-cosine)
    assert [name for name, _ in rows] == [NAMES[i] for i in order]
    assert [figures.split()[-1] for _, figures in rows] == [f"{cosine[i]:.3f}" for i in order]
    assert page("#counts")[0].text == "8 of 16 patches stay"
    before = page("#kept")[0].get_attribute("src")
    page("#masking button")[0].click()
    WebDriverWait(browser, 60).until(lambda _: page("#kept")[0].get_attribute("src") != before)

    write(page("#text")[0], "a red picture 7")
    page("#search button")[0].click()
    (score,) = cosines(encoder, [png(i) for i in range(12)], ["a red picture 7"]).T
    found = [element.get_attribute("title") for element in page("#hits button")]
    assert [int(key[-6:-4]) for key in found] == list(np.argsort(-score))
    shown = page("#whole")[0].get_attribute("src")
    page("#hits button")[0].click()  # a hit is classified in turn
    WebDriverWait(browser, 60).until(lambda _: page("#whole")[0].get_attribute("src") != shown)
    assert page("#searched")[0].text == ("12 images · 1 skipped: image does not decode · 1 skipped: outside the folder")
    assert not page("#message")[0].is_displayed()

    path = tmp_path / "page.png"
    assert browser.save_screenshot(str(path))
    with Image.open(path) as image:
        assert image.width == 1120 and len(image.convert("RGB").getcolors(10**7)) > 1000
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded and all(name.startswith((browser.current_url, "data:")) for name in loaded)
    assert not browser.get_log("browser")  # no refusal by the policy either


def test_refusals_are_shown_on_the_page(browser, page, images, tmp_path):
    page("#classes button")[0].click()
    message(browser, page, "Drop an image first")
    (tmp_path / "page.html").write_text("<script>alert(1)</script>")
    page("#file")[0].send_keys(str(tmp_path / "page.html"))
    message(browser, page, "This image cannot be used .image does not decode")
    with open(tmp_path / "large.png", "wb") as file:
        os.truncate(file.fileno(), 40 * 2**20)
    page("#file")[0].send_keys(str(tmp_path / "large.png"))
    message(browser, page, "large.png has 40 MiB, more than the 32 MiB allowed")
    page("#search button")[0].click()
    message(browser, page, "Enter a text to search for")
    write(page("#text")[0], "a")
    page("#search button")[0].click()
    target = next(hit for hit in page("#hits button") if hit.get_attribute("title") == "03.PNG")
    content = (images / "03.PNG").read_bytes()
    (images / "03.PNG").unlink()
    (images / "03.PNG").symlink_to("/etc/passwd")
    try:
        target.click()
        message(browser, page, "'03.PNG' is not one of the images in the folder")
    finally:
        (images / "03.PNG").unlink()
        (images / "03.PNG").write_bytes(content)
    browser.execute_script(DROP, "fine.png", list(png(51)))
    page("#scores li")
    assert not page("#message")[0].is_displayed()
