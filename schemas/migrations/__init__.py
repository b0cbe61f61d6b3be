"""Numbered, forward-only SQL of the warehouse; `pipeline.sinks.migrations` renders and applies the files in order of their names."""
