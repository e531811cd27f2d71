"""A patched model that fuses with kernels has the same ``f_hat`` as the unpatched model, at every scale."""

import torch

import varkern
from tests.helpers import on, relative_error, ten_scale_var
from varkern.families import var as family
from varkern.ops.backend import use_backend


def test_f_hat_of_every_scale(device, monkeypatch):
    model = on(ten_scale_var(), device)
    commits, inputs = [], []
    commit, resize = family.commit_tokens, family.resize_features

    def recorded_commit(tokens, f_hat, *given, **options):
        with use_backend("triton"):
            result = commit(tokens, f_hat, *given, **options)
        commits.append((tokens.clone(), f_hat.clone()))
        return result

    def recorded_resize(*given, **options):
        with use_backend("triton"):
            inputs.append(resize(*given, **options))
        return inputs[-1]

    monkeypatch.setattr(family, "commit_tokens", recorded_commit)
    monkeypatch.setattr(family, "resize_features", recorded_resize)
    varkern.patch(model)
    images = model.autoregressive_infer_cfg(B=1, label_B=torch.tensor([4], device=device), g_seed=3, top_k=90)
    assert images.isfinite().all() and len(commits) == len(inputs) + 1 == 10

    quantizer = model.vae_quant_proxy[0]
    f_hat = torch.zeros_like(commits[0][1])
    for scale, (tokens, found) in enumerate(commits):
        side = model.patch_nums[scale]
        codes = quantizer.embedding(tokens).transpose(1, 2).reshape(1, -1, side, side)
        f_hat, wanted = quantizer.get_next_autoregressive_input(scale, 10, f_hat, codes)
        assert relative_error(found, f_hat) < 1e-5
        if scale < 9:
            assert relative_error(inputs[scale], wanted) < 1e-5
