"""The checks of most scripts in one job, since starting ranks takes longer than most of them: see checking.py."""

import os

import checks  # noqa: F401
import life
import mixed  # noqa: F401
import patterns  # noqa: F401
from checking import main

if __name__ == "__main__":
    # Of two ranks it would be a duplicate of the set of all.
    main([life.PAIR] if int(os.environ["HOROVOD_SIZE"]) > 2 else None)
