"""Lets these scripts, which are started by themselves, import what tests share: import it first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
