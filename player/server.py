"""The server of a game: its page, who may call, and the address that it listens on."""

import asyncio
import os
import re
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, web

from models.errors import InputError
from player.game import Game

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors "
)
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def build_app(game: Game, loopback: bool = True, origins: Sequence[str] = ()) -> web.Application:
    """The server: the page at /, its WebSocket at /socket, and /status, which tells how many play.

    Args:
      loopback: Whether it listens to this machine alone.
      origins: Of pages besides its own that may call it and frame it, as when a proxy serves it under another name.
    """
    security = SECURITY | {"Content-Security-Policy": POLICY + (" ".join(origins) or "'none'")}

    async def page(request: web.Request) -> web.Response:
        text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return web.Response(text=text, content_type="text/html", headers=security)

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

    app = web.Application(middlewares=[guard(loopback, origins)])
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


async def serve(game: Game, host: str, port: int, open_page: bool, origins: Sequence[str] = ()) -> None:
    """Listens until it is interrupted; port 0 takes any free one. `open_page` opens it in the browser."""
    runner = web.AppRunner(build_app(game, host in LOOPBACK, origins), access_log=None, shutdown_timeout=2)
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


def check_origin(origin: str) -> None:
    """Refuses what is not the origin of a page, as a browser writes it.

    Raises:
      InputError: It has a path, or no scheme.
    """
    if not re.fullmatch(r"https?://[^/\s;,'\"]+", origin) or _place(origin) is None:
        raise InputError(f"`allow_origin` {origin}: must be like https://example.org or http://example.org:8080")


def guard(loopback: bool, origins: Sequence[str] = ()) -> Callable:
    """Middleware that refuses what other web pages send here through a visitor's browser.

    A request that names its origin must come from this server's own page, under the name that the browser or a proxy
    (X-Forwarded-Host, which no page of another origin can set) called it by, or from one of `origins`. On a loopback
    address, the name that was called must be a loopback name or one of theirs: a foreign name that resolves here is an
    attack (DNS rebinding).
    """
    allowed = {_place(origin) for origin in origins}
    names = {*LOOPBACK, *(urlsplit(origin).hostname for origin in origins)}

    @web.middleware
    async def check(request: web.Request, handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        place = _place(f"http://{host}")
        if loopback and (place is None or place[0] not in names):
            known = ", ".join(sorted(filter(None, names)))
            raise web.HTTPForbidden(text=f"this server answers to {known} only, not to {host[:100]} (--allow_origin)\n")
        if origin is not None:
            scheme, _, _ = origin.partition("://")
            forwarded = request.headers.get("X-Forwarded-Host", "").partition(",")[0].strip()
            own = {_place(f"{scheme}://{name}") for name in (host, forwarded) if name}
            if _place(origin) is None or _place(origin) not in own | allowed:
                raise web.HTTPForbidden(text="requests from other origins are refused (--allow_origin)\n")
        return await handler(request)

    return check


def _place(origin: str) -> tuple[str, int] | None:
    """Name and port of an origin, the port also where it is the scheme's own; None if it is malformed."""
    try:
        parts = urlsplit(origin)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return (parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None
