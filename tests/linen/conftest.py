"""What every test of the Linen front end runs under."""

import pytest


@pytest.fixture(autouse=True)
def _in_all_files(quick_compiles):
    pass
