"""The page behind proxies: under another name, under a path of its own, in somebody's frame."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from models.errors import InputError
from player.server import check_origin, guard
from tests.test_play import CHROMIUM, browsing, server_process

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/sbin") or shutil.which("nginx")
SOCKETS = 'proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'
PLAYS = "typeof mode === 'string' && mode === 'ready'"
REFUSED = "document.querySelector('#status')?.textContent.startsWith('The server is there')"
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")


@pytest.mark.parametrize(
    ("headers", "loopback", "origins", "allowed"),
    [
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, True, (), True),
        ({"Host": "localhost", "Origin": "http://localhost:80"}, True, (), True),
        ({"Host": "localhost:443", "Origin": "https://localhost"}, True, (), True),
        ({"Host": "localhost", "Origin": "https://localhost:80"}, True, (), False),
        # nginx's default: the upstream's name as the host, the browser's origin, and nothing of the name between.
        ({"Host": "127.0.0.1:8000", "Origin": "https://lab.example"}, True, (), False),
        ({"Host": "127.0.0.1:8000", "Origin": "https://lab.example"}, True, ("https://lab.example:443",), True),
        ({"Host": "127.0.0.1:8000", "Origin": "http://lab.example"}, True, ("https://lab.example",), False),
        ({"Host": "127.0.0.1", "Origin": "https://lab.example", "X-Forwarded-Host": "lab.example"}, True, (), True),
        ({"Host": "127.0.0.1", "Origin": "https://a.b", "X-Forwarded-Host": "a.b:443, inner"}, True, (), True),
        ({"Host": "127.0.0.1", "Origin": "https://evil.example", "X-Forwarded-Host": "a.b"}, True, (), False),
        # Proxies that keep the name, as code-server's and RunPod's.
        ({"Host": "lab.example", "Origin": "https://lab.example"}, True, (), False),  # or DNS rebinding
        ({"Host": "lab.example", "Origin": "https://lab.example"}, True, ("https://lab.example",), True),
        ({"Host": "lab.example", "Origin": "https://lab.example"}, False, (), True),
        ({"Host": "evil.example", "X-Forwarded-Host": "localhost"}, True, (), False),
        ({"Host": "localhost", "Origin": "null"}, True, ("https://lab.example",), False),
    ],
)
def test_who_may_call(headers, loopback, origins, allowed):
    async def call():
        app = web.Application(middlewares=[guard(loopback, origins)])
        app.add_routes([web.get("/", here)])
        async with (
            TestServer(app) as server,
            aiohttp.ClientSession() as session,
            session.get(server.make_url("/"), headers=headers) as response,
        ):
            assert response.status == (200 if allowed else 403)

    asyncio.run(call())


async def here(_: web.Request) -> web.Response:
    return web.Response(text="here")


@pytest.mark.parametrize(
    "origin", ["lab.example", "https://lab.example/games", "ftp://a.b", "https://a.b; img-src *", "*"]
)
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(InputError, match="`allow_origin`"):
        check_origin(origin)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def server(trained):
    """The address of a server that knows no name but its own."""
    with server_process("--checkpoint", trained["world"]) as url:
        yield url


@pytest.fixture(scope="module")
def knowing(trained):
    """The address of a server that knows a proxy at a port, and that port."""
    port = free_port()
    with server_process("--checkpoint", trained["world"], "--allow_origin", f"http://127.0.0.1:{port}") as url:
        yield url, port


@contextlib.contextmanager
def nginx(folder: Path, port: int, upstream: str):
    """A real nginx that serves the page under several paths, each configured as somebody would."""
    locations = {
        "plain": "",  # whoever knows of no sockets
        "sockets": SOCKETS,
        "forwarded": SOCKETS + " proxy_set_header X-Forwarded-Host $http_host;",
        "host": SOCKETS + " proxy_set_header Host $http_host;",
    }
    blocks = "\n".join(f"location /{name}/ {{ proxy_pass {upstream}; {more} }}" for name, more in locations.items())
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = folder / "nginx.conf"
    file.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {temporary}\nserver {{ listen 127.0.0.1:{port};\n{blocks} }} }}\n"
    )
    process = subprocess.Popen([NGINX, "-c", str(file), "-p", str(folder)], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


async def shows(folder: Path, url: str, expression: str) -> None:
    folder.mkdir()
    async with browsing(folder, url) as browser:
        await browser.until(expression)
        if expression == PLAYS:
            await browser.key("1")
            await browser.until("frame >= 1")


@in_a_browser
@pytest.mark.skipif(not NGINX, reason="needs nginx")
def test_the_page_plays_behind_a_real_nginx(server, knowing, tmp_path):
    with nginx(tmp_path, free_port(), server) as proxy:
        for name, expected in (("forwarded", PLAYS), ("host", PLAYS), ("plain", REFUSED), ("sockets", REFUSED)):
            asyncio.run(shows(tmp_path / name, f"{proxy}/{name}/", expected))
    upstream, port = knowing
    with nginx(tmp_path, port, upstream) as proxy:
        asyncio.run(shows(tmp_path / "known", f"{proxy}/sockets/", PLAYS))


def prefix_proxy(upstream: str) -> web.Application:
    """What Jupyter and code-server do: a path of its own, the browser's headers passed on, sockets too."""

    async def pass_on(request: web.Request) -> web.StreamResponse:
        url = upstream + request.path.removeprefix("/user/me/proxy/8000").lstrip("/")
        headers = {name: request.headers[name] for name in ("Host", "Origin") if name in request.headers}
        async with aiohttp.ClientSession() as session:
            if request.headers.get("Upgrade", "").lower() != "websocket":
                async with session.get(url, headers=headers) as response:
                    return web.Response(body=await response.read(), status=response.status, headers=response.headers)
            inner = await session.ws_connect(url, headers=headers, max_msg_size=0)
            outer = web.WebSocketResponse(max_msg_size=0)
            await outer.prepare(request)

            async def pump(source, sink) -> None:
                async for message in source:
                    await (sink.send_str if message.type == aiohttp.WSMsgType.TEXT else sink.send_bytes)(message.data)

            pumps = [asyncio.create_task(pump(inner, outer)), asyncio.create_task(pump(outer, inner))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for task in pumps:
                task.cancel()
            return outer

    app = web.Application()
    app.add_routes([web.get("/user/me/proxy/8000{rest:.*}", pass_on)])
    return app


@in_a_browser
@pytest.mark.parametrize("slash", ["", "/"])
def test_the_page_plays_under_a_path(server, tmp_path, slash):
    async def play() -> None:
        async with TestServer(prefix_proxy(server), host="127.0.0.1") as proxy:
            await shows(tmp_path / "page", str(proxy.make_url("/user/me/proxy/8000")) + slash, PLAYS)

    asyncio.run(play())


@in_a_browser
@pytest.mark.parametrize("named", [True, False])
def test_only_a_named_page_may_frame_it(server, knowing, tmp_path, named):
    inner, port = knowing if named else (server, free_port())

    async def outer(_: web.Request) -> web.Response:
        return web.Response(text=f"<iframe src={inner}></iframe>", content_type="text/html")

    async def look() -> None:
        app = web.Application()
        app.add_routes([web.get("/", outer)])
        (tmp_path / "page").mkdir()
        async with (
            TestServer(app, host="127.0.0.1", port=port) as page,
            browsing(tmp_path / "page", str(page.make_url("/"))) as browser,
            asyncio.timeout(60),
        ):
            # Chromium shows an error page of its own in the place of one that may not be framed.
            framed = None
            while framed is None:
                tree = (await browser.call("Page.getFrameTree"))["frameTree"]
                for child in tree.get("childFrames", []):
                    if "unreachableUrl" in child["frame"]:
                        framed = False
                    elif child["frame"]["url"] == inner:
                        framed = True
                await asyncio.sleep(0.05)
            assert framed == named

    asyncio.run(look())
