"""A Hugging Face Hub of a few routes, in memory: enough to push a model, load it and list what is there."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """`files` maps a repository to its files; every push makes a new commit of all of them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # uploads that wait for the commit that names them, by sha256
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home) -> dict[str, str]:
        """What a process needs to take this server for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_no_use_anywhere_else",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": f"{home}/modules",
        }

    def commit_id(self, repository: str) -> str:
        state = json.dumps({name: _sha256(data) for name, data in sorted(self.files[repository].items())})
        return hashlib.sha1(state.encode()).hexdigest()


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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def _answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        for pattern, handler in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return handler(self, *match.groups(), body=body)
        self._answer({"error": f"no route for {self.command} {path}"}, 404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def create(self, body):
        fields = json.loads(body)
        repository = "/".join(part for part in (fields.get("organization") or "me", fields["name"]) if part)
        known = repository in self.server.files
        self.server.files.setdefault(repository, {})
        self._answer({"url": f"{self.server.url}/{repository}", "name": repository}, 409 if known else 200)

    def who(self, body):
        self._answer({"name": "me", "type": "user", "orgs": []})

    def valid(self, body):
        self._answer({"errors": [], "warnings": []})

    def preupload(self, repository, body):
        # Whatever is no text goes the way of large files, as it does on the Hub.
        def mode(name):
            return "lfs" if name.endswith((".safetensors", ".bin")) else "regular"

        names = [file["path"] for file in json.loads(body)["files"]]
        self._answer({"files": [{"path": name, "uploadMode": mode(name), "shouldIgnore": False} for name in names]})

    def batch(self, repository, body):
        objects = json.loads(body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, oid, body):
        assert _sha256(body) == oid
        self.server.large[oid] = body
        self._answer()

    def commit(self, repository, body):
        files = self.server.files[repository]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = self.server.commit_id(repository)
        self._answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repository}/commit/{commit}"}
        )

    def info(self, repository, body):
        if repository not in self.server.files:
            return self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in self.server.files[repository]]
        self._answer({"id": repository, "sha": self.server.commit_id(repository), "siblings": siblings})

    def tree(self, repository, body):
        files = self.server.files.get(repository, {})
        self._answer(
            [{"type": "file", "path": n, "size": len(data), "oid": _sha256(data)} for n, data in files.items()]
        )

    def resolve(self, repository, name, body):
        files = self.server.files.get(repository)
        if files is None:
            return self._answer(status=404, X_Error_Code="RepoNotFound")
        commit = self.server.commit_id(repository)
        if name not in files:
            return self._answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self._answer(files[name], ETag=f'"{_sha256(files[name])}"', X_Repo_Commit=commit)


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/validate-yaml", _Handler.valid),
    (rf"POST /api/models/{_REPOSITORY}/preupload/main", _Handler.preupload),
    (rf"POST /{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(\w+)", _Handler.upload),
    (rf"POST /api/models/{_REPOSITORY}/commit/main", _Handler.commit),
    (rf"GET /api/models/{_REPOSITORY}(?:/revision/\w+)?", _Handler.info),
    (rf"GET /api/models/{_REPOSITORY}/tree/\w+", _Handler.tree),
    (rf"(?:GET|HEAD) /{_REPOSITORY}/resolve/\w+/(.+)", _Handler.resolve),
]
