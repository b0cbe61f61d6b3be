-- What the windows in the tables mean: the shop's time zone and its currency. A report on days must not depend on which definitions file its reader has.
CREATE TABLE IF NOT EXISTS {database}.catalog_shop {on_cluster}
(
    setting String,
    value String,
    installed_at Int64
)
ENGINE = {replacing(catalog_shop, installed_at)}
ORDER BY (setting, value);

CREATE VIEW IF NOT EXISTS {database}.current_shop {on_cluster} AS
SELECT setting, value
FROM (SELECT setting, value, installed_at FROM {database}.catalog_shop ORDER BY installed_at DESC, value DESC LIMIT 1 BY setting)
WHERE value != '';
