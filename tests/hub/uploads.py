"""The Hub's HTTP paths by which huggingface_hub uploads without Xet: repositories, LFS objects, and commits.

As in ``hf_api.py`` (``create_repo``), ``_commit_api.py`` (preupload, commit) and ``lfs.py`` (batch, PUT). An object
that any repository has is not asked for again.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import ClassVar

import yaml

from tests.hub.server import LARGE, HttpError, Hub, HubHandler, Repository, blob


class UploadHandler(HubHandler):
    """Also takes uploads of those whose token is among the server's."""

    routes: ClassVar[list[tuple[str, str, str]]] = [
        *HubHandler.routes,
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs-upload/(?P<digest>[0-9a-f]{64})", "put"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit_files"),
    ]

    def do_PUT(self) -> None:  # noqa: N802 - http.server's name
        self._answer("PUT")

    def reply(self, body: bytes, headers: Mapping[str, str] = {}, status: int = 200) -> None:
        """After an error the connection closes: what the client sends with its request may be unread."""
        if status >= 400:
            self.close_connection = True
            headers = {**headers, "Connection": "close"}
        super().reply(body, headers, status)

    def validate_card(self) -> None:
        """A card begins with a YAML object between two lines."""
        try:
            wrong = not isinstance(yaml.safe_load(json.loads(self.body())["content"].split("---\n")[1]), dict)
        except (yaml.YAMLError, IndexError):
            wrong = True
        errors = [{"message": "not YAML"}] if wrong else []
        self.reply(json.dumps({"errors": errors, "warnings": []}).encode(), status=400 if wrong else 200)

    def create(self) -> None:
        asked = json.loads(self.body())
        if self.token not in self.server.tokens:
            raise HttpError(401, message="Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.server.repositories:
            url = f"{self.server.endpoint}/{name}"
            self.reply(
                json.dumps({"error": "You already created this repo", "url": url}).encode(), status=409
            )
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = made = Repository(private=bool(private), readers={self.token})
        made.commit({".gitattributes": b"*.gguf filter=lfs\n"})
        self.reply_json({"url": f"{self.server.endpoint}/{name}", "name": name})

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        files = self.commit(self.repository(name), revision)[1]
        answers = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(each["path"], files[each["path"]]) if each["path"] in files else None,
            }
            for each in asked
        ]
        self.reply_json({"files": answers})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body())["objects"]
        self.repository(name)
        there = objects(self.server)
        answers = []
        for each in asked:
            href = f"{self.server.endpoint}/lfs-upload/{each['oid']}"
            actions = {} if each["oid"] in there else {"actions": {"upload": {"href": href}}}
            answers.append({"oid": each["oid"], "size": each["size"], **actions})
        self.reply_json({"transfer": "basic", "objects": answers})

    def put(self, digest: str) -> None:
        content = self.body()
        if self.server.failures:
            raise HttpError(self.server.failures.pop(0), message="Service Unavailable")
        if hashlib.sha256(content).hexdigest() != digest:
            raise HttpError(400, message="the content is not that of the name")
        stored(self.server)[digest] = content
        self.reply(b"")

    def commit_files(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repository = self.repository(name)
        files = dict(self.commit(repository, revision)[1])
        there = objects(self.server)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = there[value["oid"]]
        sha = repository.commit(files)
        self.reply_json({"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha})


def stored(server: Hub) -> dict[str, bytes]:
    """Objects that were sent, whether or not a commit has them, by SHA-256."""
    return vars(server).setdefault("stored", {})  # type: ignore[no-any-return]


def objects(server: Hub) -> dict[str, bytes]:
    """All objects that need not be sent again."""
    committed = {
        hashlib.sha256(content).hexdigest(): content
        for repository in server.repositories.values()
        for files in repository.commits.values()
        for name, content in files.items()
        if name.endswith(LARGE)
    }
    return committed | stored(server)


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else blob(content)
