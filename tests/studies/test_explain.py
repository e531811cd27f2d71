"""Explained generations are those that happen without explaining; disturbed scales are the ones that are named."""

import json

import numpy as np
import pytest
import torch

import varkern
from tests.helpers import caches_closed, relative_error, rendered, small_scorer, small_var
from varkern.studies import explain as explaining
from varkern.studies import perturb as perturbing
from varkern.studies.explain import Explained, explain, shown_ranks
from varkern.studies.perturb import perturb

OPTIONS = {"cfg": 1.5, "top_k": 20}
SEED = varkern.image_seeds(3, 1)


@pytest.fixture(scope="module")
def model():
    return small_var()


@pytest.fixture(scope="module")
def scorer():
    return small_scorer()


@pytest.fixture(scope="module", params=[("best", 5), ("resample", 5), ("best", (1, 3, 1, 2, 4))], ids=str)
def explained(request, model, scorer):
    pick, m = request.param
    search = varkern.BestOfM(scorer, m, pick=pick, temperature=5.0)
    with varkern.use_backend("torch"):
        plain = varkern.generate(model, [2], search=search, seeds=SEED, **OPTIONS)
        return explain(model, search, 2, SEED, OPTIONS), plain


class TestExplain:
    def test_watching_changes_nothing(self, explained, model):
        scales, plain = explained
        for scale, scores, choice in zip(scales, plain.scores, plain.choices, strict=True):
            assert (scale.scores is None) == (scores is None)
            if scores is not None:
                assert torch.equal(scale.scores, scores[0]) and scale.kept == int(choice[0])
        assert caches_closed(model)

    def test_the_last_kept_image_is_the_image(self, explained):
        scales, plain = explained
        assert relative_error(scales[-1].images[scales[-1].kept], plain.images[0]) < 1e-5

    def test_kept_images_are_those_of_the_tokens(self, explained, model):
        """Each scale's kept image is the decoded sum of the kept maps up to it."""
        scales, plain = explained
        quantizer = model.vae_quant_proxy[0]
        sums = quantizer.embed_to_fhat([quantizer.codes(ids, k) for k, ids in enumerate(plain.tokens)])
        for scale, f_hat in zip(scales, sums, strict=True):
            image = model.vae_proxy[0].fhat_to_img(f_hat)[0] * 0.5 + 0.5
            assert relative_error(scale.images[scale.kept], image) < 1e-5
            assert scale.side == model.patch_nums[scale.scale]

    def test_every_candidate_in_its_place(self, model, scorer):
        """Candidate j of scale 1 is fused in where it stands, whatever was kept."""
        seen = {}

        class Watching(varkern.BestOfM):
            def choose(self, candidates):
                seen[candidates.scale] = candidates.tokens
                return super().choose(candidates)

        search = Watching(scorer, 20)  # more than are decoded at a time
        scales = explain(model, search, 2, SEED, OPTIONS)
        plain = varkern.generate(model, [2], search=search, seeds=SEED, **OPTIONS)
        quantizer = model.vae_quant_proxy[0]
        for j in (0, 7, 15, 16, 19):
            codes = [quantizer.codes(plain.tokens[0], 0), quantizer.codes(seen[1][:, j], 1)]
            image = model.vae_proxy[0].fhat_to_img(quantizer.embed_to_fhat(codes, last_one=True))[0] * 0.5 + 0.5
            assert relative_error(scales[1].images[j], image) < 1e-5

    def test_alone_is_the_model_without_a_search(self, explained, model):
        scales, _ = explained
        alone = varkern.generate(model, [2], seeds=SEED, **OPTIONS)
        assert relative_error(scales[-1].alone, alone.images[0]) < 1e-5
        assert relative_error(scales[0].alone, scales[0].images[0]) < 1e-6  # nothing was searched yet

    def test_figures_are_json(self, explained):
        scales, plain = explained
        found = json.loads(json.dumps(explaining.as_json(scales, {"m": 5})))
        assert found["settings"] == {"m": 5}
        assert [scale["kept"] for scale in found["scales"]] == [0 if c is None else int(c) for c in plain.choices]
        assert found["scales"][1]["scores"] == pytest.approx(plain.scores[1][0].tolist())

    def test_errors_come_through(self, model):
        def broken(*_):
            raise RuntimeError("a scorer's own")

        with pytest.raises(RuntimeError, match="a scorer's own"):
            explain(model, varkern.BestOfM(broken, 3), 2, SEED)
        assert caches_closed(model)
        with pytest.raises(ValueError, match="first_scale must be < 5"):
            explain(model, varkern.BestOfM(broken, 3, first_scale=9), 2, SEED)

    def test_a_search_that_composes_maps(self, model):
        search = varkern.BlockResample(lambda labels, features, scale: features.mean((2, 3, 4)), 2, 2)
        with pytest.raises(ValueError, match=r"search must keep one .* got BlockResample\(.*composes"):
            explain(model, search, 2, SEED)
        assert caches_closed(model)

    def test_other_models(self):
        with pytest.raises(varkern.UnsupportedModelError):
            explain(torch.nn.Linear(1, 1), varkern.BestOfM(lambda *_: None), 0, SEED)


def colour(number: int) -> tuple[int, int, int]:
    """One that no rim of a letter and no frame has."""
    return number, 0, 255


class TestDrawn:
    def scales(self, count: int, kept: int) -> list[Explained]:
        """Candidate j has the colour ``colour(j)``; scores fall with j, save that the first two are equal."""

        def image(number):
            return (torch.tensor(colour(number)) / 255).view(3, 1, 1).expand(3, 4, 4)

        images = torch.stack([image(j) for j in range(count)])
        scores = -torch.arange(count).float()
        scores[1] = scores[0]
        return [
            Explained(0, 1, image(200).unsqueeze(0), None, 0, image(210)),
            Explained(1, 4, images.flip(0), scores.flip(0), count - 1 - kept, image(220)),
        ]

    @pytest.mark.parametrize("kept", [0, 3, 4])
    def test_sorted_and_framed(self, kept, tmp_path):
        picture = rendered(explaining.draw(self.scales(5, kept), "title"), tmp_path)
        lefts = [np.nonzero((picture == colour(j)).all(-1))[1].min() for j in (1, 0, 2, 3, 4)]  # equal scores: as drawn
        assert lefts == sorted(lefts)
        frame = np.nonzero((picture == (213, 94, 0)).all(-1))
        image = np.nonzero((picture == colour(kept)).all(-1))
        assert (frame[1].min(), frame[1].max()) == (image[1].min() - 6, image[1].max() + 6)
        alone = [np.nonzero((picture == colour(number)).all(-1)) for number in (210, 220)]
        assert min(ys.size for ys, _ in alone) > 0 and alone[0][1].min() > lefts[-1]
        assert alone[0][0].max() < alone[1][0].min()

    def test_of_many_some(self, tmp_path):
        picture = rendered(explaining.draw(self.scales(40, 17), "title"), tmp_path)
        shown = [j for j in range(40) if (picture == colour(j)).all(-1).any()]
        assert len(shown) == 8 and {1, 17, 39} <= set(shown)  # of the two best, 1 was drawn first

    @pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 10, 64, 1000])
    def test_shown_ranks(self, count):
        for kept in {0, 1, count // 3, count // 2, count - 2, count - 1} & set(range(count)):
            ranks = shown_ranks(count, kept)
            assert len(ranks) == min(count, 8) and ranks == sorted(set(ranks))
            assert {0, kept, count - 1} <= set(ranks) and ranks[-1] == count - 1


LABELS, SEEDS = torch.tensor([1, 4, 2]), varkern.image_seeds(5, 3)


@pytest.fixture(scope="module")
def perturbed(model):
    with varkern.use_backend("torch"):
        return perturb(model, LABELS, SEEDS, replacements=3, seed=7, options=OPTIONS)


class TestPerturb:
    def test_undisturbed_images(self, perturbed, model):
        plain = varkern.generate(model, LABELS, seeds=SEEDS, **OPTIONS)
        assert relative_error(perturbed.images, plain.images) < 1e-5
        assert perturbed.labels == (1, 4, 2) and perturbed.sides == tuple(model.patch_nums)

    def test_one_scale_is_replaced_and_all_others_stay(self, perturbed, model):
        """An independent decoding with the same random maps: of the model's own answers none is asked."""
        tokens = varkern.generate(model, LABELS, seeds=SEEDS, **OPTIONS).tokens
        quantizer, generator = model.vae_quant_proxy[0], torch.Generator().manual_seed(7)
        for replacement in range(3):
            for scale, side in enumerate(perturbed.sides):
                noise = torch.randint(64, (3, side * side), generator=generator)
                codes = [quantizer.codes(noise if k == scale else ids, k) for k, ids in enumerate(tokens)]
                f_hat = quantizer.embed_to_fhat(codes, last_one=True)
                images = model.vae_proxy[0].fhat_to_img(f_hat).double() * 0.5 + 0.5
                change = (images - perturbed.images.double()).square().mean((1, 2, 3)).sqrt()
                assert relative_error(perturbed.changes[replacement, scale], change) < 1e-4
                assert perturbed.changes[replacement, scale].min() > 0
                if replacement == 0:
                    assert relative_error(perturbed.examples[scale], images) < 1e-4

    def test_figures(self, perturbed):
        found = json.loads(json.dumps(perturbing.as_json(perturbed, {"seed": 7})))
        changes = perturbed.changes.numpy()
        for k, scale in enumerate(found["scales"]):
            by_image = changes[:, k].mean(0)
            assert scale["change"] == pytest.approx(by_image.mean(), rel=1e-12)
            assert scale["standard_error"] == pytest.approx(by_image.std(ddof=1) / 3**0.5, rel=1e-9)
            assert scale["by_image"] == pytest.approx(by_image.tolist())

    def test_one_image_has_no_error(self, model):
        found = perturb(model, LABELS[:1], SEEDS[:1], replacements=1, options=OPTIONS)
        assert perturbing.as_json(found, {})["scales"][0]["standard_error"] is None

    def test_picture(self, perturbed, tmp_path):
        height, width, _ = rendered(perturbing.draw(perturbed, "title"), tmp_path).shape
        assert width > 6 * 144 and height > 3 * 144

    def test_wrong_arguments(self, model):
        with pytest.raises(ValueError, match="replacements must be >= 1, got 0"):
            perturb(model, LABELS, SEEDS, replacements=0)
        with pytest.raises(varkern.UnsupportedModelError):
            perturb(torch.nn.Linear(1, 1), LABELS, SEEDS)
