"""Sweeps: the figures are those of the images, whoever makes them in how many runs; nothing foreign is joined."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import varkern
from tests.data.helpers import kill_before_changes
from tests.helpers import NUM_CLASSES, on, small_scorer, small_var
from varkern.metrics.arrays import ImageArray
from varkern.metrics.evaluate import evaluate, measure_reference
from varkern.metrics.features import Extracted, Extractor
from varkern.studies import calibration
from varkern.studies import sweep as sweeping
from varkern.studies.calibration import density_ratios
from varkern.studies.cells import Cell, from_json
from varkern.studies.models import Models
from varkern.studies.pictures import to_pixels
from varkern.studies.sweep import Settings, Sweep

SIDE = 12  # pixels of the small model's images
PROJECTION = torch.randn(3 * SIDE * SIDE, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OPTIONS = {"cfg": 1.5, "top_k": 20, "top_p": 0.9}
CELLS = [Cell(), Cell(m=3), Cell(m=(1, 2, 1, 4, 2), pick="resample"), Cell(n=6, representatives=3, min_distance=0.0)]
SETTINGS = Settings(images=22, repeats=2, seed=9, batch_size=8, options=OPTIONS, neighbors=20)
TIMES = ("seconds", "peak_bytes")


def extract(images):
    features = images.double().flatten(1) / 255 @ PROJECTION.to(images.device)
    return Extracted(features, torch.cat((features, features[:, :2] / 2), 1), features[:, :3])  # 7 logits: 7 classes


@pytest.fixture
def extractor(device):
    return Extractor("own", extract, device)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Images of another model as reference."""
    path = tmp_path_factory.mktemp("real") / "real.npz"
    with varkern.use_backend("torch"):
        images = varkern.generate(small_var(seed=5), torch.arange(40) % NUM_CLASSES, seeds=3).images
    np.savez(path, to_pixels(images))
    return ImageArray(path)


@pytest.fixture
def reference(real, extractor):
    return measure_reference(real, None, extractor, keep=20)


@pytest.fixture
def models(device):
    loaded = []

    def load():
        loaded.append("model")
        return on(small_var(), device)

    models = Models({"": load}, {"": lambda: small_scorer().to(device)}, {"": "first"})
    models.loaded = loaded
    return models


@pytest.fixture
def sweep(models, extractor, reference):
    def make(folder, cells=CELLS, settings=SETTINGS, **changed):
        given = {"models": models, "extractor": extractor, "reference": reference, **changed}
        return Sweep(folder, cells, settings, **given)

    return make


def figures(entries):
    return {
        entry.cell.name: [{k: v for k, v in repeat.items() if k not in TIMES} for repeat in entry.repeats]
        for entry in entries
    }


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(sweeping, "SPLIT", 8)


FURTHER = [Cell(m=2, proposals=3, pick="resample"), Cell(m=2, n=6, representatives=3, min_distance=0.0)]


@pytest.mark.parametrize("cell", [*CELLS, *FURTHER], ids=lambda cell: cell.name)
def test_figures_are_those_of_the_images(sweep, models, extractor, real, tmp_path, device, cell):
    """Generated again in one call a batch, written to a file, and measured as ``varkern evaluate`` does."""
    (entry,) = sweep(tmp_path / "sweep", [cell], replace(SETTINGS, repeats=1)).run()
    (found,) = entry.repeats
    search = cell.search(small_scorer().to(device), found["alpha"])
    labels, seeds = torch.arange(22) % NUM_CLASSES, varkern.image_seeds(9, 22)
    told = [
        varkern.generate(on(small_var(), device), labels[part], search=search, seeds=seeds[part], **OPTIONS)
        for part in torch.arange(22).split(8)
    ]
    pixels = to_pixels(torch.cat([part.images for part in told]))
    np.savez(tmp_path / "images.npz", pixels)
    report = evaluate(ImageArray(tmp_path / "images.npz"), real, None, extractor, batch_size=8, keep=20)
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert found[name] == pytest.approx(getattr(report, name), rel=1e-9), name
    for name, value in report.fid_parts._asdict().items():
        assert name == "distance" or found[name] == pytest.approx(value, rel=1e-9)
    best = extract(torch.from_numpy(pixels).movedim(-1, 1)).logits.argmax(1)
    assert found["accuracy"] == (best == labels).double().mean().item()
    assert found["seconds"] > 0 and from_json(found["cell"]) == cell and found["seed"] == 9
    if cell.n == 1:
        assert found["dense"] is None and found["alpha"] is None
    else:
        densities = torch.cat([part.scores[1] for part in told]).cpu()
        dense = densities.amax(1) >= found["alpha"] * densities.mean(1)
        assert found["dense"] == dense.double().mean().item() and 0 < found["dense"] < 1
    scores = [
        [s for k, s in enumerate(part.scores) if s is not None and (cell.n, cell.scale) != (6, k)] for part in told
    ]
    counts = [s.shape[1] for part in scores for s in part for _ in range(len(s))] if cell.scores else []
    assert found["scored"] == (sum(counts) / len(counts) if counts else None)


def test_seeds_and_cells_differ(sweep, tmp_path):
    """Two seeds and two cells are four different sets of images."""
    alone, searched = (
        entry.repeats for entry in sweep(tmp_path, [Cell(), Cell(n=2, representatives=1, alpha=9.0)]).run()
    )
    assert [repeat["seed"] for repeat in alone] == [9, 10]
    assert len({repeat["fid"] for repeat in (*alone, *searched)}) == 4


def test_parts_and_processes_change_nothing(sweep, tmp_path, monkeypatch):
    whole = figures(sweep(tmp_path / "whole", CELLS[1:4:2]).run())
    monkeypatch.setattr(sweeping, "SPLIT", 8)
    found = []
    for world in (1, 3):
        folder = tmp_path / f"{world}"
        told = [sweep(folder, CELLS[1:4:2], share=(rank, world)).run() for rank in range(world)]
        assert all(entries is None for entries in told[:-1]) and told[-1] is not None
        found.append(figures(told[-1]))
        assert not list((folder / "progress").rglob("*.safetensors"))
    assert all(other == found[0] for other in found[1:])
    for name, repeats in found[0].items():
        for repeat, wanted in zip(repeats, whole[name], strict=True):
            for key, value in wanted.items():
                assert repeat[key] == (pytest.approx(value, rel=1e-10) if isinstance(value, float) else value), key


def test_torchrun_tells_the_share(sweep, tmp_path, monkeypatch, small_parts):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sweep(tmp_path).run() is None
    monkeypatch.setenv("RANK", "0")
    assert sweep(tmp_path).run() is not None
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK must be in"):
        sweep(tmp_path)


class TestGoingOn:
    def test_interrupted(self, sweep, tmp_path, monkeypatch, small_parts):
        unbroken, made = figures(sweep(tmp_path / "unbroken", CELLS[2:]).run()), []
        make = Sweep.make

        def limited(self, unit, advance):
            if len(made) % 6 == 5:
                made.append(None)
                raise KeyboardInterrupt
            made.append(unit)
            make(self, unit, advance)

        monkeypatch.setattr(Sweep, "make", limited)
        entries = None
        for _ in range(20):
            try:
                entries = sweep(tmp_path / "broken", CELLS[2:]).run()
                break
            except KeyboardInterrupt:
                continue
        assert figures(entries) == unbroken
        units = [unit for unit in made if unit is not None]
        assert len(units) == len(set(units)) == 2 * 2 * 3 and len(made) > len(units)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot fork")
    def test_killed_at_any_moment(self, sweep, tmp_path, small_parts):
        """A forked run is killed before a random change on disk, again and again, until one comes to its end."""
        unbroken = figures(sweep(tmp_path / "unbroken", CELLS[:2]).run())
        folder = tmp_path / "killed"
        assert kill_before_changes(lambda: sweep(folder, CELLS[:2]).run(), folder, random.Random(0)) >= 3
        assert figures(sweep(folder, CELLS[:2]).run()) == unbroken

    def test_what_is_there_is_not_made_again(self, sweep, models, tmp_path, monkeypatch):
        first = sweep(tmp_path).run()
        monkeypatch.setattr(sweeping, "generate", lambda *given, **named: pytest.fail("an image was made"))
        del models.loaded[:]
        models._model = None
        assert sweep(tmp_path).run() == first and not models.loaded

    def test_the_parts_stay_until_their_result_is_written(self, sweep, tmp_path, monkeypatch, small_parts):
        write, written = sweeping.write_json, []

        def killed(path, content):
            if path.parent.parent.name == "results" and not written:
                written.append(path)
                raise KeyboardInterrupt
            write(path, content)

        monkeypatch.setattr(sweeping, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path, CELLS[1:2]).run()
        parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "progress").rglob("*.safetensors")}
        assert len(parts) == 3 and not written[0].exists()
        monkeypatch.setattr(Sweep, "make", lambda self, unit, advance: pytest.fail("a part was made again"))
        sweep(tmp_path, CELLS[1:2], share=(2, 6)).run()  # whose share is the first seed's last part
        assert written[0].exists() and not any(path.exists() for path in parts)

    def test_more_cells_and_more_seeds(self, sweep, tmp_path, monkeypatch):
        sweep(tmp_path, CELLS[:1], replace(SETTINGS, repeats=1)).run()
        made, make = [], Sweep.make
        monkeypatch.setattr(Sweep, "make", lambda self, unit, *given: (made.append(unit), make(self, unit, *given)))
        entries = sweep(tmp_path, CELLS[:2]).run()
        assert [(unit.repeat, unit.cell) for unit in made] == [(0, CELLS[1]), (1, CELLS[0]), (1, CELLS[1])]
        assert [len(entry.repeats) for entry in entries] == [2, 2]

    @pytest.mark.parametrize(
        "changed", [{"images": 31}, {"seed": 8}, {"options": {"cfg": 2.0}}, {"batch_size": 4}, {"facts": {"var": "b"}}]
    )
    def test_other_settings_are_refused(self, sweep, tmp_path, changed):
        sweep(tmp_path, CELLS[:1], replace(SETTINGS, repeats=1)).run()
        with pytest.raises(ValueError, match="was made with other settings"):
            sweep(tmp_path, CELLS[:1], replace(SETTINGS, repeats=1, **changed)).run()

    def test_another_scorer_of_the_same_name_is_refused(self, sweep, models, tmp_path):
        sweep(tmp_path, CELLS[:2]).run()
        other = Models(models.models, models.scorers, {"": "second"})
        assert sweep(tmp_path, CELLS[:1], models=other).run() is not None
        with pytest.raises(ValueError, match=r"made with other settings \(scorer was 'first', now 'second'\)"):
            sweep(tmp_path, CELLS[:2], models=other).run()

    @pytest.mark.parametrize("what", ["scorer", "model"])
    def test_parts_made_with_another_are_refused(self, sweep, models, tmp_path, monkeypatch, small_parts, what):
        """A run killed between the parts of a cell, and taken up with another scorer or model of the same name."""
        make = Sweep.make

        def once(self, unit, advance):
            if unit.part:
                raise KeyboardInterrupt
            make(self, unit, advance)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Sweep, "make", once)
            sweep(tmp_path, CELLS[1:2]).run()
        facts = {"scorer_facts": {"": "first"}, f"{what}_facts": {"": "second"}}
        other = Models(models.models, models.scorers, **facts)
        with pytest.raises(ValueError, match=rf"made with other settings \({what}"):
            sweep(tmp_path, CELLS[1:2], models=other).run()
        assert sweep(tmp_path, CELLS[1:2]).run() is not None

    def test_parts_of_a_process_with_another_scorer_are_refused(self, sweep, models, tmp_path, small_parts):
        assert sweep(tmp_path, CELLS[1:2], share=(1, 2)).run() is None
        other = Models(models.models, models.scorers, {"": "second"})
        with pytest.raises(ValueError, match=r"made with other settings \(scorer"):
            sweep(tmp_path, CELLS[1:2], models=other, share=(0, 2)).run()

    def test_a_refused_run_leaves_no_settings(self, sweep, tmp_path):
        wrong = replace(SETTINGS, options={**OPTIONS, "top_p": 1.5})
        with pytest.raises(ValueError, match="top_p"):
            sweep(tmp_path, CELLS[:1], wrong).run()
        assert sweep(tmp_path, CELLS[:1]).run() is not None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
    def test_a_second_run_at_the_same_time_is_refused(self, sweep, tmp_path, monkeypatch):
        make, refused = Sweep.make, []

        def nested(self, unit, advance):
            if not refused and os.fork() == 0:  # a lock is a process's own
                try:
                    sweep(tmp_path).run()
                except ValueError as error:
                    (tmp_path / "refused").write_text(str(error))
                os._exit(0)
            if not refused:
                refused.append(os.wait())
            make(self, unit, advance)

        monkeypatch.setattr(Sweep, "make", nested)
        sweep(tmp_path, CELLS[:1]).run()
        assert "is being written by another process" in (tmp_path / "refused").read_text()


class TestTiming:
    def test_nothing_but_time(self, sweep, tmp_path, monkeypatch):
        """One batch more is made than is timed, and its time is left out."""
        calls, generate = [], sweeping.generate

        def timed(model, labels, **given):
            calls.append(len(labels))
            told = generate(model, labels, **given)
            return told._replace(seconds=[100.0 if len(calls) % 3 == 1 else float(len(calls))])

        monkeypatch.setattr(sweeping, "generate", timed)
        settings = replace(SETTINGS, images=8, batch_size=4, repeats=1, timing=True)
        entries = sweep(tmp_path, CELLS[:2], settings, extractor=None, reference=None).run()
        assert calls == [4] * 6
        assert [entry.repeats[0]["seconds"] for entry in entries] == [(2 + 3) / 2 / 4, (5 + 6) / 2 / 4]
        assert all("fid" not in entry.repeats[0] and entry.repeats[0]["accuracy"] is None for entry in entries)


class TestAlpha:
    def test_every_other_image_is_dense(self, sweep, models, tmp_path, device):
        cell = Cell(n=6, min_distance=0.0)
        (entry,) = sweep(tmp_path, [cell], replace(SETTINGS, repeats=1)).run()
        ratios = density_ratios(on(small_var(), device), cell, OPTIONS)
        assert len(ratios) == calibration.CALIBRATION_IMAGES
        assert entry.repeats[0]["alpha"] == round(float(ratios.median()), 4)
        search = replace(cell, alpha=entry.repeats[0]["alpha"]).density()
        labels = torch.arange(200) % NUM_CLASSES
        told = varkern.generate(on(small_var(), device), labels, search=search, seeds=77, **OPTIONS)
        # 200 other images: six standard errors, false alarms below 1e-8, and as much for the median's own error.
        assert abs(search.dense(told.scores[1]).double().mean().item() - 0.5) < 6 * 0.5 * (1 / 200 + 1 / 500) ** 0.5

    def test_ratios_image_by_image(self, device):
        cell = Cell(n=6, scale=2, metric="cosine", min_distance=0.0)
        seeds, search = varkern.image_seeds(calibration.CALIBRATION_SEED, 15), replace(cell, strategy="top").density()
        told = varkern.generate(
            on(small_var(), device), torch.arange(15) % NUM_CLASSES, search=search, seeds=seeds, **OPTIONS
        )
        wanted = [max(row) / (sum(row) / 6) for row in told.scores[2].tolist()]
        found = density_ratios(on(small_var(), device), cell, OPTIONS, images=15)
        assert found.tolist() == pytest.approx(wanted, rel=1e-6)

    def test_found_once_for_searches_of_the_same_samples(self, sweep, tmp_path, monkeypatch):
        found, ratios = [], sweeping.density_ratios
        monkeypatch.setattr(sweeping, "density_ratios", lambda *given: (found.append(given[1]), ratios(*given))[1])
        cells = [Cell(n=6), Cell(n=6, representatives=2), Cell(n=6, scale=2), Cell(n=6, metric="cosine")]
        sweep(tmp_path, cells, replace(SETTINGS, repeats=2, images=10)).run()
        assert found == [cells[0], cells[2], cells[3]]


class TestWrong:
    @pytest.mark.parametrize(
        "cells, changed, message",
        [
            ([], {}, "cells must have at least one cell"),
            (CELLS, {"images": 1}, "images must be >= 2, got 1"),
            (CELLS, {"repeats": 0}, "repeats must be >= 1, got 0"),
            (CELLS, {"batch_size": 0}, "batch_size must be >= 1, got 0"),
            (CELLS, {"neighbors": -1}, "neighbors must be >= 0, got -1"),
            ([Cell(m=2, scorer="other")], {}, "needs scorer 'other', the given scorers are ''"),
            ([Cell(model="d16")], {}, "needs model 'd16'"),
        ],
    )
    def test_raises_before_any_work(self, sweep, tmp_path, cells, changed, message):
        with pytest.raises(ValueError, match=message):
            sweep(tmp_path / "out", cells, replace(SETTINGS, **changed))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("missing", ["extractor", "reference"])
    def test_nothing_to_measure_by(self, sweep, tmp_path, missing):
        with pytest.raises(ValueError, match="extractor and reference must be given"):
            sweep(tmp_path, **{missing: None})

    @pytest.mark.parametrize(
        "cell, message",
        [
            (Cell(m=2, first_scale=5), "first_scale must be < 5"),
            (Cell(m=(1, 2, 4)), "m must have one number for each of 5 scales"),
            (Cell(m=2, pick="worst"), "pick must be"),
            (Cell(n=4, scale=7), "scale"),
        ],
    )
    def test_a_cell_that_does_not_fit(self, sweep, tmp_path, monkeypatch, cell, message):
        monkeypatch.setattr(sweeping, "generate", lambda *given, **named: pytest.fail("an image was made"))
        with pytest.raises(ValueError, match=message):
            sweep(tmp_path, [Cell(), cell]).run()

    def test_features_that_are_not_finite(self, sweep, tmp_path, device):
        def spoiled(images):
            features = extract(images).features
            features[2, 1] = float("nan")
            return features, None

        with pytest.raises(ValueError, match=r"NaN or infinity for 1 images, the first is image 2 in cell"):
            sweep(tmp_path, CELLS[:1], extractor=Extractor("own", spoiled, device)).run()
        assert not list(tmp_path.rglob("*.safetensors"))
        assert sweep(tmp_path, CELLS[:1]).run() is not None

    def test_a_reference_of_another_extractor(self, sweep, tmp_path, device):
        shorter = Extractor("own", lambda images: (extract(images).features[:, :4], None), device)
        with pytest.raises(ValueError, match="must have 4 features, as extractor own gives, got 5"):
            sweep(tmp_path, CELLS[:1], extractor=shorter).run()


def test_one_model_at_a_time(sweep, extractor, reference, device, tmp_path):
    loaded = []

    def loader(name, seed):
        def load():
            loaded.append(name)
            return on(small_var(seed=seed), device)

        return load

    models = Models({"a": loader("a", 0), "b": loader("b", 3)}, {"a": lambda: small_scorer().to(device)}, {"a": "x"})
    cells = [Cell(model="a"), Cell(model="a", m=2, scorer="a"), Cell(model="b")]
    entries = sweep(tmp_path, cells, replace(SETTINGS, repeats=1), models=models).run()
    assert loaded == ["a", "b", "a", "b"]  # looked at once before any work, then used
    assert len({entry.repeats[0]["fid"] for entry in entries}) == 3


def test_results_are_json(sweep, tmp_path):
    sweep(tmp_path, CELLS[:2], replace(SETTINGS, repeats=1)).run()
    path = tmp_path / "results" / "m=3" / "seed-9.json"
    assert json.loads(path.read_text())["scorer"] == "first"
    assert json.loads((tmp_path / "settings.json").read_text())["images"] == 22


def test_blocks_of_one_whole_map_use_the_scorer(models):
    """Also where m is 1, which means no search for best-of-M."""
    cell = Cell(m=1, proposals=2, pick="resample", scorer="missing")
    known = replace(cell, scorer="")
    assert models.scorer(known) is not None and models.facts(known)["scorer"] == "first"
    with pytest.raises(ValueError, match="needs scorer 'missing'"):
        models.check([cell])
    assert models.scorer(Cell()) is None and models.facts(Cell())["scorer"] is None
