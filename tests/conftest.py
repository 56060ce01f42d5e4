import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine torch's wait for each other for milliseconds."""
    torch.set_num_threads(1)
