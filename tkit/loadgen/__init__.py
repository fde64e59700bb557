"""Load on a running server: prompts, arrivals, protocol clients, metrics. Knows a URL and nothing of what answers."""
