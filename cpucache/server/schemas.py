"""Schemas over HTTP: uploaded as text, encoded in the background."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from cpucache.server.service import Service


class SchemaRequest(BaseModel):
    """A schema to upload."""

    model_config = ConfigDict(extra="forbid")

    text: str
    """The schema in PML. It must contain the text of all modules: ``src`` can't be used."""


class Nothing(BaseModel):
    """An empty JSON object. It must be sent: forms on pages of other sites can't send JSON, so they can't call this."""

    model_config = ConfigDict(extra="forbid")


class Schemas:
    """The endpoints of schemas.

    Args:
        service: Has the tenants with their schemas.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(prefix="/v1/schemas", tags=["Schemas"])
        self.router.get("")(self.all)
        self.router.post("", status_code=201)(self.add)
        self.router.get("/{name}")(self.one)
        self.router.delete("/{name}")(self.delete)
        self.router.post("/{name}/encode", status_code=202)(self.encode)

    async def all(self, request: Request) -> dict[str, Any]:
        """All uploaded schemas: the tokens of each, and how many of them are encoded."""
        library = self._service.tenant(request).schemas
        told = await asyncio.to_thread(lambda: [library.told(each) for each in library.all()])
        return {"object": "list", "data": told}

    async def add(self, body: SchemaRequest, request: Request) -> dict[str, Any]:
        """Uploads a schema. One of the same name is replaced."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(lambda: library.told(library.add(body.text)))

    async def one(self, name: str, request: Request) -> dict[str, Any]:
        """A schema with its text and its modules, and how many of its tokens are encoded."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(library.told, library.get(name), whole=True)

    async def delete(self, name: str, request: Request) -> dict[str, Any]:
        """Deletes a schema. Its slices stay in the store until they are evicted."""
        self._service.tenant(request).schemas.delete(name)
        return {"object": "schema", "name": name, "deleted": True}

    async def encode(self, name: str, body: Nothing, request: Request) -> dict[str, Any]:  # noqa: ARG002 - see Nothing
        """Encodes a schema in the background. The schema's own endpoint reports the progress."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(library.told, library.encode(name))
