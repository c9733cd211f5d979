"""A hub on loopback: the endpoints that `huggingface_hub` calls to list, download and upload."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

import huggingface_hub
from huggingface_hub import constants

TOKEN = "hf_token"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `repositories`, a dict from `user/name` to a dict from file name to bytes.

    `refused` has the names of files that are listed, and then not given. `cut` maps a file name to
    how many bytes are sent before the connection is closed, once. `sizes` maps a file name to the
    size that is claimed for it. `asked` lists what was asked for, `resumed_at` the bytes that
    downloads went on from.
    """

    def __init__(self, repositories):
        self.repositories = repositories
        self.refused: set[str] = set()
        self.cut: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.commits = 0
        self.asked: list[tuple[str, str]] = []
        self.resumed_at: list[int] = []

    def downloads(self):
        return [path for method, path in self.asked if method == "GET" and "/resolve/" in path]


@contextlib.contextmanager
def serving(hub: Hub):
    """Yields the address of a running server."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_to(address, cache, monkeypatch):
    """What HF_ENDPOINT and HF_HUB_CACHE do when they are set before the client is imported.

    And the client, which the tests keep offline, goes online.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, self.path))
        parts = self.path.strip("/").split("?")[0].split("/")
        repository, rest = "/".join(parts[2:4]), parts[4:]
        if parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif not self._is_known():
            self._refuse("", status=401)
        elif parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization', 'user')}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        elif rest[:1] == ["preupload"]:
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = [{"path": file["path"], **mode} for file in json.loads(body)["files"]]
            self._json({"files": files})
        elif rest[:1] == ["commit"]:
            files = self.hub.repositories[repository]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            self.hub.commits += 1
            self._json({"commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}",
                        "commitOid": COMMIT})  # fmt: skip
        else:
            self._refuse("EntryNotFound")

    def _is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            self._json({"name": "user"}) if self._is_known() else self._refuse("", status=401)
        elif parts[:2] == ["api", "models"]:
            self._answer_api("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._answer_file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._refuse("EntryNotFound")

    def _answer_api(self, repository, rest):
        files = self.hub.repositories.get(repository)
        if files is None:
            self._refuse("RepoNotFound")
        elif len(rest) > 1 and rest[1] not in ("main", COMMIT):
            self._refuse("RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self._json([self._entry(name, content) for name, content in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "modelId": repository, "sha": COMMIT, "tags": [],
                        "private": False, "downloads": 0, "siblings": siblings})  # fmt: skip

    def _entry(self, name, content):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": self._size(name, content), "oid": oid}

    def _size(self, name, content):
        return self.hub.sizes.get(name, len(content))

    def _answer_file(self, repository, name):
        content = self.hub.repositories.get(repository, {}).get(name)
        if content is None:
            self._refuse("EntryNotFound")
            return
        if name in self.hub.refused:
            self._refuse("", status=403)
            return
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            self.hub.resumed_at.append(start)
        size = self._size(name, content)
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Linked-Size", str(size))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.hub.cut.pop(name, len(content))
        self.wfile.write(content[start:end])
        if end < len(content):
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code, status=404):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass
