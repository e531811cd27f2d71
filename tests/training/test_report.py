"""A scorer's figures by scale, against forms written out here, and their picture."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.small import CONFIG, TRAINING, maker, small_datasets
from varkern import Scorer
from varkern.training import report as scores
from varkern.training.pairs import fingerprint, make_pairs
from varkern.training.report import PairScores


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return small_datasets(tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def scorer():
    torch.manual_seed(3)
    return Scorer(CONFIG).eval().requires_grad_(False)


def normal(count, mean, seed, scales=3):
    return torch.randn(count, scales, generator=torch.Generator().manual_seed(seed)) + mean


class TestFigures:
    def test_by_scale(self):
        real, generated = normal(500, 0.7, 0), normal(500, 0.0, 1)
        real[:5, 1] = generated[:5, 1]
        found = scores.figures(PairScores(real, generated), first_scale=0)
        assert found["pairs"] == 500 and [row["scale"] for row in found["scales"]] == [0, 1, 2]
        for column, row in enumerate(found["scales"]):
            r, g = real[:, column].double().numpy(), generated[:, column].double().numpy()
            accuracy = ((r > g) + 0.5 * (r == g)).mean()
            assert row["accuracy"] == pytest.approx(accuracy)
            assert row["accuracy_standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 500))
            assert row["pairwise_loss"] == pytest.approx(np.log1p(np.exp(g - r)).mean(), rel=1e-6)
            pointwise = (np.log1p(np.exp(-r)) + np.log1p(np.exp(g))).mean() / 2
            assert row["pointwise_loss"] == pytest.approx(pointwise, rel=1e-6)
            assert row["mean_difference"] == pytest.approx(r.mean() - g.mean())

    @pytest.mark.parametrize("first_scale, columns", [(0, slice(1, None)), (1, slice(None)), (2, slice(None))])
    def test_scales_from_the_second_together(self, first_scale, columns):
        real, generated = normal(200, 1.0, 2), normal(200, 0.0, 3)
        together = scores.figures(PairScores(real, generated), first_scale)["scales_from_the_second"]
        wanted = scores.distance(real[:, columns].flatten(), generated[:, columns].flatten())
        assert together == wanted

    def test_nothing_but_the_first_scale(self):
        found = scores.figures(PairScores(normal(20, 1.0, 2, 1), normal(20, 0.0, 3, 1)), 0)
        assert found["scales_from_the_second"] is None and len(found["scales"]) == 1


class TestDistance:
    def test_histogram_is_numpys(self):
        real, generated = normal(300, 1.0, 4).flatten(), normal(200, 0.0, 5).flatten()
        found = scores.histogram(real, generated)
        both = torch.cat((real, generated)).double().numpy()
        edges = np.linspace(both.min(), both.max(), 51)
        assert found["edges"] == pytest.approx(edges.tolist())
        for name, values in (("real", real), ("generated", generated)):
            assert found[name] == np.histogram(values.double().numpy(), edges)[0].tolist()
        assert sum(found["real"]) == 900 and sum(found["generated"]) == 600

    def test_kl_is_its_definition(self):
        p, q = [3, 0, 5], [1, 1, 0]
        shares = [[(n + 0.5) / (sum(counts) + 1.5) for n in counts] for counts in (p, q)]
        wanted = sum(a * math.log(a / b) for a, b in zip(*shares, strict=True))
        assert scores.kl_divergence(p, q) == pytest.approx(wanted)
        assert scores.kl_divergence(p, p) == 0 and scores.kl_divergence(p, q) != pytest.approx(
            scores.kl_divergence(q, p)
        )

    def test_kl_of_two_normal_distributions(self):
        """Means one apart, both of variance 1: 1/2 nat."""
        found = scores.distance(normal(200_000, 1.0, 6, 1)[:, 0], normal(200_000, 0.0, 7, 1)[:, 0])
        assert found["kl_real_generated"] == pytest.approx(0.5, abs=0.02)
        assert found["kl_generated_real"] == pytest.approx(0.5, abs=0.02)
        assert found["mean_difference"] == pytest.approx(1.0, abs=0.02)

    def test_each_kl_has_its_own_direction(self):
        """Equal means, deviations 1 and 3/2: ln 3/2 + 2/9 - 1/2 nat, and 9/8 - 1/2 - ln 3/2 the other way."""
        found = scores.distance(normal(200_000, 0.0, 6, 1)[:, 0], 1.5 * normal(200_000, 0.0, 7, 1)[:, 0])
        assert found["kl_real_generated"] == pytest.approx(math.log(3 / 2) + 2 / 9 - 1 / 2, abs=0.02)
        assert found["kl_generated_real"] == pytest.approx(9 / 8 - 1 / 2 - math.log(3 / 2), abs=0.02)

    def test_all_scores_equal(self):
        found = scores.distance(torch.ones(10), torch.ones(10))
        assert found["mean_difference"] == 0 and found["kl_real_generated"] == 0
        assert sum(found["histogram"]["real"]) == 10


class TestScorePairs:
    @pytest.mark.parametrize("first_scale", [0, 1])
    @pytest.mark.parametrize("batch_size", [4, 100])
    def test_every_pair_scored_alone(self, first_scale, batch_size, datasets, scorer):
        part, make = make_pairs(*datasets, 0.2, 5).validation, maker()
        found = scores.score_pairs(scorer, make, part, first_scale, batch_size)
        for i, batch in enumerate(part.fixed_batches(1)):
            for side, tokens in zip(found, batch[:2], strict=True):
                wanted = [scorer(batch.labels, make(tokens)[:, k : k + 1], k).item() for k in range(first_scale, 3)]
                assert side[i].tolist() == pytest.approx(wanted, abs=1e-5)
        assert len(found.real) == len(part) == i + 1


class TestWhichPairs:
    def facts(self, datasets, **changes):
        prints = {"real": fingerprint(datasets[0]), "generated": fingerprint(datasets[1])}
        return {"settings": {**prints, "validation": 0.2, "seed": 5, **changes}}

    def test_held_out_of_its_training(self, datasets):
        part, which = scores.select_part(*datasets, self.facts(datasets))
        wanted = make_pairs(*datasets, TRAINING.validation, TRAINING.seed).validation
        assert np.array_equal(part.real, wanted.real) and which == "held out of the scorer's training"

    @pytest.mark.parametrize("changes", [{"real": "other"}, {"generated": "other"}])
    def test_other_maps(self, changes, datasets):
        part, which = scores.select_part(*datasets, self.facts(datasets, **changes))
        assert len(part) == 50 and which.startswith("of other maps")

    def test_nothing_was_held_out(self, datasets):
        part, which = scores.select_part(*datasets, self.facts(datasets, validation=0.0))
        assert len(part) == 50 and which == "used for the scorer's training: none was held out"

    def test_nothing_is_known(self, datasets):
        assert len(scores.select_part(*datasets, {})[0]) == 50


class TestReport:
    def test_files(self, datasets, scorer, tmp_path):
        report = scores.judge(scorer, "small.safetensors", {}, *datasets, maker(), 0)
        paths = scores.write_report(report, tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(paths)
        assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))
        assert len(report["scales"]) == 3 and report["pairs"] == 50

    @pytest.mark.parametrize("num_scales", [1, 10])
    def test_picture(self, num_scales, tmp_path):
        """Both colours of the histograms, and a panel more for ten scales' histograms, are in a picture of its size."""
        found = scores.figures(PairScores(normal(300, 2.0, 8, num_scales), normal(300, 0.0, 9, num_scales)), 0)
        report = {"scorer": "small", "loss": "pairwise", "pairs_are": "made up", **found}
        scores.draw(report, tmp_path / "scores.png")
        pixels = np.asarray(Image.open(tmp_path / "scores.png").convert("RGB")).astype(int)
        reddish = (pixels[..., 0] - pixels[..., 2] > 60).sum()
        bluish = (pixels[..., 2] - pixels[..., 0] > 60).sum()
        assert reddish > 1000 and bluish > 1000
        panels = num_scales + (num_scales > 1)
        columns = 3 if panels <= 6 else 4
        assert pixels.shape[:2] == (round(3.2 * (-(-panels // columns) + 1) * 120), round(4.2 * columns * 120))

    def test_no_text_of_the_picture_overlaps(self, monkeypatch, tmp_path):
        """Titles, labels and legends of ten scales, by the boxes that matplotlib drew them in."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figures = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))[1]
        )
        found = scores.figures(PairScores(normal(300, 2.0, 8, 10), normal(300, 0.0, 9, 10)), 0)
        report = {"scorer": "a_scorer_of_a_long_name.safetensors", "loss": "pairwise", "pairs_are": "made up", **found}
        scores.draw(report, tmp_path / "scores.png")
        figure = figures[0]
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        axes = [axis for sub in figure.subfigs for axis in sub.axes if axis.get_visible()]
        texts = [text for axis in axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label)]
        texts = [text for text in [figure._suptitle, *texts] if text.get_text()]
        boxes = [text.get_window_extent(renderer) for text in texts]
        for i, first in enumerate(boxes):
            assert first.x0 >= 0 and first.y0 >= 0 and first.x1 <= figure.bbox.x1 and first.y1 <= figure.bbox.y1
            for j, second in enumerate(boxes[:i]):
                assert not first.overlaps(second), (texts[i].get_text(), texts[j].get_text())
        legend = axes[2].get_legend().get_window_extent(renderer)
        assert not any(legend.overlaps(box) for box in boxes)

    def test_markdown_of_one(self, datasets, scorer):
        text = scores.as_markdown([scores.judge(scorer, "small", {}, *datasets, maker(), 0)])
        assert text.count("\n") == 5 and text.startswith("| scale | accuracy | pairwise loss | pointwise loss |")

    def test_markdown_of_two(self):
        """Table 10: with and without the first scale."""
        first = {"scorer": "with", "scales": [{"scale": 0, "accuracy": 0.5}, {"scale": 1, "accuracy": 0.75}]}
        second = {"scorer": "without", "scales": [{"scale": 1, "accuracy": 0.5}]}
        lines = scores.as_markdown([first, second]).splitlines()
        assert lines[0] == "| scale | accuracy, with | accuracy, without | change |"
        assert lines[2:] == ["| 0 | 0.500 | - | - |", "| 1 | 0.750 | 0.500 | -0.250 |"]

    def test_a_scorer_that_does_not_fit(self, datasets):
        other = Scorer(type(CONFIG)(**{**CONFIG.__dict__, "num_classes": 9}))
        with pytest.raises(ValueError, match="num_classes must be 3"):
            scores.judge(other, "other", {}, *datasets, maker(), 0)
        with pytest.raises(ValueError, match=r"first_scale must be in 0\.\.2, .* got 3"):
            scores.judge(other, "other", {}, *datasets, maker(), 3)
