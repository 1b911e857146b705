"""Status and events to the API server, and Prometheus metrics."""
