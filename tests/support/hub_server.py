"""A hub on the loopback interface, for tests: the unmodified `huggingface_hub` uploads to it.

It takes what the upload of a few small files needs, each of them within the commit, and only from
the holder of the token. Anything else is not found.
"""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from local_server import JsonReplies, in_thread

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


class _Handler(JsonReplies, BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid username or password."}, 401)
        elif (answer := self.server.answer(self.path, body)) is not None:
            self.reply(answer)
        else:
            self.reply({"error": self.path}, 404)

    def do_GET(self) -> None:
        # huggingface_hub 0.34 asks where the repository keeps large files.
        if self.path.startswith("/api/models/") and "/revision/main" in self.path:
            self.reply({"id": "user/name", "sha": COMMIT, "xetEnabled": False})
        else:
            self.reply({"error": self.path}, 404)


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server that runs in a thread until the end of the block."""
    with in_thread(HubServer()) as server:
        yield server
