"""Prometheus metrics, gauges of current state, health, and the server that shows them."""
