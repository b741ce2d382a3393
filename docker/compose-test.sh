#!/usr/bin/env bash
# End-to-end test in containers (`make compose-test`). Needs only Docker, its compose plugin and bash.
#
# A server starts. A tenant builds a memory of real texts, trains an adapter and translates. A gateway gives the same
# texts. A replica is killed under load. Everything stops and starts again. Exits with status 0 if every check passed.
# Takes about ten minutes on two cores once the images are built, and leaves only the images behind.
set -euo pipefail
cd "$(dirname "$0")/.."

export COMPOSE_PROJECT_NAME=pema-compose-test
export PEMA_PORT=${PEMA_PORT:-18000} PEMA_GRPC_PORT=${PEMA_GRPC_PORT:-18001}
export PEMA_BALANCER_PORT=$PEMA_PORT PEMA_BALANCER_GRPC_PORT=$PEMA_GRPC_PORT
export PEMA_GATEWAY_PORT=${PEMA_GATEWAY_PORT:-18010} PEMA_GATEWAY_KEY=key-of-applications
rest=http://127.0.0.1:$PEMA_PORT grpc=grpc://127.0.0.1:$PEMA_GRPC_PORT
base=${PEMA_BASE:-python:3.11-slim-bookworm}
server_image=${PEMA_SERVER_IMAGE:-pema-server} client_image=${PEMA_CLIENT_IMAGE:-pema-client}
work=pema-compose-test-work  # the data owner's volume
key_pattern='pema_[0-9a-f]{16}_[A-Za-z0-9_-]{43}'
ready_within_s=900
alone=(-f docker-compose.yml)
fleet=(-f docker-compose.yml -f docker/compose.replicas.yml)
with_gateway=(-f docker-compose.yml -f docker/compose.gateway.yml)

say() { printf '\n=== %s (%d s)\n' "$*" "$SECONDS"; }
ok() { printf '    ok: %s\n' "$*"; }
fail() { printf '    FAILED: %s\n' "$*" >&2; exit 1; }
expect() { local what=$1; shift; if "$@"; then ok "$what"; else fail "$what"; fi; }

compose() { if docker compose version >/dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi; }
# With several replicas Docker chooses their ports, and clients use those of the balancer.
compose_fleet() { PEMA_PORT='' PEMA_GRPC_PORT='' compose "${fleet[@]}" "$@"; }
# The adapter is in the overlay's own volume of that name, and was trained with the tenant's key.
compose_gateway() { PEMA_API_KEY=${key:-} PEMA_ADAPTER=adapter compose "${with_gateway[@]}" "$@"; }
containers() { docker ps --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" --filter "label=com.docker.compose.service=$1"; }

in_client() { docker run --rm --interactive --network host --volume "$work:/work" --entrypoint "$1" "$client_image" "${@:2}"; }
client() { # KEY SERVER VERB …
  docker run --rm --network host --read-only --tmpfs /tmp --cap-drop ALL --volume "$work:/work" \
    --env PEMA_API_KEY="$1" --env PEMA_SERVER="$2" "$client_image" "${@:3}"
}

clean_up() {
  local status=$?
  if [[ $status -ne 0 ]]; then
    compose_fleet logs --tail=30 server 2>&1 | cut -c1-300 || true
    compose_gateway logs --tail=30 gateway 2>&1 | cut -c1-300 || true
  fi
  compose_gateway down --volumes >/dev/null 2>&1 || true
  compose_fleet down --volumes --remove-orphans >/dev/null 2>&1 || true
  docker volume rm --force "$work" >/dev/null 2>&1 || true
  exit "$status"
}
trap clean_up EXIT

wait_until_healthy() { # SERVICE NUMBER
  local deadline=$((SECONDS + ready_within_s)) healthy
  while :; do
    healthy=$(containers "$1" | xargs --no-run-if-empty docker inspect --format '{{.State.Health.Status}}' | grep -cx healthy || true)
    [[ $healthy -eq $2 ]] && return
    [[ $SECONDS -lt $deadline ]] || fail "$1 is not healthy after $ready_within_s s"
    sleep 1
  done
}

status_of() { # PATH [KEY [ADDRESS]]
  in_client python - "${3:-$rest}$1" "${2:-}" <<'PYTHON'
import sys, httpx
_, url, key = sys.argv
print(httpx.get(url, headers={"Authorization": f"Bearer {key}"} if key else {}).status_code)
PYTHON
}

# ---------------------------------------------------------------------------------------------------------------------
say 'The images are built'
compose_fleet build
docker build --quiet --build-arg BASE="$base" --file docker/client.Dockerfile --tag "$client_image" .

say 'The owner: docker compose up'
compose "${alone[@]}" up --detach
wait_until_healthy server 1
first=$(compose "${alone[@]}" logs first-tenant | grep -oE "$key_pattern" || true)
expect 'the key of a first tenant was printed, once' test "$(wc -w <<<"$first")" -eq 1
expect 'ready without a key' test "$(status_of /readyz)" -eq 200
expect 'no call without a key' test "$(status_of /v1/model)" -eq 401
expect 'a call with the key' test "$(status_of /v1/model "$first")" -eq 200

say 'The container may do little'
server=$(containers server)
inside() { docker exec "$server" "$@"; }
expect 'it is not root' test "$(inside id -u)" -ne 0
expect 'its root file system is read-only' test "$(inside sh -c 'touch /opt/x 2>&1 || true' | grep -c Read-only)" -eq 1
expect 'it has no capabilities' test "$(inside sh -c 'grep CapEff /proc/1/status')" = $'CapEff:\t0000000000000000'
expect 'it gains no privileges' test "$(inside sh -c 'grep NoNewPrivs /proc/1/status')" = $'NoNewPrivs:\t1'
addresses=$(docker inspect --format '{{range .NetworkSettings.Ports}}{{range .}}{{.HostIp}} {{end}}{{end}}' "$server" | xargs -n 1 | sort -u)
expect 'its ports are on loopback alone' test "$addresses" = 127.0.0.1

say 'The owner lets another tenant in'
key=$(inside pema-server tenants add acme --tokens-per-day 5000000)
expect 'it has another key' test "$key" != "$first"

say 'The data owner: texts of Home Assistant, English and German'
# With the base image's pip, because the client has none.
in_client sh -c 'mkdir -p data && pip download --quiet --no-deps --ignore-requires-python --dest data homeassistant==2025.4.4'
in_client pip install --quiet --no-deps --target . "$(grep '^tomli_w==' constraints.txt)"  # which writes the task
tar --create harness/__init__.py harness/datasets | in_client tar --extract
in_client python - <<'PYTHON'
from pathlib import Path
from harness.datasets import home_assistant
home_assistant.prepare(Path("data"), train=600)
for name, number in (("validation", 60), ("test", 24)):
    lines = Path(f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(f"data/{name}.jsonl").write_text("".join(lines[:number]), encoding="utf-8")
PYTHON

say 'builds an external memory'
client "$key" "$rest" build-memory --task data/task.toml --input data/train.jsonl --validation data/validation.jsonl \
  --memory memory --share-targets

say 'trains an adapter'
client "$key" "$grpc" train --memory memory --adapter adapter --minutes 0 --retrieved-examples 0 --no-gate --selection-texts 0

say 'and translates'
client "$key" "$grpc" evaluate --adapter adapter --input data/test.jsonl --share-targets --json \
  | in_client tee evaluation.json >/dev/null
expect 'the adapter makes the references likelier, and the texts more like them' in_client python - <<'PYTHON'
import json, sys
report = json.load(open("evaluation.json", encoding="utf-8"))
perplexity, plm, pema = report["perplexity"], report["plm"], report["pema"]
print(f"    perplexity {perplexity['plm']:.2f} -> {perplexity['mixture']:.2f}, chrF {plm['chrf']:.1f} -> {pema['chrf']:.1f}")
sys.exit(not (perplexity["mixture"] < 0.95 * perplexity["plm"] and pema["chrf"] > plm["chrf"]))
PYTHON
translated() { client "$key" "$1" translate --adapter adapter --input data/test.jsonl --output "$2" >/dev/null; }
same() { in_client cmp "$1" "$2"; }
translated "$rest" before.de

used() { docker exec "$(containers server | head -n 1)" pema-server tenants usage acme --json; }
tokens() { in_client python -c 'import json, sys; print(sum(day["tokens"] for day in json.load(sys.stdin)))'; }
before=$(used | tokens)
expect "what it used is put down: $before tokens" test "$before" -gt 10000

say 'The gateway beside the server'
compose_gateway up --no-start --no-deps gateway
docker run --rm --user root --volume "$work:/work:ro" --volume "${COMPOSE_PROJECT_NAME}_adapter:/adapter" --entrypoint cp \
  "$client_image" --archive /work/adapter/. /adapter
compose_gateway up --detach gateway
wait_until_healthy gateway 1
gateway=http://127.0.0.1:$PEMA_GATEWAY_PORT
expect 'the page needs no key' test "$(status_of / '' "$gateway") $(status_of /page.js '' "$gateway")" = '200 200'
expect 'models need one' test "$(status_of /v1/models '' "$gateway")" -eq 401
expect 'a wrong key is refused' test "$(status_of /v1/models wrong "$gateway")" -eq 401
expect 'the key of applications is good' test "$(status_of /v1/models "$PEMA_GATEWAY_KEY" "$gateway")" -eq 200
expect 'another container gets the texts of translate' docker run --rm --interactive --volume "$work:/work:ro" \
  --network "${COMPOSE_PROJECT_NAME}_default" --entrypoint python "$client_image" \
  - "http://gateway:$PEMA_GATEWAY_PORT/v1" "$PEMA_GATEWAY_KEY" <<'PYTHON'
import json, sys
from concurrent.futures import ThreadPoolExecutor
import httpx
_, url, key = sys.argv
def answer(text):
    body = {"model": "adapter", "messages": [{"role": "user", "content": text}]}
    answered = client.post("/chat/completions", json=body).raise_for_status().json()
    return " ".join(answered["choices"][0]["message"]["content"].splitlines())
sources = [json.loads(line)["source"] for line in open("data/test.jsonl", encoding="utf-8")]
with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300) as client, ThreadPoolExecutor(8) as threads:
    texts = list(threads.map(answer, sources))
sys.exit(texts != open("before.de", encoding="utf-8").read().splitlines())
PYTHON
compose_gateway rm --stop --force gateway

say 'Two replicas behind a balancer'
compose "${alone[@]}" down
compose_fleet up --detach
wait_until_healthy server 2
wait_until_healthy balancer 1
expect 'the key is still good' test "$(status_of /v1/model "$key")" -eq 200

say 'A replica is killed under load'
load() { # SERVER NAME: translates again and again
  local round
  for round in 1 2; do translated "$1" "load-$2-$round.de" && same before.de "load-$2-$round.de" || return 1; done
}
load "$rest" rest & rest_load=$!
load "$grpc" grpc & grpc_load=$!
calls_of() { docker logs "$1" 2>&1 | grep -ci decode || true; }
busiest() { for replica in $(containers server); do echo "$(calls_of "$replica") $replica"; done | sort -rn | head -n 1; }
until read -r calls replica < <(busiest) && [[ $calls -ge 6 ]]; do
  kill -0 "$rest_load" "$grpc_load" || fail 'the clients were done before there was a replica to kill'
  sleep 0.2
done
for other in $(containers server); do echo "    $other: $(calls_of "$other") calls of decode"; done
docker kill "$replica" >/dev/null
kill -0 "$rest_load" "$grpc_load" || fail 'the clients were done before it was killed'
echo "    killed: $replica"
wait "$rest_load" || fail 'a client over REST saw an error, or another text'
ok 'no client over REST saw an error, and all texts are the same'
wait "$grpc_load" || fail 'a client over gRPC saw an error, or another text'
ok 'no client over gRPC saw an error, and all texts are the same'
expect 'one replica did it alone at the end' test "$(containers server | wc -l)" -eq 1
during=$(used | tokens)

say 'All goes down, and comes up again'
compose_fleet down
expect 'nothing runs' test -z "$(containers server)$(containers balancer)"
compose "${alone[@]}" up --detach
wait_until_healthy server 1
expect 'no key was printed again' test -z "$(compose "${alone[@]}" logs first-tenant | grep -oE "$key_pattern")"
expect 'the keys are still good' test "$(status_of /v1/model "$key") $(status_of /v1/model "$first")" = '200 200'
expect "what was used is still put down: $during tokens" test "$(used | tokens)" -ge "$during"
expect 'memory and adapter belong to the model, in the same secret basis' \
  client "$key" "$rest" doctor --memory memory --adapter adapter
translated "$rest" after.de
expect 'the texts are the same as before' same before.de after.de

say 'All expectations held'
