"""lm-eval's command with the models of `longnet`: a LongNet, or a model of transformers with a pattern.

python -m longnet_cli.lm_eval --model longnet --model_args pretrained=./my-model --tasks TASKS
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch

from longnet_cli.basics.errors import ConfigError, LongNetError, extra

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    needed = f"lm-eval cannot be imported ({error}): {extra('lm-eval')}"
    if __name__ == "__main__":
        print(f"longnet: error: {needed}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(needed) from None

from longnet_cli.attention.notation import OPTIONS, read_pattern
from longnet_cli.integrations.transformers import use_dilated_attention
from longnet_cli.models.folder import ModelFolder
from longnet_cli.running.device import DTYPES, resolve_dtype


@register_model("longnet")
class LongNetLM(HFLM):
    """lm-eval's own `hf`, with `pretrained` as in --model: a folder or a name.

    `pattern` (a text of `longnet_cli.attention.notation`) replaces the model's own. Without a GPU, the `device` is the
    CPU. `dtype` is as in `score`: float32 on a CPU, whatever the folder has. All else is as in `hf`.

    Raises ConfigError and CheckpointError as the commands do, and ConfigError for a model that predicts no next token,
    and for a pattern that lm-eval has cut at its commas.
    """

    def __init__(
        self,
        pretrained: str,
        pattern: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if cut := [name for name in options if name in OPTIONS]:
            whole = f'{{"pretrained": "{pretrained}", "pattern": "{pattern},{cut[0]}={options[cut[0]]}"}}'
            raise ConfigError(
                f"{cut[0]}: lm-eval cuts at commas, so write a pattern in JSON: --model_args '{whole}'"
            )
        self.folder = ModelFolder.find(str(pretrained))
        self.pattern = read_pattern(pattern, "pattern")
        config = self.folder.net_config(self.pattern)
        if not (config.causal and config.vocab_size):
            raise ConfigError(
                f"{self.folder.name}: lm-eval needs a model that predicts the next token"
            )
        device = device or "cuda"  # lm-eval's command says cuda on every machine
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        dtype = DTYPES[resolve_dtype(options.pop("dtype", "auto"), torch.device(device))]
        super().__init__(str(self.folder.path), device=device, dtype=dtype, **options)

    def _create_model(self, *args: Any, **options: Any) -> None:
        if self.pattern and not self.folder.of_transformers:
            options |= asdict(self.pattern)  # keys of a LongNet's config.json
        super()._create_model(*args, **options)
        if self.pattern and self.folder.of_transformers:
            use_dilated_attention(self._model, self.pattern)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval adds to its results: the model as well, with the commit of one that is on a hub."""
        return super().get_model_info() | {"pretrained": self.folder.origin}


def main() -> None:
    """Run lm-eval's command. An error of `longnet` becomes one line on stderr and its exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LongNetError as error:
        print(f"longnet: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
