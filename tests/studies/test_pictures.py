"""Pictures: pixels are rounded and in their places, files are whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import rendered
from varkern.studies import pictures


class TestPixels:
    def test_rounded_and_clamped(self):
        images = torch.tensor([0.0, 0.5 / 255, 0.51 / 255, 0.5, 254.6 / 255, 1.0, 1.2, -0.3, float("nan")])
        found = pictures.to_pixels(images.view(1, 1, -1).expand(3, 1, -1))
        assert found.shape == (1, 9, 3) and found.dtype == np.uint8
        assert found[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255, 255, 0, 0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, dtype):
        images = torch.rand(2, 3, 4, 5).to(dtype)
        found = pictures.to_pixels(images)
        assert np.abs(found - images.double().permute(0, 2, 3, 1).numpy() * 255).max() <= 0.5 + 1e-6

    def test_channels_stay_in_order(self):
        image = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
        assert pictures.to_pixels(image)[0, 1, 3].tolist() == [255, 128, 0]

    def test_empty_batch(self):
        assert pictures.to_pixels(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5, 3)


class TestSave:
    def test_round_trip(self, tmp_path):
        pixels = pictures.to_pixels(torch.rand(3, 7, 5))
        pictures.save_png(pixels, tmp_path / "a.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def coloured(value: int, height: int = 4, width: int = 4) -> torch.Tensor:
    """An image of one colour that no rim of a letter has."""
    return (torch.tensor(colour(value)) / 255).view(3, 1, 1).expand(3, height, width)


def colour(value: int) -> tuple[int, int, int]:
    return value, 0, 255


def box(picture: np.ndarray, wanted: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the pixels of one colour."""
    ys, xs = np.nonzero((picture == wanted).all(-1))
    return int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())


def words_of(figure) -> list[tuple[str, object]]:
    """All words of a figure and where they stand, in pixels."""
    figure.draw_without_rendering()
    texts = [text for axis in figure.axes for text in axis.texts if text.get_text()]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


class TestRows:
    def test_every_pixel_is_a_square_in_its_place(self, tmp_path):
        images = torch.rand(2, 3, 3, 8, 5, generator=torch.Generator().manual_seed(0))
        rows = [pictures.Row(f"row {n}", [pictures.Tile(image) for image in row]) for n, row in enumerate(images)]
        rows[0] = pictures.Row("row 0", [rows[0].tiles[0], None, rows[0].tiles[2]], "above the row")
        picture = rendered(pictures.draw_rows(rows, ["a", "b", "c"], "title", tile=30), tmp_path).astype(int)
        places = {}
        for row in range(2):
            for column in range(3):
                wanted = pictures.to_pixels(images[row, column]).repeat(3, 0).repeat(3, 1)
                views = np.lib.stride_tricks.sliding_window_view(picture, wanted.shape)[:, :, 0]
                corners = np.argwhere(np.abs(views[..., 0, 0, :] - wanted[0, 0]).max(-1) <= 1)
                found = [tuple(c) for c in corners.tolist() if np.abs(views[tuple(c)] - wanted).max() <= 1]
                assert len(found) == ((row, column) != (0, 1))
                places[row, column] = found[0] if found else None
        assert places[0, 0][0] == places[0, 2][0] < places[1, 0][0] == places[1, 1][0]
        assert places[0, 0][1] == places[1, 0][1] < places[1, 1][1] < places[1, 2][1] == places[0, 2][1]

    def test_large_images_shrink(self, tmp_path):
        row = pictures.Row("", [pictures.Tile(coloured(60, 300, 200))])
        top, bottom, left, right = box(rendered(pictures.draw_rows([row], tile=60), tmp_path), colour(60))
        assert (bottom - top + 1, right - left + 1) == (60, 40)

    def test_frame(self, tmp_path):
        """Around the framed image alone, on all four sides, and covering nothing of it."""
        tiles = [pictures.Tile(coloured(60), "1", True), pictures.Tile(coloured(90), "2")]
        picture = rendered(pictures.draw_rows([pictures.Row("row", tiles)], ["", ""], tile=80), tmp_path)
        top, bottom, left, right = box(picture, colour(60))
        assert (bottom - top, right - left) == (79, 79)
        frame = tuple(int(pictures.FRAME[i : i + 2], 16) for i in (1, 3, 5))
        width = pictures.FRAME_WIDTH
        assert box(picture, frame) == (top - width, bottom + width, left - width, right + width)
        assert (picture == frame).all(-1).sum() == (80 + 2 * width) ** 2 - 80**2

    @pytest.mark.parametrize("caption", ["+1.23", "a caption that is wider than the image is"])
    def test_words_neither_overlap_nor_touch_an_image(self, caption, tmp_path):
        tiles = [pictures.Tile(coloured(60), caption, number == 1) for number in range(3)]
        rows = [pictures.Row("a long label\nof two lines", tiles, title) for title in ("a title of two rows", "")]
        title = "a title that is much longer than all of the columns taken together, or nearly so"
        figure = pictures.draw_rows(rows, ["one", "two", "M=1, same seed"], title, tile=60)
        words = words_of(figure)
        assert len(words) == 1 + 3 + 2 + 1 + 6
        images = [(str(number), image.get_window_extent()) for number, image in enumerate(figure.axes[0].images)]
        assert len(images) == 6
        everything = [*words, *images]
        for number, (name, extent) in enumerate(everything):
            for other_name, other in everything[number + 1 :]:
                apart = extent.x1 <= other.x0 or other.x1 <= extent.x0 or extent.y1 <= other.y0 or other.y1 <= extent.y0
                assert apart, f"{name!r} overlaps {other_name!r}"
        ink = (rendered(figure, tmp_path) != 255).any(-1)
        assert not ink[:, -1].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[0].any()

    def test_the_page_is_white_on_any_page(self, tmp_path):
        pictures.save_png(pictures.draw_rows([pictures.Row("", [pictures.Tile(coloured(60))])]), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)

    def test_wrong_rows(self):
        with pytest.raises(ValueError, match="a row must have 2 tiles, one per column, got 1"):
            pictures.draw_rows([pictures.Row("a", [None])], ["x", "y"])
        with pytest.raises(ValueError, match="at least one tile, got none"):
            pictures.draw_rows([pictures.Row("a", [None])], ["x"])


class TestContactSheet:
    @pytest.fixture
    def paths(self, tmp_path):
        for number in range(5):
            pictures.save_png(np.full((8, 8, 3), colour(40 * number), np.uint8), tmp_path / f"{number}.png")
        return sorted(tmp_path.iterdir())

    def test_images_in_order(self, paths, tmp_path):
        """8x8 pixels to 24x24, the largest multiple within 30, three to a row."""
        figure = pictures.contact_sheet(paths, list("abcde"), columns=3, thumbnail=30)
        picture = rendered(figure, tmp_path)
        boxes = [box(picture, colour(40 * number)) for number in range(5)]
        assert {(bottom - top, right - left) for top, bottom, left, right in boxes} == {(23, 23)}
        assert [b[:1] + b[2:3] for b in boxes] == sorted(b[:1] + b[2:3] for b in boxes)
        assert len({b[0] for b in boxes}) == 2 and len({b[2] for b in boxes}) == 3
        assert [word for word, _ in words_of(figure)] == list("abcde")

    def test_large_images_shrink(self, tmp_path):
        pictures.save_png(np.zeros((300, 200, 3), np.uint8), tmp_path / "a.png")
        picture = rendered(pictures.contact_sheet([tmp_path / "a.png"], ["a"], columns=4, thumbnail=64), tmp_path)
        assert picture.shape[0] < 120 and picture.shape[1] < 80

    @pytest.mark.parametrize("captions, columns", [(["a"], 1), (list("abcde"), 0)], ids=["captions", "columns"])
    def test_wrong_arguments(self, paths, captions, columns):
        with pytest.raises(ValueError, match=r"captions must be|columns must be >= 1, got 0"):
            pictures.contact_sheet(paths, captions, columns)

    def test_no_images(self):
        with pytest.raises(ValueError, match=">= 1, got 0"):
            pictures.contact_sheet([], [], columns=1)
