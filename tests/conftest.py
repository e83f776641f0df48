"""Settings shared by every test."""

import os
import time

import pytest
from hypothesis import HealthCheck, settings

TEST_SECONDS_MAX = 300

# Set by .ci/run: no test begins later than so many minutes after the first.
MINUTES_MAX = float(os.environ.get("KVWIRE_TEST_MINUTES_MAX", "inf"))
BEGAN_S = time.monotonic()

settings.register_profile(
    "kvwire",
    deadline=None,  # timings on a shared machine prove nothing
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("kvwire")

# A forced variant would make the parity tests compare it with itself.
for _what in ("CRC32C", "TIERED", "QUANTISED", "LZ4"):
    os.environ.pop("KVWIRE_" + _what, None)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS_MAX))


def pytest_runtest_setup():
    if time.monotonic() - BEGAN_S > 60 * MINUTES_MAX:
        pytest.skip(f"not begun: the {MINUTES_MAX:g} minutes of this run are over")
