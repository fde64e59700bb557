"""What importing the reference engine sets for the whole process."""

import os
import subprocess
import sys

# registered first, so run last
LAST_WORDS = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 100_000))"


def test_waiting_threads_sleep_and_the_end_is_not_searched_for_garbage():
    """libgomp itself says how its threads will wait."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", f"{LAST_WORDS}; import tkit.runtime, torch"]
    done = subprocess.run(
        command, env=environment | {"OMP_DISPLAY_ENV": "TRUE"}, capture_output=True, text=True, check=True
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert done.stdout == "True\n"
