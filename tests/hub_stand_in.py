"""A stand-in for the hub's HTTP interface on loopback: models and data sets with revisions, and what goes wrong."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+))?/?(.*)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories by name, "ORG/NAME" or "datasets/ORG/NAME": {revision: {file: bytes}}.

    A name in `gated` or `private` is closed; a file in `short` arrives without its second half.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated, self.private, self.short = set(), set(), set()
        self.requests: list[str] = []
        self.created: list[dict] = []
        self.ranges: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: _Handler(self, *arguments))
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.close = server.shutdown

    def add(self, name, files, revision="main"):
        self.repositories.setdefault(name, {})[revision] = {file: bytes(data) for file, data in files.items()}

    def add_folder(self, name, folder, revision="main"):
        self.add(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, revision)

    def commit(self, name, revision):
        """The files of a revision and its commit, which also names it; None where there is none."""
        for known, files in self.repositories[name].items():
            content = "".join(f"{file}{_digest(data)}" for file, data in sorted(files.items()))
            commit = hashlib.sha1(f"{name}{content}".encode()).hexdigest()
            if revision in (known, commit):
                return files, commit
        return None


def _digest(data):
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *arguments):
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def _answer(self, status, content=b"", headers=None, head=False):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _refuse(self, status, code, head=False):
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code}, head)

    def do_HEAD(self):  # noqa: N802  http.server's name
        self.do_GET(head=True)

    def do_GET(self, head=False):  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if found := API.fullmatch(path):
            kind, name, action, revision, rest = found.groups()
            self._api(f"datasets/{name}" if kind == "datasets" else name, name, action, revision or "main", rest, head)
        elif found := FILE.fullmatch(path):
            data, name, revision, file = found.groups()
            self._file(f"{data or ''}{name}", revision, file, head)
        elif path == "/api/whoami-v2":
            self._answer(200, {"name": "someone", "type": "user", "orgs": []})
        else:
            self._refuse(404, "RepoNotFound", head)

    def _found(self, key, revision, head):
        """The files and commit of a revision; None after the refusal is sent."""
        if key not in self.hub.repositories or key in self.hub.private:
            # The hub does not tell strangers which private repositories exist.
            self._refuse(401, "RepoNotFound", head)
            return None
        found = self.hub.commit(key, revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", head)
        return found

    def _api(self, key, name, action, revision, rest, head):
        if not (found := self._found(key, revision, head)):
            return
        files, commit = found
        if action in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            self._answer(
                200, {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}, head=head
            )
        elif action == "tree":
            inside = f"{rest}/" if rest else ""
            found = [file for file in files if file.startswith(inside)]
            if rest and not found:
                return self._refuse(404, "EntryNotFound", head)
            if "recursive=true" not in self.path.lower():  # files and folders at this level
                found = sorted({inside + file.removeprefix(inside).partition("/")[0] for file in found})
            self._answer(200, [_entry(file, files.get(file)) for file in found], head=head)

    def _file(self, key, revision, file, head):
        if not (found := self._found(key, revision, head)):
            return
        files, commit = found
        if key in self.hub.gated:
            return self._refuse(403, "GatedRepo", head)
        if file not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, head)
        data = files[file]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.hub.ranges.append(f"{file} {wanted[0]}")
            start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
            part = data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
            return self._answer(206, part, headers, head)
        if file in self.hub.short and not head:
            data = data[: len(data) // 2]
        self._answer(200, data, headers, head)

    def do_POST(self):  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = API.fullmatch(path)
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.hub.created.append(wanted)
            name = f"{wanted.get('organization')}/{wanted['name']}"
            if name in self.hub.repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.add(name, {})
            return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        if not found:
            return self._refuse(404, "RepoNotFound")
        kind, name, action, revision, _ = found.groups()
        key = f"datasets/{name}" if kind == "datasets" else name
        if not (at := self._found(key, revision or "main", False)):
            return None
        files, commit = at
        if action == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else None
            wanted = (
                asked["paths"]
                if asked
                else [unquote(x.partition(b"=")[2].decode()) for x in body.split(b"&") if x.startswith(b"paths")]
            )
            known = [f for f in wanted if f in files or any(file.startswith(f"{f}/") for file in files)]
            return self._answer(200, [_entry(file, files.get(file)) for file in known])
        if action == "preupload":
            sent = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in sent]
            return self._answer(200, {"files": modes})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.hub.commit(key, revision or "main")[1]
            return self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})
        return self._refuse(404, "EntryNotFound")


def _entry(file, data):
    """A file, or a folder where there are no data."""
    if data is None:
        return {"type": "directory", "path": file, "oid": _digest(file.encode())}
    return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
