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
exec docker run --name {{job}}-"$HOST_INDEX" {{restart}} --stop-timeout {{grace}} \
  --gpus '"device={{devices}}"' --network host --ipc host --ulimit memlock=-1 --user "$(id -u):$(id -g)" \
  --workdir {{workdir}}{{memory}} \
{{options}}
  -e HOST_INDEX="$HOST_INDEX" -e COORDINATOR="$COORDINATOR" \
  -v {{host_script}}:/host.sh:ro {{image}} bash /host.sh
