"""Schemas over HTTP: uploaded as text, encoded in the background."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from cpucache.server.service import Service


class SchemaRequest(BaseModel):
    """A schema to be uploaded."""

    model_config = ConfigDict(extra="forbid")

    text: str
    """PML. A module's text stands in it: ``src`` can't be used."""


class Nothing(BaseModel):
    """An empty object. That it is asked for keeps other sites' pages out, whose forms can't send JSON."""

    model_config = ConfigDict(extra="forbid")


class Schemas:
    """The endpoints of schemas.

    Args:
        service: Knows them.
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
        """Every schema that was uploaded: its tokens, and what of it is encoded."""
        library = self._service.tenant(request).schemas
        told = await asyncio.to_thread(lambda: [library.told(each) for each in library.all()])
        return {"object": "list", "data": told}

    async def add(self, body: SchemaRequest, request: Request) -> dict[str, Any]:
        """Upload a schema, in place of one of the same name."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(lambda: library.told(library.add(body.text)))

    async def one(self, name: str, request: Request) -> dict[str, Any]:
        """A schema with its text and its modules, and how far it is encoded."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(library.told, library.get(name), whole=True)

    async def delete(self, name: str, request: Request) -> dict[str, Any]:
        """Forget a schema. What was encoded of it leaves the store by eviction."""
        self._service.tenant(request).schemas.delete(name)
        return {"object": "schema", "name": name, "deleted": True}

    async def encode(self, name: str, body: Nothing, request: Request) -> dict[str, Any]:  # noqa: ARG002 - see Nothing
        """Encode a schema in the background; ask for the schema to see how far it is."""
        library = self._service.tenant(request).schemas
        return await asyncio.to_thread(library.told, library.encode(name))
