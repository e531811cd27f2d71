"""What a token-map dataset says of itself: ``manifest.json``."""

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

FORMAT, VERSION = "varkern token maps", 1
FILE = "manifest.json"
LARGEST_VOCABULARY = 2**16  # a token id is a uint16
CHUNK = 2**22  # bytes hashed at a time


@dataclass(frozen=True)
class Shard:
    """Two files of a dataset: token ids ``[count, L]`` and labels ``[count]``.

    Args:
        tokens, labels: their names.
        count: images in them.
        tokens_sha256, labels_sha256: checksums of the whole files.
        skipped: what could not be read, by name; these are not counted.
    """

    tokens: str
    labels: str
    count: int
    tokens_sha256: str
    labels_sha256: str
    skipped: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Any) -> Shard:
        """Raises ``ValueError`` if ``value`` is no shard's description."""
        try:
            shard = cls(**{**value, "skipped": tuple(value["skipped"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"a shard's description is wrong: {error}") from error
        texts = (shard.tokens, shard.labels, shard.tokens_sha256, shard.labels_sha256, *shard.skipped)
        if not all(isinstance(text, str) for text in texts) or not is_int(shard.count) or shard.count < 0:
            raise ValueError(f"a shard's description is wrong: {value}")
        if any(name != Path(name).name for name in (shard.tokens, shard.labels)):
            raise ValueError(f"a shard's files must stand beside the manifest, got {shard.tokens}, {shard.labels}")
        return shard


@dataclass(frozen=True)
class Manifest:
    """How a dataset is made, which says what is in it, byte for byte.

    Args:
        patch_nums: the side of each scale's token map.
        vocabulary: V, the number of codes, at most 65,536.
        num_classes: labels are 0..num_classes-1.
        total: images to make; some may turn out unreadable, see ``count``.
        source: JSON values by name: where the images come from, checkpoints' checksums, settings, seeds.
        batch_size: images made together; no batch crosses shards.
        shard_size: images a shard.
        shards: the files; None while the dataset is unfinished.

    Raises:
        ValueError: naming what is wrong.
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
            raise ValueError(f"patch_nums must be sides >= 1, one a scale, got {sides!r}")
        for name in ("vocabulary", "num_classes", "total", "batch_size", "shard_size"):
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.vocabulary > LARGEST_VOCABULARY:
            raise ValueError(
                f"vocabulary must be at most {LARGEST_VOCABULARY}, since token ids are kept as uint16, "
                f"got {self.vocabulary}"
            )
        if not isinstance(self.source, Mapping):
            raise ValueError(f"source must be a mapping of names to JSON values, got {self.source!r}")
        object.__setattr__(self, "patch_nums", tuple(int(side) for side in sides))
        try:  # as it will be read back, so that a manifest equals its own file
            object.__setattr__(self, "source", json.loads(json.dumps(self.source)))
        except TypeError as error:
            raise ValueError(f"source must hold JSON values: {error}") from error

    @property
    def lengths(self) -> list[int]:
        """Tokens of each scale."""
        return [side * side for side in self.patch_nums]

    @property
    def length(self) -> int:
        """L, the tokens of an image."""
        return sum(self.lengths)

    @property
    def count(self) -> int:
        """Images in a finished dataset."""
        return sum(shard.count for shard in self.shards or ())

    @property
    def skipped(self) -> list[str]:
        """What could not be read, by name."""
        return [name for shard in self.shards or () for name in shard.skipped]

    @property
    def num_shards(self) -> int:
        return -(-self.total // self.shard_size)

    def batches(self, shard: int) -> list[range]:
        """The images' numbers of one shard, in batches: a function of the shard alone."""
        stop = min((shard + 1) * self.shard_size, self.total)
        return [
            range(start, min(start + self.batch_size, stop))
            for start in range(shard * self.shard_size, stop, self.batch_size)
        ]

    def settings(self) -> dict[str, Any]:
        """All but the shards, as JSON values: what two runs must agree on to work on one dataset."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "shards"}
        return {"format": FORMAT, "version": VERSION, **values, "patch_nums": list(self.patch_nums)}

    def to_json(self) -> str:
        shards = self.shards if self.shards is None else [dataclasses.asdict(shard) for shard in self.shards]
        return json.dumps({**self.settings(), "shards": shards}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest:
        """The manifest of a dataset, finished or not.

        Raises:
            FileNotFoundError: if ``folder`` has none.
            ValueError: if it is not readable, of another format version, or holds impossible values.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a token-map dataset: it has no {FILE}")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{path} is not the manifest of a token-map dataset")
        if values.get("version") != VERSION:
            raise ValueError(f"{path} has format version {values.get('version')!r}, this varkern reads {VERSION}")
        try:
            fields = {name: value for name, value in values.items() if name not in ("format", "version", "shards")}
            shards = values["shards"]
            return cls(**fields, shards=None if shards is None else tuple(map(Shard.from_json, shards)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a usable manifest: {error}") from error


def file_sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
