"""A stand-in for the Hugging Face hub on this machine: its listing, its files with ranges, its refusals, its breaks."""

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "aB3" * 12


@dataclass
class Hub:
    """files: {path: content} of the one repository. gated: only with TOKEN. cut: paths whose first answers end
    half-way, how many times each. corrupt: paths that are sent with other bytes."""

    name: str
    files: dict[str, bytes]
    kind: str = "model"
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # bytes

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlparse(request.path).path)
        prefix = "/datasets" if self.kind == "dataset" else ""
        listing = f"/api/{self.kind}s/{self.name}/revision/"
        files = f"{prefix}/{self.name}/resolve/{COMMIT}/"
        if not path.startswith((f"/api/{self.kind}s/{self.name}", f"{prefix}/{self.name}/")):
            return self._refuse(request, 404, "RepoNotFound")
        if path.startswith(listing):
            revision = path.removeprefix(listing)
            if revision not in ("main", "v1", COMMIT):
                return self._refuse(request, 404, "RevisionNotFound")
            return self._send(request, 200, json.dumps(self.listing()).encode(), {}, with_body)
        if self.gated and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(request, 403 if request.headers.get("Authorization") else 401, "GatedRepo")
        name = path.removeprefix(files)
        if name not in self.files:
            return self._refuse(request, 404, "EntryNotFound")
        return self._file(request, name, with_body)

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git(content)}
            if large(name):
                sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 9}
            siblings.append(sibling)
        card = {"license": "llama3.1"}
        gated = "manual" if self.gated else False
        return {"id": self.name, "sha": COMMIT, "gated": gated, "cardData": card, "tags": [], "siblings": siblings}

    def _file(self, request: BaseHTTPRequestHandler, name: str, with_body: bool) -> None:
        content = self.files[name]
        etag = hashlib.sha256(content).hexdigest() if large(name) else git(content)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if name in self.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, status = 0, 200
        if (asked := request.headers.get("Range")) and with_body:
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.ranges.append(f"{name} {start}")
        if with_body:
            self.asked[name] += 1
            if self.cut.get(name, 0) > 0:
                self.cut[name] -= 1
                return self._send(request, status, content[start:], headers, with_body, half=True)
        self._send(request, status, content[start:], headers, with_body)
        if with_body:
            self.sent[name] += len(content) - start

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self._send(request, status, b"{}", {"X-Error-Code": code}, with_body=True)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str],
        with_body: bool,
        half: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if with_body and request.command != "HEAD":
            request.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)


def large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet", ".bin", ".jsonl"))


def git(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
