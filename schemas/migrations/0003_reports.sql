-- ClickHouse 18.16 allows one JOIN a SELECT and overlooks a column that only a lambda uses: hence the nesting, and conditions like step > 0.
-- Every report takes the newest version of each (keys…, partition), adds the partitions up, and shows only the definition installed last.
-- final = 1: the smallest watermark among the source partitions that have seen an event has passed the point from which nothing can change.
CREATE VIEW IF NOT EXISTS {database}.watermarks {on_cluster} AS
SELECT 1 AS one, min(watermark) AS smallest, max(watermark) AS largest
FROM (SELECT topic, partition, argMax(watermark, version) AS watermark FROM {database}.progress GROUP BY topic, partition)
WHERE watermark > 0;

CREATE VIEW IF NOT EXISTS {database}.current_funnels {on_cluster} AS
SELECT funnel, definition
FROM (SELECT funnel, definition, installed_at FROM {database}.catalog_funnels ORDER BY installed_at DESC, definition DESC LIMIT 1 BY funnel)
WHERE definition != '';

CREATE VIEW IF NOT EXISTS {database}.current_retentions {on_cluster} AS
SELECT retention, definition, period AS period_unit, periods
FROM
(
    SELECT retention, definition, period, periods, installed_at
    FROM {database}.catalog_retentions
    ORDER BY installed_at DESC, definition DESC LIMIT 1 BY retention
)
WHERE definition != '';

CREATE VIEW IF NOT EXISTS {database}.current_kpis {on_cluster} AS
SELECT kpi, definition, kind, scale, left_kpi, operator, right_kpi, quantile, follows_ms
FROM
(
    SELECT kpi, definition, kind, scale, left_kpi, operator, right_kpi, quantile, follows_ms, installed_at
    FROM {database}.catalog_kpis
    ORDER BY installed_at DESC, definition DESC LIMIT 1 BY kpi
)
WHERE definition != '';

-- users: those whose deepest step is this one or a later one, also 0. median_ms, p90_ms: time from the first step of the users who got
-- exactly as far as this step, the upper bound of the histogram's bucket (nearest rank); on the last step that is the time to convert.
CREATE VIEW IF NOT EXISTS {database}.funnel_report {on_cluster} AS
SELECT
    funnel,
    window_start,
    segment,
    step,
    step_name,
    toUInt64(if(step > 0, arraySum(arrayMap((level, n) -> if(level >= step, n, toInt64(0)), levels, counts)), toInt64(0))) AS users,
    toUInt8(final_at <= smallest) AS final,
    if(step > 0, arraySum(arrayMap((level, ms) -> if(level = step, ms, toInt64(0)), levels, medians)), toInt64(0)) AS median_ms,
    if(step > 0, arraySum(arrayMap((level, ms) -> if(level = step, ms, toInt64(0)), levels, p90s)), toInt64(0)) AS p90_ms
FROM
(
    SELECT 1 AS one, funnel, definition, window_start, segment, levels, counts, medians, p90s, final_at, step, step_name
    FROM
    (
        SELECT
            funnel,
            definition,
            window_start,
            segment,
            groupArray(level) AS levels,
            groupArray(n) AS counts,
            groupArray(median) AS medians,
            groupArray(p90) AS p90s,
            max(last_change) AS final_at
        FROM
        (
            SELECT
                funnel,
                definition,
                window_start,
                segment,
                level,
                sum(n_users) AS n,
                quantileExactWeighted(0.5)(upper_ms, toUInt64(n_users)) AS median,
                quantileExactWeighted(0.9)(upper_ms, toUInt64(n_users)) AS p90,
                max(cell_final_at) AS last_change
            FROM
            (
                SELECT funnel, definition, window_start, segment, level, bucket, n_users, cell_final_at
                FROM
                (
                    SELECT
                        funnel,
                        definition,
                        window_start,
                        segment,
                        level,
                        bucket,
                        partition,
                        argMax(value, version) AS n_users,
                        max(final_at) AS cell_final_at
                    FROM {database}.funnel_cells
                    GROUP BY funnel, definition, window_start, segment, level, bucket, partition
                )
                WHERE n_users > 0
            ) AS cells
            ANY LEFT JOIN (SELECT * FROM {database}.histogram_bounds) AS histogram_bounds USING (bucket)
            GROUP BY funnel, definition, window_start, segment, level
        )
        GROUP BY funnel, definition, window_start, segment
    ) AS cells
    ALL INNER JOIN
    (
        SELECT funnel, definition, step, step_name
        FROM (SELECT DISTINCT funnel, definition, step, step_name FROM {database}.catalog_funnels WHERE step > 0) AS cells
        ALL INNER JOIN (SELECT * FROM {database}.current_funnels) AS current_funnels USING (funnel, definition)
    ) AS names
    USING (funnel, definition)
) AS cells
ANY LEFT JOIN (SELECT * FROM {database}.watermarks) AS watermarks USING (one);

-- A cohort's row for every period from 0 to the last that has begun by the largest watermark, at most the definition's number, and beyond
-- them those with users: 0 says nobody came. SQL knows no shop's zone: the local date of a cohort's midnight is that of 13 hours
-- later (right for offsets of -10 to +13 hours), and a period without a cell is final an hour late, for clocks that change.
-- final is that of users and value; users_on_or_after can change until the cohort's last period is final.
-- users_on_or_after: users whose last active period is this one or later. value: the sum of the value field in the period.
CREATE VIEW IF NOT EXISTS {database}.retention_report {on_cluster} AS
SELECT
    retention,
    cohort_start,
    segment,
    period,
    toUInt64(arraySum(arrayMap((p, m, v) -> if(p = period AND m = 'users', v, toInt64(0)), cell_periods, measures, amounts))) AS users,
    toUInt8(if(
        arrayExists((p, f) -> p = period AND f > 0, cell_periods, finals),
        arrayReduce('max', arrayMap((p, f) -> if(p = period, f, toInt64(0)), cell_periods, finals)),
        first_final_at + (toInt64(ends) - toInt64(first_ends)) * 86400000 + 3600000
    ) <= smallest) AS final,
    toUInt64(arraySum(arrayMap((p, m, v) -> if(p >= period AND m = 'last', v, toInt64(0)), cell_periods, measures, amounts))) AS users_on_or_after,
    toDecimal128(arraySum(arrayMap((p, m, v) -> if(p = period AND m = 'value', v, toInt64(0)), cell_periods, measures, amounts)), 4)
        / toInt32(10000) AS value
FROM
(
    SELECT
        retention,
        cohort_start,
        segment,
        toInt32(period_number) AS period,
        toDate(cohort_start + 46800, 'UTC') AS local_date,
        multiIf(
            period_unit = 'day', addDays(local_date, period),
            period_unit = 'week', addDays(local_date, period * 7),
            addMonths(local_date, period)
        ) AS begins,
        multiIf(
            period_unit = 'day', addDays(local_date, period + 1),
            period_unit = 'week', addDays(local_date, period * 7 + 7),
            addMonths(local_date, period + 1)
        ) AS ends,
        multiIf(period_unit = 'day', addDays(local_date, 1), period_unit = 'week', addDays(local_date, 7), addMonths(local_date, 1)) AS first_ends,
        cell_periods,
        measures,
        amounts,
        finals,
        first_final_at,
        last_cell,
        smallest,
        largest
    FROM
    (
        SELECT
            retention, cohort_start, segment, cell_periods, measures, amounts, finals, first_final_at, last_cell, period_unit, periods, smallest, largest
        FROM
        (
            SELECT
                retention,
                definition,
                cohort_start,
                segment,
                groupArray(period) AS cell_periods,
                groupArray(measure) AS measures,
                groupArray(amount) AS amounts,
                groupArray(if(measure = 'last', toInt64(0), last_change)) AS finals,
                minIf(last_change, measure != 'last') AS first_final_at,
                max(period) AS last_cell
            FROM
            (
                SELECT retention, definition, cohort_start, segment, period, measure, sum(cell_value) AS amount, max(cell_final_at) AS last_change
                FROM
                (
                    SELECT
                        retention,
                        definition,
                        cohort_start,
                        segment,
                        period,
                        measure,
                        partition,
                        argMax(value, version) AS cell_value,
                        max(final_at) AS cell_final_at
                    FROM {database}.retention_cells
                    GROUP BY retention, definition, cohort_start, segment, period, measure, partition
                )
                GROUP BY retention, definition, cohort_start, segment, period, measure
            )
            WHERE amount != 0
            GROUP BY retention, definition, cohort_start, segment
        ) AS cells
        ALL INNER JOIN
        (
            SELECT retention, definition, period_unit, periods, smallest, largest
            FROM (SELECT 1 AS one, retention, definition, period_unit, periods FROM {database}.current_retentions) AS current
            ANY LEFT JOIN (SELECT * FROM {database}.watermarks) AS watermarks USING (one)
        ) AS names
        USING (retention, definition)
    )
    ARRAY JOIN range(toUInt64(periods + 1)) AS period_number
)
WHERE period <= last_cell OR toInt64(cohort_start) + (toInt64(begins) - toInt64(local_date)) * 86400 <= intDiv(largest, 1000);

-- One pass: every stored number is a leg of its own KPI and of the formulas that name it. A count has no currency and goes with each
-- currency of a formula's other leg. A missing leg of a sum or difference is 0, a ratio without denominator has no row.
-- Quotients have 8 digits, cut off. A quantile is the upper bound (ms) of the histogram's bucket that holds the nearest rank.
-- waits_ms: a formula is final with its slower leg, also where that leg has no row yet.
CREATE VIEW IF NOT EXISTS {database}.kpi_legs {on_cluster} AS
SELECT stored, definition, kind, scale, quantile, kpi, operator, side, kpi_follows_ms - follows_ms AS waits_ms
FROM
(
    SELECT left_kpi AS stored, kpi, operator, 'left' AS side, follows_ms AS kpi_follows_ms FROM {database}.current_kpis WHERE kind = 'formula'
    UNION ALL
    SELECT right_kpi AS stored, kpi, operator, 'right' AS side, follows_ms AS kpi_follows_ms FROM {database}.current_kpis WHERE kind = 'formula'
    UNION ALL
    SELECT kpi AS stored, kpi, '' AS operator, 'left' AS side, follows_ms AS kpi_follows_ms FROM {database}.current_kpis WHERE kind != 'formula'
) AS legs
ALL INNER JOIN
(
    SELECT kpi AS stored, definition, kind, scale, quantile, follows_ms FROM {database}.current_kpis WHERE kind != 'formula'
) AS names
USING (stored);

CREATE VIEW IF NOT EXISTS {database}.kpi_numbers {on_cluster} AS
SELECT
    kpi AS stored,
    definition,
    window,
    window_start,
    dimension,
    dimension_value,
    currency,
    groupArray(upper_ms) AS bounds,
    groupArray(amount) AS amounts,
    sum(amount) AS total,
    max(last_change) AS final_at
FROM
(
    SELECT kpi, definition, window, window_start, dimension, dimension_value, currency, upper_ms, amount, last_change
    FROM
    (
        SELECT kpi, definition, window, window_start, dimension, dimension_value, currency, bucket, sum(cell_value) AS amount, max(cell_final_at) AS last_change
        FROM
        (
            SELECT
                kpi,
                definition,
                window,
                window_start,
                dimension,
                dimension_value,
                currency,
                bucket,
                partition,
                argMax(value, version) AS cell_value,
                max(final_at) AS cell_final_at
            FROM {database}.kpi_cells
            GROUP BY kpi, definition, window, window_start, dimension, dimension_value, currency, bucket, partition
        )
        GROUP BY kpi, definition, window, window_start, dimension, dimension_value, currency, bucket
    ) AS cells
    ANY LEFT JOIN (SELECT * FROM {database}.histogram_bounds) AS histogram_bounds USING (bucket)
    WHERE amount != 0
    ORDER BY bucket
)
GROUP BY kpi, definition, window, window_start, dimension, dimension_value, currency;

CREATE VIEW IF NOT EXISTS {database}.kpi_report {on_cluster} AS
SELECT
    kpi,
    window,
    window_start,
    dimension,
    dimension_value,
    multiIf(
        operator = '/', toDecimal128(left_value * if(left_scale < right_scale, right_scale, toInt64(1)), 8)
            / if(right_value = 0, toInt64(1), right_value * if(right_scale < left_scale, left_scale, toInt64(1))),
        operator = '-', toDecimal128(left_value * if(left_scale < right_scale, right_scale, toInt64(1))
            - right_value * if(right_scale < left_scale, left_scale, toInt64(1)), 8) / greatest(left_scale, right_scale),
        operator = '+', toDecimal128(left_value * if(left_scale < right_scale, right_scale, toInt64(1))
            + right_value * if(right_scale < left_scale, left_scale, toInt64(1)), 8) / greatest(left_scale, right_scale),
        toDecimal128(left_value, 8) / left_scale
    ) AS value,
    currency,
    toUInt8(last_change <= smallest) AS final
FROM
(
    SELECT
        1 AS one,
        kpi,
        operator,
        window,
        window_start,
        dimension,
        dimension_value,
        currency,
        arraySum(arrayMap((s, c, v) -> if(s = 'left' AND (c = currency OR c = ''), v, toInt64(0)), sides, currencies, numbers)) AS left_value,
        arraySum(arrayMap((s, c, v) -> if(s = 'right' AND (c = currency OR c = ''), v, toInt64(0)), sides, currencies, numbers)) AS right_value,
        arrayReduce('max', arrayMap((s, x) -> if(s = 'left', x, toInt64(1)), sides, scales)) AS left_scale,
        arrayReduce('max', arrayMap((s, x) -> if(s = 'right', x, toInt64(1)), sides, scales)) AS right_scale,
        last_change
    FROM
    (
        SELECT
            kpi,
            operator,
            window,
            window_start,
            dimension,
            dimension_value,
            groupArray(side) AS sides,
            groupArray(currency) AS currencies,
            groupArray(number) AS numbers,
            groupArray(scale) AS scales,
            max(final_at) AS last_change
        FROM
        (
            SELECT
                kpi,
                operator,
                side,
                scale,
                window,
                window_start,
                dimension,
                dimension_value,
                currency,
                if(kind = 'quantile' AND rank > 0, bounds[toInt32(arrayFirstIndex(n -> n >= rank, arrayCumSum(amounts)))], total) AS number,
                final_at
            FROM
            (
                SELECT
                    kpi,
                    operator,
                    side,
                    scale,
                    kind,
                    window,
                    window_start,
                    dimension,
                    dimension_value,
                    currency,
                    bounds,
                    amounts,
                    total,
                    ceil(round(quantile * total, 6)) AS rank,
                    final_at + waits_ms AS final_at
                FROM (SELECT * FROM {database}.kpi_numbers WHERE total != 0) AS cells
                ALL INNER JOIN (SELECT * FROM {database}.kpi_legs) AS kpi_legs USING (stored, definition)
            )
        )
        GROUP BY kpi, operator, window, window_start, dimension, dimension_value
    )
    ARRAY JOIN if(arrayExists(c -> c != '', currencies), arrayDistinct(arrayFilter(c -> c != '', currencies)), [toString('')]) AS currency
) AS cells
ANY LEFT JOIN (SELECT * FROM {database}.watermarks) AS watermarks USING (one)
WHERE operator != '/' OR right_value != 0;
