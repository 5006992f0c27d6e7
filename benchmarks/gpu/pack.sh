#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pack vLLM's CUDA build and the Python packages that it needs for a GPU host without
# network, in parts of limited size:
#
#   benchmarks/gpu/pack.sh OUT_DIR [MIB_PER_PART [PACKAGE...]]
#                                       here: OUT_DIR/part-00, part-01, ...
#   source benchmarks/gpu/unpack.sh PARTS_DIR
#                                       there
#
# The host has Linux on x86-64, PyTorch, Triton, transformers, NumPy and Numba of its
# own, which stay in use; a PACKAGE is what it lacks besides, pytest perhaps, without its
# dependencies. PYTHON_VERSION is the host's Python.
#
# Left out, for size: FlashInfer, FlashAttention 2, the Rust front end, and kernels that
# only other models or other GPUs need. Also left out: arctic-inference, of which there
# is no wheel, so `suffix` does not run.
set -euo pipefail
out=${1:?usage: pack.sh OUT_DIR [MIB_PER_PART [PACKAGE...]]}
size=${2:-40}
python=${PYTHON_VERSION:-3.12}
vllm=0.32.0
[[ ${VLLM_VERSION:-$vllm} == "$vllm" ]] || {
  echo "VLLM_VERSION $VLLM_VERSION: what is packed besides are the versions that" \
    "$vllm pins; unset it, or first edit vllm= and packages= in pack.sh" >&2
  exit 1
}
[[ $size =~ ^[1-9][0-9]*$ ]] || {
  echo "MIB_PER_PART $size: give a whole number of MiB, as in 40" >&2
  exit 1
}
if compgen -G "$out/part-*" >/dev/null; then
  echo "OUT_DIR $out: it holds parts already; remove them or give another folder" >&2
  exit 1
fi

# By vLLM's metadata, without what such a host has.
packages=(
  "vllm==$vllm" annotated-doc annotated-types anthropic apache-tvm-ffi==0.1.11 astor
  blake3 cachetools cbor2 cloudpickle compressed-tensors==0.17.0 depyf==0.20.0 dill
  distro dnspython docstring-parser email-validator 'fastapi<0.137,>=0.133'
  googleapis-common-protos httptools httpx-sse ijson interegular jiter jmespath
  jsonschema jsonschema-specifications lark==1.2.2 'llguidance<1.8,>=1.7'
  lm-format-enforcer==0.11.3 loguru 'mcp<3,>=2' 'mistral-common>=1.11.6'
  model-hosting-container-standards msgspec nvtx==0.2.15 openai opentelemetry-api
  opentelemetry-exporter-otlp opentelemetry-exporter-otlp-proto-common
  opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http
  opentelemetry-proto opentelemetry-sdk opentelemetry-semantic-conventions
  opentelemetry-semantic-conventions-ai oss-harmony outlines-core==0.2.14
  partial-json-parser prometheus-fastapi-instrumentator pybase64 pycountry pydantic
  pydantic-core pydantic-extra-types pydantic-settings pyjwt python-dotenv
  python-json-logger python-multipart pyzmq referencing rpds-py setproctitle sniffio
  sse-starlette 'starlette>=1.0.1' supervisor typing-inspection uvicorn watchfiles
  websockets xgrammar==0.2.8
)
unused=(
  vllm-rs vllm_flash_attn/_vllm_fa2_C.abi3.so _qutlass_C.abi3.so _flashmla_C.abi3.so
  _flashmla_extension_C.abi3.so _flashkda_C.abi3.so _deepselect_C.abi3.so
  third_party/deep_gemm third_party/fmha_sm100
)
platforms=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64)
for n in 17 24 26 27 28 31 34 35 39; do
  platforms+=(--platform "manylinux_2_${n}_x86_64")
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/wheels" "$work/tree"
# Without dependencies: the host's own, of other versions, serve as well.
python3 -m pip --disable-pip-version-check download --quiet --no-deps \
  --only-binary=:all: --python-version "$python" --implementation cp \
  "${platforms[@]}" --dest "$work/wheels" "${packages[@]}" "${@:3}"
for wheel in "$work"/wheels/*.whl; do
  python3 -m zipfile -e "$wheel" "$work/tree"
done
(cd "$work/tree" && for name in "${unused[@]}"; do rm -rf "vllm/$name"; done)
tar -c -C "$work/tree" . | xz -T0 -6 | split -b "${size}M" -d - "$out/part-"
ls -l "$out"
