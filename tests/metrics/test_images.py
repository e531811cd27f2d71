"""Sets of images: every pixel arrives, bad files are named, what goes wrong in making them is noticed."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from varkern.metrics.arrays import ImageArray, write_array
from varkern.metrics.images import PixelFacts, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, size=(7, 5, 6, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Seven images, some in a folder below."""
    path = tmp_path / "images"
    (path / "more").mkdir(parents=True)
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(path / ("more" if number > 4 else "") / f"{number}.png")
    return path


def all_of(images, batch_size: int = 3) -> np.ndarray:
    batches = list(images.batches(batch_size))
    assert all(batch.dtype == torch.uint8 and len(batch) <= batch_size for batch in batches)
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


class TestFolder:
    @pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
    def test_every_pixel_in_order(self, folder, batch_size):
        images = open_images(folder)
        assert len(images) == 7 and images.size == (5, 6)
        assert np.array_equal(all_of(images, batch_size), PIXELS)
        assert images.describe(5) == "5.png" and images.warnings() == []

    def test_contact_sheet_is_left_out(self, folder):
        Image.new("RGB", (50, 50)).save(folder / "sheet.png")
        with pytest.raises(ValueError, match="images of one size"):
            open_images(folder)
        (folder / "settings.json").write_text("{}")
        assert len(open_images(folder)) == 7

    def test_mixed_sizes(self, folder):
        Image.new("RGB", (6, 4)).save(folder / "z.png")
        with pytest.raises(ValueError, match=r"one size, got 6x5 pixels for 0.png and 6x4 for z.png"):
            open_images(folder)

    @pytest.mark.parametrize(
        "mode, named",
        [
            ("L", "greyscale"),
            ("LA", "greyscale"),
            ("1", "greyscale"),
            ("I;16", "greyscale"),
            ("RGBA", "mode RGB, got RGBA"),
        ],
    )
    def test_other_modes(self, folder, mode, named):
        Image.new(mode, (6, 5)).save(folder / "z.png")
        with pytest.raises(ValueError, match=f"z.png .*{named}"):
            open_images(folder)

    def test_truncated_file(self, folder):
        pixels = np.random.default_rng(1).integers(0, 256, size=(5, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / "6z.png").write_bytes(buffer.getvalue()[:-40])
        with pytest.raises(ValueError, match=r"6z\.png is truncated or damaged"):
            all_of(open_images(folder))

    @pytest.mark.parametrize("content", [b"", b"no image"], ids=["empty", "text"])
    def test_no_image(self, folder, content):
        (folder / "z.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"z\.png is damaged or not an image"):
            open_images(folder)

    def test_jpeg_is_warned_of(self, folder):
        Image.fromarray(PIXELS[0]).save(folder / "z.JPG")
        assert "1 of the 8 images" in open_images(folder).warnings()[0] and "FID" in open_images(folder).warnings()[0]

    @pytest.mark.parametrize("name", ["nothing", "file.txt", "empty"])
    def test_nothing_there(self, tmp_path, name):
        (tmp_path / "file.txt").touch()
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=rf"there is no .*{name}|must be a folder of images or|must have images"):
            open_images(tmp_path / name)


class TestArray:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
    @pytest.mark.parametrize("batch_size", [1, 3, 100])
    def test_reads_what_numpy_writes(self, tmp_path, save, batch_size):
        save(tmp_path / "a.npz", PIXELS)
        images = open_images(tmp_path / "a.npz")
        assert len(images) == 7 and images.size == (5, 6) and images.describe(3) == "arr_0[3]"
        assert np.array_equal(all_of(images, batch_size), PIXELS)
        assert np.array_equal(all_of(images, batch_size), PIXELS)  # a second time from the start

    @pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4]], ids=str)
    def test_numpy_reads_what_is_written(self, tmp_path, sizes):
        batches = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).split(sizes)
        write_array(tmp_path / "a.npz", 7, (5, 6), iter(batches))
        found = np.load(tmp_path / "a.npz", allow_pickle=False)
        assert found.files == ["arr_0"] and found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], PIXELS)
        assert zipfile.ZipFile(tmp_path / "a.npz").testzip() is None

    def test_an_error_leaves_the_former_file(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"former")

        def batches():
            yield torch.zeros(1, 3, 5, 6, dtype=torch.uint8)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_array(tmp_path / "a.npz", 2, (5, 6), batches())
        assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
        assert (tmp_path / "a.npz").read_bytes() == b"former"

    @pytest.mark.parametrize(
        "arrays, named",
        [
            ({"images": PIXELS}, "must have arr_0, .* got images"),
            ({"arr_0": PIXELS.astype(np.float32) / 255}, "must be uint8 in 0..255, got float32"),
            ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, r"shape \[N, H, W, 3\] in C order, got \[7, 3, 5, 6\]"),
            ({"arr_0": PIXELS[..., 0]}, r"got \[7, 5, 6\]"),
            ({"arr_0": PIXELS[:0]}, r"got \[0, 5, 6, 3\]"),
            ({"arr_0": np.asfortranarray(PIXELS)}, "C order"),
        ],
        ids=["no_arr_0", "floats", "channels_first", "greyscale", "empty", "fortran_order"],
    )
    def test_wrong_arrays(self, tmp_path, arrays, named):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=named):
            ImageArray(tmp_path / "a.npz")

    def test_cut_short(self, tmp_path):
        np.savez(tmp_path / "a.npz", PIXELS)
        (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
        with pytest.raises(ValueError, match=r"b\.npz is damaged or not an \.npz"):
            ImageArray(tmp_path / "b.npz")

    @pytest.mark.parametrize("missing", [1, 400])
    def test_member_cut_short(self, tmp_path, missing):
        """A whole archive whose array ends early, as one that was packed while the disk was full."""
        buffer = io.BytesIO()
        np.save(buffer, PIXELS)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("arr_0.npy", buffer.getvalue()[:-missing])
        with pytest.raises(ValueError, match="truncated"):
            all_of(ImageArray(tmp_path / "a.npz"))


class TestFacts:
    def facts(self, pixels: np.ndarray, batch_size: int = 3) -> list[str]:
        found = PixelFacts()
        for batch in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(batch_size):
            found.add(batch)
        self.found = found

        class Images:
            name = "set"

            def describe(self, number):
                return f"image {number}"

        return found.warnings(Images())

    def test_nothing_wrong(self):
        assert self.facts(PIXELS) == []
        assert self.found.brightness == pytest.approx(PIXELS.mean(), rel=1e-12)

    def test_repeated_images(self):
        """Across batches too."""
        warnings = self.facts(np.concatenate((PIXELS, PIXELS[2:4], PIXELS[2:3])))
        assert len(warnings) == 1
        assert "3 of the 10 images in set are exact copies of others (first: image 7 of image 2)" in warnings[0]

    def test_unit_range(self):
        warnings = self.facts((PIXELS > 100).astype(np.uint8))
        assert len(warnings) == 1 and "multiplied by 255" in warnings[0]
