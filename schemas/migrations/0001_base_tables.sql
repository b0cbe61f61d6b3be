-- Absolute values of one (keys…, partition) as of a flush: the newest version wins, in whatever order rows arrive.
-- The sorting key is the identity of a row. No PARTITION BY: one row with an odd year must not cost an insert its limit of partitions,
-- and rows of one key in two ClickHouse partitions would never merge.
CREATE TABLE IF NOT EXISTS {database}.funnel_cells {on_cluster}
(
    funnel {lowcardinality(String)},
    definition {lowcardinality(String)},
    window_start DateTime('UTC'),
    segment {lowcardinality(String)},
    level UInt8,
    bucket Int32,
    partition Int32,
    value Int64,
    final_at Int64,
    version UInt64
)
ENGINE = {replacing(funnel_cells, version)}
ORDER BY (funnel, definition, window_start, segment, level, bucket, partition) {ttl(window_start)};

CREATE TABLE IF NOT EXISTS {database}.retention_cells {on_cluster}
(
    retention {lowcardinality(String)},
    definition {lowcardinality(String)},
    cohort_start DateTime('UTC'),
    segment {lowcardinality(String)},
    period Int32,
    measure {lowcardinality(String)},
    partition Int32,
    value Int64,
    final_at Int64,
    version UInt64
)
ENGINE = {replacing(retention_cells, version)}
ORDER BY (retention, definition, cohort_start, segment, period, measure, partition) {ttl(cohort_start)};

CREATE TABLE IF NOT EXISTS {database}.kpi_cells {on_cluster}
(
    kpi {lowcardinality(String)},
    definition {lowcardinality(String)},
    window {lowcardinality(String)},
    window_start DateTime('UTC'),
    dimension {lowcardinality(String)},
    dimension_value String,
    currency {lowcardinality(String)},
    bucket Int32,
    partition Int32,
    value Int64,
    final_at Int64,
    version UInt64
)
ENGINE = {replacing(kpi_cells, version)}
ORDER BY (kpi, definition, window, window_start, dimension, dimension_value, currency, bucket, partition) {ttl(window_start)};

-- key and raw are the record's bytes, whatever they are: a ClickHouse String holds any bytes.
CREATE TABLE IF NOT EXISTS {database}.rejects {on_cluster}
(
    topic {lowcardinality(String)},
    partition Int32,
    offset Int64,
    reason {lowcardinality(String)},
    cause String,
    key String,
    raw String {zstd},
    record_ts Int64,
    version UInt64
)
ENGINE = {replacing(rejects, version)}
ORDER BY (topic, partition, offset, reason);

CREATE TABLE IF NOT EXISTS {database}.progress {on_cluster}
(
    topic {lowcardinality(String)},
    partition Int32,
    next_offset Int64,
    watermark Int64,
    applied Int64,
    duplicates Int64,
    rejected Int64,
    too_late Int64,
    rekeyed Int64,
    version UInt64
)
ENGINE = {replacing(progress, version)}
ORDER BY (topic, partition);
