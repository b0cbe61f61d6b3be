-- Users of the warehouse on ClickHouse 20.5 and newer (older: users.d/shopstream-before-20.5.xml). Run once as an administrator.
-- The users are made without a host, so that nobody can be them until each has its password and hosts, set apart from this file:
-- ALTER USER shopstream_worker IDENTIFIED WITH sha256_hash BY '…' HOST LOCAL.
-- With ON CLUSTER migrations grant CLUSTER ON *.* to the migrator too.
CREATE DATABASE IF NOT EXISTS shopstream;

CREATE ROLE IF NOT EXISTS shopstream_writes;
GRANT SELECT, INSERT ON shopstream.* TO shopstream_writes;
-- Rows and bytes of its tables at /metrics, free space for `shopstream doctor`: each is left out where this is not granted.
GRANT SELECT ON system.parts TO shopstream_writes;
GRANT SELECT ON system.disks TO shopstream_writes;
CREATE ROLE IF NOT EXISTS shopstream_reads;
GRANT SELECT ON shopstream.* TO shopstream_reads;
CREATE ROLE IF NOT EXISTS shopstream_migrates;
GRANT SELECT, INSERT, CREATE TABLE, CREATE VIEW, DROP VIEW, ALTER ON shopstream.* TO shopstream_migrates;

-- The worker inserts, reads the catalog and migrates nothing; `shopstream migrate` runs as the migrator.
CREATE USER IF NOT EXISTS shopstream_worker HOST NONE
    SETTINGS max_memory_usage = 4000000000, max_execution_time = 60;
CREATE USER IF NOT EXISTS shopstream_migrator HOST NONE;
CREATE USER IF NOT EXISTS shopstream_reader HOST NONE
    SETTINGS readonly = 2, max_memory_usage = 4000000000, max_execution_time = 60;
GRANT shopstream_writes TO shopstream_worker;
GRANT shopstream_migrates TO shopstream_migrator;
GRANT shopstream_reads TO shopstream_reader;
