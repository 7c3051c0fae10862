"""The page at ``/``: a few files that are served as they are.

A page holds no data: it asks this server's endpoints for it, with a key where the server has keys. Its files are read
once, when the application is made, so that no path from a request reaches the file system.
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
    # Everything comes from this server, nothing is inline, and no text becomes markup: the browser refuses what isn't so.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Asked for anew each time: a newer version of the server comes with a newer page.
    "Cache-Control": "no-cache",
}


def _path(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


PATHS = tuple(map(_path, _TYPES))
"""Where the files of the page are found. They need no key."""


def add_page(app: FastAPI) -> None:
    """Have an application serve the page."""
    for name, kind in _TYPES.items():
        _add(app, _path(name), (_FOLDER / name).read_bytes(), f"{kind}; charset=utf-8")


def _add(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, headers={**_HEADERS, "Content-Type": kind})
