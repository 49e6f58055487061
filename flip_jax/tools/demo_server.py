"""The web server of `flip demo`: three files, and a model's answers to forms as JSON."""

import asyncio
import ipaddress
import logging
import pathlib
import socket
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from flip_jax.runtime import UserError
from flip_jax.tools.demo import Demo

MAX_UPLOAD = 2**25  # bytes of a form, nearly all of them the image
FILES = {"/": "demo.html", "/demo.css": "demo.css", "/demo.js": "demo.js"}
HEADERS = {
    # The page loads nothing from elsewhere, and an image dropped on it cannot change that.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

_log = logging.getLogger(__name__)


def make_app(demo: Demo, hosts: tuple[str, ...] = ()) -> web.Application:
    """Make the page of a model; it answers only requests to one of `hosts`, or to any if there are none.

    Prompt, strategy and ratio default to the values that the page starts with. The answer to refused
    input is status 400 (or 403, 404, 413) with {"error": reason}.
    """
    about = demo.about() | {"max_upload": MAX_UPLOAD}
    one_at_a_time = asyncio.Lock()

    async def ask(function, *arguments) -> web.Response:
        async with one_at_a_time:  # two images at a time would double the memory and be no faster
            return web.json_response(await asyncio.to_thread(function, *arguments))

    async def classify(request: web.Request) -> web.Response:
        form = await request.post()
        return await ask(
            demo.classify, _image(demo, form), _text(form, "names"), _text(form, "template", about["template"])
        )

    async def mask(request: web.Request) -> web.Response:
        form = await request.post()
        ratio_text, seed_text = _text(form, "ratio", str(about["mask_ratio"])), _text(form, "seed", "0")
        try:
            ratio, seed = float(ratio_text), int(seed_text) % 2**31
        except ValueError as error:
            raise UserError(f"The ratio and the seed of a mask must be numbers: {error}.") from error
        return await ask(demo.mask, _image(demo, form), _text(form, "strategy", about["mask"]), ratio, seed)

    async def search(request: web.Request) -> web.Response:
        return await ask(demo.search, _text(await request.post(), "text"))

    async def say_about(_) -> web.Response:
        return web.json_response(about)

    async def file(request: web.Request) -> web.FileResponse:
        return web.FileResponse(pathlib.Path(__file__).parent / "static" / FILES[request.path])

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            _check_origin(request, hosts)
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(f"The upload is larger than {MAX_UPLOAD // 2**20} MiB.", 413)
        except web.HTTPException as error:
            return _refusal(error.reason, error.status)
        except HttpProcessingError:
            return _refusal("The form is damaged.", 400)
        except UserError as error:
            return _refusal(str(error), 400)
        except Exception:  # a bug: the page stays up, and the terminal shows the trace
            _log.exception("%s", request.path)
            return _refusal("The server failed; see its terminal for the reason.", 500)

    async def add_headers(_, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)

    server = web.Application(middlewares=[guard], client_max_size=MAX_UPLOAD)
    server.on_response_prepare.append(add_headers)
    server.add_routes([web.get(path, file) for path in FILES])
    server.add_routes([web.get("/about", say_about), web.post("/classify", classify)])
    server.add_routes([web.post("/mask", mask), web.post("/search", search)])
    return server


def run(demo: Demo, listener: socket.socket) -> None:
    """Serve the page on a socket until Ctrl-C."""
    host, port = listener.getsockname()[:2]
    hosts = ()
    if ipaddress.ip_address(host).is_loopback:
        hosts = ("localhost", "127.0.0.1", host)
    else:
        print(f"anyone who can reach {host} can use this page", flush=True)
    print(f"http://{host}:{port}  (Ctrl-C stops it)", flush=True)
    web.run_app(make_app(demo, hosts), sock=listener, print=None, access_log=None, shutdown_timeout=1)


def _check_origin(request, hosts):
    """Refuse requests of other sites open in the browser, also under their own name for this machine's address."""
    if hosts and urlsplit(f"//{request.host}").hostname not in hosts:
        raise web.HTTPForbidden(reason="This page answers to this machine's own address only.")
    origin = request.headers.get("Origin")
    if origin and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(reason="Another site asked, and this page answers to itself only.")


def _refusal(reason, status):
    return web.json_response({"error": reason}, status=status)


def _image(demo, form):
    """Return the bytes of a form's image: an upload, or a key of the folder."""
    value = form.get("image")
    if isinstance(value, web.FileField):
        return value.file.read()
    if isinstance(key := form.get("key"), str):
        return demo.content(key)
    raise UserError("Drop an image first.")


def _text(form, name, default=None):
    value = form.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"The form has no text {name!r}.")
    return value
