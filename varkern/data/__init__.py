"""Token-map datasets: the real and the generated maps that a scorer is trained on.

A dataset is a folder with ``manifest.json`` and shards, safetensors files with ``tokens`` ``[n, L]`` uint16 and
``labels`` ``[n]`` int32. ``varkern tokens`` makes a dataset from a model's samples or from images.
"""

from .encoding import encode_token_maps
from .generation import DATASET_SEED, generate_token_maps
from .images import ImageFolder
from .manifest import Manifest, Shard, file_sha256
from .published_files import export_token_maps, import_token_maps
from .token_maps import TokenMaps
from .writer import Batch, BatchSource, write_token_maps

__all__ = [
    "DATASET_SEED",
    "Batch",
    "BatchSource",
    "ImageFolder",
    "Manifest",
    "Shard",
    "TokenMaps",
    "encode_token_maps",
    "export_token_maps",
    "file_sha256",
    "generate_token_maps",
    "import_token_maps",
    "write_token_maps",
]
