"""The page's answers against direct encoding, and the input that its server refuses."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from aiohttp import ClientSession, ClientTimeout, FormData
from aiohttp.test_utils import TestClient, TestServer
from helpers import NAMES, REPO, TEMPLATE, command, cosines, make_encoder, png
from PIL import Image

from flip_jax import masking
from flip_jax.config import DataConfig
from flip_jax.data import transforms
from flip_jax.runtime import UserError
from flip_jax.tools import demo as demo_tool
from flip_jax.tools import demo_server
from flip_jax.tools.demo import Demo, Folder


@pytest.fixture(scope="session")
def demo(encoder, images, tmp_path_factory):
    return Demo(encoder, "a model", str(images), tmp_path_factory.mktemp("work"))


def decoded(url):
    form, data = re.fullmatch("data:image/(png|jpeg);base64,(.*)", url).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == form
    return np.asarray(image.convert("RGB"))


def test_classes_are_ordered_by_their_cosines_and_share_by_softmax(demo, encoder):
    found = demo.classify(png(50), "\n".join([*NAMES, "", " red 1 "]), TEMPLATE)
    (cosine,) = cosines(encoder, [png(50)], [TEMPLATE.replace("{}", name) for name in NAMES])
    assert [row["name"] for row in found] == [NAMES[i] for i in np.argsort(-cosine)]
    np.testing.assert_allclose([row["cosine"] for row in found], np.sort(cosine)[::-1], atol=1e-5)
    odds = np.exp(np.sort(cosine)[::-1].astype(float) / 0.07)  # a model that was not trained has the first temperature
    np.testing.assert_allclose([row["share"] for row in found], odds / odds.sum(), rtol=1e-3)


def test_a_search_finds_what_direct_encoding_does(demo, encoder):
    hits, about = demo.search("a red picture 7"), demo.about()
    assert (about["images"], about["skipped"]) == (12, {"image does not decode": 1, "outside the folder": 1})
    (score,) = cosines(encoder, [png(i) for i in range(12)], ["a red picture 7"]).T
    keys = [f"{'sub/' if i > 7 else ''}{i:02}.PNG" for i in range(12)]
    assert [hit["key"] for hit in hits] == [keys[i] for i in np.argsort(-score)]
    np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(score)[::-1], atol=1e-5)
    for hit in hits:
        truth = transforms.decode(png(int(hit["key"][-6:-4])), 160, DataConfig())
        assert np.abs(decoded(hit["image"]).astype(float) - truth).mean() < 6


@pytest.mark.parametrize("strategy", ["random", "grid", "block", "centred", "cluster"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_a_mask_shows_the_patches_that_stay(demo, strategy, ratio):
    found = demo.mask(png(5, size=(32, 32)), strategy, ratio, seed=3)
    whole, kept = decoded(found["whole"]), decoded(found["kept"])
    np.testing.assert_array_equal(whole, transforms.decode(png(5, size=(32, 32)), 32, DataConfig()))
    whole, kept = (x.reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, -1) for x in (whole, kept))
    stays = (whole == kept).all(axis=1)
    assert stays.sum() == found["visible"] == 16 * (1 - ratio) and found["patches"] == 16
    assert (kept[~stays] == kept[~stays][:1, :1]).all()


def test_resizing_shows_a_smaller_image(demo):
    found = demo.mask(png(5), "resize", 0.75, seed=0)
    assert decoded(found["kept"]).shape == (16, 16, 3) and (found["visible"], found["width"]) == (4, 0.5)


def bomb(side=60_000):
    """A PNG of few bytes whose header claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def form(image=None, **fields):
    data = FormData(default_to_multipart=True)
    for name, value in fields.items():
        data.add_field(name, value)
    if image is not None:
        data.add_field("image", image, filename="x.png", content_type="image/png")
    return data


def answers(demo, *requests, hosts=("127.0.0.1",)):
    """(status, JSON or text, headers) of each (method, path, options) in turn, from one server."""

    async def ask():
        async with TestClient(TestServer(demo_server.make_app(demo, hosts))) as client:
            for method, path, options in requests:
                async with client.request(method, path, **options) as response:
                    text = await response.text()
                    is_json = response.content_type == "application/json"
                    yield response.status, json.loads(text) if is_json else text, response.headers

    async def collect():
        return [answer async for answer in ask()]

    return asyncio.run(collect())


CLASSES = {"names": "\n".join(NAMES), "template": TEMPLATE}
MASK = {"strategy": "random", "ratio": "0.5", "seed": "0"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize(
    ("path", "fields", "status", "reason"),
    [
        *(
            ("/classify", {"image": data, **CLASSES}, 400, "image cannot be used .*JPEG, PNG, .*100,000,000")
            for data in (b"", b"plain text", SVG, b"%PDF-1.7", b"PK\3\4", png(1)[:60], b"<html>")
        ),
        ("/classify", {"image": bomb(), **CLASSES}, 400, r"too many pixels.* at most 100,000,000 pixels"),
        ("/mask", {"image": bomb(), **MASK}, 400, "too many pixels"),
        ("/classify", {"image": bytes(2**25), **CLASSES}, 413, "upload is larger than 32 MiB"),
        ("/classify", {**CLASSES, "names": "a" * 2**25, "image": png(1)}, 413, "upload is larger than 32 MiB"),
        *(
            (path, {"key": key, **fields}, 400, "is not one of the images in the folder")
            for path, fields in (("/classify", CLASSES), ("/mask", MASK))
            for key in (
                "../elsewhere0/secret.png",
                "/etc/passwd",
                "link.png",
                "folder/secret.png",
                "notes.txt",
                "",
                ".",
            )
        ),
        ("/classify", {"key": "sub/../00.PNG", **CLASSES}, 400, "is not one of the images"),
        ("/classify", {"key": "0\x00.PNG", **CLASSES}, 400, "is not one of the images"),
        ("/classify", {"key": "broken.jpg", **CLASSES}, 400, "image does not decode"),
        ("/classify", CLASSES, 400, "Drop an image first"),
        ("/classify", {"image": png(1), "template": "{}"}, 400, "no text 'names'"),
        ("/classify", {"image": png(1), **CLASSES, "names": " \n"}, 400, "Give 1 to 10,000 class names"),
        ("/classify", {"image": png(1), **CLASSES, "names": "\n".join(map(str, range(10_001)))}, 400, "are 10,001"),
        ("/classify", {"image": png(1), **CLASSES, "names": "a" * 1001}, 400, "1,000 characters, got 1,001"),
        ("/classify", {"image": png(1), **CLASSES, "template": "photo"}, 400, "needs one {} for the class name"),
        ("/mask", {"image": png(1), **MASK, "ratio": "half"}, 400, "must be numbers"),
        *(("/mask", {"image": png(1), **MASK, "ratio": r}, 400, "must be in") for r in ("nan", "-1", "1", "inf")),
        ("/mask", {"image": png(1), **MASK, "ratio": "0.99"}, 400, "leaves no patch; lower it"),
        ("/mask", {"image": png(1), **MASK, "strategy": "resize"}, 400, "needs a square number .*0.7"),
        ("/mask", {"image": png(1), **MASK, "strategy": "__doc__"}, 400, "must be one of random, grid"),
        ("/search", {"text": "  "}, 400, "Enter a text to search for"),
        ("/search", {"text": "a" * 1001}, 400, "1,000 characters"),
        ("/nothing", {}, 404, "Not Found"),
    ],
)
def test_refused_input_is_answered_with_the_reason(demo, path, fields, status, reason):
    refused, fine = answers(
        demo,
        ("POST", path, {"data": form(**fields)}),
        ("POST", "/search", {"data": form(text="red")}),
    )
    assert refused[0] == status, refused[1]
    assert list(refused[1]) == ["error"] and re.search(reason, refused[1]["error"]), refused[1]
    assert fine[0] == 200 and len(fine[1]) == 12


def test_a_file_that_became_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    folder = Folder(str(tmp_path / "in"))
    assert folder.content("a.png") == png(1)
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in" / "a.png").symlink_to("../b.png")
    with pytest.raises(UserError, match="'a.png' is not one of the images"):
        folder.content("a.png")


def test_other_sites_and_malformed_forms_are_refused(demo):
    broken = {"data": b"--x\r\nno end", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    found = answers(
        demo,
        ("GET", "/", {"headers": {"Host": "evil.example"}}),
        ("POST", "/search", {"data": form(text="a"), "headers": {"Origin": "http://evil.example"}}),
        ("POST", "/search", {"data": form(text="a"), "headers": {"Origin": "null"}}),
        ("POST", "/classify", broken),
        ("POST", "/classify", {"data": b"{}", "headers": {"Content-Type": "application/json"}}),
        ("GET", "/classify", {}),
        ("GET", "/static/../demo.py", {}),
    )
    assert [status for status, _, _ in found] == [403, 403, 403, 400, 400, 405, 404]
    assert all(list(body) == ["error"] for _, body, _ in found)


def multipart(*parts):
    """The body of a form of (headers, content) parts, and its headers."""
    body = b"".join(b"--x\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + content + b"\r\n" for headers, content in parts)
    return {"data": body + b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


TEXT = b'Content-Disposition: form-data; name="text"'


def test_forms_are_utf_8_whatever_they_say(demo):
    puny = "\u00fc-".encode("punycode") * 200_000  # 30 s to decode as what it says it is
    bomb = zlib.compress(bytes(2**28))
    urlencoded = "application/x-www-form-urlencoded; charset="
    fine = ("POST", "/search", {"data": b"text=red", "headers": {"Content-Type": urlencoded + "punycode"}})
    said = [(TEXT, b"Content-Type: text/plain; charset=" + name) for name in (b"punycode", b"nonsense", b"utf-16")]
    refused = [
        multipart(([TEXT, b"Content-Type: text/plain; charset=punycode"], puny)),
        multipart(([TEXT, b"Content-Encoding: deflate"], bomb)),
        multipart(([TEXT, b"Content-Transfer-Encoding: base64"], b"caf\xe9")),
        multipart(([b"Content-Type: text/plain"], b"red")),
        multipart(*[([TEXT], b"red")] * 11),
        multipart(([TEXT, b"Content-Type: multipart/mixed; boundary=y"], b"--y\r\n\r\nred\r\n--y--")),
        {"data": b"text=%e9", "headers": {"Content-Type": "multipart/form-data"}},
        {"data": b"text=\xe9", "headers": {"Content-Type": urlencoded + "latin-1"}},
        {"data": b"a=&" * 11, "headers": {"Content-Type": urlencoded + "utf-8"}},
        {"data": form(text="a"), "headers": {"Origin": "http://["}},
        {"data": form(text="a"), "headers": {"Host": "["}},
    ]
    found = answers(
        demo,
        fine,
        *(("POST", "/search", multipart((list(headers), b"red"))) for headers in said),
        *(("POST", "/search", options) for options in refused),
    )
    assert [status for status, *_ in found] == [200] * 4 + [400] * 11, [body for _, body, _ in found]
    assert all(body == found[0][1] for _, body, _ in found[:4])
    assert all(list(body) == ["error"] for _, body, _ in found[4:])


def test_what_became_a_pipe_is_refused_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    folder = Folder(str(tmp_path))
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png is not a regular file"):
        folder.content("a.png")
    (record, _), *_ = folder.read([(0, 0)])
    assert record["bad"] == "outside the folder"


def test_ratios_that_leave_as_many_patches_share_a_program(demo):
    before = demo_tool._masker.cache_info()
    shown = [demo.mask(png(1), "random", ratio, seed=0) for ratio in np.linspace(0.5, 0.56, 30)]
    after = demo_tool._masker.cache_info()
    assert {answer["visible"] for answer in shown} == {8, 7}
    assert after.misses - before.misses <= 2 and after.maxsize == demo_tool.MASKS


class Slow:
    """Answers to a search once nobody waits for it any more."""

    def __init__(self):
        self.begun, self.ended = 0, 0

    def about(self):
        return {"template": "{}", "mask": "random", "mask_ratio": 0.5}

    def search(self, text, left):
        self.begun += 1
        while not left():
            time.sleep(0.001)
        self.ended += 1
        raise demo_tool.Left


def test_work_ends_when_its_client_leaves_and_connections_are_bounded():
    slow = Slow()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    async def visit():
        server = asyncio.create_task(demo_server._serve(demo_server.make_app(slow), listener))
        async with ClientSession(timeout=ClientTimeout(0.5)) as client:
            for _ in range(2):  # the second request waits behind the first, and neither for ever
                asked = [client.post(f"http://127.0.0.1:{port}/search", data={"text": "a"}) for _ in range(2)]
                left = await asyncio.gather(*asked, return_exceptions=True)
                assert all(isinstance(error, TimeoutError) for error in left)
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(demo_server.MAX_CONNECTIONS)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            for _, one in [*idle, (reader, writer)]:
                one.close()
            while slow.ended < slow.begun:
                await asyncio.sleep(0.01)
            async with client.get(f"http://127.0.0.1:{port}/about") as response:
                assert response.status == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await server

    asyncio.run(visit())
    assert 2 <= slow.ended == slow.begun <= 4  # those that waited end before or after they begin


def test_the_page_loads_nothing_from_elsewhere(demo):
    found = answers(demo, *(("GET", path, {}) for path in ("/", "/demo.css", "/demo.js", "/about")))
    for status, body, headers in found:
        assert status == 200 and not re.search(r"https?:|url\(|@import|[\"'(`]//", str(body))
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert found[3][1]["max_upload"] == 2**25 and found[3][1]["strategies"].keys() == {*masking.STRATEGIES, "resize"}


def test_prompt_and_mask_have_the_defaults_of_the_page(demo):
    names = {"names": CLASSES["names"]}
    found = answers(
        demo,
        ("POST", "/classify", {"data": form(png(1), **names)}),
        ("POST", "/classify", {"data": form(png(1), **names, template=demo.about()["template"])}),
        ("POST", "/mask", {"data": form(png(1))}),
    )
    assert [status for status, *_ in found] == [200, 200, 200]
    assert found[0][1] == found[1][1]
    assert found[2][1] == demo.mask(png(1), demo.about()["mask"], demo.about()["mask_ratio"], seed=0)


def test_without_a_folder_the_page_classifies_and_refuses_to_search(encoder):
    alone = Demo(encoder, "a model")
    fine, *refused = answers(
        alone,
        ("POST", "/classify", {"data": form(png(1), **CLASSES)}),
        ("POST", "/search", {"data": form(text="a")}),
        ("POST", "/classify", {"data": form(key="a.png", **CLASSES)}),
    )
    assert fine[0] == 200 and len(fine[1]) == 3
    assert all(status == 400 and "start the page with --images=FOLDER" in body["error"] for status, body, _ in refused)


def test_a_classifier_is_refused():
    with pytest.raises(UserError, match="--model is a fine-tuned classifier without a text tower: use the model it"):
        Demo(make_encoder(words=None), "a model")


def test_folders_without_images_are_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="--images '.*nowhere' is not a folder"):
        Demo(encoder, "a model", str(tmp_path / "nowhere"), tmp_path / "work")
    with pytest.raises(UserError, match="holds no image"):
        Folder(str(tmp_path))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="none of the 1 records .* can be used: {'image does not decode': 1}"):
        Demo(encoder, "a model", str(tmp_path), tmp_path / "work")


def test_the_command_refuses_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command("demo", model="nowhere", port=str(taken.getsockname()[1]))
    assert done.returncode == 1 and re.search(
        "^error: .*[Aa]ddress already in use.*or 0 for any free one", done.stderr, re.MULTILINE
    )


def test_the_package_includes_the_page():
    assert '"flip_jax.tools": ["static/*"]' in (REPO / "setup.py").read_text()
    assert set(os.listdir(REPO / "flip_jax" / "tools" / "static")) >= {*demo_server.FILES.values()}
