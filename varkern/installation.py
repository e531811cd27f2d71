"""Where the package comes from: ``varkern`` and ``varkern.kernels`` must belong to one checkout or installation.

The kernels stand beside the package in a checkout and inside it in an installation, and only ``pip install`` tells
Python so. With a second checkout on ``PYTHONPATH``, Python would take the package from there and the kernels from the
installed one, without a word.
"""

from __future__ import annotations

import os
from importlib.util import find_spec


def check_kernels(package: str) -> None:
    """Raise unless the kernels that Python would import belong to this package. It imports nothing.

    Args:
        package: the folder of the imported package, ``.../varkern``.

    Raises:
        ImportError: if ``varkern.kernels`` comes from elsewhere, or is in the checkout but not installed.
    """
    package = os.path.abspath(package)
    root = os.path.dirname(package)
    spec = find_spec("varkern.kernels")
    if spec is None or spec.origin is None:
        if os.path.isfile(os.path.join(root, "kernels", "launching.py")):
            raise ImportError(
                f"varkern is imported from {package}, a checkout that is not installed, so that Python does not find "
                f"its kernels in {os.path.join(root, 'kernels')}: run pip install -e {root}"
            )
        return
    found = os.path.dirname(os.path.abspath(spec.origin))
    own = [os.path.join(package, "kernels"), os.path.join(root, "kernels")]
    if found not in own and os.path.realpath(found) not in map(os.path.realpath, own):
        raise ImportError(
            f"varkern is imported from {package}, but varkern.kernels from {found}, another checkout or installation: "
            f"run pip install -e {root}, or take {root} off PYTHONPATH and start Python in another folder"
        )
