# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# On a GPU host, once every part that pack.sh made lies in PARTS_DIR, and again in each
# new shell:
#
#   source benchmarks/gpu/unpack.sh PARTS_DIR [SITE_DIR]
#
# Unpacks into SITE_DIR, unless that was done, and puts it on PYTHONPATH.
site=${2:-/tmp/lookahead-site}
if [ ! -e "$site/.whole" ]; then
  mkdir -p "$site"
  # A bare host may lack xz, but not Python's.
  (
    set -o pipefail
    cat "${1:?usage: source unpack.sh PARTS_DIR [SITE_DIR]}"/part-* | python3 -c '
import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer)' | tar -x -C "$site"
  ) && touch "$site/.whole"
fi
if [ -e "$site/.whole" ]; then
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  export VLLM_USE_FLASHINFER_SAMPLER=0 # vLLM imports FlashInfer for it unguarded
else
  echo "PARTS_DIR ${1-}: could not unpack it to $site; are all parts there?" >&2
  false
fi
