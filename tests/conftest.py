"""Settings shared by every test."""

import os

import pytest
from hypothesis import HealthCheck, settings

TEST_SECONDS_MAX = 120

settings.register_profile(
    "kvwire",
    deadline=None,  # timings on a shared machine prove nothing
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvwire")

# A forced variant would make the parity tests compare it with itself.
os.environ.pop("KVWIRE_CRC32C", None)
os.environ.pop("KVWIRE_TIERED", None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))
