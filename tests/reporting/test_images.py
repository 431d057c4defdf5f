import pytest
import torch
from PIL import Image

from stepquant.reporting.images import GAP, save_grid, save_images
from stepquant.support.errors import StepQuantError


def opened(path):
    image = Image.open(path)
    return image.mode, image.size


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_tensor_is_wrapped_after_the_columns(tmp_path, channels, mode):
    path = save_grid(torch.rand(7, channels, 5, 4), tmp_path / "grid.png", columns=3, scale=2)
    assert opened(path) == (mode, (GAP + 3 * (8 + GAP), GAP + 3 * (10 + GAP)))


def test_pixels_land_where_they_belong(tmp_path):
    images = torch.zeros(4, 1, 2, 2)
    images[3] = 100.4 / 255
    path = save_grid(images, tmp_path / "grid.png", columns=2, scale=3)
    grey = Image.open(path)
    second = GAP + 6 + GAP
    assert grey.getpixel((GAP, GAP)) == 0
    assert grey.getpixel((0, 0)) == 255  # the gap is white
    assert grey.getpixel((second, second)) == grey.getpixel((second + 5, second + 5)) == 100


def test_each_tensor_of_a_list_is_a_row_of_its_first_images(tmp_path):
    first, second = torch.zeros(9, 1, 4, 4), torch.ones(2, 1, 4, 4)
    path = save_grid([first, second], tmp_path / "grid.png", columns=3, scale=1)
    grey = Image.open(path)
    assert grey.size == (GAP + 3 * (4 + GAP), GAP + 2 * (4 + GAP))
    assert grey.getpixel((grey.size[0] - GAP - 1, GAP)) == 0


def test_labels_stand_left_of_the_rows(tmp_path):
    rows = [torch.zeros(2, 1, 16, 16)] * 2
    plain = Image.open(save_grid(rows, tmp_path / "plain.png", columns=2))
    labelled = Image.open(
        save_grid(rows, tmp_path / "labels.png", columns=2, labels=["float32", "w4a4"])
    )
    margin = labelled.size[0] - plain.size[0]
    assert margin > 20
    assert labelled.size[1] == plain.size[1]
    left = torch.tensor(list(labelled.crop((0, 0, margin, labelled.size[1])).tobytes()))
    assert left.min() < 100  # there is ink


def test_a_picture_of_the_same_name_is_replaced(tmp_path):
    path = tmp_path / "grid.png"
    path.write_text("old")
    save_grid(torch.rand(1, 1, 4, 4), path, columns=1)
    assert Image.open(path).format == "PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_text("old")

    def fail(self, file, **_):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError):
        save_grid(torch.rand(1, 1, 4, 4), path, columns=1)
    with pytest.raises(StepQuantError, match="no space left on the disk"):
        save_images(torch.rand(2, 1, 4, 4), tmp_path / "many")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("rows", "columns", "labels", "words"),
    [
        (torch.rand(2, 2, 4, 4), 2, None, "C of 1 (grey) or 3 (RGB)"),
        (torch.rand(0, 1, 4, 4), 2, None, "expected [N, C, H, W]"),
        (torch.full((1, 1, 4, 4), float("nan")), 1, None, "expected 0 to 1"),
        (torch.rand(2, 1, 4, 4) + 2, 1, None, "expected 0 to 1"),
        (torch.rand(2, 1, 4, 4), 0, None, "expected at least 1"),
        (torch.rand(2, 1, 4, 4), 1, ["one"], "2 rows and 1 labels"),
        ([torch.rand(2, 1, 4, 4), torch.rand(2, 1, 5, 4)], 1, None, "expected one shape"),
        ([], 1, None, "at least one row"),
    ],
    ids=["channels", "empty", "nan", "range", "columns", "labels", "shapes", "no-rows"],
)
def test_bad_input_is_told(tmp_path, rows, columns, labels, words):
    with pytest.raises(StepQuantError) as error:
        save_grid(rows, tmp_path / "grid.png", columns, labels)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grid.jpg", "missing/grid.png", "folder.png"])
def test_a_bad_path_is_told(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StepQuantError, match="expected"):
        save_grid(torch.rand(1, 1, 4, 4), tmp_path / name, columns=1)


def test_images_are_written_one_by_one(tmp_path):
    images = torch.randint(0, 256, (3, 3, 5, 4), dtype=torch.uint8)
    paths = save_images(images, tmp_path / "deep" / "images")
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    found = torch.tensor(list(Image.open(paths[2]).tobytes()), dtype=torch.uint8)
    assert torch.equal(found.view(5, 4, 3).permute(2, 0, 1), images[2])
    with pytest.raises(StepQuantError, match="exists"):
        save_images(images, tmp_path / "deep" / "images")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["images"]
