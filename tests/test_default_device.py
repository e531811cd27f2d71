"""Nothing depends on PyTorch's default device: what has no device of its own is made where it is needed.

``torch.set_default_device("cuda")`` is common in scripts for one GPU. Tensors made without a device then land there:
host tables would be computed on the GPU and read back, and a seed drawn there would wait for the device. Here the
default is ``meta``, whose tensors hold no data, so that any of them stops the generation.
"""

import pytest
import torch

import varkern
from tests.helpers import small_scorer, small_var
from tests.standins.models import FLEX_SIDES, small_flexvar
from varkern.ops import fusion_tables

LABELS = torch.tensor([3, 0, 5])
SEARCHES = {
    "none": lambda: None,
    "best": lambda: varkern.BestOfM(small_scorer(), m=3),
    "density": lambda: varkern.DensitySearch(n=6, representatives=2),
    "rank": lambda: varkern.DensitySearch(n=6, representatives=2, strategy="rank", min_distance=0),
}


@pytest.fixture(autouse=True)
def tables_made_anew():
    """Those that an earlier test made would hide where they are made."""
    for kept in (fusion_tables.axis_matrix, fusion_tables.axis_matrix_on, fusion_tables.tile_inputs):
        kept.cache_clear()
    fusion_tables.pixel_inputs.cache_clear()
    fusion_tables.clear_tables()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("sampler", ["philox", "multinomial"])
def test_var(search, sampler):
    model, search = small_var(), search()
    given = {"search": search, "seeds": 5, "sampler": sampler, "top_k": 20, "top_p": 0.9}
    wanted = varkern.generate(model, LABELS, **given)
    fusion_tables.axis_matrix.cache_clear()
    with torch.device("meta"):
        got = varkern.generate(model, LABELS, **given)
    assert torch.equal(got.images, wanted.images)


@pytest.mark.parametrize("given", [{"seeds": None}, {"labels": [3, 0, 5]}, {"labels": 4}, {"labels": None}], ids=str)
def test_labels_and_seeds_of_every_kind(given):
    model = small_var()
    given = {"labels": LABELS, "seeds": 5, "batch_size": 3, **given}
    with torch.device("meta"):
        images = varkern.generate(model, given.pop("labels"), **given).images
    assert images.device.type == "cpu" and images.isfinite().all()


@pytest.mark.parametrize("ids", [None, [0, 5, -1], [index > 40 for index in range(64)]], ids=["all", "ids", "mask"])
def test_flexvar(ids):
    model, vae = small_flexvar()
    given = {"seeds": 5, "vqvae": vae, "infer_patch_nums": FLEX_SIDES, "invalid_ids": ids}
    wanted = varkern.generate(model, LABELS, **given)
    with torch.device("meta"):
        got = varkern.generate(model, LABELS, **given)
    assert torch.equal(got.images, wanted.images)


@pytest.mark.parametrize("table", [fusion_tables.tile_inputs, fusion_tables.pixel_inputs])
@pytest.mark.parametrize("interpolation", ["bicubic", "area", "nearest"])
def test_tables_of_the_kernels(table, interpolation):
    more = {"taps": 3, "dtype": torch.float32} if table is fusion_tables.tile_inputs else {}
    given = {"side": 3, "size": 20, "interpolation": interpolation, "device": torch.device("cpu"), **more}
    with torch.device("meta"):
        made = table(**given)
    table.cache_clear()
    fusion_tables.axis_matrix.cache_clear()
    for one, other in zip(made, table(**given), strict=True):
        assert one.device.type == "cpu" and torch.equal(one, other)
