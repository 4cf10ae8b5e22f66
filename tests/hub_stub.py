"""A Hugging Face Hub on this machine: huggingface_hub's own client talks to it over HTTP, told by HF_ENDPOINT.

It speaks what that client asks for when models are pushed and pulled: repositories, branches and commits, the upload
of large files beside them, and files with the headers that its cache is built on. `Hub.break_once` makes one request
fail, to see what is left of an interrupted upload.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from hub_repositories import LARGE, Commit, HubError, Repository, card_problems


TOKEN = "hf_of_no_use_anywhere_else"


class Hub(ThreadingHTTPServer):
    """`repositories` maps "user/name" to what is there; `requests` is all that was asked, in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.faults: list[_Fault] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home) -> dict[str, str]:
        """What a process needs to take this server for the Hub; `home` is its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": f"{home}/modules",
        }

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a commit."""
        return {name: file.data for name, file in self.repositories[repository].at(revision).files.items()}

    def break_once(self, pattern: str, status: int | None, skip: int = 0) -> None:
        """One request that `pattern` matches ("PUT /large/.*") gets this status, or for None no answer at all.

        It is the first of them, or the one after `skip` of them.
        """
        self.faults.append(_Fault(pattern, status, skip))


@dataclass
class _Fault:
    pattern: str
    status: int | None
    skip: int


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    # Head and body are two writes: without this the second waits 40 ms for an acknowledgement of the first.
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def _answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self):
        path = self.path.partition("?")[0]
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        for fault in list(self.server.faults):
            if re.fullmatch(fault.pattern, request):
                if not fault.skip:
                    self.server.faults.remove(fault)
                    return self._break(fault.status)
                fault.skip -= 1
        body = self._body()
        try:
            for pattern, handler, needs_token in ROUTES:
                if match := re.fullmatch(pattern, request):
                    if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        raise HubError(401, "Invalid username or password.")
                    return handler(self, *(unquote(part or "") for part in match.groups()), body=body)
            raise HubError(404, f"no route for {request}", "EntryNotFound")
        except HubError as error:
            self._answer(
                {"error": error.message}, error.status, X_Error_Code=error.code, X_Error_Message=error.message
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _break(self, status: int | None):
        if status is None:
            # Somewhere in the middle of what the client sends.
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            return self.connection.close()
        self._body()
        self._answer({"error": "broken on purpose"}, status)

    def _repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        hidden = repository is not None and repository.private and "Authorization" not in self.headers
        if repository is None or hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    # Accounts and repositories

    def who(self, body):
        self._answer({"name": "me", "type": "user", "fullname": "Me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        fields = json.loads(body)
        name = f"{fields.get('organization') or 'me'}/{fields['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            return self._answer(answer | {"error": "You already created this model repo"}, 409)
        self.server.repositories[name] = Repository(name, private=bool(fields.get("private")))
        self._answer(answer)

    def info(self, name, revision, body):
        commit = self._repository(name).at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        self._answer({"id": name, "sha": commit.id, "private": False, "tags": [], "siblings": siblings})

    def refs(self, name, body):
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit.id}
            for branch, commit in self._repository(name).branches.items()
        ]
        self._answer({"branches": branches, "converts": [], "tags": []})

    def branch(self, name, branch, body):
        self._repository(name).create_branch(branch, (json.loads(body or b"{}")).get("startingPoint") or "main")
        self._answer(status=201)

    def commits(self, name, revision, body):
        date = "2026-01-01T00:00:00.000Z"
        self._answer(
            [
                {"id": c.id, "title": c.title, "message": c.message, "date": date, "authors": [{"user": "me"}]}
                for c in self._repository(name).at(revision).history()
            ]
        )

    # Uploads

    def valid(self, body):
        problems = card_problems(json.loads(body)["content"].encode())
        errors = [{"message": problem} for problem in problems]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, revision, body):
        # What is there already, byte for byte, the client does not send again.
        there = self._repository(name).at(revision).files
        answers = []
        for file in json.loads(body)["files"]:
            path, known = file["path"], there.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known and known.oid})
        self._answer({"files": answers, "commitOid": self._repository(name).at(revision).id})

    def batch(self, name, body):
        repository, objects = self._repository(name), json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in repository.large:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/large/{name}/{entry['oid']}"},
                    "verify": {"href": f"{self.server.url}/{name}.git/info/lfs/objects/verify"},
                }
        self._answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, name, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content has another sha256")
        self._repository(name).large[oid] = body
        self._answer()

    def verify(self, name, body):
        fields = json.loads(body)
        data = self._repository(name).large.get(fields["oid"])
        if data is None or len(data) != fields["size"]:
            raise HubError(404, "no such object")
        self._answer({"message": "ok"})

    def commit(self, name, revision, body):
        entries = [json.loads(line) for line in body.decode().splitlines() if line]
        commit = self._repository(name).commit(revision, entries)
        self._answer(
            {"success": True, "commitOid": commit.id, "commitUrl": f"{self.server.url}/{name}/commit/{commit.id}"}
        )

    # Downloads

    def _entries(self, commit: Commit):
        for path, file in commit.files.items():
            entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            if file.is_large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
            yield entry

    def tree(self, name, revision, body):
        self._answer(list(self._entries(self._repository(name).at(revision))))

    def paths(self, name, revision, body):
        wanted = json.loads(body)["paths"]
        entries = self._entries(self._repository(name).at(revision))
        self._answer([entry for entry in entries if entry["path"] in wanted])

    def resolve(self, name, revision, path, body):
        commit = self._repository(name).at(revision)
        if path not in commit.files:
            return self._answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.id)
        file = commit.files[path]
        headers = {"ETag": f'"{file.etag}"', "X_Repo_Commit": commit.id, "Accept_Ranges": "bytes"}
        if file.is_large:
            headers |= {"X_Linked_Etag": f'"{file.etag}"', "X_Linked_Size": str(len(file.data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self._answer(file.data, **headers)
        start, stop = int(part[1]), int(part[2] or len(file.data) - 1)
        headers["Content_Range"] = f"bytes {start}-{stop}/{len(file.data)}"
        self._answer(file.data[start : stop + 1], 206, **headers)


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.%-]+)"
# (request, handler, whether it takes a token)
ROUTES = [
    (r"GET /api/whoami-v2", _Handler.who, True),
    (r"POST /api/repos/create", _Handler.create, True),
    (r"POST /api/validate-yaml", _Handler.valid, False),
    (rf"GET /api/models/{_NAME}(?:/revision/{_REVISION})?", _Handler.info, False),
    (rf"GET /api/models/{_NAME}/refs", _Handler.refs, False),
    (rf"POST /api/models/{_NAME}/branch/{_REVISION}", _Handler.branch, True),
    (rf"GET /api/models/{_NAME}/commits/{_REVISION}", _Handler.commits, False),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload, True),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch, True),
    (rf"PUT /large/{_NAME}/(\w+)", _Handler.upload, False),
    (rf"POST /{_NAME}\.git/info/lfs/objects/verify", _Handler.verify, True),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", _Handler.commit, True),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", _Handler.tree, False),
    (rf"POST /api/models/{_NAME}/paths-info/{_REVISION}", _Handler.paths, False),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/{_REVISION}/(.+)", _Handler.resolve, False),
]
