"""A search inside a model's own loop: the model's function runs as it is, and only its draws of tokens are replaced.

Every published sampler ends in ``torch.multinomial``. While the model's function runs, a ``TorchFunctionMode`` answers
those calls that draw the tokens of a scale, in whatever function or script they stand: it draws M candidates from the
same probabilities, lets the search choose, and returns the kept token map. The rest of the loop stays the model's own:
its guidance, its filters, its further arguments, and what it returns.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from varkern.checks import capturing, check_search, check_seed
from varkern.draws import MultinomialDraws, PhiloxDraws, as_image_seeds
from varkern.errors import OwnLoopError
from varkern.families import WATCHES, Family, Watch, recognise
from varkern.generation import composed, offer
from varkern.literals import Sampler, check_word
from varkern.ops import sample_tokens
from varkern.search import PathSearch, Search, as_search
from varkern.search.base import check_highest_label
from varkern.spec import Request

MULTINOMIAL = (torch.multinomial, torch.Tensor.multinomial)


class TokenDraws(TorchFunctionMode):
    """Replaces the draws of tokens.

    Args:
        watch: what is seen of the loop.
        search: the rule that keeps one candidate; None: one candidate per scale.
        sampler: ``"philox"`` or ``"multinomial"``, as for :func:`varkern.patch`.
        seed: an int, ``[B]`` int64 image seeds, or None for fresh seeds; for ``"philox"``.
    """

    def __init__(self, watch: Watch, search: Search | None, sampler: Sampler, seed: int | Tensor | None):
        super().__init__()
        self.watch, self.search, self.sampler, self.seed = watch, search, sampler, seed
        self.seeds: Tensor | None = None
        self.checked: Tensor | None = None  # the labels that the search was asked about last

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in MULTINOMIAL:
            return self.multinomial(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def multinomial(self, function, input, num_samples, replacement=False, *, generator=None, **more):
        place = self.watch.place(input)
        drawn = functools.partial(function, input, generator=generator, **more)
        if place is None:
            return drawn(num_samples, replacement)
        scale, batch = place
        m = 1 if self.search is None else self.search.num_candidates(scale, self.watch.spec.num_scales)
        self.watch.enter(scale, batch)
        first = self.watch.draws - 1
        if m > 1 and (first or num_samples != 1):
            raise OwnLoopError(
                f"the model's own loop draws several candidates at scale {scale}, which is to be searched: switch its "
                "own search off, or search other scales"
            )
        if self.sampler == "multinomial" and m == 1:
            return drawn(num_samples, replacement)
        if self.sampler == "multinomial":
            candidates = drawn(m, True).view(batch, -1, m).transpose(1, 2)  # [B, M, rows]
            draws = MultinomialDraws(generator, batch, input.device)
        else:
            draws = PhiloxDraws(self.image_seeds(batch, input.device))
            logits = input.log().view(batch, -1, input.shape[1])
            count = first + max(m, num_samples)  # a draw that is repeated at one scale gives the next candidates
            candidates = sample_tokens(logits, count, seeds=draws.seeds, scale=scale)[:, first:]
        if m > 1:
            candidates = self.choose(candidates, scale, draws)
        return candidates.transpose(1, 2).reshape(len(input), -1)

    def choose(self, candidates: Tensor, scale: int, draws: Any) -> Tensor:
        """The map that the search keeps of the candidates ``[B, M, rows]``: ``[B, 1, rows]``."""
        watch = self.watch
        assert self.search is not None, "without one there is one candidate"
        if watch.labels is not self.checked and isinstance(watch.labels, Tensor):  # once per generation: it waits
            self.checked = watch.labels
            if len(watch.labels) and not capturing(watch.labels.device):
                check_highest_label(self.search, int(watch.labels.max()), watch.spec)
        maps = watch.maps(scale, candidates)
        choice = self.search.choose(offer(watch, watch.spec, scale, watch.labels, maps, draws))
        kept = composed(choice, maps)
        if kept is None:
            return candidates.take_along_dim(choice.index.view(-1, 1, 1), 1)
        return watch.rows_of(scale, kept.unsqueeze(1)).to(candidates.dtype)

    def image_seeds(self, batch: int, device: torch.device) -> Tensor:
        if self.seeds is None or len(self.seeds) != batch:
            request = Request(batch, None, self.seed)
            check_seed(self.sampler, request)
            self.seeds = as_image_seeds(request, device)
        return self.seeds


@contextlib.contextmanager
def searching(
    model: Any,
    search: Search | Sequence[Search] | None = None,
    *,
    seeds: int | Tensor | None = None,
    sampler: Sampler = "philox",
    **arguments: Any,
) -> Iterator[Any]:
    """Search inside whatever loop runs in this ``with`` block: a script's own, or a method that is not patched.

    Every draw of a scale's tokens by ``torch.multinomial`` becomes a draw of several candidates, of which the search
    keeps one. Everything else in the loop stays as it is.

    Args:
        model: the model that the loop runs: VAR, FlexVAR or Infinity.
        search: the rule that keeps one candidate; None: one candidate per scale.
        seeds: an int, from which one seed per image is derived; ``[B]`` int64 image seeds; None: fresh ones.
        sampler: ``"philox"``: the images' seeds decide all draws; ``"multinomial"``: the loop's own generator does.
        arguments: what the loop gets with each call, by the names of the family's published method. FlexVAR needs
            ``vqvae`` and ``infer_patch_nums``; Infinity ``vae``, ``scale_schedule``, ``label_B_or_BLT`` and ``B``.

    Raises:
        UnsupportedModelError: if the model fits no family.
        OwnLoopError: if the block ends and no token was drawn, or if a scale cannot be searched.
        ValueError, TypeError: if an argument is wrong, before the block.

    Example::

        >>> with varkern.searching(var, varkern.BestOfM(scorer, m=4), seeds=0):
        ...     images = var.autoregressive_infer_cfg(B=8, label_B=labels, cfg=1.5)
    """
    check_word("sampler", sampler, Sampler)
    family, search = recognise(model), as_search(search)
    known = {name: value for name, value in arguments.items() if name in family.arguments}
    request = family.request({"B": 1, "label_B": None, **known} if family.has_classes else known)
    spec = family.spec(model, request)
    check_search(search, spec)
    check_no_paths(search)

    def num_candidates(scale: int) -> int:
        return 1 if search is None else search.num_candidates(scale, spec.num_scales)

    watch = WATCHES[family.name](model, spec, num_candidates, request)
    with watch, TokenDraws(watch, search, sampler, seeds):
        yield model
    if watch.seen == 0 and (search is not None or sampler == "philox"):
        raise OwnLoopError(
            "the model's own loop drew no token with torch.multinomial, so neither seeds nor search had any effect"
        )
    watch.finish()


def check_no_paths(search: object) -> None:
    """Raise ``ValueError`` for a search over paths, which copies and drops images of a batch."""
    if isinstance(search, PathSearch):
        raise ValueError(
            "search must not be a PathSearch in the model's own loop, whose batch cannot change while it runs: use "
            "varkern.patch(model, search) with loop='fused', or varkern.generate"
        )


def call_own(
    family: Family, model: Any, method: Any, bound: inspect.BoundArguments, search: Search | None, sampler: Sampler
) -> Any:
    """Call a model's own method and search inside it; return what it returns.

    Args:
        bound: the method's arguments, with defaults. A tensor of seeds in ``g_seed``, which the method does not take,
            is replaced by 0: tokens depend on the tensor, and everything else that the method draws on 0.
    """
    arguments = named_arguments(bound)
    if search is not None and arguments.get("more_smooth"):
        raise ValueError("more_smooth must be False with a search in the model's own loop, got True")
    seed = arguments.pop("g_seed", None)
    if sampler == "multinomial":
        check_seed(sampler, Request(0, None, seed))  # here the method's generator decides, which takes no tensor
        if search is None:
            return method(*bound.args, **bound.kwargs)
    if isinstance(seed, Tensor):
        set_argument(bound, "g_seed", 0)
    known = {name: value for name, value in arguments.items() if name in family.arguments}
    with searching(model, search, seeds=seed, sampler=sampler, **known):
        return method(*bound.args, **bound.kwargs)


def named_arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a call by name, with those that the method takes as ``**kwargs``."""
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    found = {name: value for name, value in bound.arguments.items() if kinds[name] != inspect.Parameter.VAR_KEYWORD}
    for name, value in bound.arguments.items():
        if kinds[name] == inspect.Parameter.VAR_KEYWORD:
            found.update(value)
    return found


def set_argument(bound: inspect.BoundArguments, name: str, value: Any) -> None:
    """Give one of :func:`named_arguments` another value."""
    held = next((v for v in bound.arguments.values() if isinstance(v, dict) and name in v), bound.arguments)
    held = bound.arguments if name in bound.arguments else held
    held[name] = value
