-- A revision is one computation of all numbers from the topics. `shopstream rebuild` computes the next one beside that in force, under definition
-- versions of its own, and one row here shows all of it at once. follows: the revision it was begun beside. plan: what it is computed from.
-- since: windows that start before it (ms) keep the rows they had. moved: some users' events are in partitions that are not theirs. shown_at (ms): in force from then on, 0: not yet.
CREATE TABLE IF NOT EXISTS {database}.revisions {on_cluster}
(
    revision Int32,
    follows Int32,
    plan String,
    since Int64,
    moved UInt8,
    shown_at Int64
)
ENGINE = {replacing(revisions, shown_at)}
ORDER BY revision;

CREATE VIEW IF NOT EXISTS {database}.current_revision {on_cluster} AS
SELECT max(revision) AS revision FROM {database}.revisions WHERE shown_at > 0;

ALTER TABLE {database}.progress {on_cluster} ADD COLUMN revision Int32, MODIFY ORDER BY (topic, partition, revision);
ALTER TABLE {database}.catalog_funnels {on_cluster} ADD COLUMN revision Int32, MODIFY ORDER BY (funnel, definition, step, revision);
ALTER TABLE {database}.catalog_retentions {on_cluster} ADD COLUMN revision Int32, MODIFY ORDER BY (retention, definition, revision);
ALTER TABLE {database}.catalog_kpis {on_cluster} ADD COLUMN revision Int32, MODIFY ORDER BY (kpi, definition, revision);
ALTER TABLE {database}.catalog_shop {on_cluster} ADD COLUMN revision Int32, MODIFY ORDER BY (setting, value, revision);

-- One row a source topic partition, of the revision in force.
CREATE VIEW IF NOT EXISTS {database}.current_progress {on_cluster} AS
SELECT
    topic,
    partition,
    argMax(next_offset, version) AS next_offset,
    argMax(watermark, version) AS watermark,
    argMax(applied, version) AS applied,
    argMax(duplicates, version) AS duplicates,
    argMax(rejected, version) AS rejected,
    argMax(too_late, version) AS too_late,
    argMax(rekeyed, version) AS rekeyed
FROM {database}.progress
WHERE revision IN (SELECT revision FROM {database}.current_revision)
GROUP BY topic, partition;

{drop_view} IF EXISTS {database}.watermarks {on_cluster};
CREATE VIEW IF NOT EXISTS {database}.watermarks {on_cluster} AS
SELECT 1 AS one, min(watermark) AS smallest, max(watermark) AS largest
FROM
(
    SELECT topic, partition, argMax(watermark, version) AS watermark
    FROM {database}.progress
    WHERE revision IN (SELECT revision FROM {database}.current_revision)
    GROUP BY topic, partition
)
WHERE watermark > 0;

{drop_view} IF EXISTS {database}.current_funnels {on_cluster};
CREATE VIEW IF NOT EXISTS {database}.current_funnels {on_cluster} AS
SELECT funnel, definition
FROM
(
    SELECT funnel, definition, installed_at
    FROM {database}.catalog_funnels
    WHERE revision IN (SELECT revision FROM {database}.current_revision)
    ORDER BY installed_at DESC, definition DESC LIMIT 1 BY funnel
)
WHERE definition != '';

{drop_view} IF EXISTS {database}.current_retentions {on_cluster};
CREATE VIEW IF NOT EXISTS {database}.current_retentions {on_cluster} AS
SELECT retention, definition, period AS period_unit, periods
FROM
(
    SELECT retention, definition, period, periods, installed_at
    FROM {database}.catalog_retentions
    WHERE revision IN (SELECT revision FROM {database}.current_revision)
    ORDER BY installed_at DESC, definition DESC LIMIT 1 BY retention
)
WHERE definition != '';

{drop_view} IF EXISTS {database}.current_kpis {on_cluster};
CREATE VIEW IF NOT EXISTS {database}.current_kpis {on_cluster} AS
SELECT kpi, definition, kind, scale, left_kpi, operator, right_kpi, quantile, follows_ms
FROM
(
    SELECT kpi, definition, kind, scale, left_kpi, operator, right_kpi, quantile, follows_ms, installed_at
    FROM {database}.catalog_kpis
    WHERE revision IN (SELECT revision FROM {database}.current_revision)
    ORDER BY installed_at DESC, definition DESC LIMIT 1 BY kpi
)
WHERE definition != '';

{drop_view} IF EXISTS {database}.current_shop {on_cluster};
CREATE VIEW IF NOT EXISTS {database}.current_shop {on_cluster} AS
SELECT setting, value
FROM
(
    SELECT setting, value, installed_at
    FROM {database}.catalog_shop
    WHERE revision IN (SELECT revision FROM {database}.current_revision)
    ORDER BY installed_at DESC, value DESC LIMIT 1 BY setting
)
WHERE value != '';
