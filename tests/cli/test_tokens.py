"""``varkern tokens``: what its options reach, what it says, and that it goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import varkern
from varkern import cli
from varkern.data import DATASET_SEED, TokenMaps, file_sha256, writer


@pytest.fixture
def generate(weights, tmp_path):
    """``varkern tokens generate`` on the small model, with options changed by keyword (None: left out)."""

    def run(out: Path = tmp_path / "out", **options) -> int:
        settings = {
            "var": weights / "var.safetensors",
            "vae": weights / "vae.safetensors",
            "per_class": 1,
            "batch_size": 5,
            "shard_size": 5,
            "device": "cpu",
            "out": out,
        }
        return command("generate", settings | options)

    return run


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes of two images each, and one image that is broken."""
    for number, name in enumerate(["ant/0.png", "ant/1.jpg", "bee/0.png", "bee/1.png", "bee/2.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(50 * number).resize((12, 10 + number)).save(path)
    path.write_bytes(b"broken")
    return tmp_path / "images"


@pytest.fixture
def encode(weights, images, tmp_path):
    """``varkern tokens encode`` on these images, with options changed by keyword (None: left out)."""

    def run(out: Path = tmp_path / "out", **options) -> int:
        settings = {"vae": weights / "vae.safetensors", "images": images, "device": "cpu", "out": out}
        return command("encode", settings | options)

    return run


def command(name: str, settings: dict) -> int:
    arguments = ["tokens", name]
    for option, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                arguments += [f"--{option.replace('_', '-')}", str(one)]
    return cli.main(arguments)


class TestGenerate:
    def test_options_reach_the_model(self, generate, weights, tmp_path, capsys):
        assert generate(per_class=2, classes="3,5-6", seed=9, cfg=2.0, top_k=20, top_p=0.8) == 0
        assert "6 images in" in capsys.readouterr().out
        maps = TokenMaps.open(tmp_path / "out", verify=True)
        assert maps.labels.tolist() == [3, 5, 6] * 2
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        labels, seeds = torch.tensor([3, 5, 6, 3, 5]), varkern.image_seeds(9, 6)[:5]
        wanted = varkern.generate(model, labels, seeds=seeds, cfg=2.0, top_k=20, top_p=0.8).tokens
        assert torch.equal(maps.gather(range(5)), torch.cat(wanted, 1))

    def test_manifest(self, generate, weights, tmp_path):
        assert generate(autocast="bfloat16", dtype="float32") == 0
        told = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert (told["patch_nums"], told["vocabulary"], told["num_classes"], told["total"]) == ([1, 2, 4], 64, 12, 12)
        for name in ("var", "vae"):
            sha256 = file_sha256(weights / f"{name}.safetensors")
            assert told["source"][name] == {"file": f"{name}.safetensors", "sha256": sha256}
        assert told["source"]["seed"] == DATASET_SEED and told["source"]["autocast"] == "bfloat16"
        assert told["source"]["varkern"] == varkern.__version__ and told["source"]["torch"] == torch.__version__

    @pytest.mark.parametrize(
        "options, build",
        [
            ({}, lambda a, b: varkern.BestOfM(a, m=16, pick="resample")),
            ({"m": 3, "first_scale": 0, "pick": "best"}, lambda a, b: varkern.BestOfM(a, m=3, first_scale=0)),
            ({"m": 2, "proposals": 3, "sweeps": 2}, lambda a, b: varkern.BlockResample(a, 2, 3, sweeps=2)),
            ({"scorers": 2}, lambda a, b: varkern.BestOfM(varkern.SumOfScorers(a, b), m=16, pick="resample")),
        ],
        ids=["default", "best", "blocks", "sum"],
    )
    def test_a_search(self, generate, weights, scorer_on_top, second_scorer, tmp_path, capsys, options, build):
        scorers, options = [weights / "scorer.safetensors", scorer_on_top], dict(options)
        count = options.pop("scorers", 1)
        given = scorers[:count]
        assert generate(scorer=given, classes="3,5,0", **options) == 0
        maps = TokenMaps.open(tmp_path / "out", verify=True)
        model = varkern.load_var(weights / "var.safetensors", vae=weights / "vae.safetensors")
        search = build(*map(varkern.Scorer.from_pretrained, scorers))
        sampling = {"seeds": varkern.image_seeds(DATASET_SEED, 3), "cfg": 1.5, "top_k": 900, "top_p": 0.96}
        wanted = varkern.generate(model, torch.tensor([3, 5, 0]), search=search, **sampling).tokens
        assert torch.equal(maps.gather(range(3)), torch.cat(wanted, 1))
        source = maps.manifest.source
        assert source["search"] == repr(search) and source["pick"] == options.get("pick", "resample")
        facts = [{"file": path.name, "sha256": file_sha256(path)} for path in scorers]
        assert source["scorers"] == facts[:count]
        assert generate(scorer=given, classes="3,5,0", **options) == 0  # a finished dataset is left as it is
        for other in ({"m": 5}, {"scorer": second_scorer}, {"scorer": None, "m": None}):
            changed = {"scorer": given, "classes": "3,5,0", **options, **other}
            if other.get("scorer", given) is None:
                changed |= {"proposals": None}
            capsys.readouterr()
            assert generate(**changed) == 2
            assert "other settings" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"m": 4}, "m must be 1 without a scorer, got 4: give --scorer"),
            ({"proposals": 4}, "proposals must be 0 without a scorer, got 4: give --scorer"),
            ({"scorer": "scorer", "m": 0}, "m must be >= 1, got 0"),
            ({"scorer": "scorer", "pick": "worst"}, "pick must be 'best', 'resample' or an int >= 1, got 'worst'"),
            ({"scorer": "scorer", "first_scale": 3}, "first_scale must be < 3, the model's scales, got 3"),
            ({"scorer": "other_scorer"}, "scorer was made for channels=4, but the model has channels=8"),
        ],
        ids=str,
    )
    def test_a_wrong_search(self, generate, weights, tmp_path, one_line, options, message):
        if "scorer" in options:
            options = {**options, "scorer": weights / f"{options['scorer']}.safetensors"}
        assert generate(**options) == 2
        assert one_line() == f"varkern: {message}"
        assert not (tmp_path / "out").exists()

    def test_short_name(self, generate, tmp_path):
        assert generate(var="demo", vae=None, cfg=0.0, top_k=0) == 0
        assert TokenMaps.open(tmp_path / "out").manifest.patch_nums == (1, 2, 3, 4, 6)

    def test_goes_on_where_it_stopped(self, generate, tmp_path, monkeypatch, one_line, capsys):
        generate(tmp_path / "whole")
        placed = writer.place

        def interrupted(folder, name, content, rank):
            if name.startswith("shard-00001"):
                raise KeyboardInterrupt
            placed(folder, name, content, rank)

        monkeypatch.setattr(writer, "place", interrupted)
        capsys.readouterr()
        assert generate() == 130
        assert one_line() == "varkern: interrupted"
        monkeypatch.setattr(writer, "place", placed)
        assert generate() == 0
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()

    def test_other_settings(self, generate, one_line, capsys):
        generate()
        capsys.readouterr()
        assert generate(cfg=2.0) == 2
        line = one_line()
        assert "source.cfg was 1.5, now 2.0" in line and "choose another folder" in line

    def test_a_rank_that_is_not_the_last(self, generate, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert generate() == 0
        assert "other processes are still working" in capsys.readouterr().out
        monkeypatch.setenv("RANK", "1")
        assert generate() == 0
        assert "12 images in" in capsys.readouterr().out


class TestEncode:
    def test_broken_image(self, encode, tmp_path, capsys):
        """Skipped, counted and named; the others are there."""
        assert encode() == 0
        printed = capsys.readouterr()
        assert "skipped 1 unreadable images: bee/2.png" in printed.err and "4 images in" in printed.out
        maps = TokenMaps.open(tmp_path / "out", verify=True)
        assert maps.labels.tolist() == [0, 0, 1, 1] and maps.manifest.skipped == ["bee/2.png"]

    def test_many_broken_images(self, encode, images, capsys):
        for number in range(30):
            (images / "bee" / f"x{number}.png").touch()
        assert encode() == 0
        assert "skipped 31 unreadable images: " in (error := capsys.readouterr().err)
        assert "and 11 more, see the manifest" in error

    def test_manifest(self, encode, weights, tmp_path):
        assert encode(resize=1.5, batch_size=2, shard_size=3) == 0
        manifest = TokenMaps.open(tmp_path / "out").manifest
        assert manifest.source["vae"]["sha256"] == file_sha256(weights / "vae.safetensors")
        assert (manifest.source["resize"], manifest.batch_size, manifest.shard_size) == (1.5, 2, 3)
        assert manifest.source["size"] == 8 and manifest.num_classes == 2

    def test_class_names(self, encode, tmp_path):
        (tmp_path / "names").write_text("wasp\nbee\n\nant\n")
        assert encode(class_names=tmp_path / "names") == 0
        maps = TokenMaps.open(tmp_path / "out")
        assert maps.labels.tolist() == [2, 2, 1, 1] and maps.manifest.num_classes == 3

    def test_patch_nums(self, encode, tmp_path):
        assert encode(patch_nums="1,3") == 0
        manifest = TokenMaps.open(tmp_path / "out").manifest
        assert manifest.patch_nums == (1, 3) and manifest.source["size"] == 6

    def test_demo(self, encode, tmp_path):
        assert encode(vae="demo") == 0
        assert TokenMaps.open(tmp_path / "out").manifest.source["size"] == 24


class TestInfo:
    def test_facts(self, encode, tmp_path, capsys):
        encode()
        assert cli.main(["tokens", "info", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        for fact in (
            "4 of 2 classes, 1 skipped",
            "1,2,4",
            "21 per image, from a vocabulary of 64",
            "1.125",
            "its checksum",
        ):
            assert fact in out

    @pytest.mark.parametrize(
        "damage, said",
        [
            (lambda content: content[:-1], "shard-00000.safetensors was truncated"),
            (
                lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:],
                "shard-00000.safetensors was altered",
            ),
        ],
        ids=["truncated", "altered"],
    )
    def test_damage(self, encode, tmp_path, capsys, damage, said):
        encode()
        path = tmp_path / "out" / "shard-00000.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        assert cli.main(["tokens", "info", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err

    def test_no_dataset(self, tmp_path, one_line):
        assert cli.main(["tokens", "info", str(tmp_path)]) == 2
        assert "is not a token-map dataset" in one_line()


class TestWrongInput:
    @pytest.mark.parametrize(
        "options, said",
        [
            ({"per_class": 0}, "per_class must be >= 1, got 0"),
            ({"classes": "dog"}, "classes must be numbers and ranges"),
            ({"classes": "0-12"}, "classes must be in 0..11, got 12"),
            ({"vae": None}, "vae must be given"),
            ({"var": "/nowhere/var.pth"}, "no checkpoint at /nowhere/var.pth"),
            ({"cfg": "nan"}, "cfg must be a finite number"),
            ({"top_p": 2}, "top_p must be in [0, 1]"),
            ({"batch_size": 0}, "batch_size must be an int >= 1, got 0"),
            ({"shard_size": 0}, "shard_size must be an int >= 1, got 0"),
            ({"seed": 2**64}, "seed must be < 2**64"),
            ({"device": "cuda:99"}, "device must be present, got 'cuda:99'"),
        ],
        ids=str,
    )
    def test_generate(self, generate, tmp_path, options, said, one_line):
        assert generate(**options) == 2
        assert said in one_line()
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"images": "/nowhere"}, "images must be a folder, got /nowhere"),
            ({"vae": "/nowhere/vae.pth"}, "no checkpoint at /nowhere/vae.pth"),
            ({"patch_nums": "1,x"}, "patch_nums must be sides such as 1,2,3,4, got '1,x'"),
            ({"patch_nums": "1,0"}, "patch_nums must be sides"),
            ({"class_names": "/nowhere/names"}, "/nowhere/names"),
            ({"class_names": "{names}"}, "got none for 'bee'"),
            ({"resize": 0.5}, "resize must be a finite number >= 1, got 0.5"),
            ({"workers": 0}, "workers must be an int >= 1, got 0"),
        ],
        ids=str,
    )
    def test_encode(self, encode, tmp_path, options, said, one_line):
        (tmp_path / "names").write_text("ant")
        options = {name: str(value).format(names=tmp_path / "names") for name, value in options.items()}
        assert encode(**options) == 2
        assert said in one_line()
        assert not (tmp_path / "out").exists()

    def test_missing_pillow(self, encode, monkeypatch, one_line):
        monkeypatch.setitem(sys.modules, "PIL", None)
        assert encode() == 2
        assert "pip install 'varkern[train]'" in one_line()

    @pytest.mark.parametrize("local, wanted", [("1", "cuda:1"), (None, "cuda"), ("x", "cuda")])
    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_rank_has_its_own_gpu(self, monkeypatch, local, wanted, name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_RANK", local)
        assert cli.options.pick_local_device(name) == torch.device(wanted)
        assert cli.options.pick_local_device("cpu") == torch.device("cpu")


class TestPublishedFiles:
    """``varkern tokens import`` and ``export``: files of LSRS' own code."""

    @pytest.fixture
    def file(self, tmp_path) -> Path:
        classes = [torch.randint(64, (count, 21)).to(torch.int16) for count in (3, 0, 2)]
        torch.save(classes, tmp_path / "samples_idx_d16_n1000.pth")
        return tmp_path / "samples_idx_d16_n1000.pth"

    def test_there_and_back(self, file, weights, tmp_path, capsys):
        vae, out = weights / "vae.safetensors", tmp_path / "out"
        options = ["--patch-nums", "1,2,4", "--vocabulary", "64", "--vae", str(vae), "--out", str(out)]
        assert cli.main(["tokens", "import", str(file), *options]) == 0
        assert capsys.readouterr().out.endswith(f"5 images in {out}\n")
        assert TokenMaps.open(out).manifest.source["vae"] == {"file": vae.name, "sha256": file_sha256(vae)}
        assert cli.main(["tokens", "import", str(file), *options]) == 0  # done already
        assert cli.main(["tokens", "info", str(out)]) == 0
        back = tmp_path / "gt_idx.pth"
        capsys.readouterr()
        assert cli.main(["tokens", "export", str(out), "--out", str(back)]) == 0
        assert capsys.readouterr().out == f"5 images of 3 classes, 0 to 3 per class, in {back}\n"
        pairs = zip(torch.load(file), torch.load(back, weights_only=True), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)

    def test_refused(self, file, tmp_path, one_line):
        assert cli.main(["tokens", "import", str(file), "--out", str(tmp_path / "out")]) == 2
        assert "patch_nums must have as many tokens as the maps of class 0" in one_line()
        assert cli.main(["tokens", "export", str(tmp_path / "out"), "--out", str(file)]) == 2
        assert "is not a token-map dataset" in one_line()
