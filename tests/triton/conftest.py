"""Stand-ins that live with the backends' tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
