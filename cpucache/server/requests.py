"""The last requests over HTTP, and why tokens of each were evaluated."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from cpucache.server.service import Service
from cpucache.server.why import told


class Requests:
    """The endpoints of the last requests. An API key gets only its own.

    Args:
        service: Has the records.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(prefix="/v1/requests", tags=["Requests"])
        self.router.get("")(self.all)
        self.router.get("/{identity}")(self.one)

    async def all(self, request: Request) -> dict[str, Any]:
        """The last requests, the newest first: where the state of each prompt came from, and how long each took."""
        records = self._service.tenant(request).records
        return {"object": "list", "data": [record.as_dict() for record in records.list()]}

    async def one(self, identity: str, request: Request) -> dict[str, Any]:
        """A request by its ``x-request-id``, and why tokens of it were evaluated, which is computed on each call."""
        service = self._service
        records = service.tenant(request).records
        record = records.find(identity)
        movable = service.engine.context.memory.moves
        why = await asyncio.to_thread(told, record, records, service.settings, movable=movable)
        return {**record.as_dict(), "why": why}
