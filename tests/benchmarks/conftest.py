"""Benchmarks run only when asked for, by `--benchmark-only`: a busy machine must not fail an ordinary test run."""

import pytest


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark-only"):
        for item in items:
            if "benchmark" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="a benchmark: run `make bench`"))
