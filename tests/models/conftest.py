"""Set-up for all tests of models."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _in_all_files(quick_compiles_of_module):
    pass
