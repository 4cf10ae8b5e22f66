"""What a Hub keeps: repositories with branches of whole commits, and large files that wait for the commit they are in.

A commit is all of its files. It is made of its parent and a list of operations, completely or not at all.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field

import yaml


# What .gitattributes of a new repository sends the way of large files, beside whatever is no text.
LARGE = (".bin", ".safetensors", ".pt", ".pth", ".onnx", ".npz", ".parquet", ".gz", ".zip")


class HubError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    data: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """git's name of the blob; of a large file, of the pointer that git keeps in its place."""
        data = self.data
        if self.is_large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    parent: "Commit | None"
    files: dict[str, File]

    def history(self) -> "list[Commit]":
        """This commit and those before it, the newest first."""
        commits, commit = [], self
        while commit is not None:
            commits.append(commit)
            commit = commit.parent
        return commits


def make_commit(parent: Commit | None, title: str, message: str, files: dict[str, File]) -> Commit:
    before = [] if parent is None else parent.history()
    content = [[name, file.oid] for name, file in sorted(files.items())]
    identity = json.dumps([parent.id if parent else None, len(before), title, message, content])
    return Commit(hashlib.sha1(identity.encode()).hexdigest(), title, message, parent, files)


@dataclass
class Repository:
    name: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded, by sha256
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        first = {".gitattributes": File(attributes.encode(), is_large=False)}
        self.branches.setdefault("main", make_commit(None, "initial commit", "", first))

    @property
    def head(self) -> Commit:
        return self.branches["main"]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, or of a whole or abbreviated id."""
        if revision in self.branches:
            return self.branches[revision]
        for head in self.branches.values():
            for commit in head.history():
                if len(revision) >= 7 and commit.id.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create_branch(self, branch: str, start: str) -> None:
        if branch in self.branches:
            raise HubError(409, "Reference already exists")
        self.branches[branch] = self.at(start)

    def commit(self, branch: str, entries: list[dict]) -> Commit:
        """Make the commit that the lines of a request describe the head of `branch`."""
        with self.lock:
            if branch not in self.branches:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            parent = self.branches[branch]
            if not entries or entries[0]["key"] != "header":
                raise HubError(400, "the first line must be the header")
            header = entries[0]["value"]
            if header.get("parentCommit") not in (None, parent.id):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for entry in entries[1:]:
                self._apply(entry["key"], entry["value"], files)
            errors = card_problems(files["README.md"].data) if "README.md" in files else []
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            commit = make_commit(parent, header["summary"], header.get("description", ""), files)
            self.branches[branch] = commit
            return commit

    def _apply(self, kind: str, value: dict, files: dict[str, File]) -> None:
        path = value["path"]
        if path.startswith(("/", "../")) or "/../" in path:
            raise HubError(400, f"Invalid path: {path}")
        if kind == "file":
            data = value["content"]
            data = base64.b64decode(data, validate=True) if value.get("encoding") == "base64" else data.encode()
            files[path] = File(data, is_large=False)
        elif kind == "lfsFile":
            data = self.large.get(value["oid"])
            if data is None or len(data) != value["size"]:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = File(data, is_large=True)
        elif kind == "deletedFile":
            files.pop(path, None)
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise HubError(400, f"unknown operation {kind}")


def card_problems(card: bytes) -> list[str]:
    """What the Hub's check of a model card's metadata finds wrong, for what can be checked without its lists."""
    text = card.decode()
    if not text.startswith("---\n"):
        return []
    try:
        metadata = yaml.safe_load(text[4:].partition("\n---")[0]) or {}
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    problems = []
    for name in ("library_name", "pipeline_tag", "license_name"):
        if not isinstance(metadata.get(name, ""), str):
            problems.append(f"{name} must be a string")
    for name in ("license", "language", "base_model"):
        if not isinstance(metadata.get(name, ""), (str, list)):
            problems.append(f"{name} must be a string or a list of strings")
    for name in ("tags", "datasets", "metrics"):
        values = metadata.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            problems.append(f"{name} must be a list of strings")
    for entry in metadata.get("model-index") or []:
        if not isinstance(entry.get("name"), str) or not isinstance(entry.get("results"), list):
            problems.append("each entry of model-index must have a name and results")
            continue
        for result in entry["results"]:
            missing = {"task", "dataset", "metrics"} - set(result)
            if missing:
                problems.append(f"a result of model-index lacks {sorted(missing)}")
    return problems
