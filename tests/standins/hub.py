"""A hub that is a folder of this machine: huggingface_hub's client without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

errors = pytest.importorskip("huggingface_hub.errors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def failure(kind: type[Exception], message: str) -> Exception:
    """An error of the client, which takes a response of the server to make."""
    return type(kind.__name__, (kind,), {"__init__": lambda self: Exception.__init__(self, message)})()


class Hub:
    """Repositories as folders ``root/user/repo/revision``, and what was asked of them."""

    def __init__(self, root: Path):
        self.root, self.asked, self.uploads = root, [], []
        self.waits = 0  # requests that got no answer, for each of which the client waits long
        self.reachable, self.gated = True, set()

    def folder(self, repository: str, revision: str | None = None) -> Path:
        """The files of a repository at a revision, whose folder is made if there is none."""
        folder = self.root / repository / (revision or "main").replace("/", "%")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Hub:
        """Put this hub in the place of the client's functions."""
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", self.api)
        return self

    def hf_hub_download(
        self, repo_id, filename, *, revision=None, token=None, local_files_only=False, **options
    ) -> str:
        self.asked.append((repo_id, filename, revision))
        assert set(options) <= {"cache_dir", "force_download"}
        assert not (local_files_only and options.get("force_download")), "the client refuses the two together"
        self.waits += not self.reachable and not local_files_only
        if not self.reachable or local_files_only:
            raise failure(errors.LocalEntryNotFoundError, "cannot find the file on disk\nand the hub is not asked")
        if repo_id in self.gated and token is None:
            raise failure(errors.GatedRepoError, "403 Client Error")
        if not (self.root / repo_id).is_dir():
            raise failure(errors.RepositoryNotFoundError, "404 Client Error. (Request ID: x)\n\nRepository Not Found")
        folder = self.root / repo_id / (revision or "main").replace("/", "%")
        if not folder.is_dir():
            raise failure(errors.RevisionNotFoundError, "404 Client Error")
        if not (folder / filename).is_file():
            raise failure(errors.EntryNotFoundError, "404 Client Error")
        return str(folder / filename)

    def api(self, token=None) -> Api:
        return Api(self, token)


class Api:
    """The two functions of ``HfApi`` that the mixin calls."""

    def __init__(self, hub: Hub, token: str | None):
        self.hub, self.token = hub, token

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.hub.folder(repo_id)
        return SimpleNamespace(repo_id=repo_id, private=private)

    def upload_folder(self, *, repo_id, folder_path, revision=None, repo_type=None, **options) -> str:
        assert repo_type in (None, "model")
        shutil.copytree(folder_path, self.hub.folder(repo_id, revision), dirs_exist_ok=True)
        self.hub.uploads.append({"repo_id": repo_id, "revision": revision, "token": self.token, **options})
        return f"https://huggingface.co/{repo_id}/commit/{COMMIT}"
