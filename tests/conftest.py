import importlib.util
import os

import pytest
import torch

# Without Horovod there is nothing to test of benchmarks of Horovod.
NEED_HOROVOD = ["test_bandwidth.py", "test_cluster.py", "test_convergence.py", "test_results.py"]
collect_ignore = [] if importlib.util.find_spec("horovod") else NEED_HOROVOD


def pytest_report_header():
    return f"Horovod is not installed, so these are left out: {', '.join(collect_ignore)}" if collect_ignore else None


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine torch's wait for each other for milliseconds."""
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_auto_num_workers(config):
    """One more than cores: jobs sleep now and then, but ranks of several at once cost twice the time."""
    return len(os.sched_getaffinity(0)) + (0 if config.option.markexpr == "not jobs" else 1)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups afterwards
def pytest_collection_modifyitems(items):
    # What takes long begins first, so that short tests fill the end.
    items.sort(key=lambda item: item.get_closest_marker("jobs") is None)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))
        # A worker takes all cases of a test that is no job: one by one, handing them out would take longer than most of them.
        if not item.get_closest_marker("jobs"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("[")[0]))
