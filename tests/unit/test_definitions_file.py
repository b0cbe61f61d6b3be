"""The definitions file: what it may say, what it means, and that every error names its key and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.definitions import Definitions, Exclusion, Filter, Match
from pipeline.definitions_file import DEFAULT_FILE, DefinitionsError, load, loads
from pipeline.plan import compile_plan

FUNNEL = """
[[funnel]]
name = "checkout"
conversion_window = "1d"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "purchase"
"""
GMV = '[[kpi]]\nname = "gmv"\naggregate = "sum"\nevent = "purchase"\nfield = "value"\n'
BUYERS = '[[kpi]]\nname = "buyers"\naggregate = "users"\nevent = "purchase"\n'
SAMPLE = Path(__file__).parents[2] / "sample" / "shopstream.toml"


def errors(text: str) -> list[str]:
    with pytest.raises(DefinitionsError) as caught:
        loads(text)
    return caught.value.errors


def only_error(text: str) -> str:
    found = errors(text)
    assert len(found) == 1, found
    return found[0]


def kpis(text: str) -> dict[str, str]:
    return {kpi.name: kpi.version for kpi in loads(text).kpis}


# --- what it means ----------------------------------------------------------------------------------------------------


def test_no_path_means_the_bundled_default() -> None:
    assert load() == load(DEFAULT_FILE)


def test_default_has_funnels_retentions_and_the_boards_numbers() -> None:
    default = load()
    assert len(default.funnels) == 2
    assert len(default.retentions) == 2
    wanted = {
        "gmv",
        "refunds",
        "net_sales",
        "aov",
        "order_value",
        "close_rate",
        "refund_rate",
        "repurchase_rate_90d",
        "new_users",
        "bounce_rate",
        "conversion",
    }
    assert wanted <= {kpi.name for kpi in default.kpis}
    compile_plan(default)


def test_samples_definitions_load() -> None:
    assert load(SAMPLE).time_zone == "Europe/Berlin"


def test_empty_file_is_all_defaults() -> None:
    assert loads("") == Definitions()


def test_durations_become_milliseconds() -> None:
    found = loads('[time]\nallowed_lateness = "7d"\nmax_future = "90s"\ndeduplication_window = "500ms"\nsession_gap = "1h"')
    assert (found.lateness_ms, found.future_ms, found.deduplication_ms, found.session_gap_ms) == (604_800_000, 90_000, 500, 3_600_000)


def test_step_is_named_after_its_event_unless_it_has_a_name() -> None:
    funnel = loads(FUNNEL.replace('event = "purchase"', 'name = "Paid"\nevent = "purchase"')).funnels[0]
    assert [step.name for step in funnel.steps] == ["view_item", "Paid"]


def test_filters_read_as_conditions_with_exact_numbers() -> None:
    where = 'where = { device = "mobile", item_category = ["b", "a"], price = { lt = 20.5, gte = 0.1 }, country = { ne = "DE" } }'
    match = loads(FUNNEL.replace('event = "view_item"', f'event = "view_item"\n{where}')).funnels[0].steps[0].match
    assert match == Match(
        ("view_item",),
        (
            Filter("country", "ne", ("DE",)),
            Filter("device", "eq", ("mobile",)),
            Filter("item_category", "eq", ("a", "b")),
            Filter("price", "gte", (1_000,)),
            Filter("price", "lt", (205_000,)),
        ),
    )


def test_equal_conditions_share_a_predicate_however_they_are_written() -> None:
    first = '[[kpi]]\nname = "a"\naggregate = "count"\nevents = ["x", "y"]\nwhere = { device = ["m", "d"], price = 1 }\n'
    second = '[[kpi]]\nname = "b"\naggregate = "users"\nevents = ["y", "x"]\nwhere = { price = { eq = 1.0 }, device = ["d", "m"] }\n'
    found = loads(first + second)
    assert found.kpis[0].match == found.kpis[1].match


def test_exclusion_covers_the_whole_funnel_by_default() -> None:
    funnel = loads(FUNNEL + '[[funnel.exclusion]]\nevent = "remove_from_cart"').funnels[0]
    assert funnel.exclusions == (Exclusion(Match(("remove_from_cart",)), 1, 2),)


def test_return_event_of_a_retention_is_any_by_default() -> None:
    retention = loads('[[retention]]\nname = "r"\ncohort = { event = "sign_up" }').retentions[0]
    assert (retention.cohort, retention.returning, retention.period, retention.periods) == (Match(("sign_up",)), Match(("*",)), "day", 30)


def test_sum_of_money_is_money_and_sum_of_a_quantity_is_not() -> None:
    gmv, units = loads(GMV + GMV.replace('"gmv"', '"units"').replace('"value"', '"quantity"')).kpis
    assert (gmv.money, units.money) == (True, False)


def test_formula_takes_windows_dimensions_and_money_from_its_kpis() -> None:
    extra = 'dimensions = ["channel"]\nwindows = ["1d", "1h"]\n'
    aov = loads(GMV + extra + BUYERS + extra + '[[kpi]]\nname = "aov"\nformula = "gmv / buyers"').kpis[2]
    assert (aov.left, aov.operator, aov.right) == ("gmv", "/", "buyers")
    assert (aov.dimensions, aov.windows, aov.money) == (("channel",), ("1h", "1d"), True)


def test_money_divided_by_money_is_a_ratio() -> None:
    refunds = GMV.replace('"gmv"', '"refunds"').replace('"value"', '"refund_value"')
    assert not loads(GMV + refunds + '[[kpi]]\nname = "share"\nformula = "refunds / gmv"').kpis[2].money


# --- versions ---------------------------------------------------------------------------------------------------------


def test_version_changes_with_the_definition_and_the_time_zone_only() -> None:
    plain = loads(FUNNEL + GMV)
    assert len(plain.funnels[0].version) == 12
    zoned = loads('[shop]\ntime_zone = "Asia/Shanghai"\n' + FUNNEL + GMV)
    later = loads('[time]\nallowed_lateness = "1h"\ndeduplication_window = "1m"\n' + FUNNEL + GMV)
    longer = loads((FUNNEL + GMV).replace('"1d"', '"2d"'))
    assert plain.funnels[0].version == later.funnels[0].version
    assert len({d.funnels[0].version for d in (plain, zoned, longer)}) == 3
    assert plain.kpis[0].version == longer.kpis[0].version != zoned.kpis[0].version


def test_session_rules_change_the_version_of_session_kpis_only() -> None:
    text = BUYERS + '[[kpi]]\nname = "visits"\nsource = "sessions"\naggregate = "count"\n'
    plain = kpis(text)
    for rule in ('[time]\nsession_gap = "10m"\n', '[sessions]\npage_events = ["page_view", "screen_view"]\n'):
        changed = kpis(rule + text)
        assert changed["visits"] != plain["visits"]
        assert changed["buyers"] == plain["buyers"]


def test_the_shops_currency_changes_the_version_of_money_only() -> None:
    plain, changed = kpis(GMV + BUYERS), kpis('[shop]\ncurrency = "CHF"\n' + GMV + BUYERS)
    assert changed["gmv"] != plain["gmv"]
    assert changed["buyers"] == plain["buyers"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ('[shop]\ntime_zon = "UTC"', "shop.time_zon", 'did you mean "time_zone"'),
        ('[shp]\ncurrency = "EUR"', "shp", 'did you mean "shop"'),
        ('[shop]\ntime_zone = "Europe/Berln"', "shop.time_zone", 'did you mean "Europe/Berlin"'),
        ('[shop]\ntime_zone = "../etc/passwd"', "shop.time_zone", "write one like"),
        ('[shop]\ntime_zone = ""', "shop.time_zone", "put it in quotes"),
        ('[shop]\ncurrency = "euro"', "shop.currency", "three capital letters"),
        ("shop = 3", "shop", "a table"),
        ('[time]\nsession_gap = "30 m"', "time.session_gap", 'like "30m"'),
        ("[time]\nsession_gap = 30", "time.session_gap", 'like "30m"'),
        ('[time]\nallowed_lateness = "500d"', "time.allowed_lateness", "0d to 366d"),
        ("[sessions]\npage_events = []", "sessions.page_events", 'write ["a", "b"]'),
        (FUNNEL.replace('"checkout"', "3"), "funnel[1].name", "in quotes"),
        (FUNNEL.replace('name = "checkout"', ""), "funnel[1].name", "is missing"),
        (FUNNEL.replace("1d", "0s"), "funnel[1].conversion_window", "1ms to 366d"),
        (FUNNEL.replace('conversion_window = "1d"', ""), "funnel[1].conversion_window", "is missing"),
        (FUNNEL.replace("[[funnel]]", "[[funnel]]\norder = \"sequential\""), "funnel[1].order", "any, ordered, strict"),
        (FUNNEL.replace("[[funnel]]", "[[funnel]]\nbreakdown = \"chanel\""), "funnel[1].breakdown", 'did you mean "channel"'),
        (FUNNEL.replace("[[funnel]]", "[[funnel]]\nhold_constant = \"price\""), "funnel[1].hold_constant", "a text field is needed"),
        (FUNNEL.replace("[[funnel]]", "[[funnel]]\nentry_window = \"2d\""), "funnel[1].entry_window", "known are 1d, 1h, 1m, 1mo, 1w"),
        (FUNNEL.replace('event = "purchase"', 'evnt = "purchase"\nevent = "x"'), "funnel[1].step[2].evnt", 'did you mean "event"'),
        (FUNNEL.replace('event = "purchase"', ""), "funnel[1].step[2].event", "is missing"),
        (FUNNEL.replace('event = "purchase"', 'event = "a"\nevents = ["b"]'), "funnel[1].step[2].events", "keep one"),
        (FUNNEL.replace('event = "purchase"', 'events = ["*", "b"]'), "funnel[1].step[2].events", "leave the others out"),
        (FUNNEL + "optional = true", "funnel[1].step[2].optional", "always required"),
        (FUNNEL.replace("[[funnel.step]]\nevent = \"view_item\"", ""), "funnel[1].step", "2 to 16"),
        (FUNNEL + "where = { device = { gte = 1 } }", "funnel[1].step[2].where.device.gte", '"eq" and "ne"'),
        (FUNNEL + 'where = { price = "10" }', "funnel[1].step[2].where.price", "is not a number"),
        (FUNNEL + "where = { price = nan }", "funnel[1].step[2].where.price", "out of range"),
        (FUNNEL + "where = { price = 0.00001 }", "funnel[1].step[2].where.price", "four decimals"),
        (FUNNEL + "where = { price = true }", "funnel[1].step[2].where.price", "is not a number"),
        (FUNNEL + "where = { device = 1 }", "funnel[1].step[2].where.device", "not a text"),
        (FUNNEL + 'where = { devise = "x" }', "funnel[1].step[2].where.devise", 'did you mean "device"'),
        (FUNNEL + '[[funnel.exclusion]]\nevent = "x"\nafter = 2', "funnel[1].exclusion[1].after", "from 1 to 1"),
        (FUNNEL + '[[funnel.exclusion]]\nevent = "x"\nbefore = 3', "funnel[1].exclusion[1].before", "from 2 to 2"),
        (FUNNEL + FUNNEL, "funnel[2].name", "already the name of funnel[1]"),
        ('[[retention]]\nname = "r"\ncohort = { event = "a" }\nperiods = 367', "retention[1].periods", "from 1 to 366"),
        ('[[retention]]\nname = "r"\ncohort = { event = "a" }\nperiod = "month"\nperiods = 61', "retention[1].periods", "from 1 to 60"),
        ('[[retention]]\nname = "r"', "retention[1].cohort.event", "is missing"),
        ('[[retention]]\nname = "r"\ncohort = { event = "a", were = {} }', "retention[1].cohort.were", 'did you mean "where"'),
        ('[[retention]]\nname = "r"\ncohort = { event = "a" }\nvalue = "device"', "retention[1].value", "a number field is needed"),
        (GMV.replace('"sum"', '"total"'), "kpi[1].aggregate", "count, sum, users"),
        (GMV.replace('field = "value"', ""), "kpi[1].field", "is missing"),
        (GMV.replace('"value"', '"valeu"'), "kpi[1].field", 'did you mean "value"'),
        (BUYERS + 'field = "value"', "kpi[1].field", "remove it"),
        (BUYERS + 'within = "1d"', "kpi[1].within", "remove it"),
        (BUYERS + 'windows = ["1d", "5m"]', "kpi[1].windows", '"5m" is no window'),
        (BUYERS + 'dimensions = ["price"]', "kpi[1].dimensions", "a text field is needed"),
        (BUYERS.replace("buyers", "net buyers"), "kpi[1].name", "formula"),
        ('[[kpi]]\nname = "v"\nsource = "sessions"\naggregate = "count"\nevent = "x"', "kpi[1].event", "has its own events"),
        ('[[kpi]]\nname = "v"\nsource = "sessions"\naggregate = "dwell_quantile"\nquantile = 50', "kpi[1].quantile", "between 0 and 1"),
        ('[[kpi]]\nname = "v"\nsource = "repeat"\nevent = "purchase"', "kpi[1].within", "is missing"),
        (BUYERS + '[[kpi]]\nname = "f"\nformula = "buyer / buyers"', "kpi[2].formula", 'did you mean "buyers"'),
        (BUYERS + '[[kpi]]\nname = "f"\nformula = "buyers * 2"', "kpi[2].formula", "one of + - /"),
        (BUYERS + '[[kpi]]\nname = "f"\nformula = "f / buyers"', "kpi[2].formula", "is a formula, too"),
        (GMV + BUYERS + 'windows = ["1d"]\n[[kpi]]\nname = "f"\nformula = "gmv / buyers"', "kpi[3].formula", "give both the same"),
        (GMV + BUYERS + 'dimensions = ["device"]\n[[kpi]]\nname = "f"\nformula = "gmv / buyers"', "kpi[3].formula", "give both the same"),
        (GMV + BUYERS + '[[kpi]]\nname = "f"\nformula = "gmv - buyers"', "kpi[3].formula", "two of a kind"),
        (GMV + BUYERS + '[[kpi]]\nname = "f"\nformula = "buyers / gmv"', "kpi[3].formula", "divided by money"),
        (GMV + BUYERS + '[[kpi]]\nname = "f"\nformula = "gmv / buyers"\nwindows = ["1w"]', "kpi[3].windows", "remove the key"),
    ],
)  # fmt: skip
def test_error_names_key_and_remedy(text: str, key: str, remedy: str) -> None:
    message = only_error(text)
    assert message.startswith(f"{key}: ")
    assert remedy in message


def test_optional_step_of_an_any_funnel_is_refused() -> None:
    text = FUNNEL.replace("[[funnel]]", '[[funnel]]\norder = "any"') + "optional = true"
    assert 'with order = "any"' in only_error(text)


def test_all_errors_are_told_at_once_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text('[shop]\ncurrency = "x"\n' + FUNNEL.replace('"1d"', '"soon"') + BUYERS.replace('"users"', '"people"'))
    with pytest.raises(DefinitionsError) as caught:
        load(path)
    assert len(caught.value.errors) == 3
    assert all(line.startswith("shop.toml: ") for line in str(caught.value).splitlines())


def test_broken_toml_a_missing_file_and_latin1_are_errors_with_a_remedy(tmp_path: Path) -> None:
    assert "is not TOML" in only_error("[shop\n")
    with pytest.raises(DefinitionsError, match="can't be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'[shop]\ncurrency = "\xe4"')
    with pytest.raises(DefinitionsError, match="save it as UTF-8"):
        load(tmp_path / "latin.toml")


def test_a_wrong_type_anywhere_is_an_error_not_a_crash() -> None:
    for text in (
        "funnel = 1",
        "[funnel]\nname = 'x'",
        "kpi = [1]",
        "[[kpi]]\nname = []",
        "[[kpi]]\nname = 'k'\nsource = 3",
        "[time]\nsession_gap = [1]",
    ):
        assert errors(text)


def test_too_many_different_conditions_are_refused() -> None:
    many = "".join(f'[[kpi]]\nname = "k{i}"\naggregate = "count"\nevent = "e{i}"\n' for i in range(512))
    assert "at most 512" in only_error(many)


def test_too_many_steps_are_refused() -> None:
    assert "there are 17 steps" in only_error(FUNNEL + '[[funnel.step]]\nevent = "x"\n' * 15)
