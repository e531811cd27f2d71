"""Feature extractors: a user's function, and Inception as torch-fidelity has it."""

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from varkern.metrics import features
from varkern.metrics.features import Extracted, Extractor

CPU = torch.device("cpu")


def images(count: int = 3, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


class TestOwnFunction:
    @pytest.fixture
    def here(self, tmp_path, monkeypatch):
        """A folder that a user stands in, with a module in it."""
        (tmp_path / "own_features.py").write_text(
            "def mean(images):\n    return images.float().mean((2, 3)), None\nnumber = 3\n"
        )
        monkeypatch.chdir(tmp_path)
        yield tmp_path
        sys.modules.pop("own_features", None)

    def test_is_found_where_the_user_stands(self, here):
        before = list(sys.path)
        extractor = features.from_name("own_features:mean", CPU)
        found = extractor(images())
        assert torch.equal(found.features, images().float().mean((2, 3)))
        assert found.logits is None and found.spatial is None
        assert extractor.name == "own_features:mean" and sys.path == before

    @pytest.mark.parametrize(
        "name, named",
        [
            ("own_features", "inception, demo or module:function, got 'own_features'"),
            (":mean", "module:function"),
            ("own_features:", "module:function"),
            ("no_such_module:mean", "there is no module 'no_such_module'"),
            ("own_features:median", "own_features has no 'median'"),
            ("own_features:number", "which is no function"),
        ],
    )
    def test_wrong_names(self, here, name, named):
        with pytest.raises(ValueError, match=named):
            features.from_name(name, CPU)

    @pytest.mark.parametrize(
        "returned, named",
        [
            (torch.zeros(3, 2), r"must return \(features, logits\), got Tensor"),
            ((torch.zeros(3, 2),), r"must return \(features, logits\), got tuple"),
            ((torch.zeros(2, 2), None), r"features of shape \[3, D\], got \[2, 2\]"),
            ((torch.zeros(3, 2, 1), None), r"features of shape \[3, D\], got \[3, 2, 1\]"),
            ((None, None), r"features of shape \[3, D\], got NoneType"),
            ((torch.zeros(3, 2), torch.zeros(3)), r"logits of shape \[3, D\], got \[3\]"),
            ((torch.zeros(3, 2).int(), None), "features as floats, got torch.int32"),
        ],
        ids=["tensor", "one", "fewer", "dimensions", "none", "logits", "integers"],
    )
    def test_wrong_returns(self, returned, named):
        with pytest.raises(ValueError, match=named):
            Extractor("own", lambda batch: returned, CPU)(images())


class FakeInception(nn.Module):
    """Stands for torch-fidelity's network, with the one layer inside that is listened to."""

    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x):
        assert x.dtype == torch.uint8
        maps = self.Mixed_6d.branch1x1(x.float())
        return maps.amax((2, 3)), maps.mean((2, 3))


@pytest.fixture
def fake_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    module.URL_INCEPTION_V3 = "file:///nowhere/weights-inception-2015-12-05-6726825d.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


class TestInceptionPath:
    """All around the network, with a small one in its place."""

    @pytest.fixture
    def weights(self, tmp_path):
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 9, 1)
        torch.save({f"Mixed_6d.branch1x1.{k}": v for k, v in layer.state_dict().items()}, tmp_path / "weights.pth")
        return tmp_path / "weights.pth", layer

    def test_spatial_features(self, fake_fidelity, weights):
        """The first 7 channels, in the order rows, columns, channels."""
        path, layer = weights
        extractor = features.inception(CPU, path)
        for batch in (images(3), images(2, side=4)):
            found = extractor(batch)
            maps = layer(batch.float()).detach()
            side = batch.shape[-1]
            wanted = torch.stack([maps[:, c, y, x] for y in range(side) for x in range(side) for c in range(7)], 1)
            assert torch.allclose(found.spatial, wanted)
            assert torch.equal(found.features, maps.amax((2, 3))) and torch.equal(found.logits, maps.mean((2, 3)))

    def test_weights_are_not_unpickled(self, fake_fidelity, tmp_path):
        ran = tmp_path / "ran"

        class Trap:
            def __reduce__(self):
                return ran.touch, ()

        torch.save({"weight": Trap()}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="must have the Inception weights"):
            features.inception(CPU, tmp_path / "weights.pth")
        assert not ran.exists()

    def test_other_weights(self, fake_fidelity, tmp_path):
        torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="must have the Inception weights"):
            features.inception(CPU, tmp_path / "weights.pth")

    def test_no_such_weights(self, fake_fidelity, tmp_path):
        with pytest.raises(OSError, match=r"nowhere.pth"):
            features.inception(CPU, tmp_path / "nowhere.pth")

    def test_no_download(self, fake_fidelity, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        with pytest.raises(OSError, match="--inception-weights"):
            features.inception(CPU)

    def test_downloaded_before(self, fake_fidelity, weights, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
        place.parent.mkdir(parents=True)
        place.write_bytes(weights[0].read_bytes())
        assert features.inception(CPU)(images()).features.shape == (3, 9)

    def test_missing_torch_fidelity(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
        with pytest.raises(ImportError, match=r"pip install 'varkern\[measure\]'"):
            features.inception(CPU)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's Inception module. Its package imports torchvision, which this module does not need, and which
    does not import beside a torch of another build; then the module is taken without it."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    found = importlib.util.find_spec("torch_fidelity")
    if found is None:
        pytest.skip("torch-fidelity is not installed")
    with pytest.MonkeyPatch.context() as patch:
        try:
            yield importlib.import_module(name)
        except (ImportError, RuntimeError):
            package = types.ModuleType("torch_fidelity")
            package.__path__ = found.submodule_search_locations
            patch.setitem(sys.modules, "torch_fidelity", package)
            yield importlib.import_module(name)
        finally:
            for module in [module for module in sys.modules if module.startswith("torch_fidelity")]:
                del sys.modules[module]


@pytest.fixture(scope="module")
def network(fidelity, tmp_path_factory):
    """The network with random weights, and their file: the published ones can only be had from a network."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    for name, tensor in network.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return network, path


class TestInceptionNetwork:
    def test_layers(self, network):
        """Against the layers run one by one in float64, on images that need no resizing."""
        network, path = network
        batch = images(2, side=299)
        found = features.inception(CPU, path)(batch)
        x = (batch.double() - 128) / 128
        layers = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2".split()
        for name in [*layers, *(f"Mixed_{part}" for part in ("5b", "5c", "5d", "6a", "6b", "6c"))]:
            x = getattr(network, name).double()(x)
        layer = network.Mixed_6d.branch1x1.double()
        maps = nn.functional.relu(layer.bn(layer.conv(x)))
        wanted = torch.stack([maps[:, c, y, x] for y in range(17) for x in range(17) for c in range(7)], 1)
        assert [part.shape[1] for part in found] == [2048, 1008, 2023]
        assert (found.spatial - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert wanted.std() > 0
        logits = found.features.double() @ network.fc.weight.double().T  # without the bias
        assert (found.logits - logits).abs().max() < 1e-4 * logits.abs().max()

    def test_small_images(self, network):
        found = features.inception(CPU, network[1])(images(2, side=24))
        assert isinstance(found, Extracted) and [list(part.shape) for part in found] == [
            [2, 2048],
            [2, 1008],
            [2, 2023],
        ]
        assert all(part.isfinite().all() for part in found)
