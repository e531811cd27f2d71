"""The memory of a launch as the kernel sees it: each storage has a separate range of addresses, with gaps between."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import torch

LARGEST_SHADOW = 256 << 20  # bytes of all storages up to which every byte's last reader and writer are remembered
FIRST_ADDRESS = 0x7F00_0000_0000
NOWHERE = 0xDEAD0000  # the address of an empty tensor
SEGMENT = np.dtype([("base", np.uint64), ("size", np.uint64), ("host", np.uint64), ("perm", np.uint64),
                    ("wr", np.uint64), ("rd", np.uint64), ("allok", np.int64), ("init", np.uint64)])  # fmt: skip

# Storages that nobody has written whole yet: address -> (weak reference, version, a flag per byte, bytes)
_fresh: dict[int, tuple] = {}


def mark_fresh(tensor: torch.Tensor) -> torch.Tensor:
    """Note that a tensor's memory is not initialised, and fill it with 0xFF bytes (NaN, -1)."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    # A tensor of inference mode has no version that would tell whether it was written since.
    if tensor.is_inference() or not size or tensor.device.type != "cpu" or size > LARGEST_SHADOW:
        return tensor
    ctypes.memset(storage.data_ptr(), 0xFF, size)
    _fresh[storage.data_ptr()] = (weakref.ref(tensor), tensor._version, np.zeros(size, np.uint8), size)
    return tensor


def written_flags(tensor: torch.Tensor) -> np.ndarray | None:
    """Which bytes of a fresh tensor's storage kernels have written; None if it is not fresh any more."""
    pointer = tensor.untyped_storage().data_ptr()
    entry = _fresh.get(pointer)
    if entry is None:
        return None
    maker, version, flags, size = entry[0](), *entry[1:]
    if maker is None or maker.untyped_storage().data_ptr() != pointer:
        del _fresh[pointer]
        return None
    if tensor.is_inference() or tensor._version != version or size != tensor.untyped_storage().nbytes():
        return None
    return flags


def bytes_of_views(views: list[torch.Tensor], size: int) -> np.ndarray:
    """1 for each byte of a storage that one of the views has, else 0: bytes between a view's elements are outside."""
    inside = np.zeros(size, np.uint8)
    for view in views:
        itemsize, offset = view.element_size(), view.storage_offset()
        if view.numel() == 0:
            continue
        if view.is_contiguous():
            inside[offset * itemsize : (offset + view.numel()) * itemsize] = 1
            continue
        elements = np.zeros(size // itemsize, np.uint8)
        np.lib.stride_tricks.as_strided(elements[offset:], view.shape, view.stride())[...] = 1
        inside[: len(elements) * itemsize] |= np.repeat(elements, itemsize)
    return inside


def regions_of_views(views: list[torch.Tensor], size: int) -> list[tuple[int, np.ndarray]]:
    """(first byte, a flag for each byte from there on): the storage in one, or a very large view row by row."""
    if size <= LARGEST_SHADOW or len(views) > 1:
        return [(0, bytes_of_views(views, size))]
    regions = []
    for row in views[0].unbind(views[0].stride().index(max(views[0].stride()))):
        last = sum((length - 1) * step for length, step in zip(row.shape, row.stride(), strict=True))
        itemsize, at_zero = row.element_size(), row.as_strided(row.shape, row.stride(), 0)
        regions.append((row.storage_offset() * itemsize, bytes_of_views([at_zero], (last + 1) * itemsize)))
    return regions


class Memory:
    """Lays out the storages of a launch's tensors.

    Attributes:
        segments: one row per storage, as c/state.h has it; several for a very large one.
        addresses: of each tensor, by its ``id``.
        checked: whether races in global memory are looked for; not in very large launches.
    """

    def __init__(self, tensors: list[torch.Tensor]):
        by_storage: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        sizes = {pointer: views[0].untyped_storage().nbytes() for pointer, views in by_storage.items()}
        self.checked = sum(sizes.values()) <= LARGEST_SHADOW
        self.addresses: dict[int, int] = {}
        self._keep, self._shadows, rows, base = [], [], [], FIRST_ADDRESS
        for pointer, views in sorted(by_storage.items()):
            size = sizes[pointer]
            if size == 0:
                self.addresses |= {id(view): NOWHERE for view in views}
                continue
            start = base + pointer % 512 if pointer % 16 else base + pointer % 64  # as aligned as it really is
            rows += [self._segment(start, pointer, *region, views) for region in regions_of_views(views, size)]
            for view in views:
                self.addresses[id(view)] = start + view.data_ptr() - pointer if view.numel() else start
            base += -(-(size + 4096) // (1 << 20)) * (1 << 20) + (1 << 20)
        self.segments = np.array(rows, dtype=SEGMENT)

    def _segment(self, start: int, pointer: int, first: int, inside: np.ndarray, views: list[torch.Tensor]) -> tuple:
        flags = written_flags(views[0])
        writes, reads = (np.zeros(len(inside) if self.checked else 1, np.uint64) for _ in range(2))
        self._keep += [inside, flags]
        self._shadows.append((reads, writes))
        return (start + first, len(inside), pointer + first, inside.ctypes.data, writes.ctypes.data, reads.ctypes.data,
                int(inside.all()), 0 if flags is None else flags.ctypes.data)  # fmt: skip

    def footprint(self) -> tuple[int, int]:
        """Bytes that the launch read and that it wrote, each counted once; 0 if not checked."""
        if not self.checked:
            return 0, 0
        return tuple(sum(int(np.count_nonzero(pair[k])) for pair in self._shadows) for k in (0, 1))

    def describe(self, address: int) -> str:
        """Where an address lies, for an error message."""
        offsets = [(int(address) - int(s["base"]), int(s["size"])) for s in self.segments]
        if not offsets:
            return "no memory"
        offset, size = min(offsets, key=lambda pair: abs(pair[0]))
        return f"byte {offset} of a storage of {size} bytes"
