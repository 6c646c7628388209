#!/usr/bin/env bash
# On a machine with a GPU and no network: builds, checks on the chip, then times. Results go to $OUT (default benchmarks/results).
# Without a GPU the same steps run on the CPU as a rehearsal, with --rehearse.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
rehearse=${1:-}
python=${PYTHON:-python3}
if [ "$rehearse" != --rehearse ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: this PyTorch sees no CUDA device; --rehearse runs the steps on the CPU" >&2
  exit 2
fi
ATROUS_CUDA=${ATROUS_CUDA:-AUTO} "$python" setup.py -q build_ext --inplace
export PYTHONPATH=$PWD
"$python" -m atrous_kernels
# Right before fast: nothing is timed unless every backend of this machine is right.
"$python" -m pytest -q -x tests/ops tests/test_problem.py -k "not 2_to_the_31" ${rehearse:+-k "exact_on_integers"}
if [ "$rehearse" = --rehearse ]; then
  "$python" -m pytest -q benchmarks/bench_conv2d.py -k "projection" --benchmark-enable --benchmark-json="$out/conv2d_rehearsal.json"
else
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
  "$python" -m pytest -q benchmarks/bench_conv2d.py --benchmark-enable --benchmark-json="$out/conv2d_$name.json"
fi
