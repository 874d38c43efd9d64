"""A Hub on the loopback, for the real huggingface_hub client: repositories, commits, LFS, tags, pull requests, faults.

It speaks what huggingface_hub 1.5 to 2.4 asks: repos/create, model info, validate-yaml, preupload, LFS batch, PUT and
verify, commit (NDJSON), refs, tag, discussions, tree, resolve (with ETag, and a redirect for LFS). Xet is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".png")
"""Kept in LFS."""
Files = dict[str, bytes]


@dataclass
class Fault:
    """What goes wrong with requests."""

    path: str
    """Regular expression, searched in `METHOD /path`."""
    kind: str = "status"
    """status, hang, reset (in the middle of what is sent), slow (a byte a while)."""
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    content: Any = field(default_factory=lambda: {"error": "as the test wants it"})
    after: bool = False
    """Whether the request has its effect first."""


@dataclass
class Repo:
    """A repository."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    """Id and message of each commit on main, oldest first."""
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    """Titles; the first is number 1."""

    def commit(self, files: Files, message: str, ref: str) -> str:
        """Put files onto a branch."""
        oid = hashlib.sha1(f"{ref}{message}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        if ref == "main":
            self.log.append((oid, message))
        return oid

    def at(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        known = revision if revision in self.commits else None
        return self.refs.get(revision) or self.tags.get(revision) or known


class Hub(ThreadingHTTPServer):
    """The server; `url` is its address."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.owner = "me"
        """Whose repositories the token may write to."""
        self.repos: dict[str, Repo] = {}
        self.large: Files = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.times: list[float] = []
        self.ended = threading.Event()
        self.mutex = threading.RLock()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def asked(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]

    def files(self, repo: str, revision: str = "main") -> Files:
        """What a repository holds."""
        found = self.repos[repo]
        return found.commits[str(found.at(revision))]


@contextmanager
def serving(token: str) -> Iterator[Hub]:
    """A Hub while the body runs."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        hub.shutdown()
        hub.server_close()


def refused() -> str:
    """An address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class Reply(Exception):  # noqa: N818 - an answer
    """Ends a request."""

    def __init__(self, status: int = 200, content: Any = b"", **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = content if isinstance(content, bytes) else json.dumps(content).encode()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""

    def answer(self) -> None:
        """Take any request, and let go wrong what is to go wrong."""
        length = int(self.headers.get("Content-Length") or 0)
        fault = self._fault()
        if fault is not None and fault.kind == "reset" and not fault.after:
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        with self.server.mutex:
            self.server.requests.append(f"{self.command} {self.path}")
            self.server.times.append(time.monotonic())
            self.server.bodies.append(body)
        if fault is not None and not fault.after:
            self._go_wrong(fault)
            return
        try:
            with self.server.mutex:
                self._route(body)
            raise AssertionError(f"{self.command} {self.path} has no answer")
        except Reply as reply:
            if fault is None:
                self._send(reply)
            else:
                self._go_wrong(fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _fault(self) -> Fault | None:
        with self.server.mutex:
            for fault in self.server.faults:
                if fault.times and re.search(fault.path, f"{self.command} {self.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _go_wrong(self, fault: Fault) -> None:
        if fault.kind == "reset":
            self._reset()
        elif fault.kind == "hang":
            self.server.ended.wait(60)
            self.close_connection = True
        elif fault.kind == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not self.server.ended.wait(0.2):
                self.wfile.write(b" ")
        else:
            self._send(Reply(fault.status, fault.content, **fault.headers))

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content)

    # ---- what it knows ----

    def _route(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        routes: dict[str, Callable[..., None]] = {
            r"/api/validate-yaml": self._validate,
            r"/api/whoami-v2": self._whoami,
            r"/api/repos/create": self._create,
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self._preupload,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self._commit,
            r"/api/models/([^/]+/[^/]+)/refs": self._refs,
            r"/api/models/([^/]+/[^/]+)/commits/(.+)": self._commits,
            r"/api/models/([^/]+/[^/]+)/tag/(.+)": self._tag,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?": self._tree,
            r"/api/models/([^/]+/[^/]+)/discussions": self._discussions,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"/lfs/(\w+)": self._store,
            r"/verify": self._verify,
            r"/cdn/(\w+)": self._load,
            r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)": self._resolve,
        }
        for pattern, method in routes.items():
            found = re.fullmatch(pattern, path)
            if found is not None:
                method(body, *found.groups())
        raise Reply(404, {"error": "no such page"})

    def _may(self, *, write: bool = False, owner: str = "") -> None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.server.token}":
            raise Reply(401, {"error": "Invalid credentials in Authorization header"})
        if write and given is None:
            raise Reply(401, {"error": "Invalid username or password."})
        if write and owner != self.server.owner:
            raise Reply(403, {"error": f"You don't have the rights to write to {owner}"})

    def _repo(self, name: str) -> Repo:
        self._may()
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") is None):
            raise Reply(404 if repo is None else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _validate(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        header = content.split("---")[1] if content.startswith("---\n") else ""
        try:
            fields: Any = yaml.safe_load(header)
        except yaml.YAMLError as error:
            raise Reply(400, {"errors": [{"message": str(error)}], "warnings": []}) from error
        errors = [{"message": f"{name} must be text"} for name in ("license", "library_name") if not isinstance(
            fields.get(name, ""), str)]  # fmt: skip
        raise Reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def _whoami(self, body: bytes) -> None:
        self._may(write=True, owner=self.server.owner)
        raise Reply(200, {"type": "user", "name": self.server.owner, "orgs": []})

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        self._may(write=True, owner=wanted["organization"])
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repos:
            raise Reply(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.server.repos[name] = repo = Repo(private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", "main")
        raise Reply(200, {"url": url, "name": name, "id": name})

    def _info(self, body: bytes, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        oid = self._at(repo, revision or "main")
        siblings = [{"rfilename": file} for file in sorted(repo.commits[oid])]
        raise Reply(200, {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})

    def _at(self, repo: Repo, revision: str) -> str:
        oid = repo.at(revision)
        if oid is None:
            raise Reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return oid

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        there = repo.commits[self._at(repo, revision)]
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid_of(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        raise Reply(200, {"files": told})

    def _batch(self, body: bytes, name: str) -> None:
        self._repo(name)
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{each['oid']}?X-Amz-Signature=abcdefabcdef"}
            actions = {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}
            new = {} if each["oid"] in self.server.large else {"actions": actions}
            objects.append({"oid": each["oid"], "size": each["size"], **new})
        raise Reply(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Reply(400, {"error": "these are other bytes"})
        self.server.large[oid] = body
        raise Reply(200)

    def _verify(self, body: bytes) -> None:
        raise Reply(200 if json.loads(body)["oid"] in self.server.large else 404, {})

    def _load(self, body: bytes, oid: str) -> None:
        raise Reply(200, self.server.large[oid])

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        is_pull = "create_pr" in parse_qs(urlsplit(self.path).query)
        repo = self._repo(name)
        self._may(write=True, owner=self.server.owner if is_pull or "refs/pr" in revision else name.split("/")[0])
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        files, message = dict(repo.commits[self._at(repo, revision)]), lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                del files[value["path"]]
        pull = {}
        if is_pull:
            repo.pulls.append(message)
            revision = f"refs/pr/{len(repo.pulls)}"
            pull = {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{len(repo.pulls)}"}
        oid = repo.commit(files, message, revision)
        raise Reply(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", **pull}
        )

    def _refs(self, body: bytes, name: str) -> None:
        repo = self._repo(name)
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.refs["main"]}]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()]
        raise Reply(200, {"branches": branches, "converts": [], "tags": tags})

    def _commits(self, body: bytes, name: str, revision: str) -> None:
        self._at(self._repo(name), revision)
        date = "2026-01-01T00:00:00.000Z"
        told = [
            {"id": oid, "title": title, "message": "", "authors": [], "date": date}
            for oid, title in reversed(self._repo(name).log)
        ]
        raise Reply(200, told)

    def _tag(self, body: bytes, name: str, revision: str) -> None:
        repo, tag = self._repo(name), json.loads(body)["tag"]
        self._may(write=True, owner=name.split("/")[0])
        if tag in repo.tags:
            raise Reply(409, {"error": "Tag reference exists already"})
        repo.tags[tag] = self._at(repo, revision)
        raise Reply(200, {})

    def _discussions(self, body: bytes, name: str) -> None:
        told = [
            {
                "title": title, "status": "open", "num": number, "repo": {"name": name, "type": "model"},
                "isPullRequest": True, "author": {"name": self.server.owner}, "createdAt": "2026-01-01T00:00:00.000Z",
            }
            for number, title in enumerate(self._repo(name).pulls, 1)
        ]  # fmt: skip
        raise Reply(200, {"discussions": told, "count": len(told), "start": 0})

    def _tree(self, body: bytes, name: str, revision: str, folder: str | None) -> None:
        repo = self._repo(name)
        files = repo.commits[self._at(repo, revision)]
        found = [
            {"type": "file", "path": file, "size": len(content), "oid": oid_of(file, content)}
            for file, content in sorted(files.items())
            if folder is None or file.startswith(f"{folder}/")
        ]
        if not found:
            raise Reply(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
        raise Reply(200, found)

    def _resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        oid = self._at(repo, revision)
        content = repo.commits[oid].get(file)
        if content is None:
            raise Reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        etag = f'"{oid_of(file, content)}"'
        if not file.endswith(LARGE):
            raise Reply(200, content, X_Repo_Commit=oid, ETag=etag)
        # Under another name, as on the Hub: the client follows to the same host before it looks at the headers.
        where = f"http://localhost:{self.server.server_port}/cdn/{hashlib.sha256(content).hexdigest()}"
        size = str(len(content))
        raise Reply(302, b"", X_Repo_Commit=oid, Location=where, X_Linked_ETag=etag, X_Linked_Size=size, ETag=etag)


def oid_of(name: str, content: bytes) -> str:
    """How the Hub calls a content: SHA-256 in LFS, git's SHA-1 elsewhere."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
