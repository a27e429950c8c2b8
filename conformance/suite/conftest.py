"""Says how to load the plug-in where it is missing; the plug-in is not loaded by default, because it adds `--backend`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Ends with pytest's usage error instead of one about fixtures."""
    if not config.pluginmanager.hasplugin("lowbit.conformance.plugin"):
        raise pytest.UsageError(
            "the cases need their plug-in: pytest --pyargs lowbit.conformance -p lowbit.conformance.plugin --backend NAME"
        )
