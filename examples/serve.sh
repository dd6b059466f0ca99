#!/usr/bin/env bash
# Serves MODEL (a BF16 checkpoint) with prompts in low precision; ends with the server.
#   examples/serve.sh Qwen/Qwen3-8B [SGLang's arguments]
# Without an NVIDIA GPU it serves on the CPU, with the numbers of a Blackwell GPU, emulated: for development.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: ${0##*/} MODEL [SGLang's arguments]" >&2; exit 2; }
model=$1
shift
cpu=()
nvidia-smi -L >/dev/null 2>&1 ||
  cpu=(--device cpu --attention-backend torch_native --disable-cuda-graph --max-total-tokens 20000)
exec python -m sglang.launch_server --model-path "$model" --quantization mixquant ${cpu[@]+"${cpu[@]}"} "$@"
