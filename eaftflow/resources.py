"""Where the files that ship beside the code are: in the wheel, or in a checkout."""

from importlib.resources import files
from pathlib import Path


def resource(name: str) -> Path:
    """The folder or file `name` (`sql`, `data/model`, ...), packaged or from the checkout."""
    packaged = Path(str(files("eaftflow"))) / name
    return packaged if packaged.exists() else Path(__file__).parent.parent / name
