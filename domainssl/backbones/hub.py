"""Weights on the Hugging Face Hub: `hf://` addresses, what is fetched, and what is uploaded.

Only the files that an address names are fetched, into the cache of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast

from domainssl.backbones.base import Backbone
from domainssl.backbones.card import CARD_NAME, TENSORS_NAME, Card, export_backbone, read_card
from domainssl.errors import WeightsError, require
from domainssl.files import open_regular

__all__ = ["HubAddress", "check_sha256", "fetch_weights", "push_backbone"]

_PREFIX = "hf://"
_ENDINGS = (".safetensors", ".json", ".ckpt", ".pt", ".pth", ".bin", ".tar")
# names of licences that the hub knows as they are; others are `other` with their name
_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0",
}  # fmt: skip
_FORM = "hf://owner/repository[/path/file][@revision]"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may"


@dataclass(frozen=True)
class HubAddress:
    """One place on the hub.

    Attributes:
        repository: `owner/name`.
        path: File or folder in it; empty for its root.
        revision: Branch, tag or commit; None is the default branch.
    """

    repository: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        place = "/".join(filter(None, (self.repository, self.path)))
        return f"{_PREFIX}{place}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_file(self) -> bool:
        """Whether it names a file, by its ending, and no folder of an export."""
        return self.path.endswith(_ENDINGS)

    @property
    def is_export(self) -> bool:
        """Whether it names an export of this library: a folder, or one of the two files."""
        return not self.is_file or PurePosixPath(self.path).name in (CARD_NAME, TENSORS_NAME)

    @staticmethod
    def matches(text: object) -> bool:
        """Whether a text is meant as an address."""
        return str(text).startswith(_PREFIX)

    @classmethod
    def parse(cls, text: object) -> Self:
        """Take `hf://owner/repository/path/file@revision` apart.

        Raises:
            WeightsError: It is not of this form.
        """
        place, at, revision = str(text).removeprefix(_PREFIX).partition("@")
        parts = place.split("/")
        if at and len(parts) == 2 and "/" in revision and revision.endswith(_ENDINGS):
            first, _, rest = revision.partition("/")
            raise WeightsError(
                f"{str(text)!r}: the revision stands at the end. Write "
                f"{_PREFIX}{place}/{rest}@{first}."
            )
        is_bad = len(parts) < 2 or any(part in ("", ".", "..") for part in parts)
        if is_bad or (at and not revision):
            raise WeightsError(f"{str(text)!r} is no address of the hub; expected {_FORM}.")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def fetch_weights(
    address: HubAddress, *, with_card: bool, tensors_name: str = TENSORS_NAME
) -> Path:
    """Return the local path of weights on the hub, fetched unless the cache has them.

    Args:
        address: File, or folder of an export.
        with_card: Whether it is an export, so that the card beside the tensors is fetched too, of
            the same commit.
        tensors_name: File of the tensors in the folder of such an export.

    Raises:
        WeightsError: There is no such repository, revision or file, it may not be read, or there
            is no connection and the cache does not have it.
        MissingExtraError: huggingface_hub is not installed.
    """
    if not with_card:
        return _download(address)
    tensors = address.path
    if not address.is_file:
        tensors = "/".join(filter(None, (address.path, tensors_name)))
    elif not tensors.endswith((".safetensors", ".json")):
        return _download(address)
    tensors = str(PurePosixPath(tensors).with_suffix(".safetensors"))
    local = _download(HubAddress(address.repository, tensors, address.revision))
    commit = local.parents[tensors.count("/")].name  # snapshots/<commit>/<path>
    card = str(PurePosixPath(tensors).with_suffix(".json"))
    return _download(HubAddress(address.repository, card, commit), asked=address)


def _download(address: HubAddress, asked: HubAddress | None = None) -> Path:
    hub = require("huggingface_hub", "hub")
    with _answering(asked or address, address.path):
        return Path(
            hub.hf_hub_download(address.repository, address.path, revision=address.revision)
        )


def check_sha256(path: Path, expected: str, source: object, said_by: str) -> None:
    """Compare the hash of a file before anything in it is parsed.

    Args:
        path: The file on this machine.
        expected: SHA-256 in hexadecimal digits.
        source: Where it comes from, for the message.
        said_by: Where the expected hash stands.

    Raises:
        WeightsError: They differ, the file is missing, or `expected` is no SHA-256.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", expected):
        raise WeightsError(
            f"{said_by}: {expected!r} is no SHA-256; expected 64 hexadecimal digits, as "
            "`sha256sum FILE` prints them."
        )
    try:
        with open_regular(path) as file:
            found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); check the path.") from error
    if found != expected.lower():
        raise WeightsError(
            f"{source}: the file has sha256 {found}, expected {expected.lower()} ({said_by}). It "
            "is another file or damaged, and nothing of it was read. Check revision and hash at "
            f"its publisher; to fetch it again, delete {path.resolve()}."
        )


@contextmanager
def _answering(address: HubAddress, file: str = "", *, wanted: str = "read it") -> Iterator[None]:
    """Turn what huggingface_hub raises into one message that says what to do."""
    errors = require("huggingface_hub.errors", "hub")
    transport = errors.HfHubHTTPError.__bases__  # HTTPError of httpx or requests, and OSError
    try:
        yield
    except (errors.HFValidationError, *transport, OSError) as error:
        raise WeightsError(f"{address}: {_reason(error, address, file, wanted)}") from error


def _reason(error: Exception, address: HubAddress, file: str, wanted: str) -> str:
    errors = require("huggingface_hub.errors", "hub")
    page = f"{require('huggingface_hub.constants', 'hub').ENDPOINT}/{address.repository}"
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated. Accept its terms at {page}, then {_LOGIN} {wanted}."
    if status == 401:
        return (
            "the repository does not exist, or is private or gated (401). Check the name at "
            f"{page}; for a private or gated one {_LOGIN} {wanted}."
        )
    if status == 403:
        return (
            f"access is forbidden (403). Ask the owner for access at {page}, then {_LOGIN} "
            f"{wanted}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository (404). Check owner and name at {page}."
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"the repository has no revision {address.revision!r} (404). Its branches, tags and "
            f"commits are listed at {page}/commits/main; without @… the default branch is taken."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _offline(error, status, file)
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"there is no file {file!r} (404). The files are listed at "
            f"{page}/tree/{address.revision or 'main'}. {_pair(file)}"
        )
    if isinstance(error, OSError) and error.errno is not None:
        cache = require("huggingface_hub.constants", "hub").HF_HUB_CACHE
        return (
            f"the file cannot be kept ({error}). Make room in {cache}, or set HF_HUB_CACHE to "
            "another folder."
        )
    words = " ".join(str(error).split())[:300]
    return f"the hub cannot be used ({type(error).__name__}: {words}). Try again later."


def _pair(file: str) -> str:
    """Return what an export consists of: of a task, where one was asked for, or of a backbone."""
    if PurePosixPath(file).stem == "task":
        return "An exported task is the pair task.json and task.safetensors."
    return (
        f"An export is the pair {CARD_NAME} and {TENSORS_NAME}; weights of others need the name of "
        "their architecture, load_backbone(NAME, weights='hf://…/FILE')."
    )


def _status(error: BaseException) -> int | None:
    """Return the status that the server answered, also where the library wrapped the error."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _offline(error: Exception, status: int | None, file: str) -> str:
    errors = require("huggingface_hub.errors", "hub")
    constants = require("huggingface_hub.constants", "hub")
    if constants.HF_HUB_OFFLINE:
        reason, remedy = "HF_HUB_OFFLINE is set", "Unset it where there is a connection"
    elif status is not None:
        reason, remedy = f"{constants.ENDPOINT} answers {status}", "Try again later"
    elif isinstance(error.__cause__, errors.FileMetadataError):
        reason = f"{constants.ENDPOINT} does not answer like the hub"
        remedy = "Check HF_ENDPOINT and the proxy"
    else:
        reason, remedy = f"no connection to {constants.ENDPOINT}", "Check the connection"
    if not file:
        return f"{reason}. {remedy}; save_pretrained(FOLDER) writes the same files here."
    call = "load_backbone(FOLDER_OF_AN_EXPORT), or load_backbone(NAME, weights=FILE)"
    if PurePosixPath(file).stem == "task":
        call = "load_task(FOLDER_OF_AN_EXPORT)"
    return (
        f"{reason}, and {file!r} is not in the cache ({constants.HF_HUB_CACHE}). {remedy}, copy "
        "that cache from a machine that has the file, or copy the file here and pass its path: "
        f"{call}."
    )


def push_backbone(
    backbone: Backbone,
    repo_id: str,
    *,
    licence: str = "unspecified",
    provenance: Mapping[str, Any] | None = None,
    commit_message: str = "Upload a domainssl backbone",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload an export and a model card, `README.md`; see `Backbone.push_to_hub`.

    Raises:
        WeightsError: The hub refuses it, or there is no connection.
        MissingExtraError: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", "hub")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="domainssl-push-") as folder:
        export_backbone(backbone, folder, licence=licence, provenance=provenance)
        card, _ = read_card(Path(folder))
        with _answering(HubAddress(repo_id, "", revision), wanted="write to it"):
            repo_id = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
            text = _model_card(card, repo_id)
            Path(folder, "README.md").write_text(text, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=[CARD_NAME, TENSORS_NAME, "README.md"],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
    return str(HubAddress(repo_id, "", str(commit.oid)))


def _model_card(card: Card, repo_id: str) -> str:
    """Return the README of a repository: front matter of the hub, inputs, and how to load it."""
    hub = require("huggingface_hub", "hub")
    licence = card.licence.lower()
    facts: dict[str, Any] = {"library_name": "domainssl", "tags": ["self-supervised-learning"]}
    if licence in _LICENCES:
        facts["license"] = licence
    elif licence != "unspecified":
        facts |= {"license": "other", "license_name": licence}
    lines = [
        "---", hub.ModelCardData(**facts).to_yaml(), "---", "", f"# {repo_id}", "",
        f"A `{card.name.rpartition('.')[2]}` of domainssl. It takes raw physical values and "
        "normalises them itself.", "",
        "| modality | kind | bands, in order | unit | normalisation |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, modality in card.modalities.items():
        bands = " ".join(modality["channels"])
        form = card.normalization.get(name, "")
        lines += [f"| {name} | {modality['kind']} | {bands} | {modality['value_unit']} | {form} |"]
    widths = ", ".join(f"{name} {width}" for name, width in card.embed_dim.items())
    lines += [
        "", f"Width of the features: {widths}. Licence of the weights: {card.licence}. SHA-256 of "
        f"`{TENSORS_NAME}`: `{card.sha256}`.", "",
        "```python", "from domainssl import load_backbone", "",
        f'backbone = load_backbone("{_PREFIX}{repo_id}")', "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
