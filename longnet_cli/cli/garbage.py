"""Keep the garbage collector away from what is imported, which stays."""

import atexit
import gc
import sys


def freeze_imports() -> None:
    """Leave all objects out of later collections. Call it after the imports: torch's objects take 0.2 s each time."""
    gc.freeze()
    atexit.register(_free_triton)


def _free_triton() -> None:
    if "triton" in sys.modules:  # its bindings report what the last collection cannot free
        gc.unfreeze()
