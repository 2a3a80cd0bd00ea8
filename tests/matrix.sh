#!/usr/bin/env bash
# Run all tests but those marked slow, with the oldest and with the newest libraries that pyproject.toml allows, each in a
# virtual environment under build/. It takes some 6 GB and half an hour per environment. Those marked gpu run emulated.
#
#   make matrix                           both, with the Python of .venv
#   PYTHON=3.10 tests/matrix.sh oldest    one of them, with another Python
#   PYTHON=3.14 tests/matrix.sh newest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A resolution=([oldest]=lowest-direct [newest]=highest)
.venv/bin/python -m pip install --quiet 'uv>=0.5'
for kind in ${@:-oldest newest}; do
  environment=build/$kind
  .venv/bin/uv venv --quiet --clear --seed --python "${PYTHON:-.venv/bin/python}" "$environment"
  .venv/bin/uv pip install --quiet --python "$environment" --resolution "${resolution[$kind]}" --editable '.[dev]'
  "$environment/bin/python" -c 'import torch, transformers, pyarrow, platform as p
print(*("python", p.python_version(), "torch", torch.__version__, "transformers", transformers.__version__, "pyarrow", pyarrow.__version__))'
  OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile | tail -n 30 || failed=1
  if [ "$kind" = newest ]; then # transformers' own tests and TRL, of which only these versions are promised
    .venv/bin/uv pip install --quiet --python "$environment" --editable '.[peers]'
    OMP_NUM_THREADS=1 "$environment/bin/python" tests/peers/run.py | tail -n 40 || failed=1
    OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q tests/clients/test_trl.py | tail -n 30 || failed=1
  fi
  LONGNET_TEST_DEVICE=emulated "$environment/bin/python" -m pytest -q -m gpu tests/test_gpu.py | tail -n 30 || failed=1
done
exit "${failed:-0}"
