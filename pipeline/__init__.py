"""Shopstream: Kafka events in; exact funnels, retention and KPIs out to ClickHouse. The flow is drawn in ARCHITECTURE.md."""
