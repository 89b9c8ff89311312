"""What training reports: to `metrics.jsonl`, to the console, to TensorBoard and other trackers."""

from burnish.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter"]
