"""The server of a game: its page, who may call, and the address that it listens on."""

import asyncio
import os
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, web

from models.errors import InputError
from player.game import Game

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(game: Game, loopback: bool = True) -> web.Application:
    """The server: the page at /, its WebSocket at /socket, and /status, which tells how many play."""

    async def page(request: web.Request) -> web.Response:
        text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return web.Response(text=text, content_type="text/html", headers=SECURITY)

    async def status(request: web.Request) -> web.Response:
        return web.json_response({"players": len(game.players), "max_players": game.max_players})

    async def engines(app: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(engine.serve()) for engine in game.engines]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def leave(app: web.Application) -> None:
        await asyncio.gather(*(p.socket.close(code=WSCloseCode.GOING_AWAY) for p in set(game.players)))

    app = web.Application(middlewares=[guard(loopback)])
    app.add_routes([web.get("/", page), web.get("/socket", game.welcome), web.get("/status", status)])
    app.cleanup_ctx.append(engines)
    app.on_shutdown.append(leave)
    return app


def check_address(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on, before the time that loading a world takes.

    Raises:
      InputError: It is taken, or none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"`host` {host} `port` {port}: cannot be listened on ({error}); `port` 0 takes any free port"
        ) from error


async def serve(game: Game, host: str, port: int, open_page: bool) -> None:
    """Listens until it is interrupted; port 0 takes any free one. `open_page` opens it in the browser."""
    runner = web.AppRunner(build_app(game, host in LOOPBACK), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
        url = f"http://{name}:{runner.addresses[0][1]}/"
        print(f"play at {url} (Ctrl-C ends)", flush=True)
        if host not in LOOPBACK:
            print("whoever can reach this machine can play, at its address and this port", flush=True)
        # Without a desktop, a text browser would take over the terminal.
        desktop = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        if open_page and desktop:
            await asyncio.to_thread(webbrowser.open, url)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def guard(loopback: bool) -> Callable:
    """Middleware that refuses what other web pages send here through a visitor's browser.

    A request that names its origin must come from this server's own page. On a loopback address, the name that the
    browser called must be a loopback name too: a foreign name that resolves here is an attack (DNS rebinding).
    """

    @web.middleware
    async def check(request: web.Request, handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if loopback and _parts(host)[0] not in LOOPBACK:
            raise web.HTTPForbidden(text=f"this server answers to {' and '.join(LOOPBACK)} only, not to {host[:100]}\n")
        if origin is not None and (not origin.startswith("http") or _parts(origin.partition("://")[2]) != _parts(host)):
            raise web.HTTPForbidden(text="requests from other origins are refused\n")
        return await handler(request)

    return check


def _parts(host: str) -> tuple[str | None, int | None]:
    """Name and port of "name:port"; (None, None) if it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname, parts.port
    except ValueError:
        return None, None
