"""Pictures: pixels are rounded and in their places, files are whole."""

import numpy as np
import pytest
import torch
from PIL import Image

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


class TestPanels:
    def test_images_are_in_their_places(self):
        """Panels below one another, rows and columns in order, every pixel a square."""
        colours = torch.arange(20, 20 + 2 * 2 * 3).div(64).view(2, 2, 3, 1, 1, 1)
        images = colours.expand(2, 2, 3, 3, 4, 5)
        panels = [pictures.Panel(name, part) for name, part in zip("ab", images, strict=True)]
        picture = np.asarray(pictures.draw_panels(panels, ["x", "y", "z"], enlarge=2)).astype(int)
        previous = -1, -1
        for panel in range(2):
            for row in range(2):
                tops = []
                for column in range(3):
                    grey = round(float(colours[panel, row, column]) * 255)
                    mask = (picture == grey).all(-1)
                    ys, xs = np.nonzero(full_blocks(mask, 8, 10))
                    assert len(ys) == 1  # exactly one block of 8x10 pixels has this grey
                    tops.append((int(ys[0]), int(xs[0])))
                assert len({top for top, _ in tops}) == 1 and [left for _, left in tops] == sorted(x for _, x in tops)
                assert tops[0][0] > previous[0]
                previous = tops[0]

    def test_wrong_shape(self):
        with pytest.raises(ValueError, match=r"shape \[rows, 2, 3, H, W\], got \[1, 3, 3, 4, 4\]"):
            pictures.draw_panels([pictures.Panel("a", torch.zeros(1, 3, 3, 4, 4))], ["x", "y"])

    def test_wrong_enlargement(self):
        with pytest.raises(ValueError, match="enlarge must be >= 1, got 0"):
            pictures.draw_panels([pictures.Panel("a", torch.zeros(1, 1, 3, 4, 4))], ["x"], enlarge=0)


def coloured(value: int, side: int = 4) -> torch.Tensor:
    """An image of one colour that no rim of a letter has."""
    return (torch.tensor(colour(value)) / 255).view(3, 1, 1).expand(3, side, side)


def colour(value: int) -> tuple[int, int, int]:
    return value, 0, 255


def box(picture: np.ndarray, wanted: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the pixels of one colour."""
    ys, xs = np.nonzero((picture == wanted).all(-1))
    return int(ys.min()), int(ys.max()), int(xs.min()), int(xs.max())


class TestRows:
    def test_images_are_in_their_places(self):
        tiles = [[pictures.Tile(coloured(40 + 10 * (3 * row + column))) for column in range(3)] for row in range(2)]
        tiles[0][1] = None
        rows = [pictures.Row([f"row {number}"], row) for number, row in enumerate(tiles)]
        picture = np.asarray(pictures.draw_rows(rows, ["a", "b", "c"], tile=12, title="title"))
        boxes = {
            (row, column): box(picture, colour(40 + 10 * (3 * row + column)))
            for row in range(2)
            for column in range(3)
            if tiles[row][column] is not None
        }
        assert {(bottom - top, right - left) for top, bottom, left, right in boxes.values()} == {(11, 11)}
        assert boxes[0, 0][:2] == boxes[0, 2][:2] and boxes[0, 0][2:] == boxes[1, 0][2:]
        assert boxes[0, 0][1] < boxes[1, 0][0] and boxes[1, 0][3] < boxes[1, 1][2] < boxes[1, 2][2]

    def test_frame(self):
        """Around the framed image alone, on all four sides, and covering nothing of it."""
        tiles = [pictures.Tile(coloured(60), "1", True), pictures.Tile(coloured(90), "2")]
        picture = np.asarray(pictures.draw_rows([pictures.Row(["row"], tiles)], ["", ""], tile=8))
        top, bottom, left, right = box(picture, colour(60))
        assert (bottom - top, right - left) == (7, 7)
        around = box(picture, pictures.FRAME)
        width = pictures.FRAME_WIDTH
        assert around == (top - width, bottom + width, left - width, right + width)
        assert (picture == pictures.FRAME).all(-1).sum() == (8 + 2 * width) ** 2 - 64

    def test_orientation(self):
        image = coloured(60).clone()[:, :, :2].repeat(1, 1, 3)  # 4 high, 6 wide
        image[:, 0, 5] = torch.tensor(colour(90)) / 255  # the upper right corner
        picture = np.asarray(pictures.draw_rows([pictures.Row([""], [pictures.Tile(image)])], [""], tile=12))
        whole, corner = box(picture, colour(60)), box(picture, colour(90))
        assert (whole[1] - whole[0], whole[3] - whole[2]) == (7, 11)
        assert corner == (whole[0], whole[0] + 1, whole[3] - 1, whole[3])

    @pytest.mark.parametrize("caption", ["+1.23", "a caption that is wider than the image is"])
    def test_words_neither_overlap_nor_leave_the_picture(self, caption):
        """Every caption stands clear of its neighbours: between columns there is a strip of paper."""
        tiles = [pictures.Tile(coloured(60), caption) for _ in range(3)]
        rows = [pictures.Row(["a long label", "of two lines"], tiles) for _ in range(2)]
        title = "a title that is much longer than all of the columns taken together, or nearly so"
        picture = np.asarray(pictures.draw_rows(rows, ["one", "two", "three"], tile=8, title=title))
        body = (picture[2 * pictures.TITLE_SIZE :] != 255).any((0, 2))
        strips = [len(run) for run in "".join("x" if ink else " " for ink in body).split("x") if run]
        assert sum(strip >= pictures.GAP for strip in strips) >= 4  # label, three columns and the right edge
        ink = (picture != 255).any(-1)
        assert not ink[:, -1].any() and not ink[-1].any() and not ink[:, 0].any() and not ink[0].any()

    def test_wrong_rows(self):
        with pytest.raises(ValueError, match="a row must have 2 tiles, one a column, got 1"):
            pictures.draw_rows([pictures.Row(["a"], [None])], ["x", "y"])
        with pytest.raises(ValueError, match="at least one tile, got none"):
            pictures.draw_rows([pictures.Row(["a"], [None])], ["x"])


class TestContactSheet:
    @pytest.fixture
    def paths(self, tmp_path):
        for number in range(5):
            pictures.save_png(np.full((8, 8, 3), 40 * number, np.uint8), tmp_path / f"{number}.png")
        return sorted(tmp_path.iterdir())

    def test_small_images_are_enlarged(self, paths):
        """8x8 pixels to 24x24, the largest multiple within 30, in their places."""
        picture = np.asarray(pictures.contact_sheet(paths, list("abcde"), columns=3, thumbnail=30)).astype(int)
        places = []
        for number in range(5):
            ys, xs = np.nonzero(full_blocks((picture == 40 * number).all(-1), 24, 24))
            assert len(ys) == 1
            places.append((int(ys[0]), int(xs[0])))
        assert places == sorted(places) and len({y for y, _ in places}) == 2

    def test_large_images_shrink(self, tmp_path):
        pictures.save_png(np.zeros((300, 200, 3), np.uint8), tmp_path / "a.png")
        picture = np.asarray(pictures.contact_sheet([tmp_path / "a.png"], ["a"], columns=4, thumbnail=64))
        assert picture.shape[0] < 110 and picture.shape[1] < 80

    def test_long_captions_fit(self, paths):
        narrow, wide = (
            pictures.contact_sheet(paths, [text] * 5, columns=5, thumbnail=16).width for text in ("a", "a" * 30)
        )
        assert wide > 4 * narrow

    @pytest.mark.parametrize("captions, columns", [(["a"], 1), (list("abcde"), 0)], ids=["captions", "columns"])
    def test_wrong_arguments(self, paths, captions, columns):
        with pytest.raises(ValueError, match=r"captions must be|columns must be >= 1, got 0"):
            pictures.contact_sheet(paths, captions, columns)

    def test_no_images(self):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            pictures.contact_sheet([], [], columns=1)


def full_blocks(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Where ``mask`` holds a full block of ``height`` x ``width``, by its upper left corner."""
    return np.lib.stride_tricks.sliding_window_view(mask, (height, width)).all((-2, -1))
