"""One job by several processes."""
