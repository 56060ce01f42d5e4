"""The checks of a script that every rank runs: see checking.py and ddp.py. Importing this needs no Horovod."""

import json
import sys
import traceback
from contextlib import contextmanager

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@contextmanager
def raises(kind, *parts):
    """Like pytest.raises, for all parts of the message."""
    try:
        yield
    except kind as error:
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError(f"no {kind.__name__} was raised")


def run_checks(rank):
    """Runs all, in the same order on every rank. Writes FILE.<rank>: a JSON object of check -> "" or a traceback."""
    assert len({function.__name__ for function in CHECKS}) == len(CHECKS), "two checks have the same name"
    results = {}
    for function in CHECKS:
        try:
            function()
            results[function.__name__] = ""
        except Exception:
            results[function.__name__] = traceback.format_exc()
        with open(f"{sys.argv[1]}.{rank}", "w") as file:
            json.dump(results, file)
