"""`/v1/files` and `/v1/batches`, in OpenAI's form."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.routing import Route

from ollm_core.files.untrusted_json import show
from ollm_core.server.batches import Batches
from ollm_core.server.client import Client
from ollm_core.server.endpoint import Answer, Endpoint, routes_of
from ollm_core.server.errors import RefusedRequestError
from ollm_core.server.file_store import FileStore, file_record, new_id
from ollm_core.server.service import Service
from ollm_core.server.upload import Upload
from ollm_core.serving.openai.refused import RefusedError

UPLOAD_SECONDS = 3600.0
"""For all of a file to come."""
PURPOSES = ("batch", "user_data", "assistants")
_BLOCK_BYTES = 1 << 20


class BatchRoutes:
    """Answers for files and batches."""

    def __init__(self, service: Service, store: FileStore, batches: Batches) -> None:
        self._service, self._store, self._batches = service, store, batches

    def routes(self) -> list[Route]:
        """Each address with what it answers."""
        answers: Mapping[tuple[str, str], Answer] = {
            ("POST", "/v1/files"): self._upload,
            ("GET", "/v1/files"): self._list_files,
            ("GET", "/v1/files/{id}"): self._file,
            ("DELETE", "/v1/files/{id}"): self._remove,
            ("GET", "/v1/files/{id}/content"): self._content,
            ("POST", "/v1/batches"): self._create,
            ("GET", "/v1/batches"): self._list_batches,
            ("GET", "/v1/batches/{id}"): self._batch,
            ("POST", "/v1/batches/{id}/cancel"): self._cancel,
        }
        return routes_of({key: self._endpoint(key[1], one) for key, one in answers.items()})

    def _endpoint(self, path: str, answer: Answer) -> Endpoint:
        return Endpoint(self._service, path, answer, needs_place=answer == self._upload)

    async def _upload(self, client: Client) -> None:
        file_id, room = new_id("file"), self._store.room
        path = self._store.content(file_id)
        is_kept = False
        try:
            with self._store.create(file_id) as file:
                upload = Upload(client.content_type, file)
                await client.read_parts(room + _BLOCK_BYTES, UPLOAD_SECONDS, upload.take)
            upload.finish()
            if upload.size > room:
                raise RefusedRequestError(
                    413, f"the file: there is room for {room} bytes", code="request_too_large"
                )
            purpose = upload.fields.get("purpose", b"").decode("utf-8", "replace")
            if purpose not in PURPOSES:
                raise RefusedError(
                    f"purpose: need one of {', '.join(PURPOSES)}, have {show(purpose)}",
                    param="purpose",
                )
            record = file_record(file_id, purpose, upload.name or "", upload.size)
            self._store.write(record)
            is_kept = True
        finally:
            if not is_kept:
                path.unlink(missing_ok=True)
        await client.tell(200, record)

    async def _list_files(self, client: Client) -> None:
        await client.tell(200, _listed([*self._store.records("file")]))

    async def _file(self, client: Client) -> None:
        await client.tell(200, self._store.read(client.params["id"], "file"))

    async def _remove(self, client: Client) -> None:
        file_id = client.params["id"]
        self._store.read(file_id, "file")
        if self._batches.uses(file_id):
            raise RefusedRequestError(409, "a batch uses the file", code="file_in_use")
        self._store.remove(file_id)
        await client.tell(200, {"id": file_id, "object": "file", "deleted": True})

    async def _content(self, client: Client) -> None:
        file_id = client.params["id"]
        size = self._store.read(file_id, "file")["bytes"]
        await client.drain()
        with self._store.content(file_id).open("rb") as file:
            await client.start(200, "application/octet-stream", {"content-length": str(size)})
            left = int(size)
            while left and (data := await asyncio.to_thread(file.read, min(left, _BLOCK_BYTES))):
                left -= len(data)
                await client.write(data)
        if not left:
            await client.write(b"", more=False)

    async def _create(self, client: Client) -> None:
        fields = await client.read_object(self._service.options.max_body_bytes)
        await client.tell(200, await asyncio.to_thread(self._batches.create, fields))

    async def _list_batches(self, client: Client) -> None:
        await client.tell(200, _listed(self._batches.listed()))

    async def _batch(self, client: Client) -> None:
        await client.tell(200, self._batches.get(client.params["id"]))

    async def _cancel(self, client: Client) -> None:
        await client.tell(200, self._batches.cancel(client.params["id"]))


def _listed(data: list[dict[str, Any]]) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": False, **ends}
