"""Hub ids: the folder or the split that comes of one, and what is said where there is none."""

import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import parse_qs, unquote

import pytest
from huggingface_hub import constants

from tests.chats import byte_tokenizer
from tests.small_folder import write_folder
from trainer.config import InputError
from trainer.data import hub
from trainer.data.built_in_templates import BUILT_IN
from trainer.data.chats import ChatData
from trainer.data.sources import DataError, DataSource
from trainer.data.tokenizer import TokenizerChoice
from trainer.generation.pretrained import ChatModel, RewardModel
from trainer.rl.settings import PolicyGradientSettings

COMMIT = "a" * 40
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "pytorch_model.bin": b"pickled"}
SPLITS = {
    "README.md": b"# Chats",
    **{f"{s}.jsonl": json.dumps({"text": f"of {s}"}).encode() for s in ("train", "validation", "test")},
}


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub to download from it."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}

    def do_GET(self, asked: dict[str, list[str]] | None = None) -> None:
        path = unquote(self.path.partition("?")[0])
        if (match := re.fullmatch(r"/api/(\w+/owner/\w+)(/.*)?", path)) and match[1] in self.repos:
            files, what = self.repos[match[1]], match[2] or ""
            entries = [{"type": "file", "path": n, "size": len(b), "oid": n} for n, b in files.items()]
            facts = {"id": match[1].partition("/")[2], "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            wanted = [entry for entry in entries if asked is None or entry["path"] in asked.get("paths", [])]
            body = wanted if what.startswith(("/tree/", "/paths-info/")) else facts
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/(datasets/)?(owner/\w+)/resolve/\w+/(.+)", path):
            files = self.repos.get(f"{match[1] or 'models/'}{match[2]}", {})
            if match[3] in files:
                self.answer(200, files[match[3]], {"ETag": f'"{match[3]}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

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
    monkeypatch.setattr(Hub, "repos", {"models/owner/tiny": FILES, "datasets/owner/chats": SPLITS})
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


@pytest.mark.parametrize("where", ["network", "cache alone", "folder"])
def test_what_neither_exists_nor_comes_from_the_hub_is_refused_in_a_sentence(where, served, monkeypatch):
    if where != "network":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    if where == "cache alone":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if where == "folder":
        (served.folder / "models").mkdir()
    [problem] = TokenizerChoice(path="models/smollm2").problems()
    sentence = "no folder is called models/smollm2, and the Hugging Face hub does not"
    assert f"tokenizer.path=models/smollm2: {sentence}" in problem
    assert any(
        f"pipeline.critic_path=models/smollm2: {sentence}" in p
        for p in PolicyGradientSettings(critic_path="models/smollm2").problems()
    )
    for kind in (ChatModel, RewardModel):
        with pytest.raises(InputError, match=sentence):
            kind.open("models/smollm2")


def test_a_hub_that_does_not_answer_may_do_so_later(served, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for ask in (TokenizerChoice(path="owner/tiny").problems, lambda: ChatModel.open("owner/tiny")):
        with pytest.raises(hub.HubError, match=r"no folder is called owner/tiny, .*the same command goes on"):
            list(ask())
    assert not issubclass(hub.HubError, InputError)  # exit code 1


def test_models_that_verbs_open_and_a_critic_may_be_ids(served):
    template = BUILT_IN["chatml"]
    for name, scores in (("chat", False), ("scorer", True)):
        folder = write_folder(served.folder / "made" / name, scores=scores, template=template)
        Hub.repos[f"models/owner/{name}"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert ChatModel.open("owner/chat").tokenizer.fingerprint == byte_tokenizer(template=template).fingerprint
    assert RewardModel.open("owner/scorer").mean == 0
    critic = PolicyGradientSettings(critic_path="owner/scorer").critic_path
    assert critic is not None
    assert critic.startswith(str(served.folder))


@pytest.fixture(scope="module")
def datasets():
    """Imported before a test names another endpoint, which would stay."""
    return pytest.importorskip("datasets")


@pytest.fixture
def data(datasets, served, monkeypatch):
    """A data set of three splits; gives the documents of a source and what was said of it."""
    endpoint = os.environ["HF_ENDPOINT"]
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", served.folder / "datasets")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )

    def read(path: str, **options) -> tuple[list[str], list[str]]:
        source = DataSource(path, **options)
        assert source.problem() is None
        return list(source.documents()), list(source.notes)

    return read


def test_of_a_data_set_one_split_is_read_or_the_one_that_is_named(data):
    assert data("owner/chats") == (["of train"], ["the splits validation, test of owner/chats are not read"])
    assert data("owner/chats", heldout=True)[0] == ["of validation"]
    assert data("owner/chats:test") == (["of test"], [])
    assert data("owner/chats:default:test", heldout=True)[0] == ["of test"]
    with pytest.raises(DataError, match="owner/chats has no split dev; it has train, validation, test"):
        data("owner/chats:dev")
    with pytest.raises(DataError, match=r"owner/none does not come from the hub .*owner/name:configuration:split"):
        data("owner/none:main:train")


def test_a_data_set_is_asked_of_the_cache_alone_where_there_is_no_network(data, monkeypatch):
    data("owner/chats")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    started = time.monotonic()
    assert data("owner/chats:test")[0] == ["of test"]
    with pytest.raises(hub.HubError, match="owner/none does not come from the hub"):
        data("owner/none")
    assert time.monotonic() - started < 4  # its library would try for half a minute


def test_splits_of_one_data_set_have_names_of_their_own():
    paths = ["owner/chats:test", "owner/chats:validation", "other/chats:main:test", "owner/set-1.5"]
    names = [source.name for source in ChatData(train=[], eval=paths).sources(paths)]
    assert names == ["chats.test", "chats.validation", "chats.main.test", "set-1.5"]
    digests = {DataSource("owner/chats", heldout=heldout).fingerprint() for heldout in (True, False)}
    assert len(digests) == 2
