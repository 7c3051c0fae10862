"""The page at ``/``: a few static files.

The page contains no data. Its script reads data from this server's endpoints, with an API key if the server has keys.
The files are read once, when the application is built, so that no path from a request reaches the file system.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

_FOLDER = Path(__file__).with_name("page")
_TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "base.js": "text/javascript",
    "playground.js": "text/javascript",
    "schemas.js": "text/javascript",
    "store.js": "text/javascript",
    "requests.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # The browser refuses files of other servers, inline scripts, and text used as markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Checked on each load: the page must match the version of the server.
    "Cache-Control": "no-cache",
}


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


PATHS = tuple(map(_path, _TYPES))
"""Paths of the page's files. They need no API key."""


def add_page(app: FastAPI) -> None:
    """Adds the page's files to an application."""
    for name, kind in _TYPES.items():
        _add(app, _path(name), (_FOLDER / name).read_bytes(), f"{kind}; charset=utf-8")


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    # Claude Code asks with HEAD whether a server is there.
    @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False)
    async def file() -> Response:
        return Response(content, headers={**_HEADERS, "Content-Type": kind})
