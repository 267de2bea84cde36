# Written by olmoearth-jax
# Starts the processes of host $HOST_INDEX and hands a request to stop on to them.
{{preflight}}
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for devices in {{device_sets}}; do
  {{command}} \
    --coordinator="$COORDINATOR" --num_processes={{processes}} \
    --process_id=$((HOST_INDEX * {{processes_per_host}} + ${#pids[@]})) \
    --local_device_ids="$devices" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a signal ends `wait` early
  wait "$pid" || status=$?
done
exit "$status"
