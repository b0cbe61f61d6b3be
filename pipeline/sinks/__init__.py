"""The warehouse: one protocol, the embedded (chdb) and the server (clickhouse-driver) implementation."""
