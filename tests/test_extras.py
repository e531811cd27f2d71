"""What a missing package is answered with."""

import sys

import pytest

from varkern.extras import require_matplotlib, require_pillow


@pytest.mark.parametrize("module, require", [("PIL", require_pillow), ("matplotlib", require_matplotlib)])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, module, require):
    require()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs (pillow|matplotlib): pip install 'varkern\[demo\]'"):
        require()
