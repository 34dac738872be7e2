"""Weights on the hub: a loopback server answers as it does, with hits, hashes and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from small_tasks import task as small_task
from tiny import TinyBackbone, tiny_modalities

from domainssl import export_backbone, export_timm, load_backbone, register_timm
from domainssl.backbones import registry
from domainssl.backbones.croma import PUBLISHED_MODALITIES, CROMABackbone
from domainssl.backbones.hub import HubAddress
from domainssl.backbones.pretrained import Pretrained
from domainssl.backbones.registry import load_initial
from domainssl.backbones.vit import ViTArchitecture, ViTBackbone
from domainssl.errors import MissingExtraError, WeightsError
from domainssl.modality import Modality
from domainssl.tasks.export import export_task, load_task

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {
    "me/gated": (401, "GatedRepo"),
    "me/private": (401, ""),
    "me/forbidden": (403, ""),
    "me/nothing": (404, "RepoNotFound"),
    "me/broken": (501, ""),
}


class Hub:
    """A hub with one repository, `me/tiny`, whose only revisions are `main`, `v1` and COMMIT."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []  # method and file of what was answered with content
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                """Keep the screen quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        repository, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        content, headers = b"", {"X-Repo-Commit": COMMIT}
        status, code = REFUSALS.get(repository, (200, ""))
        if status == 200 and repository != "me/tiny":
            status, code = 404, "RepoNotFound"
        elif status == 200 and revision not in ("main", "v1", COMMIT):
            status, code = 404, "RevisionNotFound"
        elif status == 200 and file not in self.files:
            status, code = 404, "EntryNotFound"
        elif status == 200:
            content = self.files[file]
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            self.asked.append(f"{request.command} {file}")
        request.send_response(status)
        for name, value in {**headers, "X-Error-Code": code}.items():
            if value:
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def backbone() -> TinyBackbone:
    torch.manual_seed(0)
    return TinyBackbone(tiny_modalities()).eval()


@pytest.fixture
def exported(hub: Hub, backbone: TinyBackbone, tmp_path: Path) -> Path:
    """Put an export into the repository's root and its folder `small`, among other files."""
    folder = export_backbone(backbone, tmp_path / "out").parent
    for name in ("backbone.json", "backbone.safetensors"):
        content = (folder / name).read_bytes()
        hub.files |= {name: content, f"small/{name}": content}
    hub.files |= {"README.md": b"text", "optimizer.pt": b"large", "model.safetensors": b"others"}
    return folder


def _equal(a: Any, b: Any) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("hf://me/tiny", ""),
        ("hf://me/tiny@v1", ""),
        (f"hf://me/tiny@{COMMIT}", ""),
        ("hf://me/tiny/small", "small/"),
        ("hf://me/tiny/small/backbone.safetensors@v1", "small/"),
        ("hf://me/tiny/backbone.json", ""),
    ],
)
def test_an_export_is_fetched_and_nothing_else(
    hub: Hub, exported: Path, backbone: TinyBackbone, address: str, folder: str
) -> None:
    assert _equal(load_backbone(address), backbone)
    fetched = {one.partition(" ")[2] for one in hub.asked}
    assert fetched == {f"{folder}backbone.json", f"{folder}backbone.safetensors"}


@pytest.mark.parametrize(
    "address", ["hf://me/tiny", "hf://me/tiny/fine@v1", "hf://me/tiny/fine/task.safetensors@v1"]
)
def test_a_task_is_fetched_with_its_card_and_compared_with_its_hash(
    hub: Hub, tmp_path: Path, address: str
) -> None:
    task = small_task()
    folder = export_task(task, tmp_path / "task").parent
    prefix = "fine/" if "fine" in address else ""
    for name in ("task.json", "task.safetensors"):
        hub.files[prefix + name] = (folder / name).read_bytes()
    digest = hashlib.sha256((folder / "task.safetensors").read_bytes()).hexdigest()
    found = load_task(address, sha256=digest)
    assert _equal(found, task) and found.classes == task.classes
    fetched = {one.partition(" ")[2] for one in hub.asked}
    assert fetched == {f"{prefix}task.json", f"{prefix}task.safetensors"}
    with pytest.raises(WeightsError, match="the file has sha256"):
        load_task(address, sha256="0" * 64)
    with pytest.raises(WeightsError, match="the file has sha256"):
        load_task(folder, sha256="0" * 64)


def test_a_task_that_is_not_there_names_its_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match="An exported task is the pair task.json"):
        load_task("hf://me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="is not in the cache.*load_task"):
        load_task("hf://me/tiny/fine")


def test_the_cache_serves_offline(
    hub: Hub, exported: Path, backbone: TinyBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backbone("hf://me/tiny@v1")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _equal(load_backbone("hf://me/tiny@v1"), backbone)
    assert hub.asked == []


def test_offline_and_not_cached_names_the_local_alternative(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = r"HF_HUB_OFFLINE is set, and 'backbone.safetensors' is not in the cache .*copy the file"
    with pytest.raises(WeightsError, match=text):
        load_backbone("hf://me/tiny")


def test_without_connection_the_message_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    error = huggingface_hub.errors.LocalEntryNotFoundError("long text")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _raising(error))
    with pytest.raises(WeightsError, match=f"no connection to {hub.url}, and 'backbone.safete"):
        load_backbone("hf://me/tiny")


def test_a_full_disk_names_the_folder_of_the_cache(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _raising(error))
    with pytest.raises(WeightsError, match="No space left.*Make room in .*, or set HF_HUB_CACHE"):
        load_backbone("hf://me/tiny")


def _raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("hf://me/gated", "is gated. Accept its terms at http.*/me/gated, then log in"),
        ("hf://me/private", r"does not exist, or is private or gated \(401\).*HF_TOKEN"),
        ("hf://me/forbidden", r"forbidden \(403\). Ask the owner for access"),
        ("hf://me/nothing", r"no such repository \(404\). Check owner and name"),
        ("hf://me/tiny@v9", r"no revision 'v9' \(404\).*/commits/main"),
        ("hf://me/tiny/other", r"no file 'other/backbone.safetensors' \(404\).*/tree/main"),
        ("hf://me/tiny/model.safetensors", r"no file 'model.json' \(404\).*name of their arch"),
        ("hf://me/broken", "answers 501, and 'backbone.safetensors' is not in the cache"),
        ("hf://me/tiny/optimizer.pt", "no export or checkpoint.*load_backbone.NAME, weights='hf"),
        ("hf://me", "no address of the hub; expected hf://owner"),
        ("hf://me/tiny/../x.pt", "no address of the hub"),
        ("hf://me/tiny@", "no address of the hub"),
        ("hf://me/tiny@v1/a/b.pt", "stands at the end. Write hf://me/tiny/a/b.pt@v1"),
    ],
)
def test_every_refusal_says_what_to_do(hub: Hub, exported: Path, address: str, text: str) -> None:
    with pytest.raises(WeightsError, match=text) as caught:
        load_backbone(address)
    assert "\n" not in str(caught.value)


def test_another_hash_is_refused_before_anything_is_parsed(hub: Hub, exported: Path) -> None:
    right = hashlib.sha256(hub.files["backbone.safetensors"]).hexdigest()
    load_backbone("hf://me/tiny", sha256=right.upper())
    load_backbone(exported, sha256=right)
    hub.files |= {"backbone.json": b"no json", "backbone.safetensors": b"no tensors"}
    for source in ("hf://me/tiny", exported):
        with pytest.raises(WeightsError, match="nothing of it was read") as caught:
            load_backbone(source, sha256="0" * 64)
        assert "0" * 64 in str(caught.value)
    with pytest.raises(WeightsError, match="64 hexadecimal digits"):
        load_backbone("hf://me/tiny", sha256=right[:16])


@pytest.fixture
def published(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Pretrained:
    """Record a file that unpickles a function when it is read carelessly."""
    path = Path(constants.HF_HUB_CACHE).parent / "CROMA_base.pt"
    torch.save({"s1_encoder": os.getcwd}, path)
    hub.files["weights/CROMA_base.pt"] = path.read_bytes()
    row = Pretrained(
        tag="croma_base.recorded",
        method="CROMA",
        repository="me/tiny",
        file="weights/CROMA_base.pt",
        revision="v1",
        sha256="f" * 64,
    )
    monkeypatch.setitem(registry.PRETRAINED, row.tag, row)
    return row


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("hf://me/tiny/weights/CROMA_base.pt", None),
        ("croma_base.recorded", "hf://me/tiny/weights/CROMA_base.pt"),
    ],
)
def test_the_hash_of_the_record_is_compared(
    hub: Hub, published: Pretrained, source: str, weights: str | None
) -> None:
    with pytest.raises(WeightsError, match="the record of 'croma_base.recorded'"):
        load_backbone(source, weights=weights)
    assert {one.partition(" ")[2] for one in hub.asked} == {"weights/CROMA_base.pt"}


def test_the_hash_of_the_record_counts_for_local_files(
    published: Pretrained, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="the record of 'croma_base.recorded'"):
        load_backbone(published.tag, weights=tmp_path / "CROMA_base.pt")


def test_files_from_the_hub_are_never_unpickled(hub: Hub, published: Pretrained) -> None:
    with pytest.raises(WeightsError, match="pickled objects besides tensors and is refused"):
        load_backbone("croma_base", weights="hf://me/tiny/weights/CROMA_base.pt@v1")


def test_weights_are_not_fetched_for_what_cannot_take_them(hub: Hub, exported: Path) -> None:
    for source, text in (
        ("no_such_backbone", "neither a file or folder nor the name"),
        (exported, "brings its own weights"),
        ("hf://me/tiny", "brings its own weights"),
    ):
        with pytest.raises(WeightsError, match=text):
            load_backbone(source, weights="hf://me/tiny/optimizer.pt")
    with pytest.raises(WeightsError, match="names no file"):
        load_backbone("croma_base", weights="hf://me/tiny/weights")
    with pytest.raises(WeightsError, match="leave out sha256"):
        load_backbone("croma_base", weights="random", sha256="0" * 64)
    assert hub.asked == []


def test_training_starts_from_an_export_on_the_hub(
    hub: Hub, exported: Path, backbone: TinyBackbone
) -> None:
    loaded, content = load_initial(
        TinyBackbone, "hf://me/tiny@v1", None, modalities=tiny_modalities(), arguments={}
    )
    assert _equal(loaded, backbone)
    assert content == {}
    assert loaded.training


def test_from_pretrained_takes_a_repository_or_a_folder(
    hub: Hub, exported: Path, backbone: TinyBackbone
) -> None:
    assert _equal(TinyBackbone.from_pretrained("me/tiny", revision="v1"), backbone)
    assert _equal(TinyBackbone.from_pretrained(exported), backbone)
    with pytest.raises(WeightsError, match="no revision 'v9'"):
        TinyBackbone.from_pretrained("me/tiny", revision="v9")
    with pytest.raises(WeightsError, match="holds a TinyBackbone, expected a CROMABackbone"):
        CROMABackbone.from_pretrained("me/tiny")
    with pytest.raises(WeightsError, match="revision='v1' is for an address"):
        TinyBackbone.from_pretrained(exported, revision="v1")
    with pytest.raises(TypeError, match="forse_download"):
        TinyBackbone.from_pretrained("me/tiny", forse_download=True)


def test_what_is_pushed_loads_again(
    hub: Hub, backbone: TinyBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload itself is huggingface_hub's; what it is given is put into the repository."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: object = None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append(("create_repo", options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, folder_path: str, **options: Any) -> Any:
            calls.append(("upload_folder", options))
            for path in Path(folder_path).iterdir():
                assert path.name in options["allow_patterns"]
                hub.files[path.name] = path.read_bytes()
            return SimpleNamespace(oid=COMMIT)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = backbone.push_to_hub("tiny", licence="CC-BY-4.0", private=True, token="hf_x")
    assert address == f"hf://me/tiny@{COMMIT}"
    assert sorted(hub.files) == ["README.md", "backbone.json", "backbone.safetensors"]
    assert _equal(load_backbone(address), backbone)
    readme = hub.files["README.md"].decode()
    assert readme.startswith("---\n")
    assert "license: cc-by-4.0\n" in readme
    assert "| s2 | image | B02 B03 B04 | arbitrary | zscore |" in readme
    assert 'load_backbone("hf://me/tiny")' in readme
    assert json.loads(hub.files["backbone.json"])["sha256"] in readme
    assert calls[0] == ("token", {"token": "hf_x"})
    assert calls[1] == ("create_repo", {"private": True, "exist_ok": True})
    assert calls[2][1]["repo_id"] == "me/tiny"


def test_a_push_without_permission_says_what_to_do(hub: Hub, backbone: TinyBackbone) -> None:
    text = "hf://me/tiny: access is forbidden.*token that may write to it"
    with pytest.raises(WeightsError, match=text) as caught:
        backbone.push_to_hub("me/tiny", token="hf_x")
    assert "hf_x" not in str(caught.value)


def test_save_pretrained_writes_an_export(backbone: TinyBackbone, tmp_path: Path) -> None:
    card = backbone.save_pretrained(tmp_path / "out", licence="MIT")
    assert json.loads(card.read_text())["licence"] == "MIT"
    assert _equal(load_backbone(tmp_path / "out"), backbone)


def test_the_extra_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"domainssl\[hub\]"):
        load_backbone("hf://me/tiny")


@pytest.mark.parametrize(
    ("text", "repository", "path", "revision"),
    [
        ("hf://a/b", "a/b", "", None),
        ("hf://a/b@refs/pr/1", "a/b", "", "refs/pr/1"),
        ("hf://a/b/c/d.pt@v1", "a/b", "c/d.pt", "v1"),
    ],
)
def test_addresses_are_taken_apart(
    text: str, repository: str, path: str, revision: str | None
) -> None:
    address = HubAddress.parse(text)
    assert address == HubAddress(repository, path, revision)
    assert str(address) == text


OTHER_PROCESS = """
from domainssl import load_backbone
from domainssl.errors import WeightsError
try:
    print(type(load_backbone("hf://me/tiny/croma")).__name__)
except WeightsError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_environment_of_huggingface_hub_counts(hub: Hub, tmp_path: Path) -> None:
    backbone = CROMABackbone(dict(PUBLISHED_MODALITIES), width=32, depth=2, heads=4)
    folder = export_backbone(backbone, tmp_path / "out").parent
    for name in ("backbone.json", "backbone.safetensors"):
        hub.files[f"croma/{name}"] = (folder / name).read_bytes()
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for more, words in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({}, "CROMABackbone"),
        ({"HF_HUB_OFFLINE": "1"}, "CROMABackbone"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS],
            capture_output=True, text=True, timeout=600, env={**os.environ, **told, **more},
        )  # fmt: skip
        assert words in done.stdout, done.stderr[-2000:]


def test_timm_finds_an_export_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    rgb = Modality(name="rgb", kind="image", channels=("r", "g", "b"), value_unit="rgb8")
    sizes = ViTArchitecture(width=12, depth=1, heads=2)
    backbone = ViTBackbone({"rgb": rgb}, sizes, 4, normalization="scale(255)").eval()
    export_timm(backbone, tmp_path / "out")
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    register_timm()
    model = timm.create_model("hf-hub:me/tiny@v1", pretrained=True).eval()
    x = 255 * torch.rand(1, 3, 8, 8)
    assert torch.equal(model(x), backbone({"rgb": x}).pooled["rgb"])
