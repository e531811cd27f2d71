"""Scorers on the Hugging Face hub: names of repositories, downloads and uploads, by huggingface_hub's own functions.

huggingface_hub is an optional package, which is imported when a repository is used: files of this machine need nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the hub's names for the files of a model
# The files of a scorer in a folder or repository, in the order in which they are looked for. The last is LSRS' own.
SCORER_FILES = ("scorer.safetensors", WEIGHTS, "scoring_model.pth")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether a string can be the name of a repository on the hub: two words around a slash, without a file suffix."""
    return NAME.fullmatch(name) is not None and not name.endswith((".pth", ".pt", ".safetensors"))


def split_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """Split ``user/repo@revision``; a revision is a branch, a tag or a commit, and may contain slashes.

    Raises:
        ValueError: if the revision is empty, or also given by itself.
    """
    name, at, inside = source.partition("@")
    if not at or not is_repository(name):
        return source, revision
    if not inside:
        raise ValueError(f"revision must not be empty, got {source!r}")
    if revision is not None:
        raise ValueError(f"revision must be given once, got {source!r} and revision={revision!r}")
    return name, inside


def locate(source: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """The local file of a scorer, which is downloaded if ``source`` is the name of a repository.

    Args:
        source: a file, a folder, or ``user/repo`` or ``user/repo@revision``. An existing local path has precedence.
        revision: a branch, a tag or a commit of the repository; None: the newest of its main branch.
        options: for ``huggingface_hub.hf_hub_download``, such as ``token``.

    Raises:
        FileNotFoundError: if the path, repository or revision does not exist, or does not hold a scorer.
        ValueError: if a revision is given for a path, or twice.
        OSError: if the hub cannot be reached, or does not give access.
        ImportError: if a repository is named and huggingface_hub is not installed.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision must be None for the local path {path}, got {revision!r}")
        found = [path] if path.is_file() else [path / name for name in SCORER_FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"no scorer at {path}, a folder without {' and without '.join(SCORER_FILES)}")
        return found[0]
    name, revision = split_revision(source if isinstance(source, str) else path.as_posix(), revision)
    if not is_repository(name):
        raise FileNotFoundError(f"no scorer at {path}")
    return download(name, revision, SCORER_FILES, **options)


def download(repository: str, revision: str | None, names: Sequence[str], **options: Any) -> Path:
    """The local copy of the first of ``names`` that a repository holds, downloaded on first use.

    Raises:
        FileNotFoundError, OSError, ImportError: see :func:`locate`.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"{repository} looks like a repository on the hub: to load it, pip install 'varkern[hub]'; else give a path"
        ) from error
    place = f"the hub's repository {repository}" + ("" if revision is None else f" at revision {revision}")
    unreachable: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, **options))
        except errors.LocalEntryNotFoundError as error:  # no answer from the hub, and this file is not on this machine
            unreachable = unreachable or error
            # The client waits about half a minute for a hub that does not answer. It refuses the two options together.
            options.update(local_files_only=True, force_download=False)
        except errors.EntryNotFoundError:
            continue
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(f"no revision {revision} in the hub's repository {repository}") from error
        except errors.GatedRepoError as error:
            raise PermissionError(
                f"{place} gives access on request: ask for it on its page, then run hf auth login or give a token"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"neither a local path {repository} nor such a repository on the hub; for a private one run "
                "hf auth login or give a token"
            ) from error
        except errors.HfHubHTTPError as error:
            raise OSError(f"{place} cannot be read: {first_line(error)}") from error
    if unreachable is not None:
        raise OSError(
            f"{place} cannot be reached, and this machine has no copy: {first_line(unreachable)}"
        ) from unreachable
    raise FileNotFoundError(f"no scorer in {place}: it has no {' and no '.join(names)}")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def upload(save: Callable[[Path], None], repository: str, **options: Any) -> str:
    """Write a folder and upload it by ``huggingface_hub.ModelHubMixin.push_to_hub``, in one commit.

    Args:
        save: writes the files to a folder.
        repository: the name of the repository, which is made if it does not exist.
        options: for the mixin's ``push_to_hub``.

    Returns:
        the address of the commit.

    Raises:
        ImportError: if huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import ModelHubMixin
    except ImportError as error:
        raise ImportError("push_to_hub needs huggingface_hub: pip install 'varkern[hub]'") from error

    class Upload(ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            save(Path(save_directory))

    return str(Upload().push_to_hub(repository, **options))
