"""Hub ids: the folder that comes of one, and what is said where there is none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from trainer.data import hub
from trainer.data.tokenizer import TokenizerChoice

COMMIT = "a" * 40
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "pytorch_model.bin": b"pickled"}


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub to download the model owner/tiny."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.path.startswith("/api/models/owner/tiny/"):
            siblings = [{"rfilename": file} for file in FILES]
            entries = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in FILES.items()]
            body = json.dumps(
                entries if "/tree/" in self.path else {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            )
            self.answer(200, body.encode(), {"Content-Type": "application/json"})
        elif self.path.startswith("/owner/tiny/resolve/") and name in FILES:
            self.answer(200, FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub.fetched.cache_clear()
    yield SimpleNamespace(folder=tmp_path)
    hub.fetched.cache_clear()
    server.shutdown()
    server.server_close()


def test_an_id_is_the_folder_that_it_is_downloaded_to_and_pickles_stay_behind(served):
    choice = TokenizerChoice(path="owner/tiny")
    names = {file.name for file in served.folder.rglob("snapshots/*/*")}
    assert names == {"config.json", "tokenizer.json"}
    assert choice.path is not None
    assert choice.path.startswith(str(served.folder))


def test_a_folder_of_that_name_is_meant_first(served):
    (served.folder / "owner" / "tiny").mkdir(parents=True)
    assert hub.folder_of("owner/tiny") == "owner/tiny"
    assert hub.folder_of("runs/a/export") == "runs/a/export"


@pytest.mark.parametrize("network", [True, False])
def test_what_neither_exists_nor_comes_from_the_hub_is_refused_in_a_sentence(network, served, monkeypatch):
    if not network:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    [problem] = TokenizerChoice(path="models/smollm2").problems()
    assert (
        "tokenizer.path=models/smollm2: no folder is called models/smollm2, and the Hugging Face hub does not"
        in problem
    )
