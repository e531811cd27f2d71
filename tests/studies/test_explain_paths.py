"""The explained paths are those of the generation, and the picture shows who goes on from whom."""

import json

import numpy as np
import pytest
import torch

import varkern
from tests.helpers import relative_error, rendered, small_scorer, small_var
from tests.standins.models import small_flexvar
from varkern.studies.explain_paths import ExplainedPaths, draw_paths, explain_paths, paths_as_json

SEED = varkern.image_seeds(3, 1)
OPTIONS = {"cfg": 1.5, "top_k": 20}


@pytest.fixture(scope="module")
def model():
    return small_var()


def test_every_path_at_every_scale(model):
    reward = varkern.LogRatio(small_scorer())
    search = varkern.PathSearch((4, 4, 3, 5, 1), {1: "resample", 2: "cluster", 3: "resample"}, reward)
    scales = explain_paths(model, search, 2, SEED, OPTIONS)
    result = varkern.generate(model, [2], search=search, seeds=SEED, **OPTIONS)
    quantizer, prefixes = model.vae_quant_proxy[0], [[] for _ in range(4)]
    for scale, found in enumerate(scales):
        tokens = result.paths.tokens[scale][0]
        assert (found.scale, found.side, len(found.images)) == (scale, model.patch_nums[scale], len(tokens))
        if scale:
            rows = result.paths.survivors[scale - 1][0].tolist()
            assert found.parents == rows
            prefixes = [prefixes[row] for row in rows]
        prefixes = [[*prefix, ids[None]] for prefix, ids in zip(prefixes, tokens, strict=True)]
        for image, prefix in zip(found.images, prefixes, strict=True):
            padded = [*prefix, *(torch.zeros(1, side**2).long() for side in model.patch_nums[scale + 1 :])]
            f_hat = quantizer.embed_to_fhat([quantizer.codes(ids, k) for k, ids in enumerate(padded)])[scale]
            assert relative_error(image, model.vae_proxy[0].fhat_to_img(f_hat)[0] * 0.5 + 0.5) < 1e-4
        rewards = result.paths.rewards[scale]
        assert (found.rewards is None) == (rewards is None)
        assert rewards is None or torch.allclose(found.rewards, rewards[0], atol=1e-5)
    assert scales[0].parents is None
    assert relative_error(scales[-1].images[scales[-1].kept], result.images[0]) < 1e-4
    assert [scale.kept for scale in scales] == [int(kept) for kept in result.paths.ancestors()]
    report = json.loads(json.dumps(paths_as_json(scales, {"seed": 3})))
    assert [scale["paths"] for scale in report["scales"]] == [4, 4, 4, 3, 5] and report["settings"] == {"seed": 3}


def test_another_family():
    flexvar, _ = small_flexvar()
    with pytest.raises(ValueError, match="explaining needs a VAR model"):
        explain_paths(flexvar, varkern.PathSearch(1), 2, SEED)


def test_lines_lead_from_paths_to_those_that_go_on(tmp_path):
    """Each path has a colour of its own; the lines to the image, and its frames, have the colour of frames."""

    def colour(number):
        return number, 0, 255

    def images(*numbers):
        tints = [torch.tensor(colour(number)) / 255 for number in numbers]
        return torch.stack([tint.view(3, 1, 1).expand(3, 4, 4) for tint in tints])

    scales = [
        ExplainedPaths(0, 1, images(10, 20, 30), None, None, 2),
        ExplainedPaths(1, 2, images(40, 50), torch.tensor([0.5, -1.25]), [0, 2], 1),
        ExplainedPaths(2, 4, images(60, 70, 80), None, [1, 1, 0], 0),
    ]
    picture = rendered(draw_paths(scales, "title"), tmp_path)
    place = {n: np.nonzero((picture == colour(n)).all(-1)) for n in range(10, 90, 10)}
    middle = {n: int(xs.mean()) for n, (_, xs) in place.items()}
    assert middle[10] == middle[40] == middle[60] and middle[10] < middle[20] == middle[50] < middle[30]
    framed = (picture == (213, 94, 0)).all(-1)
    for kept, other in ((30, 20), (50, 40), (60, 70)):
        ys, xs = place[kept]
        assert framed[ys.mean().astype(int), xs.max() + 4]
        ys, xs = place[other]
        assert not framed[ys.mean().astype(int), xs.min() - 4]
    dark = (picture.astype(int).sum(-1) < 600) & (np.ptp(picture.astype(int), axis=-1) < 10)

    def drawn(upper, lower, mask):
        """Whether a line joins the two: some of it close to its middle."""
        y = (place[upper][0].max() + 8 + place[lower][0].min() - 8) // 2
        x = (middle[upper] + middle[lower]) // 2
        return mask[y - 14 : y + 14, x - 14 : x + 14].any()

    assert drawn(30, 50, framed) and drawn(50, 60, framed)
    assert drawn(10, 40, dark) and drawn(40, 80, dark) and not drawn(20, 50, dark)
