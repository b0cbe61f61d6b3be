"""The contracts: events, rejects, warehouse rows, migrations. Imports nothing of ours."""
