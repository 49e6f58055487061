"""The web server of `flip demo`: three files, and a model's answers to forms as JSON."""

import asyncio
import ipaddress
import logging
import pathlib
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from flip_jax.runtime import UserError
from flip_jax.tools.demo import Demo

MAX_UPLOAD = 2**25  # bytes of a form, nearly all of them the image
MAX_FIELDS = 10
MAX_CONNECTIONS, IDLE = 64, 15  # at once; seconds that one without a request stays open
READ_TIMEOUT = 60  # seconds in which a form must have arrived
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
    # Two images at a time would double the memory and be no faster.
    one_at_a_time = ThreadPoolExecutor(1, "flip_jax-demo")

    async def ask(function, *arguments) -> web.Response:
        """Answer with a method's result; if the client leaves, it is not begun or ends early."""
        left = threading.Event()
        try:
            work = asyncio.get_running_loop().run_in_executor(one_at_a_time, function, *arguments, left.is_set)
            return web.json_response(await work)
        finally:
            left.set()

    async def classify(request: web.Request) -> web.Response:
        form = await _form(request)
        return await ask(
            demo.classify, _image(demo, form), _text(form, "names"), _text(form, "template", about["template"])
        )

    async def mask(request: web.Request) -> web.Response:
        form = await _form(request)
        ratio_text, seed_text = _text(form, "ratio", str(about["mask_ratio"])), _text(form, "seed", "0")
        try:
            ratio, seed = float(ratio_text), int(seed_text) % 2**31
        except ValueError as error:
            raise UserError(f"The ratio and the seed of a mask must be numbers: {str(error)[:100]}.") from None
        return await ask(demo.mask, _image(demo, form), _text(form, "strategy", about["mask"]), ratio, seed)

    async def search(request: web.Request) -> web.Response:
        return await ask(demo.search, _text(await _form(request), "text"))

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
        except TimeoutError:
            return _refusal(f"The form did not arrive within {READ_TIMEOUT} s.", 408)
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
    asyncio.run(_serve(make_app(demo, hosts), listener))


async def _serve(app, listener):
    """Answer requests until a signal, on at most `MAX_CONNECTIONS` connections."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=IDLE, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    listening = await loop.create_server(lambda: _connection(runner.server), sock=listener)
    await stop.wait()
    listening.close()
    await runner.cleanup()


def _connection(server):
    """Return what answers on a new connection; one that has asked nothing for a while is closed."""
    if len(server.connections) >= MAX_CONNECTIONS:
        return _Full()
    handler = server()
    asyncio.get_running_loop().call_later(
        IDLE, lambda: handler.transport and not handler.current_request and handler.transport.close()
    )
    return handler


class _Full(asyncio.Protocol):
    """Closes a connection at once."""

    def connection_made(self, transport):
        transport.close()


def _check_origin(request, hosts):
    """Refuse requests of other sites open in the browser, also under their own name for this machine's address."""
    origin = request.headers.get("Origin", "")
    try:
        host, origin_host = urlsplit(f"//{request.host}").hostname, urlsplit(origin).netloc
    except ValueError as error:
        raise web.HTTPBadRequest(reason="Host or Origin is not an address.") from error
    if hosts and host not in hosts:
        raise web.HTTPForbidden(reason="This page answers to this machine's own address only.")
    if origin and origin_host != request.host:
        raise web.HTTPForbidden(reason="Another site asked, and this page answers to itself only.")


def _refusal(reason, status):
    return web.json_response({"error": reason}, status=status)


async def _form(request):
    """Return the fields of a form: text, which must be UTF-8 whatever the form says, and the bytes of an image."""
    try:
        async with asyncio.timeout(READ_TIMEOUT):
            if request.content_type == "application/x-www-form-urlencoded":
                return dict(
                    parse_qsl((await request.read()).decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
                )
            if request.content_type != "multipart/form-data":
                return {}
            form, count, size, parts = {}, 0, 0, await request.multipart()
            while part := await parts.next():
                count += 1
                if not isinstance(part, BodyPartReader) or not part.name or count > MAX_FIELDS:
                    raise UserError(f"A form has at most {MAX_FIELDS} fields, each with a name.")
                content = bytearray()
                while chunk := await part.read_chunk(2**16):  # as it is: a stranger's encodings are never undone
                    content += chunk
                    size += len(chunk)
                    if size > MAX_UPLOAD:
                        raise web.HTTPRequestEntityTooLarge(MAX_UPLOAD, size)
                form[part.name] = bytes(content) if part.filename is not None else content.decode()
            return form
    except UnicodeDecodeError:
        raise UserError("The text of a form must be UTF-8.") from None
    except (ValueError, HttpProcessingError) as error:  # as aiohttp says that a form is damaged
        if isinstance(error, UserError):
            raise
        raise UserError("The form is damaged.") from error


def _image(demo, form):
    """Return the bytes of a form's image: an upload, or a key of the folder."""
    value = form.get("image")
    if isinstance(value, bytes):
        return value
    if isinstance(key := form.get("key"), str):
        return demo.content(key)
    raise UserError("Drop an image first.")


def _text(form, name, default=None):
    value = form.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"The form has no text {name!r}.")
    return value
