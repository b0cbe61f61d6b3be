#!/bin/bash
# Runs once, in the ClickHouse container, while the new server listens on loopback only: the users and roles of deploy/clickhouse/grants.sql,
# each with the password in its file. The hash goes in by standard input: a command line can be read by others.
set -euo pipefail
secrets=/run/secrets
client=(clickhouse-client --host 127.0.0.1 --multiquery)
"${client[@]}" < "/opt/shopstream/grants.sql"
for role in worker migrator reader; do
    test -s "$secrets/clickhouse_$role"
    hash=$(tr -d '\r\n' < "$secrets/clickhouse_$role" | sha256sum | cut -d ' ' -f 1)
    echo "ALTER USER shopstream_$role IDENTIFIED WITH sha256_hash BY '$hash' HOST ANY" | "${client[@]}"
done
