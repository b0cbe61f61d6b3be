"""A warehouse from its URL: the one place that knows which implementations there are. Each is imported only when it is used."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from pipeline.sinks.migrations import Deployment
from pipeline.sinks.warehouse import Warehouse

FORMS = "chdb:///folder | clickhouse://user@host:port/database?secure=1 | shared://127.0.0.1:port"
_OPTIONS = {"secure", "verify", "ca_certs", "compression", "connect_timeout", "timeout", "cluster", "replicated", "retain_days"}


def open_warehouse(url: str, password: str | None = None) -> Warehouse:
    """The Warehouse that `url` names; nothing is contacted before the first call (a folder is opened at once).

    `chdb:///folder` (`chdb://` keeps it in memory) | `clickhouse://user@host:port/database`, options `secure`, `verify`, `ca_certs`,
    `compression`, `connect_timeout`, `timeout` (seconds), `cluster`, `replicated`, `retain_days` | `shared://127.0.0.1:port`, whose key
    is in the environment variable SHOPSTREAM_WAREHOUSE_KEY. A password in the URL is refused: URLs get logged. ValueError names what is wrong.
    """
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("the warehouse URL holds a password; give it apart, URLs get logged")
    options = _options(parts)
    if parts.scheme == "chdb":
        from pipeline.sinks.embedded import EmbeddedWarehouse

        return EmbeddedWarehouse(unquote(parts.netloc + parts.path), Deployment("default", retain_days=_number(options, "retain_days", 0)))
    if parts.scheme == "clickhouse":
        return _server(parts, options, password)
    if parts.scheme == "shared":
        from pipeline.sinks.shared import SharedWarehouse, environment_key

        if parts.port is None:
            raise ValueError("shared:// needs a port, like shared://127.0.0.1:4711")
        return SharedWarehouse((parts.hostname or "127.0.0.1", parts.port), environment_key())
    raise ValueError(f"a warehouse URL is one of {FORMS}; got {parts.scheme}://…")


def _server(parts: SplitResult, options: dict[str, str], password: str | None) -> Warehouse:
    from pipeline.sinks.server import Endpoint, ServerWarehouse

    secure = _flag(options, "secure", False)
    endpoint = Endpoint(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or (9440 if secure else 9000),
        user=unquote(parts.username or "default"),
        password=password or "",
        secure=secure,
        verify=_flag(options, "verify", True),
        ca_certs=options.get("ca_certs"),
        compression=_flag(options, "compression", False),
        connect_timeout=_number(options, "connect_timeout", 5),
        timeout=_number(options, "timeout", 60),
    )
    deployment = Deployment(
        database=unquote(parts.path.strip("/")) or "shopstream",
        cluster=options.get("cluster", ""),
        replicated=_flag(options, "replicated", False),
        retain_days=_number(options, "retain_days", 0),
    )
    return ServerWarehouse(endpoint, deployment)


def _options(parts: SplitResult) -> dict[str, str]:
    options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if unknown := options.keys() - _OPTIONS:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))} in the warehouse URL; there are {', '.join(sorted(_OPTIONS))}")
    return options


def _flag(options: dict[str, str], name: str, default: bool) -> bool:
    value = options.get(name)
    if value is None:
        return default
    if value.lower() in ("1", "true", "yes"):
        return True
    if value.lower() in ("0", "false", "no"):
        return False
    raise ValueError(f"{name}={value} in the warehouse URL: use 1 or 0")


def _number(options: dict[str, str], name: str, default: int) -> int:
    value = options.get(name, str(default))
    if not value.isdigit():
        raise ValueError(f"{name}={value} in the warehouse URL: use a whole number")
    return int(value)
