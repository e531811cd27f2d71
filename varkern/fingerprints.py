"""Whether a model's generation method is a published one, decided by the syntax of its source.

varkern's loop replaces a method only if the method and the functions that it relies on are known. A fingerprint is a
hash of the syntax tree. Comments, formatting, docstrings, type annotations and the version of Python do not change it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

from varkern.families import Family
from varkern.models import VAR
from varkern.models.quantizer import VectorQuantizer

KNOWN = {
    "296fc4779ecfd260": "autoregressive_infer_cfg of FoundationVision/VAR and of dt-3t/LSRS",
    "1157f7386dd8032a": "autoregressive_infer_cfg_lsrs of dt-3t/LSRS",
    "651ad35cadc75df1": "sample_with_top_k_top_p_ of both, and of jiaosiyu1999/FlexVAR",
    "14555be45b201c24": "gumbel_softmax_with_rng of the three",
    "7f164656e0f0fac4": "get_next_autoregressive_input of FoundationVision/VAR's quantizer",
    "7af79e0948f45c1f": "autoregressive_infer_cfg of jiaosiyu1999/FlexVAR",
    "f388b004660f2d76": "autoregressive_infer_cfg of FoundationVision/Infinity",
    "c20a8cf942a7add1": "sample_with_top_k_top_p_also_inplace_modifying_logits_ of FoundationVision/Infinity",
    "a3c734335159de91": "sampling_with_top_k_top_p_also_inplace_modifying_probs_ of FoundationVision/Infinity",
}
SAMPLERS = (  # global functions of the published modules, which a user may have replaced
    "sample_with_top_k_top_p_",
    "gumbel_softmax_with_rng",
    "sample_with_top_k_top_p_also_inplace_modifying_logits_",
    "sampling_with_top_k_top_p_also_inplace_modifying_probs_",
)
OWN = {VAR.autoregressive_infer_cfg, VectorQuantizer.get_next_autoregressive_input}
IGNORED = ("ctx", "kind", "type_comment", "type_params", "annotation", "returns", "decorator_list")


def find_difference(model: Any, family: Family, method: Callable[..., Any]) -> str | None:
    """Why varkern's loop may give other images than ``method`` of ``model``; None if it is known to give the same."""
    function = plain(method)
    if not is_known(function):
        return f"{describe(method)} is not the published method"
    for name in SAMPLERS:
        sampler = getattr(function, "__globals__", {}).get(name)
        if sampler is not None and not is_known(plain(sampler)):
            return f"{name}, which {describe(method)} calls, is not the published one"
    for step in family.steps(model):
        if not is_known(plain(step)):
            return f"{describe(step)} is not the published one"
    return None


def is_known(function: Any) -> bool:
    """True for a published function and for varkern's own."""
    code = getattr(function, "__code__", None)
    return code is not None and (any(code is own.__code__ for own in map(plain, OWN)) or fingerprint(code) in KNOWN)


def plain(method: Any) -> Any:
    """The function of a method, without the wrapper of ``torch.no_grad`` or ``torch.inference_mode``.

    Other decorators stay: they may change what the function returns.
    """
    while getattr(method, "is_patch", False):
        method = method.__wrapped__
    function = getattr(method, "__func__", method)
    while getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib":
        function = function.__wrapped__
    return function


@functools.lru_cache(maxsize=256)
def fingerprint(code: CodeType) -> str | None:
    """The first 16 hexadecimal digits of the SHA-256 of a function's syntax; None if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return hashlib.sha256(serialise(tree).encode()).hexdigest()[:16]


def serialise(node: Any) -> str:
    """A syntax tree as text that is the same under every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(serialise, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [statement for statement in value if not is_text(statement)]
        if name not in IGNORED and value is not None and value != []:
            fields.append(f"{name}={serialise(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def is_text(statement: Any) -> bool:
    """True for a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def describe(method: Any) -> str:
    function = getattr(method, "__func__", method)
    name = getattr(function, "__qualname__", type(method).__name__)
    return f"{getattr(function, '__module__', None) or '?'}.{name}"
