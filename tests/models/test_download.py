# SPDX-License-Identifier: Apache-2.0
"""Downloads, against a small server that answers as the hub does; in a process of its own, which is not offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = """
import json, sys
from calib.errors import CalibError
from calib.models import open_model
for reference, revision in json.loads(sys.argv[1]):
    try:
        opened = open_model(reference, revision=revision, device="cpu")
        print(opened.provenance.revision, opened.task, opened.provenance.architecture, sorted(
            path.name for path in opened.folder.iterdir()))
    except CalibError as error:
        print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """One public model `acme/tiny`, a gated one, and one whose files cannot be had."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if "acme/secret" in path:
            self.answer(403, error="GatedRepo")
        elif path.startswith("/acme/broken/resolve/"):
            self.answer(200 if self.command == "HEAD" else 400, b"x", etag="x")
        elif re.fullmatch(rf"/api/models/acme/(tiny|broken)(/revision/(main|{COMMIT}))?", path):
            self.answer(200, json.dumps(self.repository()).encode())
        elif path.startswith("/api/models/acme/tiny/revision/"):
            self.answer(404, error="RevisionNotFound")
        elif re.match("/api/models/acme/(tiny|broken)/tree/", path):
            self.answer(200, json.dumps(self.tree()).encode())
        elif path.startswith(f"/acme/tiny/resolve/{COMMIT}/") and (self.folder / path.rpartition("/")[2]).is_file():
            self.answer(200, (self.folder / path.rpartition("/")[2]).read_bytes(), etag=path.rpartition("/")[2])
        else:
            self.answer(404, error="RepoNotFound")

    def repository(self) -> dict[str, object]:
        files = [{"rfilename": entry["path"]} for entry in self.tree()]
        return {
            "_id": "1",
            "id": "acme/tiny",
            "sha": COMMIT,
            "pipeline_tag": "fill-mask",
            "library_name": "transformers",
            "tags": ["transformers"],
            "siblings": files,
        }

    def tree(self) -> list[dict[str, object]]:
        names = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        extra = {"onnx/config.json": 2, "flax_model.msgpack": 10**9, "modeling_tiny.py": 5}
        return [{"type": "file", "path": n, "size": s, "oid": n} for n, s in (names | extra).items()]

    def answer(self, status: int, body: bytes = b"", *, etag: str = "", error: str = "") -> None:
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tiny_llama: Path) -> Iterator[str]:
    Hub.folder = tiny_llama
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_is_downloaded_or_refused_with_the_reason(hub: str, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    cases = [
        ("acme/tiny", None),
        ("acme/tiny", COMMIT),
        ("acme/tiny", "v2"),
        ("acme/secret", None),
        ("acme/absent", None),
        ("acme/broken", None),
    ]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(cases)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    first, same, revision, gated, absent, broken = done.stdout.splitlines()
    # The tag of the hub says fill-mask, for which llama has no class: the architecture decides. No foreign file came.
    files = "['chat_template.jinja', 'config.json', 'generation_config.json', 'model.safetensors', "
    assert first == f"{COMMIT} text-generation LlamaForCausalLM {files}'tokenizer.json', 'tokenizer_config.json']"
    assert same == first
    assert revision == "ModelError model acme/tiny: the hub has no revision 'v2'; check --revision"
    assert gated.startswith("ModelError model acme/secret: the hub asks for a login or a licence click")
    assert absent.startswith("ModelError model acme/absent: neither a local path nor a model of the hub")
    assert broken.startswith("ModelError model acme/broken: the download failed")
