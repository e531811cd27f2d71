"""Training of a scorer: several ranks, the schedule, validation, and what is refused."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from varkern import Scorer
from varkern.data import TokenMaps
from varkern.ops import use_backend
from varkern.training import scorer as training_scorer
from varkern.training.loop import schedule
from varkern.training.recipe import LOSSES
from varkern.training.scorer import read_facts, train_scorer

from .small import (
    CONFIG,
    SIDES,
    TRAINING,
    VOCABULARY,
    differing,
    free_port,
    interrupt,
    maker,
    pairs_in,
    random_tokens,
    rows_of,
    small_datasets,
    start_child,
    steps_in,
    train,
    wait_for,
    without_times,
    write_maps,
)


class TestRanks:
    def run(self, folder, out, size, training=TRAINING, code=0):
        """Train in ``size`` processes that ``torchrun`` could have started."""
        port = free_port()

        def rank(number):
            addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(addresses, RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size))
            train(folder, out, training, every=3)

        children = [start_child(lambda number=number: rank(number)) for number in range(size)]
        assert [wait_for(child) for child in children] == [code] * size

    @pytest.mark.parametrize("changes", [{"loss": "pairwise", "eps": 1e-5}, {"loss": "pointwise"}], ids=str)
    def test_two_ranks_equal_one_of_twice_the_batch(self, changes, folder, tmp_path):
        training = replace(TRAINING, **changes)
        self.run(folder, tmp_path / "two.safetensors", 2, training)
        assert wait_for(start_child(lambda: train(folder, tmp_path / "one.safetensors", training, every=3))) == 0
        one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
        assert max((one[name] - start).abs().max().item() for name, start in initial().items()) > 1e-2
        first, second = (rows_of(tmp_path / f"{name}.csv") for name in ("one", "two"))
        assert len(first) == len(second) > 3
        for row, other in zip(without_times(first), without_times(second), strict=True):
            for name, value in row.items():
                assert (value == other[name] == "") or float(value) == pytest.approx(float(other[name]), abs=1e-4)
        assert read_facts(tmp_path / "two.safetensors")["ranks"] == 2

    def test_a_pairwise_scorer_differs_where_its_loss_has_no_gradient(self, folder, tmp_path):
        """With Adam's usual eps rounding is all that moves the last hidden biases; see ``ScorerTraining``."""
        self.run(folder, tmp_path / "two.safetensors", 2)
        found, wanted = load_file(tmp_path / "two.safetensors"), load_file(folder / "unbroken.safetensors")
        differences = {name: (found[name] - wanted[name]).abs().max().item() for name in found}
        assert differences.pop("fuser.2.bias") < 5e-3 and max(differences.values()) < 1e-5

    def test_a_run_of_one_rank_goes_on_with_two(self, folder, tmp_path, monkeypatch, every_step):
        out, training = tmp_path / "scorer.safetensors", replace(TRAINING, loss="pointwise")
        interrupt(monkeypatch, folder, out, training=training)
        self.run(folder, out, 2, training)
        assert wait_for(start_child(lambda: train(folder, tmp_path / "one.safetensors", training, every=3))) == 0
        found, wanted = load_file(out), load_file(tmp_path / "one.safetensors")
        assert max((found[name] - wanted[name]).abs().max().item() for name in found) < 1e-5

    def test_a_batch_that_does_not_divide(self, folder, tmp_path):
        self.run(folder, tmp_path / "scorer.safetensors", 2, replace(TRAINING, batch_size=7), code=1)
        assert list(tmp_path.iterdir()) == []


def initial() -> dict[str, torch.Tensor]:
    torch.manual_seed(TRAINING.seed)
    return Scorer(CONFIG).state_dict()


class TestWhatIsTrained:
    def test_learning_rate_follows_the_papers_schedule(self, folder):
        steps, warmup = steps_in(folder)
        assert (steps, warmup) == (math.ceil(2 * 38 / 8), math.ceil(0.5 * 38 / 8))
        rows = rows_of(folder / "unbroken.csv")
        for row in rows:
            wanted = TRAINING.learning_rate * schedule(int(row["step"]) - 1, steps, warmup)
            assert float(row["learning_rate"]) == pytest.approx(wanted, rel=1e-6, abs=1e-18)

    def test_csv(self, folder):
        rows, steps = rows_of(folder / "unbroken.csv"), steps_in(folder)[0]
        epochs = {math.ceil(38 / 8), steps}
        assert [int(row["step"]) for row in rows] == sorted({3, 6, 9} | epochs)
        for row in rows:
            assert float(row["epoch"]) == pytest.approx(int(row["step"]) * 8 / 38)
            assert float(row["loss"]) > 0 and float(row["examples_per_second"]) > 0
            shares = [float(row[f"{phase}_share"]) for phase in ("data", "fuse", "model")]
            assert sum(shares) == pytest.approx(1) and min(shares) > 0
            validated = [row[f"validation_{name}_{scale}"] for name in ("loss", "accuracy") for scale in range(3)]
            assert all(validated) if int(row["step"]) in epochs else not any(validated)

    def test_loss_in_the_csv_is_the_mean_of_the_steps(self, folder, tmp_path, monkeypatch):
        losses, loss = [], training_scorer.Trainer.batch_loss

        def noted(trainer, step):
            value = loss(trainer, step)
            losses.append(value.item())
            return value

        monkeypatch.setattr(training_scorer.Trainer, "batch_loss", noted)
        train(folder, tmp_path / "scorer.safetensors", every=3)
        before = 0
        for row in rows_of(tmp_path / "scorer.csv"):
            step = int(row["step"])
            assert float(row["loss"]) == pytest.approx(sum(losses[before:step]) / (step - before), rel=1e-5)
            before = step

    @pytest.mark.parametrize("loss", sorted(LOSSES))
    def test_validation_is_that_of_the_saved_scorer(self, loss, folder, tmp_path):
        """On the held-out pairs, computed here pair by pair."""
        facts = train(folder, tmp_path / "scorer.safetensors", replace(TRAINING, loss=loss))
        scorer, make = Scorer.from_pretrained(tmp_path / "scorer.safetensors"), maker()
        losses, right = [], []
        for batch in pairs_in(folder).validation.fixed_batches(1):
            real, generated = (scorer(batch.labels, make(tokens), torch.arange(3)).double() for tokens in batch[:2])
            losses.append(LOSSES[loss](real, generated))
            right.append((real > generated).double() + 0.5 * (real == generated))
        assert facts["validation"]["loss"] == pytest.approx(torch.cat(losses).mean(0).tolist(), rel=1e-5)
        assert facts["validation"]["accuracy"] == pytest.approx(torch.cat(right).mean(0).tolist())
        assert facts["held_out"] == len(losses) == 12

    def test_held_out_images_are_never_trained_on(self, folder, tmp_path):
        """Whatever stands in their place, the weights are the same."""
        held = pairs_in(folder).validation
        for name, places in (("real", held.real), ("generated", held.generated)):
            maps = TokenMaps.open(folder / name)
            tokens = maps.gather(range(len(maps)))
            tokens[places] = random_tokens(len(places), 99)
            write_maps(tmp_path / name, maps.labels, tokens)
        assert wait_for(start_child(lambda: train(tmp_path, tmp_path / "scorer.safetensors", every=3))) == 0
        assert differing(tmp_path / "scorer.safetensors", folder / "unbroken.safetensors") == []

    def test_it_learns(self, tmp_path):
        """Real maps of four codes against generated ones of all: chance is 0.5, a perfect judge is near 1."""
        small_datasets(tmp_path, 150, 150, codes=4)
        training = replace(TRAINING, epochs=8.0, learning_rate=1e-2, batch_size=16)
        facts = train(tmp_path, tmp_path / "scorer.safetensors", training)
        assert facts["held_out"] == 30 and facts["validation"]["accuracy"][2] > 0.8

    @pytest.mark.parametrize("changes", [{"loss": "pointwise"}, {"first_scale": 1}, {"seed": 6}], ids=str)
    def test_a_setting_changes_the_scorer(self, changes, folder, tmp_path):
        train(folder, tmp_path / "scorer.safetensors", replace(TRAINING, **changes))
        assert "conv_stage_1.0.conv1.weight" in differing(
            tmp_path / "scorer.safetensors", folder / "unbroken.safetensors"
        )

    def test_the_first_scale_is_not_trained_where_it_is_left_out(self, folder, tmp_path):
        facts = train(folder, tmp_path / "scorer.safetensors", replace(TRAINING, first_scale=1))
        trained, start = load_file(tmp_path / "scorer.safetensors"), initial()
        moved = (trained["stage_label_embedding.weight"] != start["stage_label_embedding.weight"]).any(1)
        assert moved.tolist() == [False, True, True]
        assert len(facts["validation"]["accuracy"]) == 2
        assert "validation_loss_0" not in rows_of(tmp_path / "scorer.csv")[0]

    def test_bfloat16(self, folder, tmp_path, device):
        training = replace(TRAINING, precision="bfloat16")
        facts = train(folder, tmp_path / "scorer.safetensors", training, device=device)
        unbroken = read_facts(folder / "unbroken.safetensors")
        assert facts["validation"]["loss"] == pytest.approx(unbroken["validation"]["loss"], abs=0.05)
        assert differing(tmp_path / "scorer.safetensors", folder / "unbroken.safetensors")

    def test_on_the_device(self, folder, tmp_path, device):
        """With the kernels where they run, in float32: the CPU's validation."""
        maps = (TokenMaps.open(folder / "real"), TokenMaps.open(folder / "generated"))
        training = replace(TRAINING, precision="float32")
        with use_backend("auto" if device.type == "cuda" else "torch"):
            facts = train_scorer(*maps, maker(), CONFIG, training, tmp_path / "scorer.safetensors", device=device)
        unbroken = read_facts(folder / "unbroken.safetensors")
        assert facts["validation"]["loss"] == pytest.approx(unbroken["validation"]["loss"], abs=1e-3)
        assert facts["device"].startswith(device.type)

    def test_a_constant_is_not_trained_under_the_pairwise_loss(self, folder):
        assert load_file(folder / "unbroken.safetensors")["out_proj.bias"].item() == 0

    def test_facts(self, folder):
        facts = read_facts(folder / "unbroken.safetensors")
        assert facts["settings"]["scorer"]["widths"] == [8] and facts["settings"]["precision"] == "float32"
        assert (facts["pairs"], facts["held_out"], facts["left_out"], facts["ranks"]) == (38, 12, 0, 1)
        assert facts["data"] == {
            "real": {"images": 50, "patch_nums": [1, 2, 4], "made": "for a test"},
            "generated": {"images": 40, "patch_nums": [1, 2, 4], "made": "for a test"},
        }
        assert facts["step"] == steps_in(folder)[0] and json.loads(json.dumps(facts)) == facts

    def test_the_model_card_has_them(self, folder, tmp_path):
        Scorer.from_pretrained(folder / "unbroken.safetensors").save_pretrained(tmp_path)
        card, facts = (tmp_path / "README.md").read_text(), read_facts(folder / "unbroken.safetensors")
        for scale, accuracy in enumerate(facts["validation"]["accuracy"]):
            assert f"| {scale} | {accuracy:.3f} |" in card
        assert "| images | 50 |" in card and "| made | for a test |" in card and "| held-out pairs | 12 |" in card
        assert f"| checksum of the token maps | {facts['settings']['real']} |" in card


class TestRefused:
    def test_a_vae_of_other_scales(self, folder, tmp_path):
        self.refused(folder, tmp_path, r"vae has patch_nums \(1, 3, 4\), .* have \(1, 2, 4\)", maker=maker((1, 3, 4)))

    def test_a_vae_of_other_codes(self, folder, tmp_path):
        from tests.helpers import small_vae
        from varkern.training.features import FeatureMaker

        other = FeatureMaker.of_quantizer(small_vae(SIDES, vocab_size=VOCABULARY + 1).quantize)
        self.refused(folder, tmp_path, "vae has 65 codes, but the token maps a vocabulary of 64", maker=other)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"num_classes": 4}, "num_classes must be 3 .* got 4"),
            ({"num_scales": 4}, "num_scales must be 3 .* got 4"),
            ({"channels": 16}, "channels must be 8 .* got 16"),
            ({"size": 3}, "size must be 4 .* got 3"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_a_scorer_of_other_sizes(self, changes, message, folder, tmp_path):
        self.refused(folder, tmp_path, message, config=replace(CONFIG, **changes))

    def test_a_first_scale_beyond_the_last(self, folder, tmp_path):
        self.refused(
            folder, tmp_path, r"first_scale must be in 0..2, .* got 3", training=replace(TRAINING, first_scale=3)
        )

    def test_a_name_that_is_no_safetensors_file(self, folder, tmp_path):
        self.refused(folder, tmp_path, "out must end in .safetensors, got .*scorer.pt", out=tmp_path / "scorer.pt")

    def test_a_file_that_is_no_scorer(self, folder, tmp_path):
        (tmp_path / "scorer.safetensors").write_bytes(b"something")
        with pytest.raises(ValueError, match="is not a scorer's safetensors file"):
            train(folder, tmp_path / "scorer.safetensors")

    def refused(self, folder, tmp_path, message, **changes):
        given = {
            "maker": maker(),
            "config": CONFIG,
            "training": TRAINING,
            "out": tmp_path / "scorer.safetensors",
            **changes,
        }
        maps = (TokenMaps.open(folder / "real"), TokenMaps.open(folder / "generated"))
        with pytest.raises(ValueError, match=message):
            train_scorer(*maps, **given)
        assert list(tmp_path.iterdir()) == []
