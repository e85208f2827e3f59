"""A hub on the loopback interface, for tests: the unmodified `huggingface_hub` uploads to it.

It takes what the upload of a few small files needs, each of them within the commit, and only from
the holder of the token. Anything else is not found.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "k" * 34
COMMIT = "0" * 40


class HubServer(ThreadingHTTPServer):
    """The repositories that were created, as bytes by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, dict[str, bytes]] = {}

    def answer(self, path: str, body: bytes) -> dict[str, Any] | None:
        """The answer to a POST; None where there is no such address."""
        match path.partition("?")[0].strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                self.repos.setdefault(repo, {})
                return {"url": f"{self.url}/{repo}"}
            case ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["api", "models", _, _, "preupload", "main"]:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                return {"files": [{"path": name} | modes for name in names]}
            case ["api", "models", user, name, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        self.repos[f"{user}/{name}"][value["path"]] = base64.b64decode(
                            value["content"]
                        )
                url = f"{self.url}/{user}/{name}/commit/{COMMIT}"
                return {"commitUrl": url, "commitOid": COMMIT}
        return None


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._reply(401, {"error": "Invalid username or password."})
        elif (answer := self.server.answer(self.path, body)) is not None:
            self._reply(200, answer)
        else:
            self._reply(404, {"error": self.path})

    def do_GET(self) -> None:
        # huggingface_hub 0.34 asks where the repository keeps large files.
        if self.path.startswith("/api/models/") and "/revision/main" in self.path:
            self._reply(200, {"id": "user/name", "sha": COMMIT, "xetEnabled": False})
        else:
            self._reply(404, {"error": self.path})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server that runs in a thread until the end of the block."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
