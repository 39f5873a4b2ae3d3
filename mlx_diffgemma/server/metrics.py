"""What `/metrics` says, in the text form of Prometheus."""
