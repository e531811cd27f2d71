"""Folders of images, and what is made of an image before it is encoded."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from varkern.data import ImageFolder
from varkern.data.images import BrokenImageError, read_image


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without jumps, uint8, which no two channels, rows or columns share."""
    y, x, c = np.mgrid[:height, :width, :channels]
    return (127.5 + 60 * np.sin(x / 5 + c) + 60 * np.cos(y / 7 - c)).astype(np.uint8)


def rough(height: int, width: int) -> np.ndarray:
    """A picture that tells one filter from another, with room for overshoot at both ends of the range."""
    return np.random.default_rng(height).integers(88, 168, (height, width, 3), dtype=np.uint8)


def save(array: np.ndarray, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def lanczos(line: np.ndarray, size: int) -> np.ndarray:
    """Lanczos with three lobes along the first axis, float64: the filter widens with the step, its weights sum to 1."""
    step = len(line) / size
    widening = max(step, 1.0)
    centres = (np.arange(size) + 0.5) * step
    offsets = (np.arange(len(line)) + 0.5 - centres[:, None]) / widening
    weights = np.where(np.abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    return np.tensordot(weights, line, 1)


def reference(array: np.ndarray, size: int, short: int) -> np.ndarray:
    """Short side to ``short``, long one in proportion and rounded down, centre cropped: [3, size, size] float64."""
    height, width = array.shape[:2]
    if height <= width:
        new = short, short * width // height
    else:
        new = short * height // width, short
    resized = lanczos(lanczos(array.astype(np.float64), new[0]).swapaxes(0, 1), new[1]).swapaxes(0, 1)
    top, left = (new[0] - size) / 2, (new[1] - size) / 2
    top, left = (int(np.rint(side)) for side in (top, left))
    return resized[top : top + size, left : left + size].transpose(2, 0, 1)


class TestReading:
    @pytest.mark.parametrize(
        "shape", [(40, 60), (61, 47), (36, 36), (27, 90), (31, 20), (18, 18)], ids=lambda s: f"{s[0]}x{s[1]}"
    )
    @pytest.mark.parametrize("resize", [1.125, 1.0, 1.5])
    def test_against_float64(self, tmp_path, shape, resize):
        """Within two levels, which rounding to bytes after each of two passes takes."""
        array = rough(*shape)
        found = read_image(save(array, tmp_path / "a.png"), 32, resize)
        assert found.dtype == np.uint8 and found.shape == (3, 32, 32)
        error = np.abs(found - reference(array, 32, round(resize * 32)).clip(0, 255))
        assert error.max() <= 2 and error.mean() < 0.5

    def test_published_sizes(self, tmp_path):
        """256 px: the short side to 288, the centre from 16 on; nothing is resampled where it has 288 already."""
        array = smooth(288, 303)
        found = read_image(save(array, tmp_path / "a.png"), 256)
        assert np.array_equal(found, array[16:272, 24:280].transpose(2, 0, 1))  # (303 - 256) / 2 rounds to 24

    @pytest.mark.parametrize(
        "mode, wanted",
        [
            ("L", lambda a: a[..., :1].repeat(3, -1)),
            ("RGBA", lambda a: a),
            ("CMYK", lambda a: 255 - a),
            ("LA", lambda a: a[..., :1].repeat(3, -1)),
            ("P", lambda a: a),
            ("1", None),
            ("I;16", None),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_modes(self, tmp_path, mode, wanted):
        array = smooth(36, 36)
        transparent = np.full((36, 36, 1), 90, np.uint8)
        grey = array[..., 0]
        pictures = {
            "L": lambda: Image.fromarray(grey),
            "RGBA": lambda: Image.fromarray(np.concatenate((array, transparent), -1)),
            "CMYK": lambda: Image.fromarray(np.concatenate((array, transparent * 0), -1), mode="CMYK"),
            "LA": lambda: Image.fromarray(np.stack((grey, transparent[..., 0]), -1)),
            "P": lambda: Image.fromarray(array // 64 * 64).quantize(256),
            "1": lambda: Image.fromarray(grey).convert("1"),
            "I;16": lambda: Image.fromarray(grey.astype(np.uint16)),
        }
        path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
        pictures[mode]().save(path)
        found = read_image(path, 32)
        assert found.shape == (3, 32, 32) and found.std() > 0
        if wanted is not None:
            array = array // 64 * 64 if mode == "P" else array
            assert np.array_equal(found, wanted(array)[2:34, 2:34].transpose(2, 0, 1))
        else:
            assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])

    def test_orientation_is_not_applied(self, tmp_path):
        """As published, whatever a camera notes."""
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        array = smooth(36, 36)
        turned = read_image(save(array, tmp_path / "a.png", exif=exif), 32)
        assert np.array_equal(turned, read_image(save(array, tmp_path / "b.png"), 32))


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it has this size, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + end


class TestBroken:
    @pytest.mark.parametrize(
        "content",
        [
            lambda good: b"",
            lambda good: b"no image",
            lambda good: good[: len(good) // 2],
            lambda good: good[:20],
            lambda good: good[:100] + bytes(50) + good[150:],
            lambda good: png_of(40, 40),
            lambda good: png_of(60_000, 60_000),
        ],
        ids=["empty", "text", "half", "header", "hole", "few pixels", "bomb"],
    )
    def test_broken_file(self, tmp_path, content):
        good = save(smooth(60, 60), tmp_path / "good.png").read_bytes()
        (tmp_path / "bad.png").write_bytes(content(good))
        with pytest.raises(BrokenImageError, match=r"bad\.png is not a readable image"):
            read_image(tmp_path / "bad.png", 32)

    def test_truncated_jpeg(self, tmp_path):
        content = save(smooth(60, 60), tmp_path / "good.jpg").read_bytes()
        (tmp_path / "bad.jpg").write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(BrokenImageError, match="truncated"):
            read_image(tmp_path / "bad.jpg", 32)

    def test_elongated(self, tmp_path):
        """One row of many pixels would take gigabytes once resized."""
        save(np.zeros((1, 60_000, 3), np.uint8), tmp_path / "a.png")
        with pytest.raises(BrokenImageError, match="too elongated to be resized, 60000x1"):
            read_image(tmp_path / "a.png", 256)

    def test_a_file_that_cannot_be_opened_is_not_broken(self, tmp_path):
        """A disk that fails for a while must not take images out of a dataset."""
        with pytest.raises(FileNotFoundError):
            read_image(tmp_path / "a.png", 32)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes, one of them with a folder in it; and files that are no images."""
    for name in ("bird/1.png", "cat/b.JPEG", "cat/a.png", "ant/deep/2.webp", "ant/z.bmp"):
        save(smooth(20, 20), tmp_path / "images" / name)
    for name in ("cat/notes.txt", "readme.md", "cat/.hidden.png", ".cache/x.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path / "images"


class TestFolder:
    def test_order(self, root):
        images = ImageFolder.open(root)
        assert images.classes == ["ant", "bird", "cat"] and len(images) == 5
        assert images.paths == ["ant/deep/2.webp", "ant/z.bmp", "bird/1.png", "cat/a.png", "cat/b.JPEG"]
        assert images.labels == [0, 0, 1, 2, 2]

    def test_class_names(self, root):
        """The model's own order, which may name classes that have no folder."""
        images = ImageFolder.open(root, ["dog", "cat", "bird", "ant"])
        assert images.classes == ["dog", "cat", "bird", "ant"]
        assert dict(zip(images.paths, images.labels, strict=True))["cat/a.png"] == 1

    def test_linked_folders(self, root, tmp_path):
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "cat").symlink_to(root / "cat")
        assert ImageFolder.open(tmp_path / "links").paths == ["cat/a.png", "cat/b.JPEG"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda root: (root / "cat/a.png").unlink(),
            lambda root: (root / "cat/a.png").rename(root / "cat/c.png"),
            lambda root: (root / "cat/a.png").rename(root / "ant/a.png"),
            lambda root: (root / "cat/a.png").write_bytes(b"x"),
            lambda root: save(smooth(20, 20), root / "cat/c.png"),
        ],
        ids=["removed", "renamed", "moved", "another size", "added"],
    )
    def test_digest_tells_changes(self, root, change):
        before = ImageFolder.open(root).digest
        assert ImageFolder.open(root).digest == before
        change(root)
        assert ImageFolder.open(root).digest != before

    def test_digest_of_class_names(self, root):
        assert ImageFolder.open(root).digest != ImageFolder.open(root, ["cat", "bird", "ant"]).digest

    def test_names_that_are_no_text(self, tmp_path):
        (tmp_path / "a").mkdir()
        with open(os.fsencode(tmp_path / "a") + b"/\xff.png", "wb"):
            pass
        assert len(ImageFolder.open(tmp_path)) == 1

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"images must be a folder, got .*nowhere"):
            ImageFolder.open(tmp_path / "nowhere")

    def test_no_classes(self, tmp_path):
        save(smooth(20, 20), tmp_path / "a.png")
        with pytest.raises(
            ValueError, match=r"images must be a folder with one folder per class, got .* without folders"
        ):
            ImageFolder.open(tmp_path)

    def test_empty_class(self, root):
        (root / "dog").mkdir()
        (root / "dog" / "notes.txt").touch()
        with pytest.raises(ValueError, match=r"class folder .*dog has no images"):
            ImageFolder.open(root)

    def test_unknown_class(self, root):
        with pytest.raises(ValueError, match=r"class_names must hold every class folder of .*, got none for 'bird'"):
            ImageFolder.open(root, ["ant", "cat"])

    def test_class_twice(self, root):
        with pytest.raises(ValueError, match="class_names must differ, got 'cat' twice"):
            ImageFolder.open(root, ["ant", "cat", "bird", "cat"])
