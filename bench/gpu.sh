#!/usr/bin/env bash
# Eight minutes on one lent GPU: what only a GPU can show, in the order of its worth, each table as soon as it is there.
#
#   bash bench/gpu.sh                 random weights, published shapes, no files; counted numbers: docs/true-size.md
#   TINY=1 bash bench/gpu.sh          the same parts at toy size on a CPU: shows that it runs, measures nothing
#
# Where the machine lacks packages, bring wheels (diffusers; transformers 5.23 and what it needs newer) in wheels/:
#   pip download --no-deps -d wheels diffusers==0.42.1 transformers==5.23.0 ...
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ls wheels/*.whl > /dev/null 2>&1; then
  site=$(mktemp -d)
  $python -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit 1
  export PYTHONPATH=$site
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ -n "${TINY:-}" ]; then
  size=(--quick) steps=(--quick)
else
  size=(--preset astra --repeats 1) steps=("${size[@]}" --steps 12)
fi

part() { # seconds, command: a part that fails or takes too long does not take the others with it
  local limit=$1
  shift
  echo "== $* (at $SECONDS s)"
  timeout "$limit" "$@" || echo "   ended with $?"
}

$python -c "import torch, transformers, diffusers as d; g = torch.cuda
print(g.get_device_name() if g.is_available() else 'CPU', torch.__version__, transformers.__version__, d.__version__)"
part 110 $python -m pytest -q -m gpu tests/test_gpu.py
part 140 $python -m bench wm "${steps[@]}"
part 110 $python -m bench rollout "${size[@]}"
part 60 $python -m bench train_wm "${size[@]}"
part 60 $python -m bench train_rl "${size[@]}"
