"""A W&B server on the loopback interface, for tests: the unmodified client talks to it online.

It takes what a run needs (log-in, features, create or resume a run, config, the stream of rows and
summaries, files, artifacts, finish) and remembers it; to the agent of a sweep it hands out trials.
Anything else gets an empty answer and a place in `unknown`: what the client asks for moves between
its releases.
"""

import base64
import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from local_server import JsonReplies, in_thread

ENTITY = "tester"
KEY = "k" * 40
HISTORY, SUMMARY, EVENTS, OUTPUT = (
    "wandb-history.jsonl",
    "wandb-summary.json",
    "wandb-events.jsonl",
    "output.log",
)


@dataclass
class ReceivedRun:
    """What the server knows of one run."""

    id: str
    project: str
    name: str
    entity: str = ENTITY
    config: dict[str, Any] = field(default_factory=dict)
    # Lines by their offset, as the file stream numbers them: one sent again replaces itself.
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    # What else was said of the run, such as its tags, by the name in the GraphQL schema.
    said: dict[str, Any] = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None

    def lines(self, file: str) -> list[str]:
        return [line for _, line in sorted(self.files.get(file, {}).items())]

    def rows(self) -> list[dict[str, Any]]:
        """The history, in order, with the client's own keys such as `_step`."""
        return [json.loads(line) for line in self.lines(HISTORY)]

    def summary(self) -> dict[str, Any]:
        last = self.lines(SUMMARY)[-1:]
        return json.loads(last[0]) if last else {}

    def axes(self) -> set[str]:
        """The axes of all metrics: what `define_metric` said. On the wire it is
        a list of mappings of protobuf field numbers: 1 is a metric's name, 2 a pattern, 5 the place
        (from 1) of its axis in the list."""
        metrics = self.config["_wandb"]["value"].get("m", [])
        return {metrics[m["5"] - 1]["1"] for m in metrics if "5" in m}

    def bucket(self) -> dict[str, Any]:
        """The run in the words of the GraphQL schema."""
        return {
            "id": f"node-{self.id}",
            "name": self.id,
            "displayName": self.name,
            "config": json.dumps(self.config),
            "historyLineCount": len(self.lines(HISTORY)),
            "project": {
                "id": "p",
                "name": self.project,
                "entity": {"id": "e", "name": self.entity},
            },
        }

    def resume_status(self) -> dict[str, Any]:
        return self.bucket() | {
            "summaryMetrics": json.dumps(self.summary()),
            "logLineCount": len(self.lines(OUTPUT)),
            "eventsLineCount": len(self.lines(EVENTS)),
            "historyTail": json.dumps(self.lines(HISTORY)[-1:]),
            "eventsTail": json.dumps(self.lines(EVENTS)[-1:]),
            "wandbConfig": json.dumps({"t": 1}),
            "tags": self.said.get("tags") or [],
        }


@dataclass
class ReceivedArtifact:
    """One version of an artifact."""

    type: str
    name: str
    digest: str
    run: str
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""
    committed: bool = False


@dataclass
class Sweep:
    """A sweep whose trials are known before.

    Attributes:
        config: its file, as text.
        trials: values by config field, of each trial that no agent has taken yet.
        taken: the ids of the runs of the others.
    """

    id: str
    project: str
    config: str
    trials: list[dict[str, Any]]
    taken: list[str] = field(default_factory=list)


class WandbServer(ThreadingHTTPServer):
    """`WANDB_BASE_URL` is its `url`. Where `answers` is false, it listens and never replies; that
    also begins once it has answered an operation named by `stops_answering_after`."""

    daemon_threads = True

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        answers: bool = True,
        stops_answering_after: str | None = None,
    ) -> None:
        super().__init__((host, 0), _Handler)
        self.url = f"http://{host}:{self.server_address[1]}"
        self.answers = answers
        self.last_operation = stops_answering_after
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: dict[str, ReceivedArtifact] = {}
        self.sweep: Sweep | None = None
        self.operations: list[str] = []
        self.unknown: set[str] = set()
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients leave kept-alive connections without a goodbye.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation's answer; empty for one that is not known."""
        match operation:
            case "Viewer":
                viewer = {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}"}
                return {"viewer": viewer | {"admin": False, "teams": {"edges": []}}}
            case "ProbeServerCapabilities":  # wandb 0.19
                types = ("QueryType", "MutationType", "ServerInfoType")
                return {name: {"fields": []} for name in types}
            case "ServerFeaturesQuery" | "ServerInfo":
                newest = {"max_cli_version": "99.0.0"}
                return {"serverInfo": {"features": [], "cliVersionInfo": newest}}
            case "RunResumeStatus":
                run = self.runs.get(values["name"])
                bucket = run and run.resume_status()
                return {"model": {"id": "m", "entity": {"name": ENTITY}, "bucket": bucket}}
            case "OrganizationCoreWeaveOrganizationID":  # where the machine's own metrics go
                return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(values)}
            case "RunStoppedStatus":
                return {"project": {"run": {"stopped": False}}}
            case "CreateRunFiles":
                at = f"{self.url}/upload/{values['run']}/"
                files = [{"name": name, "uploadUrl": at + name} for name in values["files"]]
                created = {"runID": "r", "uploadHeaders": [], "files": files}
                return {"createRunFiles": created}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                return {"createArtifact": {"artifact": self._artifact(values)}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest":
                id = values.get("artifactID") or values["artifactManifestID"].split("-", 1)[1]
                file = {"id": "f", "uploadUrl": f"{self.url}/manifest/{id}", "uploadHeaders": []}
                manifest = {"id": f"manifest-{id}", "file": file}
                return {operation[0].lower() + operation[1:]: {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                nodes = [
                    {
                        "storagePath": None,
                        "uploadUrl": f"{self.url}/artifact/{file['artifactID']}/{file['name']}",
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": {"id": file["artifactID"]},
                    }
                    for file in values["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": [{"node": n} for n in nodes]}}}
            case "CommitArtifact":
                artifact = self.artifacts[values["artifactID"]]
                artifact.committed = True
                done = {"id": values["artifactID"], "digest": artifact.digest}
                return {"commitArtifact": {"artifact": done}}
            case "SweepWithRuns" if self.sweep:
                sweep = {"id": "s", "config": self.sweep.config, "runs": {"edges": []}}
                return {"project": {"sweep": sweep}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": "agent"}}}
            case "Heartbeat" if self.sweep:
                busy = json.loads(values["runState"])
                commands = [] if busy else self._next_trial(self.sweep)
                heartbeat = {"agent": {"id": "agent"}, "commands": json.dumps(commands)}
                return {"agentHeartbeat": heartbeat}
        return {}

    def _next_trial(self, sweep: Sweep) -> list[dict[str, Any]]:
        """The command to an agent that starts the next trial, whose run is there from then on."""
        if not sweep.trials:
            return [{"type": "exit"}]
        id = f"trial{len(sweep.taken)}"
        self.runs[id] = ReceivedRun(id, sweep.project, f"breezy-sweep-{len(sweep.taken)}")
        sweep.taken.append(id)
        values = {name: {"value": value} for name, value in sweep.trials.pop(0).items()}
        return [{"type": "run", "run_id": id, "program": None, "args": values}]

    def _artifact(self, values: dict[str, Any]) -> dict[str, Any]:
        """A new version, or the last one where its content is the same."""
        name, digest = values["artifactCollectionName"], values["digest"]
        for id, artifact in self.artifacts.items():
            if (artifact.name, artifact.digest, artifact.committed) == (name, digest, True):
                return {
                    "id": id,
                    "state": "COMMITTED",
                    "artifactSequence": {"latestArtifact": None},
                }
        id = f"a{len(self.artifacts)}"
        type, run = values["artifactTypeName"], values["runName"]
        self.artifacts[id] = ReceivedArtifact(type, name, digest, run)
        return {"id": id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        nodes = {f"node-{run.id}": run.id for run in self.runs.values()}
        id = values.get("name") or nodes[values["id"]]
        inserted = id not in self.runs
        if inserted:
            name = values.get("displayName") or id
            project = values.get("project") or "uncategorized"
            self.runs[id] = ReceivedRun(id, project, name, values.get("entity") or ENTITY)
        if values.get("config"):
            self.runs[id].config = json.loads(values["config"])
        self.runs[id].said |= {k: v for k, v in values.items() if v is not None and k != "config"}
        return {"bucket": self.runs[id].bucket(), "inserted": inserted}

    def stream(self, run: ReceivedRun, body: dict[str, Any]) -> None:
        """Takes a piece of the file stream, by which rows and the end of a run arrive."""
        for name, piece in (body.get("files") or {}).items():
            run.files.setdefault(name, {}).update(enumerate(piece["content"], piece["offset"]))
        run.preempting |= bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body["exitcode"]


class _Handler(JsonReplies, BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self._body()
        if not self.server.answers:
            self.server.closing.wait()
            self.close_connection = True
            return
        _, _, key = base64.b64decode(self.headers["Authorization"].split()[-1]).partition(b":")
        with self.server.lock:
            if key.decode() != KEY:
                self.reply({"errors": [{"message": "permission denied"}]}, status=401)
            elif self.path == "/graphql":
                request = json.loads(body)
                named = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
                operation = request.get("operationName") or (named.group(1) if named else "?")
                values = request.get("variables") or {}
                # Some mutations wrap their variables.
                data = self.server.answer(operation, values | (values.get("input") or {}))
                self._record(operation, known=bool(data))
                self.reply({"data": data})
            elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self.server.stream(self.server.runs[stream.group(1)], json.loads(body))
                self._record("file_stream")
                self.reply({"limits": {}})
            else:
                self._refuse()

    def do_PUT(self) -> None:
        body = self._body()
        with self.server.lock:
            found = re.fullmatch(r"/(upload|artifact|manifest)/([^/]+)(?:/(.+))?", self.path)
            if found is None:
                self._refuse()
                return
            kind, id, name = found.groups()
            if kind == "upload":
                self.server.runs[id].uploads[unquote(name)] = body
            elif kind == "artifact":
                self.server.artifacts[id].files[unquote(name)] = body
            else:
                self.server.artifacts[id].manifest = body
            self._record(kind)
            self.reply({})

    def do_GET(self) -> None:
        with self.server.lock:
            self._refuse()

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _record(self, operation: str, *, known: bool = True) -> None:
        self.server.operations.append(operation)
        if operation == self.server.last_operation:
            self.server.answers = False
        if not known:
            self.server.unknown.add(operation)

    def _refuse(self) -> None:
        self._record(f"{self.command} {self.path}", known=False)
        self.reply({"error": "no such place"}, status=404)


@contextmanager
def serving(**how: Any) -> Iterator[WandbServer]:
    """A server that runs in a thread until the end of the block."""
    with in_thread(WandbServer(**how)) as server:
        try:
            yield server
        finally:
            server.closing.set()
