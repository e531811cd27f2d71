"""The description of a token-map dataset: ``manifest.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varkern.spec import is_int

FORMAT, VERSION = "varkern token maps", 2
FILE = "manifest.json"
LARGEST_VOCABULARY = 2**16  # a token id is a uint16


@dataclass(frozen=True)
class Shard:
    """One file of a dataset.

    Args:
        file: its name.
        count: images in the shard.
        sha256: its checksum.
        skipped: names of images that could not be read; ``count`` does not include them.
    """

    file: str
    count: int
    sha256: str
    skipped: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Any) -> Shard:
        """Make a shard from its JSON form; raises ``ValueError`` if ``value`` does not describe a shard."""
        try:
            shard = cls(**{**value, "skipped": tuple(value["skipped"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"a shard's description is wrong: {error}") from error
        texts = (shard.file, shard.sha256, *shard.skipped)
        if not all(isinstance(text, str) for text in texts) or not is_int(shard.count) or shard.count < 0:
            raise ValueError(f"a shard's description is wrong: {value}")
        if shard.file != Path(shard.file).name:
            raise ValueError(f"a shard's file must be in the manifest's folder, got {shard.file}")
        return shard


@dataclass(frozen=True)
class Manifest:
    """The settings of a dataset, which determine its content byte for byte, and its files.

    Args:
        patch_nums: the side of each scale's token map.
        vocabulary: V, the number of codes, at most 65,536.
        num_classes: number of classes; labels are in 0..num_classes-1.
        total: images to make, including images that turn out to be unreadable.
        source: where the images come from, as JSON values by name: checksums of checkpoints, settings, seeds.
        batch_size: images per batch; each batch lies within one shard.
        shard_size: images per shard.
        shards: the files; None while the dataset is unfinished.

    Raises:
        ValueError: if a value is wrong.
    """

    patch_nums: tuple[int, ...]
    vocabulary: int
    num_classes: int
    total: int
    source: Mapping[str, Any]
    batch_size: int = 64
    shard_size: int = 4096
    shards: tuple[Shard, ...] | None = None

    def __post_init__(self):
        sides = self.patch_nums
        if not isinstance(sides, list | tuple) or not sides or not all(is_int(s) and s >= 1 for s in sides):
            raise ValueError(f"patch_nums must be sides >= 1, one per scale, got {sides!r}")
        for name in ("vocabulary", "num_classes", "total", "batch_size", "shard_size"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.vocabulary > LARGEST_VOCABULARY:
            raise ValueError(
                f"vocabulary must be at most {LARGEST_VOCABULARY}, because token ids are stored as uint16, "
                f"got {self.vocabulary}"
            )
        if not isinstance(self.source, Mapping):
            raise ValueError(f"source must be a mapping of names to JSON values, got {self.source!r}")
        object.__setattr__(self, "patch_nums", tuple(int(side) for side in sides))
        try:  # in the form in which it is read back, which makes a manifest equal to its file
            object.__setattr__(self, "source", json.loads(json.dumps(self.source)))
        except TypeError as error:
            raise ValueError(f"source must hold JSON values: {error}") from error

    @property
    def lengths(self) -> list[int]:
        """Tokens per scale."""
        return [side * side for side in self.patch_nums]

    @property
    def length(self) -> int:
        """L, tokens per image."""
        return sum(self.lengths)

    @property
    def count(self) -> int:
        """Images in a finished dataset."""
        return sum(shard.count for shard in self.shards or ())

    @property
    def skipped(self) -> list[str]:
        """Names of images that could not be read."""
        return [name for shard in self.shards or () for name in shard.skipped]

    @property
    def num_shards(self) -> int:
        return -(-self.total // self.shard_size)

    def batches(self, shard: int) -> list[range]:
        """The batches of one shard, as ranges of image numbers."""
        stop = min((shard + 1) * self.shard_size, self.total)
        return [
            range(start, min(start + self.batch_size, stop))
            for start in range(shard * self.shard_size, stop, self.batch_size)
        ]

    def settings(self) -> dict[str, Any]:
        """All fields except the shards, as JSON values. Two runs that make one dataset must have equal settings."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "shards"}
        return {"format": FORMAT, "version": VERSION, **values, "patch_nums": list(self.patch_nums)}

    def to_json(self) -> str:
        shards = self.shards if self.shards is None else [dataclasses.asdict(shard) for shard in self.shards]
        return json.dumps({**self.settings(), "shards": shards}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of a dataset, finished or not.

        Raises:
            FileNotFoundError: if ``folder`` has no manifest.
            ValueError: if the manifest is not readable, has another format version, or holds impossible values.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a token-map dataset: it has no {FILE}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{path} is not the manifest of a token-map dataset")
        if values.get("version") != VERSION:
            raise ValueError(f"{path} must have format version {VERSION}, got {values.get('version')!r}")
        try:
            fields = {name: value for name, value in values.items() if name not in ("format", "version", "shards")}
            shards = values["shards"]
            return cls(**fields, shards=None if shards is None else tuple(map(Shard.from_json, shards)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a usable manifest: {error}") from error


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The checksum of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
