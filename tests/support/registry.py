"""A package index, an npm registry and a model hub in one small server on the loopback interface.

The real clients (pip, npm, huggingface_hub) talk to it, so that what is tested is the real way of fetching.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Registry:
    """What the server holds (``files``, by path), how slowly it sends them, and the paths it was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.requests: list[str] = []
        self.seconds_per_chunk = 0.0

    def add_wheel(self, package: str, version: str, member: str, data: bytes) -> int:
        """Offer a wheel with ``data`` as its file ``member``; returns the size of the wheel."""
        stem = f"{package.replace('-', '_')}-{version}"
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w") as archive:
            archive.writestr(member, data)
            archive.writestr(
                f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{stem}.dist-info/RECORD", "")
        name = f"{stem}-py3-none-any.whl"
        page = f'<!DOCTYPE html><html><body><a href="/files/{name}">{name}</a></body></html>'
        self.files[f"/simple/{package}/"] = page.encode(), {"Content-Type": "text/html"}
        self.files[f"/files/{name}"] = body.getvalue(), {}
        return len(body.getvalue())

    def add_npm(self, package: str, version: str, member: str, data: bytes) -> int:
        """Offer an npm package with ``data`` as its file ``member``; returns the size of the tarball."""
        about = {"name": package, "version": version}
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode="w:gz") as archive:
            for name, content in (("package/package.json", json.dumps(about).encode()), (member, data)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        tarball = body.getvalue()
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball).digest()).decode()
        dist = {"tarball": f"{self.url}/tarballs/{package}.tgz", "integrity": integrity}
        listing = {"name": package, "dist-tags": {"latest": version}, "versions": {version: {**about, "dist": dist}}}
        self.files[f"/{package}"] = json.dumps(listing).encode(), {"Content-Type": "application/json"}
        self.files[f"/tarballs/{package}.tgz"] = tarball, {}
        return len(tarball)

    def add_hub(self, repo: str, file: str, data: bytes) -> None:
        """Offer a file of a hub repository, revision ``main``."""
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.files[f"/{repo}/resolve/main/{file}"] = data, headers

    def fetched(self, ending: str) -> int:
        """How often a path with this ending was asked for."""
        return sum(path.endswith(ending) for path in self.requests)


@contextmanager
def serve_registry() -> Iterator[Registry]:
    """Run a registry until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            registry.requests.append(path)
            body, headers = registry.files.get(path, (b"", {}))
            self.send_response(200 if path in registry.files else 404)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            for start in range(0, len(body), 64 << 10):
                time.sleep(registry.seconds_per_chunk)
                try:
                    self.wfile.write(body[start : start + (64 << 10)])
                except ConnectionError:  # the client was ended by its test
                    return

        do_HEAD = do_GET  # noqa: N815 - named by the base class

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    registry = Registry(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- catalogues of one model -----------------------------------------------------------------------------------------
MISSING = {"kind": "pip", "download": 9, "parts": [{"package": "not-there", "version": "1.0", "member": "m"}]}


def entry(data: bytes, *sources: dict[str, Any], **changes: Any) -> str:
    known = {"name": "tiny", "description": "d", "licence": "MIT", "architecture": "llama"}
    numbers = {"parameters": 1, "context": 64, "size": len(data)}
    fields = {**known, **numbers, "sha256": hashlib.sha256(data).hexdigest(), **changes}
    lines = ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None)]
    for source in sources:
        parts = ", ".join("{ " + ", ".join(f'{k} = "{v}"' for k, v in part.items()) + " }" for part in source["parts"])
        lines += ["[[model.source]]", f'kind = "{source["kind"]}"', f"download = {source['download']}"]
        lines += [f"parts = [{parts}]"]
    return "\n".join(lines)
