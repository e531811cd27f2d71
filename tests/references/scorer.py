"""The published LSRS scorer from its state dict, layer by layer: in float64, and by PyTorch's own layers."""

import torch
import torch.nn.functional as F

from tests.references.norm import eager_norm, exact_norm


def rectified(x):
    return torch.where(x > 0, x, 0.2 * x)


def exact_scores(weights, features, labels, scales):
    """Scores ``[N]`` float64 of ``[N, C, H, W]`` features, ``[N]`` labels and scales; ``weights``: a state dict."""
    weights = {name: tensor.double() for name, tensor in weights.items()}

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        side = kernel.shape[-1]
        patches = F.unfold(x, side, padding=side // 2, stride=stride)  # a convolution is a product with patches
        sides = [(length + stride - 1) // stride for length in x.shape[2:]]
        return (kernel.flatten(1) @ patches).view(x.shape[0], -1, *sides)

    def norm(x, name):
        return exact_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def block(x, name, stride):
        y = rectified(norm(conv(x, f"{name}.conv1", stride), f"{name}.ln1"))
        y = rectified(norm(conv(y, f"{name}.conv2"), f"{name}.ln2"))
        y = norm(conv(y, f"{name}.conv3"), f"{name}.ln3")
        if f"{name}.shortcut.0.weight" in weights:
            x = norm(conv(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
        return rectified(x + y)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x, stage = features.double(), 1
    while f"conv_stage_{stage}.0.conv1.weight" in weights:
        x = block(block(x, f"conv_stage_{stage}.0", 2), f"conv_stage_{stage}.1", 1)
        stage += 1
    assert x.shape[2:] == (2, 2)
    conditions = [
        linear(weights[f"{name}_embedding.weight"][numbers], f"{name}_proj")
        for name, numbers in (("class_label", labels), ("stage_label", scales))
    ]
    x, place = torch.cat([x.flatten(1), *conditions], dim=1), 0
    while f"fuser.{place}.weight" in weights:
        x = linear(x if place == 0 else rectified(x), f"fuser.{place}")
        place += 2
    return linear(x, "out_proj").squeeze(1)


def eager_scores(scorer, labels, features, scale):
    """Scores ``[N]`` of ``[N]`` labels and ``[N, C, H, W]`` features, every layer by PyTorch's own function in the
    dtype of the scorer's weights: the scorer as it is written without kernels."""

    def norm(x, layer, residual=None, slope=0.2):
        return eager_norm(x, layer.weight, layer.bias, residual, slope, layer.eps)

    x = features
    for stage in scorer.stages:
        for block in stage[:2]:
            y = norm(block.conv1(x), block.ln1)
            y = norm(block.conv2(y), block.ln2)
            shortcut = norm(block.shortcut[0](x), block.shortcut[1], slope=None) if len(block.shortcut) else x
            x = norm(block.conv3(y), block.ln3, residual=shortcut)

    def linear(x, layer):
        return F.linear(x, layer.weight, layer.bias)

    classes = linear(scorer.class_label_embedding(labels), scorer.class_label_proj)
    scales = linear(scorer.stage_label_embedding(torch.full_like(labels, scale)), scorer.stage_label_proj)
    x = torch.cat((x.flatten(1), classes, scales), dim=1)
    for layer in (*scorer.fuser, scorer.out_proj):
        x = linear(x, layer) if hasattr(layer, "weight") else F.leaky_relu(x, 0.2)
    return x.squeeze(1).float()
