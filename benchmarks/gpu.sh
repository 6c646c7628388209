#!/usr/bin/env bash
# On a machine with a GPU and no network: builds, checks on the chip, then times. Results go to $OUT (default benchmarks/results).
#   gpu.sh             build, all op tests, compute-sanitizer on small shapes, benchmarks
#   gpu.sh --tune      build, the launch configurations of this GPU model: into atrous_kernels/tuned, or into $OUT where it is set
#   gpu.sh --profile   build, the kernels of the benchmark's cases under ncu, or PyTorch's profiler where there is no ncu
# Each stays below ten minutes: a step that would go beyond is stopped, and what was finished is kept.
# --rehearse, alone or before the others, runs all of it on the CPU as far as that goes, without building: on small cases, with
# modelled times, into $OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
python=${PYTHON:-python3}
seconds=${SECONDS_IN_ALL:-570}
rehearse= part=check
for argument; do
  case $argument in
    --rehearse) rehearse=1 ;;
    --tune | --profile) part=${argument#--} ;;
    *) echo "gpu.sh: expected --tune, --profile or --rehearse, but got $argument" >&2; exit 2 ;;
  esac
done

# step NAME MOST COMMAND...: runs the command for at most MOST seconds, and never beyond the time for all.
step() {
  local name=$1 most=$2 left=$((seconds - SECONDS)) from=$SECONDS
  shift 2
  [ "$left" -gt 0 ] || { echo "gpu.sh: no time left for $name" >&2; return 1; }
  echo "== $name"
  timeout -k 10 "$((most < left ? most : left))" "$@" || { echo "gpu.sh: $name failed ($?)" >&2; return 1; }
  echo "== $name took $((SECONDS - from)) s"
}

if [ -n "$rehearse" ]; then
  out=${OUT:?--rehearse needs OUT: a rehearsal is not a result}
  mkdir -p "$out"
  step report 60 "$python" -m atrous_kernels
  step tests 200 "$python" -m pytest -q -x tests/cuda/test_on_gpu.py tests/test_problem.py -k "on_gpu or roofline"
  step benchmark 200 env TORCHDYNAMO_DISABLE=1 BENCH_SECONDS=0.2 "$python" -m pytest -q benchmarks/bench_upsample_argmax.py \
    -k CamVid --benchmark-enable --benchmark-json="$out/upsample_argmax_rehearsal.json"
  step tune 100 "$python" -m atrous_kernels.tune --dry-run --calls 2 --output "$out/tuned_rehearsal.json"
  step profile 100 "$python" -m benchmarks.profiling --small --output "$out/profile_rehearsal.txt"
  exit
fi

out=${OUT:-benchmarks/results}
mkdir -p "$out"
if ! arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * ((a, b) == (9, 0)))' \
    2> /dev/null); then
  echo "gpu.sh: this PyTorch sees no CUDA device; OUT=FOLDER gpu.sh --rehearse runs the steps on the CPU" >&2
  exit 2
fi
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_"))')
# Only for the chip that is there: a build for all of them takes twice as long or more.
step build 240 env ATROUS_CUDA="${ATROUS_CUDA:-ON}" ATROUS_CUDA_ARCHS="${ATROUS_CUDA_ARCHS:-$arch}" \
  "$python" setup.py -q build_ext --inplace
step report 60 "$python" -m atrous_kernels

case $part in
  check)
    parallel=$("$python" -c 'import xdist' 2> /dev/null && echo "-n 8" || true)
    # Right before fast: nothing is timed unless every backend of this machine is right.
    step tests 300 "$python" -m pytest -q -x $parallel tests/ops tests/test_problem.py tests/cuda/test_on_gpu.py -k "not 2_to_the_31"
    if command -v compute-sanitizer > /dev/null; then
      # Small shapes; PyTorch's caching allocator would hide accesses past the end of a tensor.
      step sanitizer 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -q -x tests/cuda/test_on_gpu.py -k small
    else
      echo "== sanitizer: compute-sanitizer is not on the PATH, left out"
    fi
    # The question that decides most, whether the framework's convolution skips taps, is answered by the first file.
    for op in conv2d aspp upsample_cross_entropy conv_bn_relu upsample_argmax; do
      step "benchmark $op" 330 env BENCH_SECONDS=2 "$python" -m pytest -q "benchmarks/bench_$op.py" --benchmark-enable \
        --benchmark-json="$out/${op}_$name.json" || echo "gpu.sh: going on without $op" >&2
    done
    ;;
  tune) step tune 480 "$python" -m atrous_kernels.tune --minutes 6 ${OUT:+--output "$OUT/gpu_$name.json"} ;;
  profile)
    if command -v ncu > /dev/null; then
      step profile 400 ncu --clock-control none --set basic --profile-from-start off -f -o "$out/profile_$name" \
        "$python" -m benchmarks.profiling --once ||
        step profile 120 "$python" -m benchmarks.profiling --output "$out/profile_$name.txt"
    else
      step profile 120 "$python" -m benchmarks.profiling --output "$out/profile_$name.txt"
    fi
    ;;
esac
