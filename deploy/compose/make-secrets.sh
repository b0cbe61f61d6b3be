#!/bin/sh
# Makes the passwords of docker-compose.yml, each a file of its own in secrets/ (or in the folder given); those that are there stay.
# The folder is closed to others; the files are readable, since each container reads them as another user.
set -eu
folder=${1:-secrets}
mkdir -p "$folder"
chmod 700 "$folder"
for name in clickhouse_worker clickhouse_migrator clickhouse_reader grafana_admin; do
    test -s "$folder/$name" && continue
    head -c 24 /dev/urandom | base64 | tr '+/' '-_' | tr -d '\n' > "$folder/$name"
    chmod 644 "$folder/$name"
done
