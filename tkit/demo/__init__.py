"""A small trained language model and its texts. Knows where they lie; `train` knows how they were made."""

from pathlib import Path

MODEL_DIR = Path(__file__).with_name("model")
HELD_OUT = Path(__file__).with_name("held_out.txt")
CALIBRATION = Path(__file__).with_name("calibration.txt")
