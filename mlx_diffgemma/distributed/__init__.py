"""One model over several Macs: what is split, who computes what, and how the processes keep together."""
