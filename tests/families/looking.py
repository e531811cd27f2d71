"""What the tests of FlexVAR and of Infinity ask of a model alike."""

import contextlib

import pytest
import torch

from varkern.draws import MultinomialDraws, PhiloxDraws
from varkern.errors import UnsupportedModelError
from varkern.families import FAMILIES, recognise
from varkern.ops import image_seeds


def draws_named(name, batch_size=2):
    if name == "philox":
        return PhiloxDraws(image_seeds(0, batch_size))
    return MultinomialDraws(None, batch_size, torch.device("cpu"))


def session_of(model, name, arguments, **options):
    """A session as a patched call with these arguments opens it, and its draws."""
    family = recognise(model)
    request = family.request({**arguments, **options})
    family.check(model, request)
    draws = draws_named(name, request.batch_size)
    return family.open(model, request.labels, request, draws), draws


def lacking(model, family):
    """What ``model`` lacks to be of the family of this name; no family takes it."""
    with pytest.raises(UnsupportedModelError):
        recognise(model)
    return next(known for known in FAMILIES if known.name == family).missing(model)


def without(model, name):
    """``model`` less one attribute, wherever that is kept."""
    for held in (vars(model), model._parameters, model._modules, model._buffers):
        if name in held:
            del held[name]
            return model
    kind = type(model)
    members = {n: v for n, v in vars(kind).items() if n != name and not n.startswith("__")}
    model.__class__ = type(kind.__name__, kind.__bases__, members)
    return model


@contextlib.contextmanager
def idle(model):
    """Fails if inside any module of ``model`` runs, or any random state changes."""
    ran, states = [], [torch.get_rng_state(), model.rng.get_state()]
    handles = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()
    assert not ran, f"{len(ran)} modules ran"
    assert all(map(torch.equal, states, [torch.get_rng_state(), model.rng.get_state()])), "a random state"
