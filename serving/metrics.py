"""Counts and latencies of requests, as text for Prometheus under the names that TF Serving uses."""

from __future__ import annotations

import bisect
import threading

BUCKETS = [10.0 * 1.8**power for power in range(33)]  # microseconds, as in the server; the last ends at 25 minutes
COUNT, LATENCY = ":tensorflow:serving:request_count", ":tensorflow:serving:request_latency"


class Metrics:
    """Requests that have been answered. Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = {}  # (model, status) -> requests
        self._latencies = {}  # (model, entry point) -> [requests per bucket, sum in microseconds]

    def record(self, model: str, entry_point: str, code: str, seconds: float) -> None:
        """Add one predict request: entry_point "REST" or "GRPC", code the name of a gRPC status code."""
        microseconds = seconds * 1e6
        with self._lock:
            self._counts[model, code] = self._counts.get((model, code), 0) + 1
            if code == "OK":
                latency = self._latencies.setdefault((model, entry_point), [[0] * (len(BUCKETS) + 1), 0.0])
                latency[0][bisect.bisect_left(BUCKETS, microseconds)] += 1
                latency[1] += microseconds

    def text(self) -> str:
        """Prometheus text format, version 0.0.4."""
        with self._lock:
            lines = [f"# TYPE {COUNT} counter"]
            for (model, code), count in sorted(self._counts.items()):
                lines.append(f'{COUNT}{{model_name="{escaped(model)}",status="{code}"}} {count}')
            lines.append(f"# TYPE {LATENCY} histogram")
            for (model, entry_point), (buckets, total) in sorted(self._latencies.items()):
                labels = f'model_name="{escaped(model)}",API="predict",entrypoint="{entry_point}"'
                below = 0
                for limit, count in zip([f"{limit:g}" for limit in BUCKETS] + ["+Inf"], buckets, strict=True):
                    below += count
                    lines.append(f'{LATENCY}_bucket{{{labels},le="{limit}"}} {below}')
                lines.append(f"{LATENCY}_sum{{{labels}}} {total:g}")
                lines.append(f"{LATENCY}_count{{{labels}}} {below}")
        return "\n".join(lines) + "\n"


def escaped(value: str) -> str:
    """A label's value."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
