#!/bin/bash
# Runs one host of the job:  bash docker.sh {{usage}}
{{topology}}
set -u
HOST_INDEX="${1:-{{first_host}}}"
COORDINATOR="${2:-{{coordinator}}}"
if ! [[ "$HOST_INDEX" =~ ^[0-9]+$ ]] || [ -z "$COORDINATOR" ] || [ "$HOST_INDEX" -ge {{hosts}} ]; then
  echo "usage: bash $0 HOST_INDEX(0..{{last_host}}) ADDRESS_OF_HOST_0:PORT" >&2
  exit 2
fi
{{folders}}
# A container of an earlier start that has ended would hold the name; one that runs keeps it.
NAME={{job}}-"$HOST_INDEX"
docker ps --all --quiet --filter "name=^$NAME\$" --filter label=olmoearth-jax --filter status=exited \
    --filter status=created \
  | xargs --no-run-if-empty docker rm > /dev/null
exec docker run --name "$NAME" --label olmoearth-jax {{restart}} --stop-timeout {{grace}} \
  --gpus '"device={{devices}}"' --network host --ipc host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
  --workdir {{workdir}}{{memory}} \
{{options}}
  -e HOST_INDEX="$HOST_INDEX" -e COORDINATOR="$COORDINATOR" \
  -v {{host_script}}:/host.sh:ro {{image}} bash /host.sh
