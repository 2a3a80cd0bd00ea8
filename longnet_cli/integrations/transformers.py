"""Dilated attention for transformers: `import longnet_cli.integrations.transformers` stands in users' config.json.

Importing this file registers the attention "dilated". It also lets the Auto classes open folders that are saved with a
pattern (`models.hf.pretrained_folder`) and the folders of a LongNet (`models.hf.auto_longnet`).
"""

from longnet_cli.basics.errors import extra

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"transformers cannot be imported ({error}): {extra('hf')}") from None

from longnet_cli.models.hf import auto_longnet
from longnet_cli.models.hf.attention import use_dilated_attention, use_own_attention, write_pattern
from longnet_cli.models.hf.longnet_cache import LongNetCache

__all__ = [
    "LongNetCache",
    "auto_longnet",
    "use_dilated_attention",
    "use_own_attention",
    "write_pattern",
]
